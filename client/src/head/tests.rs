//! Heads on the file system that temporary files are on; the direct tests say so and pass where that has no direct I/O.

use std::fs::File;

use csnap_proto::{ChunkSize, Name, Target, VolumeId};
use proptest::prelude::*;

use super::*;

const SIZE: u64 = 256 << 10;

struct Pool {
    dir: tempfile::TempDir,
}

impl Pool {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join("head")).expect("fresh");
        let pool = Self { dir };
        File::create(pool.head()).expect("fresh").set_len(SIZE).expect("sparse");
        pool
    }

    fn head(&self) -> PathBuf {
        self.dir.path().join("head").join(VolumeId(7).file_name())
    }

    fn geometry(&self, head: Head) -> Geometry {
        let target = Target { volume: Name::new("demo").expect("a name"), snapshot: None };
        Geometry {
            volume: VolumeId(7),
            snapshot: None,
            target,
            size_bytes: SIZE,
            chunk: ChunkSize::MIN,
            head,
        }
    }

    fn open(&self, shared: bool) -> Result<HeadFile, RequestError> {
        let config = DataConfig { pool: self.dir.path().to_owned(), shared };
        HeadFile::open(&config, &self.geometry(Head::Pool), true)
    }

    /// `None` where the file system has no direct I/O.
    fn open_direct(&self) -> Option<HeadFile> {
        let head = self.open(true).ok()?;
        head.read(0, 1).is_ok().then_some(head)
    }
}

#[test]
fn what_is_written_is_read_at_once_and_by_waiting() {
    let pool = Pool::new();
    let head = pool.open(false).expect("opens");
    let data = vec![7; 8192];
    assert_eq!(head.try_write(4096, &data), Ok(true));
    assert_eq!(head.read(4096, 8192).expect("reads"), data);
    let mut buf = vec![0; 8192];
    assert_eq!(head.try_read(4096, &mut buf), Ok(true));
    assert_eq!(buf, data);
    head.sync().expect("syncs");
}

#[test]
fn reading_beyond_the_end_is_an_error_not_zeros() {
    let pool = Pool::new();
    let head = pool.open(false).expect("opens");
    assert!(matches!(head.read(SIZE - 1, 2), Err(IoFailure::Media(reason)) if reason.contains("shorter")));
    assert_eq!(head.try_write(SIZE - 4096, &[1; 4096]), Ok(true));
    assert!(head.try_read(SIZE - 1, &mut [0; 2]).is_err());
}

#[test]
fn holes_are_found_made_and_filled() {
    let pool = Pool::new();
    let head = pool.open(false).expect("opens");
    let run = |len, hole| BlockRun { len, hole, zero: hole };
    assert_eq!(head.runs(0, SIZE), Ok(vec![run(SIZE, true)]));
    head.write(65536, &[1; 65536]).expect("writes");
    assert_eq!(
        head.runs(4096, SIZE - 4096),
        Ok(vec![run(61440, true), run(65536, false), run(SIZE - 131_072, true)])
    );
    head.punch(65536, 32768).expect("punches");
    assert_eq!(head.runs(0, 131_072), Ok(vec![run(98304, true), run(32768, false)]));
    head.zero(98304 + 10, 100, false).expect("zeroes");
    let data = head.read(98304, 200).expect("reads");
    assert!(data[..10].iter().chain(&data[110..]).all(|b| *b == 1) && data[10..110].iter().all(|b| *b == 0));
}

#[test]
fn a_head_has_one_writer_until_the_last_handle_is_gone() {
    let pool = Pool::new();
    let first = std::sync::Arc::new(pool.open(false).expect("opens"));
    let second = pool.open(false).expect("opens");
    assert_eq!(first.try_lock(), Ok(true));
    assert_eq!(second.try_lock(), Ok(false));
    let in_flight = first.clone();
    drop(first);
    assert_eq!(second.try_lock(), Ok(false));
    drop(in_flight);
    assert_eq!(second.try_lock(), Ok(true));
}

#[test]
fn an_adopted_origin_that_was_replaced_is_refused() {
    let pool = Pool::new();
    let path = pool.dir.path().join("disk.img");
    File::create(&path).expect("fresh").set_len(SIZE).expect("sparse");
    let meta = path.metadata().expect("exists");
    let adopted = |inode| Head::Adopted { path: path.display().to_string(), device: meta.dev(), inode };
    let config = DataConfig { pool: pool.dir.path().to_owned(), shared: false };
    assert!(HeadFile::open(&config, &pool.geometry(adopted(meta.ino())), true).is_ok());
    let refused = HeadFile::open(&config, &pool.geometry(adopted(meta.ino() + 1)), true);
    assert!(matches!(refused, Err(RequestError::Media(reason)) if reason.contains("not the origin")));
}

#[test]
fn a_missing_head_says_which() {
    let pool = Pool::new();
    std::fs::remove_file(pool.head()).expect("was there");
    assert!(
        matches!(pool.open(false), Err(RequestError::Media(reason)) if reason.contains("00000000-00000007"))
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn direct_writes_of_any_alignment_change_nothing_else(
        writes in prop::collection::vec((0..SIZE - 1, 1..20_000usize, any::<u8>()), 1..20),
    ) {
        let pool = Pool::new();
        let Some(head) = pool.open_direct() else {
            println!("no direct I/O here");
            return Ok(());
        };
        let mut model = vec![0u8; usize::try_from(SIZE).expect("small")];
        for (offset, len, byte) in writes {
            let at = usize::try_from(offset).expect("small");
            let len = len.min(model.len() - at);
            model[at..at + len].fill(byte);
            head.write(offset, &model[at..at + len]).expect("writes");
            prop_assert_eq!(&head.read(offset, len).expect("reads")[..], &model[at..at + len]);
            prop_assert_eq!(head.try_write(offset, &[0]), Ok(false));
        }
        prop_assert_eq!(&head.read(0, model.len()).expect("reads")[..], &model[..]);
        prop_assert_eq!(pool.head().metadata().expect("exists").len(), SIZE);
    }
}

#[test]
fn direct_writers_of_one_block_do_not_undo_each_other() {
    let pool = Pool::new();
    let Some(head) = pool.open_direct() else {
        println!("no direct I/O here");
        return;
    };
    std::thread::scope(|scope| {
        for part in 0..8u8 {
            let head = &head;
            scope.spawn(move || {
                for _ in 0..20 {
                    head.write(u64::from(part) * 1000, &[part + 1; 1000]).expect("writes");
                }
            });
        }
    });
    let data = head.read(0, 8000).expect("reads");
    for (part, bytes) in data.chunks(1000).enumerate() {
        assert!(bytes.iter().all(|byte| usize::from(*byte) == part + 1), "part {part}");
    }
}

#[test]
fn a_path_that_leads_to_no_storage_is_refused_and_not_waited_for() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name);
    mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a FIFO");
    for path in [at("fifo"), directory.path().to_owned(), "/dev/null".into()] {
        assert!(open_data(&path, false, false).is_err(), "{path:?}");
    }
    std::fs::write(at("head"), b"x").expect("a file");
    let head = open_data(&at("head"), true, false).expect("a head");
    assert!(!rustix::fs::fcntl_getfl(&head).expect("its flags").contains(OFlags::NONBLOCK));
}
