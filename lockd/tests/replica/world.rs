//! One world: replicas, their network and disks, under one clock and one seed.

use std::collections::BTreeMap;

use bytes::Bytes;
use csnap_lockd::canary::Canary;
use csnap_lockd::replica::{
    Base, ClusterId, Input, Member, Members, Output, PeerMessage, ReplicaConfig, ReplicaId, ReplicaLog,
};
use csnap_proto::Time;
use csnap_storage::sim::Rng;
use csnap_storage::sim::executor::run;

use crate::judge::{Judge, Machine, Tally};
use crate::net::{Net, Seat};
use crate::node::{NODE, Node, Process, options};
use crate::plan::Plan;

/// After the storm everything must be as it should within this, microseconds.
const HEALS_WITHIN: u64 = 8_000_000;

/// How often a process is busy when something comes.
const BUSY: f64 = 0.2;

#[derive(Debug)]
pub(crate) enum Event {
    Timer { seat: Seat, life: u64 },
    Disk { seat: Seat },
    Deliver { seat: Seat, bytes: Bytes },
    Start { seat: Seat },
    Propose,
    Operate,
    Fault,
    Mend,
    Heal,
}

pub(crate) type Verdict = Result<(), String>;

pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) rng: Rng,
    pub(crate) now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    scheduled: u64,
    pub(crate) nodes: Vec<Node>,
    /// Every replica that ever was, and where.
    pub(crate) seat_of: BTreeMap<ReplicaId, Seat>,
    pub(crate) net: Net,
    pub(crate) judge: Judge,
    pub(crate) healed: bool,
    proposals: u64,
}

impl World {
    /// # Errors
    /// What is not as it must be.
    pub(crate) fn run(plan: &Plan) -> Result<Tally, String> {
        let mut world = Self::new(plan.clone());
        world.form();
        let (propose, fault, end) = (plan.propose_every, plan.fault_every, plan.storm);
        for (after, event) in
            [(propose, Event::Propose), (fault, Event::Fault), (200_000, Event::Operate), (end, Event::Heal)]
        {
            world.later(after, event);
        }
        world.go_on_until(|world| world.healed)?;
        let (start, committed) = (world.now, world.judge.last_committed());
        world.go_on_until(|world| {
            world.now > start + HEALS_WITHIN || (world.now > start + 500_000 && world.is_whole(committed))
        })?;
        if world.now > start + HEALS_WITHIN {
            return Err(format!("healed, and does not go on: {}", world.describe()));
        }
        Ok(world.judge.tally)
    }

    fn new(plan: Plan) -> Self {
        let mut rng = Rng::new(plan.seed);
        let nodes = (0..plan.seats).map(|_| Node::new(rng.next_u64())).collect();
        let (queue, judge, net) = (BTreeMap::new(), Judge::default(), Net::default());
        let seat_of = BTreeMap::new();
        let (now, scheduled, proposals, healed) = (1_000_000, 0, 0, false);
        Self { plan, rng, now, queue, scheduled, nodes, seat_of, net, judge, healed, proposals }
    }

    /// The voters' disks are made; the first founds the group, the others learn of it.
    fn form(&mut self) {
        let (mut members, mut first) = (Members::new(), None);
        for seat in 0..self.plan.voters {
            let (fresh, broken) = (self.fresh_id(seat), self.plan.broken);
            let node = &mut self.nodes[seat];
            node.disk.set_stepped(false);
            let open = ReplicaLog::open(node.disk.storage(NODE), options(fresh, broken), |_| Base::empty());
            let (log, saved) = run(open).expect("an empty disk");
            node.disk.set_stepped(true);
            self.seat_of.insert(saved.id, seat);
            members.insert(saved.id, Member { address: seat.to_string(), voter: true });
            first.get_or_insert((log, saved));
        }
        let (mut log, saved) = first.expect("there are voters");
        self.nodes[0].disk.set_stepped(false);
        let base = Base::founding(ClusterId([9; 16]), members, Machine::default().encode());
        run(log.found(&saved, base)).expect("a sound disk");
        drop(log);
        self.nodes[0].disk.set_stepped(true);
        for seat in 0..self.plan.seats {
            self.later(seat as u64 * 1000, Event::Start { seat });
        }
    }

    /// A new disk has a new id, unless that rule is broken.
    pub(crate) fn fresh_id(&mut self, seat: Seat) -> [u8; 16] {
        if self.plan.broken.breaks(Canary::VoteAfterAmnesia) {
            return [u8::try_from(seat).expect("few") + 1; 16];
        }
        let mut id = [0; 16];
        id.chunks_exact_mut(8).for_each(|half| half.copy_from_slice(&self.rng.next_u64().to_le_bytes()));
        id
    }

    pub(crate) fn later(&mut self, after: u64, event: Event) {
        self.scheduled += 1;
        self.queue.insert((self.now + after, self.scheduled), event);
    }

    fn go_on_until(&mut self, done: impl Fn(&Self) -> bool) -> Verdict {
        while !done(self) {
            let ((at, _), event) = self.queue.pop_first().expect("something always happens");
            self.now = self.now.max(at);
            self.on_event(event)?;
        }
        Ok(())
    }

    fn on_event(&mut self, event: Event) -> Verdict {
        match event {
            Event::Timer { seat, life } => self.when_awake(seat, Event::Timer { seat, life }),
            Event::Deliver { seat, bytes } => self.when_awake(seat, Event::Deliver { seat, bytes }),
            Event::Disk { seat } => self.on_disk(seat),
            Event::Start { seat } => {
                self.start(seat);
                Ok(())
            }
            Event::Propose => self.propose(),
            Event::Operate => self.operate(),
            Event::Fault => self.strike(),
            Event::Mend => {
                self.net.mend();
                Ok(())
            }
            Event::Heal => self.heal(),
        }
    }

    /// What a frozen process is told waits until it thaws.
    fn when_awake(&mut self, seat: Seat, event: Event) -> Verdict {
        let wait = self.nodes[seat].frozen_until.saturating_sub(self.now);
        if wait > 0 {
            self.later(wait, event);
            return Ok(());
        }
        match event {
            Event::Timer { life, .. } if self.nodes[seat].life == life => {
                self.nodes[seat].timer = None;
                self.step(seat, Input::Tick)
            }
            Event::Deliver { bytes, .. } => {
                let message = PeerMessage::decode(&bytes).map_err(|what| format!("a message: {what}"))?;
                self.step_or_gather(seat, Input::Received(message))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn start(&mut self, seat: Seat) {
        if matches!(self.nodes[seat].process, Process::Down) {
            let (fresh, broken) = (self.fresh_id(seat), self.plan.broken);
            self.nodes[seat].start(fresh, broken);
            let opened = self.poll_opening(seat);
            debug_assert!(opened.is_ok(), "opening waits for the disk first");
            self.turn_disk(seat);
        }
    }

    fn config(&mut self) -> ReplicaConfig {
        ReplicaConfig { timing: self.plan.timing, seed: self.rng.next_u64(), broken: self.plan.broken }
    }

    /// A disk that has something to do does one thing after a while.
    pub(crate) fn turn_disk(&mut self, seat: Seat) {
        let node = &mut self.nodes[seat];
        if !node.disk_busy && !node.disk.pending().is_empty() {
            node.disk_busy = true;
            let took = 20 + self.rng.below(if self.healed { 300 } else { self.plan.sync });
            self.later(took, Event::Disk { seat });
        }
    }

    fn on_disk(&mut self, seat: Seat) -> Verdict {
        let node = &mut self.nodes[seat];
        node.disk_busy = false;
        node.disk.complete_next(&mut self.rng);
        self.poll_opening(seat)?;
        self.poll_write(seat)?;
        self.turn_disk(seat);
        Ok(())
    }

    fn poll_opening(&mut self, seat: Seat) -> Verdict {
        if !matches!(self.nodes[seat].process, Process::Opening(_)) {
            return Ok(());
        }
        let config = self.config();
        match self.nodes[seat].poll_opening(Time(self.now), config) {
            Ok(true) => {
                let id = self.nodes[seat].id.expect("it is open");
                self.seat_of.insert(id, seat);
                self.step(seat, Input::Tick)
            }
            Ok(false) => Ok(()),
            Err(error) => self.process_ends(seat, &error.to_string()),
        }
    }

    fn poll_write(&mut self, seat: Seat) -> Verdict {
        let Some(wrote) = self.nodes[seat].running().and_then(|running| running.poll()) else {
            return Ok(());
        };
        match wrote {
            Ok(wrote) => {
                if wrote.no_space.is_some() {
                    self.judge.tally.did("bases refused");
                }
                match wrote.number {
                    Some(number) => self.step(seat, Input::Durable { number }),
                    None => self.begin_write(seat),
                }
            }
            Err(error) => self.process_ends(seat, &error.to_string()),
        }
    }

    /// A process whose disk failed ends, and is started again; one whose disk is damaged is not.
    fn process_ends(&mut self, seat: Seat, why: &str) -> Verdict {
        if why.contains("damaged") {
            return Err(format!("a sound medium: {why}"));
        }
        self.judge.tally.did("ends by a failing disk");
        let node = &mut self.nodes[seat];
        node.stop();
        node.disk.crash_node(NODE);
        let after = 10_000 + self.rng.below(300_000);
        self.later(after, Event::Start { seat });
        Ok(())
    }

    pub(crate) fn step(&mut self, seat: Seat, input: Input) -> Verdict {
        let outputs = self.nodes[seat].step(Time(self.now), input);
        for output in outputs {
            self.carry_out(seat, output)?;
        }
        self.begin_write(seat)?;
        self.set_timer(seat);
        Ok(())
    }

    fn carry_out(&mut self, seat: Seat, output: Output) -> Verdict {
        let Some(running) = self.nodes[seat].running() else { return Ok(()) };
        let id = running.replica.id();
        match output {
            Output::Write(write) => running.keep(write),
            Output::Send(message) => return self.send(seat, &message),
            Output::Committed { index, command, own } => {
                if own && running.proposed.pop_front().as_ref() != Some(&command) {
                    return Err(format!("{id:?}: a proposal of its own was left out before {index}"));
                }
                running.machine.apply(index, &command);
                let machine = running.machine;
                return self.judge.on_committed(&machine, index, &command);
            }
            Output::Install(image) => {
                running.machine = Machine::decode(&image.state);
                self.judge.tally.did("installs");
                return self.judge.on_installed(&image);
            }
            Output::Leader { leader, term } if leader == Some(id) => return self.judge.on_leader(id, term),
            Output::Established { .. } => {
                running.proposed.clear();
                let applied = running.replica.applied();
                return self.judge.on_established(id, applied);
            }
            Output::Deposed => running.proposed.clear(),
            Output::Members(_) => self.judge.tally.did("changes"),
            Output::Refused(_) => self.judge.tally.did("refused operations"),
            Output::Leader { .. } => {}
        }
        Ok(())
    }

    fn send(&mut self, from: Seat, message: &PeerMessage) -> Verdict {
        self.judge.on_sent(message)?;
        let Some(to) = self.seat_of.get(&message.to).copied() else { return Ok(()) };
        for way in self.net.ways(&self.plan, from, to, &mut self.rng) {
            self.later(way, Event::Deliver { seat: to, bytes: message.encode() });
        }
        Ok(())
    }

    fn begin_write(&mut self, seat: Seat) -> Verdict {
        let Some(running) = self.nodes[seat].running() else { return Ok(()) };
        if running.wants_base() {
            let state = Bytes::from(running.machine.encode());
            self.judge.tally.did("rolls");
            return self.step(seat, Input::Compact { state });
        }
        running.begin_write();
        self.poll_write(seat)?;
        self.turn_disk(seat);
        Ok(())
    }

    fn set_timer(&mut self, seat: Seat) {
        let node = &mut self.nodes[seat];
        let Some(at) = node.replica().and_then(|replica| replica.next_deadline()) else { return };
        if node.timer.is_none_or(|set| at < set) {
            node.timer = Some(at);
            let (after, life) = (at.0.saturating_sub(self.now), node.life);
            self.later(after, Event::Timer { seat, life });
        }
    }

    fn propose(&mut self) -> Verdict {
        let every = 1 + self.rng.below(2 * self.plan.propose_every);
        self.later(every, Event::Propose);
        let leads = |node: &Node| node.replica().is_some_and(|replica| replica.is_established());
        let leaders: Vec<Seat> = (0..self.nodes.len()).filter(|seat| leads(&self.nodes[*seat])).collect();
        if leaders.is_empty() {
            return Ok(());
        }
        let seat = leaders[self.rng.index(leaders.len())];
        self.proposals += 1;
        let mut command = self.proposals.to_le_bytes().to_vec();
        let more = self.rng.below(self.plan.command_bytes);
        command.resize(8 + usize::try_from(more).expect("small"), 0xc5);
        let command = Bytes::from(command);
        let running = self.nodes[seat].running().expect("it leads");
        // What waits is the caller's to bound.
        if running.proposed.len() > 500 {
            return Ok(());
        }
        running.proposed.push_back(command.clone());
        self.step_or_gather(seat, Input::Propose(command))
    }

    /// A process takes in together what came while it was busy.
    fn step_or_gather(&mut self, seat: Seat, input: Input) -> Verdict {
        if !self.rng.chance(BUSY) {
            return self.step(seat, input);
        }
        let (wakes, life) = (1 + self.rng.below(200), self.nodes[seat].life);
        self.nodes[seat].gather(input);
        self.later(wakes, Event::Timer { seat, life });
        Ok(())
    }

    /// The established leader of the latest term.
    pub(crate) fn leader(&self) -> Option<Seat> {
        let established =
            |seat: &Seat| self.nodes[*seat].replica().filter(|replica| replica.is_established());
        let seats = (0..self.nodes.len()).filter(|seat| established(seat).is_some());
        seats.max_by_key(|seat| established(seat).map(|replica| replica.term()))
    }

    /// Somebody leads, new commands were committed, and every member has almost everything.
    fn is_whole(&self, committed: u64) -> bool {
        let Some(leader) = self.leader().and_then(|seat| self.nodes[seat].replica()) else { return false };
        let newest = self.judge.last_committed();
        let follows = |id: &ReplicaId| {
            let replica = self.seat_of.get(id).and_then(|seat| self.nodes[*seat].replica());
            replica.is_some_and(|replica| replica.id() == *id && replica.applied() > committed)
        };
        newest > committed && leader.members().keys().all(follows)
    }

    fn describe(&self) -> String {
        let mut text = format!("at {}, committed {}", self.now, self.judge.last_committed());
        for (seat, node) in self.nodes.iter().enumerate() {
            let state = match node.replica() {
                Some(replica) => format!(
                    "{:x} term {} leader {:x?} last {:?} applied {} members {:x?}",
                    replica.id().0,
                    replica.term(),
                    replica.leader().map(|id| id.0),
                    replica.last(),
                    replica.applied(),
                    replica.members().iter().map(|(id, member)| (id.0, member.voter)).collect::<Vec<_>>()
                ),
                None => "down".into(),
            };
            text += &format!("\n  seat {seat}: {state}");
        }
        text
    }
}
