//! The server child: started at once as a standby, pinged, killed when it does not answer, started again.
//!
//! What it is not: a judge of who serves; the anointing decides that and asks for [`Child::anoint`] and
//! [`Child::drain`]. Invariants: at most one child exists, a new one is not started before the old one was reaped; a
//! child that was told to serve is never a standby again, its end is the end of its term.

use std::time::Duration;

use csnap_proto::message::local::FromAgent;
use csnap_proto::{Term, Time};

use super::{ConnId, Output, Process, Timing};

/// A child that never says hello is frozen in its start: kill it then.
const HELLO_WITHIN: Duration = Duration::from_secs(10);

/// A child that stays up this long, or follows the journal before, starts again without waiting when it ends.
const HEALTHY_AFTER: Duration = Duration::from_secs(2);

/// First wait before a restart of a child that ended early; doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(50);

/// A child that cannot start is tried this often for ever: its trouble (a pool that is not mounted) may pass.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// A child that ended is not started again while another node takes over: starting a process (and reading its
/// configuration) has no place in a failover. No longer than this, though: the other node may not make it.
const HOLD_AT_MOST: Duration = Duration::from_secs(1);

/// A server that does not finish draining by then is killed; its clients ask its successor again.
const DRAIN_WITHIN: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Debug)]
pub(super) struct Child {
    state: State,
    backoff: Duration,
    /// Another node takes over: see [`HOLD_AT_MOST`].
    held: bool,
    /// It was told to serve and does not yet: should it end now, that takeover failed.
    owes_takeover: bool,
    /// When this core last looked: an agent that was itself stopped must not judge its child by the clock.
    looked: Time,
}

#[derive(Debug)]
enum State {
    Down {
        restart_at: Time,
    },
    Spawning,
    Up(Up),
    /// SIGKILL was sent; not reaped yet.
    Dying {
        process: Process,
        term: Option<Term>,
        healthy: bool,
    },
    /// The agent ends: no new child. `last` has not been reaped yet.
    Stopped {
        last: Option<(Process, Option<Term>)>,
    },
}

#[derive(Debug)]
struct Up {
    process: Process,
    since: Time,
    /// Its connection and the address that it listens on, once it said hello.
    said_hello: Option<(ConnId, String)>,
    follows_journal: bool,
    /// It did so once: starting it works.
    followed: bool,
    duty: Duty,
    next_ping: Time,
    unanswered_since: Option<Time>,
}

/// What the child was told to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Duty {
    Standby,
    /// `until`: it must serve by then.
    Serve {
        term: Term,
        serving: bool,
        until: Time,
    },
    Drain {
        term: Term,
        drained: bool,
        until: Time,
    },
}

impl Duty {
    fn term(self) -> Option<Term> {
        match self {
            Self::Standby => None,
            Self::Serve { term, .. } | Self::Drain { term, .. } => Some(term),
        }
    }
}

impl Child {
    pub(super) fn new(now: Time) -> Self {
        Self {
            state: State::Down { restart_at: now },
            backoff: BACKOFF_MIN,
            held: false,
            owes_takeover: false,
            looked: now,
        }
    }

    /// Starts, pings and kills as time demands. `held`: another node takes over.
    pub(super) fn tick(&mut self, now: Time, timing: &Timing, held: bool, out: &mut Vec<Output>) {
        self.held = held;
        let stopped_ourselves = now.since(self.looked) > timing.ping_timeout / 2;
        self.looked = now;
        if self.start_at().is_some_and(|at| at <= now) {
            self.state = State::Spawning;
            out.push(Output::SpawnServer);
        }
        let State::Up(up) = &mut self.state else { return };
        if stopped_ourselves {
            up.forgive(now);
        }
        if let Some(why) = up.overdue(now, timing) {
            out.push(Output::Note(format!("server {} is killed: {why}", up.process.pid)));
            self.kill(out);
        } else if up.next_ping <= now {
            up.ping(now, timing, out);
        }
    }

    /// When [`Self::tick`] has something to do.
    pub(super) fn next_deadline(&self, timing: &Timing) -> Option<Time> {
        match &self.state {
            State::Up(up) => Some(up.deadline(timing)),
            _ => self.start_at(),
        }
    }

    pub(super) fn spawned(&mut self, now: Time, result: Result<Process, String>, out: &mut Vec<Output>) {
        match result {
            Ok(process) => {
                self.state = State::Up(Up {
                    process,
                    since: now,
                    said_hello: None,
                    follows_journal: false,
                    followed: false,
                    duty: Duty::Standby,
                    next_ping: now,
                    unanswered_since: None,
                });
            }
            Err(why) => {
                out.push(Output::Note(format!("the server did not start: {why}")));
                self.wait_before_restart(now);
            }
        }
    }

    /// The child speaks for the first time. False: it is not our child.
    pub(super) fn on_hello(&mut self, conn: ConnId, process: Process, tcp: String) -> bool {
        match &mut self.state {
            State::Up(up) if up.process == process && up.said_hello.is_none() => {
                up.said_hello = Some((conn, tcp));
                true
            }
            _ => false,
        }
    }

    pub(super) fn on_standby(&mut self, follows_journal: bool) {
        if let State::Up(up) = &mut self.state {
            up.follows_journal = follows_journal;
            up.followed |= follows_journal;
        }
    }

    pub(super) fn on_serving(&mut self, serving_term: Term) {
        if let State::Up(Up { duty: Duty::Serve { term, serving, .. }, .. }) = &mut self.state
            && *term == serving_term
        {
            *serving = true;
            self.owes_takeover = false;
        }
    }

    pub(super) fn on_drained(&mut self) {
        if let State::Up(Up { duty: Duty::Drain { drained, .. }, .. }) = &mut self.state {
            *drained = true;
        }
    }

    pub(super) fn on_pong(&mut self) {
        if let State::Up(up) = &mut self.state {
            up.unanswered_since = None;
        }
    }

    /// Its connection broke: it is dead or deaf.
    pub(super) fn on_gone(&mut self, out: &mut Vec<Output>) {
        if matches!(&self.state, State::Up(_)) {
            self.kill(out);
        }
    }

    /// Its takeover, if one is under way, is given up by us.
    pub(super) fn excuse(&mut self) {
        self.owes_takeover = false;
    }

    /// A process was reaped. Returns its term, if it was the child and had one, and whether it owed the takeover.
    pub(super) fn on_exit(&mut self, now: Time, ended: Process) -> Option<(Term, bool)> {
        let (process, term, healthy) = match &self.state {
            State::Up(up) => (up.process, up.duty.term(), up.is_healthy(now)),
            State::Dying { process, term, healthy } => (*process, *term, *healthy),
            State::Stopped { last: Some((process, term)) } => (*process, *term, true),
            _ => return None,
        };
        // Its number alone may be another's by now.
        if process != ended {
            return None;
        }
        let office = term.map(|term| (term, std::mem::take(&mut self.owes_takeover)));
        if let State::Stopped { last } = &mut self.state {
            *last = None;
            return office;
        }
        if healthy {
            self.backoff = BACKOFF_MIN;
            self.state = State::Down { restart_at: now };
        } else {
            self.wait_before_restart(now);
        }
        office
    }

    /// It is the server of `term` from now on, and must serve within `patience`.
    pub(super) fn anoint(&mut self, now: Time, term: Term, patience: Duration, out: &mut Vec<Output>) {
        if let State::Up(up) = &mut self.state
            && let Some((conn, _)) = up.said_hello
        {
            up.duty = Duty::Serve { term, serving: false, until: now.after(patience) };
            self.owes_takeover = true;
            out.push(Output::tell(conn, FromAgent::Serve { term }));
        }
    }

    /// It shall drain and end.
    pub(super) fn drain(&mut self, now: Time, out: &mut Vec<Output>) {
        if let State::Up(up) = &mut self.state
            && let Some((conn, _)) = up.said_hello
            && let Duty::Serve { term, .. } = up.duty
        {
            up.duty = Duty::Drain { term, drained: false, until: now.after(DRAIN_WITHIN) };
            out.push(Output::tell(conn, FromAgent::Drain));
        }
    }

    /// Someone suspects it: ask it now rather than at the next turn.
    pub(super) fn ping_now(&mut self, now: Time) {
        if let State::Up(up) = &mut self.state {
            up.next_ping = now;
        }
    }

    /// Ends it the hard way. Nothing more is expected of it.
    pub(super) fn kill(&mut self, out: &mut Vec<Output>) {
        if let State::Up(up) = &self.state {
            let (process, term, healthy) = (up.process, up.duty.term(), up.is_healthy(self.looked));
            out.push(Output::Kill(process));
            self.state = State::Dying { process, term, healthy };
        }
    }

    /// No child any more: one that runs is killed, none is started again.
    pub(super) fn stop(&mut self, out: &mut Vec<Output>) {
        self.kill(out);
        if !matches!(self.state, State::Stopped { .. }) {
            self.state = State::Stopped { last: self.process() };
        }
    }

    /// Stopped, and nothing of it is left.
    pub(super) fn is_stopped(&self) -> bool {
        matches!(self.state, State::Stopped { last: None })
    }

    /// Could take over now.
    pub(super) fn is_ready_standby(&self) -> bool {
        matches!(&self.state, State::Up(up) if up.duty == Duty::Standby && up.follows_journal && up.said_hello.is_some())
    }

    /// Lives and is told to serve under `term` (or drains under it).
    pub(super) fn has_term(&self, term: Term) -> bool {
        matches!(&self.state, State::Up(up) if up.duty.term() == Some(term))
    }

    /// The term under which it serves.
    pub(super) fn serving_term(&self) -> Option<Term> {
        match &self.state {
            State::Up(Up { duty: Duty::Serve { term, serving: true, .. }, .. }) => Some(*term),
            _ => None,
        }
    }

    /// It drains and is done with it, or was given up.
    pub(super) fn is_drained(&self) -> bool {
        !matches!(
            &self.state,
            State::Up(Up { duty: Duty::Drain { drained: false, .. } | Duty::Serve { .. }, .. })
        )
    }

    pub(super) fn conn(&self) -> Option<ConnId> {
        match &self.state {
            State::Up(up) => up.said_hello.as_ref().map(|(conn, _)| *conn),
            _ => None,
        }
    }

    pub(super) fn tcp(&self) -> Option<&str> {
        match &self.state {
            State::Up(up) => up.said_hello.as_ref().map(|(_, tcp)| tcp.as_str()),
            _ => None,
        }
    }

    /// The live process, and its term if it has one.
    pub(super) fn process(&self) -> Option<(Process, Option<Term>)> {
        match &self.state {
            State::Up(up) => Some((up.process, up.duty.term())),
            State::Dying { process, term, .. } => Some((*process, *term)),
            State::Stopped { last } => *last,
            _ => None,
        }
    }

    /// Why it cannot take over, for people.
    pub(super) fn why_not_ready(&self) -> &'static str {
        match &self.state {
            State::Down { .. } | State::Spawning => "its server is being started",
            State::Dying { .. } => "its server was killed and has not ended yet",
            State::Stopped { .. } => "its agent is stopping",
            State::Up(up) if up.said_hello.is_none() => "its server has not said hello",
            State::Up(up) if !up.follows_journal => {
                "its server does not follow the journal yet (see its log)"
            }
            State::Up(_) => "its server waits to be anointed",
        }
    }

    /// When the next child is due, if none is there.
    fn start_at(&self) -> Option<Time> {
        let State::Down { restart_at } = self.state else { return None };
        Some(if self.held { restart_at.after(HOLD_AT_MOST) } else { restart_at })
    }

    fn wait_before_restart(&mut self, now: Time) {
        self.state = State::Down { restart_at: now.after(self.backoff) };
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
    }
}

impl Up {
    fn is_healthy(&self, now: Time) -> bool {
        self.followed || now.since(self.since) >= HEALTHY_AFTER
    }

    fn ping(&mut self, now: Time, timing: &Timing, out: &mut Vec<Output>) {
        self.next_ping = now.after(timing.ping_interval);
        if let Some((conn, _)) = self.said_hello {
            self.unanswered_since.get_or_insert(now);
            out.push(Output::tell(conn, FromAgent::Ping));
        }
    }

    /// We were stopped ourselves: what it did not do meanwhile, we would not have seen.
    fn forgive(&mut self, now: Time) {
        if self.unanswered_since.is_some() {
            self.unanswered_since = Some(now);
        }
        if let Duty::Serve { serving: false, until, .. } = &mut self.duty {
            *until = (*until).max(now.after(HELLO_WITHIN));
        }
    }

    /// Why it must be killed now, if it must.
    fn overdue(&self, now: Time, timing: &Timing) -> Option<&'static str> {
        if self.unanswered_since.is_some_and(|since| now >= since.after(timing.ping_timeout)) {
            return Some("it does not answer pings");
        }
        if self.said_hello.is_none() && now >= self.since.after(HELLO_WITHIN) {
            return Some("it never said hello");
        }
        match self.duty {
            Duty::Serve { serving: false, until, .. } if now >= until => Some("it did not take over in time"),
            Duty::Drain { until, drained, .. } if now >= until && !drained => {
                Some("it did not drain in time")
            }
            Duty::Drain { until, .. } if now >= until => Some("it has drained and did not end"),
            _ => None,
        }
    }

    fn deadline(&self, timing: &Timing) -> Time {
        let silence = self.unanswered_since.map(|since| since.after(timing.ping_timeout));
        let hello = self.said_hello.is_none().then(|| self.since.after(HELLO_WITHIN));
        let duty = match self.duty {
            Duty::Serve { serving: false, until, .. } | Duty::Drain { until, .. } => Some(until),
            Duty::Standby | Duty::Serve { .. } => None,
        };
        [silence, hello, duty].into_iter().flatten().fold(self.next_ping, Time::min)
    }
}
