//! Several clients use keys and locks of three lockds, each on a host of its own, while these are killed, frozen and cut off, both
//! ways and one way; what the clients saw must be linearizable. `CSNAP_HISTORY_SECONDS` (8) of it.
//!
//! A client that gives a session up by its own clock does not know when it ends. So somebody comes back to it and closes it, until
//! lockd says that it is no more: from then on nothing may be held in it.
//!
//! Needs root, `ip` and `nft`; see [`super::namespaces`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use csnap_lockd::client::shell::LockSession;
use csnap_lockd::client::{ClientEvent, GAVE_UP, Identity, Lockds as Reached};
use csnap_storage::sim::Rng;
use csnap_tests::history::client::Client;
use csnap_tests::history::{Recorder, SessionNumber};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::cluster::{number, signal};
use super::namespaces::{Cut, Network};
use super::replicas::{Lockds, SEATS, new_client, runtime, same_client};

/// Lockds, and whoever asks them.
const HOSTS: [(&str, u32); 4] = [("l1", 1), ("l2", 2), ("l3", 3), ("clients", 9)];

const CLIENTS: u32 = 5;

/// Shorter than most faults last, so that sessions are lost.
const LEASE_MS: u64 = 500;

/// What is not answered by then is given up, and its session with it.
const PATIENCE: Duration = Duration::from_millis(700);

/// Between two operations of a client, at most.
const THINK_US: u64 = 20_000;

/// Everything is answered this soon after the last fault, or the group does not go on.
const GOES_ON_WITHIN: Duration = Duration::from_secs(30);

/// Of faults, unless somebody wants more.
const SECONDS: u32 = 8;

type Shared = Arc<Mutex<Recorder>>;

fn with<T>(recorder: &Shared, does: impl FnOnce(&mut Recorder) -> T) -> T {
    does(&mut recorder.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Asks lockd for the end of a session until it says so, and records that.
async fn end_session(number: SessionNumber, identity: Identity, lockds: Reached, recorder: Shared) {
    loop {
        let (session, mut events) = LockSession::spawn(same_client(identity, LEASE_MS), lockds.clone());
        session.close().await;
        while let Some(event) = events.recv().await {
            match event {
                ClientEvent::SessionLost { reason } if reason == GAVE_UP => break,
                ClientEvent::SessionLost { .. } | ClientEvent::Closed => {
                    return with(&recorder, |recorder| recorder.told_lost(number));
                }
                _ => {}
            }
        }
    }
}

/// A client asks one thing after the other until told to stop; then it ends with its first operation that is answered, once lockd
/// has said of every session that it gave up or lost that it is no more. How many those were.
async fn contend(name: u32, lockds: Reached, recorder: Shared, stop: Arc<AtomicBool>) -> u64 {
    let mut ends = tokio::task::JoinSet::new();
    contend_until(name, &lockds, &recorder, &stop, &mut ends).await;
    let lost = ends.len() as u64;
    let all_told = async { while ends.join_next().await.is_some() {} };
    tokio::time::timeout(GOES_ON_WITHIN, all_told).await.expect("lockd says what became of a session");
    lost
}

async fn contend_until(
    name: u32,
    lockds: &Reached,
    recorder: &Shared,
    stop: &AtomicBool,
    ends: &mut tokio::task::JoinSet<()>,
) {
    let mut rng = Rng::new(u64::from(name) + u64::from(std::process::id()) * 1000);
    let mut client = with(recorder, |recorder| Client::new(name, name.is_multiple_of(2), recorder));
    let spawn = |rng: &mut Rng| {
        let client = new_client(rng, LEASE_MS);
        (client.identity(), LockSession::spawn(client, lockds.clone()))
    };
    let (mut identity, (mut session, mut events)) = spawn(&mut rng);
    let mut stopped_at = None::<Instant>;
    loop {
        let stops = stop.load(Ordering::Relaxed);
        if stops && stopped_at.get_or_insert_with(Instant::now).elapsed() > GOES_ON_WITHIN {
            return;
        }
        let (pending, op) = with(recorder, |recorder| client.ask(recorder, &mut rng));
        match tokio::time::timeout(PATIENCE, session.operate(op)).await {
            Ok(Ok(reply)) => {
                with(recorder, |recorder| client.hear(recorder, pending, reply)).expect("the answer to that");
                if stops {
                    return;
                }
            }
            // A client gives a session up by its own clock, before lockd does.
            _ => {
                let given_up = client.session();
                with(recorder, |recorder| client.begin_anew(recorder, false));
                ends.spawn(end_session(given_up, identity, lockds.clone(), Arc::clone(recorder)));
                (identity, (session, events)) = spawn(&mut rng);
            }
        }
        // Nobody else takes them, and who is not listened to stops.
        while events.try_recv().is_ok() {}
        tokio::time::sleep(Duration::from_micros(rng.below(THINK_US))).await;
    }
}

/// A thread on the clients' host.
fn on_host(namespace: &str, does: impl FnOnce() -> u64 + Send + 'static) -> std::thread::JoinHandle<u64> {
    let path = format!("/run/netns/{namespace}");
    std::thread::spawn(move || {
        let file = std::fs::File::open(&path).expect("ip makes it");
        let entered =
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network));
        entered.expect("root may enter");
        does()
    })
}

/// One fault, and its end.
fn strike(lockds: &mut Lockds, rng: &mut Rng) -> &'static str {
    let seat = rng.index(SEATS);
    let lasts = Duration::from_millis(200 + rng.below(1000));
    match rng.below(5) {
        0 | 1 => {
            lockds.kill_one(seat);
            std::thread::sleep(lasts / 4);
            lockds.start_one(seat);
            "killed"
        }
        2 => {
            let frozen: Vec<u32> =
                (0..1 + rng.index(2)).map(|more| lockds.pid((seat + more) % SEATS)).collect();
            frozen.iter().for_each(|pid| signal(*pid, "STOP"));
            std::thread::sleep(lasts);
            frozen.iter().for_each(|pid| signal(*pid, "CONT"));
            if frozen.len() > 1 { "two frozen" } else { "frozen" }
        }
        _ => {
            let cut = [Cut::Both, Cut::Incoming, Cut::Outgoing][rng.index(3)];
            let (network, host) = lockds.host(seat);
            network.cut(host, cut);
            std::thread::sleep(lasts);
            network.heal(host, cut);
            "cut off"
        }
    }
}

#[test]
fn keys_and_locks_of_three_lockds_are_linearizable_under_kills_freezes_and_cuts() {
    let network = Network::new("lin", &HOSTS);
    let namespace = network.namespace("clients");
    let mut lockds = Lockds::on_hosts(network, &HOSTS[..SEATS]);
    let (recorder, stop) = (Shared::default(), Arc::new(AtomicBool::new(false)));
    let client = |name: u32| {
        let (reached, recorder, stop) = (lockds.reached(), Arc::clone(&recorder), Arc::clone(&stop));
        on_host(&namespace, move || runtime().block_on(contend(name, reached, recorder, stop)))
    };
    let clients: Vec<_> = (1..=CLIENTS).map(client).collect();
    let mut rng = Rng::new(u64::from(std::process::id()));
    let seconds = number("CSNAP_HISTORY_SECONDS", SECONDS);
    let until = Instant::now() + Duration::from_secs(u64::from(seconds));
    let mut faults = std::collections::BTreeMap::new();
    std::thread::sleep(Duration::from_millis(500));
    while Instant::now() < until {
        *faults.entry(strike(&mut lockds, &mut rng)).or_insert(0) += 1;
        std::thread::sleep(Duration::from_millis(rng.below(800)));
    }
    stop.store(true, Ordering::Relaxed);
    let healed = Instant::now();
    let lost: u64 = clients.into_iter().map(|client| client.join().expect("a client")).sum();
    assert!(healed.elapsed() < GOES_ON_WITHIN, "healed, and it took {:?} to go on", healed.elapsed());
    let checked = with(&recorder, |recorder| recorder.check()).unwrap_or_else(|what| panic!("{what}"));
    println!(
        "{} histories of {} operations linearizable and {} undecided; {} operations of unknown outcome; the judge spent up to {} \
         millionths of what it may on one; {lost} sessions given up or lost, and lockd said so of each; lockds {faults:?}",
        checked.histories - checked.undecided,
        checked.operations,
        checked.undecided,
        checked.unknown,
        checked.spent_ppm
    );
    assert!(checked.undecided == 0 || seconds > SECONDS, "the judge of histories gave up: {checked:?}");
    assert!(checked.operations > 200, "too few operations: {checked:?}");
}
