//! What others see of a lock of lockd: when it is granted to them, and who has it.

use std::net::SocketAddr;

use csnap_proto::message::lock::{LockEvent, LockOp, LockReply, Mode, ValueChange, Watched};

use super::lockd::Lockd;
use super::{Seen, now_us, say};

/// Queues for the lock in EX, and gives it back once it was granted.
pub(crate) async fn wait(addresses: &[SocketAddr], resource: &str) -> anyhow::Result<()> {
    let mut lockd = Lockd::open(addresses, resource)?;
    lockd.ask(LockOp::Show { resource: resource.into() }).await?;
    say(&Seen::Ready)?;
    let lock = lockd.lock(resource, Mode::Ex).await?;
    say(&Seen::Granted { at_us: now_us() })?;
    lockd.ask(LockOp::unlock(lock, ValueChange::Keep)).await?;
    Ok(())
}

/// Until it is killed.
pub(crate) async fn watch(addresses: &[SocketAddr], resource: &str) -> anyhow::Result<()> {
    let mut lockd = Lockd::open(addresses, resource)?;
    for what in [Watched::Value(resource.into()), Watched::Grants(resource.into())] {
        let reply = lockd.ask(LockOp::watch(what)).await?;
        anyhow::ensure!(!matches!(reply, LockReply::Invalid(_)), "watch: {reply:?}");
    }
    say(&Seen::Ready)?;
    loop {
        match lockd.event().await? {
            LockEvent::Changed { vacant, .. } => say(&Seen::Vacant { at_us: now_us(), vacant })?,
            LockEvent::Held { row, .. } => say(&Seen::Held {
                at_us: now_us(),
                session: row.holder.session.map(|session| session.to_string()).unwrap_or_default(),
                mode: row.mode.map(|mode| format!("{mode:?}")).unwrap_or_default(),
                term: row.term.0,
            })?,
            _ => {}
        }
    }
}
