//! The directory of `csnap up`: what lies where, and how it comes to be.
//!
//! ```text
//! DIR/up.lock            held by the `up` that runs here
//! DIR/up.toml            ports that were chosen, and whether the first volume was made
//! DIR/pool/              the pool
//! DIR/lockd<i>/          lockd.toml, lockd.sock, log, its data
//! DIR/n<i>/              agent.toml, agent.sock, nbd.sock, state/, log
//! DIR/nbd.sock           link to n1's
//! ```
//!
//! Everything may be there already, whole or in part: from an earlier `up`, also one that was killed half-way.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use csnap_agent::NodeConfig;
use csnap_lockd::shell::LockdConfig;
use csnap_proto::{Name, PoolId, Target};
use csnap_server::term::{PoolError, PoolToml, create_pool, open_pool};
use csnap_storage::posix::{PosixOptions, PosixStorage};
use csnap_transport::SOCKET_PATH_BYTES_MAX;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::args;
use crate::commands::attach_uri;
use crate::operator::draw;

/// Lockds of a group: the fewest that bear the loss of one.
const GROUP: u32 = 3;

/// Ports below are other programs' by custom.
const PORT_LEAST: u16 = 10_000;

/// So many ports that are taken are drawn before the kernel is asked for any.
const PORT_ATTEMPTS: u32 = 100;

/// An exporter of an `up` that was killed may hold its port this long.
const PORT_WITHIN: Duration = Duration::from_secs(5);

/// Between two looks at a port.
const PORT_AGAIN: Duration = Duration::from_millis(100);

/// One lockd.
pub(super) struct LockdDir {
    pub(super) name: String,
    /// Node that it counts as running on.
    node: Name,
    pub(super) dir: PathBuf,
    /// Where clients and agents find it.
    pub(super) listens: SocketAddr,
    /// Where the others of a group find it.
    peer: SocketAddr,
}

/// One node.
pub(super) struct NodeDir {
    pub(super) dir: PathBuf,
    pub(super) config: NodeConfig,
}

/// What one `up` leaves for the next.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Remembered {
    /// Ports of the lockds, in order: as many as there ever were.
    lockd_ports: Vec<u16>,
    /// Their ports for each other; none while there was one lockd alone.
    #[serde(default)]
    peer_ports: Vec<u16>,
    /// The first volume was made; if an operator deletes it, it stays deleted.
    first_volume_made: bool,
}

/// A prepared directory, held by this process.
pub(super) struct Layout {
    dir: PathBuf,
    pub(super) lockds: Vec<LockdDir>,
    pub(super) nodes: Vec<NodeDir>,
    remembered: Remembered,
    _lock: File,
}

impl Layout {
    /// Takes the directory and makes what is missing in it.
    pub(super) async fn prepare(dir: &Path, up: &args::Up) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let dir = dir.canonicalize().with_context(|| dir.display().to_string())?;
        let lock = take(&dir)?;
        make_pool(&dir.join("pool")).await?;
        let mut remembered = read_remembered(&dir.join("up.toml"))?;
        let nbd = free_address(up.nbd).await?;
        let lockds = choose_lockds(&dir, up.nodes, &mut remembered)?;
        let mut layout = Self { dir, lockds, nodes: Vec::new(), remembered, _lock: lock };
        layout.write_lockds()?;
        for i in 1..=up.nodes {
            let node = layout.prepare_node(i, (i == 1).then_some(nbd))?;
            layout.nodes.push(node);
        }
        layout.remember()?;
        link(&layout.dir.join("nbd.sock"), Path::new("n1/nbd.sock"))?;
        Ok(layout)
    }

    fn lockd_addresses(&self) -> Vec<SocketAddr> {
        self.lockds.iter().map(|lockd| lockd.listens).collect()
    }

    fn write_lockds(&self) -> anyhow::Result<()> {
        let peers: Vec<_> = self.lockds.iter().map(|lockd| lockd.peer).collect();
        for lockd in &self.lockds {
            make_dir(&lockd.dir)?;
            let mut alone =
                LockdConfig::alone(lockd.node.clone(), lockd.dir.join("data"), vec![lockd.listens]);
            let socket = lockd.dir.join("lockd.sock");
            // In a directory whose name is too long for a socket there is none.
            alone.listen_unix = Some(socket).filter(|path| path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX);
            let config = match self.lockds.len() {
                1 => alone,
                _ => LockdConfig { peer_listen: Some(lockd.peer), peers: peers.clone(), ..alone },
            };
            let text = toml::to_string(&config).context("a configuration has a text")?;
            write(&lockd.dir.join("lockd.toml"), &text)?;
        }
        Ok(())
    }

    /// A node's configuration: what stands there is kept but for what must fit the rest.
    fn prepare_node(&self, number: u32, nbd_tcp: Option<SocketAddr>) -> anyhow::Result<NodeDir> {
        let node = node_name(number);
        let dir = self.dir.join(node.as_str());
        make_dir(&dir)?;
        let path = dir.join("agent.toml");
        let fresh = NodeConfig::new(node, self.dir.join("pool"), self.lockd_addresses(), &dir);
        let config = match std::fs::read_to_string(&path) {
            Ok(text) => {
                let found = NodeConfig::parse(&text, &path)?;
                if found.etcd.is_some() {
                    bail!(
                        "{}: csnap up runs a lockd of its own; remove [etcd], or start this node with csnap agent --config",
                        path.display()
                    );
                }
                let NodeConfig { node, pool, lockd, agent_sock, state, nbd_unix, .. } = fresh;
                // Everything here is this machine's.
                NodeConfig { node, pool, lockd, agent_sock, state, nbd_unix, nbd_tcp, tls: None, ..found }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => NodeConfig { nbd_tcp, ..fresh },
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        let text = toml::to_string(&config).context("a configuration has a text")?;
        NodeConfig::parse(&text, &path)?;
        write(&path, &text)?;
        Ok(NodeDir { dir, config })
    }

    fn remember(&self) -> anyhow::Result<()> {
        let text = toml::to_string(&self.remembered).context("plain fields have a text")?;
        write(&self.dir.join("up.toml"), &text)
    }

    /// Whether the first volume was made in this life of the directory or an earlier one.
    pub(super) fn first_volume_made(&self) -> bool {
        self.remembered.first_volume_made
    }

    /// It is made.
    pub(super) fn remember_first_volume(&self) -> anyhow::Result<()> {
        let remembered = Remembered { first_volume_made: true, ..self.remembered.clone() };
        let text = toml::to_string(&remembered).context("plain fields have a text")?;
        write(&self.dir.join("up.toml"), &text)
    }

    /// What a person needs to go on: where the exporters are, with the first volume's name if it is still there.
    pub(super) fn announcement(&self, has_first_volume: bool) -> String {
        let first = Target { volume: first_volume(), snapshot: None };
        let uri = |base: String| if has_first_volume { attach_uri(&base, &first) } else { base };
        let unix = format!("nbd+unix:///?socket={}", self.dir.join("nbd.sock").display());
        let tcp = self.nodes.iter().filter_map(|node| node.config.nbd_tcp).map(|tcp| format!("nbd://{tcp}"));
        let lines = std::iter::once(unix).chain(tcp).map(|base| format!("  {}\n", uri(base)));
        format!("csnap is up in {}; ^C stops it\n{}", self.dir.display(), lines.collect::<String>())
    }
}

/// The first volume of an empty directory.
pub(super) fn first_volume() -> Name {
    Name::new("demo").expect("letters are a name")
}

fn node_name(number: u32) -> Name {
    Name::new(format!("n{number}")).expect("a letter and a number are a name")
}

/// Three lockds for three nodes or more, else one. Never fewer than there were: those that are left out would be missed by
/// the others, who need a majority.
fn choose_lockds(dir: &Path, nodes: u32, remembered: &mut Remembered) -> anyhow::Result<Vec<LockdDir>> {
    let wanted = if nodes >= GROUP { GROUP as usize } else { 1 };
    let count = wanted.max(remembered.lockd_ports.len());
    let mut last = remembered.lockd_ports.clone();
    last.resize(count, 0);
    last.extend(&remembered.peer_ports);
    let ports = free_ports(&last, 2 * count)?;
    let (lockd_ports, peer_ports) = ports.split_at(count);
    remembered.lockd_ports = lockd_ports.to_vec();
    remembered.peer_ports = if count > 1 { peer_ports.to_vec() } else { Vec::new() };
    let local = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    let lockd = |(i, (port, peer)): (u32, (&u16, &u16))| {
        let name = format!("lockd{i}");
        let dir = dir.join(&name);
        LockdDir { name, node: node_name(i), dir, listens: local(*port), peer: local(*peer) }
    };
    Ok((1..).zip(lockd_ports.iter().zip(peer_ports)).map(lockd).collect())
}

/// Takes the directory for this process, until it ends.
fn take(dir: &Path) -> anyhow::Result<File> {
    let path = dir.join("up.lock");
    let mut file = File::options().create(true).truncate(false).read(true).write(true).open(&path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            file.read_to_string(&mut pid).unwrap_or(0);
            bail!(
                "{} is in use by another csnap up (process {}); stop it, or use another --dir",
                dir.display(),
                pid.trim()
            );
        }
        Err(error) => return Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())?;
    Ok(file)
}

/// Makes the pool, goes on with one that was begun, or sees that the one there is one that this version can use.
async fn make_pool(path: &Path) -> anyhow::Result<()> {
    make_dir(path)?;
    let storage = PosixStorage::open(path, PosixOptions::default())?;
    let made = match create_pool(&storage, &PoolToml::new(PoolId(draw()?), false)).await {
        Err(PoolError::Exists) => open_pool(&storage).await,
        made => made,
    };
    made.map(drop).with_context(|| format!("pool {}", path.display()))
}

fn make_dir(path: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))
}

/// Replaces a file as a whole, unless it says that already.
fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    if std::fs::read_to_string(path).is_ok_and(|found| found == text) {
        return Ok(());
    }
    let new = path.with_extension("new");
    let written = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, path));
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn read_remembered(path: &Path) -> anyhow::Result<Remembered> {
    match std::fs::read_to_string(path) {
        Ok(text) => toml::from_str(&text).map_err(|error| {
            anyhow::anyhow!("{}: {}; delete it to start anew", path.display(), error.message())
        }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Remembered::default()),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// `count` free ports: those of last time where they are free.
fn free_ports(last: &[u16], count: usize) -> anyhow::Result<Vec<u16>> {
    // All are held until all are chosen, so that none is chosen twice.
    let mut held = Vec::new();
    for i in 0..count {
        let last = last
            .get(i)
            .filter(|port| **port != 0)
            .and_then(|port| TcpListener::bind(("127.0.0.1", *port)).ok());
        held.push(match last {
            Some(listener) => listener,
            None => free_port()?,
        });
    }
    held.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}

/// A free port that the kernel gives nobody who takes any: what listens there ends and begins again, and servers, which take
/// any, begin meanwhile.
fn free_port() -> anyhow::Result<TcpListener> {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let first_given = range.split_whitespace().next().and_then(|port| port.parse::<u16>().ok());
    let below = first_given.unwrap_or(0).saturating_sub(PORT_LEAST);
    for _ in 0..PORT_ATTEMPTS {
        let [low, high, ..] = draw()?;
        let drawn = u16::from_le_bytes([low, high]).checked_rem(below).map(|port| PORT_LEAST + port);
        if let Some(listener) = drawn.and_then(|port| TcpListener::bind(("127.0.0.1", port)).ok()) {
            return Ok(listener);
        }
    }
    TcpListener::bind(("127.0.0.1", 0)).context("no free port")
}

/// The address with a port that is free, waiting for an exporter that is about to end.
async fn free_address(wanted: SocketAddr) -> anyhow::Result<SocketAddr> {
    let until = tokio::time::Instant::now() + PORT_WITHIN;
    loop {
        match TcpListener::bind(wanted) {
            Ok(listener) => return Ok(listener.local_addr()?),
            Err(error) if error.kind() == ErrorKind::AddrInUse && tokio::time::Instant::now() < until => {
                tokio::time::sleep(PORT_AGAIN).await;
            }
            Err(error) => bail!(
                "cannot listen on {wanted}: {error}; choose another address with --nbd (port 0 takes a free one)"
            ),
        }
    }
}

/// Makes `path` a link to `target`, whatever was there.
fn link(path: &Path, target: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| path.display().to_string());
        }
        _ => {}
    }
    std::os::unix::fs::symlink(target, path).with_context(|| path.display().to_string())
}
