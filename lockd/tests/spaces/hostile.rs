//! Pieces that are no lockspace, and requests out of turn: nothing of them is served, nothing ends the process.

use csnap_lockd::core::spaces::{Command, Effect, Spaces};
use csnap_lockd::core::table::{self, Table};
use csnap_proto::limits::IMPORTS_MAX;
use csnap_proto::message::lock::{
    Expect, Flags, KeyOp, LockOp, Manifest, Mode, Owner, SpaceReply, SpaceState, ValueChange, Watched,
};
use csnap_proto::{LockId, MigrationId, Name, OwnerId, Secret, Sequence, SessionId};
use csnap_storage::sim::Rng;

const SESSIONS: u8 = 3;

fn migration(n: u8) -> MigrationId {
    MigrationId([n; 16])
}

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

fn reply(spaces: &mut Spaces, command: Command) -> SpaceReply {
    let mut effects = Vec::new();
    spaces.apply(command, &mut effects);
    match effects.pop() {
        Some(Effect::Answer(reply)) => reply,
        other => panic!("answered at the end: {other:?}"),
    }
}

fn import(spaces: &mut Spaces, of: &str, by: u8, bytes: &[u8]) -> SpaceReply {
    let manifest = Manifest { bytes: bytes.len() as u64, hash: *blake3::hash(bytes).as_bytes() };
    let (name, migration, bytes) = (name(of), migration(by), bytes.to_vec());
    reply(spaces, Command::Import { name, migration, manifest, offset: 0, bytes })
}

fn open(n: u8) -> table::Command {
    let (session, secret) = (SessionId([n; 16]), Secret([n; 16]));
    table::Command::Open { session, secret, node: name("n"), lease_ms: 1000, info: vec![n] }
}

fn ops() -> Vec<LockOp> {
    let owner = Some(Owner { id: OwnerId([7; 16]), secret: Secret([7; 16]) });
    let lock = |resource: &str, mode, owner| LockOp::Lock {
        resource: resource.into(),
        mode,
        flags: Flags::NONE,
        owner,
    };
    let put = |key: &str, ephemeral| {
        LockOp::Key(KeyOp::Put { key: key.into(), value: vec![1, 2], expect: Expect::Any, ephemeral })
    };
    vec![
        LockOp::watch(Watched::Prefix("k".into())),
        LockOp::watch(Watched::Value("r".into())),
        lock("r", Mode::Ex, None),
        lock("p", Mode::Pr, owner),
        put("k/a", true),
        put("k/b", false),
        lock("p", Mode::Ex, None),
        LockOp::convert(LockId(2), Mode::Ex, Flags::NONE),
        LockOp::Show { resource: "r".into() },
        LockOp::Locks { after: LockId(0), orphans: false },
        LockOp::write(LockId(1), Mode::Ex, vec![3]),
        LockOp::unlock(LockId(1), ValueChange::Keep),
        LockOp::Cancel { lock: LockId(4) },
        LockOp::Break { lock: LockId(2) },
    ]
}

/// Every session asks for everything, and in the end is over.
fn use_up(table: &mut Table, first: usize) {
    let mut effects = Vec::new();
    for n in 1..=SESSIONS {
        table.apply(open(n), &mut effects);
        let session = SessionId([n; 16]);
        let taken = table.view(session).map_or(0, |view| view.last_sequence.0);
        for (at, op) in ops().into_iter().skip(first).enumerate() {
            let sequence = Sequence(taken + 1 + at as u64);
            let lowest_unanswered = Sequence(taken.saturating_sub(3));
            table.apply(table::Command::Operate { session, sequence, lowest_unanswered, op }, &mut effects);
            let _ = table.stored_answer(session, sequence);
        }
        let _ = table.missed(session, csnap_proto::EventNumber(0));
    }
    for n in 1..=SESSIONS {
        table.apply(table::Command::Expire { session: SessionId([n; 16]) }, &mut effects);
    }
}

fn table() -> Table {
    let mut table = Table::default();
    let mut effects = Vec::new();
    for n in 1..=SESSIONS {
        table.apply(open(n), &mut effects);
    }
    for n in 1..=SESSIONS {
        for (at, op) in ops().into_iter().take(9).enumerate() {
            let (session, sequence) = (SessionId([n; 16]), Sequence(at as u64 + 1));
            let lowest_unanswered = Sequence(1);
            table.apply(table::Command::Operate { session, sequence, lowest_unanswered, op }, &mut effects);
        }
    }
    assert_eq!(table.check_foreign(), Ok(()));
    table
}

#[test]
fn what_arrives_damaged_is_refused_or_does_no_harm() {
    let whole = postcard::to_stdvec(&table()).expect("encodes");
    let (mut refused, mut taken) = (0, 0);
    let mut rng = Rng::new(1);
    for at in 0..whole.len() * 8 + 4000 {
        let mut bytes = whole.clone();
        if at < whole.len() * 8 {
            bytes[at / 8] ^= 1 << (at % 8);
        } else {
            for _ in 0..1 + rng.below(4) {
                let place = rng.index(bytes.len());
                bytes[place] = u8::try_from(rng.below(256)).expect("a byte");
            }
        }
        let mut spaces = Spaces::default();
        match import(&mut spaces, "s", 1, &bytes) {
            SpaceReply::Refused { reason } => {
                assert!(reason.contains("damaged"), "{reason}");
                assert_eq!(spaces.find(&name("s")), None, "nothing of it is kept");
                refused += 1;
            }
            SpaceReply::Imported { .. } => {
                // As good as any: an authentic group may say so. It must hold together whatever is asked of it.
                let mut table: Table = postcard::from_bytes(&bytes).expect("it was taken");
                use_up(&mut table, at % 5);
                taken += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    println!("{refused} damaged lockspaces refused, {taken} that hold together taken");
    assert!(refused > 1000 && taken > 100);
}

#[test]
fn what_is_not_what_was_announced_is_refused() {
    let whole = postcard::to_stdvec(&table()).expect("encodes");
    let mut spaces = Spaces::default();
    let manifest = Manifest { bytes: whole.len() as u64, hash: [0; 32] };
    let (name, migration) = (name("default"), migration(1));
    let command = Command::Import { name, migration, manifest, offset: 0, bytes: whole.clone() };
    assert!(matches!(reply(&mut spaces, command), SpaceReply::Refused { .. }));
    assert_eq!(spaces, Spaces::default(), "the empty one that was there is there again");
    let mut longer = whole;
    longer.push(0);
    assert!(matches!(import(&mut spaces, "default", 1, &longer), SpaceReply::Refused { .. }));
    assert_eq!(spaces, Spaces::default());
}

#[test]
fn pieces_come_in_any_order_and_any_number_and_make_one_lockspace() {
    let table = table();
    let whole = postcard::to_stdvec(&table).expect("encodes");
    let manifest = Manifest { bytes: whole.len() as u64, hash: *blake3::hash(&whole).as_bytes() };
    let mut spaces = Spaces::default();
    let mut rng = Rng::new(2);
    let mut have = 0;
    while have < manifest.bytes {
        let offset = rng.below(have.min(manifest.bytes - 1) + 50).min(manifest.bytes - 1);
        let end = (offset + 1 + rng.below(100)).min(manifest.bytes);
        let range = usize::try_from(offset).expect("small")..usize::try_from(end).expect("small");
        let (name, migration, bytes) = (name("default"), migration(1), whole[range].to_vec());
        match reply(&mut spaces, Command::Import { name, migration, manifest, offset, bytes }) {
            SpaceReply::Imported { have: now } => {
                assert!(now >= have, "what is there stays there");
                have = now;
            }
            other => panic!("{other:?}"),
        }
    }
    let activate = Command::Activate { name: name("default"), migration: migration(1) };
    assert_eq!(reply(&mut spaces, activate), SpaceReply::Done);
    assert_eq!(spaces.table(csnap_lockd::core::spaces::SpaceId::DEFAULT), Some(&table));
}

#[test]
fn only_so_many_come_at_once_and_none_over_what_is_there() {
    let mut spaces = Spaces::default();
    let manifest = Manifest { bytes: 100, hash: [0; 32] };
    let begin = |of: &str, by: u8| Command::Import {
        name: name(of),
        migration: migration(by),
        manifest,
        offset: 0,
        bytes: vec![0; 10],
    };
    for n in 0..IMPORTS_MAX {
        let of = format!("s{n}");
        assert_eq!(reply(&mut spaces, begin(&of, 1)), SpaceReply::Imported { have: 10 });
    }
    assert!(matches!(reply(&mut spaces, begin("more", 1)), SpaceReply::Refused { .. }));
    assert!(matches!(reply(&mut spaces, begin("s0", 2)), SpaceReply::Refused { .. }), "another move");
    // Not whole: it cannot be activated, but it can be discarded, and only by its own move.
    for command in [
        Command::Activate { name: name("s0"), migration: migration(1) },
        Command::Activate { name: name("s0"), migration: migration(2) },
    ] {
        assert!(matches!(reply(&mut spaces, command), SpaceReply::Refused { .. }));
    }
    let discard = |by| Command::Discard { name: name("s0"), migration: migration(by) };
    assert_eq!(reply(&mut spaces, discard(2)), SpaceReply::Done);
    let importing = |spaces: &Spaces| {
        let all = spaces.view();
        all.iter().filter(|view| matches!(view.state, SpaceState::Importing { .. })).count()
    };
    assert_eq!(importing(&spaces), IMPORTS_MAX, "another move's is not discarded");
    assert_eq!(reply(&mut spaces, discard(1)), SpaceReply::Done);
    assert_eq!(importing(&spaces), IMPORTS_MAX - 1);
    assert_eq!(spaces.find(&name("s0")), None);
    assert_eq!(spaces.check(), Ok(()));
}
