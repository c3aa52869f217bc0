//! The server's decisions: who is connected, what is granted, which snapshot reads are confirmed, when a snapshot is
//! made, in which order anything becomes visible.
//!
//! A pure step machine: [`ServerCore::step`] takes one event and appends what is to be done to a list of outputs, in
//! the order in which it must be done. It knows no socket, file, clock or runtime. The shell (and the simulated
//! world) carries outputs out and reports what came of them; [`ServerCore::end_turn`] is called when no further
//! event is at hand, and starts the next batch.
//!
//! *Architecture Invariant*: nothing is sent and nothing destructive is done except as an effect of a batch (see
//! [`commit`]): durable, then gate open, then act. Outputs outside of batches only read, reserve, or write what
//! nobody refers to yet.
//!
//! *Architecture Invariant*: a chunk is granted only when the state says that no live snapshot shares its head; marks
//! that overlap a chunk are broken in the step that makes it unique.

mod background;
pub mod canary;
mod closing;
mod commit;
mod connection;
mod create;
mod grant;
mod io;
mod marks;
mod operate;
mod read;
mod session;
mod show;
mod timing;

use std::collections::BTreeMap;
use std::time::Duration;

use csnap_proto::message::operate::{Refusal, RefusalKind};
use csnap_proto::message::volume::FromServer;
use csnap_proto::{Frame, Name, RequestId, Term, Time, VolumeId, WallMillis};

pub use self::closing::CloseReason;
pub use self::io::{
    BatchId, ConnId, CopyError, CopyId, CopyOut, Exit, Input, Output, Task, TaskDone, TaskId,
};
pub use self::operate::TASKS_AT_ONCE;

use self::commit::Pipeline;
use self::connection::Connections;
use self::create::Creates;
use self::grant::Grants;
use self::marks::Marks;
use self::operate::Operations;
use crate::state::{Record, State};

/// What an operator may set.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where this server runs.
    pub node: Name,
    /// A client that is silent for so long is counted absent and its connection closed. Absent is not dead.
    pub client_lease: Duration,
    /// A snapshot create fails when the volume's writer has not drained by then.
    pub drain_patience: Duration,
    /// Versions of deleted snapshots that are worked off in one slice.
    pub reap_slice_versions: usize,
    /// The rule that a test breaks.
    pub broken: canary::Broken,
}

impl Config {
    /// As it is on a node where nothing else is said.
    #[must_use]
    pub fn of(node: Name) -> Self {
        Self {
            node,
            client_lease: Duration::from_secs(15),
            drain_patience: Duration::from_secs(5),
            reap_slice_versions: background::REAP_SLICE_VERSIONS,
            broken: canary::Broken::default(),
        }
    }
}

/// The server. See the module's documentation.
pub struct ServerCore {
    term: Term,
    config: Config,
    began: Time,
    now: Time,
    wall: WallMillis,
    state: State,
    pipeline: Pipeline,
    connections: Connections,
    grants: Grants,
    marks: Marks,
    creates: Creates,
    operations: Operations,
    background: background::Background,
    checkpoint_due: bool,
    draining: bool,
    exiting: bool,
}

/// What an event meets on its way through the core: shared by every handler.
type Out<'a> = &'a mut Vec<Output>;

impl ServerCore {
    /// A server of `term` over the state that it took over. Nothing has been sent or recorded yet.
    #[must_use]
    pub fn new(term: Term, config: Config, state: State, now: Time, wall: WallMillis) -> Self {
        let mut core = Self {
            term,
            config,
            began: now,
            now,
            wall,
            state,
            pipeline: Pipeline::default(),
            connections: Connections::default(),
            grants: Grants::default(),
            marks: Marks::default(),
            creates: Creates::default(),
            operations: Operations::default(),
            background: background::Background::default(),
            checkpoint_due: false,
            draining: false,
            exiting: false,
        };
        let node = core.config.node.clone();
        core.record(Record::TermBegin { term, node });
        core
    }

    /// Takes one event. `wall` is shown to people, and decides nothing.
    pub fn step(&mut self, now: Time, wall: WallMillis, input: Input, out: Out) {
        self.now = now;
        self.wall = wall;
        if self.exiting {
            return;
        }
        self.pipeline.begin_step();
        match input {
            Input::Accepted { conn } => self.on_accepted(conn, out),
            Input::Closed { conn } => self.on_closed(conn),
            Input::Frame { conn, frame } => self.on_frame(conn, frame, out),
            Input::Appended { batch } => self.pipeline.appended(batch, out),
            Input::Gate { batch, open: true } => {
                self.pipeline.gate_open(batch, out);
                self.creates.timing.settle(batch, now);
            }
            Input::Gate { open: false, .. } => self.exit(Exit::Deposed, out),
            Input::CopiedOut { copy, result } => self.on_copied_out(copy, result),
            Input::ArenaGrown { extent, grown } => self.on_arena_grown(extent, grown),
            Input::TaskEnded { task, done } => self.on_task_ended(task, done, out),
            Input::Punched { extents } => self.on_punched(extents),
            Input::HeadRemoved { volume } => self.on_head_removed(volume),
            Input::TermsDead { terms } => {
                terms.into_iter().for_each(|term| drop(self.on_server_reaped(term)))
            }
            Input::CheckpointDue => self.checkpoint_due = true,
            Input::Drain => self.draining = true,
            Input::Tick => self.on_tick(out),
        }
    }

    /// No further event is at hand: starts what gathered meanwhile.
    pub fn end_turn(&mut self, out: Out) {
        if self.exiting {
            return;
        }
        self.start_copies(out);
        self.work_in_background(out);
        if self.draining && self.is_quiet() {
            self.exit(Exit::Drained, out);
            return;
        }
        if self.checkpoint_due && self.pipeline.is_idle() {
            self.pipeline.mark();
        }
        let exact = self.pipeline.start(self.checkpoint_due, out);
        if exact
            && self.checkpoint_due
            && let Some(Output::Append { checkpoint, .. }) = out.last_mut()
        {
            *checkpoint = Some(Box::new(self.state.clone()));
            self.checkpoint_due = false;
        }
    }

    /// When [`Input::Tick`] is wanted next.
    #[must_use]
    pub fn next_deadline(&self) -> Time {
        let soonest = [self.connections.next_deadline(&self.config), self.creates.next_deadline()];
        let idle = self.now.after(background::TICK);
        soonest.into_iter().flatten().fold(idle, Time::min)
    }

    /// The state in memory; ahead of the journal by what is in flight.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The term that it serves under.
    #[must_use]
    pub fn term(&self) -> Term {
        self.term
    }

    /// Whether reading connections should pause: the server drains, or is behind.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    fn is_quiet(&self) -> bool {
        self.pipeline.is_idle() && self.grants.is_idle() && self.operations.is_idle()
    }

    fn exit(&mut self, reason: Exit, out: Out) {
        self.exiting = true;
        out.push(Output::Exit { reason });
    }

    /// Applies a record and puts it into the open batch. A record that does not fit is a bug: the process dies with
    /// the state that is in the journal.
    fn record(&mut self, record: Record) {
        if let Err(corrupt) = self.state.apply(&record) {
            panic!("{corrupt}, while applying {record:?}");
        }
        self.pipeline.record(&record);
    }

    /// Sends once everything recorded so far is durable and the gate was seen open.
    fn send(&mut self, conn: ConnId, id: RequestId, message: FromServer) {
        let frame = Frame { id, term: self.term, message };
        self.pipeline.then(Output::Send { conn, frame });
    }

    fn refuse(&mut self, conn: ConnId, id: RequestId, kind: RefusalKind, reason: impl Into<String>) {
        self.send(conn, id, FromServer::Refused(Refusal::new(kind, reason)));
    }
}

/// A map from volumes to something small.
type ByVolume<T> = BTreeMap<VolumeId, T>;
