//! Every state of a small world: three owners, two resources, at most one lock of each owner on each resource, every
//! operation at every step. States that differ only in which owner or resource is which are one.
//!
//! What makes two states one here is what decides about the next grants: modes, queues with their flags, and whether the
//! value is there and valid. Left out are numbers (ids, terms, sequences), events that were told, and blocking notices:
//! numbers are checked at every step instead.
//!
//! Checked at every step: no two locks that do not go together are granted; nothing waits that could be granted; the value
//! is valid exactly as the step says; terms only grow, and every new writer has one of its own.

use std::hash::Hasher;

use csnap_lockd::core::table::{Command, Effect, Table};
use csnap_proto::message::lock::{Flags, LockOp, LockReply, LockRow, Mode, ResourceView, ValueChange};
use csnap_proto::{LockId, Name, Secret, Sequence, SessionId, Term};

use super::random::number;
use super::tables::{MODES, compatible, is_writer, writes};

const OWNERS: usize = 3;
const RESOURCES: [&str; 2] = ["r", "s"];
const DEPTH_MAX: usize = 12;

/// The orders of three owners.
const ORDERS: [[u8; OWNERS]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

/// States taken up at once: bounds what two threads produce before it is sorted out.
const BATCH: usize = 1 << 15;

/// What an owner may do at a step, with its lock on a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Lock(Mode, Flags),
    Convert(Mode, Flags),
    /// To the same mode, writing the value.
    Write,
    Unlock,
    UnlockAndWrite,
    UnlockAndInvalidate,
    Cancel,
    Force,
    /// The session ends, and another begins. Of the owner, whatever the resource.
    Die,
}

/// A deed of an owner on a resource.
#[derive(Clone, Copy, Debug)]
struct Move {
    owner: usize,
    resource: usize,
    deed: Deed,
}

/// The moves of a world, numbered so that a way through it is short.
fn moves(flags: &[Flags]) -> Vec<Move> {
    let mut moves = Vec::new();
    for owner in 0..OWNERS {
        for resource in 0..RESOURCES.len() {
            let mut deeds = vec![
                Deed::Write,
                Deed::Unlock,
                Deed::UnlockAndWrite,
                Deed::UnlockAndInvalidate,
                Deed::Cancel,
                Deed::Force,
            ];
            for mode in MODES {
                deeds.extend(
                    flags.iter().flat_map(|flags| [Deed::Lock(mode, *flags), Deed::Convert(mode, *flags)]),
                );
            }
            if resource == 0 {
                deeds.push(Deed::Die);
            }
            moves.extend(deeds.into_iter().map(|deed| Move { owner, resource, deed }));
        }
    }
    moves
}

fn session(owner: usize) -> SessionId {
    SessionId([u8::try_from(owner).expect("small") + 1; 16])
}

fn open(owner: usize) -> Command {
    let node = Name::new("n").expect("a name");
    Command::Open { session: session(owner), secret: Secret([0; 16]), node, lease_ms: 1000, info: Vec::new() }
}

/// A table, and how many operations each owner did.
#[derive(Clone)]
struct State {
    table: Table,
    done: [u64; OWNERS],
}

/// Both resources as they are seen.
type Views = [ResourceView; 2];

/// What a move is in a state.
enum Act {
    Operate(LockOp),
    Die,
}

impl Act {
    /// `None` if the move cannot be made.
    fn of(step: &Move, views: &Views) -> Option<Self> {
        let row = row_of(&views[step.resource], step.owner);
        Some(Self::Operate(match (step.deed, row) {
            (Deed::Lock(mode, flags), None) => LockOp::lock(RESOURCES[step.resource], mode, flags),
            (Deed::Convert(mode, flags), Some(row)) if row.wanted.is_none() => {
                LockOp::convert(row.lock, mode, flags)
            }
            (Deed::Write, Some(row)) if is_writer(row.mode) && row.wanted.is_none() => {
                LockOp::write(row.lock, row.mode.expect("a writer"), *b"v")
            }
            (Deed::Unlock, Some(row)) if row.wanted.is_none() => unlock(row, ValueChange::Keep),
            (Deed::UnlockAndWrite, Some(row)) if is_writer(row.mode) && row.wanted.is_none() => {
                unlock(row, ValueChange::Write(b"v".to_vec()))
            }
            (Deed::UnlockAndInvalidate, Some(row)) if is_writer(row.mode) && row.wanted.is_none() => {
                unlock(row, ValueChange::Invalidate)
            }
            (Deed::Cancel, Some(row)) if row.wanted.is_some() => LockOp::Cancel { lock: row.lock },
            (Deed::Force, Some(row)) if row.wanted.is_some() => LockOp::unlock(row.lock, ValueChange::Keep),
            (Deed::Die, _) if views.iter().any(|view| row_of(view, step.owner).is_some()) => {
                return Some(Self::Die);
            }
            _ => return None,
        }))
    }
}

impl State {
    fn first(table: Table) -> Self {
        let mut state = Self { table, done: [0; OWNERS] };
        for owner in 0..OWNERS {
            state.table.apply(open(owner), &mut Vec::new());
        }
        state
    }

    fn views(&self) -> Views {
        RESOURCES.map(|name| self.table.resource(name).unwrap_or_default())
    }

    /// Does what [`Act::of`] gave; gives the answer of an operation.
    fn make(&mut self, owner: usize, act: Act) -> Option<LockReply> {
        let op = match act {
            Act::Operate(op) => op,
            Act::Die => {
                self.die(owner);
                return None;
            }
        };
        let sequence = Sequence(self.done[owner] + 1);
        self.done[owner] = sequence.0;
        let mut effects = Vec::new();
        let session = session(owner);
        self.table
            .apply(Command::Operate { session, sequence, lowest_unanswered: sequence, op }, &mut effects);
        let reply = effects.into_iter().find_map(|effect| match effect {
            Effect::Answer { reply, .. } => Some(reply),
            _ => None,
        });
        Some(reply.expect("every operation is answered"))
    }

    fn die(&mut self, owner: usize) {
        self.table.apply(Command::Expire { session: session(owner) }, &mut Vec::new());
        self.table.apply(open(owner), &mut Vec::new());
        self.done[owner] = 0;
    }

    /// The way that these moves go.
    fn along(mut self, moves: &[Move], way: &[u16]) -> Self {
        for step in way {
            let views = self.views();
            let step = &moves[usize::from(*step)];
            self.make(step.owner, Act::of(step, &views).expect("it was possible before"));
        }
        self
    }
}

fn unlock(row: &LockRow, value: ValueChange) -> LockOp {
    LockOp::Unlock { lock: row.lock, flags: Flags::NONE, value }
}

fn rows(view: &ResourceView) -> impl Iterator<Item = &LockRow> {
    view.granted.iter().chain(&view.waiting)
}

fn row_of(view: &ResourceView, owner: usize) -> Option<&LockRow> {
    rows(view).find(|row| owner_of(row) == owner)
}

fn owner_of(row: &LockRow) -> usize {
    usize::from(row.holder.session.expect("no orphans here").0[0]) - 1
}

/// A number for the state that is the same however owners and resources are named.
fn identity(views: &Views) -> u64 {
    let mut least = u64::MAX;
    for order in ORDERS {
        let mut bytes = [[0; 24]; 2];
        for (view, bytes) in views.iter().zip(&mut bytes) {
            describe(view, &order, bytes);
        }
        bytes.sort_unstable();
        // Keyed with zeros: the same in every run.
        #[allow(
            deprecated,
            reason = "the one hasher of the standard library with a fixed key and a fixed result"
        )]
        let mut hasher = std::hash::SipHasher::new();
        bytes.iter().for_each(|bytes| hasher.write(bytes));
        least = least.min(hasher.finish());
    }
    least
}

/// Value, then each owner's granted mode, then the queues in their order.
fn describe(view: &ResourceView, order: &[u8; OWNERS], bytes: &mut [u8; 24]) {
    bytes[0] = u8::from(view.value.valid) + 2 * u8::from(view.value.bytes.is_empty());
    for row in &view.granted {
        bytes[1 + usize::from(order[owner_of(row)])] = row.mode.map_or(0, |mode| mode as u8 + 1);
    }
    let converting = view.converting.iter().filter_map(|id| view.granted.iter().find(|row| row.lock == *id));
    let mut at = 4;
    for (queue, row) in converting.map(|row| (1, row)).chain(view.waiting.iter().map(|row| (2, row))) {
        let flag = Flags::ALL.iter().position(|(_, flag)| row.flags.has(*flag)).map_or(0, |at| at + 1);
        let wanted = row.wanted.map_or(0, |mode| mode as u8 + 1);
        bytes[at..at + 4].copy_from_slice(&[
            queue,
            order[owner_of(row)],
            wanted,
            u8::try_from(flag).expect("few flags"),
        ]);
        at += 4;
    }
}

/// What must hold after a step; the error says what does not.
fn check(
    (step, reply): (&Move, Option<&LockReply>),
    (before, views): (&State, &Views),
    (after, now): (&State, &Views),
) -> Result<(), String> {
    for (at, view) in now.iter().enumerate() {
        check_grants(view)?;
        check_at_rest(view)?;
        check_value(step, at, &views[at], reply, view)?;
        check_terms(before.table.term(), &views[at], view)?;
    }
    if after.table.term() < before.table.term() {
        return Err("the highest term went down".into());
    }
    Ok(())
}

fn check_grants(view: &ResourceView) -> Result<(), String> {
    for (at, one) in view.granted.iter().enumerate() {
        for other in &view.granted[at + 1..] {
            if !compatible(one.mode.expect("granted"), other.mode.expect("granted")) {
                return Err(format!("granted together: {one:?} and {other:?}"));
            }
        }
    }
    Ok(())
}

/// Nothing waits that could be granted: no wake-up was lost.
fn check_at_rest(view: &ResourceView) -> Result<(), String> {
    let by_id = |id: &LockId| view.granted.iter().find(|row| row.lock == *id).expect("granted, and converts");
    let queues = [view.converting.iter().map(by_id).collect::<Vec<_>>(), view.waiting.iter().collect()];
    for (which, queue) in queues.iter().enumerate() {
        for (at, row) in queue.iter().enumerate() {
            let in_turn = at == 0 && (which == 0 || view.converting.is_empty());
            let wanted = row.wanted.expect("it waits");
            let alternative = [(Flags::ALTPR, Mode::Pr), (Flags::ALTCW, Mode::Cw)];
            let alternative =
                alternative.iter().filter(|(flag, _)| row.flags.has(*flag)).map(|(_, mode)| *mode);
            let mut modes = alternative.chain([wanted]);
            let goes = |mode: Mode| {
                let mut others = view.granted.iter().filter(|other| other.lock != row.lock);
                others.all(|other| compatible(other.mode.expect("granted"), mode))
            };
            if (in_turn || row.flags.has(Flags::NOORDER)) && modes.any(goes) {
                return Err(format!("waits and could be granted: {row:?}"));
            }
        }
    }
    Ok(())
}

fn check_value(
    step: &Move,
    at: usize,
    before: &ResourceView,
    reply: Option<&LockReply>,
    now: &ResourceView,
) -> Result<(), String> {
    let own = row_of(before, step.owner).filter(|row| is_writer(row.mode));
    let here = at == step.resource;
    let expected = match step.deed {
        Deed::Write | Deed::UnlockAndWrite if here => true,
        Deed::UnlockAndInvalidate if here => false,
        Deed::Die if own.is_some() => false,
        _ => before.value.valid,
    };
    if matches!(step.deed, Deed::Write) && !matches!(reply, Some(LockReply::Granted { .. })) {
        return Err(format!("a write was not granted: {reply:?}"));
    }
    if now.value.valid == expected && !(expected && now.value.bytes != b"v") {
        Ok(())
    } else {
        Err(format!("the value should be valid: {expected}, and is {:?}", now.value))
    }
}

fn check_terms(highest: Term, before: &ResourceView, now: &ResourceView) -> Result<(), String> {
    for row in &now.granted {
        let was = before.granted.iter().find(|other| other.lock == row.lock);
        let was = was.filter(|other| is_writer(other.mode));
        let right = match (is_writer(row.mode), was) {
            (false, _) => row.term == Term(0),
            // Demoted and granted again in one step is a new grant.
            (true, Some(was)) => row.term == was.term || row.term > highest,
            (true, None) => row.term > highest,
        };
        if !right {
            return Err(format!("term of {row:?}, after {highest:?}"));
        }
    }
    Ok(())
}

/// Numbers that were seen: a table with room to spare, for millions of them.
struct Seen {
    slots: Vec<u64>,
    count: usize,
}

impl Seen {
    fn new() -> Self {
        Self { slots: vec![0; 1 << 16], count: 0 }
    }

    /// Whether it is new.
    fn insert(&mut self, number: u64) -> bool {
        if self.count * 2 > self.slots.len() {
            let bigger = vec![0; self.slots.len() * 2];
            for old in std::mem::replace(&mut self.slots, bigger) {
                if old != 0 {
                    self.put(old);
                }
            }
        }
        let new = self.put(number.max(1));
        self.count += usize::from(new);
        new
    }

    fn put(&mut self, number: u64) -> bool {
        let mask = self.slots.len() - 1;
        let mut at = usize::try_from(number & mask as u64).expect("below a length");
        while self.slots[at] != 0 && self.slots[at] != number {
            at = (at + 1) & mask;
        }
        let new = self.slots[at] == 0;
        self.slots[at] = number;
        new
    }
}

/// The moves of a way, by their numbers.
type Way = [u16; DEPTH_MAX];

/// What a search came to.
pub(crate) struct Found {
    pub(crate) states: usize,
    steps: u64,
    /// Nothing was left out at the end.
    whole: bool,
}

/// Goes every way of up to `depth` moves from the empty table.
pub(crate) fn search(
    table: impl Fn() -> Table + Sync,
    flags: &[Flags],
    depth: usize,
) -> Result<Found, String> {
    assert!(depth <= DEPTH_MAX, "deeper than a way is kept");
    let moves = moves(flags);
    let mut seen = Seen::new();
    seen.insert(identity(&State::first(table()).views()));
    let mut frontier: Vec<Way> = vec![[0; DEPTH_MAX]];
    let (mut steps, enough) = (0, number("CSNAP_LOCK_STATES", u64::MAX));
    for level in 0..depth {
        let mut next = Vec::new();
        for batch in frontier.chunks(BATCH) {
            if seen.count as u64 >= enough {
                return Ok(Found { states: seen.count, steps, whole: false });
            }
            let expand = |ways: &[Way]| -> Result<(Vec<(u64, Way)>, u64), String> {
                let (mut found, mut steps) = (Vec::new(), 0);
                for way in ways {
                    steps += expand(State::first(table()), &moves, *way, level, &mut found)?;
                }
                found.sort_unstable();
                found.dedup_by_key(|(number, _)| *number);
                Ok((found, steps))
            };
            let (left, right) = batch.split_at(batch.len() / 2);
            let halves = std::thread::scope(|scope| {
                let other = scope.spawn(|| expand(right));
                [expand(left), other.join().expect("the checks do not panic")]
            });
            for half in halves {
                let (found, count) = half?;
                steps += count;
                next.extend(found.into_iter().filter(|(number, _)| seen.insert(*number)).map(|(_, way)| way));
            }
        }
        frontier = next;
    }
    Ok(Found { states: seen.count, steps, whole: true })
}

/// Every move from the end of a way; the states they lead to, and how many there were.
fn expand(
    first: State,
    moves: &[Move],
    way: Way,
    level: usize,
    found: &mut Vec<(u64, Way)>,
) -> Result<u64, String> {
    let state = first.along(moves, &way[..level]);
    let views = state.views();
    let mut steps = 0;
    for (number, step) in moves.iter().enumerate() {
        let Some(act) = Act::of(step, &views) else { continue };
        let mut after = state.clone();
        let reply = after.make(step.owner, act);
        steps += 1;
        let now = after.views();
        // A refusal that changed nothing leads nowhere new.
        if now == views && step.deed != Deed::Write {
            continue;
        }
        let story = |what: String| {
            let told: Vec<&Move> = way[..level].iter().map(|step| &moves[usize::from(*step)]).collect();
            format!("{what}\nafter {told:?}\nand then {step:?}, answered {reply:?}")
        };
        check((step, reply.as_ref()), (&state, &views), (&after, &now)).map_err(story)?;
        let mut way = way;
        way[level] = u16::try_from(number).expect("few moves");
        found.push((identity(&now), way));
    }
    Ok(steps)
}

fn depth(variable: &str, default: u64) -> usize {
    usize::try_from(number(variable, default)).expect("a depth is small")
}

fn report(what: &str, depth: usize, found: Result<Found, String>) -> usize {
    let found = found.unwrap_or_else(|what| panic!("{what}"));
    let Found { states, steps, whole } = found;
    let left_out = if whole { "" } else { ", the last depth in part" };
    println!("{what}, depth {depth}{left_out}: {states} distinct states, {steps} steps, no violation");
    states
}

#[test]
fn no_state_of_a_small_world_breaks_the_rules() {
    let depth = depth("CSNAP_LOCK_DEPTH", 5);
    let states = report("no flags", depth, search(Table::default, &[Flags::NONE], depth));
    assert!(states > 1000, "the search looks at more than that");
}

#[test]
fn no_state_with_any_one_flag_breaks_the_rules() {
    let depth = depth("CSNAP_LOCK_FLAG_DEPTH", 3);
    let mut states = 0;
    for (name, flag) in Flags::ALL.into_iter().filter(|(_, flag)| is_of_requests(*flag)) {
        states += report(name, depth, search(Table::default, &[Flags::NONE, with_others(flag)], depth));
    }
    println!("with every single flag: {states} states");
}

#[test]
fn no_state_with_all_flags_mixed_breaks_the_rules() {
    let depth = depth("CSNAP_LOCK_MIXED_DEPTH", 3);
    let single = Flags::ALL.into_iter().map(|(_, flag)| flag).filter(|flag| is_of_requests(*flag));
    let mut flags: Vec<Flags> = single.filter(|flag| with_others(*flag) == *flag).collect();
    flags.push(Flags::NONE);
    let found = search(Table::default, &flags, depth);
    let states = report("every request with any one flag or none", depth, found);
    let wanted = number("CSNAP_LOCK_STATES", 0);
    assert!(states as u64 >= wanted, "{states} states, and {wanted} were asked for: CSNAP_LOCK_MIXED_DEPTH");
}

/// Every search has the one that forces an unlock, which is no flag of a request.
fn is_of_requests(flag: Flags) -> bool {
    flag != Flags::FORCEUNLOCK
}

/// What goes with another flag only is tried with it.
fn with_others(flag: Flags) -> Flags {
    match flag {
        Flags::NOQUEUEBAST => flag | Flags::NOQUEUE,
        flag => flag,
    }
}

#[test]
fn names_of_owners_and_resources_make_no_difference() {
    let steps = |owner: usize, resource: usize| {
        let deed = Deed::Lock(Mode::Pw, Flags::NONE);
        let mut state = State::first(Table::default());
        let views = state.views();
        let act = Act::of(&Move { owner, resource, deed }, &views).expect("free");
        state.make(owner, act);
        identity(&state.views())
    };
    for owner in 0..OWNERS {
        for resource in 0..RESOURCES.len() {
            assert_eq!(steps(owner, resource), steps(0, 0));
        }
    }
    assert_ne!(identity(&State::first(Table::default()).views()), steps(0, 0));
    assert!(writes(Mode::Pw, Mode::Pw));
}
