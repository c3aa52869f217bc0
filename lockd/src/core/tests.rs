//! Both halves of the conversation against each other, in virtual time: lockd's core, client cores, a network that the
//! test cuts, and a log that the test syncs.

mod chaos;
mod conversation;
mod permission;
mod strangers;
mod tenure;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use csnap_proto::message::lock::{Flags, FromLockd, LockOp, Mode, ToLockd, ValueChange};
use csnap_proto::{Caller, EventNumber, Frame, Name, Secret, SessionId, Time, frame};

use super::spaces::{Command, Spaces};
use super::table::Table;
use super::{ConnectionId, Input, Lockd, Output};
use crate::client::{ClientConfig, ClientEvent, ClientInput, ClientOutput, Identity, LockClient, Ticket};

const LEASE_MS: u64 = 1500;
const RENEW_MS: u64 = 250;

fn node() -> Name {
    Name::new("n1").expect("a name")
}

fn identity(n: u8) -> Identity {
    Identity { session: SessionId([n; 16]), secret: Secret([n ^ 0xff; 16]) }
}

fn config() -> ClientConfig {
    ClientConfig { node: node(), lease_ms: LEASE_MS, renew_ms: RENEW_MS }
}

/// A client with what its network does to it.
struct Peer {
    client: LockClient,
    /// The connection that its attempt became.
    connection: Option<(u64, ConnectionId)>,
    /// What surfaced and was not looked at.
    events: Vec<ClientEvent>,
    /// No connection can be made.
    cut: bool,
}

/// Something on its way to a core.
enum Delivery {
    Lockd(Input),
    Peer(usize, ClientInput),
}

/// One lockd and its clients.
struct World {
    now: Time,
    queue: VecDeque<Delivery>,
    /// What lockd said on connections that are no client's.
    unclaimed: Vec<Output>,
    lockd: Option<Lockd>,
    peers: Vec<Peer>,
    /// Durable commands, and those that wait for a sync.
    log: Vec<Bytes>,
    unsynced: VecDeque<Bytes>,
    /// Syncs happen by themselves.
    syncing: bool,
    last_connection: u64,
    /// Why connections were closed by lockd.
    closed: Vec<String>,
    /// Who makes the next connections.
    caller: Caller,
    /// What was denied.
    denied: Vec<String>,
}

impl World {
    fn new() -> Self {
        let lockd = Some(Lockd::new(Time(0), node(), 1, Table::default()));
        let (log, unsynced, peers, closed) = (Vec::new(), VecDeque::new(), Vec::new(), Vec::new());
        Self {
            now: Time(0),
            queue: VecDeque::new(),
            unclaimed: Vec::new(),
            lockd,
            peers,
            log,
            unsynced,
            syncing: true,
            last_connection: 0,
            closed,
            caller: Caller::local(),
            denied: Vec::new(),
        }
    }

    fn with_peers(n: u8) -> Self {
        let mut world = Self::new();
        for n in 0..n {
            world.add(LockClient::new(config(), identity(n), vec![n]));
        }
        world.run(Duration::from_millis(1));
        world
    }

    fn add(&mut self, client: LockClient) -> usize {
        self.peers.push(Peer { client, connection: None, events: Vec::new(), cut: false });
        let peer = self.peers.len() - 1;
        self.input(peer, ClientInput::Tick);
        peer
    }

    fn input(&mut self, peer: usize, input: ClientInput) {
        self.queue.push_back(Delivery::Peer(peer, input));
        self.pump();
    }

    fn lockd_input(&mut self, input: Input) -> Vec<Output> {
        self.queue.push_back(Delivery::Lockd(input));
        self.pump();
        std::mem::take(&mut self.unclaimed)
    }

    /// Delivers what is under way, and what comes of it, in order.
    fn pump(&mut self) {
        let mut left = 100_000;
        while let Some(delivery) = self.queue.pop_front() {
            left -= 1;
            assert!(left > 0, "the conversation does not come to rest: {:?}", self.closed.last());
            match delivery {
                Delivery::Lockd(input) => self.step_lockd(input),
                Delivery::Peer(peer, input) => {
                    let mut out = Vec::new();
                    self.peers[peer].client.step(self.now, input, &mut out);
                    self.queue_outputs(peer, out);
                }
            }
        }
    }

    fn operate(&mut self, peer: usize, op: LockOp) -> Ticket {
        let mut out = Vec::new();
        let ticket = self.peers[peer].client.operate(self.now, op, &mut out).expect("few wait");
        self.carry_out(peer, out);
        ticket
    }

    fn lock(&mut self, peer: usize, mode: Mode) -> Ticket {
        self.operate(peer, LockOp::lock("r", mode, Flags::NONE))
    }

    fn set_renewing(&mut self, peer: usize, renewing: bool) {
        let mut out = Vec::new();
        self.peers[peer].client.set_renewing(self.now, renewing, &mut out);
        self.carry_out(peer, out);
    }

    fn carry_out(&mut self, peer: usize, outputs: Vec<ClientOutput>) {
        self.queue_outputs(peer, outputs);
        self.pump();
    }

    fn queue_outputs(&mut self, peer: usize, outputs: Vec<ClientOutput>) {
        for output in outputs {
            match output {
                ClientOutput::Connect { attempt } => {
                    if self.peers[peer].cut || self.lockd.is_none() {
                        self.queue.push_back(Delivery::Peer(peer, ClientInput::Disconnected { attempt }));
                        continue;
                    }
                    self.last_connection += 1;
                    let id = ConnectionId(self.last_connection);
                    self.peers[peer].connection = Some((attempt, id));
                    self.queue.push_back(Delivery::Lockd(Input::Opened(id, self.caller.clone())));
                    self.queue.push_back(Delivery::Peer(peer, ClientInput::Connected { attempt }));
                }
                ClientOutput::Disconnect { attempt } => {
                    if let Some((_, id)) = self.peers[peer].connection.take_if(|(a, _)| *a == attempt) {
                        self.queue.push_back(Delivery::Lockd(Input::Closed(id)));
                    }
                }
                ClientOutput::Send { attempt, frame } => {
                    if let Some((_, id)) = self.peers[peer].connection.filter(|(a, _)| *a == attempt) {
                        self.queue.push_back(Delivery::Lockd(Input::Received(id, over_the_wire(&frame))));
                    }
                }
                ClientOutput::Moved { to } => panic!("there is one group, and not {to:?}"),
                ClientOutput::Event(event) => self.peers[peer].events.push(event),
            }
        }
    }

    fn accept(&mut self) -> ConnectionId {
        self.last_connection += 1;
        let id = ConnectionId(self.last_connection);
        self.lockd_input(Input::Opened(id, self.caller.clone()));
        id
    }

    fn step_lockd(&mut self, input: Input) {
        let Some(lockd) = &mut self.lockd else { return };
        let mut out = Vec::new();
        lockd.step(self.now, input, &mut out);
        for output in out {
            match output {
                Output::Append(bytes) => self.unsynced.push_back(bytes),
                Output::Send(id, frame) => match self.peer_of(id) {
                    Some((peer, attempt)) => {
                        let frame = over_the_wire(&frame);
                        self.queue.push_back(Delivery::Peer(peer, ClientInput::Received { attempt, frame }));
                    }
                    None => self.unclaimed.push(Output::Send(id, frame)),
                },
                Output::Close(id, why) => {
                    self.closed.extend(why.clone());
                    match self.peer_of(id) {
                        Some((peer, attempt)) => {
                            self.peers[peer].connection = None;
                            self.queue.push_back(Delivery::Peer(peer, ClientInput::Disconnected { attempt }));
                        }
                        None => self.unclaimed.push(Output::Close(id, why)),
                    }
                }
                Output::Denied(_, denied) => self.denied.push(denied.to_string()),
                Output::Overslept(_) => {}
            }
        }
        if self.syncing {
            self.make_durable();
        }
    }

    fn peer_of(&self, id: ConnectionId) -> Option<(usize, u64)> {
        self.peers.iter().enumerate().find_map(|(at, peer)| {
            let (attempt, connection) = peer.connection?;
            (connection == id).then_some((at, attempt))
        })
    }

    /// Everything appended so far becomes durable.
    fn sync(&mut self) {
        self.make_durable();
        self.pump();
    }

    fn make_durable(&mut self) {
        let count = self.unsynced.len();
        if count > 0 {
            self.log.extend(self.unsynced.drain(..));
            self.queue.push_back(Delivery::Lockd(Input::Durable { count }));
        }
    }

    /// Lockd dies with what it had not synced; the next one reads the log.
    fn restart_lockd(&mut self) {
        self.stop_lockd();
        self.lockd = Some(Lockd::new(self.now, node(), 2, self.replayed()));
    }

    fn stop_lockd(&mut self) {
        self.lockd = None;
        self.unsynced.clear();
        for peer in 0..self.peers.len() {
            self.drop_connection(peer);
        }
    }

    fn replayed(&self) -> Spaces {
        let mut spaces = Spaces::default();
        for bytes in &self.log {
            let command: Command = postcard::from_bytes(bytes).expect("we wrote it");
            spaces.apply(command, &mut Vec::new());
        }
        spaces
    }

    fn drop_connection(&mut self, peer: usize) {
        if let Some((attempt, id)) = self.peers[peer].connection.take() {
            self.lockd_input(Input::Closed(id));
            self.input(peer, ClientInput::Disconnected { attempt });
        }
    }

    /// Lets time pass, deadline by deadline.
    fn run(&mut self, by: Duration) {
        let end = self.now.after(by);
        for left in (0..100_000).rev() {
            assert!(left > 0, "time does not pass");
            let peers = self.peers.iter().filter_map(|peer| peer.client.next_deadline());
            let lockd = self.lockd.as_ref().and_then(Lockd::next_deadline);
            let Some(next) = peers.chain(lockd).min().filter(|next| *next <= end) else { break };
            self.now = self.now.max(next);
            self.lockd_input(Input::Tick);
            for peer in 0..self.peers.len() {
                self.input(peer, ClientInput::Tick);
            }
        }
        self.now = end;
    }

    fn events(&mut self, peer: usize) -> Vec<ClientEvent> {
        std::mem::take(&mut self.peers[peer].events)
    }

    fn table(&self) -> &Table {
        self.lockd.as_ref().expect("runs").table()
    }
}

/// Encodes and decodes: what a core sends must be what the other may receive.
fn over_the_wire<M: frame::Message>(frame: &Frame<M>) -> Frame<M> {
    let mut bytes = BytesMut::new();
    frame::encode(frame, &mut bytes);
    frame::decode(&mut bytes).expect("valid").expect("whole")
}

fn sent(outputs: &[Output]) -> Vec<&FromLockd> {
    let sent = outputs.iter().filter_map(|output| match output {
        Output::Send(_, frame) => Some(&frame.message),
        _ => None,
    });
    sent.collect()
}

fn from_stranger(message: ToLockd) -> Frame<ToLockd> {
    Frame { id: csnap_proto::RequestId(7), term: csnap_proto::Term(0), message }
}

fn resume(identity: Identity) -> ToLockd {
    let Identity { session, secret } = identity;
    ToLockd::Resume { session, secret, last_event: EventNumber(0) }
}
