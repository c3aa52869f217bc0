//! What one client can make the server do or hold. Each number says why it is that number.
//!
//! Together they bound the memory of a connection by about [`INPUT_BYTES`] + [`OUTPUT_BYTES`] + [`IN_FLIGHT_BYTES_MAX`],
//! and one read of [`PAYLOAD_BYTES_MAX`] more when a client without structured replies asks for that.

use std::time::Duration;

/// Longest option that is looked at, bytes: a name of 4 KiB with as much beside it. Longer ones are skipped.
pub const OPTION_BYTES_MAX: u32 = 8 << 10;

/// Most bytes that a client may send before it attaches: what `qemu-nbd --list` asks of some four hundred exports.
pub const HANDSHAKE_BYTES_MAX: u64 = 64 << 10;

/// Most options of one negotiation; the shortest are 16 bytes long, so this is met before [`HANDSHAKE_BYTES_MAX`].
pub const OPTIONS_MAX: u32 = 2048;

/// How long negotiation may keep us waiting for the client, all in all. Our own waiting (for a volume's server, say) is
/// not counted. The same as csnap's other handshakes.
pub const HANDSHAKE_TIME_MAX: Duration = Duration::from_millis(csnap_proto::limits::HANDSHAKE_MS_MAX);

/// Longest string, bytes: the protocol's own limit.
pub const STRING_BYTES_MAX: usize = 4096;

/// Largest payload that is advertised, bytes: what clients may count on in any case.
pub const PAYLOAD_BYTES_ADVERTISED: u32 = 32 << 20;

/// Largest READ or WRITE that is served, bytes. Twice what is advertised, as there are clients that do not ask; payloads
/// are written as they arrive and structured reads are sent as they come, so the size costs no memory.
pub const PAYLOAD_BYTES_MAX: u32 = 64 << 20;

/// Most extents in one answer to BLOCK_STATUS: one page of work for the export, 32 KiB on the wire.
pub const STATUS_EXTENTS_MAX: usize = 4096;

/// Most requests of one connection that wait at the same time; beyond, it is not read. Eight times the depth of the
/// kernel's client.
pub const IN_FLIGHT_REQUESTS_MAX: usize = 1024;

/// Most payload bytes of one connection that waiting requests hold; beyond, it is not read.
pub const IN_FLIGHT_BYTES_MAX: usize = 16 << 20;

/// A large transfer is cut into pieces of this size, bytes: what stays in a core's cache between the two copies.
pub const PIECE_BYTES: usize = 256 << 10;

/// Where a large write is cut, bytes of the export: a multiple of every page and of most chunks.
pub const PIECE_ALIGN: u64 = 64 << 10;

/// Part of a large read that is asked of an export that has to wait for it, bytes.
pub const WAITING_PART_BYTES: usize = 1 << 20;

/// Buffer for what has arrived, bytes: a queue of 32 writes of 4 KiB three times over, and any write below
/// [`PIECE_BYTES`] whole.
pub const INPUT_BYTES: usize = 512 << 10;

/// Replies are sent when this much is pending, bytes, or when nothing is left to handle.
pub const OUTPUT_HIGH_BYTES: usize = 256 << 10;

/// Largest read that is answered in one piece straight from the buffer, bytes: the largest that Linux's client sends.
pub const WHOLE_READ_BYTES: usize = 1280 << 10;

/// Buffer for replies, bytes.
pub const OUTPUT_BYTES: usize = 2 << 20;

/// Room that one reply needs beside its data, bytes: header and the longest text.
pub const REPLY_ROOM_BYTES: usize = 128 + STRING_BYTES_MAX;

/// Longest human-readable text in an error, bytes.
pub const MESSAGE_BYTES_MAX: usize = STRING_BYTES_MAX;

/// Most connections of one exporter.
pub const CONNECTIONS_MAX: usize = csnap_proto::limits::CONNECTIONS_MAX;

/// Buffer for what has arrived while an export is negotiated, bytes: the longest option that is looked at, and as much again.
pub const HANDSHAKE_INPUT_BYTES: usize = 16 << 10;

/// After DISC: how long requests in flight and unread replies are waited for. Longer than any failover.
pub const DRAIN_TIME_MAX: Duration = Duration::from_secs(30);

/// The same when the exporter ends: a request that waits for a server may never be done, and somebody waits for the end.
pub const SHUTDOWN_DRAIN_TIME_MAX: Duration = Duration::from_secs(3);

/// How long an orderly end takes at most, draining and giving exports back.
pub const SHUTDOWN_TIME_MAX: Duration = Duration::from_secs(6);

const _: () = assert!(OUTPUT_HIGH_BYTES + WHOLE_READ_BYTES + REPLY_ROOM_BYTES <= OUTPUT_BYTES);
const _: () = assert!(8 * STATUS_EXTENTS_MAX + REPLY_ROOM_BYTES + OUTPUT_HIGH_BYTES <= OUTPUT_BYTES);
const _: () = assert!(PIECE_BYTES + super::wire::REQUEST_BYTES <= INPUT_BYTES);
const _: () = assert!(OPTION_BYTES_MAX as usize + super::wire::OPTION_HEADER_BYTES < HANDSHAKE_INPUT_BYTES);
const _: () = assert!(HANDSHAKE_INPUT_BYTES <= INPUT_BYTES);
const _: () = assert!(PIECE_ALIGN <= PIECE_BYTES as u64 && WAITING_PART_BYTES <= IN_FLIGHT_BYTES_MAX);
