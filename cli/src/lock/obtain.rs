//! A request for a lock, from the question to its end: granted, or taken back.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::bail;
use csnap_proto::LockId;
use csnap_proto::message::lock::{LockEvent, LockOp, LockReply, LockView, ValueBlock, ValueChange};
use rustix::process::Signal;
use tokio::time::Instant;

use super::interrupts::Interrupts;
use super::session::{News, Session, unexpected};
use super::who::in_the_way;
use crate::args::lock::Patience;

/// How it ended.
#[derive(Debug)]
pub(super) enum Obtained {
    /// With the value block, where the direction has one.
    Granted(LockView, Option<ValueBlock>),
    /// Somebody is in the way, and whoever asked would not wait, or not longer.
    NotFree,
    /// A signal came first; nothing is held or waited for that was not before.
    Interrupted(Signal),
}

/// When to give up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Until(Option<Instant>);

impl Until {
    pub(super) fn new(patience: &Patience) -> Self {
        Self(patience.wait.and_then(|wait| Instant::now().checked_add(wait)))
    }

    pub(super) async fn reached(self) {
        match self.0 {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    pub(super) fn is_reached(self) -> bool {
        self.0.is_some_and(|at| Instant::now() >= at)
    }
}

/// A session that was interrupted before lockd answered waits so much longer: the answer says what to take back.
const LAST_ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// Asks for a lock or a conversion, waits as long as `until`, and takes it back otherwise. A grant that came before the
/// time was up counts; one that came before a signal is undone if it is a new lock.
pub(super) async fn obtain(
    session: &mut Session,
    op: LockOp,
    until: Until,
    interrupts: &mut Interrupts,
) -> anyhow::Result<Obtained> {
    let name = match &op {
        LockOp::Lock { resource, .. } => Some(resource.clone()),
        _ => None,
    };
    let is_new = name.is_some();
    let (reply, interrupted) = ask(session, op, interrupts).await?;
    let lock = match reply {
        LockReply::Granted { lock, value, .. } => {
            return match interrupted {
                None => Ok(Obtained::Granted(lock, value)),
                Some(signal) => too_late(session, lock, value, is_new, signal).await,
            };
        }
        LockReply::WouldBlock => return Ok(Obtained::NotFree),
        LockReply::Deadlock => bail!("it would wait for ever: whoever is in the way waits for this session"),
        LockReply::Busy => bail!("the lock waits for another mode already"),
        LockReply::Queued { lock, .. } => lock,
        reply => return Err(unexpected(&reply)),
    };
    if let Some(signal) = interrupted {
        return take_back(session, lock, is_new, Some(signal)).await;
    }
    if let Some(name) = name.filter(|_| std::io::stderr().is_terminal()) {
        eprintln!("csnap: waiting for {name}: {}", in_the_way(session, &name).await?);
    }
    let signal = tokio::select! {
        outcome = granted(session, lock) => return outcome,
        () = until.reached() => None,
        signal = interrupts.next() => Some(signal),
    };
    take_back(session, lock, is_new, signal).await
}

/// The answer, and the signal that came before it.
async fn ask(
    session: &Session,
    op: LockOp,
    interrupts: &mut Interrupts,
) -> anyhow::Result<(LockReply, Option<Signal>)> {
    let asking = session.ask(op);
    tokio::pin!(asking);
    tokio::select! {
        reply = &mut asking => Ok((reply?, None)),
        signal = interrupts.next() => match tokio::time::timeout(LAST_ANSWER_WITHIN, asking).await {
            Ok(reply) => Ok((reply?, Some(signal))),
            Err(_) => bail!("interrupted before lockd answered; what was asked for may still be done"),
        },
    }
}

/// Waits for the grant of what is queued.
async fn granted(session: &mut Session, id: LockId) -> anyhow::Result<Obtained> {
    loop {
        match session.next().await {
            News::Event(LockEvent::Granted { lock, value, .. }) if lock.lock == id => {
                return Ok(Obtained::Granted(lock, value));
            }
            News::Event(LockEvent::Cancelled { lock }) if lock == id => {
                bail!("the request was taken back by the lock's owner, in another command")
            }
            News::Event(LockEvent::Lost { lock, .. }) if lock.lock == id => {
                bail!("the lock was broken, or taken over, while it waited")
            }
            News::Over(reason) => bail!("the session with lockd ended while it waited: {reason}"),
            News::Event(_) | News::Jeopardy => {}
        }
    }
}

async fn take_back(
    session: &mut Session,
    lock: LockId,
    is_new: bool,
    signal: Option<Signal>,
) -> anyhow::Result<Obtained> {
    match (session.ask(LockOp::Cancel { lock }).await?, signal) {
        (LockReply::Done, None) => Ok(Obtained::NotFree),
        (LockReply::Done, Some(signal)) => Ok(Obtained::Interrupted(signal)),
        (LockReply::Granted { lock, value, .. }, None) => Ok(Obtained::Granted(lock, value)),
        (LockReply::Granted { lock, value, .. }, Some(signal)) => {
            too_late(session, lock, value, is_new, signal).await
        }
        (reply, _) => Err(unexpected(&reply)),
    }
}

/// A grant came before the signal: a new lock is given up, a conversion stays.
async fn too_late(
    session: &Session,
    lock: LockView,
    value: Option<ValueBlock>,
    is_new: bool,
    signal: Signal,
) -> anyhow::Result<Obtained> {
    if !is_new {
        return Ok(Obtained::Granted(lock, value));
    }
    session.ask(LockOp::unlock(lock.lock, ValueChange::Keep)).await?;
    Ok(Obtained::Interrupted(signal))
}
