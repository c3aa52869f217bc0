//! The serving loop: select one event, step, carry out the outputs in order.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;

use csnap_proto::limits::CONNECTIONS_MAX;
use csnap_proto::message::local::ToAgent;
use csnap_proto::{Descriptors, Term, Time};
use csnap_storage::Storage;
use rustix::process::{Resource, getrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tokio::time::{Duration, sleep};

use super::closings::Closings;
use super::connection::Connection;
use super::link::{Link, Order};
use super::{now, wall};
use crate::copy::FILES_KEPT_OPEN_MAX;
use crate::core::{CloseReason, Config, ConnId, Exit, Input, Output, ServerCore};
use crate::replay::StateReplay;
use crate::state::State;
use crate::term::{Fatal, Journal, Pool, Position, Prepared, TakenOver};
use crate::work::{Done, Workbench};

/// Events of one turn: enough to gather a batch from every connection, few enough to answer in between.
const EVENTS_PER_TURN_MAX: usize = 256;

/// Events of connections that may wait for the loop.
const EVENTS_QUEUED_MAX: usize = 1024;

/// How long after a takeover the first checkpoint is written: out of the way of the clients that come back, and soon
/// enough that servers which die again and again do not fill the pool with their journals.
const FIRST_CHECKPOINT_AFTER: Duration = Duration::from_millis(500);

/// Terms in a row without a checkpoint, after which the first one waits for nobody: where servers die faster than that, each
/// takeover would read the journal of one term more.
const TERMS_WITHOUT_CHECKPOINT_MAX: u64 = 8;

/// How often older terms' servers are looked for: space of theirs is held meanwhile.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Attempts at the lock on our own gate, 10 ms apart.
const LIFE_ATTEMPTS: u32 = 50;

/// How soon a full pool is asked again for a journal segment, or a checkpoint.
const RETRY_SEGMENT: Duration = Duration::from_millis(500);

/// Serves until deposed or drained.
pub(super) async fn serve<S: Storage>(
    config: Config,
    pool: Pool<S>,
    taken: TakenOver<S, StateReplay>,
    listener: TcpListener,
    link: Link,
    mut orders: mpsc::UnboundedReceiver<Order>,
) -> anyhow::Result<()> {
    let (journal, state) = (taken.journal, taken.replay.into_state());
    let term = journal.term();
    let core = ServerCore::new(term, config, state, now(), wall());
    let descriptors = Descriptors::new(getrlimit(Resource::Nofile).current);
    let kept_open = descriptors.kept_open(FILES_KEPT_OPEN_MAX);
    let bench = Workbench::new(&pool, journal.clone()).keeping_open(kept_open);
    let mut server = Server::new(core, bench, descriptors.connections(CONNECTIONS_MAX));
    let mut keeper = spawn_local(keep_segments(journal));
    let _life = show_life(&server.bench).await?;
    link.tell(ToAgent::ServerServing { term });
    tracing::info!(%term, "serving");
    server.turn(Input::Tick).await?;
    loop {
        let deadline = Duration::from_micros(server.core.next_deadline().0.saturating_sub(now().0));
        let input = tokio::select! {
            biased;
            order = orders.recv() => match order {
                Some(Order::Drain) => Input::Drain,
                Some(Order::Serve(_)) => continue,
                None => anyhow::bail!("the agent is gone"),
            },
            Some(done) = server.done_in.recv() => server.digest(done?),
            Some(input) = server.events_in.recv() => input,
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => match server.admit(stream, peer) {
                    Some(input) => input,
                    None => continue,
                },
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection");
                    sleep(Duration::from_millis(10)).await;
                    continue;
                }
            },
            kept = &mut keeper => {
                kept??;
                continue;
            }
            () = sleep(deadline) => Input::Tick,
        };
        if let Some(exit) = server.turn(input).await? {
            tracing::info!(%term, ?exit, "ending");
            if exit == Exit::Drained {
                link.tell(ToAgent::ServerDrained);
                tokio::task::yield_now().await;
            }
            return Ok(());
        }
    }
}

struct Server<S: Storage> {
    core: ServerCore,
    bench: Workbench<S>,
    connections: BTreeMap<ConnId, Connection>,
    /// Sockets at once; as many as leave the files of the pool theirs.
    connections_max: usize,
    /// One clone for each socket that is open, whether its connection counts or not.
    open: Rc<()>,
    closings: Rc<Closings>,
    last_conn: u64,
    next_look: Time,
    /// When a checkpoint is due although the journal is short: the first one, which makes the files of earlier terms
    /// superfluous, and the one after one that found no space.
    checkpoint_due: Rc<Cell<Option<Time>>>,
    events: mpsc::Sender<Input>,
    events_in: mpsc::Receiver<Input>,
    done: mpsc::UnboundedSender<Result<Done, Fatal>>,
    done_in: mpsc::UnboundedReceiver<Result<Done, Fatal>>,
    /// A checkpoint is asked for or being written: one at a time.
    checkpointing: Rc<Cell<bool>>,
}

impl<S: Storage> Server<S> {
    fn new(core: ServerCore, bench: Workbench<S>, connections_max: usize) -> Self {
        let (events, events_in) = mpsc::channel(EVENTS_QUEUED_MAX);
        let (done, done_in) = mpsc::unbounded_channel();
        let connections = BTreeMap::new();
        let hurry = bench.journal().terms_since_checkpoint() > TERMS_WITHOUT_CHECKPOINT_MAX;
        let first_after = if hurry { Duration::ZERO } else { FIRST_CHECKPOINT_AFTER };
        Self {
            core,
            bench,
            connections,
            connections_max,
            open: Rc::default(),
            closings: Rc::default(),
            last_conn: 0,
            next_look: Time(0),
            checkpoint_due: Rc::new(Cell::new(Some(now().after(first_after)))),
            events,
            events_in,
            done,
            done_in,
            checkpointing: Rc::default(),
        }
    }

    fn admit(&mut self, stream: TcpStream, peer: SocketAddr) -> Option<Input> {
        let open = Rc::strong_count(&self.open) - 1;
        if open >= self.connections_max {
            self.closings.note(now(), peer, CloseReason::TooMany);
            return None;
        }
        self.last_conn += 1;
        let conn = ConnId(self.last_conn);
        let (events, closings) = (self.events.clone(), self.closings.clone());
        match Connection::start(conn, stream, peer, events, closings, self.open.clone()) {
            Ok(connection) => {
                self.connections.insert(conn, connection);
                Some(Input::Accepted { conn })
            }
            Err(error) => {
                tracing::warn!(%error, "setting up a connection");
                None
            }
        }
    }

    /// Takes `first` and what else is at hand, then lets the core start what gathered.
    async fn turn(&mut self, first: Input) -> anyhow::Result<Option<Exit>> {
        let mut out = Vec::new();
        let mut next = Some(first);
        for _ in 0..EVENTS_PER_TURN_MAX {
            let Some(input) = next.take() else { break };
            if let Input::Closed { conn } = input {
                self.connections.remove(&conn);
            }
            self.core.step(now(), wall(), input, &mut out);
            next = match self.done_in.try_recv() {
                Ok(done) => Some(self.digest(done?)),
                Err(_) => self.events_in.try_recv().ok(),
            };
        }
        if let Some(input) = next {
            self.core.step(now(), wall(), input, &mut out);
        }
        self.wish_for_checkpoint(&mut out);
        self.look_for_the_dead();
        self.closings.sum_up(now());
        self.core.end_turn(&mut out);
        Ok(self.perform(out))
    }

    /// Starts the checkpoint that an append carried; its input is the core's.
    fn digest(&mut self, done: Done) -> Input {
        if let Some((position, state)) = done.checkpoint {
            let (bench, done) = (self.bench.clone(), self.done.clone());
            let (over, due) = (self.checkpointing.clone(), self.checkpoint_due.clone());
            spawn_local(write_checkpoint(bench, position, state, over, due, done));
        }
        done.input
    }

    fn wish_for_checkpoint(&mut self, out: &mut Vec<Output>) {
        let first = self.checkpoint_due.get().is_some_and(|at| at <= now());
        if !self.checkpointing.get() && (first || self.bench.journal().wants_checkpoint()) {
            self.checkpoint_due.set(None);
            self.checkpointing.set(true);
            self.core.step(now(), wall(), Input::CheckpointDue, out);
        }
    }

    /// Asks after older terms' servers, now and then, until all are known dead.
    fn look_for_the_dead(&mut self) {
        let terms: Vec<Term> = self.core.state().older_terms().collect();
        if terms.is_empty() || now() < self.next_look {
            return;
        }
        self.next_look = now().after(LOOK_EVERY);
        let (bench, events) = (self.bench.clone(), self.events.clone());
        spawn_local(async move {
            match bench.find_dead(terms).await {
                Ok(terms) if !terms.is_empty() => drop(events.send(Input::TermsDead { terms }).await),
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "looking for older servers"),
            }
        });
    }

    /// Closes the connection of a peer that does not read what it asked for. Its session stays.
    fn cut_off(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.remove(&conn) else { return };
        self.closings.note(now(), connection.peer(), CloseReason::Unread);
        connection.cut();
        let events = self.events.clone();
        spawn_local(async move { drop(events.send(Input::Closed { conn }).await) });
    }

    /// Carries outputs out, in order. Those that take time report by themselves.
    fn perform(&mut self, out: Vec<Output>) -> Option<Exit> {
        for output in out {
            match output {
                Output::Send { conn, frame } => {
                    if self.connections.get(&conn).is_some_and(|connection| !connection.send(&frame)) {
                        self.cut_off(conn);
                    }
                }
                Output::Close { conn, reason } => {
                    if let Some(connection) = self.connections.remove(&conn)
                        && let Some(reason) = reason
                    {
                        self.closings.note(now(), connection.peer(), reason);
                    }
                }
                Output::Exit { reason } => return Some(reason),
                output => {
                    let (bench, done) = (self.bench.clone(), self.done.clone());
                    spawn_local(async move {
                        if let Some(result) = bench.carry_out(output).await.transpose() {
                            let _ = done.send(result);
                        }
                    });
                }
            }
        }
        None
    }
}

/// Takes the lock that says that we live, before anything is recorded under our term. Whoever looked whether we are dead
/// holds it for a moment.
async fn show_life<S: Storage>(bench: &Workbench<S>) -> anyhow::Result<S::File> {
    for _ in 0..LIFE_ATTEMPTS {
        if let Some(file) = bench.show_life().await? {
            return Ok(file);
        }
        sleep(Duration::from_millis(10)).await;
    }
    anyhow::bail!("somebody else holds the lock of our term: csnap check must not run on a pool in use")
}

/// Writes a checkpoint; a failure of storage ends the process, a lack of space does not.
async fn write_checkpoint<S: Storage>(
    bench: Workbench<S>,
    position: Position,
    state: Box<State>,
    checkpointing: Rc<Cell<bool>>,
    due: Rc<Cell<Option<Time>>>,
    done: mpsc::UnboundedSender<Result<Done, Fatal>>,
) {
    match bench.checkpoint(position, &state).await {
        Ok(true) => tracing::debug!(?position, "checkpoint written"),
        Ok(false) => {
            tracing::warn!("no space for a checkpoint; the journal goes on without");
            // It would give back what earlier terms left, however short the journal is.
            sleep(RETRY_SEGMENT).await;
            due.set(Some(now()));
        }
        Err(fatal) => drop(done.send(Err(fatal))),
    }
    checkpointing.set(false);
}

/// Keeps the next segment ready, and some aside for the next terms.
async fn keep_segments<S: Storage>(journal: Journal<S>) -> Result<(), Fatal> {
    loop {
        if journal.prepare_segment().await? == Prepared::NoSpace
            || journal.set_aside().await? == Prepared::NoSpace
        {
            sleep(RETRY_SEGMENT).await;
            continue;
        }
        journal.segment_taken().await;
    }
}
