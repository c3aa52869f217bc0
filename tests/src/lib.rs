//! The simulated world: every daemon's real core and procedures, a network and disks that fail as real ones do, and a judge
//! that knows what each guest may see. One seed is one world; the same seed gives the same digest.
//!
//! - [`sim`]: what a process sees of its world; [`world`]: the loop that makes it go round, the guests, the storm;
//! - [`process`]: shells around the cores, one file a daemon;
//! - [`net`], [`clock`], [`queue`], [`tasks`]: streams, clocks, present and future, procedures under way;
//! - [`history`]: what clients of locks and keys saw, and whether it is linearizable; [`mutex`]: worlds of lockds and a register;
//! - [`model`]: the judge; [`tally`]: what a campaign must have reached;
//! - [`plan`]: how a world is drawn from its seed; [`campaign`]: many worlds, on two threads.
//!
//! *Architecture Invariant*: nothing here decides anything that a daemon decides; a shell here only moves events.

#![allow(missing_docs, reason = "fields of a world that only tests build are named for what they are")]

pub mod campaign;
pub mod clock;
pub mod history;
pub mod model;
pub mod mutex;
pub mod net;
pub mod plan;
pub mod process;
pub mod queue;
pub mod sim;
pub mod tally;
pub mod tasks;
pub mod world;
