//! `csnap check`: everything that a pool's bytes must fulfil, verified while nobody uses them.
//!
//! Reads every record that terms left, the state that they make, and the files that the state speaks of. Changes
//! nothing, unless it is asked to remove what nothing refers to. What it calls *damage* somebody was promised and does
//! not get; a *leftover* takes space and harms nobody.

use std::collections::BTreeSet;

use csnap_proto::{Term, VolumeId};
use csnap_storage::{Access, Storage, StorageError};

use crate::copy::{arena_path, head_path};
use crate::replay::StateReplay;
use crate::state::{Origin, State};
use crate::term::{Follower, Pool, PoolError, TermError, names, open_pool, verify};

/// Why a pool could not be checked at all.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It cannot be opened.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// It cannot be read.
    #[error(transparent)]
    Term(#[from] TermError),
    /// The medium refused.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Somebody serves it.
    #[error("the pool is in use by the server of term {0}: stop csnap on it first")]
    InUse(Term),
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is wrong, for people.
    pub what: String,
    /// File, and place in it.
    pub at: String,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct CheckReport {
    /// Terms that left something.
    pub terms: usize,
    /// Journal records that were read.
    pub records: u64,
    /// Volumes.
    pub volumes: usize,
    /// Snapshots.
    pub snapshots: usize,
    /// Store space of versions, bytes.
    pub used_bytes: u64,
    /// What somebody was promised and does not get.
    pub damage: Vec<Finding>,
    /// Files that nothing refers to.
    pub leftovers: Vec<Finding>,
    /// Leftovers that were removed.
    pub removed: usize,
}

/// Verifies the pool at the root of `storage`; with `repair`, removes what nothing refers to, if nothing is damaged.
///
/// # Errors
/// When the pool cannot be opened or read, or is in use. Damage is part of the report.
pub async fn check<S: Storage>(storage: &S, repair: bool) -> Result<CheckReport, CheckError> {
    let pool = open_pool(storage).await?;
    let mut report = CheckReport::default();
    let found = verify::verify(&pool).await?;
    let _lock = match found.newest {
        Some(newest) => Some(lock_gate(&pool, newest).await?.ok_or(CheckError::InUse(newest))?),
        None => None,
    };
    report.terms = found.terms.len();
    report.records = found.terms.iter().map(|term| term.records).sum();
    report
        .damage
        .extend(found.damage.into_iter().map(|corrupt| Finding { what: corrupt.what, at: corrupt.at }));
    if report.damage.is_empty() {
        check_state(&pool, &mut report).await?;
        // What a term after the ones read here leaves is its own.
        let newest = found.newest.unwrap_or(Term(0));
        report.leftovers.retain(|leftover| maker_of(&leftover.at).is_some_and(|term| term <= newest));
    }
    if repair && report.damage.is_empty() {
        remove_leftovers(storage, &mut report).await?;
    }
    Ok(report)
}

/// The lock that a serving server holds on its gate, or nothing if one does.
pub(crate) async fn lock_gate<S: Storage>(
    pool: &Pool<S>,
    term: Term,
) -> Result<Option<S::File>, StorageError> {
    let file = pool.storage.open(&names::gate(term), Access::Read).await?;
    Ok(pool.storage.try_lock(&file).await?.then_some(file))
}

async fn check_state<S: Storage>(pool: &Pool<S>, report: &mut CheckReport) -> Result<(), CheckError> {
    let mut follower = Follower::new(pool, StateReplay::new(pool.id()));
    match follower.advance().await {
        Ok(_) => {}
        Err(TermError::Corrupt(corrupt)) => {
            report.damage.push(Finding { what: corrupt.what, at: corrupt.at });
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    }
    let state = follower.replay().state();
    report.volumes = state.volumes().count();
    report.snapshots = state.volumes().map(|volume| state.snapshot_count(volume.id)).sum();
    report.used_bytes = state.used_bytes();
    if let Err(broken) = state.check() {
        report.damage.extend(broken.into_iter().map(|what| Finding { what, at: "state".to_owned() }));
    }
    check_heads(&pool.storage, state, report).await?;
    check_arenas(&pool.storage, state, report).await
}

/// Every volume has its head, of its size; every head has its volume.
async fn check_heads<S: Storage>(
    storage: &S,
    state: &State,
    report: &mut CheckReport,
) -> Result<(), CheckError> {
    let expected: BTreeSet<String> = state.heads().map(VolumeId::file_name).collect();
    for volume in state.volumes() {
        let path = match &volume.origin {
            Origin::Pool => head_path(volume.id),
            Origin::Adopted { path, .. } => path.clone(),
        };
        let stat = match &volume.origin {
            Origin::Pool => storage.stat(&path).await,
            Origin::Adopted { .. } => match storage.open_origin(&path).await {
                Ok(file) => storage.stat_file(&file).await,
                Err(error) => Err(error),
            },
        };
        let what = match (stat, &volume.origin) {
            (Err(StorageError::NotFound { .. }), _) => {
                format!("the head of volume {} is missing", volume.name)
            }
            // Whatever took the place of an origin: the rest of the pool is checked all the same.
            (Err(StorageError::Io { reason, .. }), Origin::Adopted { .. }) => {
                format!("the origin that volume {} adopted cannot be opened: {reason}", volume.name)
            }
            (Err(error), _) => return Err(error.into()),
            (Ok(stat), _) if stat.size_bytes < volume.size_bytes => {
                let (is, should) = (stat.size_bytes, volume.size_bytes);
                format!("the head of volume {} has {is} bytes, not {should}", volume.name)
            }
            (Ok(stat), Origin::Adopted { device, inode, .. })
                if (stat.device, stat.inode) != (*device, *inode) =>
            {
                format!("it is not the origin that volume {} adopted", volume.name)
            }
            (Ok(_), _) => continue,
        };
        report.damage.push(Finding { what, at: path });
    }
    for name in storage.list(names::HEADS).await? {
        if !expected.contains(&name) {
            let what = "a head of no volume".to_owned();
            report.leftovers.push(Finding { what, at: format!("{}/{name}", names::HEADS) });
        }
    }
    Ok(())
}

/// Every arena that the state knows is there; every other is a leftover.
async fn check_arenas<S: Storage>(
    storage: &S,
    state: &State,
    report: &mut CheckReport,
) -> Result<(), CheckError> {
    let expected: BTreeSet<String> = state.arenas().map(|(term, arena)| arena_path(term, arena)).collect();
    let mut found = BTreeSet::new();
    for term in storage.list(names::STORE).await? {
        let directory = format!("{}/{term}", names::STORE);
        found.extend(storage.list(&directory).await?.into_iter().map(|arena| format!("{directory}/{arena}")));
    }
    for path in expected.difference(&found) {
        report.damage.push(Finding { what: "an arena of the store is missing".to_owned(), at: path.clone() });
    }
    for path in found.difference(&expected) {
        report.leftovers.push(Finding { what: "an arena that holds nothing".to_owned(), at: path.clone() });
    }
    Ok(())
}

/// The term that made a head or an arena: both are named by it.
fn maker_of(path: &str) -> Option<Term> {
    let (directory, name) = path.rsplit_once('/')?;
    match directory.strip_prefix("store/") {
        Some(term) => term.parse().ok().map(Term),
        None => u64::from_str_radix(name.split_once('-')?.0, 16).ok().map(Term),
    }
}

async fn remove_leftovers<S: Storage>(storage: &S, report: &mut CheckReport) -> Result<(), CheckError> {
    let mut directories = BTreeSet::new();
    for leftover in &report.leftovers {
        storage.unlink(&leftover.at).await?;
        if let Some((directory, _)) = leftover.at.rsplit_once('/') {
            directories.insert(directory.to_owned());
        }
        report.removed += 1;
    }
    for directory in directories {
        storage.sync_dir(&directory).await?;
    }
    Ok(())
}
