//! A volume as its users may expect it: what each sector may hold, which snapshots there are, and what each of them is.

use std::collections::{BTreeMap, BTreeSet};

use csnap_proto::{Name, RequestToken, VolumeId};
use csnap_storage::sim::SECTOR_BYTES;

use super::sector::Sector;
use super::spans::Spans;
use super::stamp::{self, Found, Stamp};

const SECTOR: u64 = SECTOR_BYTES as u64;

/// How far a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Asked for and not answered.
    Asked,
    /// Its create was answered.
    Live,
    /// Whoever asked for it, or for its end, is gone: there or not.
    Unknown,
    /// Its end was asked for.
    Ending,
    /// It is gone.
    Gone,
}

/// A snapshot.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its name, as far as its owner knows.
    pub name: Name,
    /// Another name that it may have got.
    pub renamed: Option<Name>,
    /// The name that it had before it got this one.
    pub former: Option<Name>,
    /// How far it is.
    pub life: Life,
    /// Since when.
    pub since: u64,
    /// Instants whose content it may have.
    instants: Spans,
    /// Its end was forced: its readers may see errors.
    pub forced: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Volume {
    /// In every stamp.
    pub tag: u64,
    /// Its name.
    pub name: Name,
    /// Identity, once the server gave it.
    pub id: Option<VolumeId>,
    /// Bytes.
    pub size_bytes: u64,
    sectors: Vec<Sector>,
    dirty: BTreeSet<usize>,
    /// By the token of their create.
    pub snapshots: BTreeMap<RequestToken, Snapshot>,
}

impl Volume {
    /// A new one, all zeros.
    #[must_use]
    pub fn new(now: u64, tag: u64, name: Name, size_bytes: u64) -> Self {
        let count = usize::try_from(size_bytes / SECTOR).expect("simulated volumes are small");
        let sectors = vec![Sector::new(now); count];
        Self { tag, name, id: None, size_bytes, sectors, dirty: BTreeSet::new(), snapshots: BTreeMap::new() }
    }

    fn indexes(offset: u64, len: u64) -> std::ops::Range<usize> {
        let index = |bytes: u64| usize::try_from(bytes / SECTOR).expect("simulated volumes are small");
        index(offset)..index(offset + len)
    }

    /// What a write puts there.
    #[must_use]
    pub fn content(&self, offset: u64, len: u64, stamp: Stamp) -> Vec<u8> {
        stamp::fill(self.tag, offset / SECTOR, len / SECTOR, stamp)
    }

    /// I/O that changes the range begins.
    pub fn write_begins(&mut self, now: u64, offset: u64, len: u64, stamp: Stamp) {
        for index in Self::indexes(offset, len) {
            self.sectors[index].write_begins(now, stamp);
            self.dirty.insert(index);
        }
    }

    /// It returned, or its process died under it.
    pub fn write_ends(&mut self, now: u64, offset: u64, len: u64, stamp: Stamp, done: bool) {
        for index in Self::indexes(offset, len) {
            self.sectors[index].write_ends(now, stamp, done);
        }
    }

    /// A flush that was asked for at `asked` is acknowledged.
    pub fn flushed(&mut self, asked: u64) {
        let sectors = &mut self.sectors;
        self.dirty.retain(|index| {
            sectors[*index].flushed(asked);
            sectors[*index].is_dirty()
        });
    }

    /// A write with FUA is acknowledged.
    pub fn written_through(&mut self, offset: u64, len: u64, stamp: Stamp) {
        Self::indexes(offset, len).for_each(|index| self.sectors[index].written_through(stamp));
    }

    /// A sync of the head failed.
    pub fn sync_failed(&mut self, now: u64) {
        self.dirty.iter().for_each(|index| self.sectors[*index].sync_failed(now));
    }

    /// The power was lost.
    pub fn power_lost(&mut self, now: u64) {
        self.dirty.iter().for_each(|index| self.sectors[*index].power_lost(now));
    }

    fn look(&self, index: usize, bytes: &[u8]) -> Result<Found, String> {
        let found = stamp::look(bytes);
        match found {
            Found::Stamp { volume, sector, .. } if (volume, sector) != (self.tag, index as u64) => {
                Err(format!("{}: sector {index} holds {found:?}, which is another's", self.name))
            }
            Found::Garbage => Err(format!("{}: sector {index} holds what nobody wrote", self.name)),
            _ => Ok(found),
        }
    }

    /// A read of the head, between `asked` and `now`.
    pub fn read(&mut self, asked: u64, now: u64, offset: u64, bytes: &[u8]) -> Result<(), String> {
        for (index, content) in (Self::indexes(offset, bytes.len() as u64)).zip(bytes.chunks(SECTOR_BYTES)) {
            let found = self.look(index, content)?;
            let read = self.sectors[index].read(asked, now, found);
            read.map_err(|what| format!("{}: sector {index}: {what}", self.name))?;
        }
        Ok(())
    }

    /// The head as it lies on the medium after a power loss.
    pub fn check_survived(&self, bytes: &[u8]) -> Result<(), String> {
        for (index, content) in bytes.chunks(SECTOR_BYTES).enumerate() {
            let found = self.look(index, content)?;
            if !self.sectors[index].may_survive(found) {
                let survivors = self.sectors[index].survivors();
                return Err(format!(
                    "{}: sector {index} holds {found:?} after a power loss, which may leave {survivors:?}",
                    self.name
                ));
            }
        }
        Ok(())
    }

    /// A snapshot is asked for.
    pub fn snapshot_asked(&mut self, now: u64, token: RequestToken, name: Name) {
        let instants = Spans::one(now, u64::MAX);
        let snapshot = Snapshot {
            name,
            renamed: None,
            former: None,
            life: Life::Asked,
            since: now,
            instants,
            forced: false,
        };
        self.snapshots.insert(token, snapshot);
    }

    /// It is known to be there by now.
    pub fn snapshot_made(&mut self, now: u64, token: RequestToken) {
        if let Some(snapshot) = self.snapshots.get_mut(&token) {
            snapshot.instants.cut(now);
        }
        self.set_life(now, token, Life::Live);
    }

    /// It was listed: it was made by now, and may be on its way out.
    pub fn snapshot_seen(&mut self, now: u64, token: RequestToken) {
        if let Some(snapshot) = self.snapshots.get_mut(&token) {
            snapshot.instants.cut(now);
        }
    }

    /// It is known to be so from now on.
    pub fn set_life(&mut self, now: u64, token: RequestToken, life: Life) {
        if let Some(snapshot) = self.snapshots.get_mut(&token) {
            (snapshot.life, snapshot.since) = (life, now);
        }
    }

    /// A read of a snapshot: there must be one instant between its create and its OK at which the volume was what all
    /// reads of it so far have seen, with no write under way.
    pub fn read_snapshot(&mut self, token: RequestToken, offset: u64, bytes: &[u8]) -> Result<(), String> {
        let name = self.snapshots[&token].name.clone();
        let mut instants = self.snapshots[&token].instants.clone();
        for (index, content) in (Self::indexes(offset, bytes.len() as u64)).zip(bytes.chunks(SECTOR_BYTES)) {
            let found = self.look(index, content).map_err(|what| format!("snapshot {name}: {what}"))?;
            let bounds = instants.bounds().expect("checked below and at the start");
            let held = self.sectors[index].when_held(found, bounds);
            let left = instants.meet(&held);
            if left.is_empty() {
                return Err(format!(
                    "{}@{name}: sector {index} holds {found:?}, held at {held:?}; the snapshot is of {instants:?}",
                    self.name
                ));
            }
            instants = left;
        }
        self.snapshots.get_mut(&token).expect("looked up above").instants = instants;
        Ok(())
    }

    /// A snapshot by a name that it may have.
    #[must_use]
    pub fn snapshot_named(&self, name: &Name) -> Option<RequestToken> {
        let there = |s: &Snapshot| s.life != Life::Gone && s.may_be_called(name);
        self.snapshots.iter().find(|(_, s)| there(s)).map(|(token, _)| *token)
    }

    /// Checks a list of names that was asked for at `asked`: those known to be there are, those known to be gone are not.
    pub fn check_list(&self, asked: u64, listed: &BTreeSet<Name>) -> Result<(), String> {
        let known = |s: &&Snapshot| s.since < asked;
        for snapshot in self.snapshots.values().filter(known).filter(|s| s.life == Life::Live) {
            if !listed.iter().any(|name| snapshot.may_be_called(name)) {
                return Err(format!("{}@{} is missing from the list", self.name, snapshot.name));
            }
        }
        for name in listed {
            let may_be = |s: &Snapshot| {
                let just_now = s.since >= asked;
                s.may_be_called(name) && (s.life != Life::Gone || just_now)
                    || s.former.as_ref() == Some(name) && just_now
            };
            if !self.snapshots.values().any(may_be) {
                return Err(format!("{}@{name} is listed, but is gone or was never made", self.name));
            }
        }
        Ok(())
    }
}

impl Snapshot {
    fn may_be_called(&self, name: &Name) -> bool {
        self.name == *name || self.renamed.as_ref() == Some(name)
    }
}
