//! Clients that lock and unlock all the time, beside real lockds: nothing is lost, nothing granted twice, and how long each
//! pair takes.
//!
//! All of them want the same resource in turn, and its terms are compared as a disk would compare them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use csnap_lockd::client::shell::LockSession;
use csnap_lockd::client::{ClientConfig, ClientEvent, Identity, LockClient};
use csnap_proto::message::lock::{Flags, LockEvent, LockOp, LockReply, LockView, Mode, ValueChange};
use csnap_proto::{Name, Secret, SessionId};
use tokio::sync::mpsc::Receiver;

use super::cluster::wait_until;

/// Lease of such a client, milliseconds: as an agent's.
pub(crate) const LEASE_MS: u64 = 1500;

/// A session of a client that is told in time when it may be lost.
pub(crate) fn session(addresses: Vec<SocketAddr>) -> (LockSession, Receiver<ClientEvent>) {
    session_for(LEASE_MS, addresses)
}

/// One with a lease of its own.
pub(crate) fn session_for(lease_ms: u64, addresses: Vec<SocketAddr>) -> (LockSession, Receiver<ClientEvent>) {
    let id = u128::from(SESSIONS.fetch_add(1, Ordering::Relaxed)).to_le_bytes();
    let config =
        ClientConfig { node: Name::new("client").expect("a name"), lease_ms, renew_ms: LEASE_MS / 6 };
    let identity = Identity { session: SessionId(id), secret: Secret(id) };
    LockSession::spawn(LockClient::new(config, identity, vec![]), addresses)
}

/// What they see together.
#[derive(Default)]
struct Seen {
    stop: AtomicBool,
    /// Term of whoever has the lock now; 0 for nobody.
    holder: AtomicU64,
    /// Highest term so far.
    term: AtomicU64,
    pairs: AtomicU64,
    /// The longest that one operation took, since this was asked last: its answer, not what it waited for.
    stall_us: AtomicU64,
}

impl Seen {
    /// Asks, and remembers how long the answer took.
    async fn ask(&self, session: &LockSession, op: LockOp) -> LockReply {
        let began = Instant::now();
        let reply = session.operate(op).await.expect("the session lives");
        let took = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.stall_us.fetch_max(took, Ordering::Relaxed);
        reply
    }
}

/// Clients on a thread of their own.
pub(crate) struct LockLoad {
    seen: Arc<Seen>,
    thread: std::thread::JoinHandle<Vec<Duration>>,
}

impl LockLoad {
    /// `clients` of them want the same lock, and each besides keeps one that nobody else wants.
    pub(crate) fn start(clients: u8, addresses: &[SocketAddr]) -> Self {
        let (seen, addresses) = (Arc::<Seen>::default(), addresses.to_vec());
        let shared = seen.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let all = (1..=clients).map(|n| tokio::spawn(one(n, addresses.clone(), shared.clone())));
                let mut took = Vec::new();
                for client in all.collect::<Vec<_>>() {
                    took.extend(client.await.expect("no client failed"));
                }
                took
            })
        });
        Self { seen, thread }
    }

    /// Waits until so many more pairs are through.
    pub(crate) fn wait_for(&self, pairs: u64) {
        let goal = self.seen.pairs.load(Ordering::Relaxed) + pairs;
        wait_until("lock clients go on", || {
            assert!(!self.thread.is_finished(), "a lock client failed");
            self.seen.pairs.load(Ordering::Relaxed) >= goal
        });
    }

    /// The longest that an answer took, of all clients, since this was asked last.
    pub(crate) fn take_stall(&self) -> Duration {
        Duration::from_micros(self.seen.stall_us.swap(0, Ordering::Relaxed))
    }

    /// How long each pair took, of all clients.
    pub(crate) fn stop(self) -> Vec<Duration> {
        self.seen.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no lock was lost and none granted twice")
    }
}

/// Sessions so far; none is anybody's twice.
static SESSIONS: AtomicU64 = AtomicU64::new(1);

async fn one(n: u8, addresses: Vec<SocketAddr>, seen: Arc<Seen>) -> Vec<Duration> {
    let (session, mut events) = session(addresses);
    let own = take(&seen, &session, &mut events, &format!("own/{n}")).await;
    let mut took = Vec::new();
    while !seen.stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        let lock = take(&seen, &session, &mut events, "shared").await;
        let before = seen.holder.swap(lock.term.0, Ordering::SeqCst);
        assert_eq!(before, 0, "two have it: {before} and {}", lock.term);
        let highest = seen.term.swap(lock.term.0, Ordering::SeqCst);
        assert!(highest < lock.term.0, "terms only grow: {highest}, then {}", lock.term);
        seen.holder.store(0, Ordering::SeqCst);
        give(&seen, &session, &lock).await;
        took.push(began.elapsed());
        seen.pairs.fetch_add(1, Ordering::Relaxed);
    }
    // Nobody took it meanwhile: it is still this session's, as it was granted.
    let reply = seen.ask(&session, LockOp::write(own.lock, Mode::Ex, vec![n])).await;
    assert!(matches!(&reply, LockReply::Granted { lock, .. } if lock.term == own.term), "{reply:?}");
    give(&seen, &session, &own).await;
    session.close().await;
    while events.recv().await.is_some() {}
    took
}

/// In EX, however long it takes.
async fn take(
    seen: &Seen,
    session: &LockSession,
    events: &mut Receiver<ClientEvent>,
    resource: &str,
) -> LockView {
    match seen.ask(session, LockOp::lock(resource, Mode::Ex, Flags::NONE)).await {
        LockReply::Granted { lock, .. } => lock,
        LockReply::Queued { .. } => loop {
            match events.recv().await.expect("the session lives") {
                ClientEvent::Event(LockEvent::Granted { lock, .. }) if lock.resource == resource => {
                    break lock;
                }
                ClientEvent::SessionLost { reason } => panic!("a session was lost: {reason}"),
                _ => {}
            }
        },
        other => panic!("{other:?}"),
    }
}

async fn give(seen: &Seen, session: &LockSession, lock: &LockView) {
    let reply = seen.ask(session, LockOp::unlock(lock.lock, ValueChange::Keep)).await;
    assert_eq!(reply, LockReply::Done);
}
