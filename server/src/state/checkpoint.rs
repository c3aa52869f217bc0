//! Checkpoints: the state as bytes, in pieces, and back.
//!
//! A checkpoint is a sequence of rows in postcard, packed into pieces that each fit a record of the journal's files.
//! It is canonical: equal states give equal bytes, whatever their histories, so that the digest of the bytes is the
//! digest of the state. What can be worked out from the rest (indexes, which blocks are taken) is not written.
//!
//! Order of rows: the header; arenas; for each volume its row, deleted snapshots, snapshots, head births, versions;
//! sessions with their results; batches of frees, each followed by whom it waits for; the end, with the digest of
//! everything before. The loader takes only this order, checks every row against what it has, and trusts nothing.

use std::sync::Arc;

use csnap_proto::ids::{
    Epoch, FreeBatchId, InstanceId, Name, PoolId, Secret, Sequence, SessionId, Term, VolumeId,
};
use csnap_proto::limits::VOLUME_BYTES_MAX;
use csnap_proto::units::{Chunk, ChunkSize, StoreExtent, WallMillis};
use serde::{Deserialize, Serialize};

use super::arena::{Arena, GROUP_BLOCKS, GROUP_WORDS, GROUPS, GroupBits, Mark};
use super::free::{BATCH_ID_MAX, Frees};
use super::map::ChunkMap;
use super::reap::Reaping;
use super::record::{Attached, Kept, Origin, origin_is_bounded, result_is_bounded};
use super::session::{Session, StoredResult};
use super::volume::{EPOCH_MAX, Snapshot, Volume};
use super::{Corrupt, State};

/// Largest piece of a checkpoint, bytes.
pub const PIECE_BYTES_MAX: usize = 256 << 10;

/// Version of the rows; there is one so far.
const FORMAT: u32 = 1;

/// Entries in one row of a list: some 10 KiB.
const ENTRIES_PER_ROW: usize = 256;

#[derive(Debug, Serialize, Deserialize)]
enum Row {
    Header { format: u32, pool: PoolId, term: Term, alive: Vec<Term>, open_batch: FreeBatchId },
    Arena { term: Term, number: u32, touched: u32, backed: Vec<GroupRow> },
    Volume(Box<VolumeRow>),
    Dying { epochs: Vec<Epoch> },
    Snapshots { snapshots: Vec<Snapshot> },
    Heads { heads: Vec<(Chunk, Epoch)> },
    Versions { versions: Vec<((Chunk, Epoch), Kept)> },
    Session(Box<SessionRow>),
    Result { sequence: Sequence, result: StoredResult },
    Freed { batch: FreeBatchId, volume: VolumeId, extents: Vec<StoreExtent> },
    Waiting { batch: FreeBatchId, sessions: Vec<SessionId> },
    End { digest: [u8; 32] },
}

#[derive(Debug, Serialize, Deserialize)]
enum GroupRow {
    None,
    All,
    Some(Vec<u64>),
}

#[derive(Debug, Serialize, Deserialize)]
struct VolumeRow {
    id: VolumeId,
    name: Name,
    size_bytes: u64,
    chunk: ChunkSize,
    origin: Origin,
    created: WallMillis,
    epoch: Epoch,
    importer: Option<SessionId>,
    deleted: bool,
    reaping: Option<Reaping>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SessionRow {
    id: SessionId,
    secret: Secret,
    instance: InstanceId,
    node: Name,
    pid: u32,
    attached: Attached,
    opened: WallMillis,
    confirmed: FreeBatchId,
}

impl Row {
    fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("rows hold nothing that postcard cannot encode")
    }

    /// Place in the order of rows, to compare; rows of one volume or session follow each other.
    fn rank(&self) -> (u8, u8) {
        match self {
            Self::Header { .. } => (0, 0),
            Self::Arena { .. } => (1, 0),
            Self::Volume(_) => (2, 0),
            Self::Dying { .. } => (2, 1),
            Self::Snapshots { .. } => (2, 2),
            Self::Heads { .. } => (2, 3),
            Self::Versions { .. } => (2, 4),
            Self::Session(_) => (3, 0),
            Self::Result { .. } => (3, 1),
            Self::Freed { .. } => (4, 0),
            Self::Waiting { .. } => (4, 1),
            Self::End { .. } => (5, 0),
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
            alive: space.alive.iter().copied().collect(),
            open_batch: space.frees.open.id,
        };
        let arenas = space.arenas.iter().map(|(&(term, number), arena)| arena_row(term, number, arena));
        let volumes = self.volumes.values().flat_map(volume_rows);
        let sessions = self.sessions.iter().flat_map(session_rows);
        std::iter::once(header).chain(arenas).chain(volumes).chain(sessions).chain(free_rows(&space.frees))
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

/// Takes the pieces of a checkpoint, in order, and makes the state of them.
#[derive(Debug, Default)]
pub struct Loader {
    state: Option<State>,
    /// The volume and the session that rows belong to.
    volume: Option<Volume>,
    session: Option<Session>,
    rank: (u8, u8),
    hash: blake3::Hasher,
    ended: bool,
}

impl Loader {
    /// Nothing loaded yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The next piece.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), Corrupt> {
        if piece.len() > PIECE_BYTES_MAX {
            return Err(Corrupt::new("a piece longer than its limit"));
        }
        let mut left = piece;
        while !left.is_empty() {
            let (row, rest) = postcard::take_from_bytes::<Row>(left)
                .map_err(|error| Corrupt::new(format!("a row of the checkpoint does not decode: {error}")))?;
            self.check_order(&row)?;
            if matches!(&row, Row::End { digest } if digest != self.hash.finalize().as_bytes()) {
                return Err(Corrupt::new("the checkpoint does not match its digest"));
            }
            self.hash.update(&left[..left.len() - rest.len()]);
            left = rest;
            self.take(row)?;
        }
        Ok(())
    }

    /// All pieces were pushed: the state.
    pub fn finish(self) -> Result<State, Corrupt> {
        let state =
            self.state.filter(|_| self.ended).ok_or_else(|| Corrupt::new("the checkpoint is not whole"))?;
        state.check_loaded()?;
        Ok(state)
    }

    fn check_order(&mut self, row: &Row) -> Result<(), Corrupt> {
        let rank = row.rank();
        let first = self.state.is_none();
        let back_in_group = rank.0 == self.rank.0 && (rank.1 == 0 || rank.1 >= self.rank.1);
        let good = if first { rank == (0, 0) } else { rank.0 > 0 && (rank.0 > self.rank.0 || back_in_group) };
        if !good || self.ended {
            return Err(Corrupt::new("rows of the checkpoint out of order"));
        }
        self.rank = rank;
        Ok(())
    }

    fn take(&mut self, row: Row) -> Result<(), Corrupt> {
        if matches!(row.rank().1, 0) {
            self.settle()?;
        }
        match row {
            Row::Header { format, pool, term, alive, open_batch } => {
                return self.take_header(format, pool, term, &alive, open_batch);
            }
            Row::Volume(row) => self.volume = Some(volume_of(*row)?),
            Row::Session(row) => self.session = Some(session_of(*row)),
            Row::Dying { .. } | Row::Snapshots { .. } | Row::Heads { .. } | Row::Versions { .. } => {
                return self.take_of_volume(row);
            }
            Row::Result { sequence, result } => {
                let session =
                    self.session.as_mut().ok_or_else(|| Corrupt::new("a result without its session"))?;
                if !result_is_bounded(&result) || !session.can_store(Sequence(0)) {
                    return Err(Corrupt::new("stored results beyond a limit"));
                }
                session.results.insert(sequence, result);
            }
            Row::Arena { term, number, touched, backed } => {
                return self.state()?.space.load_arena(term, number, arena_of(touched, &backed)?);
            }
            Row::Freed { batch, volume, extents } => {
                let space = &mut self.state()?.space;
                extents.iter().try_for_each(|extent| space.load_taken(*extent))?;
                return space.frees.load(batch, volume, &extents);
            }
            Row::Waiting { batch, sessions } => {
                let state = self.state()?;
                if sessions.iter().any(|id| state.session(*id).is_none()) {
                    return Err(Corrupt::new("a batch waits for a session that is not there"));
                }
                return state.space.frees.load_waiting(batch, &sessions);
            }
            Row::End { .. } => self.ended = true,
        }
        Ok(())
    }

    fn state(&mut self) -> Result<&mut State, Corrupt> {
        self.state.as_mut().ok_or_else(|| Corrupt::new("rows before the header"))
    }

    /// What rows were gathered for is complete.
    fn settle(&mut self) -> Result<(), Corrupt> {
        if let Some(volume) = self.volume.take() {
            self.state()?.add_volume(volume)?;
        }
        if let Some(session) = self.session.take() {
            self.state()?.sessions.open(session)?;
        }
        Ok(())
    }

    fn take_header(
        &mut self,
        format: u32,
        pool: PoolId,
        term: Term,
        alive: &[Term],
        open_batch: FreeBatchId,
    ) -> Result<(), Corrupt> {
        if format != FORMAT {
            return Err(Corrupt::new(format!(
                "a checkpoint of format {format}; this server reads format {FORMAT}"
            )));
        }
        if open_batch > BATCH_ID_MAX {
            return Err(Corrupt::new("a batch number beyond its limit"));
        }
        let mut state = State::new(pool);
        state.load_terms(term, alive)?;
        state.space.frees = Frees::new(open_batch);
        self.state = Some(state);
        Ok(())
    }

    fn take_of_volume(&mut self, row: Row) -> Result<(), Corrupt> {
        let (Some(volume), Some(state)) = (&mut self.volume, &mut self.state) else {
            return Err(Corrupt::new("rows without their volume"));
        };
        let chunks = volume.chunks();
        match row {
            Row::Dying { epochs } => Arc::make_mut(&mut volume.dying).extend(epochs),
            Row::Snapshots { snapshots } => {
                let all = Arc::make_mut(&mut volume.snapshots);
                return snapshots.into_iter().try_for_each(|snapshot| all.add(snapshot));
            }
            Row::Heads { heads } => {
                for (chunk, birth) in heads {
                    if chunk.0 >= chunks || birth > volume.epoch {
                        return Err(Corrupt::new("a head birth beyond the volume or its epoch"));
                    }
                    volume.map.load_head(chunk, birth)?;
                }
            }
            Row::Versions { versions } => {
                let blocks = volume.chunk.blocks();
                for ((chunk, birth), kept) in versions {
                    if let Kept::Store(at) = kept {
                        state.space.load_taken(StoreExtent { at, blocks })?;
                    }
                    volume.map.load_version(chunk, birth, kept)?;
                }
            }
            _ => unreachable!("the caller sends rows of volumes"),
        }
        Ok(())
    }
}

fn volume_of(row: VolumeRow) -> Result<Volume, Corrupt> {
    let sized = (1..=VOLUME_BYTES_MAX).contains(&row.size_bytes) && origin_is_bounded(&row.origin);
    if !sized || row.epoch < Epoch::FIRST || row.epoch > EPOCH_MAX {
        return Err(Corrupt::new(format!("volume {} is beyond a limit", row.name)));
    }
    Ok(Volume {
        id: row.id,
        name: row.name,
        size_bytes: row.size_bytes,
        chunk: row.chunk,
        origin: row.origin,
        created: row.created,
        epoch: row.epoch,
        importer: row.importer,
        deleted: row.deleted,
        snapshots: Arc::default(),
        dying: Arc::default(),
        reaping: row.reaping,
        map: ChunkMap::default(),
    })
}

fn session_of(row: SessionRow) -> Session {
    let SessionRow { id, secret, instance, node, pid, attached, opened, confirmed } = row;
    let results = Default::default();
    Session { id, secret, instance, node, pid, attached, opened, confirmed, results }
}

fn arena_of(touched: u32, backed: &[GroupRow]) -> Result<Arena, Corrupt> {
    let bad = || Corrupt::new("an arena whose reservations cannot be");
    if backed.len() != GROUPS as usize {
        return Err(bad());
    }
    let mut arena = Arena::default();
    for (group, first) in backed.iter().zip((0..).step_by(GROUP_BLOCKS as usize)) {
        match group {
            GroupRow::None => {}
            GroupRow::All => arena.mark(Mark::Backed, first, GROUP_BLOCKS, true),
            GroupRow::Some(words) => {
                let words = <[u64; GROUP_WORDS]>::try_from(&words[..]).map_err(|_| bad())?;
                arena.load_backed(first, GroupBits::new(words));
            }
        }
    }
    arena.load_touched(touched);
    Ok(arena)
}
