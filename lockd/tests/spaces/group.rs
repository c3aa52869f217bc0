//! A lockd of a group: a disk, and the process that may run on it.

use csnap_lockd::canary::Broken;
use csnap_lockd::core::spaces::canary::Canary;
use csnap_lockd::core::spaces::{SpaceId, Spaces};
use csnap_lockd::replica::{Base, ClusterId, Member, Members, ReplicaConfig, ReplicaLog, Timing, Write};
use csnap_lockd::replicated::{Input, Output, Replicated};
use csnap_lockd::store::{LOG_BYTES, StoreOptions};
use csnap_proto::{Name, Time};
use csnap_storage::sim::executor::run;
use csnap_storage::sim::{SimDisk, SimNode, SimStorage};

const NODE: SimNode = SimNode(1);

/// Which group, and which lockd in it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Seat {
    pub(crate) group: usize,
    pub(crate) n: usize,
}

pub(crate) struct Running {
    pub(crate) core: Replicated,
    log: ReplicaLog<SimStorage>,
    pub(crate) waiting: Vec<Write>,
    pub(crate) timer: Option<u64>,
    pub(crate) disk_busy: bool,
    /// Something was taken in and is not settled.
    pub(crate) gathers: bool,
    /// Requests among it that are to be written.
    gathered: usize,
}

pub(crate) struct Node {
    seat: Seat,
    disk: SimDisk,
    pub(crate) life: u64,
    pub(crate) running: Option<Running>,
}

fn options(seat: Seat) -> StoreOptions {
    let fresh_id = [u8::try_from(seat.group * 16 + seat.n + 1).expect("few"); 16];
    StoreOptions { fresh_id, log_bytes: LOG_BYTES, broken: Broken::NONE }
}

/// The disks of a group of so many.
pub(crate) fn found(group: usize, count: usize, spaces: &Spaces) -> Vec<Node> {
    let node = |n| {
        let (seat, disk) = (Seat { group, n }, SimDisk::new(7));
        Node { seat, disk, life: 0, running: None }
    };
    let nodes: Vec<Node> = (0..count).map(node).collect();
    let opened =
        |node: &Node| run(ReplicaLog::open(node.disk.storage(NODE), options(node.seat), |_| Base::empty()));
    let mut logs: Vec<_> = nodes.iter().map(|node| opened(node).expect("an empty disk")).collect();
    let member = |id, n: usize| (id, Member { address: format!("{n}"), voter: true });
    let members: Members = logs.iter().enumerate().map(|(n, (_, saved))| member(saved.id, n)).collect();
    let cluster = ClusterId([u8::try_from(group).expect("few") + 1; 16]);
    let base = Base::founding(cluster, members, postcard::to_stdvec(spaces).expect("encodes"));
    let (log, saved) = &mut logs[0];
    run(log.found(saved, base)).expect("a sound disk");
    drop(logs);
    nodes.iter().for_each(|node| node.disk.crash_node(NODE));
    nodes
}

impl Node {
    pub(crate) fn start(&mut self, now: u64, seed: u64, broken: Option<Canary>) {
        if self.running.is_some() {
            return;
        }
        let open = ReplicaLog::open(self.disk.storage(NODE), options(self.seat), |_| Base::empty());
        let (log, saved) = run(open).expect("a sound disk");
        let config = ReplicaConfig { timing: Timing::DEFAULT, seed, broken: Broken::NONE };
        let node = Name::new(format!("g{}n{}", self.seat.group, self.seat.n)).expect("a name");
        let core = Replicated::new(Time(now), config, node, 1, saved).expect("its own state");
        let core = break_rule(core, broken);
        self.life += 1;
        self.running = Some(Running {
            core,
            log,
            waiting: Vec::new(),
            timer: None,
            disk_busy: false,
            gathers: false,
            gathered: 0,
        });
    }

    /// Dies with what it had not written.
    pub(crate) fn kill(&mut self) {
        self.running = None;
        self.life += 1;
        self.disk.crash_node(NODE);
    }
}

#[cfg(feature = "canary")]
fn break_rule(core: Replicated, broken: Option<Canary>) -> Replicated {
    match broken {
        Some(rule) => core.breaking_lockspaces(rule),
        None => core,
    }
}

#[cfg(not(feature = "canary"))]
fn break_rule(core: Replicated, _broken: Option<Canary>) -> Replicated {
    core
}

impl Running {
    pub(crate) fn step(&mut self, now: u64, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        self.core.step(Time(now), input, &mut out).expect("commands of this version");
        out
    }

    /// One of several inputs, before they are settled together.
    pub(crate) fn take_in(&mut self, now: u64, input: Input) -> Vec<Output> {
        let is_request = matches!(input, Input::Received(..));
        let (before, mut out) = (self.core.lockd().in_flight(), Vec::new());
        self.core.take_in(Time(now), input, &mut out).expect("commands of this version");
        self.gathered += usize::from(is_request && self.core.lockd().in_flight() > before);
        self.gathers = true;
        out
    }

    /// What follows from all that was taken in, and whether several requests became one write.
    pub(crate) fn settle(&mut self, now: u64) -> (Vec<Output>, bool) {
        let mut out = Vec::new();
        self.core.settle(Time(now), &mut out).expect("commands of this version");
        self.gathers = false;
        let requests = std::mem::take(&mut self.gathered);
        let writes: Vec<&Write> = out
            .iter()
            .filter_map(|output| if let Output::Write(write) = output { Some(write) } else { None })
            .collect();
        // Before the requests stands what the replica promised.
        let one = matches!(writes[..], [Write::Append { items, .. }] if items.len() > requests);
        (out, requests > 1 && one)
    }

    /// Whether the disk wants everything anew before it takes what waits.
    pub(crate) fn wants_base(&self) -> bool {
        self.log.wants_base(&self.waiting)
    }

    /// Writes what waits; gives the number up to which all is durable.
    pub(crate) fn write(&mut self) -> Option<u64> {
        let writes = std::mem::take(&mut self.waiting);
        run(self.log.write(writes)).expect("a sound disk").number
    }

    pub(crate) fn spaces(&self) -> &Spaces {
        self.core.lockd().spaces()
    }

    pub(crate) fn space(&self, name: &Name) -> Option<SpaceId> {
        self.spaces().find(name)
    }
}
