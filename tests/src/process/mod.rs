//! The processes of the simulated world: shells around the cores and procedures that ship. A shell here does what the real
//! one does, and nothing more: it moves events, carries outputs out in order, and dies when it is killed.

pub mod agent;
pub mod contender;
pub mod exporter;
pub mod holder;
pub mod lockd;
pub mod operator;
pub mod register;
pub mod server;
pub mod session;

use csnap_proto::Time;

use crate::sim::{Event, HostId, ProcId, Sim};

/// A running process.
pub enum Process {
    /// A node's agent.
    Agent(Box<agent::AgentProc>),
    /// A server: standing by, taking over or serving.
    Server(Box<server::ServerProc>),
    /// A node's exporter.
    Exporter(Box<exporter::ExporterProc>),
    /// The lock manager.
    Lockd(Box<lockd::LockdProc>),
    /// A command of an operator.
    Operator(Box<operator::OperatorProc>),
    /// A client of locks and keys.
    Contender(Box<contender::ContenderProc>),
    /// A client of the fenced register.
    Holder(Box<holder::HolderProc>),
    /// The fenced register.
    Register(Box<register::RegisterProc>),
}

impl Process {
    /// Starts what was ordered.
    pub fn start(sim: &mut Sim, id: ProcId, host: HostId, what: &crate::sim::Spawn) -> Self {
        use crate::sim::Spawn;
        match what {
            Spawn::Agent => Self::Agent(Box::new(agent::AgentProc::start(sim, id, host))),
            Spawn::Server { agent } => {
                Self::Server(Box::new(server::ServerProc::start(sim, id, host, *agent)))
            }
            Spawn::Exporter => Self::Exporter(Box::new(exporter::ExporterProc::start(sim, id, host))),
            Spawn::Lockd => Self::Lockd(Box::new(lockd::LockdProc::start(sim, id, host))),
            Spawn::Operator => Self::Operator(Box::new(operator::OperatorProc::start(sim, id, host))),
            Spawn::Contender => Self::Contender(Box::new(contender::ContenderProc::start(sim, id, host))),
            Spawn::Holder => Self::Holder(Box::new(holder::HolderProc::start(sim, id, host))),
            Spawn::Register => Self::Register(Box::new(register::RegisterProc::start(id, host))),
        }
    }

    /// Takes an event in.
    pub fn on_event(&mut self, sim: &mut Sim, event: Event) {
        match self {
            Self::Agent(process) => process.on_event(sim, event),
            Self::Server(process) => process.on_event(sim, event),
            Self::Exporter(process) => process.on_event(sim, event),
            Self::Lockd(process) => process.on_event(sim, event),
            Self::Operator(process) => process.on_event(sim, event),
            Self::Contender(process) => process.on_event(sim, event),
            Self::Holder(process) => process.on_event(sim, event),
            Self::Register(process) => process.on_event(sim, event),
        }
    }

    /// When it wants a tick, by its host's clock.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        match self {
            Self::Agent(process) => process.deadline(),
            Self::Server(process) => process.deadline(),
            Self::Exporter(process) => process.deadline(),
            Self::Lockd(process) => process.deadline(),
            Self::Operator(process) => process.deadline(),
            Self::Contender(process) => process.deadline(),
            Self::Holder(process) => process.deadline(),
            Self::Register(_) => None,
        }
    }

    /// What it is, for people.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Agent(_) => "agent",
            Self::Server(_) => "server",
            Self::Exporter(_) => "exporter",
            Self::Lockd(_) => "lockd",
            Self::Operator(_) => "operator",
            Self::Contender(_) => "contender",
            Self::Holder(_) => "holder",
            Self::Register(_) => "register",
        }
    }
}
