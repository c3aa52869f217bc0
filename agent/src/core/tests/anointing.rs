//! Who serves, and when.

use std::time::Duration;

use csnap_proto::message::local::{AgentStatus, FromAgent, ToAgent};
use csnap_proto::{Name, Term};

use super::super::{Failback, Input};
use super::played::Takeovers;
use super::world::{COLD_START, FAILBACK, LEASE, PING_TIMEOUT, PLACE_STEP, World};

/// News of a vacancy, a lock conversion, a takeover: all that a failover costs here beside waiting.
const FAST: Duration = Duration::from_millis(10);

fn name(n: usize) -> Name {
    Name::new(format!("n{}", n + 1)).expect("a name")
}

/// Three nodes, the best one serving.
fn world() -> World {
    let mut world = World::new(&[100, 50, 10], Failback::Auto);
    world.run(FAILBACK * 2);
    assert_eq!(world.settled(), 0);
    world
}

#[test]
fn the_best_ready_node_follows_a_dead_server_within_milliseconds() {
    let mut world = world();
    world.kill_server(0);
    let took = world.run_until(FAST, "a successor", |world| world.serving() == [1]);
    assert!(took < PLACE_STEP, "nobody waits for a rank that is not there: {took:?}");
}

#[test]
fn a_dead_server_is_not_shown_as_one_that_serves() {
    let mut world = world();
    let status = |world: &World| world.nodes[0].core.as_ref().expect("runs").status();
    let process = |status: &AgentStatus| status.nodes[0].info.server_pid;
    let served = status(&world);
    assert!(process(&served).is_some() && served.server.as_ref().is_some_and(|at| at.node == name(0)));
    world.kill_server(0);
    world.run_until(FAST, "a successor", |world| {
        let now = status(world);
        assert!(process(&now) == process(&served) || now.server != served.server, "{now:?}");
        world.serving() == [1]
    });
}

#[test]
fn a_better_node_that_stays_gets_the_server_back() {
    let mut world = world();
    world.kill_server(0);
    world.run(FAST);
    assert_eq!(world.server(), 1);
    world.run(FAILBACK - Duration::from_millis(100));
    assert_eq!(world.server(), 1);
    world.run(Duration::from_millis(200));
    assert_eq!(world.server(), 0);
}

#[test]
fn with_manual_failback_the_server_stays() {
    let mut world = World::new(&[100, 50], Failback::Manual);
    world.run(Duration::from_secs(1));
    let first = world.settled();
    world.kill_server(first);
    world.run(FAILBACK * 3);
    assert_eq!(world.server(), 1 - first);
}

#[test]
fn a_dead_server_is_not_started_again_until_its_successor_serves() {
    let mut world = world();
    world.kill_server(0);
    world.run_until(FAST, "a successor", |world| {
        assert!(world.nodes[0].child.is_none() || world.serving() == [1]);
        world.serving() == [1]
    });
    world.run(FAST);
    assert!(world.nodes[0].child.is_some());
}

#[test]
fn ranks_decide_when_the_best_nodes_are_gone() {
    let mut world = world();
    world.kill_agent(1);
    world.run(LEASE * 2);
    world.kill_server(0);
    world.run_until(FAST, "the third serves", |world| world.serving() == [2]);
}

#[test]
fn a_frozen_server_is_replaced_after_the_ping_timeout() {
    let mut world = world();
    world.nodes[0].child.as_mut().expect("it serves").frozen = true;
    let took = world.run_until(PING_TIMEOUT * 2, "a successor", |world| world.serving() == [1]);
    assert!(took < PING_TIMEOUT + Duration::from_millis(150), "{took:?}");
}

#[test]
fn a_node_without_lockd_is_replaced_after_its_lease_and_comes_back_clean() {
    let mut world = world();
    world.nodes[0].cut = true;
    world.run(LEASE - Duration::from_millis(300));
    assert_eq!(world.server(), 0, "within the lease nothing happens");
    world.run(LEASE);
    assert_eq!(world.serving(), [0, 1], "the deposed one serves on until its gate or its agent stops it");
    let deposed = world.nodes[0].child.as_ref().expect("it serves").process;
    world.heal(0);
    world.run(LEASE);
    assert_ne!(world.nodes[0].child.as_ref().map(|child| child.process), Some(deposed), "its agent ended it");
    assert_eq!(world.server(), 1);
}

#[test]
fn a_lockd_that_comes_back_within_the_lease_or_later_changes_nothing() {
    for away in [Duration::from_millis(500), LEASE * 4] {
        let mut world = world();
        let term = world.term();
        world.kill_lockd();
        world.run(away);
        assert_eq!((world.server(), world.term()), (0, term), "a server goes on without lockd");
        world.start_lockd();
        world.run(LEASE * 4);
        assert_eq!((world.server(), world.term()), (0, term));
    }
}

#[test]
fn a_server_that_dies_while_lockd_is_away_is_replaced_when_lockd_is_back() {
    let mut world = world();
    world.kill_lockd();
    world.run(Duration::from_millis(300));
    world.kill_server(0);
    world.run(Duration::from_secs(1));
    assert_eq!(world.serving(), []);
    world.start_lockd();
    world.run_until(LEASE * 2, "a successor", |world| world.serving().len() == 1);
}

#[test]
fn an_agent_that_restarts_takes_its_session_up_and_gives_the_lock_of_its_dead_server_back() {
    let mut world = world();
    let session = world.nodes[0].saved.as_ref().expect("saved").session;
    world.kill_agent(0);
    world.run(Duration::from_millis(20));
    assert_eq!(world.serving(), [], "the server goes with its agent");
    world.start_agent(0);
    let took = world.run_until(LEASE, "a successor", |world| world.serving().len() == 1);
    assert!(took < LEASE / 5, "nobody waits for the lease: {took:?}");
    assert_eq!(world.nodes[0].saved.as_ref().expect("saved").session, session);
}

#[test]
fn an_agent_that_does_not_come_back_is_replaced_after_its_lease() {
    let mut world = world();
    world.kill_agent(0);
    let took = world.run_until(LEASE * 2, "a successor", |world| world.serving() == [1]);
    assert!(took > LEASE / 2, "{took:?}");
}

#[test]
fn any_agent_moves_the_server_and_it_stays_where_it_was_sent() {
    for asked in 0..3 {
        let mut world = world();
        let conn = world.ask(asked, ToAgent::MoveServer { node: name(2) });
        let took = world.run_until(FAST, "the move", |world| world.serving() == [2]);
        assert!(took < PLACE_STEP, "{took:?}");
        world.run(Duration::from_millis(5));
        assert_eq!(world.answers(asked, conn), [&FromAgent::Done]);
        world.run(FAILBACK * 3);
        assert_eq!(world.server(), 2, "better nodes that were there already do not get it back");
    }
}

#[test]
fn a_move_to_a_node_that_dies_meanwhile_costs_one_step() {
    let mut world = world();
    world.ask(0, ToAgent::MoveServer { node: name(2) });
    world.kill_agent(2);
    world.run_until(FAST, "the hand-over", |world| world.serving().is_empty());
    let took = world.run_until(FAST + PLACE_STEP, "somebody serves", |world| world.serving() == [1]);
    assert!(took >= PLACE_STEP, "the target had its turn, then the best that is left: {took:?}");
}

#[test]
fn a_move_that_cannot_be_is_refused_with_the_reason() {
    let mut world = World::new(&[100, 0], Failback::Auto);
    world.settled();
    let unknown = world.ask(0, ToAgent::MoveServer { node: name(7) });
    let never = world.ask(0, ToAgent::MoveServer { node: name(1) });
    for conn in [unknown, never] {
        assert!(matches!(world.answers(0, conn)[..], [FromAgent::Failed { .. }]));
    }
    let here = world.ask(0, ToAgent::MoveServer { node: name(0) });
    assert_eq!(world.answers(0, here), [&FromAgent::Done]);
}

#[test]
fn priority_zero_never_serves() {
    let mut world = World::new(&[0, 0], Failback::Auto);
    world.run(Duration::from_secs(20));
    assert_eq!(world.anointed, []);
    let why = world.nodes[0].core.as_ref().expect("runs").status().vacancy.expect("nobody serves");
    assert!(why.contains("priority 0"), "{why}");
}

#[test]
fn a_priority_is_set_from_any_node_and_outlives_the_agent() {
    let mut world = world();
    let conn = world.ask(1, ToAgent::SetPriority { node: name(2), priority: 500 });
    world.run(FAST);
    assert_eq!(world.answers(1, conn), [&FromAgent::Done]);
    world.run(FAILBACK * 2);
    assert_eq!(world.server(), 2, "it is the best now");
    world.kill_agent(2);
    world.start_agent(2);
    world.run(FAILBACK * 3);
    assert_eq!(world.server(), 2);
}

#[test]
fn an_agent_that_stops_drains_its_server_and_leaves_at_once() {
    let mut world = world();
    world.step(0, Input::Stop);
    let took = world.run_until(FAST, "a successor", |world| world.serving() == [1]);
    assert!(took < PLACE_STEP, "{took:?}");
    world.run_until(FAST, "the end", |world| world.nodes[0].stopped);
    assert!(world.nodes[0].exporter.is_some(), "the exporter stays");
    let alone = world.lockd.as_ref().expect("runs").table().members().len();
    assert_eq!(alone, 2, "its session is closed, not left to run out");
}

#[test]
fn an_agent_that_stops_starts_nothing_any_more() {
    let mut world = world();
    world.step(0, Input::Stop);
    let exporter = world.nodes[0].exporter.expect("runs");
    world.end(0, exporter);
    world.run_until(Duration::from_secs(4), "the end", |world| world.nodes[0].stopped);
    assert_eq!(world.nodes[0].exporters_started, 1);
    assert!(world.nodes[0].child.is_none());
}

#[test]
fn an_agent_that_was_stopped_itself_does_not_blame_its_server() {
    let mut world = world();
    let term = world.term();
    // Neither of them runs for a second; both go on together.
    world.now = world.now.after(Duration::from_secs(1));
    world.run(Duration::from_millis(300));
    assert_eq!((world.server(), world.term()), (0, term));
}

#[test]
fn every_reign_has_its_own_term() {
    let mut world = world();
    for _ in 0..20 {
        let server = world.settled();
        world.kill_server(server);
        world.run(Duration::from_millis(300));
    }
    let terms: Vec<_> = world.anointed.iter().map(|(term, _)| *term).collect();
    assert!(terms.len() > 20 && terms.is_sorted_by(|a, b| a < b), "{terms:?}");
    assert_ne!(terms[0], Term(0));
}

/// How often the node was anointed.
fn anointments(world: &World, n: usize) -> usize {
    world.anointed.iter().filter(|(_, node)| *node == n).count()
}

#[test]
fn a_node_that_cannot_take_over_leaves_its_turn_to_the_next_and_says_so() {
    let mut world = World::new(&[100, 50], Failback::Auto);
    world.nodes[0].takeovers = Takeovers::Fail;
    world.run(Duration::from_secs(600));
    assert_eq!(world.server(), 1);
    let attempts = anointments(&world, 0);
    assert_eq!(attempts, 2, "once may be chance");
    let status = world.nodes[1].core.as_ref().expect("runs").status();
    let trouble =
        status.nodes.iter().find_map(|node| node.info.trouble.clone()).expect("shown on every node");
    assert!(trouble.contains("in a row"), "{trouble}");
    assert!(trouble.contains("csnap server move"), "what to do about it: {trouble}");
    world.nodes[0].takeovers = Takeovers::Work;
    world.run(Duration::from_secs(600));
    assert_eq!(world.server(), 1, "whether its trouble is over is not found out at the guests' expense");
    world.ask(1, ToAgent::MoveServer { node: name(0) });
    world.run(FAILBACK);
    assert_eq!(world.server(), 0, "an operator may say so");
    assert_eq!(world.nodes[0].core.as_ref().expect("runs").status().nodes[0].info.trouble, None);
    world.kill_server(0);
    world.run(FAILBACK * 2);
    assert_eq!(world.server(), 0, "it is the best again");
}

#[test]
fn a_node_in_trouble_serves_when_nobody_else_is_left() {
    let mut world = World::new(&[100, 50], Failback::Auto);
    world.nodes[0].takeovers = Takeovers::Fail;
    world.run(Duration::from_secs(60));
    assert_eq!(world.server(), 1);
    world.nodes[0].takeovers = Takeovers::Work;
    world.kill_agent(1);
    world.run(LEASE * 2 + Duration::from_secs(5));
    assert_eq!(world.server(), 0);
}

#[test]
fn a_better_node_whose_takeovers_hang_costs_one_pause() {
    let mut world = World::new(&[100, 50], Failback::Auto);
    world.nodes[0].takeovers = Takeovers::Hang;
    world.run(Duration::from_secs(40));
    assert_eq!(world.server(), 1);
    let term = world.term();
    world.run(Duration::from_secs(4 * 3600));
    assert_eq!((world.server(), world.term()), (1, term), "{:?}", world.anointed);
}

#[test]
fn a_node_whose_takeovers_hang_leaves_a_vacancy_to_the_others() {
    let mut world = World::new(&[100, 50, 10], Failback::Auto);
    world.nodes[0].takeovers = Takeovers::Hang;
    world.run(Duration::from_secs(120));
    for _ in 0..5 {
        assert_eq!(world.server(), 1);
        world.kill_server(1);
        world.run_until(FAST, "the third serves", |world| world.serving() == [2]);
        world.run(FAILBACK * 2);
    }
}

#[test]
fn takeovers_that_are_long_on_every_node_succeed_in_the_end() {
    let mut world = World::new(&[100, 50], Failback::Auto);
    world.nodes.iter_mut().for_each(|node| node.takeovers = Takeovers::Last(Duration::from_secs(100)));
    world.run(Duration::from_secs(900));
    let server = world.settled();
    let term = world.term();
    world.run(Duration::from_secs(900));
    assert_eq!((world.server(), world.term()), (server, term), "and whoever made it stays");
}

#[test]
fn the_only_node_goes_on_trying() {
    let mut world = World::new(&[100], Failback::Auto);
    world.nodes[0].takeovers = Takeovers::Fail;
    world.run(Duration::from_secs(60));
    assert!((10..=20).contains(&anointments(&world, 0)), "{:?}", world.anointed);
    let vacancy = world.nodes[0].core.as_ref().expect("runs").status().vacancy;
    assert!(vacancy.as_ref().is_some_and(|why| why.contains("in a row")), "{vacancy:?}");
    world.nodes[0].takeovers = Takeovers::Work;
    world.run(Duration::from_secs(12));
    assert_eq!(world.server(), 0, "its trouble has passed");
}

#[test]
fn at_a_cold_start_the_best_node_serves_first() {
    for failback in [Failback::Auto, Failback::Manual] {
        for (late, priorities) in [(2, [10, 50, 100]), (0, [100, 50, 10]), (1, [1, 1000, 1])] {
            let mut world = World::cold(&priorities, failback);
            for n in (0..3).filter(|n| *n != late) {
                world.start_agent(n);
            }
            world.run(Duration::from_millis(100));
            world.start_agent(late);
            world.run(FAILBACK * 2);
            assert_eq!((world.server(), world.anointed.len()), (late, 1), "{:?}", world.anointed);
        }
    }
}

#[test]
fn a_better_node_that_does_not_get_ready_is_not_waited_for_long() {
    let mut world = World::new(&[100, 50], Failback::Auto);
    world.never_gets_ready(0);
    let took = world.run_until(COLD_START, "the other serves", |world| world.serving() == [1]);
    assert!(took > Duration::from_millis(500), "it is waited for: {took:?}");
}

#[test]
fn a_node_that_served_last_waits_for_nobody_when_everything_starts_again() {
    let mut world = World::new(&[100], Failback::Auto);
    world.run(Duration::from_secs(1));
    world.kill_agent(0);
    world.nodes[0].saved = None;
    world.run(LEASE * 2);
    world.start_agent(0);
    world.run_until(FAST, "it serves", |world| world.serving() == [0]);
}

#[test]
fn a_takeover_that_hangs_is_given_up() {
    let mut world = World::new(&[100, 50], Failback::Manual);
    world.nodes[0].takeovers = Takeovers::Hang;
    world.run(Duration::from_secs(40));
    assert_eq!(world.server(), 1);
}

#[test]
fn a_release_that_the_network_swallowed_does_not_hold_the_agent_up() {
    let mut world = world();
    world.nodes[0].cut = true;
    world.kill_server(0);
    world.run(LEASE * 2);
    world.heal(0);
    world.run(FAILBACK * 2);
    assert_eq!(world.settled(), 0, "it is back, and the best");
}
