//! Random histories with moves in between: the table leaves one group of lockds in pieces and goes on in another. Nobody may
//! be able to tell the history from one without.

use csnap_lockd::core::spaces::{Command, Effect, SpaceId, Spaces, State};
use csnap_lockd::core::table::{self, Table};
use csnap_proto::message::lock::{Manifest, SpaceReply, Way};
use csnap_proto::{MigrationId, Name, SessionId};

use super::random::{Dice, number, run_with};

const SPACE: SpaceId = SpaceId::DEFAULT;

fn name() -> Name {
    Name::new("default").expect("a name")
}

fn apply(spaces: &mut Spaces, command: Command) -> Vec<Effect> {
    let mut effects = Vec::new();
    spaces.apply(command, &mut effects);
    effects
}

/// What a session asks while the lockspace is frozen has no effect.
fn nobody_is_served(spaces: &mut Spaces) {
    let before = spaces.clone();
    for n in 0..6 {
        let session = SessionId([n; 16]);
        for command in [
            table::Command::Expire { session },
            table::Command::Close { session },
            table::Command::Jeopardy { session },
        ] {
            assert_eq!(apply(spaces, Command::In(SPACE, command)), [Effect::Dropped(SPACE)]);
        }
    }
    assert_eq!(*spaces, before);
}

/// Moves a table from one group to another, or tries to and gives it up.
fn moved(table: &Table, dice: &mut Dice) -> Table {
    let migration = MigrationId([u8::try_from(dice.below(256)).expect("a byte"); 16]);
    let (mut source, mut destination) = (Spaces::from(table.clone()), Spaces::default());
    let way = Way { migration, to: vec![([127, 0, 0, 1], 1).into()] };
    for _ in 0..1 + dice.below(2) {
        let effects = apply(&mut source, Command::Freeze { space: SPACE, way: way.clone() });
        assert_eq!(effects.last(), Some(&Effect::Answer(SpaceReply::Done)));
    }
    nobody_is_served(&mut source);
    let Some(State::Frozen { table, .. }) = source.get(SPACE).map(|space| space.state()) else {
        panic!("it is frozen")
    };
    let bytes = postcard::to_stdvec(&**table).expect("encodes");
    let manifest = Manifest { bytes: bytes.len() as u64, hash: *blake3::hash(&bytes).as_bytes() };
    let mut have = 0;
    while have < bytes.len() {
        let end = (have + 1 + dice.below(5000)).min(bytes.len());
        let (offset, bytes) = (have as u64, bytes[have..end].to_vec());
        let effects =
            apply(&mut destination, Command::Import { name: name(), migration, manifest, offset, bytes });
        assert_eq!(effects, [Effect::Answer(SpaceReply::Imported { have: end as u64 })]);
        have = end;
        nobody_is_served(&mut source);
    }
    nobody_is_served(&mut destination);
    if dice.below(4) == 0 {
        apply(&mut source, Command::Thaw { space: SPACE, migration, why: String::new() });
        apply(&mut source, Command::Forward { space: SPACE, migration });
        return source.table(SPACE).expect("it is served here again").clone();
    }
    apply(&mut source, Command::Forward { space: SPACE, migration });
    apply(&mut source, Command::Thaw { space: SPACE, migration, why: String::new() });
    assert_eq!(source.table(SPACE), None, "it is another group's");
    for _ in 0..1 + dice.below(2) {
        let effects = apply(&mut destination, Command::Activate { name: name(), migration });
        assert_eq!(effects.last(), Some(&Effect::Answer(SpaceReply::Done)));
    }
    destination.table(SPACE).expect("it is served there").clone()
}

#[test]
fn no_random_history_tells_a_table_that_moves_from_the_model() {
    let operations = number("CSNAP_LOCK_OPERATIONS", 60_000) / 3;
    let (mut dice, mut moves) = (Dice(7), 0);
    let tally = run_with(operations, 1, Table::default, |table| {
        if dice.below(100) == 0 {
            moves += 1;
            *table = moved(table, &mut dice);
        }
    });
    let without = run_with(operations, 1, Table::default, |_| {});
    assert_eq!(tally, without, "the same happened");
    println!("{operations} random operations with {moves} moves among them, no difference");
    assert!(moves > operations / 200);
}
