//! One cell of the matrix: what goes wrong, when, and what a client was in the middle of. Then the lockspace must be at its
//! destination with everything that was in it, and go on there as if nothing had happened.

use csnap_lockd::client::{ClientEvent, Ticket};
use csnap_lockd::core::spaces::canary::Canary;
use csnap_lockd::replicated::Input;
use csnap_proto::message::lock::{
    Expect, Flags, KeyOp, KeyReply, LockEvent, LockOp, LockReply, LockView, Mode, Owner, SpaceReply,
    SpaceRequest, ValueBlock, ValueChange, Watched, Way,
};
use csnap_proto::{LockId, MigrationId, OwnerId, Secret, Term};

use crate::world::{LEASE_MS, Standing, Verdict, World};

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    ClientDisconnects,
    /// And never comes back.
    ClientDies,
    SourceCrashes,
    DestinationCrashes,
    SourceLeaderDies,
    SourceLeaderStepsAside,
    DestinationLeaderDies,
}

/// How far the move is then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    BeforeFreeze,
    Frozen,
    Imported,
    Forwarded,
    Activated,
}

/// What a client is in the middle of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Situation {
    Idle,
    QueuedWaiter,
    Converting,
    UnlockInFlight,
}

pub(crate) const PHASES: [Phase; 5] =
    [Phase::BeforeFreeze, Phase::Frozen, Phase::Imported, Phase::Forwarded, Phase::Activated];
pub(crate) const SITUATIONS: [Situation; 4] =
    [Situation::Idle, Situation::QueuedWaiter, Situation::Converting, Situation::UnlockInFlight];

/// One row of the matrix each, with the ways in which it may go.
pub(crate) const ROWS: [(&str, &[Fault]); 4] = [
    ("client disconnects", &[Fault::ClientDisconnects, Fault::ClientDies]),
    ("source crashes", &[Fault::SourceCrashes]),
    ("destination crashes", &[Fault::DestinationCrashes]),
    (
        "leader changes",
        &[Fault::SourceLeaderDies, Fault::SourceLeaderStepsAside, Fault::DestinationLeaderDies],
    ),
];

const MIGRATION: MigrationId = MigrationId([0xab; 16]);

/// Clients: the holder, two that wait or convert, and one that looks on and writes keys.
const HOLDER: usize = 0;
const FIRST: usize = 1;
const SECOND: usize = 2;
const WRITER: usize = 3;

/// Keys of four kilobytes, so that the lockspace travels in several pieces.
const KEYS: u8 = 12;

/// Keys that are written while it moves.
const WRITES: usize = 8;

/// Killed lockds start again after this, microseconds.
const BACK_AFTER: u64 = 350_000;

const SECOND_MICROS: u64 = 1_000_000;

pub(crate) struct Cell {
    world: World,
    fault: Fault,
    situation: Situation,
    /// The holder's lock, its term, and the one that is not given up.
    held: LockView,
    converting: Option<LockId>,
    blocking: Option<LockId>,
    writes: Vec<Ticket>,
    unlock: Option<Ticket>,
}

/// How long nobody was served.
pub(crate) struct Passed {
    pub(crate) frozen_micros: u64,
    /// How often several requests became one write.
    pub(crate) shared_writes: u64,
}

impl Cell {
    /// Runs it.
    pub(crate) fn run(
        name: &str,
        fault: Fault,
        phase: Phase,
        situation: Situation,
        broken: Option<Canary>,
    ) -> Result<Passed, String> {
        let mut cell = Self::begin(name, fault, situation, broken)?;
        if phase == Phase::BeforeFreeze {
            cell.strike()?;
        }
        cell.migrate();
        if phase != Phase::BeforeFreeze {
            cell.world.until(&format!("{phase:?}"), 5 * SECOND_MICROS, |world| reached(world, phase))?;
            cell.strike()?;
        }
        if matches!(phase, Phase::Forwarded | Phase::Activated) {
            // An operator who gives up too late is refused.
            let name = cell.world.name.clone();
            cell.world.ask(0, SpaceRequest::Abort { name });
        }
        cell.world.until("the move is over", 20 * SECOND_MICROS, |world| {
            world.standing(0) == Standing::Settled && world.standing(1) == Standing::Active
        })?;
        cell.check_answers()?;
        cell.check_arrived()?;
        cell.go_on()?;
        cell.check_end()?;
        let world = &cell.world;
        let (frozen, active) =
            (world.frozen_at.ok_or("never frozen")?, world.active_at.ok_or("never active")?);
        Ok(Passed { frozen_micros: active - frozen, shared_writes: world.shared_writes })
    }

    /// Everybody has what the situation says.
    fn begin(name: &str, fault: Fault, situation: Situation, broken: Option<Canary>) -> Result<Self, String> {
        let mut world = World::new(name, broken);
        world.until("both lead", 5 * SECOND_MICROS, |world| (0..2).all(|g| world.leader(g).is_some()))?;
        if name != "default" {
            let request = SpaceRequest::Create { name: world.name.clone() };
            require(world.asked(0, request)? == SpaceReply::Done, || "it was not made".into())?;
        }
        for n in 1..=4 {
            world.add_client(n);
        }
        let lock = |resource: &str, mode| LockOp::lock(resource, mode, Flags::NONE);
        let held = granted(&answer(&mut world, HOLDER, lock("r", Mode::Ex))?)?;
        answer(&mut world, HOLDER, LockOp::write(held.lock, Mode::Ex, b"here".to_vec()))?;
        let owner = Some(Owner { id: OwnerId([5; 16]), secret: Secret([6; 16]) });
        let persistent = LockOp::Lock { resource: "p".into(), mode: Mode::Pw, flags: Flags::NONE, owner };
        granted(&answer(&mut world, WRITER, persistent)?)?;
        answer(&mut world, WRITER, LockOp::watch(Watched::Value("r".into())))?;
        for n in 0..KEYS {
            let (key, value) = (format!("k/{n}"), vec![n; 4096]);
            let ephemeral = n == 0;
            let put = LockOp::Key(KeyOp::Put { key, value, expect: Expect::Absent, ephemeral });
            answer(&mut world, WRITER, put)?;
        }
        answer(&mut world, WRITER, LockOp::watch(Watched::Prefix("n/".into())))?;
        let (mut converting, mut blocking) = (None, None);
        match situation {
            Situation::Idle => {}
            Situation::QueuedWaiter | Situation::UnlockInFlight => {
                for client in [FIRST, SECOND] {
                    let reply = answer(&mut world, client, lock("r", Mode::Ex))?;
                    require(matches!(reply, LockReply::Queued { .. }), || format!("queued: {reply:?}"))?;
                }
            }
            Situation::Converting => {
                let reader = granted(&answer(&mut world, SECOND, lock("c", Mode::Pr))?)?;
                let own = granted(&answer(&mut world, FIRST, lock("c", Mode::Cr))?)?;
                let convert = LockOp::convert(own.lock, Mode::Pw, Flags::NONE);
                let reply = answer(&mut world, FIRST, convert)?;
                require(matches!(reply, LockReply::Queued { .. }), || format!("queued: {reply:?}"))?;
                (converting, blocking) = (Some(own.lock), Some(reader.lock));
            }
        }
        Ok(Self { world, fault, situation, held, converting, blocking, writes: Vec::new(), unlock: None })
    }

    fn migrate(&mut self) {
        let way = Way { migration: MIGRATION, to: self.world.addresses(1) };
        let name = self.world.name.clone();
        self.world.ask(0, SpaceRequest::Migrate { name, way });
    }

    /// The client that the situation is about.
    fn concerned(&self) -> usize {
        match self.situation {
            Situation::Idle | Situation::UnlockInFlight => HOLDER,
            Situation::QueuedWaiter | Situation::Converting => FIRST,
        }
    }

    fn is_dead(&self, client: usize) -> bool {
        self.fault == Fault::ClientDies && client == self.concerned()
    }

    /// What was to be in flight is, and then it goes wrong.
    fn strike(&mut self) -> Verdict {
        for n in 0..WRITES {
            let (key, value) = (format!("n/{}", n % 3), vec![u8::try_from(n).expect("few")]);
            let put = LockOp::Key(KeyOp::Put { key, value, expect: Expect::Any, ephemeral: false });
            let ticket = self.world.operate(WRITER, put);
            self.writes.push(ticket);
        }
        if self.situation == Situation::UnlockInFlight {
            let value = ValueChange::Write(b"bye".to_vec());
            self.unlock = Some(self.world.operate(HOLDER, LockOp::unlock(self.held.lock, value)));
            // On its way, or taken in and not answered.
            self.world.pass(400)?;
        }
        let seats = |world: &World, group: usize| -> Vec<crate::group::Seat> {
            (0..world.nodes[group].len()).map(|n| crate::group::Seat { group, n }).collect()
        };
        match self.fault {
            Fault::ClientDisconnects => {
                // Longer than an eighth of a lease, and shorter than all of it: then it has to search.
                let client = self.concerned();
                self.world.cut(client, LEASE_MS * 400);
            }
            Fault::ClientDies => {
                let client = self.concerned();
                self.world.cut(client, 0);
                self.world.clients[client].dead = true;
            }
            Fault::SourceCrashes | Fault::DestinationCrashes => {
                let group = usize::from(self.fault == Fault::DestinationCrashes);
                for seat in seats(&self.world, group) {
                    self.world.kill(seat, BACK_AFTER);
                }
            }
            Fault::SourceLeaderDies | Fault::DestinationLeaderDies => {
                let group = usize::from(self.fault == Fault::DestinationLeaderDies);
                let leader = self.world.leader(group).ok_or("nobody leads")?;
                self.world.kill(leader, 2 * BACK_AFTER);
            }
            Fault::SourceLeaderStepsAside => {
                let leader = self.world.leader(0).ok_or("nobody leads")?;
                let next = (leader.n + 1) % 3;
                let running = self.world.nodes[0][next].running.as_ref().ok_or("it runs")?;
                let to = running.core.replica().id();
                self.world.step(leader, Input::Transfer(to));
            }
        }
        Ok(())
    }

    /// What was asked for while it moved was done, once each, in order.
    fn check_answers(&mut self) -> Verdict {
        let writes = self.writes.clone();
        let mut last = u64::from(KEYS);
        for ticket in writes {
            let reply = wait_for(&mut self.world, WRITER, ticket)?;
            let LockReply::Key(KeyReply::Done { version }) = reply else {
                return Err(format!("a key was not written: {reply:?}"));
            };
            require(version.0 == last + 1, || format!("revision {version} after {last}"))?;
            last = version.0;
        }
        if let Some(ticket) = self.unlock.filter(|_| !self.is_dead(HOLDER)) {
            let reply = wait_for(&mut self.world, HOLDER, ticket)?;
            require(reply == LockReply::Done, || format!("the unlock: {reply:?}"))?;
        }
        Ok(())
    }

    /// Everything is there: keys, the persistent lock, who waits in which order.
    fn check_arrived(&mut self) -> Verdict {
        let list = LockOp::Key(KeyOp::List { prefix: "k/".into(), after: None });
        let LockReply::Key(KeyReply::Page { keys, .. }) = answer(&mut self.world, WRITER, list)? else {
            return Err("no list of keys".into());
        };
        let whole = keys.len() == usize::from(KEYS)
            && keys
                .iter()
                .all(|view| view.value.len() == 4096 && view.session.is_some() == (view.key == "k/0"));
        require(whole, || format!("{} keys arrived", keys.len()))?;
        let shown = answer(&mut self.world, WRITER, LockOp::Show { resource: "p".into() })?;
        let LockReply::Resource(view) = shown else { return Err(format!("{shown:?}")) };
        require(view.granted.len() == 1 && view.granted[0].holder.owner.is_some(), || {
            format!("the persistent lock: {view:?}")
        })?;
        Ok(())
    }

    /// Whoever waits gets it in turn, under terms that grow.
    fn go_on(&mut self) -> Verdict {
        let lease = (LEASE_MS + LEASE_MS / 10) * 1000 + SECOND_MICROS;
        match self.situation {
            Situation::Idle => {
                self.give_up_holder(lease)?;
                let lock = LockOp::lock("r", Mode::Ex, Flags::NONE);
                let reply = answer(&mut self.world, FIRST, lock)?;
                let LockReply::Granted { lock, value: Some(value), .. } = reply else {
                    return Err(format!("nobody holds it: {reply:?}"));
                };
                self.check_next(&lock, &value, self.held.term)
            }
            Situation::QueuedWaiter | Situation::UnlockInFlight => {
                if self.situation == Situation::QueuedWaiter {
                    if self.is_dead(FIRST) {
                        self.world.pass(lease)?;
                    }
                    self.give_up_holder(lease)?;
                }
                let mut term = self.held.term;
                let mut alive = vec![FIRST, SECOND];
                alive.retain(|client| !self.is_dead(*client));
                for client in alive {
                    let (lock, value) = wait_for_grant(&mut self.world, client, "r", lease)?;
                    self.check_next(&lock, &value, term)?;
                    term = lock.term;
                    if client == FIRST {
                        let early = grants(&self.world, SECOND, "r");
                        require(early == 0, || "the second before its turn".into())?;
                        let unlock = LockOp::unlock(lock.lock, ValueChange::Write(b"bye".to_vec()));
                        answer(&mut self.world, FIRST, unlock)?;
                    }
                }
                Ok(())
            }
            Situation::Converting => {
                let (own, blocking) = (self.converting.ok_or("converts")?, self.blocking.ok_or("blocks")?);
                if self.is_dead(FIRST) {
                    self.world.pass(lease)?;
                }
                answer(&mut self.world, SECOND, LockOp::unlock(blocking, ValueChange::Keep))?;
                if self.is_dead(FIRST) {
                    let lock = LockOp::lock("c", Mode::Ex, Flags::NONE);
                    return granted(&answer(&mut self.world, SECOND, lock)?).map(|_| ());
                }
                let (lock, _) = wait_for_grant(&mut self.world, FIRST, "c", lease)?;
                let right = lock.lock == own && lock.mode == Mode::Pw && lock.term > self.held.term;
                require(right, || format!("the conversion: {lock:?}"))
            }
        }
    }

    /// The holder unlocks, or its session ends.
    fn give_up_holder(&mut self, lease: u64) -> Verdict {
        if self.is_dead(HOLDER) {
            return self.world.pass(lease);
        }
        let unlock = LockOp::unlock(self.held.lock, ValueChange::Write(b"bye".to_vec()));
        let reply = answer(&mut self.world, HOLDER, unlock)?;
        require(reply == LockReply::Done, || format!("the holder held it: {reply:?}"))
    }

    /// The next holder's term is higher, and its value what the holder before left.
    fn check_next(&self, lock: &LockView, value: &ValueBlock, before: Term) -> Verdict {
        require(lock.term > before, || format!("term {} after {before}", lock.term))?;
        // One that died left nothing valid, unless its unlock had been taken in.
        let unlocked = value.valid && value.bytes == b"bye";
        let lost = !value.valid && value.bytes == b"here";
        let right = if self.is_dead(HOLDER) { unlocked || lost } else { unlocked };
        require(right, || format!("the value block: {value:?}"))
    }

    /// No session was lost but those of the dead, nothing was told twice, nothing was left out.
    fn check_end(&mut self) -> Verdict {
        for client in 0..self.world.clients.len() {
            let events = &self.world.clients[client].events;
            let lost = events.iter().find(|(_, event)| matches!(event, ClientEvent::SessionLost { .. }));
            if let Some((at, lost)) = lost.filter(|_| !self.is_dead(client)) {
                return Err(format!("client {client} at {at}: {lost:?}"));
            }
            let mut answered: Vec<Ticket> = events
                .iter()
                .filter_map(|(_, event)| match event {
                    ClientEvent::Answer { ticket, .. } => Some(*ticket),
                    _ => None,
                })
                .collect();
            let count = answered.len();
            answered.dedup();
            require(answered.len() == count && answered.is_sorted(), || {
                format!("client {client} was answered {answered:?}")
            })?;
        }
        let told = self.world.clients[WRITER].events.iter().filter_map(|(_, event)| match event {
            ClientEvent::Event(LockEvent::Key { revision, .. }) => Some(revision.0),
            _ => None,
        });
        let told: Vec<u64> = told.collect();
        let first = u64::from(KEYS) + 1;
        let expected: Vec<u64> = (first..first + WRITES as u64).collect();
        require(told == expected, || format!("changes of keys that were told: {told:?}"))?;
        let overrun = |event: &ClientEvent| matches!(event, ClientEvent::Event(LockEvent::Overrun));
        let overran = self.world.clients[WRITER].events.iter().any(|(_, event)| overrun(event));
        require(!overran, || "an overrun".into())
    }
}

fn reached(world: &World, phase: Phase) -> bool {
    let (source, destination) = (world.standing(0), world.standing(1));
    match phase {
        Phase::BeforeFreeze => true,
        Phase::Frozen => source == Standing::Frozen,
        Phase::Imported => destination == Standing::Imported,
        Phase::Forwarded => source == Standing::Forwarded,
        Phase::Activated => destination == Standing::Active,
    }
}

pub(crate) fn require(holds: bool, what: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(what()) }
}

pub(crate) fn granted(reply: &LockReply) -> Result<LockView, String> {
    match reply {
        LockReply::Granted { lock, .. } => Ok(lock.clone()),
        other => Err(format!("not granted: {other:?}")),
    }
}

fn answer_to(world: &World, client: usize, ticket: Ticket) -> Option<LockReply> {
    world.clients[client].events.iter().find_map(|(_, event)| match event {
        ClientEvent::Answer { ticket: of, reply, .. } if *of == ticket => Some(reply.clone()),
        _ => None,
    })
}

pub(crate) fn wait_for(world: &mut World, client: usize, ticket: Ticket) -> Result<LockReply, String> {
    world.until(&format!("client {client} is answered"), 10 * SECOND_MICROS, |world| {
        answer_to(world, client, ticket).is_some()
    })?;
    answer_to(world, client, ticket).ok_or_else(|| "looked at above".into())
}

pub(crate) fn answer(world: &mut World, client: usize, op: LockOp) -> Result<LockReply, String> {
    let ticket = world.operate(client, op);
    wait_for(world, client, ticket)
}

fn granted_event(event: &ClientEvent, resource: &str) -> Option<(LockView, ValueBlock)> {
    match event {
        ClientEvent::Event(LockEvent::Granted { lock, value: Some(value), .. })
            if lock.resource == resource =>
        {
            Some((lock.clone(), value.clone()))
        }
        _ => None,
    }
}

/// How often a queued request of the client was granted.
fn grants(world: &World, client: usize, resource: &str) -> usize {
    let events = &world.clients[client].events;
    events.iter().filter(|(_, event)| granted_event(event, resource).is_some()).count()
}

fn wait_for_grant(
    world: &mut World,
    client: usize,
    resource: &str,
    within: u64,
) -> Result<(LockView, ValueBlock), String> {
    world
        .until(&format!("client {client} is granted"), within, |world| grants(world, client, resource) > 0)?;
    let mut all = world.clients[client].events.iter().filter_map(|(_, e)| granted_event(e, resource));
    let first = all.next().ok_or("seen above")?;
    if all.next().is_some() { Err(format!("client {client} was granted it twice")) } else { Ok(first) }
}
