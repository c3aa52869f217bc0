//! Which write may be issued, and asking for what it lacks.
//!
//! A write, trim or write-zeroes whose chunks are all unique goes at once. Otherwise its missing chunks are asked for, many
//! requests a message; when, [`Gathering`] says. A write is issued as a whole when all are granted, and fails as a whole,
//! before any of it is written, when one is refused. Grants count only in the epoch and outside of drains: what comes then
//! is thrown away and asked anew.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use csnap_proto::limits::{CHUNKS_PER_MESSAGE_MAX, RANGES_PER_MESSAGE_MAX};
use csnap_proto::message::operate::{Refusal, RefusalKind};
use csnap_proto::message::volume::{ToServer, UniquePage};
use csnap_proto::{Chunk, ChunkRange, Epoch, RequestId, Time};

use super::gather::Gathering;
use super::{ClientCore, IoFailure, IoFor, IoOp, Op, Output, Pending, Request, RequestError, RequestKey};

#[derive(Debug, Default)]
pub(super) struct Writes {
    /// Not issued, and something of them is still to be asked for. Keys grow, so this is the order of arrival.
    waiting: BTreeSet<RequestKey>,
    /// Asked for, by message.
    queries: BTreeMap<RequestId, Vec<Part>>,
    gathering: Gathering,
    /// I/O on the head that changes it.
    pub(super) in_flight: usize,
    /// Chunks got unique since the waiting ones were last looked up.
    pub(super) look_again: bool,
}

/// What one request has in one query.
#[derive(Debug)]
struct Part {
    request: RequestKey,
    ranges: Vec<ChunkRange>,
}

/// What the server says to a query.
pub(super) struct Grant<'a> {
    pub(super) epoch: Epoch,
    pub(super) no_space: &'a [ChunkRange],
    pub(super) all_unique: bool,
    pub(super) pages: &'a [UniquePage],
}

/// A write that has not returned.
#[derive(Debug)]
pub(super) struct Write {
    request: Request,
    range: ChunkRange,
    /// What is still to be asked for; `None` before the cache was looked at.
    unasked: Option<VecDeque<ChunkRange>>,
    /// Queries under way that have a part of it.
    asked: usize,
    /// A part was refused.
    refused: Option<RequestError>,
    /// Its last query was refused as a whole, so the next asks for nobody else.
    alone: bool,
}

impl Write {
    /// Starts over: nothing is asked for, nothing is granted.
    fn ask_again(&mut self) {
        self.unasked = None;
        self.asked = 0;
    }

    fn fua(&self) -> bool {
        match self.request.op {
            Op::Write { fua } | Op::Trim { fua } | Op::WriteZeroes { fua, .. } => fua,
            Op::Read | Op::Flush | Op::Release => false,
        }
    }
}

impl Writes {
    /// From when on another query may go beside those that are unanswered; `None` if there are too many.
    fn next_query_at(&self) -> Option<Time> {
        self.gathering.may_ask_at(self.queries.len(), self.waiting.len())
    }

    /// Nothing is asked for any more: all of it waits.
    fn take_back(&mut self) {
        let parts = std::mem::take(&mut self.queries).into_values().flatten();
        self.waiting.extend(parts.map(|part| part.request));
        self.look_again = true;
        self.gathering.start_over();
    }

    /// Takes out everything that is not issued.
    pub(super) fn take_unissued(&mut self) -> BTreeSet<RequestKey> {
        self.take_back();
        std::mem::take(&mut self.waiting)
    }
}

impl ClientCore {
    pub(super) fn begin_write(&mut self, request: Request, out: &mut Vec<Output>) {
        let chunk = self.attached.as_ref().expect("checked on arrival").geometry.chunk;
        let range = chunk.covering(request.offset, request.len);
        let write = Write { request, range, unasked: None, asked: 0, refused: None, alone: false };
        self.requests.insert(request.key, Pending::Write(write));
        if self.may_issue() && self.is_unique(range) {
            self.issue(request.key, out);
        } else {
            self.writes.waiting.insert(request.key);
        }
    }

    /// Everything that is not issued starts over.
    pub(super) fn ask_writes_again(&mut self) {
        self.writes.take_back();
        let waiting: Vec<RequestKey> = self.writes.waiting.iter().copied().collect();
        for key in waiting {
            self.write(key).ask_again();
        }
    }

    /// Issues what may be issued and asks for what is missing.
    pub(super) fn go_on_writing(&mut self, now: Time, out: &mut Vec<Output>) {
        if !self.may_issue() {
            return;
        }
        if std::mem::take(&mut self.writes.look_again) {
            self.issue_known(out);
        }
        while !self.is_put_off(now) && self.writes_deadline().is_some_and(|from| from <= now) {
            self.query(now, out);
        }
    }

    /// When the next query is to go, if nothing but time is in its way.
    pub(super) fn writes_deadline(&self) -> Option<Time> {
        let is_wanted = self.may_issue()
            && self.may_take_grants()
            && self.link.ready().is_some()
            && !self.writes.waiting.is_empty();
        if is_wanted { self.writes.next_query_at() } else { None }
    }

    /// Issues every waiting write of which nothing is asked for and all is known to be unique.
    fn issue_known(&mut self, out: &mut Vec<Output>) {
        let waiting: Vec<RequestKey> = self.writes.waiting.iter().copied().collect();
        for key in waiting {
            let write = self.write(key);
            let (range, fresh) = (write.range, write.asked == 0);
            if fresh && self.is_unique(range) {
                self.issue(key, out);
            }
        }
    }

    fn write(&mut self, key: RequestKey) -> &mut Write {
        match self.requests.get_mut(&key) {
            Some(Pending::Write(write)) => write,
            other => unreachable!("writes in the queues are pending writes, not {other:?}"),
        }
    }

    /// Sends one message for as many waiting writes as fit.
    fn query(&mut self, now: Time, out: &mut Vec<Output>) {
        let waiting = self.writes.waiting.len();
        let mut parts: Vec<Part> = Vec::new();
        let mut budget = Budget { ranges: RANGES_PER_MESSAGE_MAX, chunks: CHUNKS_PER_MESSAGE_MAX };
        while let Some(&key) = self.writes.waiting.first() {
            self.look_up(key);
            let write = self.write(key);
            if write.alone && !parts.is_empty() {
                break;
            }
            let (unasked, alone) = (write.unasked.as_mut().expect("just looked up"), write.alone);
            let ranges = budget.take(unasked);
            let complete = unasked.is_empty();
            if !ranges.is_empty() {
                write.asked += 1;
                parts.push(Part { request: key, ranges });
            }
            if !complete {
                break;
            }
            self.writes.waiting.remove(&key);
            if alone {
                break;
            }
        }
        let ranges = union(parts.iter().flat_map(|part| &part.ranges).copied());
        let id = self.send(ToServer::QueryWrite { ranges }, out).expect("the caller saw a connection");
        self.writes.queries.insert(id, parts);
        self.writes.gathering.on_asked(now, waiting, budget.ranges == 0 || budget.chunks == 0);
    }

    fn look_up(&mut self, key: RequestKey) {
        let write = self.write(key);
        if write.unasked.is_some() {
            return;
        }
        let range = write.range;
        let mut missing = VecDeque::new();
        self.unique.missing(range, &mut missing);
        self.write(key).unasked = Some(missing);
    }

    pub(super) fn on_write_ok(&mut self, now: Time, id: RequestId, grant: &Grant<'_>, out: &mut Vec<Output>) {
        let Some(parts) = self.writes.queries.remove(&id) else { return };
        self.writes.gathering.on_answered(now, parts.len(), self.writes.waiting.len());
        if !self.may_take_grants() || self.epoch() != Some(grant.epoch) {
            for part in parts {
                self.requeue(part.request);
            }
            return;
        }
        self.all_unique |= grant.all_unique;
        self.writes.look_again = true;
        for page in grant.pages {
            self.unique.learn(page);
        }
        for part in parts {
            let refused =
                part.ranges.iter().any(|range| grant.no_space.iter().any(|full| meets(*range, *full)));
            self.on_part(&part, refused.then_some(RequestError::NoSpace), out);
        }
    }

    /// Takes a write back to the start.
    fn requeue(&mut self, key: RequestKey) {
        self.drop_parts(key);
        self.write(key).ask_again();
        self.writes.waiting.insert(key);
    }

    /// Parts of the write in other queries do not count any more.
    fn drop_parts(&mut self, key: RequestKey) {
        for parts in self.writes.queries.values_mut() {
            parts.retain(|part| part.request != key);
        }
    }

    /// One part of a write is answered.
    fn on_part(&mut self, part: &Part, refused: Option<RequestError>, out: &mut Vec<Output>) {
        let key = part.request;
        let write = self.write(key);
        write.asked -= 1;
        write.refused = write.refused.take().or(refused);
        if let Some(error) = write.refused.take() {
            self.drop_parts(key);
            self.writes.waiting.remove(&key);
            self.complete(key, Err(error), out);
        } else if write.asked == 0 && write.unasked.as_ref().is_some_and(VecDeque::is_empty) {
            self.issue(key, out);
        }
    }

    /// A query was refused as a whole. `false` if `id` is not a query.
    pub(super) fn on_query_refused(
        &mut self,
        now: Time,
        id: RequestId,
        refusal: &Refusal,
        out: &mut Vec<Output>,
    ) -> bool {
        let Some(parts) = self.writes.queries.remove(&id) else { return false };
        self.writes.gathering.start_over();
        let put_off = matches!(refusal.kind, RefusalKind::Busy | RefusalKind::TimedOut);
        if put_off {
            self.put_off(now);
        }
        let several = parts.len() > 1;
        for part in parts {
            if put_off || several {
                self.requeue(part.request);
                self.write(part.request).alone = several || self.write(part.request).alone;
            } else {
                self.on_part(&part, Some(refused(refusal)), out);
            }
        }
        true
    }

    fn issue(&mut self, key: RequestKey, out: &mut Vec<Output>) {
        self.writes.waiting.remove(&key);
        let Request { op, offset, len, .. } = self.write(key).request;
        let io = match op {
            Op::Trim { .. } => IoOp::HeadPunch { request: key, offset, len },
            Op::WriteZeroes { may_punch, .. } => IoOp::HeadZero { request: key, offset, len, may_punch },
            Op::Read | Op::Write { .. } | Op::Flush | Op::Release => {
                IoOp::HeadWrite { request: key, offset, len }
            }
        };
        self.writes.in_flight += 1;
        self.start_io(IoFor::Write(key), io, out);
    }

    pub(super) fn on_write_done(
        &mut self,
        key: RequestKey,
        result: Result<(), IoFailure>,
        out: &mut Vec<Output>,
    ) {
        self.writes.in_flight -= 1;
        let write = self.write(key);
        let (len, fua) = (write.request.len, write.fua());
        self.writeback.on_written(len);
        match result {
            Ok(()) if fua && self.end.is_none() => self.begin_flush(key, out),
            result => self.complete(key, result.map_err(RequestError::from), out),
        }
    }
}

/// What still fits into a message.
struct Budget {
    ranges: usize,
    chunks: u64,
}

impl Budget {
    /// Takes as much off the front of `from` as fits.
    fn take(&mut self, from: &mut VecDeque<ChunkRange>) -> Vec<ChunkRange> {
        let mut taken = Vec::new();
        while let Some(range) = from.front_mut()
            && self.ranges > 0
            && self.chunks > 0
        {
            let count = range.count.min(self.chunks);
            taken.push(ChunkRange { first: range.first, count });
            self.ranges -= 1;
            self.chunks -= count;
            if count == range.count {
                from.pop_front();
            } else {
                *range = ChunkRange { first: Chunk(range.first.0 + count), count: range.count - count };
            }
        }
        taken
    }
}

/// The same chunks as ordered, disjoint runs.
fn union(ranges: impl Iterator<Item = ChunkRange>) -> Vec<ChunkRange> {
    let mut sorted: Vec<ChunkRange> = ranges.collect();
    sorted.sort_by_key(|range| range.first);
    let mut merged: Vec<ChunkRange> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.first <= last.end() => {
                let end = last.end().max(range.end());
                last.count = end.0 - last.first.0;
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// Whether the runs share a chunk; `theirs` may be anything that decodes.
fn meets(ours: ChunkRange, theirs: ChunkRange) -> bool {
    theirs.checked_end().is_none_or(|end| theirs.first < ours.end() && ours.first < end)
}

fn refused(refusal: &Refusal) -> RequestError {
    match refusal.kind {
        RefusalKind::NoSpace => RequestError::NoSpace,
        RefusalKind::Gone | RefusalKind::NotFound | RefusalKind::Denied => {
            RequestError::Lost(refusal.reason.clone())
        }
        _ => RequestError::Refused(refusal.clone()),
    }
}

#[cfg(test)]
impl ClientCore {
    pub(super) fn writes_asked(&self) -> Vec<RequestId> {
        self.writes.queries.keys().copied().collect()
    }
}
