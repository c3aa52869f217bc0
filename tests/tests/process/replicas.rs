//! A group of three lockds, each a process with a directory of its own: on the loopback or in network namespaces.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use csnap_lockd::client::{ClientConfig, Identity, LockClient, Lockds as Reached};
use csnap_proto::{EventNumber, Name, Secret, SessionId};
use csnap_storage::sim::Rng;
use csnap_transport::{Address, Tls, TlsConfig};

use super::cluster::{binary, signal};
use super::namespaces::Network;

/// Who clients are, and what they have a certificate for.
const CLIENT: &str = "client";

/// Lockds of a group.
pub(crate) const SEATS: usize = 3;

/// Where one of them listens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seat {
    pub(crate) clients: SocketAddr,
    pub(crate) peers: SocketAddr,
}

/// Kills what it holds when a test ends, however it ends.
pub(crate) struct Lockds {
    dir: tempfile::TempDir,
    seats: Vec<Seat>,
    /// Hosts of the network that they are on, if it is not this machine's.
    hosts: Option<(Network, Vec<&'static str>)>,
    children: Vec<Option<Child>>,
}

impl Lockds {
    /// On free ports of the loopback, found one after the other and given up again.
    pub(crate) fn on_loopback() -> Self {
        let listeners: Vec<std::net::TcpListener> = (0..2 * SEATS)
            .map(|_| std::net::TcpListener::bind("127.0.0.1:0").expect("a free port"))
            .collect();
        let free: Vec<SocketAddr> =
            listeners.iter().map(|listener| listener.local_addr().expect("it has one")).collect();
        drop(listeners);
        let seats = free.chunks(2).map(|pair| Seat { clients: pair[0], peers: pair[1] }).collect();
        Self::start(seats, None)
    }

    /// Each on a host of `network`; nothing else is there, so that no port is taken.
    pub(crate) fn on_hosts(network: Network, hosts: &[(&'static str, u32)]) -> Self {
        let address = |host: u32, port: u16| SocketAddr::from(([10, 77, 0, host as u8], port));
        let seat =
            |(_, host): &(&str, u32)| Seat { clients: address(*host, 7000), peers: address(*host, 7001) };
        let names = hosts.iter().map(|(name, _)| *name).collect();
        Self::start(hosts.iter().map(seat).collect(), Some((network, names)))
    }

    fn start(seats: Vec<Seat>, hosts: Option<(Network, Vec<&'static str>)>) -> Self {
        let dir = tempfile::Builder::new().prefix("csnap-lockds-").tempdir().expect("a temporary directory");
        let children = seats.iter().map(|_| None).collect();
        let mut lockds = Self { dir, seats, hosts, children };
        if lockds.hosts.is_some() {
            lockds.csnap(&["cert", "ca", lockds.scratch().to_str().expect("UTF-8")]);
            lockds.csnap(&["cert", "client", CLIENT]);
        }
        for seat in 0..lockds.seats.len() {
            lockds.configure(seat);
            lockds.start_one(seat);
        }
        lockds
    }

    fn path(&self, seat: usize, file: &str) -> PathBuf {
        self.dir.path().join(format!("lockd{seat}.{file}"))
    }

    fn configure(&self, seat: usize) {
        let Seat { clients, peers } = self.seats[seat];
        let all: Vec<String> = self.seats.iter().map(|seat| format!("\"{}\"", seat.peers)).collect();
        let text = format!(
            "node = \"l{seat}\"\ndir = {:?}\nlisten = [\"{clients}\"]\npeer_listen = \"{peers}\"\npeers = [{}]\n",
            self.path(seat, "data"),
            all.join(", ")
        );
        // Only on one machine they do without.
        let tls = self.hosts.as_ref().map(|_| self.csnap(&["cert", "lockd", &format!("l{seat}")]));
        let text = text + &tls.unwrap_or_default();
        std::fs::write(self.path(seat, "toml"), text).expect("a configuration");
    }

    /// What a command prints; certificates are made in the directory.
    pub(crate) fn csnap(&self, arguments: &[&str]) -> String {
        let output = Command::new(binary()).arg("--dir").arg(self.scratch()).args(arguments).output();
        let output = output.expect("it starts");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("it prints text")
    }

    pub(crate) fn start_one(&mut self, seat: usize) {
        let log = std::fs::File::options().create(true).append(true).open(self.path(seat, "log"));
        let log = log.expect("a log");
        let mut command = match &self.hosts {
            Some((network, names)) => network.command(names[seat], &binary()),
            None => Command::new(binary()),
        };
        command.args(["lockd", "--config"]).arg(self.path(seat, "toml"));
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle")).stderr(log);
        self.children[seat] = Some(command.spawn().expect("it starts"));
    }

    pub(crate) fn pid(&self, seat: usize) -> u32 {
        self.children[seat].as_ref().expect("it runs").id()
    }

    /// SIGKILL.
    pub(crate) fn kill_one(&mut self, seat: usize) {
        if let Some(mut child) = self.children[seat].take() {
            child.kill().expect("it is ours to kill");
            child.wait().expect("it ends");
        }
    }

    /// The network that they are on, and the name of one's host there.
    pub(crate) fn host(&self, seat: usize) -> (&Network, &'static str) {
        let (network, names) = self.hosts.as_ref().expect("they are on hosts");
        (network, names[seat])
    }

    /// Where clients find them.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.seats.iter().map(|seat| seat.clients).collect()
    }

    /// The same, with a client's certificate where they want one.
    pub(crate) fn reached(&self) -> Reached {
        let file = |name: String| self.scratch().join(name);
        let tls = self.hosts.as_ref().map(|_| {
            let (cert, key) = (file(format!("client-{CLIENT}.pem")), file(format!("client-{CLIENT}.key")));
            Tls::load(&TlsConfig { ca: file("ca.pem".to_owned()), cert, key }).expect("just made")
        });
        Reached::new(self.addresses().into_iter().map(Address::Tcp).collect(), tls)
    }

    /// Somewhere for the test's own files.
    pub(crate) fn scratch(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Lockds {
    fn drop(&mut self) {
        for seat in 0..self.children.len() {
            if std::thread::panicking() {
                let text = std::fs::read_to_string(self.path(seat, "log")).unwrap_or_default();
                eprintln!("--- lockd{seat}");
                text.lines()
                    .rev()
                    .take(20)
                    .collect::<Vec<_>>()
                    .iter()
                    .rev()
                    .for_each(|line| eprintln!("{line}"));
            }
            if let Some(child) = &self.children[seat] {
                signal(child.id(), "CONT");
            }
            self.kill_one(seat);
        }
    }
}

/// A client with a new session.
pub(crate) fn new_client(rng: &mut Rng, lease_ms: u64) -> LockClient {
    let mut draw = || {
        let mut bytes = [0; 16];
        bytes.chunks_exact_mut(8).for_each(|half| half.copy_from_slice(&rng.next_u64().to_le_bytes()));
        bytes
    };
    let identity = Identity { session: SessionId(draw()), secret: Secret(draw()) };
    LockClient::new(client_config(lease_ms), identity, Vec::new())
}

/// One that goes on in a session that another one began.
pub(crate) fn same_client(identity: Identity, lease_ms: u64) -> LockClient {
    LockClient::resume(client_config(lease_ms), identity, EventNumber(0))
}

fn client_config(lease_ms: u64) -> ClientConfig {
    ClientConfig { node: Name::new(CLIENT).expect("a name"), lease_ms, renew_ms: lease_ms / 4 }
}

/// A runtime for one thread of clients.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}
