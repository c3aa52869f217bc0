//! The core behind its mutex. Whoever has an event takes the lock, steps, and carries the outputs out in order before
//! letting go: nothing in that blocks. I/O goes to threads that may block and comes back as an event; frames go to a buffer
//! that the driver sends.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::{Bytes, BytesMut};
use csnap_proto::message::volume::Geometry;
use csnap_proto::{Target, Term, Time, frame};
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};

use super::clock;
use super::gate::{Entry, Gate};
use crate::core::{
    ClientCore, ConnId, Input, IoFailure, IoId, IoOp, Op, Output, Request, RequestError, RequestKey,
};
use crate::head::{Arenas, HeadFile};

/// Fast writes tell the core of their bytes this often: an eighth of what starts writeback by default.
const REPORT_BYTES: u64 = 8 << 20;

/// What one attachment's tasks and callers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) target: Target,
    pub(super) runtime: Handle,
    gate: Gate,
    written_bytes: AtomicU64,
    /// The attachment ended: nothing is done at once any more, so that every request meets the core's answer.
    ended: AtomicBool,
    arenas: Arc<Arenas>,
    head: RwLock<Option<Arc<HeadFile>>>,
    state: Mutex<State>,
    /// The driver has something to send, to ask for, or a new deadline.
    pub(super) wake: Notify,
    /// Attached, ended or released.
    changed: Notify,
}

#[derive(Debug)]
pub(super) struct State {
    core: ClientCore,
    outputs: Vec<Output>,
    waiters: BTreeMap<RequestKey, Waiter>,
    last_key: RequestKey,
    /// Writes of this step that one thread does one after the other.
    quick_writes: Vec<Started>,
    /// I/O that waits for the head to be opened.
    held: Vec<(IoId, IoOp)>,
    /// The head could not be opened: I/O on it fails with this.
    no_head: Option<RequestError>,
    stop_fast: Option<IoId>,
    /// The connection that counts, with what is to be sent on it.
    pub(super) conn: Option<(ConnId, BytesMut)>,
    /// A server is needed; not this one.
    pub(super) wanted: Option<Term>,
    pub(super) attached: Option<Geometry>,
    pub(super) ended: Option<RequestError>,
    pub(super) release_begun: bool,
    pub(super) released: bool,
    last_conn: ConnId,
    /// When the driver next wakes by itself.
    pub(super) deadline: Option<Time>,
}

/// The caller's side of a request.
#[derive(Debug)]
struct Waiter {
    data: Bytes,
    parts: Vec<(u64, Bytes)>,
    done: oneshot::Sender<Done>,
}

/// An I/O with the data that it writes, if it does.
#[derive(Debug)]
struct Started {
    io: IoId,
    op: IoOp,
    data: Bytes,
}

impl Waiter {
    /// Takes in what was read; a read that was started over brings the same bytes again, perhaps cut otherwise.
    fn add_part(&mut self, at: u64, bytes: Bytes) {
        let end = at + bytes.len() as u64;
        self.parts.retain(|(other, old)| *other >= end || other + old.len() as u64 <= at);
        self.parts.push((at, bytes));
    }
}

/// How a request ended, with what was read, by position in its buffer.
type Done = Result<Vec<(u64, Bytes)>, RequestError>;

impl Shared {
    pub(super) fn new(core: ClientCore, target: Target, arenas: Arenas) -> Self {
        let state = State {
            core,
            outputs: Vec::new(),
            waiters: BTreeMap::new(),
            last_key: RequestKey(0),
            quick_writes: Vec::new(),
            held: Vec::new(),
            no_head: None,
            stop_fast: None,
            conn: None,
            wanted: None,
            attached: None,
            ended: None,
            release_begun: false,
            released: false,
            last_conn: ConnId(0),
            deadline: None,
        };
        Self {
            target,
            runtime: Handle::current(),
            gate: Gate::default(),
            written_bytes: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            arenas: Arc::new(arenas),
            head: RwLock::new(None),
            state: Mutex::new(state),
            wake: Notify::new(),
            changed: Notify::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The head, for what may be done without the core.
    pub(super) fn live_head(&self) -> Option<Arc<HeadFile>> {
        if self.ended.load(Ordering::Acquire) { None } else { self.head() }
    }

    fn head(&self) -> Option<Arc<HeadFile>> {
        self.head.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes an event in.
    pub(super) fn drive(self: &Arc<Self>, input: Input) {
        self.drive_locked(&mut self.lock(), input);
    }

    fn drive_locked(self: &Arc<Self>, state: &mut State, input: Input) {
        let State { core, outputs, .. } = state;
        core.step(clock::now(), input, outputs);
        while !state.outputs.is_empty() {
            for output in std::mem::take(&mut state.outputs) {
                self.carry_out(state, output);
            }
        }
        self.start_quick_writes(state);
        let next = state.core.next_deadline();
        if next.is_some_and(|next| state.deadline.is_none_or(|known| next < known)) {
            self.wake.notify_one();
        }
    }

    fn carry_out(self: &Arc<Self>, state: &mut State, output: Output) {
        match output {
            Output::NeedServer { suspect } => {
                state.wanted = Some(suspect);
                self.wake.notify_one();
            }
            Output::Send { conn, frame } => {
                if let Some((_, out)) = state.conn.as_mut().filter(|(mine, _)| *mine == conn) {
                    frame::encode(&frame, out);
                    self.wake.notify_one();
                }
            }
            Output::Disconnect { conn, why } => {
                state.conn.take_if(|(mine, _)| *mine == conn);
                tracing::info!(target = %self.target, why, "left the server");
                self.wake.notify_one();
            }
            Output::Attached { geometry, .. } => {
                state.attached = Some(geometry);
                self.changed.notify_waiters();
            }
            Output::Ended(error) => {
                tracing::warn!(target = %self.target, %error, "the attachment ended");
                state.ended = Some(error);
                self.ended.store(true, Ordering::Release);
                self.changed.notify_waiters();
            }
            Output::OpenFast { all_unique } => self.gate.open(all_unique),
            Output::StartIo { io, op: IoOp::StopFast } => {
                state.stop_fast = Some(io);
                self.gate.close();
                self.check_stopped(state);
            }
            Output::StartIo { io, op } => self.start_io(state, io, op),
            Output::Complete { request, result } => self.complete(state, request, result),
        }
    }

    fn complete(&self, state: &mut State, request: RequestKey, result: Result<(), RequestError>) {
        let waiter = state.waiters.remove(&request).expect("a request waits until it completes");
        // Nobody listens when the caller gave up; what was done stays done.
        let _ = waiter.done.send(result.map(|()| waiter.parts));
    }

    /// Reports that no fast write is in flight, if that was asked for and is so.
    fn check_stopped(self: &Arc<Self>, state: &mut State) {
        if self.gate.is_quiet()
            && let Some(io) = state.stop_fast.take()
        {
            let State { core, outputs, .. } = state;
            core.step(clock::now(), Input::IoDone { io, result: Ok(()) }, outputs);
        }
    }

    /// Starts an I/O on a thread that may block, or holds it until the head is open.
    fn start_io(self: &Arc<Self>, state: &mut State, io: IoId, op: IoOp) {
        if let IoOp::ReadZeros { request, len, buffer_at } = op {
            let zeros = Bytes::from(vec![0; as_len(len)]);
            state.waiters.get_mut(&request).expect("its read waits").add_part(buffer_at, zeros);
            let State { core, outputs, .. } = state;
            core.step(clock::now(), Input::IoDone { io, result: Ok(()) }, outputs);
            return;
        }
        let Some(head) = self.head() else {
            match &state.no_head {
                None => state.held.push((io, op)),
                Some(error) => {
                    let result = Err(IoFailure::Media(error.to_string()));
                    let State { core, outputs, .. } = state;
                    core.step(clock::now(), Input::IoDone { io, result }, outputs);
                }
            }
            return;
        };
        let data = match op {
            IoOp::HeadWrite { request, .. } => state.waiters[&request].data.clone(),
            _ => Bytes::new(),
        };
        let started = Started { io, op, data };
        if matches!(op, IoOp::HeadWrite { .. }) && head.is_quick() {
            state.quick_writes.push(started);
        } else {
            self.hand_over(head, vec![started]);
        }
    }

    /// A grant often lets many small writes go at once. Into the page cache of a quick disk they take microseconds each, less
    /// than waking a thread for each would.
    fn start_quick_writes(self: &Arc<Self>, state: &mut State) {
        if !state.quick_writes.is_empty()
            && let Some(head) = self.head()
        {
            self.hand_over(head, std::mem::take(&mut state.quick_writes));
        }
    }

    /// Has the I/O done on a thread that may block.
    fn hand_over(self: &Arc<Self>, head: Arc<HeadFile>, all: Vec<Started>) {
        let shared = self.clone();
        drop(self.runtime.spawn_blocking(move || {
            for Started { io, op, data } in all {
                let result = perform(&head, &shared.arenas, op, &data);
                shared.io_done(io, op, result);
            }
        }));
    }

    fn io_done(self: &Arc<Self>, io: IoId, op: IoOp, result: Result<Bytes, IoFailure>) {
        let mut state = self.lock();
        let result = result.map(|bytes| {
            if let IoOp::HeadRead { request, buffer_at, .. } | IoOp::StoreRead { request, buffer_at, .. } = op
            {
                state.waiters.get_mut(&request).expect("its read waits").add_part(buffer_at, bytes);
            }
        });
        self.drive_locked(&mut state, Input::IoDone { io, result });
    }

    /// The head is open: what waited for it begins.
    pub(super) fn set_head(self: &Arc<Self>, head: HeadFile) {
        let mut state = self.lock();
        *self.head.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(head));
        for (io, op) in std::mem::take(&mut state.held) {
            self.start_io(&mut state, io, op);
        }
        self.drive_locked(&mut state, Input::Tick);
    }

    /// The head cannot be opened: I/O on it fails.
    pub(super) fn set_no_head(self: &Arc<Self>, error: RequestError) {
        let mut state = self.lock();
        state.no_head = Some(error);
        for (io, op) in std::mem::take(&mut state.held) {
            self.start_io(&mut state, io, op);
        }
        self.drive_locked(&mut state, Input::Tick);
    }

    /// The session is given back. The head closes; its lock goes when the last I/O through it has returned.
    pub(super) fn on_released(&self) {
        *self.head.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.lock().released = true;
        self.wake.notify_one();
        self.changed.notify_waiters();
    }

    /// Waits until `found` finds something in the state; looked at when the attachment begins, ends or is released.
    pub(super) async fn wait_for<T>(&self, found: impl Fn(&State) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(it) = found(&self.lock()) {
                return it;
            }
            changed.await;
        }
    }

    /// Hands a request to the core and waits for its end.
    pub(super) async fn request(self: &Arc<Self>, op: Op, offset: u64, len: u64, data: Bytes) -> Done {
        let done = self.begin(op, offset, len, data);
        done.await.expect("the core completes every request")
    }

    /// Hands a request to the core.
    pub(super) fn begin(
        self: &Arc<Self>,
        op: Op,
        offset: u64,
        len: u64,
        data: Bytes,
    ) -> oneshot::Receiver<Done> {
        let (done, receiver) = oneshot::channel();
        let mut state = self.lock();
        let key = RequestKey(state.last_key.0 + 1);
        state.last_key = key;
        state.waiters.insert(key, Waiter { data, parts: Vec::new(), done });
        self.drive_locked(&mut state, Input::Request(Request { key, op, offset, len }));
        receiver
    }

    /// Writes without a step of the core: `false` if the chunks are not known to be unique, writes are stopped, or the disk
    /// would have to be waited for. The range lies within the volume.
    pub(super) fn write_fast(
        self: &Arc<Self>,
        head: &HeadFile,
        offset: u64,
        data: &[u8],
    ) -> Result<bool, RequestError> {
        let len = data.len() as u64;
        let written = match self.gate.enter() {
            Entry::AllUnique => head.try_write(offset, data),
            Entry::LookUp if self.knows_unique(offset, len) => head.try_write(offset, data),
            Entry::LookUp | Entry::Closed => Ok(false),
        };
        if self.gate.leave() {
            let mut state = self.lock();
            self.check_stopped(&mut state);
            self.drive_locked(&mut state, Input::Tick);
        }
        let written = written?;
        if written && self.written_bytes.fetch_add(len, Ordering::Relaxed) + len >= REPORT_BYTES {
            let bytes = self.written_bytes.swap(0, Ordering::Relaxed);
            self.drive(Input::Written { bytes });
        }
        Ok(written)
    }

    /// Whoever holds the lock holds it for a step, never over I/O.
    fn knows_unique(&self, offset: u64, len: u64) -> bool {
        self.lock().core.known_unique(offset, len)
    }
}

impl State {
    pub(super) fn core(&self) -> &ClientCore {
        &self.core
    }

    /// Nothing is left to be said to any server.
    pub(super) fn is_over(&self) -> bool {
        self.released || (self.conn.is_none() && matches!(self.ended, Some(RequestError::Refused(_))))
    }

    /// A new connection takes the place of whatever there was.
    pub(super) fn add_conn(&mut self) -> ConnId {
        self.last_conn = ConnId(self.last_conn.0 + 1);
        self.conn = Some((self.last_conn, BytesMut::new()));
        self.wanted = None;
        self.last_conn
    }

    /// Moves what is to be sent on `conn` to `unsent`; `false` if that connection does not count any more.
    pub(super) fn take_unsent(&mut self, conn: ConnId, unsent: &mut BytesMut) -> bool {
        let Some((_, out)) = self.conn.as_mut().filter(|(mine, _)| *mine == conn) else { return false };
        unsent.unsplit(out.split());
        true
    }
}

/// Carries out an I/O; blocks.
fn perform(head: &HeadFile, arenas: &Arenas, op: IoOp, data: &Bytes) -> Result<Bytes, IoFailure> {
    let nothing = |()| Bytes::new();
    match op {
        IoOp::HeadRead { offset, len, .. } => head.read(offset, as_len(len)),
        IoOp::StoreRead { location, skip, len, .. } => arenas.read(location, skip, as_len(len)),
        IoOp::HeadWrite { offset, .. } => head.write(offset, data).map(nothing),
        IoOp::HeadPunch { offset, len, .. } => head.punch(offset, len).map(nothing),
        IoOp::HeadZero { offset, len, may_punch, .. } => head.zero(offset, len, may_punch).map(nothing),
        // Starting writeback without waiting has no safe call here; a sync on a thread of its own does as much and more.
        IoOp::HeadSync | IoOp::Writeback => head.sync().map(nothing),
        IoOp::ReadZeros { .. } | IoOp::StopFast => unreachable!("done without a thread"),
    }
}

fn as_len(bytes: u64) -> usize {
    usize::try_from(bytes).expect("reads have lengths of memory")
}
