//! One connection to a member of etcd, and the calls on it: requests in order, renewals and the watch beside them.
//!
//! Nothing here has a time-out of its own but the connecting: lockd's client gives a connection up whose renewals are not
//! answered, and asks for the next one, to the next member.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, Error, GetOptions, KeyValue, LeaseGrantOptions,
    LeaseKeepAliveStream, LeaseKeeper, PutOptions, TxnOp, WatchOptions, WatchStream,
};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::super::{Event, Events};
use crate::etcd::{Answer, Call, Entry, Guard, Input, LeaseId, News, Revision, Txn};

/// A member that does not take a connection by then is passed over for the next.
const CONNECT_WITHIN: Duration = Duration::from_millis(250);

/// Calls that wait for their turn; the session has few outstanding.
const CALLS_MAX: usize = 64;

/// Most keys below the prefix that are looked at: members, and a few more.
const ENTRIES_MAX: i64 = 1024;

/// As etcd words it, and its own clients compare.
const LEASE_NOT_FOUND: &str = "requested lease not found";
const LEASE_EXISTS: &str = "lease already exists";

/// Where calls go in.
pub(super) struct Calls {
    requests: mpsc::Sender<Call>,
    renewals: mpsc::Sender<LeaseId>,
    watches: mpsc::Sender<Revision>,
}

/// Where they come out.
pub(super) struct Queues {
    requests: mpsc::Receiver<Call>,
    renewals: mpsc::Receiver<LeaseId>,
    watches: mpsc::Receiver<Revision>,
}

pub(super) fn queues() -> (Calls, Queues) {
    let (requests, requested) = mpsc::channel(CALLS_MAX);
    let (renewals, renewed) = mpsc::channel(CALLS_MAX);
    let (watches, watched) = mpsc::channel(CALLS_MAX);
    let queues = Queues { requests: requested, renewals: renewed, watches: watched };
    (Calls { requests, renewals, watches }, queues)
}

impl Calls {
    /// False when the connection does not take it.
    pub(super) fn take(&self, call: Call) -> bool {
        match call {
            Call::KeepAlive(lease) => self.renewals.try_send(lease).is_ok(),
            Call::Watch(from) => self.watches.try_send(from).is_ok(),
            call => self.requests.try_send(call).is_ok(),
        }
    }
}

/// What a connection reports to.
struct Report<'a> {
    attempt: u64,
    events: &'a Events,
}

impl Report<'_> {
    async fn tell(&self, input: Input) {
        let _ = self.events.send(Event::Etcd { attempt: Some(self.attempt), input }).await;
    }
}

/// Connects to a member, another first with each attempt, and carries out calls until something fails.
pub(super) async fn converse(
    endpoints: &[SocketAddr],
    prefix: &str,
    attempt: u64,
    queues: Queues,
    events: &Events,
) -> anyhow::Result<()> {
    let report = Report { attempt, events };
    let member = reach_any(endpoints, attempt).await?;
    let options = ConnectOptions::new().with_connect_timeout(CONNECT_WITHIN);
    let client = Client::connect([format!("http://{member}")], Some(options)).await?;
    report.tell(Input::Connected).await;
    tokio::try_join!(
        request(client.clone(), prefix, queues.requests, &report),
        renew(client.clone(), queues.renewals, &report),
        watch(client, prefix, queues.watches, &report),
    )?;
    Ok(())
}

/// The first member that takes a connection. etcd's client connects when it is first used, and then waits; so whether
/// somebody is there is found out before.
async fn reach_any(endpoints: &[SocketAddr], attempt: u64) -> anyhow::Result<SocketAddr> {
    let count = endpoints.len();
    let first = usize::try_from(attempt % count.max(1) as u64)?;
    for member in endpoints.iter().cycle().skip(first).take(count) {
        if let Ok(Ok(_)) = tokio::time::timeout(CONNECT_WITHIN, TcpStream::connect(member)).await {
            return Ok(*member);
        }
    }
    bail!("no member takes a connection")
}

async fn request(
    mut client: Client,
    prefix: &str,
    mut calls: mpsc::Receiver<Call>,
    report: &Report<'_>,
) -> anyhow::Result<()> {
    while let Some(call) = calls.recv().await {
        let answer = perform(&mut client, prefix, call).await?;
        report.tell(Input::Answer(answer)).await;
    }
    Ok(())
}

async fn perform(client: &mut Client, prefix: &str, call: Call) -> anyhow::Result<Answer> {
    match call {
        Call::Grant(lease, ttl_s) => {
            let options = LeaseGrantOptions::new().with_id(lease.0);
            match client.lease_grant(i64::from(ttl_s), Some(options)).await {
                Ok(granted) => Ok(Answer::Leased(seconds(granted.ttl()))),
                Err(error) if says(&error, LEASE_EXISTS) => Ok(Answer::Leased(ttl_s)),
                Err(error) => Err(error.into()),
            }
        }
        Call::Revoke(lease) => match client.lease_revoke(lease.0).await {
            Err(error) if !says(&error, LEASE_NOT_FOUND) => Err(error.into()),
            _ => Ok(Answer::Revoked),
        },
        Call::Read => read(client, prefix).await,
        Call::Txn(lease, txn) => match client.txn(as_txn(prefix, lease, txn)).await {
            Ok(done) => {
                let header = done.header().context("an answer has a header")?;
                Ok(Answer::Txn(done.succeeded(), header.revision()))
            }
            Err(error) if says(&error, LEASE_NOT_FOUND) => Ok(Answer::LeaseGone),
            Err(error) => Err(error.into()),
        },
        Call::KeepAlive(_) | Call::Watch(_) => unreachable!("they have queues of their own"),
    }
}

async fn read(client: &mut Client, prefix: &str) -> anyhow::Result<Answer> {
    let options = GetOptions::new().with_prefix().with_limit(ENTRIES_MAX);
    let found = client.get(prefix, Some(options)).await?;
    if found.more() {
        bail!("more than {ENTRIES_MAX} keys below {prefix}: give csnap a prefix of its own");
    }
    let revision = found.header().context("an answer has a header")?.revision();
    let entries = found.kvs().iter().filter_map(|kv| entry(prefix, kv)).collect();
    Ok(Answer::Entries(revision, entries))
}

fn as_txn(prefix: &str, lease: LeaseId, txn: Txn) -> etcd_client::Txn {
    let name = |key: crate::etcd::Key| format!("{prefix}{}", key.name());
    let guards = txn.when.into_iter().map(|guard| match guard {
        Guard::Created(key, revision) => Compare::create_revision(name(key), CompareOp::Equal, revision),
        Guard::Written(key, revision) => Compare::mod_revision(name(key), CompareOp::Equal, revision),
    });
    let guards: Vec<_> = guards.collect();
    let puts = txn.puts.into_iter().map(|put| {
        let options = put.leased.then(|| PutOptions::new().with_lease(lease.0));
        TxnOp::put(name(put.key), put.value, options)
    });
    let deletes = txn.deletes.into_iter().map(|key| TxnOp::delete(name(key), None));
    etcd_client::Txn::new().when(guards).and_then(puts.chain(deletes).collect::<Vec<_>>())
}

/// Renewals share a stream, opened with the first.
async fn renew(
    mut client: Client,
    mut leases: mpsc::Receiver<LeaseId>,
    report: &Report<'_>,
) -> anyhow::Result<()> {
    let mut stream: Option<(LeaseKeeper, LeaseKeepAliveStream)> = None;
    while let Some(lease) = leases.recv().await {
        let news = match stream.as_mut().filter(|(keeper, _)| keeper.id() == lease.0) {
            Some((keeper, answers)) => {
                keeper.keep_alive().await?;
                let kept = answers.message().await?.context("the stream of renewals ended")?;
                if kept.ttl() > 0 { News::Kept(Some(seconds(kept.ttl()))) } else { News::Gone }
            }
            // Opening it is a renewal, of which only is told whether it was one.
            None => match client.lease_keep_alive(lease.0).await {
                Ok(opened) => {
                    stream = Some(opened);
                    News::Kept(None)
                }
                Err(Error::LeaseKeepAliveError(why)) if why == "lease not found" => News::Gone,
                Err(error) => return Err(error.into()),
            },
        };
        report.tell(Input::News(news)).await;
    }
    Ok(())
}

/// One watch at a time, each from the revision that was asked for.
async fn watch(
    mut client: Client,
    prefix: &str,
    mut starts: mpsc::Receiver<Revision>,
    report: &Report<'_>,
) -> anyhow::Result<()> {
    let mut next = starts.recv().await;
    while let Some(from) = next {
        let options = WatchOptions::new().with_prefix().with_start_revision(from);
        let mut stream = client.watch(prefix, Some(options)).await?;
        next = tokio::select! {
            later = starts.recv() => later,
            ended = follow(&mut stream, prefix, report) => {
                ended?;
                starts.recv().await
            }
        };
    }
    Ok(())
}

/// Until the watch's revisions are compacted away.
async fn follow(stream: &mut WatchStream, prefix: &str, report: &Report<'_>) -> anyhow::Result<()> {
    loop {
        let told = stream.message().await?.context("the watch ended")?;
        if told.compact_revision() > 0 {
            report.tell(Input::News(News::Compacted)).await;
            return Ok(());
        }
        if told.canceled() {
            bail!("the watch was cancelled: {}", told.cancel_reason());
        }
        let kvs = told.events().iter().filter_map(|event| event.kv());
        let entries: Vec<_> = kvs.filter_map(|kv| entry(prefix, kv)).collect();
        if !entries.is_empty() {
            report.tell(Input::News(News::Changes(entries))).await;
        }
    }
}

/// A key without the prefix. One that was deleted has version 0.
fn entry(prefix: &str, kv: &KeyValue) -> Option<Entry> {
    let key = kv.key().strip_prefix(prefix.as_bytes())?.to_vec();
    let value = (kv.version() > 0).then(|| kv.value().to_vec());
    Some(Entry { key, value, created: kv.create_revision(), written: kv.mod_revision() })
}

fn seconds(ttl: i64) -> u32 {
    u32::try_from(ttl.max(0)).unwrap_or(u32::MAX)
}

fn says(error: &Error, what: &str) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.message().contains(what))
}
