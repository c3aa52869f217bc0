//! The offline verifier on a real file system: what the simulated disk has no kinds of files for.
#![cfg(feature = "shell")]

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use csnap_proto::{ChunkSize, Name, PoolId, Term, Time, VolumeId, WallMillis};
use csnap_server::check::check;
use csnap_server::replay::StateReplay;
use csnap_server::state::{Origin, Record};
use csnap_server::term::{Follower, PoolToml, Prepared, create_pool, take_over};
use csnap_storage::posix::{PosixOptions, PosixStorage};
use rustix::fs::{CWD, FileType, Mode, mknodat};

const ORIGIN_BYTES: usize = 1 << 20;

fn storage(pool: &Path) -> PosixStorage {
    PosixStorage::open(pool, PosixOptions::default()).expect("a directory")
}

/// A pool whose only volume adopted `origin`.
async fn pool_with(pool: &Path, origin: &Path) {
    let stat = std::fs::metadata(origin).expect("it was made");
    let id = PoolId([5; 16]);
    let toml = PoolToml::new(id, false);
    let pool = create_pool(&storage(pool), &toml).await.unwrap_or_else(|error| panic!("{error}"));
    let follower = Follower::new(&pool, StateReplay::new(id));
    let taken =
        take_over(&pool, Term(1), follower, || Time(1)).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(taken.journal.prepare_segment().await, Ok(Prepared::Ready));
    let records = [
        Record::PoolInit { pool: id },
        Record::TermBegin { term: Term(1), node: Name::new("n1").expect("a name") },
        Record::VolumeCreate {
            id: VolumeId::new(Term(1), 1).expect("small"),
            name: Name::new("old").expect("a name"),
            size_bytes: ORIGIN_BYTES as u64,
            chunk: ChunkSize::MIN,
            origin: Origin::Adopted {
                path: origin.to_str().expect("text").to_owned(),
                device: stat.dev(),
                inode: stat.ino(),
            },
            created: WallMillis(0),
            importer: None,
        },
    ];
    let batch = records.iter().fold(Vec::new(), |batch, record| record.encode_onto(batch));
    assert!(taken.journal.commit(batch).await.expect("the disk is well"));
}

/// What stands where an origin was, and how it is put there.
type Impostor = (&'static str, fn(&Path));

const IMPOSTORS: [Impostor; 5] = [
    ("nothing", |_| ()),
    ("a file", |path| std::fs::write(path, vec![0; ORIGIN_BYTES]).expect("a file")),
    ("a FIFO", |path| mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0).expect("a FIFO")),
    ("a socket", |path| drop(UnixListener::bind(path).expect("a socket"))),
    ("a directory", |path| std::fs::create_dir(path).expect("a directory")),
];

async fn replaced_by((what, put): Impostor) {
    let scratch = tempfile::tempdir().expect("a directory");
    let (pool, origin) = (scratch.path().join("pool"), scratch.path().join("origin"));
    std::fs::create_dir(&pool).expect("a directory");
    std::fs::write(&origin, vec![0; ORIGIN_BYTES]).expect("a file");
    Box::pin(pool_with(&pool, &origin)).await;
    let sound = check(&storage(&pool), false).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(sound.damage, []);
    // Kept, so that what takes its place has another inode.
    std::fs::rename(&origin, scratch.path().join("kept")).expect("it is there");
    put(&origin);
    let report = check(&storage(&pool), false).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    let [damage] = report.damage.as_slice() else { panic!("{what}: {:?}", report.damage) };
    assert_eq!(Path::new(&damage.at), origin, "{what}");
    println!("{what}: {}", damage.what);
}

#[test]
fn whatever_stands_where_an_origin_was_is_one_damage() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let local = tokio::task::LocalSet::new();
    for impostor in IMPOSTORS {
        local.block_on(&runtime, replaced_by(impostor));
    }
}
