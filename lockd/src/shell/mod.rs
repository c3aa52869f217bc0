//! The daemon around the core: `csnap lockd`.
//!
//! One thread. It waits for one event, steps the core, carries out the outputs in order. Writes gather while a batch is
//! being made durable and go out together as the next: that is the group commit. A write or sync that fails ends the
//! process; whoever starts it again finds everything that was answered.
//!
//! What it is not: a judge. Which connections may stay, and what is answered when, the core decides.

mod calls;
mod config;
mod connection;
mod door;
pub(crate) mod greeting;
#[cfg(test)]
mod group_tests;
mod hello;
mod introduction;
mod lateness;
mod peers;
mod places;
pub(crate) mod socket;
#[cfg(test)]
mod space_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;

use std::cell::{Cell, RefCell};
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
use csnap_transport::{Stream, Tls, unix};
use rustix::process::{Resource, getrlimit};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tracing::{info, warn};

use self::calls::Calls;
pub use self::config::LockdConfig;
use self::connection::Connection;
use self::door::{Door, Guest, Listener};
use self::hello::{Hello, founders_checksum};
use self::introduction::Introduction;
use self::lateness::Lateness;
use self::peers::{Own, Peer, Peers, Seats};
use self::socket::now;
use crate::canary::Broken;
use crate::core::{ConnectionId, LOCKD_CONNECTIONS_MAX};
use crate::replica::{
    Base, ClusterId, Forming, Heard, Members, PeerMessage, ReplicaConfig, ReplicaLog, Saved, Timing, Write,
    Wrote,
};
use crate::replicated::{Contact, Input, Output, Replicated};
use crate::store::{self, LOG_BYTES, StoreError, StoreOptions};

/// Events that wait for the main loop; a connection that finds it full waits.
const EVENTS_MAX: usize = 256;

/// File that says where the daemon listens, a line an address.
const ADDRESS_FILE: &str = "address";

/// What a task reports.
enum Event {
    Accepted(Guest),
    Received(ConnectionId, Frame<ToLockd>),
    Closed(ConnectionId, Option<String>),
    /// A replica is reached at an address, or no more.
    Peer(SocketAddr, Option<Peer>),
    /// A replica said something.
    Said(PeerMessage),
    /// A call to another group, and what became of it or was heard on it.
    Called(Input),
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
    tls: Option<Tls>,
    /// Of clients.
    door: Door,
    peers: Peers,
    /// Places of connections from other replicas.
    seats: Seats,
    calls: Calls,
    lateness: Lateness,
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
        }
        let listeners = listen(config)?;
        let listens: Vec<_> = listeners.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?;
        daemon.introduce(&listens);
        if !config.peers.is_empty() {
            daemon.meet_peers()?;
        }
        let mut addresses = String::new();
        for (listener, address) in listeners.into_iter().zip(listens) {
            info!(
                "lockd of {} listens on {address}, term {}",
                config.node,
                daemon.core.lockd().table().term()
            );
            addresses += &format!("{address}\n");
            daemon.let_in(Listener::Tcp(listener));
        }
        if let Some(path) = &config.listen_unix {
            let listener = unix::listen(path).with_context(|| {
                format!("cannot listen on {}; set another `listen_unix`, or stop who has it", path.display())
            })?;
            daemon.let_in(Listener::Unix(listener));
        }
        publish(&config.dir, &addresses)?;
        Ok(daemon)
    }

    /// Clients come in here, from now on.
    fn let_in(&self, listener: Listener) {
        let (own, events) = (Rc::clone(&self.own), self.events.clone());
        let greet = async move |stream: &mut Stream, _: &_| {
            greeting::greet_client(stream, own.hello.get().heard.cluster).await
        };
        let take_in = async move |guest, ()| {
            // The daemon ends when nobody receives.
            let _ = events.send(Event::Accepted(guest)).await;
        };
        tokio::task::spawn_local(self.door.clone().open(listener, greet, take_in));
    }

    async fn open(config: &LockdConfig) -> anyhow::Result<Self> {
        config.check_exposed().map_err(anyhow::Error::msg)?;
        let tls = config.tls.as_ref().map(Tls::load).transpose().map_err(anyhow::Error::msg)?;
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
        let hello = Hello { heard, founders: founders_checksum(&config.peers) };
        let presence = RefCell::new(core.presence().clone());
        let own = Rc::new(Introduction { hello: Cell::new(hello), presence });
        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        let peers = Peers::new(Rc::clone(&own), tls.clone(), events.clone());
        let calls = Calls::new(tls.clone(), events.clone());
        let descriptors = Descriptors::new(getrlimit(Resource::Nofile).current);
        Ok(Self {
            config: config.clone(),
            replica_config,
            core,
            log: Some(log),
            waiting: Vec::new(),
            forming,
            own,
            door: Door::new(tls.clone()),
            tls,
            peers,
            seats: Seats::default(),
            calls,
            lateness: Lateness::default(),
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
        let (own, tls, seats) = (Rc::clone(&self.own), self.tls.clone(), Rc::clone(&self.seats));
        tokio::task::spawn_local(peers::accept(listener, own, tls, seats, self.events.clone()));
        self.keep_peers();
        self.turn(Input::Tick)
    }

    /// Where it is found, as far as others see it under the same address.
    fn introduce(&mut self, listens: &[SocketAddr]) {
        let clients = listens.iter().copied().filter(|address| !address.ip().is_unspecified()).collect();
        self.core.set_addresses(clients, self.config.peer_listen);
        self.own.presence.replace(self.core.presence().clone());
    }

    /// A way to every replica that the configuration or the group names.
    fn keep_peers(&mut self) {
        self.seats.borrow_mut().0.set_members(self.core.replica().members().keys().copied());
        let members = self.core.replica().members().values();
        let members = members.filter_map(|member| member.address.parse::<Contact>().ok());
        let all = members.map(|contact| contact.address).chain(self.config.peers.iter().copied());
        let own = self.config.peer_listen;
        let others: Vec<SocketAddr> = all.filter(|address| Some(*address) != own).collect();
        if own.is_some() {
            self.peers.keep(others.into_iter());
        }
    }

    fn on_peer(&mut self, address: SocketAddr, peer: Option<Peer>) -> anyhow::Result<()> {
        if let Some((forming, _)) = &mut self.forming {
            match &peer {
                Some(peer) => forming.on_heard(address, peer.heard),
                None => forming.on_lost(address),
            }
        }
        let lost = self.peers.on_peer(address, peer.clone());
        match (peer, lost) {
            (Some(peer), _) => self.take_in(Input::Reached(peer.heard.id, peer.presence)),
            (None, Some(lost)) => self.take_in(Input::Unreachable(lost)),
            (None, None) => Ok(()),
        }
    }

    /// The founders by name: who is gone later can still be named.
    fn named(&self, mut members: Members) -> Members {
        for (id, member) in &mut members {
            let present = self.peers.present();
            let other = present.into_iter().find(|peer| peer.heard.id == *id);
            let node = other.map_or_else(|| self.config.node.clone(), |peer| peer.presence.node);
            if let Ok(address) = member.address.parse() {
                member.address = Contact { node: Some(node), address }.to_string();
            }
        }
        members
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
        let named = self.named(members);
        let (log, (cluster, _)) = (self.log.as_mut().expect("looked at above"), random()?);
        info!("founds a group of {} replicas", named.len());
        let base = Base::founding(ClusterId(cluster), named, Replicated::first_state());
        let saved = log.found(&saved, base).await.context("cannot found the group")?;
        let presence = self.core.presence().clone();
        self.core = Replicated::new(now(), self.replica_config, presence.node, presence.pid, saved)?;
        self.core.set_addresses(presence.clients, presence.peer);
        // Clients that were turned away know nothing of the one before.
        self.connections.clear();
        for peer in self.peers.present() {
            self.turn(Input::Reached(peer.heard.id, peer.presence))?;
        }
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
            if commit.is_none() && !self.waiting.is_empty() {
                self.look_once_more().await?;
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
                event = self.inbox.recv() => self.on_events(event.expect("we hold a sender"))?,
                // Last, so that renewals that were received are seen before a lease is judged.
                () = tokio::time::sleep(wait) => self.turn(Input::Tick)?,
            }
        }
    }

    /// What came while the last events were taken in belongs into the same write: the next one is a whole sync later. Takes
    /// no time where nothing came.
    async fn look_once_more(&mut self) -> anyhow::Result<()> {
        tokio::task::yield_now().await;
        match self.inbox.try_recv() {
            Ok(event) => self.on_events(event),
            Err(_) => Ok(()),
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

    /// This event and those that came with it: what they lead to is written and said together.
    fn on_events(&mut self, first: Event) -> anyhow::Result<()> {
        self.on_event(first)?;
        for _ in 1..EVENTS_MAX {
            let Ok(event) = self.inbox.try_recv() else { break };
            self.on_event(event)?;
        }
        let mut outputs = Vec::new();
        self.core.settle(now(), &mut outputs)?;
        self.carry_out(outputs);
        Ok(())
    }

    fn on_event(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Accepted(guest) if self.connections.len() >= self.connections_max => {
                let from = &guest.from;
                warn!("{from}: connection closed: there are too many for the open files that lockd may have");
                Ok(())
            }
            Event::Accepted(guest) => {
                self.last_connection += 1;
                let (id, caller) = (ConnectionId(self.last_connection), guest.caller.clone());
                self.connections.insert(id, Connection::start(id, guest, self.events.clone()));
                self.take_in(Input::Opened(id, caller))
            }
            Event::Received(id, frame) => self.take_in(Input::Received(id, frame)),
            Event::Peer(address, heard) => self.on_peer(address, heard),
            Event::Said(message) => self.take_in(Input::Peer(message)),
            Event::Called(input) => {
                if let Input::Lost(call, lost) = &input {
                    self.calls.lost(*call, lost);
                }
                self.take_in(input)
            }
            Event::Closed(id, why) => match self.connections.remove(&id) {
                Some(connection) => {
                    if let Some(why) = why {
                        warn!("{}: connection closed: {why}", connection.peer());
                    }
                    self.take_in(Input::Closed(id))
                }
                None => Ok(()),
            },
        }
    }

    /// One of several, settled after the last.
    fn take_in(&mut self, input: Input) -> anyhow::Result<()> {
        let mut outputs = Vec::new();
        self.core.take_in(now(), input, &mut outputs)?;
        self.carry_out(outputs);
        Ok(())
    }

    fn turn(&mut self, input: Input) -> anyhow::Result<()> {
        let mut outputs = Vec::new();
        self.core.step(now(), input, &mut outputs)?;
        self.carry_out(outputs);
        Ok(())
    }

    fn carry_out(&mut self, outputs: Vec<Output>) {
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
                Output::Denied(id, denied) => {
                    if let Some(connection) = self.connections.get(&id) {
                        self.door.complain(connection.peer(), &denied.to_string());
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
                Output::Overslept(overslept) => {
                    if let Some(line) = self.lateness.note(now(), overslept) {
                        warn!("{line}");
                    }
                }
                Output::Call(call, address) => self.calls.call(call, address),
                Output::Say(call, frame) => self.calls.say(call, &frame),
                Output::HangUp(call) => self.calls.hang_up(call),
            }
        }
        let cluster = self.core.replica().cluster();
        let hello = self.own.hello.get();
        if hello.heard.cluster != cluster {
            self.own.hello.set(Hello { heard: Heard { cluster, ..hello.heard }, ..hello });
        }
    }
}

/// An id and a seed.
fn random() -> anyhow::Result<([u8; 16], u64)> {
    let (mut id, mut seed) = ([0; 16], [0; 8]);
    let filled = getrandom::fill(&mut id).and_then(|()| getrandom::fill(&mut seed));
    filled.map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
    Ok((id, u64::from_le_bytes(seed)))
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
