//! A session with whichever lockd leads, for processes that are nothing else than its clients: the shipped client core and its
//! connection.

use std::collections::BTreeMap;

use csnap_lockd::client::{
    ClientConfig, ClientEvent, ClientInput, ClientOutput, Identity, LockClient, Ticket,
};
use csnap_proto::Time;
use csnap_proto::message::lock::{FromLockd, LockOp};

use crate::net::NetConn;
use crate::sim::{Event, HostId, ProcId, Sim, frames, lockd_address, node_name};

/// Where an attempt looks for a lockd.
pub(super) fn lockd_address_of(sim: &Sim, turn: u64) -> String {
    let seats = sim.plan.lockds.len() as u64;
    lockd_address(usize::try_from(turn % seats).expect("few lockds"))
}

/// See the module.
pub struct Session {
    id: ProcId,
    host: HostId,
    client: LockClient,
    conn: Option<(u64, NetConn)>,
    /// Attempts under way by tag, and lockds that they came past.
    connects: BTreeMap<u64, (u64, u64)>,
    last_tag: u64,
    events: Vec<ClientEvent>,
}

impl Session {
    pub(super) fn new(sim: &mut Sim, id: ProcId, host: HostId, lease_ms: u64) -> Self {
        let config = ClientConfig { node: node_name(host), lease_ms, renew_ms: lease_ms / 4 };
        let (session, secret) = sim.draw_session();
        let client = LockClient::new(config, Identity { session, secret }, Vec::new());
        Self { id, host, client, conn: None, connects: BTreeMap::new(), last_tag: 0, events: Vec::new() }
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        self.client.next_deadline()
    }

    /// What its owner has learnt since the last time.
    pub(super) fn take_events(&mut self) -> Vec<ClientEvent> {
        std::mem::take(&mut self.events)
    }

    /// Whether the event was this session's.
    pub(super) fn on_event(&mut self, sim: &mut Sim, event: &Event) -> bool {
        match event {
            Event::Start | Event::Tick => self.step(sim, ClientInput::Tick),
            Event::Connected { tag, conn } => match (self.connects.remove(tag), conn) {
                (None, _) => return false,
                (Some((attempt, _)), Some(conn)) => {
                    if let Some((_, older)) = self.conn.replace((attempt, *conn)) {
                        sim.close(self.id, older);
                    }
                    self.step(sim, ClientInput::Connected { attempt });
                }
                (Some((attempt, passed)), None) if passed + 1 < sim.plan.lockds.len() as u64 => {
                    self.connect(sim, attempt, passed + 1);
                }
                (Some((attempt, _)), None) => self.step(sim, ClientInput::Disconnected { attempt }),
            },
            Event::Closed { conn } => match self.conn.take_if(|(_, mine)| mine == conn) {
                Some((attempt, _)) => self.step(sim, ClientInput::Disconnected { attempt }),
                None => return false,
            },
            Event::Received { conn, payload } => match self.conn.filter(|(_, mine)| mine == conn) {
                Some((attempt, _)) => {
                    for frame in frames::<FromLockd>(&payload.bytes) {
                        self.step(sim, ClientInput::Received { attempt, frame });
                    }
                }
                None => return false,
            },
            _ => return false,
        }
        true
    }

    /// Asks; the answer is an event with this ticket.
    pub(super) fn operate(&mut self, sim: &mut Sim, op: LockOp) -> Ticket {
        let mut out = Vec::new();
        let ticket = self.client.operate(sim.clock(self.host), op, &mut out).expect("its owner asks little");
        self.carry_out(sim, out);
        ticket
    }

    /// Goes on in another session; the one before is left to its lease, if it lives.
    pub(super) fn restart(&mut self, sim: &mut Sim) {
        let (session, secret) = sim.draw_session();
        let mut out = Vec::new();
        self.client.restart(sim.clock(self.host), Identity { session, secret }, Vec::new(), &mut out);
        self.carry_out(sim, out);
    }

    fn step(&mut self, sim: &mut Sim, input: ClientInput) {
        let mut out = Vec::new();
        self.client.step(sim.clock(self.host), input, &mut out);
        self.carry_out(sim, out);
    }

    fn carry_out(&mut self, sim: &mut Sim, out: Vec<ClientOutput>) {
        for output in out {
            match output {
                ClientOutput::Connect { attempt } => self.connect(sim, attempt, 0),
                ClientOutput::Disconnect { attempt } => {
                    if let Some((_, conn)) = self.conn.take_if(|(mine, _)| *mine == attempt) {
                        sim.close(self.id, conn);
                    }
                    self.connects.retain(|_, (mine, _)| *mine != attempt);
                }
                ClientOutput::Send { attempt, frame } => match self.conn.filter(|(mine, _)| *mine == attempt)
                {
                    Some((_, conn)) => sim.send(self.id, conn, &frame),
                    None => self.step(sim, ClientInput::Disconnected { attempt }),
                },
                ClientOutput::Moved { to } => {
                    sim.violation(format!("there is one group of lockds, and not {to:?}"));
                }
                ClientOutput::Event(event) => self.events.push(event),
            }
        }
    }

    fn connect(&mut self, sim: &mut Sim, attempt: u64, passed: u64) {
        self.last_tag += 1;
        self.connects.insert(self.last_tag, (attempt, passed));
        let address = lockd_address_of(sim, attempt + passed);
        sim.connect(self.id, self.host, &address, self.last_tag);
    }
}
