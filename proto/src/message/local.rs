//! The conversation on an agent's unix socket: its server child, the exporters of the node, and the command line.
//!
//! One socket, three roles, told apart by the first message. A connected server socket travels beside
//! [`FromAgent::Connected`] as ancillary data (SCM_RIGHTS).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Family;
use crate::frame::Message;
use crate::ids::{InstanceId, Name, Target, Term};

/// What the value block of the server lock says, in postcard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerAddress {
    /// Node whose server it is.
    pub node: Name,
    /// Term under which it serves.
    pub term: Term,
    /// `host:port` (numeric) that every node reaches.
    pub tcp: String,
    /// Whether it answers yet.
    pub state: ServerState,
}

/// How far an anointed server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServerState {
    /// Taking over.
    Starting,
    /// Serving.
    Ready,
}

/// What an agent publishes of its node to the others, in postcard, as its lockd member description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// The agent.
    pub agent_pid: u32,
    /// Its server child, if it runs.
    pub server_pid: Option<u32>,
    /// Its exporter, if it runs.
    pub export_pid: Option<u32>,
    /// The higher, the rather its server is chosen; 0 is never chosen.
    pub priority: u32,
    /// Its standby follows the journal and could take over now.
    pub standby_ready: bool,
    /// URIs of the exporter.
    pub nbd: Vec<String>,
}

/// One attachment of an exporter, as it reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientReport {
    /// What is attached.
    pub target: Target,
    /// Messages sent and received by name, since the attachment.
    pub messages: BTreeMap<String, u64>,
    /// NBD connections that share it.
    pub connections: u32,
    /// Why it waits, if it does.
    pub waiting: Option<String>,
}

/// To the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// I am the server child (checked against the peer's process id). Its messages follow.
    ServerHello {
        /// Where I listen for clients.
        tcp: String,
    },
    /// The standby follows the journal, or has just stopped to.
    ServerStandby {
        /// Could take over now.
        ready: bool,
    },
    /// Sealed, gate open: serving.
    ServerServing {
        /// Under this term.
        term: Term,
    },
    /// The server has drained for a hand-over and exits.
    ServerDrained,
    /// Answer to [`FromAgent::Ping`].
    Pong,
    /// I am an exporter of this node. Sent first, and again after each reconnect.
    ExporterHello {
        /// This run of it.
        instance: InstanceId,
        /// Its process.
        pid: u32,
        /// What it listens on.
        nbd: Vec<String>,
    },
    /// What the exporter has open; sent when it changes and with each [`FromAgent::ReportPlease`].
    ExporterReport {
        /// All attachments.
        clients: Vec<ClientReport>,
    },
    /// A client needs a connected server socket. → [`FromAgent::Connected`], as soon as there is a server.
    NeedServer {
        /// Not this one: it broke or does not answer. 0 for no complaint.
        suspect: Term,
    },
    /// → [`FromAgent::Status`].
    Status,
    /// → [`FromAgent::Done`] or [`FromAgent::Failed`].
    SetPriority {
        /// Which node.
        node: Name,
        /// 0 for never; higher is rather.
        priority: u32,
    },
    /// Plan: the server moves to `node`. → [`FromAgent::Done`] once it serves there.
    MoveServer {
        /// Whereto.
        node: Name,
    },
    /// Where does the pool lie. → [`FromAgent::Pool`].
    Pool,
}

/// One node in an [`AgentStatus`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Name.
    pub node: Name,
    /// What it published.
    pub info: NodeInfo,
}

/// What an agent knows without a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The answering node.
    pub node: Name,
    /// Lockd as last heard of; absent when it cannot be reached.
    pub lockd: Option<LockdInfo>,
    /// Live members.
    pub nodes: Vec<NodeStatus>,
    /// Server lock as last seen, if somebody holds it.
    pub server: Option<ServerAddress>,
    /// Why nobody serves, if so.
    pub vacancy: Option<String>,
    /// Attachments of this node's exporter.
    pub clients: Vec<ClientReport>,
}

/// Lockd, as an agent sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockdInfo {
    /// Node of the leader.
    pub leader: Name,
    /// Every replica with its process.
    pub members: Vec<(Name, u32)>,
}

/// From the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromAgent {
    /// To the server child: you are anointed.
    Serve {
        /// Your term.
        term: Term,
    },
    /// To the server child: stop reading, drain, exit.
    Drain,
    /// To the server child: answer.
    Ping,
    /// To an exporter: send a report.
    ReportPlease,
    /// A connected socket to the server travels beside this.
    Connected {
        /// Node of the server.
        node: Name,
        /// Its term, as the value block says.
        term: Term,
    },
    /// Status.
    Status(Box<AgentStatus>),
    /// Where the pool lies on this node.
    Pool {
        /// Absolute path.
        path: String,
    },
    /// Done.
    Done,
    /// Not done, one line why.
    Failed {
        /// For people.
        reason: String,
    },
}

impl Message for ToAgent {
    const FAMILY: Family = Family::ToAgent;
}

impl Message for FromAgent {
    const FAMILY: Family = Family::FromAgent;
}
