//! What goes into an [`AgentCore`](super::AgentCore), and what comes out.

use std::time::Duration;

use csnap_lockd::client::{ClientInput, ClientOutput, Identity};
use csnap_proto::message::local::{FromAgent, ToAgent};
use csnap_proto::{Name, RequestId, Term};
use serde::{Deserialize, Serialize};

use super::{Dead, SavedState, Ticket};

/// A connection on the agent's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnId(pub u64);

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Process {
    /// Number.
    pub pid: u32,
    /// When it started, clock ticks since boot.
    pub started: u64,
}

/// Whether a better node gets the server back by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failback {
    /// Once it has been a ready standby for a while.
    Auto,
    /// Only by `csnap server move`.
    Manual,
}

/// Times that decide.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between pings of the child.
    pub ping_interval: Duration,
    /// A child that leaves a ping unanswered this long is killed.
    pub ping_timeout: Duration,
    /// At a vacancy a node waits this long for each one that ranks before it.
    pub place_step: Duration,
    /// A better node gets the server back after this long as a ready standby.
    pub failback_after: Duration,
}

/// What a core is made of.
#[derive(Debug)]
pub struct CoreConfig {
    /// This node.
    pub node: Name,
    /// Its process.
    pub pid: u32,
    /// Configured priority; one that an operator set later and that was saved goes before it.
    pub priority: u32,
    /// See [`Failback`].
    pub failback: Failback,
    /// See [`Timing`].
    pub timing: Timing,
    /// Absolute path of the pool, told to those who ask.
    pub pool: String,
}

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// Time passed; also the first input.
    Tick,
    /// About the connection to lockd.
    Lockd(ClientInput),
    /// Answer to [`Output::DrawIdentity`].
    Identity(Identity),
    /// Someone with the right to do so connected to the agent's socket.
    Accepted {
        /// From now on.
        conn: ConnId,
        /// The peer, as the kernel says.
        process: Process,
    },
    /// It said something.
    Received {
        /// Who.
        conn: ConnId,
        /// Its request.
        id: RequestId,
        /// What.
        message: ToAgent,
    },
    /// The connection is gone.
    Gone {
        /// Which.
        conn: ConnId,
    },
    /// Answer to [`Output::SpawnServer`].
    ServerSpawned(Result<Process, String>),
    /// Answer to [`Output::SpawnExporter`].
    ExporterSpawned(Result<Process, String>),
    /// A child was reaped, or a watched process is gone.
    Ended(Process),
    /// Answer to [`Output::ConnectServer`].
    ServerConnect {
        /// Which attempt.
        ticket: Ticket,
        /// The socket is there, kept under the ticket.
        made: bool,
    },
    /// Answer to [`Output::Probe`].
    Probed {
        /// Of the probe.
        term: Term,
        /// It answered in the name of that term.
        alive: bool,
    },
    /// Answer to [`Output::Declare`].
    Declared {
        /// Of the declaration.
        dead: Dead,
        /// The server knows it now.
        done: bool,
    },
    /// End in an orderly way.
    Stop,
}

/// What is to be done, in order.
#[derive(Debug, PartialEq)]
pub enum Output {
    /// To the connection to lockd; never a `ClientOutput::Event`.
    Lockd(ClientOutput),
    /// Draw a session id and a secret.
    DrawIdentity,
    /// Send a message.
    Send {
        /// Whom.
        conn: ConnId,
        /// Of the request that it answers; 0 for none.
        id: RequestId,
        /// What.
        message: FromAgent,
    },
    /// Close a connection.
    Close {
        /// Which.
        conn: ConnId,
        /// For the log.
        reason: &'static str,
    },
    /// Start the server child; answered in the same turn.
    SpawnServer,
    /// Start the exporter; answered in the same turn.
    SpawnExporter,
    /// SIGKILL, and [`Input::Ended`] when it is gone.
    Kill(Process),
    /// SIGTERM, and [`Input::Ended`] when it is gone.
    Terminate(Process),
    /// [`Input::Ended`] when it is gone.
    Watch(Process),
    /// Connect to a server.
    ConnectServer {
        /// Name of the attempt.
        ticket: Ticket,
        /// Numeric address.
        tcp: String,
    },
    /// Send `message` with the socket of `ticket` beside it.
    HandOut {
        /// Which socket.
        ticket: Ticket,
        /// Whom.
        conn: ConnId,
        /// Of the request.
        id: RequestId,
        /// What is said beside the socket.
        message: FromAgent,
    },
    /// Close the socket of `ticket`.
    DropSocket {
        /// Which.
        ticket: Ticket,
    },
    /// Ask the server at `tcp` for an answer in the name of `term`.
    Probe {
        /// Numeric address.
        tcp: String,
        /// Expected.
        term: Term,
    },
    /// Make sure that the last I/O of the dead is gone, and tell the server at `tcp`.
    Declare {
        /// Who.
        dead: Dead,
        /// Numeric address of the server.
        tcp: String,
    },
    /// Remember this for a later life of the agent.
    Save(SavedState),
    /// The orderly end is reached.
    Stopped,
    /// For the log.
    Note(String),
}

impl Output {
    /// An unasked message.
    pub(super) fn tell(conn: ConnId, message: FromAgent) -> Self {
        Self::Send { conn, id: RequestId(0), message }
    }
}
