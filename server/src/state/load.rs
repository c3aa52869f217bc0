//! Loading a checkpoint: rows back into a state.
//!
//! The bytes may be damaged or forged: rows are taken only in the order that a checkpoint has, each is checked against
//! what came before, nothing is allocated before its size was checked, and the digest at the end must match.

use std::sync::Arc;

use csnap_proto::ids::{Epoch, FreeBatchId, PoolId, Sequence, Term};
use csnap_proto::limits::VOLUME_BYTES_MAX;
use csnap_proto::units::StoreExtent;

use super::arena::{Arena, GROUP_BLOCKS, GROUP_WORDS, GROUPS, GroupBits, Mark};
use super::checkpoint::{FORMAT, GroupRow, PIECE_BYTES_MAX, Row, SessionRow, VolumeRow};
use super::free::{BATCH_ID_MAX, Frees};
use super::map::ChunkMap;
use super::record::{Kept, origin_is_bounded, result_is_bounded};
use super::session::Session;
use super::volume::{EPOCH_MAX, Volume};
use super::{Corrupt, State};

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
            Row::Header { format, pool, term, open_batch } => {
                return self.take_header(format, pool, term, open_batch);
            }
            Row::Servers { servers } => return self.state()?.load_servers(servers),
            Row::Volume(row) => self.volume = Some(volume_of(*row)?),
            Row::Session(row) => self.session = Some(session_of(*row)),
            Row::Dying { .. } | Row::Snapshots { .. } | Row::Heads { .. } | Row::Versions { .. } => {
                return self.take_of_volume(row);
            }
            Row::Result { sequence, result } => {
                let session =
                    self.session.as_mut().ok_or_else(|| Corrupt::new("a result without its session"))?;
                if !result_is_bounded(&result) || !session.can_store(1, Sequence(0)) {
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
        state.space.term = term;
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
