//! The source's half of a move: frozen, forwarded, settled; or thawed.

use csnap_proto::MigrationId;
use csnap_proto::message::lock::{SpaceReply, Way};

use super::canary::Canary;
use super::{Effect, Space, SpaceId, Spaces, State};

impl Spaces {
    pub(super) fn freeze(
        &mut self,
        id: SpaceId,
        way: Way,
        effects: &mut Vec<Effect>,
    ) -> Result<SpaceReply, String> {
        let space = self.spaces.get_mut(&id).ok_or("no such lockspace")?;
        let Space { name, state, given_up, trouble, .. } = space;
        match state {
            State::Active(_) if *given_up == Some(way.migration) => {
                Err(format!("that move of lockspace {name} was given up"))
            }
            State::Active(table) => {
                let table = std::mem::take(table);
                (*state, *trouble) = (State::Frozen { table, way }, None);
                effects.push(Effect::Frozen(id));
                Ok(SpaceReply::Done)
            }
            State::Frozen { way: known, .. } | State::Forwarded { way: known, .. }
                if known.migration == way.migration =>
            {
                Ok(SpaceReply::Done)
            }
            State::Frozen { .. } => Err(format!("lockspace {name} is being moved already")),
            State::Forwarded { .. } => Err(format!("lockspace {name} moved to another group")),
            State::Importing(_) | State::Imported { .. } => {
                Err(format!("lockspace {name} is on its way here and not served yet"))
            }
        }
    }

    pub(super) fn thaw(
        &mut self,
        id: SpaceId,
        migration: MigrationId,
        why: String,
        effects: &mut Vec<Effect>,
    ) -> Result<SpaceReply, String> {
        let broken = self.broken;
        let space = self.spaces.get_mut(&id).ok_or("no such lockspace")?;
        let table = match &mut space.state {
            State::Frozen { table, way } if way.migration == migration => std::mem::take(table),
            State::Forwarded { way, .. }
                if way.migration == migration && broken.breaks(Canary::ThawAfterForward) =>
            {
                Box::default()
            }
            State::Active(_) if space.given_up == Some(migration) => return Ok(SpaceReply::Done),
            State::Forwarded { .. } => {
                return Err(format!(
                    "lockspace {} is forwarded: it is the other group's, move it back from there",
                    space.name
                ));
            }
            _ => return Err(format!("lockspace {} is not being moved by that", space.name)),
        };
        space.state = State::Active(table);
        (space.given_up, space.trouble) = (Some(migration), Some(why));
        effects.push(Effect::Thawed(id));
        Ok(SpaceReply::Done)
    }

    /// From here on the destination alone has it. The table is not kept: nobody could be sure of it any more.
    pub(super) fn forward(
        &mut self,
        id: SpaceId,
        migration: MigrationId,
        effects: &mut Vec<Effect>,
    ) -> Result<SpaceReply, String> {
        let space = self.spaces.get_mut(&id).ok_or("no such lockspace")?;
        if let State::Frozen { way, .. } = &space.state
            && way.migration == migration
        {
            space.state = State::Forwarded { way: way.clone(), activated: false };
            effects.push(Effect::Forwarded(id));
        }
        Ok(SpaceReply::Done)
    }

    pub(super) fn settle(&mut self, id: SpaceId, migration: MigrationId) -> Result<SpaceReply, String> {
        if let Some(State::Forwarded { way, activated }) =
            self.spaces.get_mut(&id).map(|space| &mut space.state)
            && way.migration == migration
        {
            *activated = true;
        }
        Ok(SpaceReply::Done)
    }
}
