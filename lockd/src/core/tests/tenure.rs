//! A holder that counts its own time has stopped before lockd ends its lease: messages of any delay, clocks of unequal
//! speed, and a network that is cut for good at any moment.

use super::*;
use crate::client::{Duty, Tenure};
use crate::core::table;

/// Longest delays, microseconds: what lockd says may take longer than what it hears.
const TO_LOCKD_US: u64 = 100_000;
const TO_CLIENT_US: u64 = 380_000;

/// A holder's clock counts between 980 and 1020 for 1000 of lockd's.
const RATE_LEAST: u64 = 980;
const RATES: u64 = 41;

/// The network is cut within this, microseconds.
const CUT_WITHIN_US: u64 = 6_000_000;

/// Numbers that a seed gives.
struct Chance(u64);

impl Chance {
    /// Below `most`.
    fn draw(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % most
    }
}

/// One holder and lockd, each with its clock and with wires between them.
struct Pair {
    chance: Chance,
    /// lockd's clock, microseconds; the holder's is `rate` thousandths of it.
    now: u64,
    rate: u64,
    cut_at: u64,
    lockd: Lockd,
    client: LockClient,
    confirmed: Option<Time>,
    tenure: Option<Tenure>,
    new_tenure: fn(Duration, Time) -> Tenure,
    wires: BTreeMap<(u64, u64), Delivery>,
    deliveries: u64,
    last_arrival: [u64; 2],
    /// When the holder had to be stopped, and when the command that ends its session was made; lockd's clock.
    stopped: Option<u64>,
    expired: Option<u64>,
}

impl Pair {
    fn new(seed: u64, new_tenure: fn(Duration, Time) -> Tenure) -> Self {
        let mut chance = Chance(seed);
        chance.draw(1);
        let (rate, cut_at) = (RATE_LEAST + chance.draw(RATES), 1_000_000 + chance.draw(CUT_WITHIN_US));
        Self {
            chance,
            now: 0,
            rate,
            cut_at,
            lockd: Lockd::new(Time(0), node(), 1, Table::default()),
            client: LockClient::new(config(), identity(1), Vec::new()),
            confirmed: None,
            tenure: None,
            new_tenure,
            wires: BTreeMap::new(),
            deliveries: 0,
            last_arrival: [0; 2],
            stopped: None,
            expired: None,
        }
    }

    fn holders_time(&self) -> Time {
        Time(self.now * self.rate / 1000)
    }

    /// The first moment at which the holder's clock shows `at`.
    fn when(&self, at: Time) -> u64 {
        (at.0 * 1000).div_ceil(self.rate)
    }

    /// What is sent arrives in the order in which it was sent, or not at all.
    fn send(&mut self, delivery: Delivery) {
        let (wire, most) = match delivery {
            Delivery::Lockd(_) => (0, TO_LOCKD_US),
            Delivery::Peer(..) => (1, TO_CLIENT_US),
        };
        let arrival = (self.now + self.chance.draw(most)).max(self.last_arrival[wire]);
        self.last_arrival[wire] = arrival;
        self.deliveries += 1;
        if arrival < self.cut_at {
            self.wires.insert((arrival, self.deliveries), delivery);
        }
    }

    fn step_client(&mut self, input: ClientInput) {
        let (now, mut out) = (self.holders_time(), Vec::new());
        self.client.step(now, input, &mut out);
        let mut out = VecDeque::from(out);
        while let Some(output) = out.pop_front() {
            let mut more = Vec::new();
            match output {
                ClientOutput::Moved { to } => panic!("there is one group, and not {to:?}"),
                ClientOutput::Connect { attempt } if self.now < self.cut_at => {
                    self.send(Delivery::Lockd(Input::Opened(ConnectionId(attempt), Caller::local())));
                    self.client.step(now, ClientInput::Connected { attempt }, &mut more);
                }
                ClientOutput::Connect { attempt } => {
                    self.client.step(now, ClientInput::Disconnected { attempt }, &mut more);
                }
                ClientOutput::Disconnect { attempt } => {
                    self.send(Delivery::Lockd(Input::Closed(ConnectionId(attempt))));
                }
                ClientOutput::Send { attempt, frame } => {
                    self.send(Delivery::Lockd(Input::Received(ConnectionId(attempt), frame)));
                }
                ClientOutput::Event(_) => {}
            }
            out.extend(more);
        }
        if self.client.confirmed_at() != self.confirmed
            && let Some(sent_at) = self.client.confirmed_at()
        {
            self.confirmed = Some(sent_at);
            let new = self.new_tenure;
            let lease = Duration::from_millis(LEASE_MS);
            self.tenure.get_or_insert_with(|| new(lease, sent_at)).confirm(now, sent_at);
        }
        if self.tenure.as_mut().is_some_and(|tenure| tenure.duty(now) == Duty::Stop) {
            self.stopped.get_or_insert(self.now);
        }
    }

    fn step_lockd(&mut self, input: Input) {
        let mut out = Vec::new();
        self.lockd.step(Time(self.now), input, &mut out);
        let mut out = VecDeque::from(out);
        while let Some(output) = out.pop_front() {
            let mut more = Vec::new();
            match output {
                Output::Append(bytes) => {
                    let command: Command = postcard::from_bytes(&bytes).expect("lockd made it");
                    if matches!(command, Command::In(_, table::Command::Expire { .. })) {
                        self.expired.get_or_insert(self.now);
                    }
                    self.lockd.step(Time(self.now), Input::Durable { count: 1 }, &mut more);
                }
                Output::Send(ConnectionId(attempt), frame) => {
                    self.send(Delivery::Peer(0, ClientInput::Received { attempt, frame }));
                }
                Output::Close(ConnectionId(attempt), _) => {
                    self.send(Delivery::Peer(0, ClientInput::Disconnected { attempt }));
                }
                Output::Denied(_, denied) => panic!("{denied}"),
                Output::Overslept(_) => {}
            }
            out.extend(more);
        }
    }

    /// Runs until both have come to an end; when the holder was stopped, and when its session ended.
    fn run(mut self) -> (u64, u64) {
        self.step_client(ClientInput::Tick);
        while self.stopped.is_none() || self.expired.is_none() {
            let arrival = self.wires.keys().next().map(|(at, _)| *at);
            let holder = self.holders_time();
            let tenure = self.tenure.and_then(|tenure| tenure.next_deadline(holder));
            let client = self.client.next_deadline().into_iter().chain(tenure).min().map(|at| self.when(at));
            let lockd = self.lockd.next_deadline().map(|at| at.0);
            let next = [arrival, client, lockd].into_iter().flatten().min().expect("leases end");
            self.now = self.now.max(next);
            if arrival == Some(next) {
                match self.wires.pop_first().expect("seen above").1 {
                    Delivery::Lockd(input) => self.step_lockd(input),
                    Delivery::Peer(_, input) => self.step_client(input),
                }
            } else if client == Some(next) {
                self.step_client(ClientInput::Tick);
            } else {
                self.step_lockd(Input::Tick);
            }
        }
        self.stopped.zip(self.expired).expect("seen above")
    }
}

/// The holders that were stopped too late, among so many.
fn too_late(pairs: u64, new_tenure: fn(Duration, Time) -> Tenure) -> Vec<u64> {
    let late = |seed: &u64| {
        let (stopped, expired) = Pair::new(*seed, new_tenure).run();
        stopped >= expired
    };
    (0..pairs).filter(late).collect()
}

#[test]
fn a_holder_has_stopped_before_its_lease_is_ended() {
    assert_eq!(too_late(5_000, Tenure::new), []);
}

#[cfg(feature = "canary")]
#[test]
fn a_holder_that_counts_otherwise_is_noticed() {
    use crate::client::tenure::Canary;
    for (name, new) in [
        (
            "count-from-answer",
            (|lease, at| Tenure::breaking(lease, at, Canary::CountFromAnswer)) as fn(_, _) -> _,
        ),
        ("stop-late", |lease, at| Tenure::breaking(lease, at, Canary::StopLate)),
    ] {
        let late = too_late(500, new);
        println!("{name}: {} of 500 holders were stopped too late", late.len());
        assert!(!late.is_empty(), "{name} was not noticed");
    }
}
