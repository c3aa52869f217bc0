//! Deliberate breaks of safety rules: the campaign must see a law broken, within [`WORLDS`] worlds, for each of them. A
//! campaign that cannot fail shows nothing. The worlds of a canary are shaped so that its rule matters often; the checks
//! are those of every world. Only with the cargo feature `canary`.

#![cfg(feature = "canary")]

use std::time::Duration;

use csnap_client::core::{Canaries as ClientCanaries, Canary as ClientCanary};
use csnap_server::core::canary::{Broken, Canary as CoreCanary};
use csnap_server::term::canary::{Canaries as TermCanaries, Canary as TermCanary};
use csnap_storage::sim::OperationKind;
use csnap_tests::campaign;
use csnap_tests::plan::{Canaries, Fault, Plan, Slow, Spot};

/// Worlds within which each is caught.
const WORLDS: u64 = 200;

fn term(canary: TermCanary) -> Canaries {
    Canaries { term: TermCanaries::breaking([canary]), ..Canaries::default() }
}

fn core(canary: CoreCanary) -> Canaries {
    Canaries { core: Broken::rule(canary), ..Canaries::default() }
}

fn client(canary: ClientCanary) -> Canaries {
    Canaries { client: ClientCanaries::of(&[canary]), ..Canaries::default() }
}

/// Small, busy worlds with these faults, about so many microseconds apart.
fn busy(plan: Plan, faults: &[Fault], every: u64) -> Plan {
    let plan = plan.with_one_lockd();
    let mut plan = Plan { faults: faults.to_vec(), fault_every: every, storm: 20_000_000, ..plan };
    plan.work.volumes.truncate(2);
    plan.work.volumes.iter_mut().for_each(|(chunk, blocks)| (*chunk, *blocks) = (4096, 64));
    plan.work.readers = 2;
    plan.work.think = 6_000;
    plan.work.depth = 3;
    plan.work.create_every = 600_000;
    plan.work.operate_every = 500_000;
    plan.work.hot_blocks = 32;
    plan.slow = Slow::default();
    plan.client_lease = Duration::from_millis(1500);
    plan
}

/// Writes of the head that are under way when an Advice comes.
fn slow_writes(plan: Plan) -> Plan {
    Plan { slow: Slow { head_write: 60_000, ..Slow::default() }, ..plan }
}

/// Reads of the head that a grant overtakes.
fn slow_reads(plan: Plan) -> Plan {
    Plan { slow: Slow { head_read: 100_000, ..Slow::default() }, ..plan }
}

/// Runs worlds until one sees a law broken; says how many it took.
fn is_caught(name: &str, canaries: &Canaries, shape: impl Fn(Plan) -> Plan + Sync) {
    let report = campaign::run(1..1 + WORLDS, 1, |plan| Plan { canaries: canaries.clone(), ..shape(plan) });
    let Some(first) = report.failures.first() else { panic!("{name} was not caught in {WORLDS} worlds") };
    println!("{name}: caught after {} worlds, by seed {}: {}", report.worlds, first.seed, first.what);
}

#[test]
fn canary_acknowledge_before_sync() {
    is_caught("acknowledge before sync", &term(TermCanary::AcknowledgeBeforeSync), |plan| {
        busy(plan, &[Fault::PowerLoss], 2_000_000)
    });
}

#[test]
fn canary_act_without_the_gate() {
    is_caught("act without the gate", &term(TermCanary::ActWithoutGate), |plan| {
        busy(plan, &[Fault::PauseNode, Fault::HitService], 3_000_000)
    });
}

#[test]
fn canary_gate_read_before_the_sync() {
    is_caught("gate read before the sync", &term(TermCanary::GateBeforeSync), |plan| {
        busy(plan, &[Fault::HitService, Fault::PauseNode], 2_000_000)
    });
}

#[test]
fn canary_look_for_the_seal_before_closing_the_gate() {
    // One server before it seals, while another is between its two looks.
    let before_the_seal = Spot::At(OperationKind::Stat, "/journal-0");
    let at_the_gate = Spot::At(OperationKind::Open, "/gate");
    is_caught("look for the Seal before closing the gate", &term(TermCanary::SealBeforeGate), |plan| {
        let plan = busy(plan, &[Fault::FreezeTakeover, Fault::SlowDisk], 1_000_000);
        Plan { freeze: Some((before_the_seal, at_the_gate)), ..plan }
    });
}

#[test]
fn canary_two_successors() {
    is_caught("two successors", &term(TermCanary::TwoSuccessors), |plan| {
        busy(plan, &[Fault::FreezeTakeover, Fault::HitTakeover], 2_000_000)
    });
}

#[test]
fn canary_start_the_walk_anywhere() {
    is_caught("start the walk anywhere", &term(TermCanary::StartAnywhere), |plan| {
        busy(plan, &[Fault::HitTakeover], 2_000_000)
    });
}

#[test]
fn canary_confirm_a_create_without_draining_anew() {
    is_caught("confirm a create without draining anew", &core(CoreCanary::NotDrainedAnew), |plan| {
        slow_writes(busy(plan, &[Fault::KillServer, Fault::Cut, Fault::Cut], 300_000))
    });
}

#[test]
fn canary_answer_a_known_advice_at_once() {
    is_caught("answer a known advice at once", &client(ClientCanary::AdviceNotAnew), |plan| {
        slow_writes(busy(plan, &[Fault::KillServer, Fault::Cut, Fault::Cut], 300_000))
    });
}

#[test]
fn canary_copy_out_after_the_overwrite() {
    is_caught("copy-out after the overwrite", &core(CoreCanary::GrantBeforeCopy), |plan| busy(plan, &[], 1));
}

#[test]
fn canary_skip_the_drain() {
    is_caught("skip the drain on create", &core(CoreCanary::SkipDrain), |plan| busy(plan, &[], 1));
}

#[test]
fn canary_answer_an_advice_without_a_drain() {
    is_caught("answer an advice without a drain", &client(ClientCanary::AdviceWithoutDrain), |plan| {
        slow_writes(busy(plan, &[], 1))
    });
}

#[test]
fn canary_drain_without_a_sync() {
    is_caught("drain without a sync", &client(ClientCanary::DrainWithoutSync), |plan| {
        busy(plan, &[Fault::PowerLoss], 1_000_000)
    });
}

#[test]
fn canary_keep_what_was_unique_over_an_advice() {
    is_caught("keep what was unique over an advice", &client(ClientCanary::KeepUniqueOverAdvice), |plan| {
        busy(plan, &[], 1)
    });
}

#[test]
fn canary_complete_a_read_at_message_2() {
    is_caught("complete a read at message 2", &client(ClientCanary::CompleteReadAtMessage2), |plan| {
        slow_reads(busy(plan, &[], 1))
    });
}

#[test]
fn canary_confirm_a_broken_mark() {
    is_caught("confirm a broken mark", &core(CoreCanary::ConfirmBrokenMark), |plan| {
        slow_reads(busy(plan, &[], 1))
    });
}

#[test]
fn canary_take_a_retry_for_an_ok() {
    is_caught("take a Retry for an Ok", &client(ClientCanary::ConfirmBrokenMark), |plan| {
        slow_reads(busy(plan, &[], 1))
    });
}

/// A client that finishes a read on whatever connection it has.
fn finishing_elsewhere(plan: Plan) -> Plan {
    let plan = busy(plan, &[Fault::Cut], 200_000);
    Plan { slow: Slow { head_read: 1_000_000, ..Slow::default() }, ..plan }
}

#[test]
fn canary_confirm_on_another_connection() {
    let canaries = Canaries {
        core: Broken::rule(CoreCanary::ConfirmElsewhere),
        ..client(ClientCanary::FinishElsewhere)
    };
    is_caught("confirm on another connection", &canaries, finishing_elsewhere);
}

#[test]
fn canary_alone_a_client_that_finishes_elsewhere_does_no_harm() {
    let canaries = client(ClientCanary::FinishElsewhere);
    let report =
        campaign::run(1..20, 1, |plan| Plan { canaries: canaries.clone(), ..finishing_elsewhere(plan) });
    assert!(report.failures.is_empty(), "{:?}", report.failures);
}

#[test]
fn canary_reuse_held_space() {
    is_caught("reuse held space", &core(CoreCanary::ReuseHeldSpace), |plan| {
        let mut plan = busy(plan, &[Fault::Cut, Fault::Partition, Fault::PauseExporter], 700_000);
        plan.slow = Slow { store_read: 2_000_000, ..Slow::default() };
        plan.work.forced = 1.0;
        plan.work.readers = 4;
        plan.work.operate_every = 200_000;
        plan
    });
}

#[test]
fn canary_apply_a_resend_twice() {
    is_caught("apply a resend twice", &core(CoreCanary::ApplyTwice), |plan| {
        let mut plan = busy(plan, &[Fault::Cut, Fault::KillServer], 150_000);
        plan.work.operate_every = 100_000;
        plan
    });
}

#[test]
fn canary_share_an_earlier_sync() {
    is_caught("let a flush share an earlier sync", &client(ClientCanary::FlushSharesEarlierSync), |plan| {
        let mut plan = busy(plan, &[Fault::PowerLoss], 1_000_000);
        plan.work.depth = 6;
        plan.work.think = 1_000;
        plan
    });
}
