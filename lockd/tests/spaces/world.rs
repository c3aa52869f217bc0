//! Two groups of lockds and their clients, in virtual time: a network with a delay, disks with a delay, processes that die
//! between any two events. As in the daemon, what comes to a lockd while it is busy is taken in together and settled together; how
//! long that takes is drawn.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use csnap_lockd::client::{
    ClientConfig, ClientEvent, ClientInput, ClientOutput, Identity, LockClient, Ticket,
};
use csnap_lockd::core::ConnectionId;
use csnap_lockd::core::spaces::canary::Canary;
use csnap_lockd::core::spaces::mover::{CallId, Lost};
use csnap_lockd::core::spaces::{Space, Spaces, State};
use csnap_lockd::core::table::Table;
use csnap_lockd::replica::PeerMessage;
use csnap_lockd::replicated::{Input, Output};
use csnap_proto::message::lock::{FromLockd, LockOp, SpaceReply, SpaceRequest, ToLockd};
use csnap_proto::{Caller, Frame, Name, RequestId, Secret, SessionId, Term, Time, frame};
use csnap_storage::sim::Rng;

use crate::group::{Node, Seat, found};

/// One way through the network, microseconds.
const NET: u64 = 250;

/// One write with its sync, microseconds.
const DISK: u64 = 300;

/// What is gathered is settled after this at the latest, microseconds.
const GATHERS_FOR: u64 = 400;

pub(crate) const LEASE_MS: u64 = 2000;
const RENEW_MS: u64 = 300;

pub(crate) type Verdict = Result<(), String>;

/// Who made a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Client {
        client: usize,
        attempt: u64,
    },
    /// A lockd of the other group, in which life.
    Call {
        seat: Seat,
        life: u64,
        call: CallId,
    },
    Operator,
}

#[derive(Debug)]
struct Link {
    end: End,
    seat: Seat,
    life: u64,
    open: bool,
}

#[derive(Debug)]
enum Event {
    Timer {
        seat: Seat,
        life: u64,
    },
    Disk {
        seat: Seat,
        life: u64,
    },
    /// What a lockd gathered is settled.
    Settle {
        seat: Seat,
        life: u64,
    },
    Peer {
        to: Seat,
        message: PeerMessage,
    },
    ClientTimer {
        client: usize,
    },
    Connect {
        end: End,
        to: SocketAddr,
    },
    ToLockd {
        link: u64,
        frame: Frame<ToLockd>,
    },
    FromLockd {
        link: u64,
        frame: Frame<FromLockd>,
    },
    /// The end closed it.
    EndClosed {
        link: u64,
    },
    /// The lockd closed it.
    LockdClosed {
        link: u64,
    },
    Start {
        seat: Seat,
    },
}

pub(crate) struct Client {
    pub(crate) core: LockClient,
    addresses: Vec<SocketAddr>,
    link: Option<(u64, u64)>,
    away_until: u64,
    /// Gone for good.
    pub(crate) dead: bool,
    timer: Option<u64>,
    /// What surfaced, and when.
    pub(crate) events: Vec<(u64, ClientEvent)>,
}

pub(crate) struct World {
    pub(crate) now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    scheduled: u64,
    pub(crate) nodes: [Vec<Node>; 2],
    links: BTreeMap<u64, Link>,
    pub(crate) clients: Vec<Client>,
    /// What the operator's last request was answered.
    pub(crate) answered: Option<SpaceReply>,
    /// It, and which group it is asked of.
    operator: Option<(usize, SpaceRequest)>,
    broken: Option<Canary>,
    rng: Rng,
    /// How often several requests became one write.
    pub(crate) shared_writes: u64,
    pub(crate) name: Name,
    /// How far the lockspace is in each group, and by which command of its log.
    standings: [(u64, Standing); 2],
    frozen: Option<Box<Table>>,
    /// When the lockspace was frozen, and when it was served again.
    pub(crate) frozen_at: Option<u64>,
    pub(crate) active_at: Option<u64>,
    /// The longest step of a lockd of each group, by this machine's clock.
    pub(crate) longest: [Duration; 2],
    /// Both groups have a lockspace of the name, and those are not one.
    pub(crate) strangers: bool,
    /// Lockds that do not speak with those of the other group.
    pub(crate) refusing: Vec<Seat>,
}

/// How far a lockspace is in a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Standing {
    /// Nothing of it, or nothing in it.
    Absent,
    Active,
    Frozen,
    Importing,
    Imported,
    Forwarded,
    /// Forwarded, and the destination serves it.
    Settled,
}

impl Standing {
    fn of(space: Option<&Space>) -> Self {
        match space.map(Space::state) {
            None => Self::Absent,
            Some(State::Active(table)) if **table == Table::default() => Self::Absent,
            Some(State::Active(_)) => Self::Active,
            Some(State::Frozen { .. }) => Self::Frozen,
            Some(State::Importing(_)) => Self::Importing,
            Some(State::Imported { .. }) => Self::Imported,
            Some(State::Forwarded { activated: false, .. }) => Self::Forwarded,
            Some(State::Forwarded { activated: true, .. }) => Self::Settled,
        }
    }
}

pub(crate) fn address(seat: Seat) -> SocketAddr {
    let (group, n) = (u8::try_from(seat.group).expect("two"), u8::try_from(seat.n).expect("few"));
    SocketAddr::from(([10, 0, group, n], 1))
}

fn seat_of(address: SocketAddr) -> Seat {
    let SocketAddr::V4(v4) = address else { panic!("made above") };
    let [_, _, group, n] = v4.ip().octets();
    Seat { group: group.into(), n: n.into() }
}

/// Encodes and decodes: what one sends must be what the other may receive.
fn over_the_wire<M: frame::Message>(frame: &Frame<M>) -> Frame<M> {
    let mut bytes = BytesMut::new();
    frame::encode(frame, &mut bytes);
    frame::decode(&mut bytes).expect("valid").expect("whole")
}

impl Client {
    /// As after a change of its configuration.
    pub(crate) fn send_to(&mut self, addresses: Vec<SocketAddr>) {
        self.addresses = addresses;
    }
}

impl World {
    pub(crate) fn new(name: &str, broken: Option<Canary>) -> Self {
        Self::with_table(name, Table::default(), broken)
    }

    /// Two groups of three; the first begins with a table in its default lockspace.
    pub(crate) fn with_table(name: &str, table: Table, broken: Option<Canary>) -> Self {
        let nodes = [found(0, 3, &table.into()), found(1, 3, &Spaces::default())];
        let name = Name::new(name).expect("a name");
        let mut world = Self {
            now: 1,
            queue: BTreeMap::new(),
            scheduled: 0,
            nodes,
            links: BTreeMap::new(),
            clients: Vec::new(),
            answered: None,
            operator: None,
            broken,
            rng: Rng::new(1),
            shared_writes: 0,
            name,
            standings: [(0, Standing::Absent); 2],
            frozen: None,
            frozen_at: None,
            active_at: None,
            longest: [Duration::ZERO; 2],
            strangers: false,
            refusing: Vec::new(),
        };
        for group in 0..2 {
            for n in 0..world.nodes[group].len() {
                world.later(0, Event::Start { seat: Seat { group, n } });
            }
        }
        world
    }

    pub(crate) fn addresses(&self, group: usize) -> Vec<SocketAddr> {
        (0..self.nodes[group].len()).map(|n| address(Seat { group, n })).collect()
    }

    fn later(&mut self, after: u64, event: Event) {
        self.scheduled += 1;
        self.queue.insert((self.now + after, self.scheduled), event);
    }

    pub(crate) fn node(&mut self, seat: Seat) -> &mut Node {
        &mut self.nodes[seat.group][seat.n]
    }

    /// A client in the lockspace, that knows the first group.
    pub(crate) fn add_client(&mut self, n: u8) -> usize {
        let identity = Identity { session: SessionId([n; 16]), secret: Secret([n ^ 0xff; 16]) };
        let node = Name::new(format!("c{n}")).expect("a name");
        let config = ClientConfig { node, lease_ms: LEASE_MS, renew_ms: RENEW_MS };
        let mut core = LockClient::new(config, identity, vec![n]);
        if self.name.as_str() != "default" {
            core = core.in_lockspace(self.name.clone());
        }
        let (addresses, events) = (self.addresses(0), Vec::new());
        self.clients.push(Client {
            core,
            addresses,
            link: None,
            away_until: 0,
            dead: false,
            timer: None,
            events,
        });
        let client = self.clients.len() - 1;
        self.step_client(client, ClientInput::Tick);
        client
    }

    pub(crate) fn operate(&mut self, client: usize, op: LockOp) -> Ticket {
        let mut out = Vec::new();
        let ticket = self.clients[client].core.operate(Time(self.now), op, &mut out).expect("few wait");
        self.carry_out(client, out);
        ticket
    }

    fn step_client(&mut self, client: usize, input: ClientInput) {
        if self.clients[client].dead {
            return;
        }
        let mut out = Vec::new();
        self.clients[client].core.step(Time(self.now), input, &mut out);
        self.carry_out(client, out);
    }

    fn carry_out(&mut self, client: usize, outputs: Vec<ClientOutput>) {
        for output in outputs {
            match output {
                ClientOutput::Connect { attempt } => {
                    let addresses = &self.clients[client].addresses;
                    let at = usize::try_from(attempt).expect("few") % addresses.len();
                    let to = addresses[at];
                    self.later(NET, Event::Connect { end: End::Client { client, attempt }, to });
                }
                ClientOutput::Disconnect { attempt } => {
                    if let Some((_, link)) = self.clients[client].link.take_if(|(a, _)| *a == attempt) {
                        self.later(NET, Event::EndClosed { link });
                    }
                }
                ClientOutput::Send { attempt, frame } => {
                    if let Some((_, link)) = self.clients[client].link.filter(|(a, _)| *a == attempt) {
                        let frame = over_the_wire(&frame);
                        self.later(NET, Event::ToLockd { link, frame });
                    }
                }
                ClientOutput::Moved { to } => self.clients[client].addresses = to,
                ClientOutput::Event(event) => self.clients[client].events.push((self.now, event)),
            }
        }
        let deadline = self.clients[client].core.next_deadline();
        if let Some(at) = deadline.filter(|at| self.clients[client].timer.is_none_or(|set| at.0 < set)) {
            self.clients[client].timer = Some(at.0);
            self.later(at.0.saturating_sub(self.now), Event::ClientTimer { client });
        }
    }

    /// Loses its connection and finds no way for a while.
    pub(crate) fn cut(&mut self, client: usize, for_micros: u64) {
        self.clients[client].away_until = self.now + for_micros;
        if let Some((attempt, link)) = self.clients[client].link.take() {
            self.later(NET, Event::EndClosed { link });
            self.step_client(client, ClientInput::Disconnected { attempt });
        }
    }

    pub(crate) fn kill(&mut self, seat: Seat, starts_after: u64) {
        self.node(seat).kill();
        let touched = |link: &Link| {
            (link.seat == seat, matches!(link.end, End::Call { seat: from, .. } if from == seat))
        };
        let gone: Vec<(u64, bool)> = self
            .links
            .iter()
            .filter(|(_, link)| link.open)
            .filter_map(|(id, link)| {
                let (at, from) = touched(link);
                (at || from).then_some((*id, from))
            })
            .collect();
        for (link, from) in gone {
            let event = if from { Event::EndClosed { link } } else { Event::LockdClosed { link } };
            self.later(NET, event);
        }
        self.later(starts_after, Event::Start { seat });
    }

    /// A group whose disks are lost says nothing any more.
    pub(crate) fn forget(&mut self, group: usize) {
        self.standings[group] = (u64::MAX, Standing::Absent);
    }

    /// Asks the leader of a group, again until it answers.
    pub(crate) fn ask(&mut self, group: usize, request: SpaceRequest) {
        self.answered = None;
        self.operator = Some((group, request));
        self.call_leader(group, NET);
    }

    fn call_leader(&mut self, group: usize, after: u64) {
        let to = self.leader(group).unwrap_or(Seat { group, n: 0 });
        self.later(after, Event::Connect { end: End::Operator, to: address(to) });
    }

    /// Asks, and waits for the answer.
    pub(crate) fn asked(&mut self, group: usize, request: SpaceRequest) -> Result<SpaceReply, String> {
        self.ask(group, request);
        self.until("an operator is answered", 10_000_000, |world| world.answered.is_some())?;
        self.answered.take().ok_or_else(|| "seen above".into())
    }

    pub(crate) fn leader(&self, group: usize) -> Option<Seat> {
        let leads = |node: &Node| node.running.as_ref().is_some_and(|running| running.core.lockd().leads());
        let newest = |n: &usize| self.nodes[group][*n].running.as_ref().map(|r| r.core.replica().term());
        let all = (0..self.nodes[group].len()).filter(|n| leads(&self.nodes[group][*n]));
        all.max_by_key(newest).map(|n| Seat { group, n })
    }

    /// The lockspace as the leader of a group, or else its newest replica that is up, knows it.
    pub(crate) fn space(&self, group: usize) -> Option<&Space> {
        let running = self.nodes[group].iter().filter_map(|node| node.running.as_ref());
        let newest = running.max_by_key(|running| running.core.replica().applied())?;
        newest.spaces().get(newest.space(&self.name)?)
    }

    /// How far the lockspace is in a group, by the newest command that was ever applied there.
    pub(crate) fn standing(&self, group: usize) -> Standing {
        self.standings[group].1
    }

    /// Never two at once, nothing served before it is forwarded, and what arrives is what was frozen.
    fn judge(&mut self) -> Verdict {
        for group in 0..2 {
            let running = self.nodes[group].iter().filter_map(|node| node.running.as_ref());
            let Some(applied) = running.map(|running| running.core.replica().applied()).max() else {
                continue;
            };
            // One that has just started again does not know yet what it knew.
            if applied > self.standings[group].0 {
                let standing = Standing::of(self.space(group));
                let before = std::mem::replace(&mut self.standings[group], (applied, standing)).1;
                let gave_away = matches!(before, Standing::Forwarded | Standing::Settled);
                if gave_away && matches!(standing, Standing::Absent | Standing::Active) {
                    return Err("a lockspace is served again where it was forwarded".into());
                }
                if before != standing {
                    self.on_standing(group, standing)?;
                }
            }
        }
        // The group that does not serve it either gave it away, or has not had it (all of it) yet.
        let harmless = |standing| !matches!(standing, Standing::Active | Standing::Frozen);
        for (one, other) in [(0, 1), (1, 0)] {
            let (one, other) = (self.standing(one), self.standing(other));
            if one == Standing::Active && !harmless(other) && !self.strangers {
                return Err(format!("one group serves the lockspace, and in the other it is {other:?}"));
            }
        }
        Ok(())
    }

    fn on_standing(&mut self, group: usize, standing: Standing) -> Verdict {
        let state = self.space(group).map(Space::state);
        match (group, standing, state) {
            (_, Standing::Frozen, Some(State::Frozen { table, .. })) => {
                let table = table.clone();
                self.frozen = Some(table);
                self.frozen_at.get_or_insert(self.now);
            }
            (_, Standing::Imported, Some(State::Imported { table, .. })) => {
                table.check().map_err(str::to_owned)?;
                if self.frozen.as_ref().is_some_and(|frozen| **frozen != **table) {
                    return Err("what arrived is not what was frozen".into());
                }
            }
            (1, Standing::Active, _) => {
                self.active_at.get_or_insert(self.now);
            }
            _ => {}
        }
        Ok(())
    }

    /// Until something is so.
    pub(crate) fn until(&mut self, what: &str, within: u64, done: impl Fn(&Self) -> bool) -> Verdict {
        let end = self.now + within;
        while !done(self) {
            let Some(((at, _), event)) = self.queue.pop_first().filter(|((at, _), _)| *at <= end) else {
                return Err(format!("it never comes to that {what}"));
            };
            self.now = self.now.max(at);
            self.on_event(event);
            self.judge()?;
        }
        Ok(())
    }

    pub(crate) fn pass(&mut self, micros: u64) -> Verdict {
        let end = self.now + micros;
        while self.queue.first_key_value().is_some_and(|((at, _), _)| *at <= end) {
            let ((at, _), event) = self.queue.pop_first().expect("looked at above");
            self.now = self.now.max(at);
            self.on_event(event);
            self.judge()?;
        }
        self.now = end;
        Ok(())
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Start { seat } => {
                let (now, broken) = (self.now, self.broken);
                let seed = self.scheduled * 31 + seat.group as u64 * 7 + seat.n as u64;
                self.node(seat).start(now, seed, broken);
                self.step(seat, Input::Tick);
            }
            Event::Timer { seat, life } if self.node(seat).life == life => {
                if let Some(running) = &mut self.node(seat).running {
                    running.timer = None;
                }
                self.step(seat, Input::Tick);
            }
            Event::Disk { seat, life } if self.node(seat).life == life => self.on_disk(seat),
            Event::Settle { seat, life } if self.node(seat).life == life => self.settle(seat),
            Event::Timer { .. } | Event::Disk { .. } | Event::Settle { .. } => {}
            Event::Peer { to, message } => self.gather(to, Input::Peer(message)),
            Event::ClientTimer { client } => {
                self.clients[client].timer = None;
                self.step_client(client, ClientInput::Tick);
            }
            Event::Connect { end, to } => self.on_connect(end, seat_of(to)),
            Event::ToLockd { link, frame } => {
                if let Some((seat, _)) = self.lockd_of(link) {
                    self.gather(seat, Input::Received(ConnectionId(link), frame));
                }
            }
            Event::FromLockd { link, frame } => {
                if let Some(end) = self.links.get(&link).map(|link| link.end) {
                    self.hear(link, end, frame);
                }
            }
            Event::EndClosed { link } => {
                if let Some((seat, _)) = self.lockd_of(link) {
                    self.gather(seat, Input::Closed(ConnectionId(link)));
                }
                self.links.remove(&link);
            }
            Event::LockdClosed { link } => {
                if let Some(Link { end, .. }) = self.links.remove(&link) {
                    self.lose(end);
                }
            }
        }
    }

    /// Where a connection leads to, if that process still lives.
    fn lockd_of(&mut self, link: u64) -> Option<(Seat, u64)> {
        let (seat, life) =
            self.links.get(&link).filter(|link| link.open).map(|link| (link.seat, link.life))?;
        (self.node(seat).life == life).then_some((seat, life))
    }

    fn on_connect(&mut self, end: End, seat: Seat) {
        let away = matches!(end, End::Client { client, .. }
            if self.clients[client].away_until > self.now || self.clients[client].dead);
        let life = self.node(seat).life;
        if away || self.node(seat).running.is_none() {
            return self.lose(end);
        }
        if let End::Call { seat: from, life, call } = end
            && self.refusing.contains(&seat)
        {
            if self.node(from).life == life {
                self.step(from, Input::Lost(call, Lost::Refused("we do not know it".to_owned())));
            }
            return;
        }
        self.scheduled += 1;
        let link = self.scheduled;
        self.links.insert(link, Link { end, seat, life, open: true });
        self.gather(seat, Input::Opened(ConnectionId(link), Caller::local()));
        match end {
            End::Client { client, attempt } => {
                self.clients[client].link = Some((attempt, link));
                self.step_client(client, ClientInput::Connected { attempt });
            }
            End::Call { seat: from, life, call } => {
                if self.node(from).life == life {
                    self.gather(from, Input::Called(call));
                } else {
                    self.later(NET, Event::EndClosed { link });
                }
            }
            End::Operator => {
                if let Some((_, request)) = self.operator.clone() {
                    let message = ToLockd::Space(request);
                    let frame = over_the_wire(&Frame { id: RequestId(1), term: Term(0), message });
                    self.later(NET, Event::ToLockd { link, frame });
                }
            }
        }
    }

    fn lose(&mut self, end: End) {
        match end {
            End::Client { client, attempt } => {
                self.clients[client].link.take_if(|(mine, _)| *mine == attempt);
                self.step_client(client, ClientInput::Disconnected { attempt });
            }
            End::Call { seat, life, call } if self.node(seat).life == life => {
                self.gather(seat, Input::Lost(call, Lost::Away("nobody is there".to_owned())));
            }
            End::Operator => {
                if let Some((group, _)) = self.operator {
                    self.call_leader(group, 10_000);
                }
            }
            End::Call { .. } => {}
        }
    }

    fn hear(&mut self, link: u64, end: End, frame: Frame<FromLockd>) {
        match end {
            End::Client { client, attempt } => {
                if self.clients[client].link == Some((attempt, link)) {
                    self.step_client(client, ClientInput::Received { attempt, frame });
                }
            }
            End::Call { seat, life, call } => {
                if self.node(seat).life == life {
                    self.gather(seat, Input::Heard(call, frame));
                }
            }
            End::Operator => {
                if let FromLockd::Space(reply) = frame.message {
                    (self.answered, self.operator) = (Some(reply), None);
                }
            }
        }
    }

    /// Takes in what came, and settles it at once, or with what else comes in the next moment.
    fn gather(&mut self, seat: Seat, input: Input) {
        let (now, life) = (self.now, self.node(seat).life);
        let Some(running) = &mut self.node(seat).running else { return };
        let gathers = running.gathers;
        let began = Instant::now();
        let outputs = running.take_in(now, input);
        self.carry_out_all(seat, began, outputs);
        if gathers {
            return;
        }
        if self.rng.chance(0.5) {
            return self.settle(seat);
        }
        let wait = self.rng.below(GATHERS_FOR);
        self.later(wait, Event::Settle { seat, life });
    }

    /// Settles what was gathered, if anything was.
    fn settle(&mut self, seat: Seat) {
        let now = self.now;
        let Some(running) = self.node(seat).running.as_mut().filter(|running| running.gathers) else {
            return;
        };
        let began = Instant::now();
        let (outputs, shared) = running.settle(now);
        self.shared_writes += u64::from(shared);
        self.carry_out_all(seat, began, outputs);
        self.rest(seat);
    }

    /// A turn of its own, after what was being gathered.
    pub(crate) fn step(&mut self, seat: Seat, input: Input) {
        self.settle(seat);
        let now = self.now;
        let Some(running) = &mut self.node(seat).running else { return };
        let began = Instant::now();
        let outputs = running.step(now, input);
        self.carry_out_all(seat, began, outputs);
        self.rest(seat);
    }

    fn carry_out_all(&mut self, seat: Seat, began: Instant, outputs: Vec<Output>) {
        self.longest[seat.group] = self.longest[seat.group].max(began.elapsed());
        let life = self.node(seat).life;
        for output in outputs {
            self.carry_out_of(seat, life, output);
        }
    }

    /// It waits for its disk, or for its deadline.
    fn rest(&mut self, seat: Seat) {
        self.turn_disk(seat);
        let (now, life) = (self.now, self.node(seat).life);
        let Some(running) = &mut self.node(seat).running else { return };
        let deadline = running.core.next_deadline();
        if let Some(at) = deadline.filter(|at| running.timer.is_none_or(|set| at.0 < set)) {
            running.timer = Some(at.0);
            self.later(at.0.saturating_sub(now), Event::Timer { seat, life });
        }
    }

    fn carry_out_of(&mut self, seat: Seat, life: u64, output: Output) {
        match output {
            Output::Write(write) => {
                if let Some(running) = &mut self.node(seat).running {
                    running.waiting.push(write);
                }
            }
            Output::Peer(message) => {
                let id = message.to;
                let is = |node: &Node| node.running.as_ref().is_some_and(|r| r.core.replica().id() == id);
                if let Some(n) = self.nodes[seat.group].iter().position(is) {
                    self.later(NET, Event::Peer { to: Seat { n, ..seat }, message });
                }
            }
            Output::Send(id, frame) => {
                let frame = over_the_wire(&frame);
                self.later(NET, Event::FromLockd { link: id.0, frame });
            }
            Output::Close(id, _) => {
                if let Some(link) = self.links.get_mut(&id.0) {
                    link.open = false;
                }
                self.later(NET, Event::LockdClosed { link: id.0 });
            }
            Output::Denied(_, denied) => panic!("{denied}"),
            Output::Call(call, to) => {
                self.later(NET, Event::Connect { end: End::Call { seat, life, call }, to });
            }
            Output::Say(call, frame) => {
                if let Some(link) = self.link_of(seat, life, call) {
                    let frame = over_the_wire(&frame);
                    self.later(NET, Event::ToLockd { link, frame });
                }
            }
            Output::HangUp(call) => {
                if let Some(link) = self.link_of(seat, life, call) {
                    self.later(NET, Event::EndClosed { link });
                }
            }
            Output::Leads { .. }
            | Output::Follows
            | Output::Members(_)
            | Output::Refused(_)
            | Output::Overslept(_) => {}
        }
    }

    fn link_of(&self, seat: Seat, life: u64, call: CallId) -> Option<u64> {
        let end = End::Call { seat, life, call };
        self.links.iter().find(|(_, link)| link.end == end).map(|(id, _)| *id)
    }

    fn turn_disk(&mut self, seat: Seat) {
        let life = self.node(seat).life;
        let Some(running) = &mut self.node(seat).running else { return };
        if !running.disk_busy && !running.waiting.is_empty() {
            running.disk_busy = true;
            self.later(DISK, Event::Disk { seat, life });
        }
    }

    fn on_disk(&mut self, seat: Seat) {
        if self.node(seat).running.as_ref().is_some_and(|running| running.wants_base()) {
            self.step(seat, Input::WantsBase);
        }
        let Some(running) = &mut self.node(seat).running else { return };
        running.disk_busy = false;
        if let Some(number) = running.write() {
            self.step(seat, Input::Durable { number });
        }
        self.turn_disk(seat);
    }
}
