//! etcd through its client: the transactions that do what locks and conversions do.

mod holders;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use etcd_client::{
    Client as EtcdClient, Compare, CompareOp, LockOptions, PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse,
};

use super::{Client, Job};

/// Longer than any measurement, so that keeping it alive is no part of the load.
const LEASE_SECONDS: i64 = 600;

/// A write that is not acknowledged by then is asked of the next replica: one that a lost leader had is not answered
/// for seconds.
const WRITE_WITHIN: Duration = Duration::from_millis(50);

/// The resource that all contend for.
const SHARED: &str = "bench/shared";

/// A client with a lease, on a connection of its own.
pub(crate) struct Etcd {
    /// To the leader as of the start.
    client: EtcdClient,
    /// To each replica.
    all: Vec<EtcdClient>,
    at: usize,
    lease: i64,
    key: String,
    /// Of its key, for conversions.
    revision: i64,
}

impl Etcd {
    /// The key is made if it is not there, under the lease; and deleted if it is as it was made.
    async fn lock_and_unlock(&mut self) -> anyhow::Result<()> {
        let key = self.key.as_str();
        let free = Compare::create_revision(key, CompareOp::Equal, 0);
        let put = TxnOp::put(key, "EX", Some(PutOptions::new().with_lease(self.lease)));
        let locked = self.client.txn(Txn::new().when([free]).and_then([put])).await?;
        let ours = Compare::mod_revision(key, CompareOp::Equal, revision(&locked)?);
        let unlocked = self.client.txn(Txn::new().when([ours]).and_then([TxnOp::delete(key, None)])).await?;
        ensure!(locked.succeeded() && unlocked.succeeded(), "somebody else had {key}");
        Ok(())
    }

    /// etcd's own lock, which queues.
    async fn take_turn(&mut self) -> anyhow::Result<()> {
        let options = LockOptions::new().with_lease(self.lease);
        let locked = self.client.lock(SHARED, Some(options)).await?;
        self.client.unlock(locked.key()).await?;
        Ok(())
    }

    /// Written if it is as this client left it; what is there comes back, as with a conversion.
    async fn convert(&mut self, mode: &str) -> anyhow::Result<()> {
        let key = self.key.as_str();
        let ours = Compare::mod_revision(key, CompareOp::Equal, self.revision);
        let put = TxnOp::put(key, mode, Some(PutOptions::new().with_lease(self.lease)));
        let done = self.client.txn(Txn::new().when([ours]).and_then([TxnOp::get(key, None), put])).await?;
        ensure!(done.succeeded(), "somebody else wrote {key}");
        ensure!(matches!(done.op_responses().first(), Some(TxnOpResponse::Get(_))), "no value came back");
        self.revision = revision(&done)?;
        Ok(())
    }
}

impl Client for Etcd {
    async fn connect(addresses: &[SocketAddr], number: usize) -> anyhow::Result<Self> {
        let (all, leader) = members(addresses).await?;
        let mut client = all[leader].clone();
        let lease = client.lease_grant(LEASE_SECONDS, None).await?.id();
        Ok(Self { client, all, at: leader, lease, key: format!("bench/{number}"), revision: 0 })
    }

    async fn prepare(&mut self, job: Job) -> anyhow::Result<()> {
        let key = self.key.clone();
        self.client.delete(key.as_str(), None).await?;
        if job == Job::Convert {
            let options = PutOptions::new().with_lease(self.lease);
            let put = self.client.put(key, "CR", Some(options)).await?;
            self.revision = put.header().context("a header")?.revision();
        }
        Ok(())
    }

    async fn work(&mut self, job: Job) -> anyhow::Result<()> {
        match job {
            Job::Lock => self.lock_and_unlock().await,
            Job::Contend => self.take_turn().await,
            Job::Convert => {
                self.convert("PW").await?;
                self.convert("CR").await
            }
        }
    }

    async fn write(&mut self, value: u64) -> anyhow::Result<()> {
        let key = self.key.clone();
        loop {
            let put = self.all[self.at].put(key.as_str(), value.to_le_bytes(), None);
            match tokio::time::timeout(WRITE_WITHIN, put).await {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(_)) => tokio::time::sleep(Duration::from_millis(2)).await,
                Err(_) => {}
            }
            self.at = (self.at + 1) % self.all.len();
        }
    }
}

/// A client of each member, and which of them leads.
async fn members(addresses: &[SocketAddr]) -> anyhow::Result<(Vec<EtcdClient>, usize)> {
    let (mut all, mut leader) = (Vec::new(), 0);
    for (at, address) in addresses.iter().enumerate() {
        let mut client = EtcdClient::connect([format!("http://{address}")], None).await?;
        let status = client.status().await?;
        if status.header().map(|header| header.member_id()) == Some(status.leader()) {
            leader = at;
        }
        all.push(client);
    }
    Ok((all, leader))
}

/// The store's, as of a transaction.
fn revision(done: &TxnResponse) -> anyhow::Result<i64> {
    Ok(done.header().context("an answer without a header")?.revision())
}
