//! The largest lockspaces: they pass through the log in pieces, and no step of it may keep a group from its heartbeats for
//! long. Times are printed and not judged: they are this machine's.

use std::time::{Duration, Instant};

use csnap_lockd::core::table::{Command, Table};
use csnap_proto::limits::{KEY_VALUE_BYTES_MAX, LOCKD_SESSIONS_MAX, LOCKSPACE_BYTES_MAX};
use csnap_proto::message::lock::{Expect, Flags, KeyOp, LockOp, Mode, SpaceReply, SpaceRequest, Way};
use csnap_proto::{MigrationId, Name, Secret, Sequence, SessionId};

use crate::world::{Standing, World};

const SECOND: u64 = 1_000_000;

struct Builder {
    table: Table,
    sequences: Vec<u64>,
}

impl Builder {
    fn new(sessions: usize) -> Self {
        let mut builder = Self { table: Table::default(), sequences: vec![0; sessions] };
        for n in 0..sessions {
            let node = Name::new(format!("n{n}")).expect("a name");
            let (session, secret) = (Self::session(n), Secret([1; 16]));
            builder.apply(Command::Open { session, secret, node, lease_ms: 3_600_000, info: vec![0; 64] });
        }
        builder
    }

    fn session(n: usize) -> SessionId {
        SessionId((n as u128 + 1).to_le_bytes())
    }

    fn apply(&mut self, command: Command) {
        self.table.apply(command, &mut Vec::new());
    }

    fn operate(&mut self, n: usize, op: LockOp) {
        self.sequences[n] += 1;
        let sequence = Sequence(self.sequences[n]);
        let session = Self::session(n);
        self.apply(Command::Operate { session, sequence, lowest_unanswered: sequence, op });
    }

    fn keys(mut self, bytes: usize) -> Self {
        for n in 0..bytes / (KEY_VALUE_BYTES_MAX + 16) {
            let (key, value) = (format!("key/{n:08}"), vec![7; KEY_VALUE_BYTES_MAX]);
            self.operate(0, LockOp::Key(KeyOp::Put { key, value, expect: Expect::Any, ephemeral: false }));
        }
        self
    }

    fn locks(mut self, each: usize) -> Self {
        for n in 0..self.sequences.len() {
            for at in 0..each {
                let resource = format!("a-rather-long-name-of-a-resource/{:06}", (n * 31 + at) % 40_000);
                self.operate(n, LockOp::lock(resource, Mode::Cr, Flags::NONE));
            }
        }
        self
    }
}

fn move_it(what: &str, table: Table) {
    let bytes = postcard::to_stdvec(&table).expect("encodes").len();
    assert!(bytes <= LOCKSPACE_BYTES_MAX, "{bytes} bytes are too many");
    let mut world = World::with_table("default", table, None);
    world
        .until("both lead", 5 * SECOND, |world| (0..2).all(|group| world.leader(group).is_some()))
        .expect("lead");
    let leader = world.leader(1);
    world.longest = [Duration::ZERO; 2];
    let way = Way { migration: MigrationId([1; 16]), to: world.addresses(1) };
    let began = Instant::now();
    let reply = world.asked(0, SpaceRequest::Migrate { name: world.name.clone(), way });
    assert_eq!(reply, Ok(SpaceReply::Done));
    world.until("moved", 120 * SECOND, |world| world.standing(0) == Standing::Settled).expect("it moves");
    let frozen = world.active_at.expect("active") - world.frozen_at.expect("frozen");
    let [source, destination] = world.longest;
    println!(
        "{what}: {bytes} bytes; served nowhere for {} ms of the world's time ({} ms of both groups' computing); longest \
         step of the source {} ms, of the destination {} ms",
        frozen / 1000,
        began.elapsed().as_millis(),
        source.as_millis(),
        destination.as_millis()
    );
    assert_eq!(world.leader(1), leader, "the group that takes it in keeps its leader");
}

#[test]
fn a_full_store_of_keys_moves() {
    move_it("4 MiB of keys", Builder::new(1).keys(4 << 20).table);
}

#[test]
fn a_table_as_large_as_may_move_moves() {
    let sessions = LOCKD_SESSIONS_MAX;
    move_it("keys and locks", Builder::new(sessions).keys(4 << 20).locks(200).table);
}

#[test]
fn a_lockspace_that_is_too_large_stays() {
    let table = Builder::new(LOCKD_SESSIONS_MAX).keys(4 << 20).locks(300).table;
    assert!(postcard::to_stdvec(&table).expect("encodes").len() > LOCKSPACE_BYTES_MAX);
    let mut world = World::with_table("default", table, None);
    world
        .until("both lead", 5 * SECOND, |world| (0..2).all(|group| world.leader(group).is_some()))
        .expect("lead");
    let way = Way { migration: MigrationId([1; 16]), to: world.addresses(1) };
    world.ask(0, SpaceRequest::Migrate { name: world.name.clone(), way });
    let gave_up = |world: &World| {
        world.standing(0) == Standing::Active
            && world.space(0).is_some_and(|space| space.gave_up(MigrationId([1; 16])))
    };
    world.until("given up", 5 * SECOND, gave_up).expect("it is served again");
}
