//! What is said on the agent's socket, by role: the server child, exporters, and guests (clients that need a server,
//! the command line).
//!
//! The role is taken with the first hello and kept. Whoever speaks out of its role is cut off: it is not the program
//! that it says it is.

use std::time::Duration;

use csnap_proto::message::local::{
    AgentStatus, FromAgent, NodeInfo, NodeStatus, ServerAddress, ServerState, ToAgent, WishKind,
};
use csnap_proto::{Name, RequestId, Term, Time};

use super::{AgentCore, ClientRun, ConnId, Output, Process};

/// A status waits this long for a fresh report of the exporter: well below the 100 ms in which an agent answers.
const REPORT_WITHIN: Duration = Duration::from_millis(40);

/// Most questions for a status that wait at once.
const STATUSES_MAX: usize = 1024;

/// Why an exporter has to wait for its first answer.
const NAMELESS: &str = "the exporter has not introduced itself to its agent yet";

/// Why an exporter is refused.
const ANOTHER_RUNS: &str = "another exporter of this node runs already; stop one of them";

/// Most refused exporters that are known as such: far beyond any number that somebody starts by mistake.
const REFUSED_MAX: usize = 1024;

/// Who speaks on a connection.
#[derive(Debug)]
pub(super) struct Peer {
    process: Process,
    role: Role,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Guest,
    Server,
    Exporter,
}

impl AgentCore {
    pub(super) fn on_accepted(&mut self, conn: ConnId, process: Process) {
        self.peers.insert(conn, Peer { process, role: Role::Guest });
    }

    pub(super) fn on_gone(&mut self, conn: ConnId, out: &mut Vec<Output>) {
        let role = self.peers.remove(&conn).map(|peer| peer.role);
        match role {
            Some(Role::Server) if self.child.conn() == Some(conn) => {
                out.push(Output::Note("our server's connection is gone".to_owned()));
                self.child.on_gone(out);
            }
            Some(Role::Exporter) => self.exporter.on_gone(conn),
            _ => {}
        }
        self.seekers.on_gone(conn);
        self.wishes.on_gone(conn);
        self.statuses.retain(|(asker, _)| *asker != conn);
    }

    pub(super) fn on_message(
        &mut self,
        now: Time,
        conn: ConnId,
        id: RequestId,
        message: ToAgent,
        out: &mut Vec<Output>,
    ) {
        let Some(peer) = self.peers.get(&conn) else { return };
        match (peer.role, message) {
            (Role::Guest, ToAgent::ServerHello { tcp }) => self.on_server_hello(conn, tcp, out),
            // Last words of an earlier child.
            (Role::Server, _) if self.child.conn() != Some(conn) => {}
            (Role::Server, ToAgent::ServerStandby { ready }) => self.child.on_standby(ready),
            (Role::Server, ToAgent::ServerServing { term }) => self.child.on_serving(term),
            (Role::Server, ToAgent::ServerDrained) => self.child.on_drained(),
            (Role::Server, ToAgent::Pong) => self.child.on_pong(),
            (Role::Guest | Role::Exporter, ToAgent::ExporterHello { instance, pid: _, nbd }) => {
                let run = ClientRun { instance, process: peer.process };
                self.on_exporter_hello(now, conn, run, nbd, out);
            }
            (Role::Exporter, ToAgent::ExporterReport { clients }) => {
                if self.exporter.on_report(conn, clients) {
                    self.statuses_until = now;
                }
            }
            (_, ToAgent::NeedServer { .. }) if self.refused.contains(&peer.process) => {
                let message = FromAgent::Failed { reason: ANOTHER_RUNS.into() };
                out.push(Output::Send { conn, id, message });
            }
            // Were it to die now, nobody would know what to declare.
            (_, ToAgent::NeedServer { .. }) if self.exporter.is_nameless(peer.process) => {
                let message = FromAgent::Failed { reason: NAMELESS.into() };
                out.push(Output::Send { conn, id, message });
            }
            (_, ToAgent::NeedServer { suspect }) => {
                if suspect != Term(0) && self.child.serving_term() == Some(suspect) {
                    self.child.ping_now(now);
                }
                self.seekers.add(now, conn, id, suspect, out);
            }
            (_, ToAgent::Status) => self.on_status(now, conn, id, out),
            (_, ToAgent::SetPriority { node, priority }) => {
                self.on_wish(now, WishKind::SetPriority { node, priority }, conn, id, out);
            }
            (_, ToAgent::MoveServer { node }) => {
                self.on_wish(now, WishKind::MoveServer { node }, conn, id, out);
            }
            (_, ToAgent::Pool) => {
                let path = self.config.pool.clone();
                out.push(Output::Send { conn, id, message: FromAgent::Pool { path } });
            }
            (_, ToAgent::WriterHello { instance }) => {
                let run = ClientRun { instance, process: peer.process };
                let message = if self.reaping.expect_writer(run) {
                    out.push(Output::Watch(run.process));
                    FromAgent::Done
                } else {
                    FromAgent::Failed { reason: "too many imports run on this node".to_owned() }
                };
                out.push(Output::Send { conn, id, message });
            }
            (_, ToAgent::StopExporter) => self.exporter.stop((conn, id), out),
            (_, _) => out.push(Output::Close { conn, reason: "it spoke out of its role" }),
        }
    }

    fn on_server_hello(&mut self, conn: ConnId, tcp: String, out: &mut Vec<Output>) {
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        if self.child.on_hello(conn, peer.process, tcp) {
            peer.role = Role::Server;
        } else {
            out.push(Output::Close { conn, reason: "it says that it is our server, and is not our child" });
        }
    }

    fn on_exporter_hello(
        &mut self,
        now: Time,
        conn: ConnId,
        run: ClientRun,
        nbd: Vec<String>,
        out: &mut Vec<Output>,
    ) {
        if !self.exporter.on_hello(now, conn, run, nbd, out) {
            self.refuse_exporter(conn, run, out);
            return;
        }
        self.refused.remove(&run.process);
        if let Some(peer) = self.peers.get_mut(&conn) {
            peer.role = Role::Exporter;
        }
        if let Some(known) = &self.known {
            out.push(Output::tell(conn, FromAgent::ServerReady { term: known.term }));
        }
    }

    /// An exporter beside the one that we know goes without a way to the server, on all its connections. It may have got
    /// one before it said what it is, so its end is watched for and declared as a writer's.
    fn refuse_exporter(&mut self, conn: ConnId, run: ClientRun, out: &mut Vec<Output>) {
        out.push(Output::Close { conn, reason: ANOTHER_RUNS });
        if self.exporter.process() == Some(run.process) {
            return;
        }
        self.reaping.expect_writer(run);
        out.push(Output::Watch(run.process));
        self.refused.insert(run.process);
        if self.refused.len() > REFUSED_MAX {
            self.refused.pop_first();
        }
        let its = |(conn, peer): (&ConnId, &Peer)| (peer.process == run.process).then_some(*conn);
        for conn in self.peers.iter().filter_map(its) {
            self.seekers.refuse(conn, ANOTHER_RUNS, out);
        }
    }

    fn on_wish(&mut self, now: Time, what: WishKind, conn: ConnId, id: RequestId, out: &mut Vec<Output>) {
        let refused = self.why_refused(&what).or_else(|| {
            let taken = self.wishes.ask(now, what, conn, id);
            (!taken).then(|| "too many such requests wait on this node; try again in some seconds".to_owned())
        });
        if let Some(reason) = refused {
            out.push(Output::Send { conn, id, message: FromAgent::Failed { reason } });
        }
    }

    /// Why a wish cannot come true, as far as is known at once.
    fn why_refused(&self, what: &WishKind) -> Option<String> {
        let (WishKind::MoveServer { node } | WishKind::SetPriority { node, .. }) = what;
        if *node == self.config.node {
            return match what {
                WishKind::MoveServer { .. } if self.priority == 0 => Some(never_serves(node)),
                _ => None,
            };
        }
        if !self.client.is_open() || !self.members.known {
            return Some(format!("node {node} cannot be reached: lockd does not answer; see csnap status"));
        }
        let Some(peer) = self.members.find(node) else {
            return Some(format!("node {node} is not up; csnap node list shows the nodes"));
        };
        let moves = matches!(what, WishKind::MoveServer { .. });
        (moves && peer.info.priority == 0).then(|| never_serves(node))
    }

    /// Why a wish did not come true in time.
    pub(super) fn why_not(&self, what: &WishKind) -> String {
        let server = match &self.known {
            Some(known) => format!("the server is on {}", known.node),
            None => self.vacancy().unwrap_or_else(|| "no server is known".to_owned()),
        };
        match what {
            WishKind::MoveServer { node } => {
                format!("the server did not move to {node} in time; {server}; see that node's log")
            }
            WishKind::SetPriority { node, .. } => {
                format!("node {node} did not take its new priority in time; see its agent's log")
            }
        }
    }

    fn on_status(&mut self, now: Time, conn: ConnId, id: RequestId, out: &mut Vec<Output>) {
        if self.statuses.len() >= STATUSES_MAX {
            out.push(Output::Close { conn, reason: "too many ask for a status" });
            return;
        }
        match self.exporter.conn() {
            Some(exporter) if self.statuses.is_empty() => {
                out.push(Output::tell(exporter, FromAgent::ReportPlease));
                self.statuses_until = now.after(REPORT_WITHIN);
            }
            Some(_) => {}
            None => self.statuses_until = now,
        }
        self.statuses.push((conn, id));
    }

    pub(super) fn answer_statuses(&mut self, now: Time, out: &mut Vec<Output>) {
        if now < self.statuses_until || self.statuses.is_empty() {
            return;
        }
        let status = self.status();
        out.extend(self.statuses.drain(..).map(|(conn, id)| {
            let message = FromAgent::Status(Box::new(status.clone()));
            Output::Send { conn, id, message }
        }));
    }

    /// What this agent knows.
    #[must_use]
    pub fn status(&self) -> AgentStatus {
        let me = NodeStatus { node: self.config.node.clone(), info: self.node_info() };
        // What is published as ready and not known is the word of one that died here: the lock is on its way back.
        let starting = |server: &ServerAddress| server.state == ServerState::Starting;
        let server = self.known.clone().or_else(|| self.anointing.published().filter(starting));
        let serves = server.as_ref().is_some_and(|server| server.state == ServerState::Ready);
        AgentStatus {
            node: self.config.node.clone(),
            lockd: self.lockd.clone(),
            nodes: std::iter::once(me).chain(self.members.statuses()).collect(),
            server,
            vacancy: if serves { None } else { self.vacancy() },
            clients: self.exporter.clients.clone(),
        }
    }

    /// Why nobody serves.
    fn vacancy(&self) -> Option<String> {
        let me: (&Name, NodeInfo) = (&self.config.node, self.node_info());
        Some(if !self.anointing.has_looked() {
            "lockd does not answer, so no server can be chosen".to_owned()
        } else if !self.anointing.is_vacant() {
            "a server is starting".to_owned()
        } else if self.priority == 0 && !self.members.any_ready() {
            format!("{} has priority 0 and never serves, and no other node is ready", me.0)
        } else if !me.1.standby_ready && !self.members.any_ready() {
            let why = me.1.trouble.as_deref().unwrap_or(self.child.why_not_ready());
            format!("no node is ready to serve; on {}: {why}", me.0)
        } else {
            "the next server is being chosen".to_owned()
        })
    }
}

fn never_serves(node: &Name) -> String {
    format!("node {node} has priority 0 and never serves; csnap node priority {node} N lets it")
}
