//! lockd through its own client.

use std::net::SocketAddr;

use anyhow::{Context, bail};
use csnap_lockd::client::shell::LockSession;
use csnap_lockd::client::{ClientConfig, ClientEvent, Identity, LockClient};
use csnap_proto::message::lock::{
    Expect, Flags, KeyOp, KeyReply, LockEvent, LockOp, LockReply, Mode, ValueChange,
};
use csnap_proto::{LockId, Name, Secret, SessionId};
use tokio::sync::mpsc;

use super::{Client, Holders, Job, mortal, witness};

/// Of sessions that are there for longer than any leader's absence.
const LEASE_MS: u64 = 20_000;

/// Renewals are no part of the load.
const RENEW_MS: u64 = 2_000;

/// The resource that all contend for.
const SHARED: &str = "bench/shared";

/// A session.
pub(crate) struct Lockd {
    session: LockSession,
    events: mpsc::Receiver<ClientEvent>,
    resource: String,
    /// Held all the time, for conversions.
    held: Option<LockId>,
    writes: u64,
}

impl Lockd {
    /// Opens a session with whoever leads.
    pub(crate) fn open(addresses: &[SocketAddr], resource: &str) -> anyhow::Result<Self> {
        let config = ClientConfig { node: Name::new("bench")?, lease_ms: LEASE_MS, renew_ms: RENEW_MS };
        let client = LockClient::new(config, identity()?, Vec::new());
        let (session, events) = LockSession::spawn(client, addresses.to_vec());
        Ok(Self { session, events, resource: resource.into(), held: None, writes: 0 })
    }

    /// As [`LockSession::operate`].
    pub(crate) async fn ask(&self, op: LockOp) -> anyhow::Result<LockReply> {
        Ok(self.session.operate(op).await?)
    }

    /// What happened to the session's locks and watches.
    pub(crate) async fn event(&mut self) -> anyhow::Result<LockEvent> {
        loop {
            match self.events.recv().await.context("the session is over")? {
                ClientEvent::Event(event) => return Ok(event),
                ClientEvent::SessionLost { reason } => bail!("the session is lost: {reason}"),
                _ => {}
            }
        }
    }

    /// Waits for its turn.
    pub(crate) async fn lock(&mut self, resource: &str, mode: Mode) -> anyhow::Result<LockId> {
        let queued = match self.ask(LockOp::lock(resource, mode, Flags::NONE)).await? {
            LockReply::Granted { lock, .. } => return Ok(lock.lock),
            LockReply::Queued { lock, .. } => lock,
            other => bail!("lock: {other:?}"),
        };
        loop {
            match self.event().await? {
                LockEvent::Granted { lock, .. } if lock.lock == queued => return Ok(queued),
                LockEvent::Cancelled { lock } if lock == queued => bail!("the wait was cancelled"),
                _ => {}
            }
        }
    }

    async fn lock_and_unlock(&mut self, resource: &str) -> anyhow::Result<()> {
        let lock = self.lock(resource, Mode::Ex).await?;
        match self.ask(LockOp::Unlock { lock, flags: Flags::NONE, value: ValueChange::Keep }).await? {
            LockReply::Done => Ok(()),
            other => bail!("unlock: {other:?}"),
        }
    }

    async fn convert_and_back(&mut self) -> anyhow::Result<()> {
        let lock = self.held.context("prepared")?;
        self.writes += 1;
        let up = LockOp::convert(lock, Mode::Pw, Flags::NOQUEUE);
        let down = LockOp::write(lock, Mode::Cr, self.writes.to_le_bytes());
        for op in [up, down] {
            match self.ask(op).await? {
                LockReply::Granted { .. } => {}
                other => bail!("convert: {other:?}"),
            }
        }
        Ok(())
    }
}

impl Client for Lockd {
    async fn connect(addresses: &[SocketAddr], number: usize) -> anyhow::Result<Self> {
        Self::open(addresses, &format!("bench/{number}"))
    }

    async fn prepare(&mut self, job: Job) -> anyhow::Result<()> {
        let resource = self.resource.clone();
        match job {
            Job::Convert => self.held = Some(self.lock(&resource, Mode::Cr).await?),
            // So that its session is open.
            Job::Lock | Job::Contend => self.lock_and_unlock(&resource).await?,
        }
        Ok(())
    }

    async fn work(&mut self, job: Job) -> anyhow::Result<()> {
        match job {
            Job::Lock => {
                let resource = self.resource.clone();
                self.lock_and_unlock(&resource).await
            }
            Job::Contend => self.lock_and_unlock(SHARED).await,
            Job::Convert => self.convert_and_back().await,
        }
    }

    async fn write(&mut self, value: u64) -> anyhow::Result<()> {
        let (key, value) = (self.resource.clone(), value.to_le_bytes().to_vec());
        let put = KeyOp::Put { key, value, expect: Expect::Any, ephemeral: false };
        match self.ask(LockOp::Key(put)).await? {
            LockReply::Key(KeyReply::Done { .. }) => Ok(()),
            other => bail!("put: {other:?}"),
        }
    }
}

impl Holders for Lockd {
    async fn live(addresses: Vec<SocketAddr>, resource: String, lease_ms: u64) -> anyhow::Result<()> {
        tokio::task::spawn_blocking(move || mortal::live(&addresses, &resource, lease_ms)).await?
    }

    async fn wait(addresses: &[SocketAddr], resource: &str) -> anyhow::Result<()> {
        witness::wait(addresses, resource).await
    }

    async fn watch(addresses: &[SocketAddr], resource: &str) -> anyhow::Result<()> {
        witness::watch(addresses, resource).await
    }
}

/// A session of nobody else's.
pub(crate) fn identity() -> anyhow::Result<Identity> {
    let (mut session, mut secret) = ([0; 16], [0; 16]);
    for bytes in [&mut session, &mut secret] {
        getrandom::fill(bytes).map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
    }
    Ok(Identity { session: SessionId(session), secret: Secret(secret) })
}
