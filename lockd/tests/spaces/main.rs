//! Lockspaces that move between two groups of lockds, in virtual time.
//!
//! - `matrix`: what goes wrong × how far the move is × what a client is in the middle of, every cell;
//! - `canaries`: broken rules of the move, which the matrix must notice;
//! - `large`: the largest lockspaces, and how long the groups stand still for them;
//! - `operators`: what operators ask for, give up and repair;
//! - `hostile`: pieces that are no lockspace.

#![allow(clippy::disallowed_methods, reason = "how long steps take is printed")]

#[cfg(feature = "canary")]
mod canaries;
mod cell;
mod group;
mod hostile;
mod large;
mod matrix;
mod operators;
mod world;
