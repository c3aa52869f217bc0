//! Making pools: at any await, by several at once, over anything.

use csnap_proto::PoolId;
use csnap_server::term::{PoolError, PoolToml, create_pool, open_pool};
use csnap_storage::sim::executor::{Task, run};
use csnap_storage::sim::{Rng, SimDisk, SimNode};

use crate::ledger::Ledger;
use crate::world::{SEGMENT_BYTES, recover};

fn wanted(id: u8) -> PoolToml {
    PoolToml { segment_bytes: SEGMENT_BYTES, ..PoolToml::new(PoolId([id; 16]), false) }
}

/// Whoever comes next opens the pool, or completes it, and a term begins in it.
fn must_become_a_pool(disk: &SimDisk, id: u8, context: &str) {
    let storage = disk.storage(SimNode(90));
    match run(open_pool(&storage)) {
        Ok(_) => {}
        Err(PoolError::NotAPool | PoolError::HalfMade) => {
            let made = run(create_pool(&storage, &wanted(id)));
            made.unwrap_or_else(|error| panic!("{context}: {error}"));
        }
        Err(error) => panic!("{context}: {error}"),
    }
    let rng = &mut Rng::new(1);
    recover(disk, &Ledger::default(), &Default::default(), csnap_proto::Term(1), 0, rng)
        .unwrap_or_else(|problem| panic!("{context}: {problem}"));
}

#[test]
fn a_pool_half_made_is_completed_wherever_its_maker_died() {
    let mut states = std::collections::BTreeSet::new();
    for operations in 0.. {
        let disk = SimDisk::new(1);
        disk.set_stepped(true);
        let storage = disk.storage(SimNode(1));
        let toml = wanted(1);
        let mut maker = Task::new(async { create_pool(&storage, &toml).await.map(|_| ()) });
        let done = maker.run_operations(&disk, operations);
        for left in disk.crash_states(64, operations) {
            if states.insert(left.digest()) {
                must_become_a_pool(&left, 2, &format!("after {operations} operations"));
            }
        }
        if done {
            break;
        }
    }
    println!("{} distinct half-made pools completed", states.len());
    assert!(states.len() > 100);
}

#[test]
fn two_makers_at_once_make_one_pool() {
    for seed in 0..200 {
        let disk = SimDisk::new(seed);
        disk.set_stepped(true);
        let rng = &mut Rng::new(seed);
        let mut makers: Vec<_> = (1..=2u8)
            .map(|id| {
                let storage = disk.storage(SimNode(id.into()));
                Task::new(async move { create_pool(&storage, &wanted(id)).await.map(|pool| pool.toml) })
            })
            .collect();
        while !makers.iter_mut().map(Task::poll).collect::<Vec<_>>().iter().all(|done| *done) {
            disk.complete_next(rng);
        }
        let made: Vec<_> = makers.into_iter().filter_map(Task::into_output).collect();
        let opened = {
            disk.set_stepped(false);
            run(open_pool(&disk.storage(SimNode(3)))).expect("somebody finished").toml
        };
        for result in made {
            match result {
                Ok(toml) => assert_eq!(toml, opened, "seed {seed}"),
                Err(error) => assert_eq!(error, PoolError::Exists, "seed {seed}"),
            }
        }
        must_become_a_pool(&disk, 3, &format!("seed {seed}"));
    }
}

#[test]
fn nothing_is_formatted_over() {
    for path in ["head/00000001-00000001", "term/0/gate", "letters.txt", "store/1/0"] {
        let disk = SimDisk::new(1);
        disk.put_file(path, b"precious").expect("a new disk");
        let before = disk.digest();
        let refused = run(create_pool(&disk.storage(SimNode(1)), &wanted(1))).map(|_| ());
        assert!(matches!(refused, Err(PoolError::NotEmpty(_))), "{path}: {refused:?}");
        assert_eq!(disk.digest(), before, "{path}");
    }
}

#[test]
fn a_pool_of_another_version_is_refused_with_one_line() {
    let disk = SimDisk::new(1);
    disk.put_file("pool.toml", b"format = 7\nsomething = \"new\"\n").expect("a new disk");
    let storage = disk.storage(SimNode(1));
    for refused in [run(open_pool(&storage)).map(|_| ()), run(create_pool(&storage, &wanted(1))).map(|_| ())]
    {
        let error = refused.expect_err("it is another version");
        assert_eq!(error, PoolError::Format { found: 7 });
        assert_eq!(error.to_string().lines().count(), 1);
    }
}
