//! Lockspaces as people see them.

use csnap_proto::Term;
use csnap_proto::message::lock::{SpaceState, SpaceView};

use super::{Space, Spaces, State};

impl Spaces {
    /// All of them, in the order in which they came to be here.
    #[must_use]
    pub fn view(&self) -> Vec<SpaceView> {
        self.spaces.values().map(Space::view).collect()
    }
}

impl Space {
    fn view(&self) -> SpaceView {
        let state = match &self.state {
            State::Active(_) => SpaceState::Active,
            State::Frozen { way, .. } => SpaceState::Frozen(way.clone()),
            State::Importing(import) => SpaceState::Importing {
                migration: import.migration,
                have: import.have(),
                bytes: import.manifest.bytes,
            },
            State::Imported { .. } => {
                SpaceState::Imported { migration: self.came_by.expect("it came by a move") }
            }
            State::Forwarded { way, activated } => {
                SpaceState::Forwarded { way: way.clone(), activated: *activated }
            }
        };
        let table = match &self.state {
            State::Imported { table, .. } => Some(&**table),
            _ => self.table(),
        };
        SpaceView {
            name: self.name.clone(),
            state,
            sessions: table.map_or(0, |table| table.leases().count() as u64),
            locks: table.map_or(0, |table| table.lock_count() as u64),
            term: table.map_or(Term(0), |table| table.term()),
            trouble: self.trouble.clone(),
        }
    }
}
