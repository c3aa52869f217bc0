//! The node's exporter: found again when it runs already, started otherwise, and started again when it dies.
//!
//! It outlives its agent on purpose (its NBD connections must not drop), so a new agent first waits for one to say
//! hello. Invariant: none is started while one that was recorded is alive, for two would fight over the sockets.

use std::time::Duration;

use csnap_proto::frame::BODY_BYTES_MAX;
use csnap_proto::limits::{LOCKD_SESSIONS_MAX, MEMBER_INFO_BYTES_MAX, NAME_BYTES_MAX, REPORT_BYTES_MAX};
use csnap_proto::message::local::{ADDRESS_BYTES_MAX, ADDRESSES_MAX, ClientReport, FromAgent};
use csnap_proto::{InstanceId, RequestId, Time};

use super::{ConnId, Output, Process};

/// How long a running exporter that we do not know of has to say hello after the agent started. It reconnects every
/// few tens of milliseconds.
const HELLO_WITHIN: Duration = Duration::from_millis(300);

/// An exporter that stays up this long starts again without waiting when it ends.
const HEALTHY_AFTER: Duration = Duration::from_secs(2);

/// What a status holds beside descriptions and report, bytes: our own addresses, uncut.
const STATUS_REST_BYTES: usize = 128 << 10;

const _: () = {
    let nodes = LOCKD_SESSIONS_MAX * (MEMBER_INFO_BYTES_MAX + NAME_BYTES_MAX + 32);
    assert!(nodes + REPORT_BYTES_MAX + STATUS_REST_BYTES < BODY_BYTES_MAX);
    assert!(ADDRESSES_MAX * ADDRESS_BYTES_MAX < STATUS_REST_BYTES);
};

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// One run of a process that attaches volumes, as it is remembered over a restart of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct ClientRun {
    /// The run.
    pub instance: InstanceId,
    /// Its process.
    pub process: Process,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Exporter {
    state: State,
    backoff: Duration,
    /// Last report, cut to what a status has room for.
    pub(super) clients: Vec<ClientReport>,
    /// Addresses of the one that runs.
    pub(super) nbd: Vec<String>,
}

#[derive(Debug)]
enum State {
    /// The agent has just started.
    Seeking {
        until: Time,
        recorded: Option<ClientRun>,
    },
    Down {
        restart_at: Time,
    },
    Spawning,
    Up(Up),
    /// Told to end; whoever asked is answered when it has.
    Stopping {
        process: Process,
        instance: Option<InstanceId>,
        askers: Vec<(ConnId, RequestId)>,
    },
    Stopped,
}

#[derive(Debug)]
struct Up {
    process: Process,
    since: Time,
    instance: Option<InstanceId>,
    conn: Option<ConnId>,
}

impl Exporter {
    /// `recorded`: of the agent's earlier life, whose process is alive; the caller watches it.
    pub(super) fn new(now: Time, recorded: Option<ClientRun>) -> Self {
        let state = State::Seeking { until: now.after(HELLO_WITHIN), recorded };
        Self { state, backoff: BACKOFF_MIN, clients: Vec::new(), nbd: Vec::new() }
    }

    pub(super) fn tick(&mut self, now: Time, out: &mut Vec<Output>) {
        let due = match &self.state {
            State::Seeking { until, recorded: None } => *until <= now,
            State::Down { restart_at } => *restart_at <= now,
            _ => false,
        };
        if due {
            self.state = State::Spawning;
            out.push(Output::SpawnExporter);
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        match &self.state {
            State::Seeking { until, recorded: None } => Some(*until),
            State::Down { restart_at } => Some(*restart_at),
            _ => None,
        }
    }

    pub(super) fn spawned(&mut self, now: Time, result: Result<Process, String>, out: &mut Vec<Output>) {
        match result {
            Ok(process) => self.state = State::Up(Up { process, since: now, instance: None, conn: None }),
            Err(why) => {
                out.push(Output::Note(format!("the exporter did not start: {why}")));
                self.wait_before_restart(now);
            }
        }
    }

    /// One says hello. False: another one runs already, this one must go.
    pub(super) fn on_hello(
        &mut self,
        now: Time,
        conn: ConnId,
        run: ClientRun,
        nbd: Vec<String>,
        out: &mut Vec<Output>,
    ) -> bool {
        let found_again = match &mut self.state {
            State::Seeking { recorded: Some(recorded), .. } if *recorded != run => return false,
            // Also one that nobody recorded, and that spoke late: another would fight it over the sockets.
            State::Seeking { .. } | State::Down { .. } => {
                let known = matches!(self.state, State::Seeking { recorded: Some(_), .. });
                self.state = State::Up(Up {
                    process: run.process,
                    since: now,
                    instance: Some(run.instance),
                    conn: Some(conn),
                });
                !known
            }
            State::Up(up)
                if up.process == run.process && up.instance.is_none_or(|known| known == run.instance) =>
            {
                up.instance = Some(run.instance);
                up.conn = Some(conn);
                false
            }
            _ => return false,
        };
        if found_again {
            out.push(Output::Watch(run.process));
        }
        self.nbd = nbd;
        true
    }

    /// It says what is attached. False: an earlier connection of it does, or it is on its way out.
    pub(super) fn on_report(&mut self, conn: ConnId, clients: Vec<ClientReport>) -> bool {
        if self.conn() != Some(conn) {
            return false;
        }
        self.clients = ClientReport::first_that_fit(clients);
        true
    }

    pub(super) fn on_gone(&mut self, conn: ConnId) {
        if let State::Up(up) = &mut self.state
            && up.conn == Some(conn)
        {
            up.conn = None;
        }
    }

    /// A watched process ended. Returns its run if it was the exporter and had said hello: its sessions are to be
    /// declared dead.
    pub(super) fn on_exit(
        &mut self,
        now: Time,
        process: Process,
        out: &mut Vec<Output>,
    ) -> Option<ClientRun> {
        let run = match &mut self.state {
            State::Seeking { recorded: Some(recorded), .. } if recorded.process == process => {
                let run = *recorded;
                self.state = State::Down { restart_at: now };
                Some(run)
            }
            State::Up(up) if up.process == process => {
                let run = up.instance.map(|instance| ClientRun { instance, process });
                if now.since(up.since) >= HEALTHY_AFTER {
                    self.backoff = BACKOFF_MIN;
                    self.state = State::Down { restart_at: now };
                } else {
                    self.wait_before_restart(now);
                }
                run
            }
            State::Stopping { process: stopping, instance, askers } if *stopping == process => {
                let run = instance.map(|instance| ClientRun { instance, process });
                out.extend(askers.drain(..).map(|(conn, id)| Output::Send {
                    conn,
                    id,
                    message: FromAgent::Done,
                }));
                self.state = State::Stopped;
                run
            }
            _ => return None,
        };
        out.push(Output::Note(format!("exporter {} ended", process.pid)));
        self.clients.clear();
        self.nbd.clear();
        run
    }

    /// Ends it in an orderly way for good; `asker` is answered when it is gone.
    pub(super) fn stop(&mut self, asker: (ConnId, RequestId), out: &mut Vec<Output>) {
        let (process, instance) = match &mut self.state {
            State::Up(up) => (up.process, up.instance),
            State::Seeking { recorded: Some(run), .. } => (run.process, Some(run.instance)),
            State::Stopping { askers, .. } => return askers.push(asker),
            _ => {
                self.state = State::Stopped;
                return out.push(Output::Send { conn: asker.0, id: asker.1, message: FromAgent::Done });
            }
        };
        out.push(Output::Terminate(process));
        self.state = State::Stopping { process, instance, askers: vec![asker] };
    }

    /// Whether a report may be asked for, and where.
    pub(super) fn conn(&self) -> Option<ConnId> {
        match &self.state {
            State::Up(up) => up.conn,
            _ => None,
        }
    }

    /// Whether this is our exporter, and it has not said hello.
    pub(super) fn is_nameless(&self, process: Process) -> bool {
        matches!(&self.state, State::Up(up) if up.process == process && up.instance.is_none())
    }

    pub(super) fn process(&self) -> Option<Process> {
        match &self.state {
            State::Up(up) => Some(up.process),
            State::Stopping { process, .. } => Some(*process),
            State::Seeking { recorded, .. } => recorded.map(|run| run.process),
            _ => None,
        }
    }

    /// What a later life of the agent must know to find it again.
    pub(super) fn run(&self) -> Option<ClientRun> {
        match &self.state {
            State::Up(up) => up.instance.map(|instance| ClientRun { instance, process: up.process }),
            State::Stopping { process, instance, .. } => {
                instance.map(|instance| ClientRun { instance, process: *process })
            }
            State::Seeking { recorded, .. } => *recorded,
            _ => None,
        }
    }

    fn wait_before_restart(&mut self, now: Time) {
        self.state = State::Down { restart_at: now.after(self.backoff) };
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
    }
}
