//! The power is lost after every operation of a history, with many of the disks that this may leave; on each of them
//! everything that was promised must be there, and the next server must come to its end, also if it is interrupted.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use csnap_proto::{PoolId, Term};
use csnap_server::check::{CheckReport, check};
use csnap_server::term::{PoolToml, create_pool};
use csnap_storage::sim::executor::{Task, run};
use csnap_storage::sim::{Rng, SimDisk, SimNode};

use crate::history::{history, live, put_origins, recover};
use crate::model::{Change, Ledger, reachable_bytes};
use crate::server::{Broken, Gone, Server};

/// Small segments, so that they end often.
const SEGMENT_BYTES: u64 = 32 << 10;

/// Above every term of a history.
const RECOVERER: Term = Term(100);

/// How much of what could be looked at is looked at.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) broken: Broken,
    /// Disks left by a power loss that are looked at per operation.
    pub(crate) states: u64,
    /// One in so many recoveries is interrupted at each of its own operations.
    pub(crate) interrupted: u64,
}

/// Distinct crash states, by what was being done. A state is a whole disk: names, sizes and sectors.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Seen {
    all: BTreeSet<u64>,
    pub(crate) of_kind: BTreeMap<&'static str, u64>,
}

impl Seen {
    fn insert(&mut self, disk: &SimDisk, kind: &'static str) -> bool {
        let fresh = self.all.insert(disk.digest());
        *self.of_kind.entry(kind).or_default() += u64::from(fresh);
        fresh
    }

    pub(crate) fn count(&self) -> u64 {
        self.all.len() as u64
    }
}

pub(crate) fn new_pool(seed: u64) -> SimDisk {
    let disk = SimDisk::new(seed);
    let toml = PoolToml { segment_bytes: SEGMENT_BYTES, ..PoolToml::new(PoolId([9; 16]), false) };
    run(create_pool(&disk.storage(SimNode(0)), &toml)).unwrap_or_else(|error| panic!("{error}"));
    put_origins(&disk);
    disk
}

/// Lives through the history of a seed and ends it everywhere.
pub(crate) fn explore(seed: u64, options: &Options, seen: &mut Seen) -> Result<(), String> {
    let rng = &mut Rng::new(seed);
    let disk = new_pool(seed);
    disk.set_stepped(true);
    let ledger = Rc::new(RefCell::new(Ledger::default()));
    let mut life = Task::new(live(disk.clone(), ledger.clone(), options.broken.clone(), history(seed)));
    while !life.poll() {
        let promised = ledger.borrow().clone();
        for left in disk.crash_states(options.states, rng.next_u64()) {
            if seen.insert(&left, promised.doing) {
                let crash = Crash { promised: &promised, options };
                let result = crash.survives(&left, seen);
                result.map_err(|violation| format!("after a crash in {}: {violation}", promised.doing))?;
            }
        }
        // The first history goes on in the order in which it asked; others in any.
        let completed = if seed == 0 { disk.complete_oldest() } else { disk.complete_next(rng) };
        completed.ok_or_else(|| format!("{} waits for something that nobody does", promised.doing))?;
    }
    let ended = life.into_output().expect("it is over");
    ended.map_err(|gone| format!("in {}: {gone}", ledger.borrow().doing))
}

/// A crash and what was promised before.
struct Crash<'a> {
    promised: &'a Ledger,
    options: &'a Options,
}

impl Crash<'_> {
    fn survives(&self, left: &SimDisk, seen: &mut Seen) -> Result<(), String> {
        // What is drawn depends on this disk alone, so that a history fails alone as it does among others.
        let rng = &mut Rng::new(left.digest());
        self.check_offline(left, 0)?;
        let (found, base) = self.recovers(left, RECOVERER, None)?;
        if rng.below(self.options.interrupted) == 0 {
            self.survives_again(left, &found, base, rng, seen)?;
        }
        Ok(())
    }

    /// Recovery, ended at each of its own operations, and done again. It must find what the first one found: whoever
    /// recovers writes to no head.
    fn survives_again(
        &self,
        left: &SimDisk,
        found: &Ledger,
        base: [u8; 32],
        rng: &mut Rng,
        seen: &mut Seen,
    ) -> Result<(), String> {
        let again = Crash { promised: found, options: self.options };
        for operations in 0.. {
            let disk = left.fork();
            disk.set_stepped(true);
            let serves = Cell::new(false);
            let mut task = Task::new(async {
                let mut server =
                    Server::begin(&disk.storage(SimNode(RECOVERER.0)), RECOVERER, &self.options.broken)
                        .await?;
                serves.set(true);
                recover(&mut server, self.promised).await
            });
            if task.run_operations(&disk, operations) {
                return Ok(());
            }
            for twice in disk.crash_states(1, rng.next_u64()) {
                let context = |violation| format!("recovery, interrupted after {operations}: {violation}");
                if seen.insert(&twice, "recovery") {
                    let same = (!serves.get()).then_some(base);
                    again.check_offline(&twice, 1).map_err(context)?;
                    again.recovers(&twice, RECOVERER.next(), same).map_err(context)?;
                }
            }
        }
        Ok(())
    }

    /// Whether the offline verifier finds what nobody can have left.
    fn check_offline(&self, disk: &SimDisk, interruptions: usize) -> Result<(), String> {
        let report =
            run(check(&disk.fork().storage(SimNode(0)), false)).map_err(|error| error.to_string())?;
        self.judge(&report, 1 + interruptions)
    }

    /// Damage never. A head without a volume only of a create that was not acknowledged; an arena that holds nothing only
    /// where the store was growing, or found no room to grow.
    fn judge(&self, report: &CheckReport, attempts: usize) -> Result<(), String> {
        if let Some(damage) = report.damage.first() {
            return Err(format!("damage: {}: {}", damage.at, damage.what));
        }
        let heads: Vec<_> =
            report.leftovers.iter().filter(|finding| finding.at.starts_with("head/")).collect();
        let creates = usize::from(matches!(self.promised.in_hand, Some(Change::Create { .. })));
        match heads.get(attempts * creates) {
            Some(leak) => Err(format!("a leak: {}: {}", leak.at, leak.what)),
            None => Ok(()),
        }
    }

    /// Takes over, looks at everything, goes on to the end, and looks again. What was found, and its digest, which must be
    /// `same` if an earlier takeover found that.
    fn recovers(
        &self,
        left: &SimDisk,
        term: Term,
        same: Option<[u8; 32]>,
    ) -> Result<(Ledger, [u8; 32]), String> {
        let disk = left.fork();
        let storage = disk.storage(SimNode(term.0));
        let failed = |gone: Gone| format!("term {term}: {gone}");
        let mut task = Task::new(async {
            let mut server = Server::begin(&storage, term, &self.options.broken).await.map_err(failed)?;
            let (state, base) = (server.state().clone(), server.base);
            state.check().map_err(|problems| problems.join("; "))?;
            if same.is_some_and(|same| same != base) {
                return Err("it is another state than the one that was found before".to_owned());
            }
            let found = self.promised.found(&storage, &state).await?;
            recover(&mut server, self.promised).await.map_err(failed)?;
            let mut settled = found.clone();
            if settled.in_hand.is_some() {
                settled.acknowledged();
            }
            settled.found(&storage, server.state()).await?;
            self.check_space(server.state())?;
            Ok((found, base))
        });
        if !task.poll() {
            return Err(format!("term {term} waits for something that nobody does"));
        }
        let ended = task.into_output().expect("it is done")?;
        drop(storage);
        let report = run(check(&disk.fork().storage(SimNode(0)), true)).map_err(|error| error.to_string())?;
        self.judge(&report, usize::MAX)?;
        Ok(ended)
    }

    /// With everything settled, the store holds what live snapshots reach and nothing else.
    fn check_space(&self, state: &csnap_server::state::State) -> Result<(), String> {
        state.check().map_err(|problems| problems.join("; "))?;
        let (used, reachable, held) = (state.used_bytes(), reachable_bytes(state), state.held());
        if used != reachable || held.bytes > 0 {
            return Err(format!("{used} bytes used, {reachable} reachable, held: {held:?}"));
        }
        Ok(())
    }
}
