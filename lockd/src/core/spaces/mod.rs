//! Lockspaces: whole lock tables side by side, and their move from one group of lockds to another.
//!
//! What it is not: who drives a move ([`mover`]), nor who serves clients ([`Lockd`](super::Lockd)). It says what
//! each lockspace is, and every step of a move is a command in the log of the group that it happens in:
//!
//! ```text
//!   source        Active ──Freeze──> Frozen ──Forward──> Forwarded ──Settle──> Forwarded, activated
//!                    ^─────Thaw────────┘  :                  :
//!                                         v pieces           v "forwarded"
//!   destination   nothing ──Import──> Importing ──> Imported ──Activate──> Active
//!                    ^─────────────Discard──┴──────────┘
//! ```
//!
//! Invariants, checked by `lockd/tests/spaces`:
//! - a table is applied to in one group only: the source stops at Freeze, the destination begins at Activate, which it is
//!   told only once Forward is durable; Thaw and Forward of one migration exclude each other;
//! - the table moves whole: what the destination activates is, byte for byte, what the source froze. So terms, lock ids and
//!   event numbers go on growing, and waiting requests keep their places;
//! - every step names its migration and does nothing the second time, so that whoever drives may die and another resume;
//! - a migration that was given up never starts again.
//!
//! Files: `leaving` and `arriving`: the two halves; `command`: what goes in and comes out; `import`: a table that comes in pieces; `mover`: what the source's leader
//! says to the destination; `view`: lockspaces as they are shown.

mod arriving;
pub mod canary;
mod command;
mod import;
mod leaving;
pub mod mover;
mod view;

use ::core::net::SocketAddr;
use std::collections::BTreeMap;

use csnap_proto::limits::LOCKSPACES_MAX;
use csnap_proto::message::lock::{SpaceReply, Way};
use csnap_proto::{MigrationId, Name};
use serde::{Deserialize, Serialize};

use self::canary::{Broken, Canary};
pub use self::command::{Command, Effect};
use self::import::{Before, Import};
use super::table::{self, Table};

/// The lockspace of whoever names none; every group has one.
pub const DEFAULT: &str = "default";

/// A lockspace in its group, never reused: short, for every command of the log carries one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct SpaceId(pub u32);

impl SpaceId {
    /// Of [`DEFAULT`].
    pub const DEFAULT: Self = Self(0);
}

/// What becomes of a lockspace here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Served.
    Active(Box<Table>),
    /// On its way out; served nowhere.
    Frozen {
        /// As it was when it was frozen.
        table: Box<Table>,
        /// Where to.
        way: Way,
    },
    /// Coming.
    Importing(Import),
    /// All there; not served.
    Imported {
        /// As its source froze it.
        table: Box<Table>,
        /// What was here before.
        before: Before,
    },
    /// Another group's.
    Forwarded {
        /// Whose.
        way: Way,
        /// That group serves it.
        activated: bool,
    },
}

/// One lockspace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    name: Name,
    state: State,
    /// The move that brought its table here.
    came_by: Option<MigrationId>,
    /// The last move from here that was given up.
    given_up: Option<MigrationId>,
    /// Why.
    trouble: Option<String>,
}

impl Space {
    fn new(name: Name, state: State) -> Self {
        Self { name, state, came_by: None, given_up: None, trouble: None }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// What becomes of it.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Whether this move of it was given up.
    #[must_use]
    pub fn gave_up(&self, migration: MigrationId) -> bool {
        self.given_up == Some(migration)
    }

    /// Its table, while this group is the one that has it.
    #[must_use]
    pub fn table(&self) -> Option<&Table> {
        match &self.state {
            State::Active(table) | State::Frozen { table, .. } => Some(table),
            State::Importing(_) | State::Imported { .. } | State::Forwarded { .. } => None,
        }
    }

    /// Whether it is served.
    #[must_use]
    pub fn is_active(&self) -> bool {
        matches!(self.state, State::Active(_))
    }

    /// Whose clients are to go on elsewhere, and where.
    #[must_use]
    pub fn moved_to(&self) -> Option<&[SocketAddr]> {
        match &self.state {
            State::Forwarded { way, .. } => Some(&way.to),
            State::Importing(import) => import.before.moved_to(),
            _ => None,
        }
    }
}

/// All lockspaces of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spaces {
    spaces: BTreeMap<SpaceId, Space>,
    /// The last id given.
    last: SpaceId,
    #[serde(skip)]
    broken: Broken,
}

impl Default for Spaces {
    fn default() -> Self {
        Self::from(Table::default())
    }
}

impl From<Table> for Spaces {
    /// A group with one lockspace.
    fn from(table: Table) -> Self {
        let name = Name::new(DEFAULT).expect("a name");
        let space = Space::new(name, State::Active(Box::new(table)));
        let spaces = BTreeMap::from([(SpaceId::DEFAULT, space)]);
        Self { spaces, last: SpaceId::DEFAULT, broken: Broken::NONE }
    }
}

impl Spaces {
    /// Lockspaces that break a rule.
    #[cfg(feature = "canary")]
    #[must_use]
    pub fn breaking(self, rule: Canary) -> Self {
        Self { broken: Broken::rule(rule), ..self }
    }

    /// From now on the tables that are served break a rule; see [`super::canary`].
    #[cfg(feature = "replica")]
    pub(crate) fn break_tables(&mut self, rule: super::canary::Broken) {
        for space in self.spaces.values_mut() {
            if let State::Active(table) = &mut space.state {
                table.break_rule(rule);
            }
        }
    }

    /// Keeps breaking the rule that `other` breaks; what is read back breaks none.
    #[must_use]
    pub fn as_broken_as(self, other: &Self) -> Self {
        Self { broken: other.broken, ..self }
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, id: SpaceId) -> Option<&Space> {
        self.spaces.get(&id)
    }

    /// The one of this name.
    #[must_use]
    pub fn find(&self, name: &Name) -> Option<SpaceId> {
        self.spaces.iter().find(|(_, space)| space.name == *name).map(|(id, _)| *id)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (SpaceId, &Space)> {
        self.spaces.iter().map(|(id, space)| (*id, space))
    }

    /// The table of a lockspace, while this group is the one that has it.
    #[must_use]
    pub fn table(&self, id: SpaceId) -> Option<&Table> {
        self.spaces.get(&id)?.table()
    }

    /// Whether a lockspace is served.
    #[must_use]
    pub fn is_active(&self, id: SpaceId) -> bool {
        self.spaces.get(&id).is_some_and(Space::is_active)
    }

    /// The rule that is broken.
    pub(super) fn broken(&self) -> Broken {
        self.broken
    }

    /// Applies a command that is durable. Effects are appended in the order in which they happen.
    pub fn apply(&mut self, command: Command, effects: &mut Vec<Effect>) {
        let reply = match command {
            Command::In(space, command) => return self.apply_in(space, command, effects),
            Command::Create { name } => self.create(name),
            Command::Freeze { space, way } => self.freeze(space, way, effects),
            Command::Thaw { space, migration, why } => self.thaw(space, migration, why, effects),
            Command::Import { name, migration, manifest, offset, bytes } => {
                self.import(name, migration, manifest, offset, &bytes)
            }
            Command::Discard { name, migration } => self.discard(&name, migration),
            Command::Forward { space, migration } => self.forward(space, migration, effects),
            Command::Activate { name, migration } => self.activate(&name, migration, effects),
            Command::Settle { space, migration } => self.settle(space, migration),
        };
        effects.push(Effect::Answer(match reply {
            Ok(reply) => reply,
            Err(reason) => SpaceReply::Refused { reason },
        }));
    }

    /// A lockspace that is not served takes nothing: what it is asked meanwhile has no effect, and is asked again where it
    /// goes on.
    fn apply_in(&mut self, id: SpaceId, command: table::Command, effects: &mut Vec<Effect>) {
        let early = self.broken.breaks(Canary::ApplyWhileFrozen);
        let table = match self.spaces.get_mut(&id).map(|space| &mut space.state) {
            Some(State::Active(table)) => table,
            Some(State::Frozen { table, .. }) if early => table,
            _ => return effects.push(Effect::Dropped(id)),
        };
        let mut inner = Vec::new();
        table.apply(command, &mut inner);
        effects.extend(inner.into_iter().map(|effect| Effect::In(id, effect)));
    }

    fn create(&mut self, name: Name) -> Result<SpaceReply, String> {
        match self.find(&name).map(|id| &self.spaces[&id].state) {
            None => {
                self.has_room()?;
                self.add(name, State::Active(Box::default()));
                Ok(SpaceReply::Done)
            }
            Some(State::Forwarded { .. }) => {
                Err(format!("lockspace {name} moved to another group; choose another name"))
            }
            Some(_) => Err(format!("there is a lockspace {name} already")),
        }
    }

    fn has_room(&self) -> Result<(), String> {
        if self.spaces.len() < LOCKSPACES_MAX {
            return Ok(());
        }
        Err(format!("the group has {LOCKSPACES_MAX} lockspaces, which is its limit"))
    }

    fn add(&mut self, name: Name, state: State) -> SpaceId {
        self.last = SpaceId(self.last.0.checked_add(1).expect("counters of 32 bits of operators' acts last"));
        self.spaces.insert(self.last, Space::new(name, state));
        self.last
    }

    /// Whether everything agrees with everything. What was read back is checked before it is used.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self) -> Result<(), &'static str> {
        let mut names: Vec<&Name> = self.spaces.values().map(|space| &space.name).collect();
        names.sort_unstable();
        names.dedup();
        if names.len() != self.spaces.len() || self.spaces.keys().any(|id| *id > self.last) {
            return Err("two lockspaces of a name, or one from the future");
        }
        self.spaces.values().try_for_each(|space| match &space.state {
            State::Imported { .. } if space.came_by.is_none() => Err("a lockspace that came by no move"),
            State::Active(table) | State::Frozen { table, .. } | State::Imported { table, .. } => {
                table.check()
            }
            State::Importing(import) => import.check(),
            State::Forwarded { .. } => Ok(()),
        })
    }
}
