//! The same agents on a played etcd: between each agent's lockd client and etcd stands the session that ships.

use std::time::Duration;

use csnap_lockd::client::{ClientInput, ClientOutput};
use csnap_proto::message::local::{FromAgent, ToAgent};
use csnap_proto::{Name, Term};
use proptest::prelude::*;

use super::super::{Failback, Input, SERVER_LOCK};
use super::chaos::{NODES, apply, end_faults, fault};
use super::world::{Event, FAILBACK, LEASE, NET, World};
use crate::etcd::tests::model::{Done, Etcd};
use crate::etcd::{self, Call, News, Output, Revision, Session};

/// The lease that etcd gives.
const ETCD_LEASE: Duration = Duration::from_secs(2);

/// A lease that ends, the news of it, and a takeover.
const NODE_LOSS: Duration = Duration::from_millis(2100);

/// Of one life of an agent.
pub(super) struct EtcdLink {
    session: Session,
    attempt: Option<u64>,
    watch: Option<Revision>,
}

impl EtcdLink {
    pub(super) fn new() -> Self {
        Self { session: Session::new(SERVER_LOCK), attempt: None, watch: None }
    }

    pub(super) fn next_deadline(&self) -> Option<csnap_proto::Time> {
        self.session.next_deadline()
    }
}

/// On its way between an agent and etcd, on the connection of an attempt.
pub(super) enum OnWire {
    Call(Call),
    Input(etcd::Input),
}

impl World {
    /// A node for each priority, all started, on etcd.
    fn on_etcd(priorities: &[u32], failback: Failback) -> Self {
        let mut world = Self::cold(priorities, failback);
        world.etcd = Some(Etcd::default());
        (0..priorities.len()).for_each(|n| world.start_agent(n));
        world
    }

    pub(super) fn etcd_output(&mut self, n: usize, output: ClientOutput) {
        let reachable = !self.nodes[n].cut && self.lockd.is_some();
        let link = self.nodes[n].etcd.as_mut().expect("it runs on etcd");
        match output {
            ClientOutput::Connect { attempt } => {
                (link.attempt, link.watch) = (reachable.then_some(attempt), None);
                self.etcd_step(n, etcd::Input::Disconnected);
                let input = if reachable {
                    self.etcd_step(n, etcd::Input::Connected);
                    ClientInput::Connected { attempt }
                } else {
                    ClientInput::Disconnected { attempt }
                };
                self.agent(n, NET, Input::Lockd(input));
            }
            ClientOutput::Disconnect { attempt } if link.attempt == Some(attempt) => {
                (link.attempt, link.watch) = (None, None);
                self.etcd_step(n, etcd::Input::Disconnected);
            }
            ClientOutput::Send { attempt, frame } if link.attempt == Some(attempt) => {
                self.etcd_step(n, etcd::Input::Frame(frame));
            }
            ClientOutput::Disconnect { .. } | ClientOutput::Send { .. } => {}
            ClientOutput::Moved { to } => panic!("etcd has no other group, and not {to:?}"),
            ClientOutput::Event(event) => panic!("the core keeps events to itself: {event:?}"),
        }
    }

    pub(super) fn etcd_step(&mut self, n: usize, input: etcd::Input) {
        let Some(link) = &mut self.nodes[n].etcd else { return };
        let mut out = Vec::new();
        link.session.step(self.now, input, &mut out);
        let attempt = link.attempt;
        for output in out {
            match (output, attempt) {
                (Output::Frame(frame), Some(attempt)) => {
                    let input = Input::Lockd(ClientInput::Received { attempt, frame });
                    self.agent(n, Duration::ZERO, input);
                }
                (Output::Call(call), Some(attempt)) => self.wire(n, attempt, OnWire::Call(call)),
                (Output::Drop(why), _) => panic!("etcd is played well: {why}"),
                (Output::Doubt(_) | Output::Frame(_) | Output::Call(_), _) => {}
            }
        }
    }

    /// etcd goes away.
    pub(super) fn drop_etcd_link(&mut self, n: usize) {
        let Some(link) = &mut self.nodes[n].etcd else { return };
        link.watch = None;
        if let Some(attempt) = link.attempt.take() {
            self.etcd_step(n, etcd::Input::Disconnected);
            self.agent(n, NET, Input::Lockd(ClientInput::Disconnected { attempt }));
        }
    }

    fn wire(&mut self, n: usize, attempt: u64, what: OnWire) {
        let life = self.nodes[n].life;
        self.push(NET, Event::Etcd(n, life, attempt, what));
    }

    /// Something arrives, if both ends are there. A call that left before the cut may take effect, unheard.
    pub(super) fn arrive(&mut self, n: usize, life: u32, attempt: u64, what: OnWire) {
        match what {
            OnWire::Call(call) => {
                let Some(etcd) = self.etcd.as_mut().filter(|_| self.lockd.is_some()) else { return };
                let done = etcd.call(self.now, call);
                let ours = self.nodes[n].life == life;
                let link = self.nodes[n].etcd.as_mut().filter(|link| ours && link.attempt == Some(attempt));
                match (done, link) {
                    (Done::WatchFrom(from), Some(link)) => link.watch = Some(from),
                    (Done::Answer(answer), Some(_)) => {
                        self.wire(n, attempt, OnWire::Input(etcd::Input::Answer(answer)));
                    }
                    (Done::News(news), Some(_)) => {
                        self.wire(n, attempt, OnWire::Input(etcd::Input::News(news)));
                    }
                    (_, None) => {}
                }
                self.tell_watchers();
            }
            OnWire::Input(input) => {
                let link = self.nodes[n].etcd.as_ref().filter(|link| link.attempt == Some(attempt));
                if link.is_some() && self.nodes[n].life == life && !self.nodes[n].cut {
                    self.etcd_step(n, input);
                }
            }
        }
    }

    pub(super) fn tell_watchers(&mut self) {
        for n in 0..self.nodes.len() {
            let Some(etcd) = &self.etcd else { return };
            let Some(link) = &mut self.nodes[n].etcd else { continue };
            let (Some(from), Some(attempt)) = (link.watch, link.attempt) else { continue };
            let news = etcd.watch(from);
            match &news {
                News::Changes(entries) => match entries.last() {
                    Some(last) => link.watch = Some(last.written + 1),
                    None => continue,
                },
                _ => link.watch = None,
            }
            self.wire(n, attempt, OnWire::Input(etcd::Input::News(news)));
        }
    }

    /// Time passed for etcd and for the sessions.
    pub(super) fn etcd_tick(&mut self) {
        if let Some(etcd) = self.etcd.as_mut().filter(|_| self.lockd.is_some()) {
            etcd.expire(self.now);
            self.tell_watchers();
        }
        for n in 0..self.nodes.len() {
            let due = self.nodes[n].etcd.as_ref().and_then(EtcdLink::next_deadline);
            if due.is_some_and(|due| due <= self.now) {
                self.etcd_step(n, etcd::Input::Tick);
            }
        }
    }
}

fn name(n: usize) -> Name {
    Name::new(format!("n{}", n + 1)).expect("a name")
}

/// Three nodes, the best one serving.
fn world() -> World {
    let mut world = World::on_etcd(&[100, 50, 10], Failback::Auto);
    world.run(FAILBACK * 2);
    assert_eq!(world.settled(), 0);
    world
}

#[test]
fn a_dead_server_is_followed_within_milliseconds() {
    let mut world = world();
    world.kill_server(0);
    world.run_until(Duration::from_millis(10), "a successor", |world| world.serving() == [1]);
}

#[test]
fn a_lost_node_is_followed_after_its_lease() {
    let mut world = world();
    world.nodes[0].cut = true;
    world.run(ETCD_LEASE - Duration::from_millis(300));
    assert_eq!(world.serving(), [0], "never earlier");
    world.run_until(NODE_LOSS, "a successor", |world| world.serving().contains(&1));
    world.heal(0);
    world.run(FAILBACK * 3);
    assert_eq!(world.settled(), 0, "it came back, and got the server back");
}

#[test]
fn an_agent_that_is_killed_and_started_finds_its_session() {
    let mut world = world();
    world.kill_agent(0);
    world.run(Duration::from_millis(100));
    world.start_agent(0);
    world.run_until(Duration::from_millis(500), "a server", |world| !world.serving().is_empty());
}

#[test]
fn while_etcd_is_away_the_server_goes_on_and_keeps_its_term() {
    let mut world = world();
    let term = world.term();
    world.kill_lockd();
    world.run(ETCD_LEASE * 5);
    assert_eq!(world.server(), 0);
    world.start_lockd();
    world.run(ETCD_LEASE * 5);
    assert_eq!((world.settled(), world.term()), (0, term));
}

#[test]
fn an_operator_moves_the_server_and_sets_priorities() {
    let mut world = world();
    let asked = world.ask(1, ToAgent::MoveServer { node: name(2) });
    world.run(Duration::from_millis(100));
    assert_eq!(world.server(), 2);
    assert_eq!(world.answers(1, asked), [&FromAgent::Done]);
    let asked = world.ask(0, ToAgent::SetPriority { node: name(1), priority: 900 });
    world.run(FAILBACK + Duration::from_millis(500));
    assert_eq!(world.server(), 1);
    assert_eq!(world.answers(0, asked), [&FromAgent::Done]);
}

#[test]
fn after_a_restore_from_a_backup_somebody_serves_again_under_a_higher_term() {
    let mut world = world();
    let backup = world.etcd.clone();
    for n in [0, 1] {
        world.kill_server(n);
        world.run(FAILBACK * 2);
    }
    let before = world.term();
    assert!(before > Term(2));
    world.kill_lockd();
    world.etcd = backup;
    world.start_lockd();
    world.run(ETCD_LEASE * 5 + FAILBACK * 2);
    world.settled();
    assert!(world.term() >= before);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn once_the_faults_end_one_server_serves_and_all_know_it(
        faults in prop::collection::vec((fault(), 0..2_500u64), 1..25),
        compactions in any::<bool>(),
    ) {
        let mut world = World::on_etcd(&[100, 50, 10], Failback::Auto);
        for (fault, wait_ms) in &faults {
            apply(&mut world, fault);
            if compactions {
                world.etcd.as_mut().expect("it is on etcd").compact();
            }
            world.run(Duration::from_millis(*wait_ms));
        }
        end_faults(&mut world);
        world.run(LEASE * 4 + FAILBACK * 2);
        world.settled();
        let exporters: Vec<_> = world.nodes.iter().map(|node| node.exporter.is_some()).collect();
        prop_assert_eq!(exporters, vec![true; NODES]);
    }
}
