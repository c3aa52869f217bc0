//! The decisions of one attachment: a volume with its one writer, or a reader of a snapshot.
//!
//! A state machine: [`ClientCore::step`] takes one [`Input`] and appends [`Output`]s, which the caller carries out in
//! order; [`ClientCore::next_deadline`] says when to call with [`Input::Tick`] at the latest. No I/O, clock, randomness or
//! task in here; the shell and the simulation drive the same code.
//!
//! - `session`: connections, identification, liveness (law 4: requests wait, they do not fail);
//! - `writes`: which write may be issued, asking for grants; `gather`: when to ask; `unique`: the cache that makes rewrites
//!   cost nothing;
//! - `drain`: stopping for a snapshot create; `syncs`: flushes;
//! - `reads`: the four-message read; `forget`: store locations that are about to be reused;
//! - `release`: the orderly end.
//!
//! *Architecture Invariants*: a write is issued only to chunks that are unique in the current epoch, and never between an
//! AdviceOk and its Resume; data of a snapshot read from the origin is complete only after message 4 on the connection and
//! term of message 2; every request completes exactly once; a flush completes only after a sync that began after it came.

use std::collections::BTreeMap;
use std::time::Duration;

use csnap_proto::message::volume::{Attach, FromServer, Geometry, NO_TERM, ToServer};
use csnap_proto::{ChunkRange, Epoch, Frame, RequestId, Term, Time};

mod api;
mod canary;
mod drain;
mod forget;
mod gather;
mod reads;
mod release;
mod session;
mod syncs;
#[cfg(test)]
mod tests;
mod unique;
mod writeback;
mod writes;

pub use api::*;
pub use canary::{Canaries, Canary};
pub use unique::UniqueCache;

use drain::{Advice, Stop};
use forget::Forgets;
use reads::{PieceIo, Reads};
use release::Releasing;
use session::{Link, Renewal};
use syncs::{SyncFor, Syncs};
use writeback::Writeback;
use writes::{Grant, Write, Writes};

/// Most queries of a kind that are unanswered at a time; what comes meanwhile is gathered into the next message. A few,
/// so that nothing is serialised behind a slow answer; not many, so that batches form under load.
const QUERIES_IN_FLIGHT_MAX: usize = 4;

/// Pause before queries go on when the server put one off (busy, timed out).
const PUT_OFF: Duration = Duration::from_millis(100);

/// One attachment.
#[derive(Debug)]
pub struct ClientCore {
    config: CoreConfig,
    link: Link,
    renewal: Renewal,
    /// Newest term that this client identified with; frames of older ones are dropped.
    term: Term,
    attached: Option<Attached>,
    /// Set once: every request but a release fails with it.
    end: Option<RequestError>,
    requests: BTreeMap<RequestKey, Pending>,
    ios: BTreeMap<IoId, IoFor>,
    unique: UniqueCache,
    all_unique: bool,
    fast: Fast,
    writes: Writes,
    stop: Stop,
    syncs: Syncs,
    writeback: Writeback,
    reads: Reads,
    forgets: Forgets,
    release: Releasing,
    /// The server put a query off: none is sent until then.
    put_off_until: Option<Time>,
    /// Advice answered last.
    #[cfg(feature = "canary")]
    answered: Option<csnap_proto::RequestToken>,
    messages: BTreeMap<&'static str, u64>,
    last_io: IoId,
    last_frame: RequestId,
}

#[derive(Debug)]
struct Attached {
    geometry: Geometry,
    epoch: Epoch,
    lease: Duration,
}

/// A request that is not complete.
#[derive(Debug)]
enum Pending {
    /// Of the head: one I/O.
    HeadRead,
    SnapshotRead {
        pieces_left: usize,
        failed: Option<RequestError>,
    },
    Write(Write),
    /// A flush, or a write with FUA that is on the head.
    Flush,
    Release,
}

/// Whom an I/O that returned belongs to.
#[derive(Clone, Copy, Debug)]
enum IoFor {
    HeadRead(RequestKey),
    Piece(PieceIo),
    Write(RequestKey),
    Sync(SyncFor),
    Writeback,
    StopFast,
}

/// Whether the shell may write without stepping this core.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fast {
    Closed,
    Open {
        all_unique: bool,
    },
    /// Told to close; some may be in flight.
    Closing,
}

impl ClientCore {
    /// A core that is not attached; its first step asks for a server.
    #[must_use]
    pub fn new(config: CoreConfig) -> Self {
        let unique = UniqueCache::new(config.unique_cache_bytes);
        let writeback = Writeback::new(config.writeback_bytes);
        Self {
            config,
            link: Link::New,
            renewal: Renewal::default(),
            term: Term(0),
            attached: None,
            end: None,
            requests: BTreeMap::new(),
            ios: BTreeMap::new(),
            unique,
            all_unique: false,
            fast: Fast::Closed,
            writes: Writes::default(),
            stop: Stop::NotAttached,
            syncs: Syncs::default(),
            writeback,
            reads: Reads::default(),
            forgets: Forgets::default(),
            release: Releasing::No,
            put_off_until: None,
            #[cfg(feature = "canary")]
            answered: None,
            messages: BTreeMap::new(),
            last_io: IoId(0),
            last_frame: RequestId(0),
        }
    }

    /// Takes one event in; what to do comes out, in order.
    pub fn step(&mut self, now: Time, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Connected { conn, term, .. } => self.on_connected(now, conn, term, out),
            Input::Disconnected { conn } => self.on_disconnected(now, conn, out),
            Input::ServerServes { term } => self.on_server_serves(term, out),
            Input::Frame { conn, frame } => self.on_frame(now, conn, frame, out),
            Input::Request(request) => self.on_request(request, out),
            Input::IoDone { io, result } => self.on_io_done(now, io, result, out),
            Input::Written { bytes } => self.writeback.on_written(bytes),
            Input::Tick => {}
        }
        self.on_time(now, out);
        self.go_on(now, out);
    }

    /// When to call with [`Input::Tick`] at the latest.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        let put_off = self.put_off_until.filter(|_| self.link.ready().is_some());
        let query = self.writes_deadline().map(|at| self.put_off_until.map_or(at, |until| until.max(at)));
        [self.link_deadline(), put_off, query].into_iter().flatten().min()
    }

    /// Messages sent and received since the start, by name.
    #[must_use]
    pub fn messages(&self) -> &BTreeMap<&'static str, u64> {
        &self.messages
    }

    /// What was attached, once it is.
    #[must_use]
    pub fn geometry(&self) -> Option<&Geometry> {
        self.attached.as_ref().map(|attached| &attached.geometry)
    }

    /// Whether a fast write may touch these bytes: every chunk of them is unique in the current epoch. To be asked only
    /// by a fast write that [`IoOp::StopFast`] would wait for. `offset + len` lies within the volume.
    pub fn known_unique(&mut self, offset: u64, len: u64) -> bool {
        let Some(attached) = &self.attached else { return false };
        len > 0 && self.is_unique(attached.geometry.chunk.covering(offset, len))
    }

    /// Why requests wait, if they do, for people.
    #[must_use]
    pub fn waiting(&self) -> Option<String> {
        if let Some(end) = &self.end {
            return Some(end.to_string());
        }
        if let Some(why) = self.link.waiting() {
            return Some(why.to_owned());
        }
        let drained = self.stop.waiting()?;
        Some(drained.to_owned())
    }

    fn is_writer(&self) -> bool {
        matches!(self.config.attach, Attach::Writer(_))
    }

    fn epoch(&self) -> Option<Epoch> {
        self.attached.as_ref().map(|attached| attached.epoch)
    }

    fn is_unique(&mut self, range: ChunkRange) -> bool {
        self.all_unique || self.unique.contains(range)
    }

    fn on_request(&mut self, request: Request, out: &mut Vec<Output>) {
        let Request { key, op, .. } = request;
        assert!(!self.requests.contains_key(&key), "request keys are never reused");
        if let Err(error) = self.check(request) {
            out.push(Output::Complete { request: key, result: Err(error) });
            return;
        }
        match op {
            Op::Read if self.is_writer() => self.read_head(request, out),
            Op::Read => self.read_snapshot(request),
            Op::Write { .. } | Op::Trim { .. } | Op::WriteZeroes { .. } => self.begin_write(request, out),
            Op::Flush if self.is_writer() => self.begin_flush(key, out),
            Op::Flush => out.push(Output::Complete { request: key, result: Ok(()) }),
            Op::Release => self.begin_release(key),
        }
    }

    /// Refuses what cannot be done, whatever comes.
    fn check(&self, request: Request) -> Result<(), RequestError> {
        if self.release.begun() {
            return Err(RequestError::Released);
        }
        let changes = match request.op {
            Op::Release => return Ok(()),
            Op::Read | Op::Flush => false,
            Op::Write { .. } | Op::Trim { .. } | Op::WriteZeroes { .. } => true,
        };
        if let Some(end) = &self.end {
            return Err(end.clone());
        }
        let Some(attached) = &self.attached else {
            return Err(RequestError::Invalid("a request before the volume is attached"));
        };
        if changes && !self.is_writer() {
            return Err(RequestError::ReadOnly);
        }
        if request.op == Op::Flush {
            return Ok(());
        }
        let end = request.offset.checked_add(request.len);
        match end {
            Some(end) if request.len > 0 && end <= attached.geometry.size_bytes => Ok(()),
            _ => Err(RequestError::Invalid("an empty range, or one beyond the end of the volume")),
        }
    }

    fn read_head(&mut self, request: Request, out: &mut Vec<Output>) {
        let Request { key, offset, len, .. } = request;
        self.requests.insert(key, Pending::HeadRead);
        let op = IoOp::HeadRead { request: key, offset, len, buffer_at: 0 };
        self.start_io(IoFor::HeadRead(key), op, out);
    }

    fn on_io_done(&mut self, now: Time, io: IoId, result: Result<(), IoFailure>, out: &mut Vec<Output>) {
        let Some(whose) = self.ios.remove(&io) else {
            debug_assert!(false, "an I/O returns once");
            return;
        };
        self.forgets.on_io_done(io);
        match whose {
            IoFor::HeadRead(key) => self.complete(key, result.map_err(RequestError::from), out),
            IoFor::Piece(piece) => self.on_piece_done(piece, result, out),
            IoFor::Write(key) => self.on_write_done(key, result, out),
            IoFor::Sync(sync) => self.on_sync_done(io, sync, result, out),
            IoFor::Writeback => self.on_writeback_done(now, result, out),
            IoFor::StopFast => self.fast = Fast::Closed,
        }
    }

    fn start_io(&mut self, whose: IoFor, op: IoOp, out: &mut Vec<Output>) -> IoId {
        self.last_io = IoId(self.last_io.0 + 1);
        self.ios.insert(self.last_io, whose);
        out.push(Output::StartIo { io: self.last_io, op });
        self.last_io
    }

    /// Does whatever the last event made possible.
    fn go_on(&mut self, now: Time, out: &mut Vec<Output>) {
        self.go_on_fast(out);
        self.go_on_draining(out);
        self.go_on_writing(now, out);
        self.write_back(now, out);
        self.go_on_reading(now, out);
        self.go_on_releasing(out);
        self.put_off_until = self.put_off_until.filter(|until| now < *until);
    }

    fn put_off(&mut self, now: Time) {
        self.put_off_until = Some(now.after(PUT_OFF));
    }

    fn is_put_off(&self, now: Time) -> bool {
        self.put_off_until.is_some_and(|until| now < until)
    }

    /// Opens or closes the fast path as the state wants it.
    fn go_on_fast(&mut self, out: &mut Vec<Output>) {
        let wanted = self.may_issue() && !self.release.begun();
        let all_unique = self.all_unique;
        match self.fast {
            Fast::Closed if wanted => {
                self.fast = Fast::Open { all_unique };
                out.push(Output::OpenFast { all_unique });
            }
            Fast::Open { all_unique: told } if wanted && told != all_unique => {
                self.fast = Fast::Open { all_unique };
                out.push(Output::OpenFast { all_unique });
            }
            Fast::Open { .. } if !wanted => {
                self.fast = Fast::Closing;
                self.start_io(IoFor::StopFast, IoOp::StopFast, out);
            }
            _ => {}
        }
    }

    fn complete(&mut self, key: RequestKey, result: Result<(), RequestError>, out: &mut Vec<Output>) {
        let pending = self.requests.remove(&key).expect("only pending requests are completed");
        let result = match (&self.end, pending) {
            (
                Some(end),
                Pending::HeadRead | Pending::SnapshotRead { .. } | Pending::Write(_) | Pending::Flush,
            ) => Err(end.clone()),
            _ => result,
        };
        out.push(Output::Complete { request: key, result });
    }

    /// Ends the attachment: what has no I/O in flight fails now, the rest when its I/O returns.
    fn fail(&mut self, error: RequestError, out: &mut Vec<Output>) {
        if self.end.is_some() {
            return;
        }
        self.end = Some(error.clone());
        out.push(Output::Ended(error.clone()));
        let mut now_over: Vec<RequestKey> = std::mem::take(&mut self.syncs.waiting);
        now_over.extend(self.writes.take_unissued());
        for key in now_over {
            self.complete(key, Err(error.clone()), out);
        }
        self.fail_unread(&error, out);
    }

    fn frame(&mut self, message: ToServer) -> Frame<ToServer> {
        self.last_frame = self.last_frame.next();
        *self.messages.entry(message.name()).or_default() += 1;
        Frame { id: self.last_frame, term: NO_TERM, message }
    }

    /// Sends on the identified connection; `None` when there is none.
    fn send(&mut self, message: ToServer, out: &mut Vec<Output>) -> Option<RequestId> {
        let (conn, _) = self.link.ready()?;
        let frame = self.frame(message);
        let id = frame.id;
        out.push(Output::Send { conn, frame });
        Some(id)
    }

    /// Sends an answer to a frame of the server, with that frame's id.
    fn send_as(&mut self, id: RequestId, message: ToServer, out: &mut Vec<Output>) {
        if let Some((conn, _)) = self.link.ready() {
            *self.messages.entry(message.name()).or_default() += 1;
            out.push(Output::Send { conn, frame: Frame { id, term: NO_TERM, message } });
        }
    }

    fn on_message(&mut self, now: Time, frame: Frame<FromServer>, out: &mut Vec<Output>) {
        let id = frame.id;
        match frame.message {
            FromServer::WriteOk { epoch, no_space, all_unique, pages } => {
                let grant = Grant { epoch, no_space: &no_space, all_unique, pages: &pages };
                self.on_write_ok(now, id, &grant, out);
            }
            FromServer::SnapshotRead { read, extents } => self.on_snapshot_read(now, id, read, &extents, out),
            FromServer::FinishSnapshotReadOk { read } => self.on_finished(id, read, true, out),
            FromServer::Retry { read } => self.on_finished(id, read, false, out),
            FromServer::SnapshotAdvice { advice: token } => self.on_advice(Advice { token, id }, out),
            FromServer::Resume { advice, epoch, all_unique } => self.on_resume(advice, epoch, all_unique),
            FromServer::Renewed { forget, all_unique, epoch } => {
                self.on_renewed(now, id, &forget, all_unique, epoch, out);
            }
            FromServer::Released => self.release.on_released(id),
            FromServer::Refused(refusal) => self.on_refused(now, id, refusal, out),
            FromServer::SnapshotGone => self.fail(session::snapshot_gone(), out),
            FromServer::IdentifyOk(_) | FromServer::Operated(_) => {
                self.break_off(now, "an answer that nobody asked for", out);
            }
        }
    }
}
