//! Flushes.
//!
//! Invariants: a flush completes only after a sync that began after it came, so everything that completed before it is
//! covered; a sync that failed is never repeated, the attachment is of no use any more.

use csnap_proto::Time;

use super::{Canary, ClientCore, IoFailure, IoFor, IoId, IoOp, Output, Pending, RequestError, RequestKey};

#[derive(Debug, Default)]
pub(super) struct Syncs {
    /// Came while a sync was under way: the next one is theirs.
    pub(super) waiting: Vec<RequestKey>,
    /// Satisfied by the one under way.
    running: Vec<RequestKey>,
    io: Option<IoId>,
}

/// What a sync is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SyncFor {
    Flush,
    PreSync,
    FinalSync,
    Release,
}

impl ClientCore {
    /// The request (a flush, or a write with FUA that is on the head) completes with the next sync.
    pub(super) fn begin_flush(&mut self, key: RequestKey, out: &mut Vec<Output>) {
        self.requests.insert(key, Pending::Flush);
        if self.syncs.io.is_some() && self.config.canaries.has(Canary::FlushSharesEarlierSync) {
            return self.syncs.running.push(key);
        }
        self.syncs.waiting.push(key);
        self.start_flush(out);
    }

    fn start_flush(&mut self, out: &mut Vec<Output>) {
        if self.syncs.io.is_none() && !self.syncs.waiting.is_empty() {
            self.syncs.running = std::mem::take(&mut self.syncs.waiting);
            self.writeback.on_sync_begun();
            self.syncs.io = Some(self.start_io(IoFor::Sync(SyncFor::Flush), IoOp::HeadSync, out));
        }
    }

    pub(super) fn on_sync_done(
        &mut self,
        io: IoId,
        sync: SyncFor,
        result: Result<(), IoFailure>,
        out: &mut Vec<Output>,
    ) {
        let result = result.map_err(poison);
        if let Err(error) = &result {
            self.fail(error.clone(), out);
        }
        match sync {
            SyncFor::Flush => {
                self.syncs.io = None;
                for key in std::mem::take(&mut self.syncs.running) {
                    self.complete(key, result.clone(), out);
                }
                self.start_flush(out);
            }
            SyncFor::PreSync if result.is_ok() => self.on_pre_sync(io),
            SyncFor::FinalSync if result.is_ok() => self.on_final_sync(io, out),
            SyncFor::PreSync | SyncFor::FinalSync => {}
            SyncFor::Release => self.release.on_synced(),
        }
    }

    /// Starts writeback if enough was written.
    pub(super) fn write_back(&mut self, now: Time, out: &mut Vec<Output>) {
        if self.end.is_none() && self.writeback.begin_if_due(now) {
            self.start_io(IoFor::Writeback, IoOp::Writeback, out);
        }
    }

    pub(super) fn on_writeback_done(
        &mut self,
        now: Time,
        result: Result<(), IoFailure>,
        out: &mut Vec<Output>,
    ) {
        self.writeback.on_done(now);
        if let Err(failure) = result {
            self.fail(poison(failure), out);
        }
    }
}

fn poison(failure: IoFailure) -> RequestError {
    RequestError::Media(format!(
        "a sync of the head failed ({failure}): unflushed data may be lost; attach anew"
    ))
}
