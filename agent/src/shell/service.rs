//! The lock service that the configuration names: lockd, or an etcd that plays it (feature `etcd`).

use std::net::SocketAddr;

use csnap_lockd::client::Lockds;
use csnap_proto::message::lock::ToLockd;
use csnap_proto::{Caller, Frame, Role, Time};
use csnap_transport::Tls;

use super::{Events, lockd};
use crate::config::NodeConfig;
use crate::core::Input;

/// At most one connection at a time, made, fed and dropped as lockd's client says.
pub(super) enum Service {
    Lockd(lockd::Link),
    #[cfg(feature = "etcd")]
    Etcd(Box<super::etcd::Link>),
}

impl Service {
    pub(super) fn new(config: &NodeConfig, events: Events) -> anyhow::Result<Self> {
        match &config.etcd {
            None => Ok(Self::Lockd(lockd::Link::new(lockds(config)?, events))),
            #[cfg(feature = "etcd")]
            Some(etcd) => Ok(Self::Etcd(Box::new(super::etcd::Link::new(etcd, &config.pool, events)))),
            #[cfg(not(feature = "etcd"))]
            Some(_) => anyhow::bail!(
                "this csnap was built without etcd; build it with --features etcd, or give `lockd` addresses in place of [etcd]"
            ),
        }
    }

    /// `hint`: the address of the lockd that is said to lead; members of etcd pass on to theirs.
    pub(super) fn connect(&mut self, attempt: u64, hint: Option<SocketAddr>) {
        match self {
            Self::Lockd(link) => link.connect(attempt, hint),
            #[cfg(feature = "etcd")]
            Self::Etcd(link) => link.connect(attempt),
        }
    }

    pub(super) fn disconnect(&mut self, attempt: u64) {
        match self {
            Self::Lockd(link) => link.disconnect(attempt),
            #[cfg(feature = "etcd")]
            Self::Etcd(link) => link.disconnect(attempt),
        }
    }

    /// False when the connection is not there any more, or does not take it.
    pub(super) fn send(&mut self, attempt: u64, frame: Frame<ToLockd>) -> bool {
        match self {
            Self::Lockd(link) => link.send(attempt, &frame),
            #[cfg(feature = "etcd")]
            Self::Etcd(link) => link.send(attempt, frame),
        }
    }

    /// The lock service goes on at these lockds, as it said itself.
    pub(super) fn move_to(&mut self, addresses: Vec<SocketAddr>) {
        match self {
            Self::Lockd(link) => link.move_to(addresses),
            #[cfg(feature = "etcd")]
            Self::Etcd(_) => unreachable!("etcd moves nothing, and not to {addresses:?}"),
        }
    }

    /// What the last calls brought about at once.
    pub(super) fn take_inputs(&mut self) -> Vec<Input> {
        match self {
            Self::Lockd(_) => Vec::new(),
            #[cfg(feature = "etcd")]
            Self::Etcd(link) => link.take_inputs(),
        }
    }

    /// When [`Self::tick`] has something to do.
    pub(super) fn next_deadline(&self) -> Option<Time> {
        match self {
            Self::Lockd(_) => None,
            #[cfg(feature = "etcd")]
            Self::Etcd(link) => link.next_deadline(),
        }
    }

    /// Time passed.
    pub(super) fn tick(&mut self) {
        match self {
            Self::Lockd(_) => {}
            #[cfg(feature = "etcd")]
            Self::Etcd(link) => link.step(crate::etcd::Input::Tick),
        }
    }

    /// A connection to etcd reports.
    #[cfg(feature = "etcd")]
    pub(super) fn on_etcd(&mut self, attempt: Option<u64>, input: crate::etcd::Input) {
        if let Self::Etcd(link) = self {
            link.on_event(attempt, input);
        }
    }
}

/// The lockds of this node's cluster: the one that is configured, or that was met first.
fn lockds(config: &NodeConfig) -> anyhow::Result<Lockds> {
    let tls = config.tls.as_ref().map(Tls::load).transpose().map_err(anyhow::Error::msg)?;
    if let Some(own) = tls.as_ref().map(Tls::own) {
        let node = Caller { role: Role::Node, name: config.node.clone() };
        anyhow::ensure!(
            own.caller == node,
            "the certificate in [tls] is for {}, and this is {node}",
            own.caller
        );
    }
    let lockds = Lockds::new(config.lockd.clone(), tls);
    match config.cluster {
        Some(cluster) => Ok(lockds.of(cluster)),
        None => lockds.remembered_in(config.state.join("cluster")).map_err(anyhow::Error::msg),
    }
}
