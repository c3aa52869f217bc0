//! The files of attachments: heads opened and locked, reads and writes of heads and arenas.

use bytes::Bytes;
use csnap_client::core::{Input, IoFailure, IoId, IoOp, RequestError, RequestKey};
use csnap_proto::message::volume::Geometry;
use csnap_server::copy::{arena_path, head_path};
use csnap_storage::sim::{SimFile, SimStorage};
use csnap_storage::{Access, BLOCK_BYTES, Storage, StorageError};

use super::{Ended, ExporterProc, IoResult, LOCK_AGAIN, Stage, index};
use crate::sim::{Event, Sim};

impl ExporterProc {
    /// Opens the head; whoever writes also locks it before anything is read or written.
    pub(super) fn open_head(&mut self, sim: &mut Sim, number: u64, geometry: Geometry) {
        let attachment = self.attachments.get_mut(&number).expect("the caller looked it up");
        let (storage, path) = (self.storage.clone(), head_path(geometry.volume));
        let access = if attachment.is_writer() { Access::ReadWrite } else { Access::Read };
        sim.model.volumes[attachment.what.volume].id = Some(geometry.volume);
        attachment.geometry = Some(geometry);
        self.tasks.spawn(async move {
            Ended::Opened { attachment: number, head: storage.open(&path, access).await }
        });
    }

    pub(super) fn lock_again(&mut self, number: u64) {
        let Some(head) = self.attachments.get(&number).and_then(|a| a.head.clone()) else { return };
        self.lock(number, head);
    }

    fn lock(&mut self, number: u64, head: SimFile) {
        let storage = self.storage.clone();
        self.tasks.spawn(async move {
            let locked = storage.try_lock(&head).await.unwrap_or(false);
            Ended::Locked { attachment: number, head, locked }
        });
    }

    pub(super) fn on_ended(&mut self, sim: &mut Sim, ended: Ended) {
        match ended {
            Ended::Opened { attachment: number, head } => {
                let Some(attachment) = self.attachments.get_mut(&number) else { return };
                match head {
                    Ok(head) if attachment.is_writer() => self.lock(number, head),
                    Ok(head) => self.open(sim, number, head),
                    Err(error) => {
                        sim.note(|| format!("attachment {number} cannot open its head: {error}"));
                        attachment.stage = Stage::Failed;
                        let held = std::mem::take(&mut attachment.held);
                        held.into_iter().for_each(|(io, op)| self.start_io(sim, number, io, op));
                    }
                }
            }
            Ended::Locked { attachment: number, head, locked: true } => self.open(sim, number, head),
            Ended::Locked { attachment: number, head, .. } => {
                if let Some(attachment) = self.attachments.get_mut(&number) {
                    attachment.head = Some(head);
                    sim.tell(20_000, self.id, Event::Timer(LOCK_AGAIN + number));
                }
            }
            Ended::Io { attachment, io, result } => self.on_io(sim, attachment, io, result),
            Ended::Fast { attachment, request, result } => self.on_fast(sim, attachment, request, result),
        }
    }

    fn open(&mut self, sim: &mut Sim, number: u64, head: SimFile) {
        let Some(attachment) = self.attachments.get_mut(&number) else { return };
        attachment.head = Some(head);
        if attachment.stage == Stage::Attaching {
            attachment.stage = Stage::Open;
        }
        let held = std::mem::take(&mut attachment.held);
        held.into_iter().for_each(|(io, op)| self.start_io(sim, number, io, op));
    }

    pub(super) fn start_io(&mut self, sim: &mut Sim, number: u64, io: IoId, op: IoOp) {
        let attachment = self.attachments.get_mut(&number).expect("the caller looked it up");
        if attachment.stage == Stage::Attaching {
            attachment.held.push((io, op));
            return;
        }
        attachment.ios.insert(io, op);
        let (storage, head) = (self.storage.clone(), attachment.head.clone());
        let Some(head) = head else {
            let result = Err(IoFailure::Media("the head could not be opened".to_owned()));
            return self.step_io(sim, number, io, result);
        };
        if let IoOp::HeadWrite { request, .. }
        | IoOp::HeadPunch { request, .. }
        | IoOp::HeadZero { request, .. } = op
        {
            attachment.write_begins(sim, request);
        }
        let data = match op {
            IoOp::HeadWrite { request, .. } => Bytes::from(attachment.requests[&request].buffer.clone()),
            _ => Bytes::new(),
        };
        self.tasks.spawn(async move {
            let result = io_result(perform(&storage, &head, op, data).await);
            Ended::Io { attachment: number, io, result }
        });
    }

    fn on_io(&mut self, sim: &mut Sim, number: u64, io: IoId, result: IoResult) {
        let Some(attachment) = self.attachments.get_mut(&number) else { return };
        let Some(op) = attachment.ios.remove(&io) else { return };
        let result = match op {
            IoOp::HeadRead { request, len, buffer_at, .. }
            | IoOp::StoreRead { request, len, buffer_at, .. }
            | IoOp::ReadZeros { request, len, buffer_at } => result.and_then(|bytes| {
                if bytes.len() != index(len) {
                    return Err(IoFailure::Media("a file is shorter than it should be".to_owned()));
                }
                if let Some(running) = attachment.requests.get_mut(&request) {
                    running.buffer[index(buffer_at)..index(buffer_at + len)].copy_from_slice(&bytes);
                }
                Ok(())
            }),
            IoOp::HeadWrite { request, .. }
            | IoOp::HeadPunch { request, .. }
            | IoOp::HeadZero { request, .. } => {
                attachment.write_ends(sim, request, result.is_ok());
                result.map(drop)
            }
            IoOp::HeadSync | IoOp::Writeback | IoOp::StopFast => result.map(drop),
        };
        self.step_io(sim, number, io, result);
    }

    fn step_io(&mut self, sim: &mut Sim, number: u64, io: IoId, result: Result<(), IoFailure>) {
        self.step(sim, number, Input::IoDone { io, result });
    }

    /// A write that does not go through the core.
    pub(super) fn write_fast(&mut self, sim: &mut Sim, number: u64, key: RequestKey) {
        sim.tally.did("fast writes", 1);
        let attachment = self.attachments.get_mut(&number).expect("the caller looked it up");
        attachment.fast_running.insert(key);
        attachment.write_begins(sim, key);
        let running = &attachment.requests[&key];
        let (head, offset) = (attachment.head.clone().expect("open"), running.offset);
        let (storage, data) = (self.storage.clone(), Bytes::from(running.buffer.clone()));
        self.tasks.spawn(async move {
            let result = storage.write(&head, offset, data).await;
            Ended::Fast { attachment: number, request: key, result: io_result(result.map(|()| Bytes::new())) }
        });
    }

    fn on_fast(&mut self, sim: &mut Sim, number: u64, key: RequestKey, result: IoResult) {
        let Some(attachment) = self.attachments.get_mut(&number) else { return };
        attachment.fast_running.remove(&key);
        attachment.write_ends(sim, key, result.is_ok());
        let bytes = attachment.requests[&key].len;
        self.complete(sim, number, key, result.map(drop).map_err(RequestError::from));
        self.step(sim, number, Input::Written { bytes });
        self.check_stopped(sim, number);
    }
}

async fn perform(storage: &SimStorage, head: &SimFile, op: IoOp, data: Bytes) -> Result<Bytes, StorageError> {
    match op {
        IoOp::HeadRead { offset, len, .. } => storage.read(head, offset, index(len)).await,
        IoOp::ReadZeros { len, .. } => Ok(Bytes::from(vec![0; index(len)])),
        IoOp::StoreRead { location, skip, len, .. } => {
            let arena = storage.open(&arena_path(location.term, location.arena), Access::Read).await?;
            storage.read(&arena, location.offset() + skip, index(len)).await
        }
        IoOp::HeadWrite { offset, .. } => storage.write(head, offset, data).await.map(|()| Bytes::new()),
        IoOp::HeadPunch { offset, len, .. } | IoOp::HeadZero { offset, len, may_punch: true, .. } => {
            storage.punch(head, offset, len).await.map(|()| Bytes::new())
        }
        IoOp::HeadZero { offset, len, .. } => {
            storage.write(head, offset, Bytes::from(vec![0; index(len)])).await.map(|()| Bytes::new())
        }
        IoOp::HeadSync => storage.sync(head).await.map(|()| Bytes::new()),
        // Its success promises nothing.
        IoOp::Writeback | IoOp::StopFast => storage.stat_file(head).await.map(|_| Bytes::new()),
    }
}

fn io_result(result: Result<Bytes, StorageError>) -> IoResult {
    result.map_err(|error| match error {
        StorageError::NoSpace { .. } => IoFailure::NoSpace,
        error => IoFailure::Media(error.to_string()),
    })
}

const _: () = assert!(BLOCK_BYTES == 4096);
