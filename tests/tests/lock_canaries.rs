//! Deliberate breaks of what lockd promises, and of what its users must do: the judges of the simulated worlds must notice
//! each. Only with the cargo feature `canary`.

#![cfg(feature = "canary")]

use csnap_lockd::broken::Broken;
use csnap_lockd::canary::Canary as LockdCanary;
use csnap_lockd::core::canary::Canary as TableCanary;
use csnap_tests::plan::{Canaries, Fault, Plan};
use csnap_tests::sim::HostId;
use csnap_tests::{campaign, mutex};

/// Worlds within which each is noticed.
const WORLDS: u64 = 200;

/// Three lockds, busy clients, and nobody else.
fn contended(seed_plan: Plan, canaries: Canaries, faults: &[Fault]) -> Plan {
    let mut plan = Plan { canaries, faults: faults.to_vec(), fault_every: 400_000, ..seed_plan };
    plan.lockds = (0..3).map(|seat| HostId(plan.nodes + seat)).collect();
    plan.hosts = plan.nodes + 3;
    plan.contenders = (3, 20_000);
    plan.storm = 8_000_000;
    plan.work.volumes.truncate(1);
    plan.work.readers = 0;
    plan
}

/// Worlds that may see something else broken first, by what follows from it.
const OTHERS: usize = 8;

/// Runs worlds until one sees the law broken that the rule is about.
fn noticed(name: &str, canaries: &Canaries, faults: &[Fault], says: &str) {
    let report = campaign::run(1..1 + WORLDS, OTHERS, |plan| contended(plan, canaries.clone(), faults));
    let Some(found) = report.failures.iter().find(|failure| failure.what.contains(says)) else {
        panic!("{name} was not noticed in {} worlds: {:?}", report.worlds, report.failures)
    };
    println!("{name}: noticed by seed {}, {} worlds: {}", found.seed, report.worlds, found.what);
}

#[test]
fn canary_read_without_the_log_is_not_linearizable() {
    let canaries = Canaries { lockd: Broken::rule(LockdCanary::ReadWithoutTheLog), ..Canaries::default() };
    // A leader whose clock stands still does not notice that nobody follows it.
    let faults = [Fault::ClockStops, Fault::PartitionLockds, Fault::PartitionLockds];
    noticed("read without the log", &canaries, &faults, "not linearizable");
}

#[test]
fn canary_a_term_given_again_is_not_linearizable() {
    let canaries = Canaries { table: Broken::rule(TableCanary::ReuseTermAfterDelete), ..Canaries::default() };
    noticed("a term given again", &canaries, &[Fault::KillLockd], "not linearizable");
}

#[test]
fn canary_acknowledge_before_sync_is_noticed() {
    let canaries = Canaries { lockd: Broken::rule(LockdCanary::AckBeforeSync), ..Canaries::default() };
    let report = campaign::run(1..1 + WORLDS, 1, |plan| {
        let faults = [Fault::PowerLoss, Fault::LockdPowerLoss, Fault::LockdPowerLoss];
        contended(plan, canaries.clone(), &faults)
    });
    let first = report.failures.first().expect("noticed");
    println!("acknowledge before sync: noticed after {} worlds: {}", report.worlds, first.what);
}

#[test]
fn canary_answer_when_gathered_is_not_linearizable() {
    let canaries = Canaries { lockd: Broken::rule(LockdCanary::AnswerWhenGathered), ..Canaries::default() };
    noticed(
        "answer when gathered",
        &canaries,
        &[Fault::KillLockd, Fault::LockdPowerLoss],
        "not linearizable",
    );
}

/// The same in worlds of a fenced register.
fn mutex_noticed(name: &str, canaries: &Canaries, says: &str) {
    let sum = mutex::run(1..1 + WORLDS, 1, |seed| mutex::plan(seed, canaries.clone()));
    let Some((seed, what)) = sum.failures.first() else {
        panic!("{name} was not noticed in {WORLDS} worlds")
    };
    println!("{name}: noticed after {} worlds, by seed {seed}: {what}", sum.worlds);
    assert!(what.contains(says), "{name}: noticed by somebody else: {what}");
}

#[test]
fn canary_a_register_that_does_not_look_at_terms_is_noticed() {
    let canaries = Canaries { careless_register: true, ..Canaries::default() };
    mutex_noticed("careless register", &canaries, "");
}

#[test]
fn canary_a_term_given_to_two_holders_is_noticed() {
    let canaries = Canaries { table: Broken::rule(TableCanary::ReuseTermAfterDelete), ..Canaries::default() };
    mutex_noticed("a term given again", &canaries, "was granted to");
}
