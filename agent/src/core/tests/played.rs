//! The played processes of a node: its server child, its exporter, and whoever asks its agent something.

use std::time::Duration;

use csnap_proto::message::local::{FromAgent, ToAgent};
use csnap_proto::{InstanceId, RequestId, Term};

use super::super::{ConnId, Input, Output, Process};
use super::world::{Event, NET, World};

/// One way between processes of a node, and the time a played process thinks.
const LOCAL: Duration = Duration::from_micros(50);
/// From the start of a process to its first word.
const START: Duration = Duration::from_millis(2);
/// A takeover.
const TAKEOVER: Duration = Duration::from_millis(3);

/// A played server.
#[derive(Clone, Debug)]
pub(super) struct PlayedServer {
    pub(super) process: Process,
    conn: ConnId,
    pub(super) frozen: bool,
    pub(super) serving: Option<Term>,
}

/// What comes of the takeovers of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takeovers {
    Work,
    /// The server ends.
    Fail,
    /// It answers pings and never serves.
    Hang,
    /// It serves after so long.
    Last(Duration),
}

/// What a played server does next.
#[derive(Clone, Copy)]
pub(super) enum ChildStep {
    Hello,
    Follow,
    Serve(Term),
    Drained,
    Exit,
}

fn address(process: Process) -> String {
    format!("127.0.0.1:{}", process.pid)
}

impl World {
    pub(super) fn carry_out(&mut self, n: usize, output: Output) {
        match output {
            Output::Lockd(output) => self.client_output(n, output),
            Output::DrawIdentity => {
                let identity = self.draw(n);
                self.agent(n, Duration::ZERO, Input::Identity(identity));
            }
            Output::Send { conn, id, message } => self.deliver(n, conn, id, message),
            Output::Close { conn, .. } => self.nodes[n].closed.push(conn),
            Output::SpawnServer => self.spawn_server(n),
            Output::SpawnExporter => {
                let process = self.process();
                self.nodes[n].exporter = Some(process);
                self.nodes[n].exporters_started += 1;
                self.step(n, Input::ExporterSpawned(Ok(process)));
                self.exporter_hello(n, process);
            }
            Output::Kill(process) | Output::Terminate(process) => self.end(n, process),
            // The hello of a process may be read after its end: whoever watches it then is told so.
            Output::Watch(process) if self.ended.contains(&process) => {
                self.agent(n, LOCAL, Input::Ended(process));
            }
            Output::Watch(_) | Output::DropSocket { .. } | Output::Note(_) => {}
            Output::ConnectServer { ticket, tcp } => {
                let made = self.server_at(&tcp).is_some();
                self.agent(n, NET, Input::ServerConnect { ticket, made });
            }
            Output::HandOut { conn, message, .. } => {
                let FromAgent::Connected { term, .. } = message else { panic!("sockets go with Connected") };
                self.nodes[n].handed_out.push((conn, term));
            }
            Output::Probe { tcp, term } => {
                self.nodes[n].probes += 1;
                let alive =
                    self.server_at(&tcp).is_some_and(|child| !child.frozen && child.serving == Some(term));
                self.agent(n, NET, Input::Probed { term, alive });
            }
            Output::Declare { dead, tcp } => {
                let done = self.server_at(&tcp).is_some_and(|child| child.serving.is_some() && !child.frozen);
                if done {
                    self.nodes[n].declared.push(dead);
                }
                self.agent(n, NET, Input::Declared { dead, done });
            }
            Output::Save(state) => self.nodes[n].saved = Some(state),
            Output::Stopped => self.nodes[n].stopped = true,
        }
    }

    fn process(&mut self) -> Process {
        self.last_pid += 1;
        Process { pid: self.last_pid, started: self.now.0 }
    }

    /// Somebody connects to the agent of `n`.
    pub(super) fn connect(&mut self, n: usize, process: Process) -> ConnId {
        self.nodes[n].next_conn += 1;
        let conn = ConnId(self.nodes[n].next_conn);
        self.step(n, Input::Accepted { conn, process });
        conn
    }

    /// A guest with a question.
    pub(super) fn ask(&mut self, n: usize, message: ToAgent) -> ConnId {
        let process = self.process();
        let conn = self.connect(n, process);
        self.step(n, Input::Received { conn, id: RequestId(7), message });
        conn
    }

    pub(super) fn answers(&self, n: usize, conn: ConnId) -> Vec<&FromAgent> {
        self.nodes[n].told.iter().filter(|(to, ..)| *to == conn).map(|(_, _, message)| message).collect()
    }

    pub(super) fn exporter_hello(&mut self, n: usize, process: Process) {
        let conn = self.connect(n, process);
        let instance = InstanceId([u8::try_from(process.pid % 251).expect("below"); 16]);
        let message = ToAgent::ExporterHello { instance, pid: process.pid, nbd: vec!["nbd://x".to_owned()] };
        self.agent(n, START, Input::Received { conn, id: RequestId(0), message });
    }

    fn spawn_server(&mut self, n: usize) {
        let process = self.process();
        self.nodes[n].servers_started += 1;
        self.nodes[n].child = Some(PlayedServer { process, conn: ConnId(0), frozen: false, serving: None });
        self.step(n, Input::ServerSpawned(Ok(process)));
        self.push(START, Event::Child(n, process, ChildStep::Hello));
    }

    /// The server of `n` never gets ready.
    pub(super) fn never_gets_ready(&mut self, n: usize) {
        self.nodes[n].child.as_mut().expect("it was started").frozen = true;
    }

    fn server_at(&self, tcp: &str) -> Option<&PlayedServer> {
        self.nodes.iter().filter_map(|node| node.child.as_ref()).find(|child| tcp == address(child.process))
    }

    /// A process ends, killed or not.
    pub(super) fn end(&mut self, n: usize, process: Process) {
        if let Some(child) = self.nodes[n].child.take_if(|child| child.process == process)
            && child.conn != ConnId(0)
        {
            self.agent(n, LOCAL, Input::Gone { conn: child.conn });
        }
        self.nodes[n].exporter.take_if(|exporter| *exporter == process);
        self.ended.insert(process);
        self.agent(n, LOCAL, Input::Ended(process));
    }

    /// The connection on which the child of `n` said hello, or will.
    pub(super) fn server_conn(&self, n: usize) -> ConnId {
        self.nodes[n].child.as_ref().map_or(ConnId(0), |child| child.conn)
    }

    pub(super) fn kill_server(&mut self, n: usize) {
        if let Some(process) = self.nodes[n].child.as_ref().map(|child| child.process) {
            self.end(n, process);
        }
    }

    pub(super) fn child_step(&mut self, n: usize, process: Process, step: ChildStep) {
        let Some(child) = self.nodes[n].child.as_ref().filter(|child| child.process == process) else {
            return;
        };
        if child.frozen {
            return;
        }
        let say = |world: &mut Self, message| {
            let conn = world.nodes[n].child.as_ref().expect("checked above").conn;
            world.agent(n, LOCAL, Input::Received { conn, id: RequestId(0), message });
        };
        match step {
            ChildStep::Hello => {
                let conn = self.connect(n, process);
                self.nodes[n].child.as_mut().expect("checked above").conn = conn;
                say(self, ToAgent::ServerHello { tcp: address(process) });
                self.push(START, Event::Child(n, process, ChildStep::Follow));
            }
            ChildStep::Follow if self.nodes[n].starts_fail => self.end(n, process),
            ChildStep::Follow => say(self, ToAgent::ServerStandby { ready: true }),
            ChildStep::Serve(term) => {
                self.nodes[n].child.as_mut().expect("checked above").serving = Some(term);
                say(self, ToAgent::ServerServing { term });
            }
            ChildStep::Drained => {
                self.nodes[n].child.as_mut().expect("checked above").serving = None;
                say(self, ToAgent::ServerDrained);
                self.push(LOCAL, Event::Child(n, process, ChildStep::Exit));
            }
            ChildStep::Exit => self.end(n, process),
        }
    }

    /// What the agent says reaches whom it is for.
    fn deliver(&mut self, n: usize, conn: ConnId, id: RequestId, message: FromAgent) {
        let child = self.nodes[n].child.clone().filter(|child| child.conn == conn);
        match (child, message) {
            (Some(child), FromAgent::Ping) if !child.frozen => {
                self.agent(n, LOCAL, Input::Received { conn, id, message: ToAgent::Pong });
            }
            (Some(child), FromAgent::Serve { term }) => {
                assert!(self.anointed.iter().all(|(older, _)| *older < term), "terms only grow");
                self.anointed.push((term, n));
                match self.nodes[n].takeovers {
                    Takeovers::Work => {
                        self.push(TAKEOVER, Event::Child(n, child.process, ChildStep::Serve(term)))
                    }
                    Takeovers::Fail => self.push(TAKEOVER, Event::Child(n, child.process, ChildStep::Exit)),
                    Takeovers::Last(long) => {
                        self.push(long, Event::Child(n, child.process, ChildStep::Serve(term)));
                    }
                    Takeovers::Hang => {}
                }
            }
            (Some(child), FromAgent::Drain) => {
                self.push(LOCAL, Event::Child(n, child.process, ChildStep::Drained));
            }
            (_, FromAgent::Ping) => {}
            (_, message) => self.nodes[n].told.push((conn, id, message)),
        }
    }
}
