//! The lock manager's process: its core, and its log on a disk of its own.

use std::collections::VecDeque;

use bytes::Bytes;
use csnap_lockd::canary::Broken;
use csnap_lockd::core::table::Table;
use csnap_lockd::core::{ConnectionId, Input, Lockd, Output};
use csnap_lockd::store::record::batch_count;
use csnap_lockd::store::{LOG_BYTES_MIN, Store, StoreError, StoreOptions};
use csnap_proto::message::lock::ToLockd;
use csnap_proto::{Name, Time};
use csnap_storage::StorageError;
use csnap_storage::sim::SimStorage;

use crate::net::NetConn;
use crate::sim::{Event, HostId, LOCKD_ADDRESS, ProcId, Sim, frames};
use crate::tasks::Tasks;

/// A store that another lockd has (one that was just killed) is tried again after this, microseconds.
const AGAIN: u64 = 20_000;

type LockStore = Store<SimStorage>;

enum Ended {
    Opened(Result<(LockStore, Table), StoreError>),
    Appended { store: LockStore, count: usize, result: Result<(), StoreError> },
    Rolled { store: LockStore, result: Result<(), StoreError> },
}

/// See the module.
pub struct LockdProc {
    id: ProcId,
    host: HostId,
    tasks: Tasks<Ended>,
    core: Option<Lockd>,
    /// At rest.
    store: Option<LockStore>,
    waiting: VecDeque<Bytes>,
}

impl LockdProc {
    pub(super) fn start(sim: &mut Sim, id: ProcId, host: HostId) -> Self {
        let tasks = Tasks::new(id, sim.ready.clone());
        Self { id, host, tasks, core: None, store: None, waiting: VecDeque::new() }
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        self.core.as_ref()?.next_deadline()
    }

    /// Commands that are appended and not durable.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.core.as_ref().map_or(0, Lockd::in_flight)
    }

    pub(super) fn on_event(&mut self, sim: &mut Sim, event: Event) {
        match event {
            Event::Start | Event::Timer(_) => {
                let (storage, fresh_id) = (sim.local(self.id), sim.draw());
                let options = StoreOptions { fresh_id, log_bytes: LOG_BYTES_MIN, broken: Broken::default() };
                self.tasks.spawn(async move { Ended::Opened(Store::open(storage, options).await) });
            }
            Event::Tick => self.step(sim, Input::Tick),
            Event::Accepted(conn) => self.step(sim, Input::Opened(ConnectionId(conn.0))),
            Event::Closed { conn } => self.step(sim, Input::Closed(ConnectionId(conn.0))),
            Event::Received { conn, payload } => {
                for frame in frames::<ToLockd>(&payload.bytes) {
                    self.step(sim, Input::Received(ConnectionId(conn.0), frame));
                }
            }
            Event::Task(task) => {
                if let Some(ended) = self.tasks.poll(task) {
                    self.on_ended(sim, ended);
                }
            }
            Event::Connected { .. } | Event::Ended(_) | Event::Ask(_) => {}
        }
    }

    fn on_ended(&mut self, sim: &mut Sim, ended: Ended) {
        match ended {
            Ended::Opened(Ok((store, table))) => {
                let node = Name::new("lockd1").expect("a valid name");
                self.core = Some(Lockd::new(sim.clock(self.host), node, self.id.0, table));
                self.store = Some(store);
                sim.net.listen(LOCKD_ADDRESS, self.id, self.host);
            }
            Ended::Opened(Err(StoreError::Busy)) => sim.tell(AGAIN, self.id, Event::Timer(0)),
            Ended::Appended { store, count, result: Ok(()) } => {
                self.store = Some(store);
                self.step(sim, Input::Durable { count });
            }
            Ended::Rolled {
                store,
                result: Ok(()) | Err(StoreError::Storage(StorageError::NoSpace { .. })),
            } => {
                sim.tally.did("generations of lockd's log", 1);
                self.store = Some(store);
                self.append();
            }
            Ended::Opened(Err(error))
            | Ended::Appended { result: Err(error), .. }
            | Ended::Rolled { result: Err(error), .. } => {
                sim.violation(format!("lockd on a sound medium: {error}"));
                sim.exit(self.id, error.to_string());
            }
        }
    }

    fn step(&mut self, sim: &mut Sim, input: Input) {
        let Some(core) = &mut self.core else { return };
        let mut out = Vec::new();
        core.step(sim.clock(self.host), input, &mut out);
        for output in out {
            match output {
                Output::Append(command) => self.waiting.push_back(command),
                Output::Send(conn, frame) => sim.send(self.id, NetConn(conn.0), &frame),
                Output::Close(conn, _) => sim.close(self.id, NetConn(conn.0)),
            }
        }
        self.append();
    }

    /// Gives the store what waits, if it is at rest.
    fn append(&mut self) {
        let Some(core) = &self.core else { return };
        let count = batch_count(self.waiting.iter().map(Bytes::len));
        let batch: Vec<Bytes> = self.waiting.iter().take(count).cloned().collect();
        let Some(mut store) = self.store.take_if(|_| count > 0) else { return };
        if store.is_nearly_full() || !store.fits(&batch) {
            let table = core.table().clone();
            self.tasks.spawn(async move {
                let result = store.roll(&table).await;
                Ended::Rolled { store, result }
            });
            return;
        }
        self.waiting.drain(..count);
        self.tasks.spawn(async move {
            let result = store.append(&batch).await;
            Ended::Appended { store, count, result }
        });
    }
}
