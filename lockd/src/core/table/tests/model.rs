//! Random operations of three sessions on two resources, against what must hold whatever happens.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::core::mode::{MODES, compatible, is_writer};

#[derive(Clone, Debug)]
enum Act {
    Lock { resource: u8, mode: Mode, flags: Flags },
    Convert { pick: usize, mode: Mode, flags: Flags },
    Write { pick: usize, mode: Mode },
    Unlock { pick: usize, value: ValueChange },
    Cancel { pick: usize },
    Watch { resource: u8 },
    Expire,
    Resend,
}

fn act() -> impl Strategy<Value = Act> {
    let mode = prop::sample::select(MODES.to_vec());
    let flags = prop_oneof![Just(Flags::NONE), Just(Flags::NOQUEUE)];
    let value = prop_oneof![
        Just(ValueChange::Keep),
        Just(ValueChange::Invalidate),
        any::<u8>().prop_map(|b| ValueChange::Write(vec![b]))
    ];
    let pick = 0usize..6;
    prop_oneof![
        6 => (0u8..2, mode.clone(), flags.clone()).prop_map(|(resource, mode, flags)| Act::Lock { resource, mode, flags }),
        6 => (pick.clone(), mode.clone(), flags).prop_map(|(pick, mode, flags)| Act::Convert { pick, mode, flags }),
        3 => (pick.clone(), mode).prop_map(|(pick, mode)| Act::Write { pick, mode }),
        4 => (pick.clone(), value).prop_map(|(pick, value)| Act::Unlock { pick, value }),
        2 => pick.prop_map(|pick| Act::Cancel { pick }),
        1 => (0u8..2).prop_map(|resource| Act::Watch { resource }),
        1 => Just(Act::Expire),
        1 => Just(Act::Resend),
    ]
}

/// What an outsider can know from answers and events alone.
#[derive(Default)]
struct Model {
    /// Granted locks: owner, resource, mode, term.
    held: BTreeMap<LockId, (SessionId, String, Mode, Term)>,
    /// Requests that wait.
    waiting: BTreeMap<LockId, SessionId>,
    highest_term: Term,
    /// Per resource: content and validity that the rules give.
    values: BTreeMap<String, (Vec<u8>, bool)>,
}

impl Model {
    fn grant(&mut self, session: SessionId, view: &LockView) {
        let before = self.held.remove(&view.lock);
        self.waiting.remove(&view.lock);
        for (_, resource, mode, _) in self.held.values() {
            assert!(
                *resource != view.resource || compatible(*mode, view.mode),
                "granted beside {mode:?}: {view:?}"
            );
        }
        let wrote = before.filter(|(_, _, mode, _)| is_writer(*mode));
        match (wrote, is_writer(view.mode)) {
            (Some((_, _, _, term)), true) => assert_eq!(view.term, term),
            (None, true) => {
                assert!(view.term > self.highest_term, "terms only grow");
                self.highest_term = view.term;
            }
            (_, false) => assert_eq!(view.term, Term(0)),
        }
        self.held.insert(view.lock, (session, view.resource.clone(), view.mode, view.term));
    }

    fn check_read(&self, resource: &str, value: Option<&ValueBlock>) {
        if let Some(value) = value {
            self.check_value(resource, value);
        }
    }

    fn check_value(&self, resource: &str, value: &ValueBlock) {
        let (bytes, valid) = self.values.get(resource).cloned().unwrap_or_default();
        assert_eq!((&value.bytes, value.valid), (&bytes, valid));
    }

    /// A lock is gone; from a writer mode with what that means for the value.
    fn drop_lock(&mut self, lock: LockId, value: &ValueChange) {
        self.waiting.remove(&lock);
        let Some((_, resource, mode, _)) = self.held.remove(&lock) else { return };
        if !is_writer(mode) {
            return;
        }
        let entry = self.values.entry(resource).or_default();
        match value {
            ValueChange::Keep => {}
            ValueChange::Write(bytes) => *entry = (bytes.clone(), true),
            ValueChange::Invalidate => entry.1 = false,
        }
    }

    fn on_event(&mut self, session: SessionId, event: &LockEvent) {
        match event {
            LockEvent::Granted { lock, value, .. } => {
                self.grant(session, lock);
                self.check_read(&lock.resource, value.as_ref());
            }
            LockEvent::Changed { resource, value, vacant } => {
                let writer = self.held.values().any(|(_, r, mode, _)| r == resource && is_writer(*mode));
                assert_eq!(*vacant, !writer);
                self.check_value(resource, value);
            }
            LockEvent::Cancelled { lock } => {
                self.waiting.remove(lock);
            }
            _ => {}
        }
    }
}

fn op_of(act: &Act, own: &[LockId]) -> Option<LockOp> {
    let pick = |at: usize| own.get(at % own.len().max(1)).copied();
    Some(match act {
        Act::Lock { resource, mode, flags } => LockOp::lock(format!("r{resource}"), *mode, *flags),
        Act::Convert { pick: at, mode, flags } => LockOp::convert(pick(*at)?, *mode, *flags),
        Act::Write { pick: at, mode } => LockOp::write(pick(*at)?, *mode, [1, 2]),
        Act::Unlock { pick: at, value } => LockOp::unlock(pick(*at)?, value.clone()),
        Act::Cancel { pick: at } => LockOp::Cancel { lock: pick(*at)? },
        Act::Watch { resource } => LockOp::watch(Watched::Value(format!("r{resource}"))),
        Act::Expire | Act::Resend => return None,
    })
}

struct World {
    bench: Bench,
    model: Model,
    last: BTreeMap<SessionId, Command>,
}

impl World {
    fn own(&self, session: SessionId) -> Vec<LockId> {
        self.bench.table.sessions[&session].locks.iter().copied().collect()
    }

    fn expire(&mut self, session: SessionId) {
        let own = self.own(session);
        self.last.remove(&session);
        let effects = self.bench.apply(Command::Expire { session });
        for lock in own {
            self.model.drop_lock(lock, &ValueChange::Invalidate);
        }
        self.on_events(&effects);
        self.bench.apply(open(session));
    }

    fn on_events(&mut self, effects: &[Effect]) {
        for effect in effects {
            if let Effect::Event { session, event, .. } = effect {
                self.model.on_event(*session, event);
            }
        }
    }

    fn operate(&mut self, session: SessionId, op: LockOp) {
        let sequence = self.bench.table.sessions[&session].last_sequence.next();
        let command = Command::Operate { session, sequence, lowest_unanswered: sequence, op: op.clone() };
        self.last.insert(session, command.clone());
        let effects = self.bench.apply(command);
        let Some(Effect::Answer { reply, .. }) = effects.first() else { panic!("{effects:?}") };
        match (&op, reply) {
            (LockOp::Convert { value: ValueChange::Write(bytes), lock, .. }, LockReply::Granted { .. }) => {
                let resource = self.model.held[lock].1.clone();
                self.model.values.insert(resource, (bytes.clone(), true));
            }
            (LockOp::Unlock { lock, value, .. }, LockReply::Done) => self.model.drop_lock(*lock, value),
            (_, LockReply::Queued { lock, .. }) => {
                self.model.waiting.insert(*lock, session);
            }
            _ => {}
        }
        if let LockReply::Granted { lock, value, .. } = reply {
            self.model.grant(session, lock);
            self.model.check_read(&lock.resource, value.as_ref());
        }
        self.on_events(&effects);
    }

    /// Everybody who holds something lets go, again and again: whoever waited must have had its turn.
    fn drain(&mut self) {
        while let Some((lock, session)) = self.model.held.iter().next().map(|(lock, held)| (*lock, held.0)) {
            self.operate(session, LockOp::unlock(lock, ValueChange::Keep));
        }
        assert!(self.model.waiting.is_empty(), "still waiting: {:?}", self.model.waiting);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn no_history_breaks_the_rules(acts in prop::collection::vec((0usize..3, act()), 1..120)) {
        let mut world = World { bench: Bench::new(), model: Model::default(), last: BTreeMap::new() };
        for (who, act) in acts {
            let session = [A, B, C][who];
            match &act {
                Act::Expire => world.expire(session),
                Act::Resend => {
                    let before = world.bench.table.clone();
                    if let Some(command) = world.last.get(&session).cloned() {
                        world.bench.apply(command);
                    }
                    prop_assert_eq!(&world.bench.table, &before);
                }
                _ => {
                    if let Some(op) = op_of(&act, &world.own(session)) {
                        world.operate(session, op);
                    }
                }
            }
            // Encoding the table and going on with what it decodes to is no difference.
            let bytes = postcard::to_stdvec(&world.bench.table).expect("encodes");
            world.bench.table = postcard::from_bytes(&bytes).expect("decodes");
            let held: Vec<LockId> = world.bench.table.locks.iter().filter(|(_, l)| l.granted.is_some()).map(|(id, _)| *id).collect();
            prop_assert_eq!(held, world.model.held.keys().copied().collect::<Vec<_>>());
        }
        world.drain();
    }
}
