//! Store locations that the server is about to reuse. A batch is confirmed once no read of the store is in flight that was
//! located before the batch came; answers and batches share one ordered stream, so what is located later is not in it.

use std::collections::{BTreeMap, BTreeSet};

use csnap_proto::FreeBatchId;
use csnap_proto::message::volume::Forget;

use super::{IoFor, IoId};

#[derive(Debug, Default)]
pub(super) struct Forgets {
    confirmed: FreeBatchId,
    /// Batches that wait, each for these reads.
    pending: BTreeMap<FreeBatchId, BTreeSet<IoId>>,
}

impl Forgets {
    /// Takes batches in. Which places they name does not matter: nothing is cached, and every read of the store is waited
    /// for.
    pub(super) fn on_forget(&mut self, batches: &[Forget], ios: &BTreeMap<IoId, IoFor>) {
        let reads = || ios.iter().filter(|(_, whose)| whose.reads_store()).map(|(io, _)| *io);
        for batch in batches.iter().filter(|batch| batch.batch > self.confirmed) {
            self.pending.entry(batch.batch).or_default().extend(reads());
        }
        self.advance();
    }

    pub(super) fn on_io_done(&mut self, io: IoId) {
        if !self.pending.is_empty() {
            self.pending.values_mut().for_each(|reads| {
                reads.remove(&io);
            });
            self.advance();
        }
    }

    /// Folds batches that nothing waits for into the confirmed one, so that only those with reads in flight are kept.
    fn advance(&mut self) {
        while let Some(first) = self.pending.first_entry().filter(|first| first.get().is_empty()) {
            self.confirmed = *first.key();
            first.remove();
        }
    }

    /// The highest batch up to which all are forgotten.
    pub(super) fn confirmed(&self) -> FreeBatchId {
        self.confirmed
    }
}
