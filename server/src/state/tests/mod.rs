//! Properties of the state, on a world that writes, snapshots, deletes, reads and fails over at random, beside a model
//! that keeps a full image of every snapshot.

mod costs;
mod hostile;
mod random;
mod space;
mod table;
mod world;
