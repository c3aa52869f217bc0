//! The order of effects: *durable, then gate open, then act*.
//!
//! Records and the effects that rely on them are gathered in batches. A batch is appended to the journal and synced;
//! then the term's own gate is read; only when it was open are the batch's effects carried out, in order. An effect
//! without a record of its own (an answer about what is already known) travels in the batch that is open when it is
//! made, for it may rely on any record before it.
//!
//! Invariants: batches are appended one at a time, in order; effects of a batch come after those of every older one;
//! the gate read that releases a batch began after the batch was durable.

use std::collections::VecDeque;

use super::{BatchId, Output};
use crate::state::Record;

/// A batch takes no further step's records beyond this, bytes. One step adds a few records of at most
/// [`crate::state::RECORD_BYTES_MAX`], so that the journal's own limit is never reached.
const BATCH_BYTES_ENOUGH: usize = crate::term::BATCH_BYTES_MAX / 4;

/// Batches on their way from decision to effect.
#[derive(Debug, Default)]
pub(super) struct Pipeline {
    last: u64,
    /// The youngest batch that was durable when the gate was then seen open.
    settled: BatchId,
    /// The open batch takes no more: the next record or effect begins another.
    closed: bool,
    /// Not appended yet; the last one takes what comes.
    gathering: VecDeque<Batch>,
    /// The one that the journal has.
    appending: Option<Batch>,
    /// Durable, waiting for the gate, oldest first.
    at_gate: VecDeque<Batch>,
}

#[derive(Debug)]
struct Batch {
    id: BatchId,
    body: Vec<u8>,
    effects: Vec<Output>,
}

impl Pipeline {
    /// Adds a record, which has been applied to the state in memory.
    pub(super) fn record(&mut self, record: &Record) {
        let batch = self.open();
        let body = std::mem::take(&mut batch.body);
        batch.body = record.encode_onto(body);
    }

    /// Adds what is to be done once everything recorded so far is durable and the gate was seen open.
    pub(super) fn then(&mut self, effect: Output) {
        self.open().effects.push(effect);
    }

    /// Between steps: what one step records stays in one batch, so that a change and its stored result are durable
    /// together.
    pub(super) fn begin_step(&mut self) {
        self.closed = self.gathering.back().is_some_and(|batch| batch.body.len() >= BATCH_BYTES_ENOUGH);
    }

    /// The batch that, once settled, says: all that was recorded before this call is durable, and the gate was open
    /// after.
    pub(super) fn mark(&mut self) -> BatchId {
        self.open().id
    }

    /// Whether a marked batch is settled.
    pub(super) fn is_settled(&self, mark: BatchId) -> bool {
        mark <= self.settled
    }

    fn open(&mut self) -> &mut Batch {
        if self.gathering.is_empty() || self.closed {
            self.closed = false;
            self.last += 1;
            self.gathering.push_back(Batch { id: BatchId(self.last), body: Vec::new(), effects: Vec::new() });
        }
        self.gathering.back_mut().expect("one was just made")
    }

    /// Starts the next batch, if the journal is free; one without records goes to the journal only if `append` is set. `true`
    /// when the state in memory is exactly what the journal holds once this batch is in it.
    pub(super) fn start(&mut self, append: bool, out: &mut Vec<Output>) -> bool {
        if self.appending.is_some() {
            return false;
        }
        let Some(mut batch) = self.gathering.pop_front() else { return false };
        if batch.body.is_empty() && !append {
            out.push(Output::ReadGate { batch: batch.id });
            self.at_gate.push_back(batch);
            return false;
        }
        let body = std::mem::take(&mut batch.body);
        out.push(Output::Append { batch: batch.id, body, checkpoint: None });
        self.appending = Some(batch);
        self.gathering.is_empty()
    }

    /// The batch that was given to the journal is durable.
    pub(super) fn appended(&mut self, id: BatchId, out: &mut Vec<Output>) {
        let batch =
            self.appending.take_if(|batch| batch.id == id).expect("the journal answers what it was given");
        out.push(Output::ReadGate { batch: id });
        self.at_gate.push_back(batch);
    }

    /// The gate was open when it was read for batch `id`; so it was for every older one.
    pub(super) fn gate_open(&mut self, id: BatchId, out: &mut Vec<Output>) {
        self.settled = self.settled.max(id);
        while let Some(batch) = self.at_gate.pop_front_if(|batch| batch.id <= id) {
            out.extend(batch.effects);
        }
    }

    /// Nothing gathers, nothing is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.gathering.is_empty() && self.appending.is_none() && self.at_gate.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ConnId;

    fn effect(n: u64) -> Output {
        Output::Close { conn: ConnId(n), reason: None }
    }

    fn record() -> Record {
        Record::SessionEnd { session: csnap_proto::SessionId([1; 16]) }
    }

    #[test]
    fn an_effect_waits_for_its_record_and_then_for_the_gate() {
        let mut pipeline = Pipeline::default();
        let mut out = Vec::new();
        pipeline.record(&record());
        pipeline.then(effect(1));
        assert!(pipeline.start(false, &mut out));
        assert!(matches!(out[..], [Output::Append { batch: BatchId(1), .. }]));
        out.clear();
        pipeline.appended(BatchId(1), &mut out);
        assert!(matches!(out[..], [Output::ReadGate { batch: BatchId(1) }]));
        out.clear();
        pipeline.gate_open(BatchId(1), &mut out);
        assert!(matches!(out[..], [Output::Close { conn: ConnId(1), .. }]));
        assert!(pipeline.is_idle());
    }

    #[test]
    fn an_answer_without_a_record_waits_for_the_append_before_it() {
        let mut pipeline = Pipeline::default();
        let mut out = Vec::new();
        pipeline.record(&record());
        pipeline.start(false, &mut out);
        pipeline.then(effect(2));
        out.clear();
        assert!(!pipeline.start(false, &mut out) && out.is_empty());
        pipeline.appended(BatchId(1), &mut out);
        pipeline.start(false, &mut out);
        out.clear();
        pipeline.gate_open(BatchId(2), &mut out);
        assert!(matches!(out[..], [Output::Close { conn: ConnId(2), .. }]));
    }
}
