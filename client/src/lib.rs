//! A csnap volume as an asynchronous API: caches, resends, four-message reads.
//!
//! - [`core`]: every decision, pure: one [`core::ClientCore`] an attachment;
//! - `head`: the data plane, files and arenas;
//! - `shell`: sockets, tasks, and the API that exporters and the command line use.
//!
//! The API (feature `shell`, default):
//!
//! ```text
//! Volume::open(ClientConfig, Target) -> Result<Arc<Volume>, RequestError>   (async; Target with a snapshot is read-only)
//! volume.geometry() -> &Geometry; is_read_only(); target(); messages() -> BTreeMap<String, u64>; waiting() -> Option<String>
//! volume.try_read(offset, &mut [u8])  -> Result<Attempt, RequestError>      (Done | WouldBlock; never blocks)
//! volume.try_write(offset, &[u8])     -> Result<Attempt, RequestError>
//! volume.read(offset, len: u32)       -> Result<Bytes, RequestError>        (async, Send)
//! volume.write(offset, Bytes, fua)    -> Result<(), RequestError>
//! volume.trim(offset, len: u64, fua); write_zeroes(offset, len: u64, fua, may_punch); flush(); release()
//! volume.block_status(offset, len: u64) -> Result<Vec<BlockRun { len: u64, hole: bool, zero: bool }>, RequestError>
//! RequestError::errno() -> ErrnoClass { Io, NoSpace, ReadOnly, Invalid }
//! Operator::new(ServerSource, node, instance); operator.request(OperatorRequest) -> Result<OperatorReply, Refusal> (async)
//! ```

pub mod core;
