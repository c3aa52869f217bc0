//! What a journal's batches and a checkpoint's pieces mean: the state.
//!
//! The terms read and write bytes; the state knows records. This is the seam between them.

use csnap_proto::PoolId;

use crate::state::{Loader, Record, State};
use crate::term::{Corrupt, Replay};

/// The state as a [`Replay`].
pub struct StateReplay {
    pool: PoolId,
    state: State,
    /// A checkpoint that is being read.
    loading: Option<Loader>,
    pieces: u64,
}

impl StateReplay {
    /// The state of a new pool.
    #[must_use]
    pub fn new(pool: PoolId) -> Self {
        Self { pool, state: State::new(pool), loading: None, pieces: 0 }
    }

    /// The state as far as it was read.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The state, to serve from.
    #[must_use]
    pub fn into_state(self) -> State {
        self.state
    }
}

impl Replay for StateReplay {
    fn begin_checkpoint(&mut self) {
        self.loading = Some(Loader::new());
        self.pieces = 0;
    }

    fn piece(&mut self, bytes: &[u8]) -> Result<(), Corrupt> {
        let loader = self.loading.as_mut().ok_or_else(|| Corrupt::new("a piece outside a checkpoint"))?;
        self.pieces += 1;
        loader.push(bytes).map_err(|corrupt| Corrupt::new(corrupt.what))
    }

    fn end_checkpoint(&mut self) -> Result<(), Corrupt> {
        let loader = self.loading.take().ok_or_else(|| Corrupt::new("the end of no checkpoint"))?;
        self.state = if self.pieces == 0 {
            State::new(self.pool)
        } else {
            loader.finish().map_err(|corrupt| Corrupt::new(corrupt.what))?
        };
        if self.state.pool() == self.pool {
            Ok(())
        } else {
            Err(Corrupt::new("a checkpoint of another pool"))
        }
    }

    fn batch(&mut self, body: &[u8]) -> Result<(), Corrupt> {
        let records = Record::decode_batch(body).map_err(|corrupt| Corrupt::new(corrupt.what))?;
        let mut apply = |record| self.state.apply(record);
        records.iter().try_for_each(&mut apply).map_err(|corrupt| Corrupt::new(corrupt.what))
    }
}
