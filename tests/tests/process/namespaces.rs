//! Three nodes that share nothing but a pool and a network: each in a network namespace of its own, lockd in a fourth,
//! every daemon started from its configuration file alone, with a certificate. A server dies; links are cut, both ways and
//! one way: the server's, and the guest's own.
//!
//! Needs root, `ip` and `nft`. Namespaces carry the process id in their names, and go however the test ends.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::cluster::{Cluster, Server, binary, is_alive, number, signal, wait_until};
use super::failover::Fio;
use super::nbd::{Nbd, READ, WRITE};
use super::writer::{Writer, summary};

/// Namespaces and their addresses, 10.77.0.x.
const HOSTS: [(&str, u32); 4] = [("n1", 1), ("n2", 2), ("n3", 3), ("lockd", 9)];

/// Where the lockds listen, all in one namespace. Nothing else is there, so that no port is taken.
const LOCKDS: [&str; 3] = ["10.77.0.9:7001", "10.77.0.9:7002", "10.77.0.9:7003"];

/// Blocks that the guest writes: 4 MiB.
const BLOCKS: u64 = 1024;

/// Which packets a cut link loses, as the node sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    Both,
    Incoming,
    Outgoing,
}

/// Hosts on one bridge. The bridge has a namespace too: nothing appears in the machine's own network.
pub(crate) struct Network {
    /// Namespaces begin so: the same test may run beside others and beside itself.
    prefix: String,
    hosts: Vec<&'static str>,
}

impl Network {
    pub(crate) fn new(test: &str, hosts: &[(&'static str, u32)]) -> Self {
        let prefix = format!("csnap{}{test}", std::process::id());
        let network = Self { prefix, hosts: hosts.iter().map(|(host, _)| *host).collect() };
        must("ip", &["netns", "add", &network.namespace("hub")]);
        network.inside("hub", &["ip", "link", "add", "bridge0", "type", "bridge"]);
        network.inside("hub", &["ip", "link", "set", "bridge0", "up"]);
        for (host, address) in hosts {
            let its = network.namespace(host);
            must("ip", &["netns", "add", &its]);
            network.inside(
                "hub",
                &["ip", "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", &its],
            );
            network.inside("hub", &["ip", "link", "set", host, "master", "bridge0", "up"]);
            network.inside(host, &["ip", "link", "set", "lo", "up"]);
            network.inside(host, &["ip", "addr", "add", &format!("10.77.0.{address}/24"), "dev", "eth0"]);
            network.inside(host, &["ip", "link", "set", "eth0", "up"]);
        }
        network
    }

    pub(crate) fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }

    fn inside(&self, host: &str, command: &[&str]) {
        must("ip", &[&["netns", "exec", &self.namespace(host)], command].concat());
    }

    pub(crate) fn cut(&self, host: &str, cut: Cut) {
        let (hook, interface) = match cut {
            Cut::Both => return self.inside("hub", &["ip", "link", "set", host, "down"]),
            Cut::Incoming => ("input", "iifname"),
            Cut::Outgoing => ("output", "oifname"),
        };
        let chain = format!("add chain inet cut lost {{ type filter hook {hook} priority 0; }}");
        let rule = format!("add rule inet cut lost {interface} eth0 drop");
        self.inside(host, &["nft", &format!("add table inet cut; {chain}; {rule}")]);
    }

    pub(crate) fn heal(&self, host: &str, cut: Cut) {
        match cut {
            Cut::Both => self.inside("hub", &["ip", "link", "set", host, "up"]),
            Cut::Incoming | Cut::Outgoing => self.inside(host, &["nft", "delete table inet cut"]),
        }
    }

    /// A program in a host's namespace: `ip netns exec` becomes it.
    pub(crate) fn command(&self, host: &str, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(host)]).arg(program);
        command
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in self.hosts.iter().copied().chain(["hub"]) {
            let _ = Command::new("ip")
                .args(["netns", "del", &self.namespace(host)])
                .stderr(Stdio::null())
                .status();
        }
    }
}

fn must(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output =
        output.unwrap_or_else(|error| panic!("{program} does not start ({error}); ./test installs it"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?} (it needs root): {error}");
}

/// Daemons in their namespaces. What dies first is named first.
struct Nodes {
    cluster: Cluster,
    daemons: Vec<Child>,
    network: Network,
}

impl Nodes {
    fn start(test: &str) -> Self {
        let mut cluster = Cluster::start(3);
        cluster.down();
        let data = cluster.data();
        // As long as it was: the file is whole blocks.
        edit(&data.join("pool/pool.toml"), &[("shared", "true ")]);
        cluster.csnap(&["cert", "ca", data.to_str().expect("UTF-8")]);
        let network = Network::new(test, &HOSTS);
        let mut daemons = Vec::new();
        for (n, address) in (1..).zip(LOCKDS) {
            let config = data.join(format!("lockd{n}/lockd.toml"));
            edit(&config, &[("listen", &format!("[\"{address}\"]"))]);
            refused_without_a_certificate(&config);
            append(&config, &cluster.csnap(&["cert", "lockd", &format!("lockd{n}")]));
            daemons.push(daemon(&network, "lockd", "lockd", &config));
        }
        for (host, address) in &HOSTS[..3] {
            let config = data.join(host).join("agent.toml");
            let (lockd, listen) = (format!("{LOCKDS:?}"), format!("\"10.77.0.{address}:0\""));
            edit(&config, &[("lockd", &lockd), ("server_listen", &listen)]);
            append(&config, &cluster.csnap(&["cert", "node", host]));
            daemons.push(daemon(&network, host, "agent", &config));
        }
        let nodes = Self { cluster, daemons, network };
        nodes.cluster.server();
        for (host, _) in &HOSTS[..3] {
            nodes.wait_ready(host);
        }
        nodes
    }

    /// Waits until the node's exporter is there and its server serves or could.
    fn wait_ready(&self, host: &str) {
        wait_until(&format!("{host} is ready"), || {
            let node = self.cluster.node(host);
            let exports = node["nbd"].as_array().is_some_and(|uris| !uris.is_empty());
            exports && (node["standby_ready"] == true || self.cluster.server().node == host)
        });
    }

    /// Whether a node is up as another one's agent sees it.
    fn is_up_for(&self, witness: &str, host: &str) -> bool {
        let output = Command::new(binary())
            .arg("--dir")
            .arg(self.cluster.data().join(witness))
            .args(["status", "--json"])
            .output();
        let status: serde_json::Value =
            serde_json::from_slice(&output.expect("it starts").stdout).unwrap_or_default();
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        nodes.iter().any(|node| node["id"] == host && node["state"] == "up")
    }

    /// Waits until someone else serves.
    fn successor(&self, of: &Server) -> Server {
        let mut next = of.clone();
        wait_until("another server serves", || {
            next = self.cluster.server();
            next.pid != of.pid
        });
        assert!(next.term > of.term, "terms only grow: {of:?} then {next:?}");
        next
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// Sets keys of a configuration file, in the place where they stand.
fn edit(path: &Path, changes: &[(&str, &str)]) {
    let mut text = std::fs::read_to_string(path).expect("a configuration");
    for (key, value) in changes {
        let line = text.lines().find(|line| line.split_once(" = ").is_some_and(|(found, _)| found == *key));
        let line = line.unwrap_or_else(|| panic!("{} has no {key}: {text}", path.display())).to_owned();
        text = text.replacen(&line, &format!("{key} = {value}"), 1);
    }
    std::fs::write(path, text).expect("a configuration");
}

/// What other machines reach is not listened on without one.
fn refused_without_a_certificate(config: &Path) {
    let output = Command::new(binary()).args(["lockd", "--config"]).arg(config).output().expect("it starts");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("no [tls]") && error.lines().count() == 1, "{error}");
}

/// Adds the lines of a table at the end, where tables stand.
fn append(path: &Path, lines: &str) {
    let text = std::fs::read_to_string(path).expect("a configuration");
    std::fs::write(path, format!("{text}\n{lines}")).expect("a configuration");
}

/// Starts a daemon in a namespace.
fn daemon(network: &Network, host: &str, daemon: &str, config: &Path) -> Child {
    let log = std::fs::File::create(config.with_file_name("log")).expect("a log");
    network
        .command(host, &binary())
        .args([daemon, "--config"])
        .arg(config)
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a second handle"))
        .stderr(log)
        .spawn()
        .expect("ip starts")
}

#[test]
fn three_hosts_survive_killed_servers_and_cut_links() {
    let nodes = Nodes::start("server");
    let fio = Fio::start(&nodes.cluster, "8M");
    nodes.cluster.csnap(&["volume", "create", "guest", "--size", "4M"]);
    let guest = Writer::start(&nodes.cluster.socket(1), "guest", BLOCKS);
    let mut stalls: Vec<Duration> = Vec::new();
    for kill in 0..number("CSNAP_KILLS", 5).min(200) {
        nodes.cluster.csnap(&["snapshot", "create", &format!("guest@k{kill}"), &format!("demo@k{kill}")]);
        guest.wait_for(100);
        let server = nodes.cluster.server();
        guest.take_stall();
        signal(server.pid, "KILL");
        nodes.successor(&server);
        guest.wait_for(100);
        stalls.push(guest.take_stall());
    }
    println!("three hosts, server killed: {}", summary(&mut stalls));
    for cut in [Cut::Both, Cut::Incoming, Cut::Outgoing] {
        cut_off_the_server(&nodes, &guest, cut);
    }
    let writes = guest.stop_and_verify();
    println!("{writes} acknowledged writes, none lost");
    fio.verified();
}

/// Cuts the node that serves off from everybody; the guest is elsewhere and goes on with another server.
fn cut_off_the_server(nodes: &Nodes, guest: &Writer, cut: Cut) {
    for (host, _) in &HOSTS[..3] {
        nodes.wait_ready(host);
    }
    if nodes.cluster.server().node == "n1" {
        nodes.cluster.csnap(&["server", "move", "n2"]);
    }
    let server = nodes.cluster.server();
    assert_ne!(server.node, "n1", "the guest's node is not the one to be cut off");
    nodes.cluster.csnap(&["snapshot", "create", &format!("guest@{cut:?}"), &format!("demo@{cut:?}")]);
    guest.wait_for(100);
    guest.take_stall();
    nodes.network.cut(&server.node, cut);
    let next = nodes.successor(&server);
    assert_ne!(next.node, server.node);
    guest.wait_for(200);
    println!("{} cut off, {cut:?}: stall {:.0} ms", server.node, guest.take_stall().as_secs_f64() * 1000.0);
    nodes.network.heal(&server.node, cut);
    wait_until("the deposed server is gone", || !is_alive(server.pid));
    nodes.wait_ready(&server.node);
    guest.wait_for(100);
}

/// What a guest whose node is cut off is told: nothing. What its exporter knows is rewritten as if nothing were the matter,
/// what it must ask about waits.
#[test]
fn a_guest_whose_own_node_is_cut_off_rewrites_what_it_knows_and_waits_for_the_rest() {
    let nodes = Nodes::start("guest");
    nodes.cluster.csnap(&["volume", "create", "guest", "--size", "4M"]);
    let guest = Writer::start(&nodes.cluster.socket(1), "guest", BLOCKS);
    for cut in [Cut::Both, Cut::Incoming, Cut::Outgoing] {
        cut_off_the_guest(&nodes, &guest, cut);
    }
    let writes = guest.stop_and_verify();
    println!("{writes} acknowledged writes, none lost");
}

fn cut_off_the_guest(nodes: &Nodes, guest: &Writer, cut: Cut) {
    for (host, _) in &HOSTS[..3] {
        nodes.wait_ready(host);
    }
    if nodes.cluster.server().node == "n1" {
        nodes.cluster.csnap(&["server", "move", "n2"]);
    }
    let server = nodes.cluster.server();
    let mut asker = Asker::new(nodes, &format!("asks{cut:?}").to_lowercase());
    nodes.cluster.csnap(&["snapshot", "create", &format!("guest@{cut:?}")]);
    let asked = || nodes.cluster.messages("n1", "guest").get("QueryWrite").copied().unwrap_or_default();
    let before = asked();
    // Twice around: every block was asked for.
    guest.wait_for(2 * BLOCKS);
    let known = asked();
    assert!(known > before, "first writes are asked for, and counted");
    guest.take_stall();
    nodes.network.cut("n1", cut);
    let (write, read) = asker.ask();
    wait_until("the others know that n1 is gone", || !nodes.is_up_for("n2", "n1"));
    guest.wait_for(2 * BLOCKS);
    let stall = guest.take_stall();
    asker.must_wait();
    nodes.network.heal("n1", cut);
    asker.answered(write, read);
    wait_until("n1 is back", || nodes.is_up_for("n2", "n1"));
    assert_eq!(nodes.cluster.server(), server, "nothing moved");
    guest.wait_for(2 * BLOCKS);
    assert_eq!(asked(), known, "what is known is not asked for again");
    println!(
        "n1 cut off, {cut:?}: rewrites stall {:.0} ms at most, while others wait; {known} messages before and after",
        stall.as_secs_f64() * 1000.0
    );
}

/// A guest of the node that is cut off, whose requests need the server.
struct Asker {
    disk: Nbd,
    snapshot: Nbd,
}

impl Asker {
    fn new(nodes: &Nodes, volume: &str) -> Self {
        let snapshot = format!("{volume}@a");
        nodes.cluster.csnap(&["volume", "create", volume, "--size", "1M"]);
        let socket = nodes.cluster.socket(1);
        let mut disk = Nbd::must_open(&socket, volume);
        assert_eq!(disk.write(0, &[1; 8192]), 0);
        nodes.cluster.csnap(&["snapshot", "create", &snapshot]);
        Self { disk, snapshot: Nbd::must_open(&socket, &snapshot) }
    }

    /// A first write after the snapshot, and a read of it.
    fn ask(&mut self) -> (u64, u64) {
        (self.disk.send(WRITE, 0, 4096, &[2; 4096]), self.snapshot.send(READ, 4096, 4096, &[]))
    }

    fn must_wait(&mut self) {
        assert!(!self.disk.has_answer(), "nobody could grant the write");
        assert!(!self.snapshot.has_answer(), "nobody could say where the snapshot's content is");
    }

    fn answered(&mut self, write: u64, read: u64) {
        assert_eq!(self.disk.reply(), (write, 0), "the write");
        assert_eq!(self.snapshot.reply(), (read, 0), "the read");
        assert_eq!(self.snapshot.data(4096), [1; 4096]);
        assert_eq!(self.disk.read(0, 8192), Ok([[2; 4096], [1; 4096]].concat()));
        assert_eq!(self.snapshot.read(0, 8192), Ok(vec![1; 8192]));
        assert_eq!(self.disk.flush(), 0);
    }
}
