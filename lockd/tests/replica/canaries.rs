//! Deliberate breaks of safety rules: the worlds, or the log's own tests, must see each. Only with the cargo feature
//! `canary`.

#![cfg(feature = "canary")]

use csnap_lockd::canary::{Broken, Canary};
use csnap_lockd::replica::{Base, ReplicaLog};
use csnap_storage::sim::executor::run;

use crate::alone::{Alone, command};
use crate::node::{NODE, options};
use crate::plan::{Fault, Plan};
use crate::world::World;

/// Worlds within which each is caught.
const WORLDS: u64 = 400;

/// Runs small, busy worlds with these faults until one sees a law broken; says how many it took.
fn is_caught(canary: Canary, faults: &[Fault]) {
    for seed in 1..=WORLDS {
        let drawn = Plan::draw(seed, Broken::rule(canary));
        let plan = Plan {
            voters: 3,
            seats: 3,
            faults: faults.to_vec(),
            fault_every: 60_000,
            propose_every: 3_000,
            sync: 15_000,
            delay: 3_000,
            ..drawn
        };
        let caught = std::panic::catch_unwind(|| World::run(&plan));
        let what = match caught {
            Ok(Ok(_)) => continue,
            Ok(Err(what)) if what.starts_with("healed") => continue,
            Ok(Err(what)) => what,
            Err(_) => "the library found it".into(),
        };
        println!("{canary:?}: caught after {seed} worlds: {what}");
        return;
    }
    panic!("{canary:?} was not caught in {WORLDS} worlds");
}

#[test]
fn canary_send_before_vote() {
    is_caught(Canary::SendBeforeVote, &[Fault::PowerLoss, Fault::Kill, Fault::Transfer]);
}

#[test]
fn canary_ack_before_sync() {
    is_caught(Canary::AckBeforeSync, &[Fault::PowerLoss, Fault::PowerLossOfAll]);
}

#[test]
fn canary_vote_after_amnesia() {
    is_caught(Canary::VoteAfterAmnesia, &[Fault::Amnesia, Fault::Cut, Fault::Kill]);
}

#[test]
fn canary_accept_torn_middle() {
    let disk = csnap_storage::sim::SimDisk::new(1);
    let mut alone = run(Alone::open(disk.storage(NODE))).expect("empty");
    for n in 0..4 {
        run(alone.propose(&[command(n)])).expect("writes");
    }
    drop(alone);
    disk.poke("log-1", 4096 + 70, &[0xff; 3]).expect("exists");
    let open = |broken| {
        let disk = disk.fork();
        run(ReplicaLog::open(disk.storage(NODE), options([7; 16], broken), |_| Base::empty()))
            .map(|opened| opened.1)
    };
    assert!(open(Broken::NONE).is_err(), "damage is refused");
    let saved = open(Broken::rule(Canary::AcceptTornMiddle)).expect("the rule is broken");
    assert!(saved.base.entries.len() < 5, "what was acknowledged is gone, and this test sees it");
}
