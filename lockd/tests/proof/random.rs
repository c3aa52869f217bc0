//! Random histories: the table and the model are given the same operations and must say the same, to everybody.

use std::collections::BTreeMap;

use csnap_lockd::core::table::{Command, Effect, Missed, Table};
use csnap_proto::message::lock::{
    Expect, Flags, KeyOp, LockEvent, LockOp, LockReply, Mode, Owner, ValueChange, Watched,
};
use csnap_proto::{EventNumber, LockId, Name, OwnerId, Revision, Secret, Sequence, SessionId};

use super::model::Model;
use super::tables::MODES;

const SESSIONS: u8 = 4;
const RESOURCES: [&str; 3] = ["r0", "r1", "r2"];
const KEYS: [&str; 6] = ["a", "a/b", "a/c", "b", "b/b", "c"];
const PREFIXES: [&str; 4] = ["", "a", "a/", "b/"];

/// Operations of one history; then another begins with an empty table.
const HISTORY: u64 = 4000;

/// splitmix64.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n.max(1) as u64).expect("below a usize")
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
}

fn session(n: u8) -> SessionId {
    SessionId([n + 1; 16])
}

fn open(n: u8) -> Command {
    let (session, node) = (session(n), Name::new(format!("n{n}")).expect("a name"));
    Command::Open { session, secret: Secret([n; 16]), node, lease_ms: 1000, info: vec![n] }
}

/// Two owners; one in eight shows a wrong secret.
fn owner(dice: &mut Dice) -> Owner {
    let n = u8::try_from(dice.below(2)).expect("small");
    let secret = if dice.one_in(8) { 9 } else { n };
    Owner { id: OwnerId([n; 16]), secret: Secret([secret; 16]) }
}

struct History {
    table: Table,
    model: Model,
    sequences: BTreeMap<SessionId, Sequence>,
    /// What each session was told since it began.
    told: BTreeMap<SessionId, Vec<LockEvent>>,
    last: Option<(Command, LockReply)>,
    tally: BTreeMap<&'static str, u64>,
}

impl History {
    fn new(table: Table) -> Self {
        let (model, sequences, told) = (Model::default(), BTreeMap::new(), BTreeMap::new());
        let mut history = Self { table, model, sequences, told, last: None, tally: BTreeMap::new() };
        for n in 0..SESSIONS {
            history.open(n);
        }
        history
    }

    fn open(&mut self, n: u8) {
        let Command::Open { session, node, info, .. } = open(n) else { unreachable!() };
        let effects = self.apply(open(n));
        self.model.open(session, node, info);
        self.sequences.insert(session, Sequence(0));
        self.told.insert(session, Vec::new());
        self.last = None;
        self.compare_events(effects);
    }

    fn apply(&mut self, command: Command) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.table.apply(command, &mut effects);
        effects
    }

    /// Events of the table, session by session in their order and numbers, are those of the model.
    fn compare_events(&mut self, effects: Vec<Effect>) {
        let mut real: BTreeMap<SessionId, Vec<LockEvent>> = BTreeMap::new();
        for effect in effects {
            if let Effect::Event { session, number, event } = effect {
                let told = self.told.get_mut(&session).expect("a live session");
                told.push(event.clone());
                assert_eq!(number, EventNumber(told.len() as u64), "events are numbered without gaps");
                real.entry(session).or_default().push(event);
            }
        }
        let mut expected: BTreeMap<SessionId, Vec<LockEvent>> = BTreeMap::new();
        for (session, event) in std::mem::take(&mut self.model.events) {
            *self.tally.entry(name_of_event(&event)).or_default() += 1;
            expected.entry(session).or_default().push(event);
        }
        assert_eq!(real, expected);
    }

    fn end(&mut self, n: u8, expired: bool) {
        let session = session(n);
        let command = if expired { Command::Expire { session } } else { Command::Close { session } };
        let effects = self.apply(command);
        assert_eq!(effects.first(), Some(&Effect::Ended { session, expired }), "told before anybody else");
        self.model.end(session);
        self.told.remove(&session);
        self.last = None;
        self.compare_events(effects);
    }

    fn operate(&mut self, session: SessionId, op: LockOp) {
        let sequence = self.sequences[&session].next();
        self.sequences.insert(session, sequence);
        let command = Command::Operate { session, sequence, lowest_unanswered: sequence, op: op.clone() };
        let effects = self.apply(command.clone());
        let answers: Vec<&LockReply> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Answer { session: to, sequence: of, reply } if (*to, *of) == (session, sequence) => {
                    Some(reply)
                }
                _ => None,
            })
            .collect();
        let [reply] = answers[..] else { panic!("one answer, not {answers:?}") };
        let reply = reply.clone();
        let expected = self.model.operate(session, &op);
        match (&reply, &expected) {
            (LockReply::Invalid(_), LockReply::Invalid(_)) => {}
            _ => assert_eq!(reply, expected, "{op:?}"),
        }
        *self.tally.entry(name_of_reply(&reply)).or_default() += 1;
        self.compare_events(effects);
        self.last = Some((command, reply));
    }

    /// An operation that is sent again changes nothing and is answered the same.
    fn resend(&mut self) {
        let Some((command, reply)) = self.last.clone() else { return };
        let before = self.table.clone();
        let effects = self.apply(command);
        assert!(
            matches!(&effects[..], [Effect::Answer { reply: again, .. }] if *again == reply),
            "{effects:?}"
        );
        assert_eq!(self.table, before);
    }

    /// What a session that comes back is told is what it was told before, from wherever it asks.
    fn resume(&self, dice: &mut Dice) {
        for (session, told) in &self.told {
            let kept = self.table.forgotten(*session).expect("live").0;
            let from = kept + dice.below(told.len() + 1 - usize::try_from(kept).expect("small")) as u64;
            let missed = self.table.missed(*session, EventNumber(from));
            let events = missed.into_iter().filter_map(|missed| match missed {
                Missed::Event(_, event) => Some(event),
                Missed::Answer(..) => None,
            });
            let expected = &told[usize::try_from(from).expect("small")..];
            assert_eq!(events.collect::<Vec<_>>(), expected);
        }
    }

    fn compare_all(&mut self) {
        assert_eq!(self.table.check(), Ok(()));
        assert!(self.model.is_at_rest(), "something grantable waits");
        assert_eq!(self.table.term(), self.model.term);
        for name in RESOURCES {
            assert_eq!(self.table.resource(name), self.model.resource(name), "{name}");
        }
        let bytes = postcard::to_stdvec(&self.table).expect("encodes");
        let back: Table = postcard::from_bytes(&bytes).expect("decodes");
        assert_eq!(back.check(), Ok(()));
    }

    fn step(&mut self, dice: &mut Dice) {
        let n = u8::try_from(dice.below(usize::from(SESSIONS))).expect("small");
        if !self.model.is_open(session(n)) {
            return self.open(n);
        }
        match dice.below(60) {
            0 => self.end(n, true),
            1 => self.end(n, false),
            2 | 3 => self.resend(),
            4 => {
                let told = self.told[&session(n)].len() as u64;
                let last_event = EventNumber(dice.next() % (told + 1));
                self.apply(Command::Seen { session: session(n), last_event });
            }
            _ => {
                let op = self.op(dice, n);
                self.operate(session(n), op);
            }
        }
    }

    /// Some lock: mostly the session's own, sometimes an orphan, anybody's, or none.
    fn lock(&self, dice: &mut Dice, n: u8) -> LockId {
        let from = match dice.below(16) {
            0 => self.model.own(None),
            1 => self.model.own(Some(session((n + 1) % SESSIONS))),
            _ => self.model.own(Some(session(n))),
        };
        if from.is_empty() { LockId(dice.next() % 50) } else { dice.pick(&from) }
    }

    fn op(&self, dice: &mut Dice, n: u8) -> LockOp {
        let mode = dice.pick(&MODES);
        let lock = self.lock(dice, n);
        match dice.below(40) {
            // Few locks a session, so that it also gets what it waits for.
            0..=9 if self.model.own(Some(session(n))).len() < 5 => {
                let owner = dice.one_in(4).then(|| owner(dice));
                LockOp::Lock { resource: dice.pick(&RESOURCES).into(), mode, flags: flags(dice, mode), owner }
            }
            0..=12 => LockOp::Unlock { lock, flags: unlock_flags(dice), value: value(dice) },
            13..=24 => {
                let value = if dice.one_in(3) { value(dice) } else { ValueChange::Keep };
                LockOp::Convert { lock, mode, flags: flags(dice, mode), value }
            }
            25..=27 => LockOp::Cancel { lock },
            28 | 29 => {
                let orphans = self.model.own(None);
                let lock = if orphans.is_empty() || dice.one_in(4) { lock } else { dice.pick(&orphans) };
                LockOp::Adopt { lock, owner: owner(dice) }
            }
            30 => LockOp::Break { lock },
            31 => LockOp::Watch { what: watched(dice), once: dice.one_in(2) },
            32 => LockOp::Unwatch { what: watched(dice) },
            33 => LockOp::SetInfo { info: vec![n, u8::try_from(dice.below(256)).expect("a byte")] },
            34 => LockOp::Show { resource: dice.pick(&RESOURCES).into() },
            35 => LockOp::Locks { after: LockId(dice.next() % 4), orphans: dice.one_in(2) },
            _ => LockOp::Key(key_op(dice)),
        }
    }
}

fn unlock_flags(dice: &mut Dice) -> Flags {
    if dice.one_in(2) { Flags::FORCEUNLOCK } else { Flags::NONE }
}

/// None, one, or two at random; those that only go with one mode more often with it.
fn flags(dice: &mut Dice, mode: Mode) -> Flags {
    let any = |dice: &mut Dice| dice.pick(&Flags::ALL).1;
    match dice.below(8) {
        0..=3 => Flags::NONE,
        4 if mode == Mode::Nl => Flags::EXPEDITE,
        4..=6 => any(dice),
        _ => any(dice) | any(dice),
    }
}

fn value(dice: &mut Dice) -> ValueChange {
    match dice.below(6) {
        0 => ValueChange::Invalidate,
        1 => ValueChange::Write(Vec::new()),
        2 | 3 => ValueChange::Write(vec![u8::try_from(dice.below(256)).expect("a byte")]),
        _ => ValueChange::Keep,
    }
}

fn watched(dice: &mut Dice) -> Watched {
    match dice.below(5) {
        0 => Watched::Value(dice.pick(&RESOURCES).into()),
        1 => Watched::Grants(dice.pick(&RESOURCES).into()),
        2 => Watched::Key(dice.pick(&KEYS).into()),
        3 => Watched::Prefix(dice.pick(&PREFIXES).into()),
        _ => Watched::Members,
    }
}

fn key_op(dice: &mut Dice) -> KeyOp {
    let key: String = dice.pick(&KEYS).into();
    let version = Revision(dice.next() % 40);
    let expect = dice.pick(&[Expect::Any, Expect::Any, Expect::Absent, Expect::Version(version)]);
    match dice.below(8) {
        0..=3 => KeyOp::Put { key, value: vec![7; dice.below(4)], expect, ephemeral: dice.one_in(2) },
        4 | 5 => KeyOp::Delete { key, expect },
        6 => KeyOp::Get { key },
        _ => {
            let after = dice.one_in(2).then(|| dice.pick(&KEYS).into());
            KeyOp::List { prefix: dice.pick(&PREFIXES).into(), after }
        }
    }
}

fn name_of_reply(reply: &LockReply) -> &'static str {
    match reply {
        LockReply::Granted { told, .. } if told.demoted => "granted after a demotion",
        LockReply::Granted { told, .. } if told.alternate => "granted in the alternative mode",
        LockReply::Granted { .. } => "granted",
        LockReply::Queued { told, .. } if told.deadlock => "queued in a circle",
        LockReply::Queued { told, .. } if told.demoted => "queued and demoted",
        LockReply::Queued { .. } => "queued",
        LockReply::WouldBlock => "would block",
        LockReply::Deadlock => "deadlock",
        LockReply::Busy => "busy",
        LockReply::Broken(_) => "broken",
        LockReply::Invalid(_) => "invalid",
        LockReply::Key(_) => "key",
        _ => "done or told",
    }
}

fn name_of_event(event: &LockEvent) -> &'static str {
    match event {
        LockEvent::Granted { told, .. } if told.alternate => "event: granted in the alternative mode",
        LockEvent::Granted { .. } => "event: granted",
        LockEvent::Cancelled { .. } => "event: cancelled",
        LockEvent::Demoted { .. } => "event: demoted",
        LockEvent::Deadlock { .. } => "event: deadlock",
        LockEvent::Blocking { .. } => "event: blocking",
        LockEvent::Lost { .. } => "event: lost",
        LockEvent::Changed { .. } => "event: changed",
        LockEvent::Held { .. } => "event: held",
        LockEvent::Key { .. } => "event: key",
        LockEvent::MemberUp(_) | LockEvent::MemberDown { .. } => "event: member",
        LockEvent::Jeopardy | LockEvent::Overrun => "event: of the session",
    }
}

/// So many operations in histories of their own; says what happened in them.
pub(crate) fn run(
    operations: u64,
    first_seed: u64,
    table: impl Fn() -> Table,
) -> BTreeMap<&'static str, u64> {
    run_with(operations, first_seed, table, |_| {})
}

/// The same, with something that nobody may notice after each step.
pub(crate) fn run_with(
    operations: u64,
    first_seed: u64,
    table: impl Fn() -> Table,
    mut between: impl FnMut(&mut Table),
) -> BTreeMap<&'static str, u64> {
    let mut tally = BTreeMap::new();
    for (at, seed) in (first_seed..).enumerate() {
        let left = operations.saturating_sub(at as u64 * HISTORY);
        if left == 0 {
            return tally;
        }
        let mut dice = Dice(seed);
        let mut history = History::new(table());
        for step in 0..left.min(HISTORY) {
            history.step(&mut dice);
            between(&mut history.table);
            if step % 16 == 0 {
                history.compare_all();
                history.resume(&mut dice);
            }
        }
        for (what, count) in history.tally {
            *tally.entry(what).or_default() += count;
        }
    }
    tally
}

pub(crate) fn number(variable: &str, default: u64) -> u64 {
    let set = std::env::var(variable).ok();
    set.map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{variable} is not a number: {text}")))
}

#[test]
fn no_random_history_tells_the_table_from_the_model() {
    let operations = number("CSNAP_LOCK_OPERATIONS", 60_000);
    let tally = run(operations, number("CSNAP_LOCK_SEED", 1), Table::default);
    println!("{operations} random operations, no difference:");
    for (what, count) in &tally {
        println!("  {count:>9} {what}");
    }
    if operations >= 60_000 {
        for what in
            ["deadlock", "queued in a circle", "event: demoted", "event: deadlock", "event: lost", "broken"]
        {
            assert!(tally.contains_key(what), "the histories never came to: {what}");
        }
    }
}
