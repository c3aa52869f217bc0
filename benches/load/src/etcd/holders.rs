//! One lock of etcd: its own lock for holders and who waits for them, a key for who watches.

use std::net::SocketAddr;

use anyhow::Context;
use etcd_client::{Client as EtcdClient, EventType, LockOptions};
use tokio::task::JoinSet;

use super::{Etcd, LEASE_SECONDS, members};
use crate::{Holders, Renewed, Seen, now_us, say};

/// As csnap's server lock has it, in whose place the key is.
const MODE: &str = "Pw";

impl Holders for Etcd {
    async fn live(addresses: Vec<SocketAddr>, resource: String, lease_ms: u64) -> anyhow::Result<()> {
        let (all, leader) = members(&addresses).await?;
        let mut client = all[leader].clone();
        let seconds = i64::try_from(lease_ms / 1000)?;
        let lease = client.lease_grant(seconds, None).await?;
        client.lock(resource, Some(LockOptions::new().with_lease(lease.id()))).await?;
        let renewed_us = now_us();
        client.lease_keep_alive(lease.id()).await?;
        // What was granted, which may be longer than what was asked for.
        say(&Renewed { renewed_us, lease_ms: u64::try_from(lease.ttl())? * 1000 })?;
        std::future::pending().await
    }

    async fn wait(addresses: &[SocketAddr], resource: &str) -> anyhow::Result<()> {
        let (all, leader) = members(addresses).await?;
        let mut client = all[leader].clone();
        let lease = client.lease_grant(LEASE_SECONDS, None).await?.id();
        say(&Seen::Ready)?;
        let locked = client.lock(resource, Some(LockOptions::new().with_lease(lease))).await?;
        say(&Seen::Granted { at_us: now_us() })?;
        client.unlock(locked.key()).await?;
        Ok(())
    }

    /// At every member, since one of them may be lost meanwhile: what happens is told as often, by the first at once.
    async fn watch(addresses: &[SocketAddr], resource: &str) -> anyhow::Result<()> {
        let (all, _) = members(addresses).await?;
        let mut watching = JoinSet::new();
        for mut client in all {
            let mut changes = client.watch(resource, None).await?;
            let begun = changes.message().await?.context("no watch")?;
            anyhow::ensure!(begun.created(), "watch: {}", begun.cancel_reason());
            watching.spawn(async move { tell(client, changes).await });
        }
        say(&Seen::Ready)?;
        while let Some(ended) = watching.join_next().await {
            ended??;
        }
        anyhow::bail!("every member is lost")
    }
}

/// Until the member is lost. The client is kept for as long as its watch.
async fn tell(_client: EtcdClient, mut changes: etcd_client::WatchStream) -> anyhow::Result<()> {
    while let Ok(Some(change)) = changes.message().await {
        for event in change.events() {
            let at_us = now_us();
            let kv = event.kv().context("an event of no key")?;
            let (session, term) = (format!("{:x}", kv.lease()), u64::try_from(kv.create_revision())?);
            match event.event_type() {
                EventType::Put => say(&Seen::Held { at_us, session, mode: MODE.into(), term })?,
                EventType::Delete => say(&Seen::Vacant { at_us, vacant: true })?,
            }
        }
    }
    Ok(())
}
