//! A command's session with lockd: opened for the command, closed at its end.

use std::time::Duration;

use anyhow::{Context, bail};
use csnap_lockd::client::shell::{LockSession, now};
use csnap_lockd::client::{ClientConfig, ClientEvent, Duty, Identity, LockClient, Lockds, Tenure};
use csnap_proto::limits::{MEMBER_INFO_BYTES_MAX, NAME_BYTES_MAX};
use csnap_proto::message::lock::{LockEvent, LockOp, LockReply};
use csnap_proto::{Caller, Name, Role, Secret, SessionId, Time};
use csnap_transport::Unreached;
use tokio::sync::{mpsc, watch};

use crate::lockds;
use crate::operator::draw;

/// A lockd that was killed is replaced, or started again, well within this.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A session that cannot be closed by then ends with its lease.
const CLOSED_WITHIN: Duration = Duration::from_secs(1);

/// Lease of a command that holds nothing between two answers.
pub(super) const LEASE: Duration = Duration::from_secs(10);

/// Renewals in one lease: a few may be lost before it is noticed.
const RENEWALS_PER_LEASE: u64 = 6;

/// Where a session is: with any of these lockds, in a lockspace.
pub(super) struct Place {
    pub(super) lockds: Lockds,
    /// Absent for the one that every group has.
    pub(super) space: Option<Name>,
}

/// See the module.
pub(super) struct Session {
    lockd: LockSession,
    events: mpsc::Receiver<ClientEvent>,
    /// For people: where lockd was looked for.
    addresses: String,
    pub(super) lease: Duration,
}

/// What the command learns without having asked.
#[derive(Debug)]
pub(super) enum News {
    Event(LockEvent),
    /// No renewal was answered for two thirds of the lease.
    Jeopardy,
    /// The session is over, with the reason.
    Over(String),
}

impl Session {
    /// A new session there. `purpose` is what others see of it.
    pub(super) async fn open(place: &Place, purpose: &str, lease: Duration) -> anyhow::Result<Self> {
        let Place { lockds, space } = place;
        let identity = Identity { session: SessionId(draw()?), secret: Secret(draw()?) };
        let lease_ms = u64::try_from(lease.as_millis()).context("a lease in milliseconds")?;
        // Whoever is no operator has a name, and a client has nothing to say of itself.
        let (node, description) = match lockds.caller() {
            Some(Caller { role: Role::Client, name }) => (name, Vec::new()),
            Some(Caller { role: Role::Node, name }) => (name, description(purpose)),
            _ => (node(), description(purpose)),
        };
        let config = ClientConfig { node, lease_ms, renew_ms: lease_ms / RENEWALS_PER_LEASE };
        let mut client = LockClient::new(config, identity, description);
        if let Some(space) = space {
            client = client.in_lockspace(space.clone());
        }
        let (lockd, mut events) = LockSession::spawn(client, lockds.clone());
        let addresses = lockds::shown(lockds.addresses());
        let mut unreached = lockd.unreached();
        let opening = async {
            loop {
                let event = tokio::select! {
                    event = events.recv() => event,
                    // It tries on, and would hear the same.
                    Ok(why) = unreached.wait_for(|why| matches!(why, Some(Unreached::Refused(_)))) => {
                        return Err(lockds::nobody(lockds, why.as_ref().expect("waited for")));
                    }
                };
                match event {
                    Some(ClientEvent::Opened { .. }) => return Ok(()),
                    Some(ClientEvent::SessionLost { reason }) => bail!("lockd at {addresses}: {reason}"),
                    Some(_) => {}
                    None => bail!("lockd at {addresses}: the session ended"),
                }
            }
        };
        let opened = tokio::time::timeout(ANSWER_WITHIN, opening).await;
        opened.map_err(|_| match &*lockd.unreached().borrow() {
            Some(why) => lockds::nobody(lockds, why),
            None => no_answer(&addresses),
        })??;
        Ok(Self { lockd, events, addresses, lease })
    }

    /// Asks, over as many connections as it takes. What lockd says makes no sense is an error.
    pub(super) async fn ask(&self, op: LockOp) -> anyhow::Result<LockReply> {
        match tokio::time::timeout(ANSWER_WITHIN, self.lockd.operate(op)).await {
            Ok(Ok(LockReply::Invalid(why))) => bail!("{why}"),
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => {
                bail!("the session with lockd ended before it answered; what was asked for may be done")
            }
            Err(_) => Err(no_answer(&self.addresses).context("what was asked for may still be done")),
        }
    }

    /// What happens next. May be dropped at any time.
    pub(super) async fn next(&mut self) -> News {
        loop {
            match self.events.recv().await {
                Some(ClientEvent::Event(event)) => return News::Event(event),
                Some(ClientEvent::Jeopardy) => return News::Jeopardy,
                Some(ClientEvent::SessionLost { reason }) => return News::Over(reason),
                Some(ClientEvent::Closed) | None => return News::Over("it was closed".to_owned()),
                Some(_) => {}
            }
        }
    }

    /// What has happened by now, if anything.
    pub(super) fn take(&mut self) -> Option<LockEvent> {
        loop {
            if let ClientEvent::Event(event) = self.events.try_recv().ok()? {
                return Some(event);
            }
        }
    }

    /// When the last confirmed renewal was sent.
    pub(super) fn confirmed(&self) -> watch::Receiver<Option<Time>> {
        self.lockd.confirmed()
    }

    /// When the last confirmed renewal was sent, once that is recent enough for a holder to begin something.
    pub(super) async fn fresh_confirmation(&self) -> anyhow::Result<Time> {
        let mut confirmed = self.lockd.confirmed();
        let is_fresh = |at: Time| Tenure::new(self.lease, at).duty(now()) == Duty::Act;
        let fresh = confirmed.wait_for(|at| at.is_some_and(is_fresh));
        let fresh =
            tokio::time::timeout(ANSWER_WITHIN, fresh).await.map_err(|_| no_answer(&self.addresses))?;
        fresh.context("the session with lockd ended")?.context("waited for")
    }

    /// Gives the session back; what it holds and is not persistent goes with it.
    pub(super) async fn close(mut self) {
        self.lockd.close().await;
        let closed = async { while !matches!(self.next().await, News::Over(_)) {} };
        let _ = tokio::time::timeout(CLOSED_WITHIN, closed).await;
    }
}

fn no_answer(addresses: &str) -> anyhow::Error {
    let seconds = ANSWER_WITHIN.as_secs();
    anyhow::anyhow!("no lockd at {addresses} serves in {seconds} s; is a majority of them running?")
}

/// lockd answered another question than the one that was asked.
pub(super) fn unexpected(reply: &LockReply) -> anyhow::Error {
    anyhow::anyhow!("lockd answered another question: {reply:?}")
}

/// This machine, as its session is listed.
fn node() -> Name {
    let uname = rustix::system::uname();
    let host = uname.nodename().to_string_lossy();
    let allowed = |c: char| if c.is_ascii_alphanumeric() || ".-_".contains(c) { c } else { '-' };
    let host: String = host.chars().map(allowed).take(NAME_BYTES_MAX).collect();
    let host = host.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    Name::new(host).unwrap_or_else(|_| Name::new("unknown").expect("letters are a name"))
}

/// What others see of the session: text, unlike an agent's.
fn description(purpose: &str) -> Vec<u8> {
    let mut text = format!("csnap {purpose} (pid {})", std::process::id());
    let most = MEMBER_INFO_BYTES_MAX.min(text.len());
    text.truncate(text.floor_char_boundary(most));
    text.into_bytes()
}
