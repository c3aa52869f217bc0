//! Processes of this node that died: the server must hear of each, or what they held stays held.
//!
//! A declaration is repeated until some server took it in, also by a later life of the agent. A client is declared once
//! more a while later: the last words of the dead may have reached the server after the first declaration, and opened a
//! session anew. That the last I/O of the dead is gone is checked by whoever carries the declaration out.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use csnap_proto::message::local::ServerAddress;
use csnap_proto::{Term, Time};
use serde::{Deserialize, Serialize};

use super::{ClientRun, Output, Process};

/// Wait before a declaration that was not taken in is repeated.
const AGAIN: Duration = Duration::from_millis(500);

/// From the first declaration of a client to the second: what the dead had sent is delivered or lost by then.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Most dead that wait to be declared: an exporter that dies every few seconds for hours. Beyond, the oldest is left to
/// the operator's fence.
const DEAD_MAX: usize = 4096;

/// Most processes that write volumes at once beside the exporter: imports of one node.
const WRITERS_MAX: usize = 1024;

/// Who died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Dead {
    /// A run of the exporter, or of another process that wrote volumes.
    Client(ClientRun),
    /// The server of this term, reaped.
    Server {
        /// Its term.
        term: Term,
    },
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Reaping {
    waiting: BTreeSet<Dead>,
    /// Of those that wait: declared once, and when the second time is due.
    once: BTreeMap<Dead, Time>,
    in_flight: BTreeSet<Dead>,
    not_before: Time,
    /// Servers of an earlier life of the agent that still run.
    leftovers: BTreeMap<Process, Term>,
    /// Processes that write volumes and are not our children.
    writers: BTreeSet<ClientRun>,
}

impl Reaping {
    pub(super) fn new(dead: BTreeSet<Dead>) -> Self {
        Self { waiting: dead, ..Self::default() }
    }

    pub(super) fn add(&mut self, dead: Dead) {
        self.waiting.insert(dead);
        if self.waiting.len() > DEAD_MAX {
            let oldest = self.waiting.pop_first();
            oldest.map(|dead| self.once.remove(&dead));
        }
    }

    /// A server of an earlier life runs on; it counts as dead when it has ended.
    pub(super) fn expect(&mut self, process: Process, term: Term) {
        self.leftovers.insert(process, term);
    }

    /// A process writes volumes; it counts as dead when it has ended. False: too many do.
    pub(super) fn expect_writer(&mut self, run: ClientRun) -> bool {
        if self.writers.len() >= WRITERS_MAX && !self.writers.contains(&run) {
            return false;
        }
        self.writers.insert(run);
        true
    }

    /// A watched process ended.
    pub(super) fn on_ended(&mut self, process: Process) {
        let dead: Vec<_> = self.writers.extract_if(.., |run| run.process == process).collect();
        dead.into_iter().for_each(|run| self.add(Dead::Client(run)));
        if let Some(term) = self.leftovers.remove(&process) {
            self.add(Dead::Server { term });
        }
    }

    /// Declares to the server that serves. A dead server is declared to its successors only.
    pub(super) fn tick(&mut self, now: Time, known: Option<&ServerAddress>, out: &mut Vec<Output>) {
        let Some(known) = known.filter(|_| self.not_before <= now) else { return };
        let ripe = |(dead, at): (&Dead, Time)| (at <= now).then_some(*dead);
        let due: Vec<_> = self.open(known.term).filter_map(ripe).collect();
        for dead in due {
            self.in_flight.insert(dead);
            out.push(Output::Declare { dead, tcp: known.tcp.clone() });
        }
    }

    pub(super) fn on_declared(&mut self, now: Time, dead: Dead, done: bool) {
        self.in_flight.remove(&dead);
        if !done {
            self.not_before = now.after(AGAIN);
        } else if matches!(dead, Dead::Client(_)) && !self.once.contains_key(&dead) {
            self.once.insert(dead, now.after(LAST_WORDS));
        } else {
            self.once.remove(&dead);
            self.waiting.remove(&dead);
        }
    }

    pub(super) fn waiting(&self) -> &BTreeSet<Dead> {
        &self.waiting
    }

    /// Writers that live.
    pub(super) fn writers(&self) -> &BTreeSet<ClientRun> {
        &self.writers
    }

    /// Servers of earlier lives that are not known dead yet.
    pub(super) fn expected(&self) -> impl Iterator<Item = (Process, Term)> {
        self.leftovers.iter().map(|(process, term)| (*process, *term))
    }

    pub(super) fn next_deadline(&self, known: Option<&ServerAddress>) -> Option<Time> {
        let earliest = self.open(known?.term).map(|(_, at)| at).min()?;
        Some(earliest.max(self.not_before))
    }

    /// What is to be declared to the server of `serving` and is not under way, and from when on.
    fn open(&self, serving: Term) -> impl Iterator<Item = (&Dead, Time)> {
        let ripe = move |dead: &&Dead| match dead {
            Dead::Client(_) => true,
            Dead::Server { term } => *term < serving,
        };
        let open = self.waiting.iter().filter(ripe).filter(|dead| !self.in_flight.contains(dead));
        open.map(|dead| (dead, self.once.get(dead).copied().unwrap_or_default()))
    }
}
