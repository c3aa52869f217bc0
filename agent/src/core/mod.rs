//! What an agent decides: whose server serves, when a child is killed, who gets a socket.
//!
//! [`AgentCore`] is a pure step machine: inputs say what happened, outputs say what to do, in order. It embeds
//! lockd's [`LockClient`]; time and identities are arguments. The parent here holds the control flow, the parts are
//! leaves that do not know each other:
//!
//! - `anointing`: the loop on the server lock; `members`: the live nodes and their order;
//! - `child`: the server child; `attempts`: its takeovers that failed; `exporter`: the node's exporter;
//! - `reaping`: the dead, to be declared to the server; `declaration`: how one is declared;
//! - `seekers`: clients that wait for a socket; `wishes`: operators' requests to other nodes;
//! - `moves`: what changes by plan;
//! - `io`: what goes in and comes out;
//! - `conversation`: what is said on the agent's socket; `saved`: what a later life of the agent must know.
//!
//! Each step first takes the input in, then settles: every part does what the state now asks for, whatever led to it.
//! So a missed or doubled event changes when something happens, never whether.
//!
//! *Architecture Invariant*: a child that is gone or does not answer costs one step: it is killed, and the server lock
//! with its value block given up, before anything else is waited for. The gate of its term makes that safe.

mod anointing;
mod attempts;
mod child;
mod conversation;
mod declaration;
mod exporter;
mod io;
mod lock;
mod members;
mod moves;
mod reaping;
mod saved;
mod seekers;
#[cfg(test)]
mod tests;
mod wishes;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use csnap_lockd::client::{ClientInput, LockClient};
use csnap_proto::message::local::{FromAgent, LockdInfo, NodeInfo, ServerAddress, ServerState};
use csnap_proto::{RequestId, Term, Time};

pub use self::anointing::SERVER_LOCK;
pub use self::declaration::{DECLARE_WITHIN, Declaration, Held, LOOK_AGAIN, Next, Sight};
pub use self::exporter::ClientRun;
pub use self::io::{ConnId, CoreConfig, Failback, Input, Output, Process, Timing};
pub use self::reaping::Dead;
pub use self::saved::SavedState;
pub use self::seekers::Ticket;

use self::anointing::{Anointing, Situation};
use self::attempts::Attempts;
use self::child::Child;
use self::conversation::Peer;
use self::exporter::Exporter;
use self::members::Members;
use self::reaping::Reaping;
use self::seekers::Seekers;
use self::wishes::Wishes;

/// How long an orderly end may take; then the agent goes, and its session runs out.
const STOP_WITHIN: Duration = Duration::from_secs(3);

/// See the module.
#[derive(Debug)]
pub struct AgentCore {
    config: CoreConfig,
    client: LockClient,
    priority: u32,
    anointing: Anointing,
    members: Members,
    child: Child,
    attempts: Attempts,
    exporter: Exporter,
    reaping: Reaping,
    seekers: Seekers,
    wishes: Wishes,
    peers: BTreeMap<ConnId, Peer>,
    /// Exporters that run beside ours, and must go.
    refused: BTreeSet<Process>,
    /// The server that clients of this node are given; kept while lockd is away.
    known: Option<ServerAddress>,
    /// Last term that exporters were told of.
    told: Term,
    lockd: Option<LockdInfo>,
    /// What the others know of us, as far as it was handed to the client.
    published: Option<NodeInfo>,
    /// It is not answered yet.
    publishing: bool,
    /// Who waits for a status, and until when a report of the exporter is waited for.
    statuses: Vec<(ConnId, RequestId)>,
    statuses_until: Time,
    saved: Option<SavedState>,
    /// Processes of an earlier life that must end first, from the saved state.
    leftovers: Vec<Output>,
    stopping: Option<Time>,
    stopped: bool,
}

impl AgentCore {
    /// Takes one input in and settles. Outputs are to be carried out in order.
    pub fn step(&mut self, now: Time, input: Input, out: &mut Vec<Output>) {
        out.append(&mut self.leftovers);
        match input {
            Input::Tick => {}
            Input::Lockd(input) => self.feed_client(now, |client, out| client.step(now, input, out), out),
            Input::Identity(identity) => self.on_identity(now, identity, out),
            Input::Accepted { conn, process } => self.on_accepted(conn, process),
            Input::Received { conn, id, message } => self.on_message(now, conn, id, message, out),
            Input::Gone { conn } => self.on_gone(conn, out),
            Input::ServerSpawned(result) => self.child.spawned(now, result, out),
            Input::ExporterSpawned(result) => self.exporter.spawned(now, result, out),
            Input::Ended(process) => self.on_ended(now, process, out),
            Input::ServerConnect { ticket, made } => self.seekers.on_connect(now, ticket, made, out),
            Input::Probed { term, alive } => self.seekers.on_probe(now, term, alive),
            Input::Declared { dead, done } => self.reaping.on_declared(now, dead, done),
            Input::Stop => self.stopping = self.stopping.or(Some(now.after(STOP_WITHIN))),
        }
        self.settle(now, out);
    }

    /// When to step again at the latest, if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        let timing = &self.config.timing;
        let movable = self.reign_that_serves().is_some_and(|reign| reign.succession.is_none());
        let failback = if movable { self.failback_at() } else { None };
        let statuses = (!self.statuses.is_empty()).then_some(self.statuses_until);
        let times = [
            self.client.next_deadline(),
            self.child.next_deadline(timing),
            self.exporter.next_deadline().filter(|_| self.stopping.is_none()),
            self.anointing.next_deadline(&self.situation()).filter(|_| self.client.has_room()),
            self.attempts.next_deadline(self.is_alone()),
            self.seekers.next_deadline(self.known.as_ref()),
            self.wishes.next_deadline(),
            self.reaping.next_deadline(self.known.as_ref()),
            failback,
            statuses,
            self.stopping.filter(|_| !self.stopped),
        ];
        times.into_iter().flatten().min()
    }

    /// Where a connection to lockd is tried first: a lockd said that the leader is there.
    #[must_use]
    pub fn lockd_hint(&self) -> Option<::core::net::SocketAddr> {
        self.client.hint()
    }

    #[cfg(test)]
    fn known_term(&self) -> Option<Term> {
        self.known.as_ref().map(|known| known.term)
    }

    /// Does everything that the state asks for. The order matters in one place: the child is judged before the lock is
    /// pursued, so that a dead one costs no further step.
    fn settle(&mut self, now: Time, out: &mut Vec<Output>) {
        let another_takes_over = self.known.is_none() && self.members.any_ready();
        self.child.tick(now, &self.config.timing, another_takes_over, out);
        if self.child.serving_term().is_some() {
            self.attempts.on_served();
        }
        self.attempts.tick(now, self.is_alone());
        if self.stopping.is_none() {
            self.exporter.tick(now, out);
        }
        self.feed_client(now, |client, out| client.step(now, ClientInput::Tick, out), out);
        self.plan_moves(now, out);
        self.pursue_lock(now, out);
        self.list_members(now, out);
        self.publish_node(now, out);
        self.learn_server(out);
        self.seekers.tick(now, self.known.as_ref(), out);
        self.settle_wishes(now, out);
        self.reaping.tick(now, self.known.as_ref(), out);
        self.answer_statuses(now, out);
        self.save_changes(out);
        self.settle_stop(now, out);
    }

    /// Does what the lock asks for. A dead child's lock is given back here, in the step that learns of the death, so the
    /// session is never renewed for a child that does not answer; renewing on is what notices a connection that swallows
    /// the release.
    fn pursue_lock(&mut self, now: Time, out: &mut Vec<Output>) {
        while self.client.has_room() {
            let mut anointing = std::mem::replace(&mut self.anointing, Anointing::new());
            let op = anointing.pursue(now, &self.situation());
            self.anointing = anointing;
            let Some(op) = op else { break };
            self.operate(now, op, out);
        }
    }

    /// Our standby would take over if it were asked to now.
    fn could_serve(&self) -> bool {
        self.child.is_ready_standby() && !self.attempts.is_resting() && self.stopping.is_none()
    }

    /// Nobody serves, and no other node is ready to.
    fn is_alone(&self) -> bool {
        self.known.is_none() && !self.members.any_ready()
    }

    fn situation(&self) -> Situation<'_> {
        let may = self.members.known && self.priority > 0 && self.could_serve();
        let place = || self.members.place(&self.config.node, self.priority, self.attempts.is_in_trouble());
        let duty = self.child.process().and_then(|(_, term)| term).filter(|term| self.child.has_term(*term));
        Situation {
            node: &self.config.node,
            place: may.then(place),
            place_step: self.config.timing.place_step,
            outranked: self.members.outranks(self.priority),
            child: duty.map(|term| (term, self.child.serving_term() == Some(term))),
            tcp: self.child.tcp().unwrap_or_default(),
            drained: self.child.is_drained(),
        }
    }

    /// Knows the server that serves: our own as soon as it says so, another's as the value block says. While lockd is
    /// away the last one stays known, for a server goes on without lockd.
    fn learn_server(&mut self, out: &mut Vec<Output>) {
        let me = &self.config.node;
        if let (Some(term), Some(tcp)) = (self.child.serving_term(), self.child.tcp()) {
            let state = ServerState::Ready;
            self.known = Some(ServerAddress { node: me.clone(), term, tcp: tcp.to_owned(), state });
        } else {
            if self.anointing.has_looked() {
                let ready = |address: &ServerAddress| address.state == ServerState::Ready;
                self.known = self.anointing.published().filter(ready);
            }
            // Ours, and not serving any more: the lock is on its way back.
            self.known.take_if(|address| address.node == *me);
        }
        let Some(term) = self.known.as_ref().map(|known| known.term).filter(|term| *term > self.told) else {
            return;
        };
        self.told = term;
        if let Some(conn) = self.exporter.conn() {
            out.push(Output::tell(conn, FromAgent::ServerReady { term }));
        }
    }

    fn on_ended(&mut self, now: Time, process: Process, out: &mut Vec<Output>) {
        if let Some((term, owed_takeover)) = self.child.on_exit(now, process) {
            self.reaping.add(Dead::Server { term });
            if owed_takeover {
                self.attempts.on_failed(now);
                out.push(Output::Note(format!("our server of term {term} ended before it served")));
            }
        }
        if let Some(run) = self.exporter.on_exit(now, process, out) {
            self.reaping.add(Dead::Client(run));
        }
        self.reaping.on_ended(process);
        self.refused.remove(&process);
    }

    /// Ends when the child is gone, the lock given back, and the session closed; or when it takes too long.
    fn settle_stop(&mut self, now: Time, out: &mut Vec<Output>) {
        let Some(until) = self.stopping.filter(|_| !self.stopped) else { return };
        if self.anointing.is_idle() {
            self.child.stop(out);
            if self.client.is_open() && !self.anointing.is_away() {
                self.anointing.lose();
                self.feed_client(now, |client, out| client.step(now, ClientInput::Close, out), out);
            }
        }
        let nothing_left = self.child.is_stopped() && (self.client.is_over() || !self.client.is_open());
        if nothing_left || until <= now {
            self.stopped = true;
            self.child.stop(out);
            out.push(Output::Stopped);
        }
    }
}
