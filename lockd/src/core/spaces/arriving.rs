//! The destination's half of a move: imported in pieces, activated; or discarded.

use csnap_proto::limits::IMPORTS_MAX;
use csnap_proto::message::lock::{Manifest, SpaceReply};
use csnap_proto::{MigrationId, Name};

use super::import::{Before, Import};
use super::{Effect, SpaceId, Spaces, State};
use crate::core::table::Table;

impl Spaces {
    pub(super) fn import(
        &mut self,
        name: Name,
        migration: MigrationId,
        manifest: Manifest,
        offset: u64,
        bytes: &[u8],
    ) -> Result<SpaceReply, String> {
        let id = match self.find(&name) {
            Some(id) => id,
            None => {
                self.has_room()?;
                self.may_import()?;
                self.add(name, State::Importing(Import::new(migration, manifest, Before::Nothing)))
            }
        };
        if self.spaces[&id].came_by == Some(migration) {
            return Ok(SpaceReply::Imported { have: manifest.bytes });
        }
        self.make_way(id, migration, manifest)?;
        let space = self.spaces.get_mut(&id).expect("found above");
        let State::Importing(import) = &mut space.state else { unreachable!("it was made one above") };
        import.take(offset, bytes);
        let have = import.have();
        if have == manifest.bytes {
            match import.finish() {
                Ok(table) => {
                    let (table, before) = (Box::new(table), import.before.clone());
                    space.state = State::Imported { table, before };
                    space.came_by = Some(migration);
                }
                Err(what) => {
                    let name = space.name.clone();
                    self.give_back(id);
                    return Err(format!("lockspace {name} came damaged: {what}"));
                }
            }
        }
        Ok(SpaceReply::Imported { have })
    }

    /// Makes the lockspace one that comes by this move, if it may be.
    fn make_way(&mut self, id: SpaceId, migration: MigrationId, manifest: Manifest) -> Result<(), String> {
        let space = &self.spaces[&id];
        let name = &space.name;
        let before = match &space.state {
            State::Importing(import) if import.migration == migration => {
                if import.manifest == manifest {
                    return Ok(());
                }
                // Encoded by another version of lockd: the same lockspace, from its start.
                import.before.clone()
            }
            // Nobody misses what nothing was ever in.
            State::Active(table) if **table == Table::default() => Before::Empty,
            State::Forwarded { way, activated: true } => Before::Elsewhere(way.clone(), space.came_by),
            State::Forwarded { .. } => {
                return Err(format!("lockspace {name} has not arrived where it moved from here"));
            }
            State::Active(_) | State::Frozen { .. } => {
                return Err(format!("the destination has a lockspace {name} with something in it"));
            }
            State::Importing(_) | State::Imported { .. } => {
                return Err(format!(
                    "the destination has lockspace {name} from a move that did not end; activate or discard it there"
                ));
            }
        };
        if !matches!(space.state, State::Importing(_)) {
            self.may_import()?;
        }
        let space = self.spaces.get_mut(&id).expect("looked at above");
        space.state = State::Importing(Import::new(migration, manifest, before));
        Ok(())
    }

    fn may_import(&self) -> Result<(), String> {
        let importing = self.spaces.values().filter(|space| matches!(space.state, State::Importing(_)));
        if importing.count() < IMPORTS_MAX {
            return Ok(());
        }
        Err(format!("the destination takes in {IMPORTS_MAX} lockspaces already; try again"))
    }

    pub(super) fn discard(&mut self, name: &Name, migration: MigrationId) -> Result<SpaceReply, String> {
        let Some(id) = self.find(name) else { return Ok(SpaceReply::Done) };
        let space = &self.spaces[&id];
        let came = space.came_by == Some(migration);
        let coming = match &space.state {
            State::Importing(import) => import.migration == migration,
            State::Imported { .. } => came,
            State::Active(_) | State::Frozen { .. } | State::Forwarded { .. } => false,
        };
        if coming {
            self.give_back(id);
        } else if came {
            return Err(format!("lockspace {name} was activated here: it is this group's"));
        }
        Ok(SpaceReply::Done)
    }

    /// What came is forgotten; what was there before is there again.
    fn give_back(&mut self, id: SpaceId) {
        let Some(space) = self.spaces.get_mut(&id) else { return };
        let before = match &space.state {
            State::Importing(Import { before, .. }) | State::Imported { before, .. } => before.clone(),
            State::Active(_) | State::Frozen { .. } | State::Forwarded { .. } => return,
        };
        space.came_by = None;
        match before {
            Before::Nothing => {
                self.spaces.remove(&id);
            }
            Before::Empty => space.state = State::Active(Box::default()),
            Before::Elsewhere(way, came_by) => {
                space.state = State::Forwarded { way, activated: true };
                space.came_by = came_by;
            }
        }
    }

    pub(super) fn activate(
        &mut self,
        name: &Name,
        migration: MigrationId,
        effects: &mut Vec<Effect>,
    ) -> Result<SpaceReply, String> {
        let nothing = || format!("there is no lockspace {name} here that came by that move");
        let id = self.find(name).ok_or_else(nothing)?;
        let space = self.spaces.get_mut(&id).expect("found above");
        if space.came_by != Some(migration) {
            return Err(nothing());
        }
        if let State::Imported { table, .. } = &mut space.state {
            space.state = State::Active(std::mem::take(table));
            effects.push(Effect::Activated(id));
        }
        Ok(SpaceReply::Done)
    }
}
