//! The judge: what users may expect of volumes and snapshots, and what nobody may ever see of servers.
//!
//! - [`stamp`]: every sector says which write it is; [`sector`]: what a sector may hold, now and after a power loss;
//! - [`spans`]: sets of instants; a snapshot is *exact*: all its reads agree on one instant between its create and its OK;
//! - [`volume`]: a volume with its snapshots; [`terms`]: what servers acted upon, and what their successors have;
//! - [`group`]: the lockds, and who led; [`mutex`]: a register that refuses old terms.

pub mod group;
pub mod mutex;
pub mod sector;
pub mod spans;
pub mod stamp;
pub mod terms;
pub mod volume;

use csnap_proto::Name;

pub use group::Group;
pub use mutex::Mutex;
pub use stamp::Stamp;
pub use terms::Terms;
pub use volume::{Life, Snapshot, Volume};

/// See the module.
#[derive(Debug, Default)]
pub struct Model {
    /// Volumes, in the order in which they were made.
    pub volumes: Vec<Volume>,
    /// Servers.
    pub terms: Terms,
    writes: u64,
}

impl Model {
    /// A new write.
    pub fn stamp(&mut self, zeros: bool) -> Stamp {
        self.writes += 1;
        Stamp::new(self.writes, zeros)
    }

    /// A volume by name.
    #[must_use]
    pub fn volume_named(&self, name: &Name) -> Option<usize> {
        self.volumes.iter().position(|volume| volume.name == *name)
    }

    /// The volume whose head lies at this path of the pool.
    #[must_use]
    pub fn volume_of_head(&self, path: &str) -> Option<usize> {
        let file = path.rsplit_once('/').map_or(path, |(_, file)| file);
        let is_its = |volume: &Volume| volume.id.is_some_and(|id| id.file_name() == file);
        if path.starts_with("head/") { self.volumes.iter().position(is_its) } else { None }
    }

    /// The power was lost.
    pub fn power_lost(&mut self, now: u64) {
        self.volumes.iter_mut().for_each(|volume| volume.power_lost(now));
    }
}
