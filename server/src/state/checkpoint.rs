//! Checkpoints: the state as bytes, in pieces, and back.
//!
//! A checkpoint is a sequence of rows in postcard, packed into pieces that each fit a record of the journal's files.
//! It is canonical: equal states give equal bytes, whatever their histories, so that the digest of the bytes is the
//! digest of the state. What can be worked out from the rest (indexes, which blocks are taken) is not written.
//!
//! Order of rows: the header; servers; arenas; for each volume its row, deleted snapshots, snapshots, head births, versions;
//! sessions with their results; batches of frees, each followed by whom it waits for; the end, with the digest of
//! everything before. `Loader` is the way back.

use csnap_proto::ids::{
    Epoch, FreeBatchId, InstanceId, Name, PoolId, Secret, Sequence, SessionId, Term, VolumeId,
};
use csnap_proto::units::{Chunk, ChunkSize, StoreExtent, WallMillis};
use serde::{Deserialize, Serialize};

use super::State;
use super::arena::{Arena, GROUP_BLOCKS, GroupBits};
use super::free::Frees;
use super::record::{Attached, Kept, Origin};
use super::session::{Session, StoredResult};
use super::volume::{Reaping, Snapshot, Volume};

/// Largest piece of a checkpoint, bytes.
pub const PIECE_BYTES_MAX: usize = 256 << 10;

/// Version of the rows; there is one so far.
pub(super) const FORMAT: u32 = 1;

/// Entries in one row of a list: some 10 KiB.
const ENTRIES_PER_ROW: usize = 256;

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Row {
    Header {
        format: u32,
        pool: PoolId,
        term: Term,
        open_batch: FreeBatchId,
    },
    /// Terms whose servers are not known dead, and their nodes.
    Servers {
        servers: Vec<(Term, Name)>,
    },
    Arena {
        term: Term,
        number: u32,
        touched: u32,
        backed: Vec<GroupRow>,
    },
    Volume(Box<VolumeRow>),
    Dying {
        epochs: Vec<Epoch>,
    },
    Snapshots {
        snapshots: Vec<Snapshot>,
    },
    Heads {
        heads: Vec<(Chunk, Epoch)>,
    },
    Versions {
        versions: Vec<((Chunk, Epoch), Kept)>,
    },
    Session(Box<SessionRow>),
    Result {
        sequence: Sequence,
        result: StoredResult,
    },
    Freed {
        batch: FreeBatchId,
        volume: VolumeId,
        extents: Vec<StoreExtent>,
    },
    Waiting {
        batch: FreeBatchId,
        sessions: Vec<SessionId>,
    },
    End {
        digest: [u8; 32],
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum GroupRow {
    None,
    All,
    Some(Vec<u64>),
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct VolumeRow {
    pub(super) id: VolumeId,
    pub(super) name: Name,
    pub(super) size_bytes: u64,
    pub(super) chunk: ChunkSize,
    pub(super) origin: Origin,
    pub(super) created: WallMillis,
    pub(super) epoch: Epoch,
    pub(super) importer: Option<SessionId>,
    pub(super) deleted: bool,
    pub(super) reaping: Option<Reaping>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SessionRow {
    pub(super) id: SessionId,
    pub(super) secret: Secret,
    pub(super) instance: InstanceId,
    pub(super) node: Name,
    pub(super) pid: u32,
    pub(super) attached: Attached,
    pub(super) opened: WallMillis,
    pub(super) confirmed: FreeBatchId,
}

impl Row {
    fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("rows hold nothing that postcard cannot encode")
    }

    /// Place in the order of rows, to compare; rows of one volume or session follow each other.
    pub(super) fn rank(&self) -> (u8, u8) {
        match self {
            Self::Header { .. } => (0, 0),
            Self::Servers { .. } => (1, 0),
            Self::Arena { .. } => (2, 0),
            Self::Volume(_) => (3, 0),
            Self::Dying { .. } => (3, 1),
            Self::Snapshots { .. } => (3, 2),
            Self::Heads { .. } => (3, 3),
            Self::Versions { .. } => (3, 4),
            Self::Session(_) => (4, 0),
            Self::Result { .. } => (4, 1),
            Self::Freed { .. } => (5, 0),
            Self::Waiting { .. } => (5, 1),
            Self::End { .. } => (6, 0),
        }
    }
}

impl State {
    /// The state as pieces of at most [`PIECE_BYTES_MAX`] bytes, made as they are asked for.
    pub fn checkpoint(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        let mut hash = blake3::Hasher::new();
        let mut rows = self.rows().map(|row| row.encode());
        let mut kept: Option<Vec<u8>> = None;
        let mut ended = false;
        std::iter::from_fn(move || {
            let mut piece = kept.take().unwrap_or_default();
            while !ended {
                let row = rows.next().unwrap_or_else(|| {
                    ended = true;
                    Row::End { digest: *hash.finalize().as_bytes() }.encode()
                });
                assert!(row.len() <= PIECE_BYTES_MAX, "a row fits a piece");
                hash.update(&row);
                if piece.len() + row.len() > PIECE_BYTES_MAX {
                    kept = Some(row);
                    return Some(piece);
                }
                piece.extend_from_slice(&row);
            }
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// Digest of everything that is durable in the state: equal for equal states, live, replayed or loaded.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = blake3::Hasher::new();
        for row in self.rows() {
            hash.update(&row.encode());
        }
        *hash.finalize().as_bytes()
    }

    fn rows(&self) -> impl Iterator<Item = Row> + '_ {
        let space = &self.space;
        let header = Row::Header {
            format: FORMAT,
            pool: self.pool,
            term: space.term,
            open_batch: space.frees.open.id,
        };
        let servers = space.alive.iter().map(|(term, node)| (*term, node.clone()));
        let servers = in_rows(servers, |servers| Row::Servers { servers });
        let arenas = space.arenas.iter().map(|(&(term, number), arena)| arena_row(term, number, arena));
        let volumes = self.volumes.values().flat_map(volume_rows);
        let sessions = self.sessions.iter().flat_map(session_rows);
        std::iter::once(header)
            .chain(servers)
            .chain(arenas)
            .chain(volumes)
            .chain(sessions)
            .chain(free_rows(&space.frees))
    }
}

/// Cuts entries into rows.
fn in_rows<'a, T: 'a>(
    entries: impl Iterator<Item = T> + 'a,
    row: impl Fn(Vec<T>) -> Row + 'a,
) -> impl Iterator<Item = Row> + 'a {
    let mut entries = entries.peekable();
    std::iter::from_fn(move || {
        entries.peek()?;
        Some(row(entries.by_ref().take(ENTRIES_PER_ROW).collect()))
    })
}

fn arena_row(term: Term, number: u32, arena: &Arena) -> Row {
    let group = |bits: &GroupBits| match bits.count_ones() {
        0 => GroupRow::None,
        all if all == GROUP_BLOCKS as usize => GroupRow::All,
        _ => GroupRow::Some(bits.as_raw_slice().to_vec()),
    };
    Row::Arena { term, number, touched: arena.touched(), backed: arena.backing().map(group).collect() }
}

fn volume_rows(volume: &Volume) -> impl Iterator<Item = Row> + '_ {
    let row = VolumeRow {
        id: volume.id,
        name: volume.name.clone(),
        size_bytes: volume.size_bytes,
        chunk: volume.chunk,
        origin: volume.origin.clone(),
        created: volume.created,
        epoch: volume.epoch,
        importer: volume.importer,
        deleted: volume.deleted,
        reaping: volume.reaping,
    };
    let dying = in_rows(volume.dying.iter().copied(), |epochs| Row::Dying { epochs });
    let snapshots =
        in_rows(volume.snapshots.from(Epoch(0)).cloned(), |snapshots| Row::Snapshots { snapshots });
    let heads = in_rows(volume.map.heads(), |heads| Row::Heads { heads });
    let versions = in_rows(volume.map.versions(), |versions| Row::Versions { versions });
    let row = std::iter::once(Row::Volume(Box::new(row)));
    row.chain(dying).chain(snapshots).chain(heads).chain(versions)
}

fn session_rows(session: &Session) -> impl Iterator<Item = Row> + '_ {
    let row = SessionRow {
        id: session.id,
        secret: session.secret,
        instance: session.instance,
        node: session.node.clone(),
        pid: session.pid,
        attached: session.attached,
        opened: session.opened,
        confirmed: session.confirmed,
    };
    let result =
        |(&sequence, result): (&Sequence, &StoredResult)| Row::Result { sequence, result: result.clone() };
    std::iter::once(Row::Session(Box::new(row))).chain(session.results.iter().map(result))
}

fn free_rows(frees: &Frees) -> impl Iterator<Item = Row> + '_ {
    let freed = |(batch, volume, extents): (FreeBatchId, VolumeId, &[StoreExtent])| {
        extents
            .chunks(ENTRIES_PER_ROW)
            .map(|e| Row::Freed { batch, volume, extents: e.to_vec() })
            .collect::<Vec<_>>()
    };
    let waiting = frees.sealed.iter().flat_map(|(&batch, sealed)| {
        in_rows(sealed.waiting.iter().copied(), move |sessions| Row::Waiting { batch, sessions })
    });
    frees.iter().flat_map(freed).chain(waiting)
}
