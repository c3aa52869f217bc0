//! Single rules of volumes, snapshots and sessions.

use csnap_proto::ids::{Epoch, Sequence, Term, VolumeId};
use csnap_proto::limits::RESULTS_PER_SESSION_MAX;
use csnap_proto::message::operate::OperatorReply;
use csnap_proto::message::volume::Place;
use csnap_proto::units::{ChunkSize, WallMillis};

use super::world::{World, name, range, session_id};
use crate::state::{Attached, Origin, Record, Sharing};

#[test]
fn without_a_snapshot_everything_is_unique() {
    let mut world = World::with_volume(600, 4096);
    let id = world.models[0].id;
    assert_eq!(world.state.head_runs(id, range(0, 600)), [(range(0, 600), Sharing::Unique)]);
    assert!(world.state.unique_page(id, 0).bits.is_empty());
    let epoch = world.snapshot(0);
    assert_eq!(world.state.head_runs(id, range(5, 5)), [(range(5, 5), Sharing::Shared { birth: Epoch(0) })]);
    assert_eq!(world.state.unique_page(id, 0).bits, [0; 64]);
    world.write(0, range(0, 600), 1);
    assert!(world.state.unique_page(id, 0).bits.is_empty() && world.state.unique_page(id, 1).bits.is_empty());
    world.delete(0, epoch);
    assert!(world.state.unique_page(id, 0).bits.is_empty());
}

#[test]
fn neighbours_in_the_store_are_one_extent() {
    let mut world = World::with_volume(600, 16384);
    let id = world.models[0].id;
    world.write(0, range(10, 80), 5);
    let epoch = world.snapshot(0);
    world.write(0, range(0, 100), 6);
    let extents = world.state.locate(id, epoch, range(0, 700));
    let places: Vec<_> = extents.iter().map(|e| (e.range, matches!(e.place, Place::Store(_)))).collect();
    let want =
        [(range(0, 10), false), (range(10, 80), true), (range(90, 10), false), (range(100, 500), false)];
    assert_eq!(places[..4], want);
    assert_eq!(
        (extents[3].place, extents[4].range, extents[4].place),
        (Place::Origin, range(600, 100), Place::Zero)
    );
}

#[test]
fn a_deleted_volume_keeps_its_head_until_all_of_it_is_reaped() {
    let mut world = World::with_volume(10, 4096);
    let id = world.models[0].id;
    world.write(0, range(0, 10), 1);
    let epoch = world.snapshot(0);
    world.write(0, range(0, 10), 2);
    assert!(world.state.clone().apply(&Record::VolumeDelete { volume: id }).is_err());
    world.delete(0, epoch);
    world.record(Record::VolumeDelete { volume: id });
    assert!(world.state.volume(id).is_none() && world.state.volume_by_name(&name("v1")).is_none());
    assert_eq!(world.state.removable_heads().count(), 0);
    assert!(world.state.clone().apply(&Record::HeadRemoved { volume: id }).is_err());
    while world.reap(3) {}
    assert_eq!(world.state.removable_heads().collect::<Vec<_>>(), [id]);
    assert_eq!(world.state.removable_origin(id), Some(&Origin::Pool));
    world.models.clear();
    world.check_recovery();
    world.record(Record::HeadRemoved { volume: id });
    assert_eq!(world.state.removable_heads().count(), 0);
    world.check();
}

#[test]
fn names_are_free_again_after_rename_and_delete() {
    let mut world = World::with_volume(10, 4096);
    let other = world.create_volume(10, 4096);
    let (a, b) = (world.models[0].id, world.models[other].id);
    let taken = world.state.volume(b).expect("lives").name.clone();
    assert!(world.state.clone().apply(&Record::VolumeRename { volume: a, name: taken.clone() }).is_err());
    world.record(Record::VolumeRename { volume: b, name: name("else") });
    world.record(Record::VolumeRename { volume: a, name: taken.clone() });
    assert_eq!(world.state.volume_by_name(&taken).map(|v| v.id), Some(a));
    let epoch = world.snapshot(0);
    world.record(Record::SnapshotRename { volume: a, epoch, name: name("kept") });
    assert_eq!(world.state.snapshot_by_name(a, &name("kept")).map(|s| s.epoch), Some(epoch));
    assert!(world.state.snapshot_by_name(a, &name("s1")).is_none());
    world.delete(0, epoch);
    assert!(world.state.snapshot_by_name(a, &name("kept")).is_none());
}

#[test]
fn an_import_is_hidden_until_it_is_published() {
    let mut world = World::new();
    let id = VolumeId::new(Term(1), 77).expect("fits");
    let chunk = ChunkSize::MIN;
    world.record(Record::VolumeCreate {
        id,
        name: name("new"),
        size_bytes: 1 << 20,
        chunk,
        origin: Origin::Pool,
        created: WallMillis(0),
        importer: Some(session_id(5)),
    });
    assert_eq!(world.state.volume(id).and_then(|v| v.importer), Some(session_id(5)));
    world.record(Record::VolumePublish { volume: id });
    assert_eq!(world.state.volume(id).and_then(|v| v.importer), None);
    assert!(world.state.clone().apply(&Record::VolumePublish { volume: id }).is_err());
}

#[test]
fn a_volume_has_one_writer() {
    let mut world = World::with_volume(10, 4096);
    let id = world.models[0].id;
    world.open(session_id(1), Attached::Writer(id));
    assert_eq!(world.state.writer_of(id).map(|s| s.id), Some(session_id(1)));
    let second = world.journal.last().cloned().map(|record| match record {
        Record::SessionOpen { secret, instance, node, pid, attached, opened, .. } => {
            Record::SessionOpen { session: session_id(2), secret, instance, node, pid, attached, opened }
        }
        other => other,
    });
    assert!(world.state.clone().apply(&second.expect("recorded")).is_err());
    let epoch = world.snapshot(0);
    let reader = world.open_reader(0, epoch);
    assert_eq!(world.state.sessions_of(id).map(|s| s.id).collect::<Vec<_>>(), [session_id(1), reader]);
    assert_eq!(world.state.readers_of(id, epoch).map(|s| s.id).collect::<Vec<_>>(), [reader]);
    world.record(Record::SessionEnd { session: session_id(1) });
    assert!(world.state.writer_of(id).is_none());
    world.check();
}

#[test]
fn results_are_kept_until_they_were_received_and_no_more_than_a_session_may_have() {
    let mut world = World::new();
    let session = session_id(1);
    world.open(session, Attached::Operator);
    let store = |sequence: u64, lowest: u64| Record::Result {
        session,
        sequence: Sequence(sequence),
        lowest_unanswered: Sequence(lowest),
        result: Ok(OperatorReply::Done),
    };
    world.record(store(1, 1));
    world.record(store(2, 2));
    assert!(world.state.result(session, Sequence(1)).is_none());
    assert_eq!(world.state.result(session, Sequence(2)), Some(&Ok(OperatorReply::Done)));
    for sequence in 3..RESULTS_PER_SESSION_MAX as u64 + 2 {
        world.record(store(sequence, 2));
    }
    assert!(!world.state.session(session).expect("open").can_store(1, Sequence(2)));
    assert!(world.state.clone().apply(&store(1000, 2)).is_err());
    world.check_recovery();
    world.record(Record::SessionEnd { session });
    assert!(world.state.result(session, Sequence(2)).is_none());
}
