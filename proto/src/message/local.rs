//! The conversation on an agent's unix socket: its server child, the exporters of the node, and the command line.
//!
//! One socket, three roles, told apart by the first message. A connected server socket travels beside
//! [`FromAgent::Connected`] as ancillary data (SCM_RIGHTS).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Family;
use crate::frame::Message;
use crate::ids::{InstanceId, Name, Target, Term};
use crate::limits::{
    CLIENTS_PER_REPORT_MAX, MESSAGE_COUNTERS_MAX, NAME_BYTES_MAX, PATH_BYTES_MAX, REPORT_BYTES_MAX,
    SERVER_ADDRESS_BYTES_MAX, WAITING_BYTES_MAX,
};

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
    /// Gone by plan: `node` is whose turn it is first. Everybody else waits a step longer, and then goes ahead without
    /// it, so that a target which died meanwhile costs that step and nothing else.
    Handover {
        /// An operator chose the node: nodes that are better already do not get the server back for that alone.
        pinned: bool,
    },
}

/// Most wishes that one node publishes at once: one operator's request each.
pub const WISHES_MAX: usize = 4;

/// What an operator asked one agent for and another must do. Published in [`NodeInfo`] until it is seen done or given
/// up, so that every agent sees it through lockd, without a connection between agents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// Tells it from an earlier wish of the same session; grows.
    pub number: u64,
    /// What is wanted.
    pub what: WishKind,
}

/// Kinds of [`Wish`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WishKind {
    /// To the agent whose server serves: hand it over to `node`.
    MoveServer {
        /// Whereto.
        node: Name,
    },
    /// To `node`'s agent: this is your priority from now on.
    SetPriority {
        /// Which node.
        node: Name,
        /// Its priority.
        priority: u32,
    },
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
    /// Its standby follows the journal and could take over now. False while its server serves: a vacancy then is
    /// its own, and nobody waits for it.
    pub standby_ready: bool,
    /// How its last takeovers failed, until it has served; for people. While it is set the other nodes go before it.
    pub trouble: Option<String>,
    /// URIs of the exporter.
    pub nbd: Vec<String>,
    /// What its operators asked for, at most [`WISHES_MAX`].
    pub wishes: Vec<Wish>,
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

impl ClientReport {
    /// The first ones, as many as one report has room for: at most [`CLIENTS_PER_REPORT_MAX`], and [`REPORT_BYTES_MAX`].
    pub fn first_that_fit(clients: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let mut room = REPORT_BYTES_MAX;
        let fits = |client: &Self| {
            let bytes = postcard::experimental::serialized_size(client).unwrap_or(usize::MAX);
            let left = room.checked_sub(bytes);
            room = left.unwrap_or(0);
            left.is_some()
        };
        clients.into_iter().take(CLIENTS_PER_REPORT_MAX).take_while(fits).collect()
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.messages.len() > MESSAGE_COUNTERS_MAX {
            Err("number of counters")
        } else if self.messages.keys().any(|name| name.len() > NAME_BYTES_MAX) {
            Err("length of a counter's name")
        } else if self.waiting.as_ref().is_some_and(|why| why.len() > WAITING_BYTES_MAX) {
            Err("length of a reason")
        } else {
            Ok(())
        }
    }
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
        /// All attachments, or the first ones ([`ClientReport::first_that_fit`]).
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
    /// I am a process that writes volumes itself, for a while (an import): when it ends, declare this run of it dead. →
    /// [`FromAgent::Done`] once its end cannot be missed.
    WriterHello {
        /// This run of it.
        instance: InstanceId,
    },
    /// End the node's exporter in an orderly way and do not start another. → [`FromAgent::Done`] once it is gone.
    StopExporter,
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
    /// To exporters, unasked: a server serves under `term`. A connection to an older one is of no more use, even if
    /// it has not broken (its node may be gone without a word): ask again with the older term as suspect.
    ServerReady {
        /// Of the server that serves.
        term: Term,
    },
}

/// Longest `host:port` or URI in these messages, bytes: a unix socket's URI carries a path.
pub const ADDRESS_BYTES_MAX: usize = PATH_BYTES_MAX + 64;

/// Most addresses that an exporter says it listens on.
pub const ADDRESSES_MAX: usize = 16;

impl Message for ToAgent {
    const FAMILY: Family = Family::ToAgent;

    fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::ServerHello { tcp } if tcp.len() > SERVER_ADDRESS_BYTES_MAX => Err("length of an address"),
            Self::ExporterHello { nbd, .. } if nbd.len() > ADDRESSES_MAX => Err("number of addresses"),
            Self::ExporterHello { nbd, .. } if nbd.iter().any(|uri| uri.len() > ADDRESS_BYTES_MAX) => {
                Err("length of an address")
            }
            Self::ExporterReport { clients } if clients.len() > CLIENTS_PER_REPORT_MAX => {
                Err("number of attachments")
            }
            Self::ExporterReport { clients } => clients.iter().try_for_each(ClientReport::check),
            _ => Ok(()),
        }
    }
}

impl Message for FromAgent {
    const FAMILY: Family = Family::FromAgent;
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::*;
    use crate::frame::{Frame, encode};
    use crate::ids::RequestId;
    use crate::limits::FRAME_BYTES_MAX;

    #[test]
    fn a_report_beyond_its_limits_is_refused() {
        let name = Name::new("demo").expect("a name");
        let client = ClientReport {
            target: Target { volume: name, snapshot: None },
            messages: BTreeMap::new(),
            connections: 1,
            waiting: None,
        };
        let report = |clients| ToAgent::ExporterReport { clients }.check();
        assert_eq!(report(vec![client.clone(); CLIENTS_PER_REPORT_MAX]), Ok(()));
        assert!(report(vec![client.clone(); CLIENTS_PER_REPORT_MAX + 1]).is_err());
        let counters = |count| (0..count).map(|n| (n.to_string(), 0)).collect();
        let counted = |count| report(vec![ClientReport { messages: counters(count), ..client.clone() }]);
        assert_eq!(counted(MESSAGE_COUNTERS_MAX), Ok(()));
        assert!(counted(MESSAGE_COUNTERS_MAX + 1).is_err());
        let named = |len| BTreeMap::from([("x".repeat(len), 0)]);
        assert!(
            report(vec![ClientReport { messages: named(NAME_BYTES_MAX + 1), ..client.clone() }]).is_err()
        );
        let waits = |len| report(vec![ClientReport { waiting: Some("x".repeat(len)), ..client.clone() }]);
        assert_eq!(waits(WAITING_BYTES_MAX), Ok(()));
        assert!(waits(WAITING_BYTES_MAX + 1).is_err());
    }

    #[test]
    fn what_is_reported_fits_a_frame_whatever_is_attached() {
        let name = |n: usize| Name::new(format!("{n:0128}")).expect("a name");
        let client = |counters, waiting| {
            move |n| ClientReport {
                target: Target { volume: name(n), snapshot: Some(name(n)) },
                messages: (0..counters).map(|n: usize| (format!("{n:0128}"), u64::MAX)).collect(),
                connections: u32::MAX,
                waiting: Some("x".repeat(waiting)),
            }
        };
        let reported = |clients: Vec<ClientReport>| {
            let message = ToAgent::ExporterReport { clients: ClientReport::first_that_fit(clients) };
            let mut bytes = BytesMut::new();
            encode(&Frame { id: RequestId(0), term: Term(0), message: message.clone() }, &mut bytes);
            let ToAgent::ExporterReport { clients } = message else { unreachable!("made above") };
            (clients.len(), bytes.len())
        };
        let many = CLIENTS_PER_REPORT_MAX + 1;
        let (count, bytes) =
            reported((0..many).map(client(MESSAGE_COUNTERS_MAX, WAITING_BYTES_MAX)).collect());
        assert!(count > 0 && bytes < FRAME_BYTES_MAX, "{count} attachments, {bytes} bytes");
        let (count, _) = reported((0..many).map(client(1, 1)).collect());
        assert_eq!(count, CLIENTS_PER_REPORT_MAX);
    }
}
