//! Clients of this node that wait for a connected server socket.
//!
//! A seeker that suspects the server of term T gets a later one as soon as it is known. If T still reigns, its address
//! is probed first: a connection can break without its server being at fault, and a frozen server still accepts
//! connections, so only an answer in T's name clears the suspicion.

use std::collections::BTreeMap;
use std::time::Duration;

use csnap_proto::message::local::{FromAgent, ServerAddress};
use csnap_proto::{RequestId, Term, Time};

use super::{ConnId, Output};

/// Most requests for a socket that wait at once on one node; each volume of the node has at most one.
const SEEKERS_MAX: usize = 4096;

/// Wait before an address that refused is tried again: a server that has just published it may not listen yet.
const CONNECT_AGAIN: Duration = Duration::from_millis(20);

/// Wait before a suspected server that did not answer a probe is probed again.
const PROBE_AGAIN: Duration = Duration::from_millis(50);

/// Names an attempt to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

#[derive(Debug)]
struct Seeker {
    conn: ConnId,
    id: RequestId,
    suspect: Term,
    /// The suspect answered a probe since.
    cleared: bool,
    not_before: Time,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Seekers {
    waiting: Vec<Seeker>,
    connecting: BTreeMap<Ticket, (Seeker, ServerAddress)>,
    tickets: u64,
    probing: Option<Term>,
    probe_not_before: Time,
}

impl Seekers {
    pub(super) fn add(
        &mut self,
        now: Time,
        conn: ConnId,
        id: RequestId,
        suspect: Term,
        out: &mut Vec<Output>,
    ) {
        if self.waiting.len() + self.connecting.len() >= SEEKERS_MAX {
            let reason = format!("more than {SEEKERS_MAX} clients wait for a server on this node");
            out.push(Output::Send { conn, id, message: FromAgent::Failed { reason } });
            return;
        }
        self.waiting.push(Seeker { conn, id, suspect, cleared: false, not_before: now });
    }

    /// Nobody on this connection gets a socket.
    pub(super) fn refuse(&mut self, conn: ConnId, reason: &str, out: &mut Vec<Output>) {
        let waiting = self.waiting.extract_if(.., |seeker| seeker.conn == conn);
        let connecting = self.connecting.extract_if(.., |_, (seeker, _)| seeker.conn == conn);
        let refused = waiting.chain(connecting.map(|(_, (seeker, _))| seeker));
        out.extend(refused.map(|Seeker { conn, id, .. }| {
            let message = FromAgent::Failed { reason: reason.to_owned() };
            Output::Send { conn, id, message }
        }));
    }

    pub(super) fn on_gone(&mut self, conn: ConnId) {
        self.waiting.retain(|seeker| seeker.conn != conn);
        self.connecting.retain(|_, (seeker, _)| seeker.conn != conn);
    }

    /// Connects whom it can, and probes whom somebody suspects.
    pub(super) fn tick(&mut self, now: Time, known: Option<&ServerAddress>, out: &mut Vec<Output>) {
        let Some(known) = known else { return };
        self.recall_older(now, known.term);
        let mut suspected = false;
        let mut waiting = std::mem::take(&mut self.waiting);
        for seeker in waiting.extract_if(.., |seeker| {
            suspected |= seeker.suspect == known.term && !seeker.cleared;
            seeker.not_before <= now && (known.term > seeker.suspect || seeker.cleared)
        }) {
            self.tickets += 1;
            let ticket = Ticket(self.tickets);
            out.push(Output::ConnectServer { ticket, tcp: known.tcp.clone() });
            self.connecting.insert(ticket, (seeker, known.clone()));
        }
        self.waiting = waiting;
        if suspected && self.probing.is_none() && self.probe_not_before <= now {
            self.probing = Some(known.term);
            out.push(Output::Probe { tcp: known.tcp.clone(), term: known.term });
        }
    }

    /// Whoever is being connected to an older server than this waits again: that address may never answer.
    fn recall_older(&mut self, now: Time, term: Term) {
        let older = |_: &Ticket, entry: &mut (Seeker, ServerAddress)| entry.1.term < term;
        let recalled: Vec<_> = self.connecting.extract_if(.., older).collect();
        self.waiting
            .extend(recalled.into_iter().map(|(_, (seeker, _))| Seeker { not_before: now, ..seeker }));
    }

    /// A connection was made, or not.
    pub(super) fn on_connect(&mut self, now: Time, ticket: Ticket, made: bool, out: &mut Vec<Output>) {
        match self.connecting.remove(&ticket) {
            None if made => out.push(Output::DropSocket { ticket }),
            None => {}
            Some((Seeker { conn, id, .. }, server)) if made => {
                let ServerAddress { node, term, .. } = server;
                out.push(Output::HandOut { ticket, conn, id, message: FromAgent::Connected { node, term } });
            }
            Some((seeker, _)) => {
                self.waiting.push(Seeker { not_before: now.after(CONNECT_AGAIN), ..seeker });
            }
        }
    }

    /// The server of `term` answered a probe in its name, or not.
    pub(super) fn on_probe(&mut self, now: Time, term: Term, alive: bool) {
        self.probing = None;
        self.probe_not_before = if alive { now } else { now.after(PROBE_AGAIN) };
        if alive {
            self.waiting
                .iter_mut()
                .filter(|seeker| seeker.suspect == term)
                .for_each(|seeker| seeker.cleared = true);
        }
    }

    pub(super) fn next_deadline(&self, known: Option<&ServerAddress>) -> Option<Time> {
        let known = known?;
        let due = |seeker: &Seeker| {
            if known.term > seeker.suspect || seeker.cleared {
                Some(seeker.not_before)
            } else {
                (known.term == seeker.suspect && self.probing.is_none()).then_some(self.probe_not_before)
            }
        };
        self.waiting.iter().filter_map(due).min()
    }
}
