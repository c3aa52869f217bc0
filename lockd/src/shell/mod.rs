//! The daemon around the core: `csnap lockd`.
//!
//! One thread. It waits for one event, steps the core, carries out the outputs in order. Commands gather while a batch
//! is being made durable and go out together as the next: that is the group commit. A write or sync that fails ends the
//! process; whoever starts it again finds everything that was answered.
//!
//! What it is not: a judge. Which connections may stay, and what is answered when, the core decides.

mod config;
mod connection;
pub(crate) mod socket;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::{Pin, pin};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use csnap_proto::message::lock::ToLockd;
use csnap_proto::{Frame, Time};
use csnap_storage::StorageError;
use csnap_storage::posix::{PosixOptions, PosixStorage};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tracing::{info, warn};

pub use self::config::LockdConfig;
use self::connection::Connection;
use self::socket::now;
use crate::canary::Broken;
use crate::core::table::Table;
use crate::core::{ConnectionId, Input, Lockd, Output};
use crate::store::{self, LOG_BYTES, Store, StoreError, StoreOptions, record};

/// Events that wait for the main loop; a connection that finds it full waits.
const EVENTS_MAX: usize = 256;

/// Between two attempts to accept when the process is out of descriptors or memory.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// File that says where the daemon listens, a line an address.
const ADDRESS_FILE: &str = "address";

/// What a task reports.
enum Event {
    Accepted(TcpStream, SocketAddr),
    Received(ConnectionId, Frame<ToLockd>),
    Closed(ConnectionId, Option<String>),
}

type Events = mpsc::Sender<Event>;

/// Runs until `shutdown`, which needs no farewell: what was answered is durable.
///
/// # Errors
/// When the directory is in use, damaged or of another version, an address cannot be had, or a write fails.
pub async fn run(config: LockdConfig, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    let local = tokio::task::LocalSet::new();
    let all = async {
        let mut daemon = Daemon::start(&config).await?;
        tokio::select! {
            result = daemon.serve() => result,
            () = pin!(shutdown) => {
                info!("stopped");
                Ok(())
            }
        }
    };
    local.run_until(all).await
}

/// A batch on its way to the disk. It has the store, and gives it back.
type Commit = Pin<Box<dyn Future<Output = (Store<PosixStorage>, Result<usize, StoreError>)>>>;

struct Daemon {
    core: Lockd,
    /// Absent while a batch is under way.
    store: Option<Store<PosixStorage>>,
    /// Commands that wait for the batch under way.
    waiting: VecDeque<Bytes>,
    connections: BTreeMap<ConnectionId, Connection>,
    last_connection: u64,
    events: Events,
    inbox: mpsc::Receiver<Event>,
}

impl Daemon {
    async fn start(config: &LockdConfig) -> anyhow::Result<Self> {
        let dir = config.dir.display();
        fs::create_dir_all(&config.dir).with_context(|| format!("cannot make {dir}"))?;
        let storage = PosixStorage::open(&config.dir, PosixOptions::default())
            .with_context(|| format!("cannot open {dir}"))?;
        let mut fresh_id = [0; 16];
        getrandom::fill(&mut fresh_id).map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
        let options = StoreOptions { fresh_id, log_bytes: LOG_BYTES, broken: Broken::default() };
        let (store, table) =
            Store::open(storage, options).await.with_context(|| format!("lockd in {dir}"))?;
        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        let listeners = listen(config)?;
        let mut addresses = String::new();
        for listener in listeners {
            let address = listener.local_addr()?;
            info!("lockd of {} listens on {address}, term {}", config.node, table.term());
            addresses += &format!("{address}\n");
            tokio::task::spawn_local(accept(listener, events.clone()));
        }
        let core = Lockd::new(now(), config.node.clone(), std::process::id(), table);
        publish(&config.dir, &addresses)?;
        let (waiting, connections) = (VecDeque::new(), BTreeMap::new());
        Ok(Self { core, store: Some(store), waiting, connections, last_connection: 0, events, inbox })
    }

    async fn serve(&mut self) -> anyhow::Result<()> {
        let mut commit: Option<Commit> = None;
        loop {
            if let Some(store) = self.store.take_if(|_| !self.waiting.is_empty()) {
                commit = Some(self.next_commit(store));
            }
            let deadline = self.core.next_deadline().unwrap_or(Time(u64::MAX));
            let wait = deadline.since(now()).min(Duration::from_secs(3600));
            let done = async {
                match commit.as_mut() {
                    Some(commit) => commit.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                (store, result) = done => {
                    commit = None;
                    let count = result.context("lockd cannot keep what it promises and stops")?;
                    self.store = Some(store);
                    self.turn(Input::Durable { count });
                }
                event = self.inbox.recv() => self.on_event(event.expect("we hold a sender")),
                // Last, so that renewals that were received are seen before a lease is judged.
                () = tokio::time::sleep(wait) => self.turn(Input::Tick),
            }
        }
    }

    /// As many of the waiting commands as make one batch; before them, a new generation when it is time.
    fn next_commit(&mut self, store: Store<PosixStorage>) -> Commit {
        let count = record::batch_count(self.waiting.iter().map(Bytes::len));
        let batch: Vec<Bytes> = self.waiting.drain(..count).collect();
        let table = (store.is_nearly_full() || !store.fits(&batch)).then(|| self.core.table().clone());
        Box::pin(commit(store, batch, table))
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Accepted(stream, peer) => {
                self.last_connection += 1;
                let id = ConnectionId(self.last_connection);
                match Connection::start(id, stream, peer, self.events.clone()) {
                    Ok(connection) => {
                        self.connections.insert(id, connection);
                        self.turn(Input::Opened(id));
                    }
                    Err(error) => info!("{peer}: {error}"),
                }
            }
            Event::Received(id, frame) => self.turn(Input::Received(id, frame)),
            Event::Closed(id, why) => {
                if let Some(connection) = self.connections.remove(&id) {
                    if let Some(why) = why {
                        warn!("{}: connection closed: {why}", connection.peer());
                    }
                    self.turn(Input::Closed(id));
                }
            }
        }
    }

    fn turn(&mut self, input: Input) {
        let mut outputs = Vec::new();
        self.core.step(now(), input, &mut outputs);
        for output in outputs {
            match output {
                Output::Append(command) => self.waiting.push_back(command),
                Output::Send(id, frame) => {
                    if let Some(connection) = self.connections.get(&id) {
                        connection.send(&frame);
                    }
                }
                Output::Close(id, why) => {
                    if let Some(connection) = self.connections.remove(&id)
                        && let Some(why) = why
                    {
                        warn!("{}: connection closed: {why}", connection.peer());
                    }
                }
            }
        }
    }
}

async fn commit(
    mut store: Store<PosixStorage>,
    batch: Vec<Bytes>,
    table: Option<Table>,
) -> (Store<PosixStorage>, Result<usize, StoreError>) {
    let result = async {
        if let Some(table) = table {
            match store.roll(&table).await {
                Err(StoreError::Storage(error @ StorageError::NoSpace { .. })) if store.fits(&batch) => {
                    warn!("cannot begin a new log and goes on with the old one while it lasts: {error}");
                }
                rolled => rolled?,
            }
        }
        store.append(&batch).await?;
        Ok(batch.len())
    };
    let result = result.await;
    (store, result)
}

async fn accept(listener: TcpListener, events: Events) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                if events.send(Event::Accepted(stream, peer)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                warn!("cannot accept connections: {error}");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

/// Binds every address. Port 0 means a free one, and the same as the last time if it still is: agents know it.
fn listen(config: &LockdConfig) -> anyhow::Result<Vec<TcpListener>> {
    let last = fs::read_to_string(config.dir.join(ADDRESS_FILE)).unwrap_or_default();
    let mut last: Vec<SocketAddr> = last.lines().filter_map(|line| line.parse().ok()).collect();
    let mut listeners = Vec::new();
    for address in &config.listen {
        let known = last.iter().position(|known| known.ip() == address.ip());
        let known = known.map(|at| last.remove(at)).filter(|_| address.port() == 0);
        let again = known.and_then(|known| socket::listen(known).ok());
        let listener = match again {
            Some(listener) => listener,
            None => socket::listen(*address).with_context(|| {
                format!("cannot listen on {address}; set another `listen`, or stop who has it")
            })?,
        };
        listeners.push(listener);
    }
    Ok(listeners)
}

/// Says where the daemon listens, whole or not at all. Not synced: after a crash it is written anew.
fn publish(dir: &Path, addresses: &str) -> anyhow::Result<()> {
    let (path, temporary) = (dir.join(ADDRESS_FILE), dir.join("address.tmp"));
    let written = fs::write(&temporary, addresses).and_then(|()| fs::rename(&temporary, &path));
    written.with_context(|| format!("cannot write {}", path.display()))
}

const _: () = assert!(LOG_BYTES >= store::LOG_BYTES_MIN);
