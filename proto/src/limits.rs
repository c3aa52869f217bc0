//! Every bound that a peer, a file or an operator can run into. Each says why it is that number.

/// Largest frame, header included. Large enough for a thousand ranges with their answers, small enough that a
/// hostile peer cannot make us hold much.
pub const FRAME_BYTES_MAX: usize = 1 << 20;

/// Longest name of a volume, snapshot or node: fits a file name and a line of output.
pub const NAME_BYTES_MAX: usize = 128;

/// Longest path that a message carries (an adopted origin): Linux's own limit.
pub const PATH_BYTES_MAX: usize = 4096;

/// Most ranges in one message: one full batch of the deepest queue that NBD clients use (1,024 requests).
pub const RANGES_PER_MESSAGE_MAX: usize = 1024;

/// Most chunks that one QueryWrite or QuerySnapshotRead may cover: 16 MiB at 4 KiB chunks, four times the largest
/// sequential request seen from kernels, and still an answer (16 bytes an extent) well below a frame.
pub const CHUNKS_PER_MESSAGE_MAX: u64 = 4096;

/// Most requests of one connection that the server holds unanswered; beyond, it stops reading the connection.
pub const REQUESTS_PER_CONNECTION_MAX: usize = 1024;

/// Most snapshot reads that one connection leaves unfinished, between their message 2 and their message 3: 64 full messages
/// are a gibibyte in flight at 4 KiB chunks. Bounds the marks that the server keeps for it.
pub const SNAPSHOT_READS_MAX: usize = 64;

/// Most connections that a daemon holds at once: a thousand volumes a node, with room.
pub const CONNECTIONS_MAX: usize = 4096;

/// Longest first frame of a connection to a server or an agent, bytes: who one is, names and addresses. So strangers on every
/// connection that a daemon has make it hold 64 MiB, not as many frames of [`FRAME_BYTES_MAX`].
pub const INTRODUCTION_BYTES_MAX: usize = 16 << 10;

/// A connection that has not introduced itself by then is closed, milliseconds.
pub const HANDSHAKE_MS_MAX: u64 = 10_000;

/// Smallest chunk of a volume, also the unit of store allocation, bytes: a page, and NBD's preferred block.
pub const CHUNK_BYTES_MIN: u64 = 4096;

/// Largest chunk of a volume, bytes: Archipelago's and RBD's object.
pub const CHUNK_BYTES_MAX: u64 = 4 << 20;

/// Chunks in one page of uniqueness bits: 64 bytes of bits, 2 MiB of a volume at 4 KiB chunks.
pub const CHUNKS_PER_PAGE: u64 = 512;

/// Largest volume, bytes: 8 EiB less a chunk, so that offsets stay positive as signed numbers; file systems refuse
/// far earlier.
pub const VOLUME_BYTES_MAX: u64 = (1 << 63) - CHUNK_BYTES_MAX;

/// Bytes of one arena of the store.
pub const ARENA_BYTES: u64 = 1 << 30;

/// Most client sessions of a pool: sixteen times the connections, for those whose owners are lost.
pub const SESSIONS_MAX: usize = 1 << 16;

/// Most volumes that a declaration of a dead writer names: one that writes more than all sessions together does not exist.
/// As numbers of at most ten bytes they fit a frame.
pub const LOOKED_AT_MAX: usize = SESSIONS_MAX;

/// Stored results of mutating requests that one session may leave unacknowledged; an operator sends one at a time.
pub const RESULTS_PER_SESSION_MAX: usize = 64;

/// Largest value block of a lock, bytes: an address or two, a term, a state (VMS: 16 or 64, Linux: 32).
pub const VALUE_BLOCK_BYTES_MAX: usize = 256;

/// Longest lock name, bytes (Linux's DLM: 64).
pub const LOCK_NAME_BYTES_MAX: usize = 64;

/// Largest description that a lockd member publishes of itself, bytes.
pub const MEMBER_INFO_BYTES_MAX: usize = 2048;

/// Events that lockd keeps for a session that is not connected; one that falls further behind is told to look anew.
pub const EVENTS_PER_SESSION_MAX: usize = 1024;

/// Locks of one lockd session.
pub const LOCKS_PER_SESSION_MAX: usize = 4096;

/// Operations of one lockd session whose answers its owner may leave unacknowledged: lockd keeps those answers.
pub const OPERATIONS_PER_SESSION_MAX: usize = 64;

/// Live sessions of a lockd: one an agent. So few that a list of them all fits a frame.
pub const LOCKD_SESSIONS_MAX: usize = 256;

/// Most addresses that a lockd listens on for clients: one a network.
pub const LOCKD_ADDRESSES_MAX: usize = 16;

/// Most replicas of a group of lockds, learners included: five voters, and as many that replace them.
pub const LOCKD_REPLICAS_MAX: usize = 10;

/// Shortest lease of a lockd session, milliseconds: shorter ones would expire by scheduling alone.
pub const LEASE_MS_MIN: u64 = 50;

/// Longest lease of a lockd session, milliseconds: a day.
pub const LEASE_MS_MAX: u64 = 24 * 3600 * 1000;

/// Persistent locks of a lockd, orphaned or not: they outlive sessions, whose number bounds the others.
pub const PERSISTENT_LOCKS_MAX: usize = 4096;

/// Longest name of a key of lockd, bytes: a path with a few parts.
pub const KEY_BYTES_MAX: usize = 256;

/// Largest value of a key, bytes: configuration, not data.
pub const KEY_VALUE_BYTES_MAX: usize = 4096;

/// Keys of a lockd.
pub const KEYS_MAX: usize = 16_384;

/// Bytes of all keys of a lockd with their values: they are in every snapshot of its table.
pub const KEYS_TOTAL_BYTES_MAX: usize = 4 << 20;

/// Keys that go with one session.
pub const EPHEMERAL_KEYS_PER_SESSION_MAX: usize = 1024;

/// Keys in one page of a list.
pub const KEYS_PER_PAGE_MAX: usize = 128;

/// Locks in one page of a list.
pub const LOCKS_PER_PAGE_MAX: usize = 1024;

/// Locks on one resource: every grant looks at all of them.
pub const LOCKS_PER_RESOURCE_MAX: usize = 4096;

/// Watches of one lockd session.
pub const WATCHES_PER_SESSION_MAX: usize = 4096;

/// Lockspaces of one group of lockds, those that moved away included: each is a table of its own in every snapshot.
pub const LOCKSPACES_MAX: usize = 16;

/// Lockspaces that a group takes in at once: each is held in memory until it is whole.
pub const IMPORTS_MAX: usize = 2;

/// Largest lockspace that moves, bytes: a full store of keys, and fifty thousand locks. All of it is decoded and checked in
/// one step of a lockd, which must be short beside an election.
pub const LOCKSPACE_BYTES_MAX: usize = 8 << 20;

/// Bytes of a lockspace in one request: half of the longest command of lockd's log.
pub const IMPORT_BYTES_MAX: usize = 16 << 10;

/// Addresses at which a group of lockds is found: its replicas, or a few networks of each.
pub const GROUP_ADDRESSES_MAX: usize = 16;

/// Most attachments in one report of an exporter: a volume each of a well filled hypervisor, some of them snapshots. An
/// exporter that has more reports the first ones.
pub const CLIENTS_PER_REPORT_MAX: usize = 512;

/// Most bytes of the attachments in one report of an exporter, for a status carries them beside the descriptions of all
/// nodes: five hundred that do well, or a dozen with the longest texts.
pub const REPORT_BYTES_MAX: usize = 256 << 10;

/// Most counters of messages in the report of one attachment: a few for each message that clients and servers have.
pub const MESSAGE_COUNTERS_MAX: usize = 64;

/// Longest text that says why an attachment waits, bytes: a reason, and the path that it is about.
pub const WAITING_BYTES_MAX: usize = PATH_BYTES_MAX + REASON_BYTES_MAX;

/// Longest `host:port` that a server is reached at, bytes: a numeric IPv6 address with its scope and port.
pub const SERVER_ADDRESS_BYTES_MAX: usize = 64;

/// Longest human-readable reason that a refusal carries, bytes: NBD's limit on error text.
pub const REASON_BYTES_MAX: usize = 4096;

const _: () = assert!(CHUNK_BYTES_MAX.is_power_of_two() && CHUNK_BYTES_MIN.is_power_of_two());
const _: () = assert!(NAME_BYTES_MAX + SERVER_ADDRESS_BYTES_MAX + 32 <= VALUE_BLOCK_BYTES_MAX);
const _: () = assert!(LOOKED_AT_MAX * 10 + 1024 < FRAME_BYTES_MAX);
const _: () = assert!(ARENA_BYTES.is_multiple_of(CHUNK_BYTES_MAX));
const _: () = assert!(CHUNKS_PER_MESSAGE_MAX * 48 < FRAME_BYTES_MAX as u64);
const _: () = assert!(LOCKD_SESSIONS_MAX * (MEMBER_INFO_BYTES_MAX + NAME_BYTES_MAX + 32) < FRAME_BYTES_MAX);
const _: () = assert!(REPORT_BYTES_MAX < FRAME_BYTES_MAX / 2);
const _: () = assert!(LOCKS_PER_SESSION_MAX * 2 * (LOCK_NAME_BYTES_MAX + 32) < FRAME_BYTES_MAX);
const _: () = assert!(KEYS_PER_PAGE_MAX * (KEY_BYTES_MAX + KEY_VALUE_BYTES_MAX + 64) < FRAME_BYTES_MAX);
const _: () = assert!(LOCKS_PER_PAGE_MAX * (LOCK_NAME_BYTES_MAX + NAME_BYTES_MAX + 96) < FRAME_BYTES_MAX);
const _: () = assert!(LOCKS_PER_RESOURCE_MAX * 96 < FRAME_BYTES_MAX);
