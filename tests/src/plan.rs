//! How a world is drawn from its seed: how many nodes, how fast what is, and which faults this world is about.

use std::time::Duration;

use csnap_lockd::replica::Timing;
use csnap_proto::PoolId;
use csnap_server::term::PoolToml;
use csnap_storage::sim::{OperationKind, Rng};

use crate::net::Weather;
use crate::sim::HostId;

/// Rules that the servers and clients of a world break; none, outside tests of the tests.
#[derive(Clone, Debug, Default)]
pub struct Canaries {
    /// Of terms.
    pub term: csnap_server::term::canary::Canaries,
    /// Of the server's core.
    pub core: csnap_server::core::canary::Broken,
    /// Of the client's core.
    pub client: csnap_client::core::Canaries,
    /// Of lockd's table.
    pub table: csnap_lockd::core::canary::Broken,
    /// Of the daemon around it.
    pub lockd: csnap_lockd::canary::Broken,
    /// The fenced register does not look at terms.
    pub careless_register: bool,
}

/// Kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// SIGKILL of a server.
    KillServer,
    /// SIGSTOP of a server alone.
    PauseServer,
    /// SIGSTOP of an agent and its server together, for longer than the lease.
    PauseNode,
    /// SIGKILL of an exporter.
    KillExporter,
    /// SIGSTOP of an exporter.
    PauseExporter,
    /// SIGKILL of an agent.
    KillAgent,
    /// SIGKILL of lockd.
    KillLockd,
    /// SIGSTOP of lockd.
    PauseLockd,
    /// No packet passes between two hosts.
    Partition,
    /// No packet passes from one host to another.
    PartitionOneWay,
    /// A connection breaks, at both ends or at one.
    Cut,
    /// Disks take many times longer.
    SlowDisk,
    /// Every process and disk loses its power.
    PowerLoss,
    /// A host goes without a word.
    HostCrash,
    /// The next sync of something of the pool fails.
    SyncFails,
    /// The next write or read of something of the pool fails.
    IoFails,
    /// The pool is full.
    Full,
    /// A clock jumps ahead.
    ClockJumps,
    /// A clock stands still.
    ClockStops,
    /// The serving server is killed, and whoever takes over is hit at some operation.
    HitTakeover,
    /// A serving server is hit at some operation.
    HitService,
    /// The serving server is killed, whoever takes over is stopped at some operation, and goes on while, or after, another
    /// one takes over.
    FreezeTakeover,
    /// No packet passes between one lockd and the others, or in one direction; clients reach it.
    PartitionLockds,
    /// A lockd and its disk lose their power.
    LockdPowerLoss,
    /// The next write or sync of a lockd fails.
    LockdIoFails,
    /// A lockd's disk is full.
    LockdFull,
    /// A lockd's disk is lost: it comes back empty, and is added again.
    LoseLockdDisk,
    /// Another lockd is to lead.
    MoveLockd,
    /// SIGSTOP of the client of a fenced register that has the lock.
    PauseHolder,
}

impl Fault {
    /// Kinds that strike nodes, their network and their disks, and any lockd.
    pub const OF_NODES: [Self; 22] = [
        Self::KillServer,
        Self::PauseServer,
        Self::PauseNode,
        Self::KillExporter,
        Self::PauseExporter,
        Self::KillAgent,
        Self::KillLockd,
        Self::PauseLockd,
        Self::Partition,
        Self::PartitionOneWay,
        Self::Cut,
        Self::SlowDisk,
        Self::PowerLoss,
        Self::HostCrash,
        Self::SyncFails,
        Self::IoFails,
        Self::Full,
        Self::ClockJumps,
        Self::ClockStops,
        Self::HitTakeover,
        Self::HitService,
        Self::FreezeTakeover,
    ];

    /// Kinds that strike one of several lockds.
    pub const OF_LOCKDS: [Self; 8] = [
        Self::KillLockd,
        Self::PauseLockd,
        Self::PartitionLockds,
        Self::LockdPowerLoss,
        Self::LockdIoFails,
        Self::LockdFull,
        Self::LoseLockdDisk,
        Self::MoveLockd,
    ];

    /// Those that need others than the one that is struck.
    pub const OF_GROUPS: [Self; 3] = [Self::PartitionLockds, Self::LoseLockdDisk, Self::MoveLockd];

    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::KillServer => "server killed",
            Self::PauseServer => "server stopped",
            Self::PauseNode => "agent and server stopped",
            Self::KillExporter => "exporter killed",
            Self::PauseExporter => "exporter stopped",
            Self::KillAgent => "agent killed",
            Self::KillLockd => "lockd killed",
            Self::PauseLockd => "lockd stopped",
            Self::Partition => "partition",
            Self::PartitionOneWay => "partition one way",
            Self::Cut => "connection cut",
            Self::SlowDisk => "slow disk",
            Self::PowerLoss => "power loss",
            Self::HostCrash => "host crash",
            Self::SyncFails => "sync failed",
            Self::IoFails => "read or write failed",
            Self::Full => "pool full",
            Self::ClockJumps => "clock jumped",
            Self::ClockStops => "clock stood still",
            Self::HitTakeover => "takeover hit",
            Self::HitService => "service hit",
            Self::FreezeTakeover => "takeover stopped",
            Self::PartitionLockds => "lockd cut off from the others",
            Self::LockdPowerLoss => "lockd's host lost its power",
            Self::LockdIoFails => "lockd's write or sync failed",
            Self::LockdFull => "lockd's disk full",
            Self::LoseLockdDisk => "lockd's disk lost",
            Self::MoveLockd => "lockd's leadership moved",
            Self::PauseHolder => "holder stopped",
        }
    }
}

/// An operation of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spot {
    /// The so many-th from now.
    Nth(u64),
    /// The next of this kind on a path that ends so.
    At(OperationKind, &'static str),
}

/// What guests and operators do.
#[derive(Clone, Debug)]
pub struct Work {
    /// Volumes, each with a writing guest: chunk size and number of 4 KiB blocks.
    pub volumes: Vec<(u64, u64)>,
    /// Guests that read snapshots.
    pub readers: usize,
    /// Between requests of a guest, microseconds, about.
    pub think: u64,
    /// Requests of a guest at once, at most.
    pub depth: usize,
    /// Between snapshot creates, microseconds, about; 0 for none but the final ones.
    pub create_every: u64,
    /// Between other things that operators do, microseconds, about; 0 for none.
    pub operate_every: u64,
    /// Probability that a writer moves on after a request.
    pub leave: f64,
    /// Probability that a written request may take the fast way.
    pub fast: f64,
    /// Probability that a delete is forced.
    pub forced: f64,
    /// Blocks that get most of the writes, so that chunks are met again.
    pub hot_blocks: u64,
}

/// How long guests' I/O takes at most, beyond what the disk takes, microseconds: rare I/O only, and none if 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slow {
    /// Writes of heads.
    pub head_write: u64,
    /// Reads of heads.
    pub head_read: u64,
    /// Reads of the store.
    pub store_read: u64,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Plan {
    /// All else is drawn from it.
    pub seed: u64,
    /// Nodes.
    pub nodes: usize,
    /// Lockds: where each runs. One alone has a host behind the nodes; several are with the nodes, or each has its own.
    pub lockds: Vec<HostId>,
    /// How long the lockds wait for each other.
    pub elections: csnap_lockd::replica::Timing,
    /// Clients that use locks and keys, and between two operations of one, microseconds, about.
    pub contenders: (usize, u64),
    /// Clients of a fenced register.
    pub holders: usize,
    /// Hosts.
    pub hosts: usize,
    /// Largest drift of a clock, parts in a million.
    pub drift_ppm: u64,
    /// Delays and losses.
    pub weather: Weather,
    /// Keep a trace.
    pub trace: bool,
    /// Print it as it comes.
    pub print: bool,
    /// Broken rules.
    pub canaries: Canaries,
    /// A standby looks for news so often, microseconds.
    pub follow_every: u64,
    /// Lease of client sessions.
    pub client_lease: Duration,
    /// How long a create waits for the writer.
    pub drain_patience: Duration,
    /// The pool.
    pub pool: PoolToml,
    /// Bound of each client's cache.
    pub unique_cache_bytes: usize,
    /// When clients start writeback.
    pub writeback_bytes: u64,
    /// Exporters act on news of a serving server.
    pub heeds_news: bool,
    /// Of the nodes.
    pub priorities: Vec<u32>,
    /// Better nodes get the server back.
    pub failback: bool,
    /// See the agent's configuration.
    pub ping_interval: Duration,
    /// As above.
    pub ping_timeout: Duration,
    /// As above.
    pub place_step: Duration,
    /// As above.
    pub failback_after: Duration,
    /// As above, milliseconds.
    pub lease_ms: u64,
    /// As above, milliseconds.
    pub renew_ms: u64,
    /// What guests do.
    pub work: Work,
    /// How slow their I/O may be.
    pub slow: Slow,
    /// Faults of this world, each as often as it stands here.
    pub faults: Vec<Fault>,
    /// Where a takeover is stopped, and at which operation of another's it goes on; drawn each time if absent.
    pub freeze: Option<(Spot, Spot)>,
    /// Between faults, microseconds, about.
    pub fault_every: u64,
    /// How long the storm lasts, microseconds.
    pub storm: u64,
}

/// Storms last this long, microseconds: a world is meant to see at least a minute of work.
pub const STORM: u64 = 60_000_000;

impl Plan {
    /// The world of a seed.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let rng = &mut Rng::new(seed ^ 0x7770_6c61_6e00);
        let nodes = [3, 3, 3, 2][rng.index(4)];
        let mut id = [0; 16];
        id[..8].copy_from_slice(&seed.to_le_bytes());
        id[8] = 1;
        let mut pool = PoolToml::new(PoolId(id), rng.chance(0.3));
        pool.segment_bytes = [64 << 10, 128 << 10, 256 << 10, 1 << 20][rng.index(4)];
        let mut faults = Self::draw_faults(rng);
        let chunks = [4096, 4096, 16384, 65536];
        let volumes = (0..2 + rng.below(2)).map(|_| (chunks[rng.index(4)], 64 << rng.below(3))).collect();
        // Of its own, so that what is drawn for the lockds changes nothing else.
        let group = &mut Rng::new(seed ^ 0x6c6f_636b_6473);
        let lockds = Self::draw_lockds(group, nodes);
        if lockds.len() > 1 {
            let more = 1 + group.index(3);
            faults.extend((0..more).map(|_| Fault::OF_LOCKDS[group.index(Fault::OF_LOCKDS.len())]));
        }
        let hosts = lockds.iter().map(|host| host.0 + 1).max().unwrap_or(0).max(nodes);
        let elections = if group.chance(0.1) { Timing::FAST } else { Timing::DEFAULT };
        Self {
            seed,
            nodes,
            lockds,
            elections,
            contenders: (2 + group.index(2), 300_000 + group.below(400_000)),
            holders: 0,
            hosts,
            drift_ppm: [0, 100, 5_000, 10_000][rng.index(4)],
            weather: Weather {
                delay: 30 + rng.below(400),
                jitter: [10, 100, 1000, 5000][rng.index(4)],
                loss: [0.0, 0.0, 0.001, 0.01][rng.index(4)],
            },
            trace: false,
            print: false,
            canaries: Canaries::default(),
            follow_every: [50_000, 100_000, 200_000, 400_000][rng.index(4)],
            client_lease: Duration::from_millis(1500 + rng.below(5000)),
            drain_patience: Duration::from_millis(500 + rng.below(3000)),
            pool,
            unique_cache_bytes: [0, 1 << 10, 64 << 20][rng.index(3)],
            writeback_bytes: [0, 64 << 10, 64 << 20][rng.index(3)],
            heeds_news: rng.chance(0.7),
            priorities: (0..nodes).map(|_| [100, 100, 50, 10][rng.index(4)]).collect(),
            failback: rng.chance(0.5),
            ping_interval: Duration::from_millis(100),
            ping_timeout: Duration::from_millis(500),
            place_step: Duration::from_millis(40),
            failback_after: Duration::from_millis(1000 + rng.below(4000)),
            lease_ms: 1500,
            renew_ms: 250,
            work: Work {
                volumes,
                readers: 1 + rng.index(3),
                think: 10_000 + rng.below(30_000),
                depth: 1 + rng.index(4),
                create_every: 2_000_000 + rng.below(6_000_000),
                operate_every: 1_000_000 + rng.below(4_000_000),
                leave: [0.0, 0.001, 0.01][rng.index(3)],
                fast: [0.0, 0.3, 0.9][rng.index(3)],
                forced: 0.3,
                hot_blocks: 8 + rng.below(56),
            },
            slow: Slow {
                head_write: [0, 0, 20_000, 200_000][rng.index(4)],
                head_read: [0, 0, 20_000, 200_000][rng.index(4)],
                store_read: [0, 0, 100_000, 1_000_000][rng.index(4)],
            },
            faults,
            freeze: None,
            fault_every: 1_500_000 + rng.below(10_000_000),
            storm: STORM,
        }
    }

    /// A quiet world of three nodes and one volume of 64 chunks, for a test to make trouble in.
    #[must_use]
    pub fn calm(seed: u64) -> Self {
        let mut plan = Self { faults: Vec::new(), nodes: 3, ..Self::of(seed) }.with_one_lockd();
        plan.pool.shared = false;
        plan.priorities = vec![100; 3];
        plan.weather = Weather { delay: 100, jitter: 50, loss: 0.0 };
        plan.client_lease = Duration::from_millis(1500);
        plan.drain_patience = Duration::from_secs(3);
        plan.unique_cache_bytes = 64 << 20;
        plan.slow = Slow::default();
        plan.drift_ppm = 0;
        plan.failback = false;
        plan.work = Work {
            volumes: vec![(4096, 64)],
            readers: 0,
            think: 3_000,
            depth: 4,
            create_every: 0,
            operate_every: 0,
            leave: 0.0,
            fast: 0.0,
            forced: 0.0,
            hot_blocks: 64,
        };
        plan
    }

    /// The same with one lockd, and without clients of its keys and locks: for worlds that are about something else.
    #[must_use]
    pub fn with_one_lockd(mut self) -> Self {
        self.lockds = vec![HostId(self.nodes)];
        self.hosts = self.nodes + 1;
        self.contenders = (0, 0);
        self.faults.retain(|fault| Fault::OF_NODES.contains(fault));
        self
    }

    /// Two of five worlds have one lockd, two three, one five; groups are on hosts of their own or with the nodes.
    fn draw_lockds(rng: &mut Rng, nodes: usize) -> Vec<HostId> {
        let count = [1, 1, 3, 3, 5][rng.index(5)];
        let first = if count > 1 && rng.chance(0.5) { 0 } else { nodes };
        (first..first + count).map(HostId).collect()
    }

    /// Each world is about a few kinds of faults, so that some worlds see much of what others see little.
    fn draw_faults(rng: &mut Rng) -> Vec<Fault> {
        let count = 2 + rng.index(6);
        let mut faults: Vec<Fault> =
            (0..count).map(|_| Fault::OF_NODES[rng.index(Fault::OF_NODES.len())]).collect();
        if rng.chance(0.5) {
            faults.push(Fault::KillServer);
        }
        faults
    }
}
