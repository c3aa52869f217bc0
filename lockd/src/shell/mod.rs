//! The daemon around the core: `csnap lockd`.
//!
//! One thread. It waits for one event, steps the core, carries out the outputs in order. Writes gather while a batch is
//! being made durable and go out together as the next: that is the group commit. A write or sync that fails ends the
//! process; whoever starts it again finds everything that was answered.
//!
//! What it is not: a judge. Which connections may stay, and what is answered when, the core decides.

mod config;
mod connection;
#[cfg(test)]
mod group_tests;
mod hello;
mod peers;
pub(crate) mod socket;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use csnap_proto::message::lock::ToLockd;
use csnap_proto::{Descriptors, Frame, Time};
use csnap_storage::posix::{PosixOptions, PosixStorage};
use rustix::process::{Resource, getrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tracing::{info, warn};

pub use self::config::LockdConfig;
use self::connection::Connection;
use self::hello::{Hello, founders_checksum};
use self::peers::{Own, Peers};
use self::socket::now;
use crate::canary::Broken;
use crate::core::{ConnectionId, LOCKD_CONNECTIONS_MAX};
use crate::replica::{
    Base, ClusterId, Forming, Heard, PeerMessage, ReplicaConfig, ReplicaLog, Saved, Timing, Write, Wrote,
};
use crate::replicated::{Input, Output, Replicated};
use crate::store::{self, LOG_BYTES, StoreError, StoreOptions};

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
    /// A replica is reached at an address, or no more.
    Peer(SocketAddr, Option<Heard>),
    /// A replica said something.
    Said(PeerMessage),
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

type Log = ReplicaLog<PosixStorage>;

/// Writes on their way to the disk. They have the log, and give it back.
type Commit = Pin<Box<dyn Future<Output = (Log, Result<Wrote, StoreError>)>>>;

struct Daemon {
    config: LockdConfig,
    replica_config: ReplicaConfig,
    core: Replicated,
    /// Absent while writes are under way.
    log: Option<Log>,
    /// What waits for those under way.
    waiting: Vec<Write>,
    /// Until the replica belongs to a group.
    forming: Option<(Forming, Saved)>,
    own: Own,
    peers: Peers,
    connections: BTreeMap<ConnectionId, Connection>,
    /// As many as leave the log its files; the core's own limit is lower, unless the process may have few open.
    connections_max: usize,
    last_connection: u64,
    events: Events,
    inbox: mpsc::Receiver<Event>,
}

impl Daemon {
    async fn start(config: &LockdConfig) -> anyhow::Result<Self> {
        let mut daemon = Self::open(config).await?;
        if config.peers.is_empty() {
            daemon.elect().await?;
        } else {
            daemon.meet_peers()?;
        }
        let mut addresses = String::new();
        for listener in listen(config)? {
            let address = listener.local_addr()?;
            info!(
                "lockd of {} listens on {address}, term {}",
                config.node,
                daemon.core.lockd().table().term()
            );
            addresses += &format!("{address}\n");
            tokio::task::spawn_local(accept(listener, daemon.events.clone()));
        }
        publish(&config.dir, &addresses)?;
        Ok(daemon)
    }

    async fn open(config: &LockdConfig) -> anyhow::Result<Self> {
        let dir = config.dir.display();
        fs::create_dir_all(&config.dir).with_context(|| format!("cannot make {dir}"))?;
        let storage = PosixStorage::open(&config.dir, PosixOptions::default())
            .with_context(|| format!("cannot open {dir}"))?;
        let ((fresh_id, seed), (cluster, _)) = (random()?, random()?);
        let options = StoreOptions { fresh_id, log_bytes: LOG_BYTES, broken: Broken::default() };
        let first = |id| match config.peers.is_empty() {
            true => Base::alone(ClusterId(cluster), id, String::new(), Replicated::first_state()),
            false => Base::empty(),
        };
        let (log, saved) =
            ReplicaLog::open(storage, options, first).await.with_context(|| format!("lockd in {dir}"))?;
        let timing = if config.fast_elections { Timing::FAST } else { Timing::DEFAULT };
        let replica_config = ReplicaConfig { timing, seed, broken: Broken::default() };
        let forming = config.peer_listen.filter(|_| saved.is_empty());
        let forming = forming.map(|own| (Forming::new(own, saved.id, &config.peers), saved.clone()));
        let heard = Heard { id: saved.id, cluster: saved.base.cluster };
        let core = Replicated::new(now(), replica_config, config.node.clone(), std::process::id(), saved)
            .with_context(|| format!("lockd in {dir}"))?;
        let own = Rc::new(Cell::new(Hello { heard, founders: founders_checksum(&config.peers) }));
        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        let peers = Peers::new(Rc::clone(&own), events.clone());
        let descriptors = Descriptors::new(getrlimit(Resource::Nofile).current);
        Ok(Self {
            config: config.clone(),
            replica_config,
            core,
            log: Some(log),
            waiting: Vec::new(),
            forming,
            own,
            peers,
            connections: BTreeMap::new(),
            connections_max: descriptors.connections(2 * LOCKD_CONNECTIONS_MAX),
            last_connection: 0,
            events,
            inbox,
        })
    }

    fn meet_peers(&mut self) -> anyhow::Result<()> {
        let address = self.config.peer_listen.expect("checked with the configuration");
        let listener = socket::listen(address).with_context(|| {
            format!("cannot listen on {address}; set another `peer_listen`, or stop who has it")
        })?;
        info!("replica {:016x} listens on {address}", self.core.replica().id().0);
        tokio::task::spawn_local(peers::accept(listener, Rc::clone(&self.own), self.events.clone()));
        self.keep_peers();
        self.turn(Input::Tick)
    }

    /// A way to every replica that the configuration or the group names.
    fn keep_peers(&mut self) {
        let members = self.core.replica().members().values().filter_map(|member| member.address.parse().ok());
        let all = members.chain(self.config.peers.iter().copied());
        let own = self.config.peer_listen;
        let others: Vec<SocketAddr> = all.filter(|address| Some(*address) != own).collect();
        if own.is_some() {
            self.peers.keep(others.into_iter());
        }
    }

    fn on_peer(&mut self, address: SocketAddr, heard: Option<Heard>) -> anyhow::Result<()> {
        if let Some((forming, _)) = &mut self.forming {
            match heard {
                Some(heard) => forming.on_heard(address, heard),
                None => forming.on_lost(address),
            }
        }
        match self.peers.on_peer(address, heard) {
            Some(lost) if heard.is_none() => self.turn(Input::Unreachable(lost)),
            _ => Ok(()),
        }
    }

    /// Founds the group once it is this replica's to do.
    async fn found(&mut self) -> anyhow::Result<()> {
        if self.core.replica().cluster().is_some() {
            self.forming = None;
        }
        let members = self.forming.as_ref().and_then(|(forming, _)| forming.group());
        let (Some(members), true) = (members, self.log.is_some() && self.waiting.is_empty()) else {
            return Ok(());
        };
        let (_, saved) = self.forming.take().expect("it has a group");
        let (log, (cluster, _)) = (self.log.as_mut().expect("looked at above"), random()?);
        info!("founds a group of {} replicas", members.len());
        let base = Base::founding(ClusterId(cluster), members, Replicated::first_state());
        let saved = log.found(&saved, base).await.context("cannot found the group")?;
        let (node, pid) = (self.config.node.clone(), std::process::id());
        self.core = Replicated::new(now(), self.replica_config, node, pid, saved)?;
        // Clients that were turned away know nothing of the one before.
        self.connections.clear();
        self.turn(Input::Tick)
    }

    /// Alone, a lockd leads as soon as its disk says so: before anybody can ask it for something.
    async fn elect(&mut self) -> anyhow::Result<()> {
        self.turn(Input::Tick)?;
        while let Some(commit) = self.next_commit()? {
            self.committed(commit.await)?;
        }
        Ok(())
    }

    async fn serve(&mut self) -> anyhow::Result<()> {
        let mut commit: Option<Commit> = None;
        loop {
            if self.forming.is_some() {
                self.found().await?;
            }
            if let Some(next) = self.next_commit()? {
                commit = Some(next);
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
                done = done => {
                    commit = None;
                    self.committed(done)?;
                }
                event = self.inbox.recv() => self.on_event(event.expect("we hold a sender"))?,
                // Last, so that renewals that were received are seen before a lease is judged.
                () = tokio::time::sleep(wait) => self.turn(Input::Tick)?,
            }
        }
    }

    /// Everything that waits, if the log is at rest; with it a new base when it is time.
    fn next_commit(&mut self) -> anyhow::Result<Option<Commit>> {
        let Some(log) = self.log.as_ref().filter(|_| !self.waiting.is_empty()) else { return Ok(None) };
        if log.wants_base(&self.waiting) {
            self.turn(Input::WantsBase)?;
        }
        let mut log = self.log.take().expect("looked at above");
        let writes = std::mem::take(&mut self.waiting);
        Ok(Some(Box::pin(async move {
            let result = log.write(writes).await;
            (log, result)
        })))
    }

    fn committed(&mut self, (log, result): (Log, Result<Wrote, StoreError>)) -> anyhow::Result<()> {
        let wrote = result.context("lockd cannot keep what it promises and stops")?;
        self.log = Some(log);
        if let Some(error) = wrote.no_space {
            warn!("cannot begin a new log and goes on with the old one while it lasts: {error}");
        }
        wrote.number.map_or(Ok(()), |number| self.turn(Input::Durable { number }))
    }

    fn on_event(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Accepted(_, peer) if self.connections.len() >= self.connections_max => {
                warn!("{peer}: connection closed: there are too many for the open files that lockd may have");
                Ok(())
            }
            Event::Accepted(stream, peer) => {
                self.last_connection += 1;
                let id = ConnectionId(self.last_connection);
                match Connection::start(id, stream, peer, self.events.clone()) {
                    Ok(connection) => {
                        self.connections.insert(id, connection);
                        self.turn(Input::Opened(id))
                    }
                    Err(error) => {
                        info!("{peer}: {error}");
                        Ok(())
                    }
                }
            }
            Event::Received(id, frame) => self.turn(Input::Received(id, frame)),
            Event::Peer(address, heard) => self.on_peer(address, heard),
            Event::Said(message) => self.turn(Input::Peer(message)),
            Event::Closed(id, why) => match self.connections.remove(&id) {
                Some(connection) => {
                    if let Some(why) = why {
                        warn!("{}: connection closed: {why}", connection.peer());
                    }
                    self.turn(Input::Closed(id))
                }
                None => Ok(()),
            },
        }
    }

    fn turn(&mut self, input: Input) -> anyhow::Result<()> {
        let mut outputs = Vec::new();
        self.core.step(now(), input, &mut outputs)?;
        for output in outputs {
            match output {
                Output::Write(write) => self.waiting.push(write),
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
                Output::Leads { term } => info!("leads the group in term {term}"),
                Output::Follows => info!("leads the group no more"),
                Output::Peer(message) => {
                    self.peers.send(&message);
                }
                Output::Members(members) => {
                    info!("the group has {} replicas", members.len());
                    self.keep_peers();
                }
                Output::Refused(why) => warn!("{why}"),
            }
        }
        let cluster = self.core.replica().cluster();
        let hello = self.own.get();
        if hello.heard.cluster != cluster {
            self.own.set(Hello { heard: Heard { cluster, ..hello.heard }, ..hello });
        }
        Ok(())
    }
}

/// An id and a seed.
fn random() -> anyhow::Result<([u8; 16], u64)> {
    let (mut id, mut seed) = ([0; 16], [0; 8]);
    let filled = getrandom::fill(&mut id).and_then(|()| getrandom::fill(&mut seed));
    filled.map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
    Ok((id, u64::from_le_bytes(seed)))
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
