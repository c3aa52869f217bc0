//! Nodes on an etcd, and what an operator sees of them.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::cluster::{Server, signal, wait_until};

/// A csnap with etcd.
fn binary() -> PathBuf {
    let path = std::env::var_os("CSNAP_BIN_ETCD").map(PathBuf::from);
    path.expect(
        "CSNAP_BIN_ETCD names a csnap that was built with --features etcd: run ./test, which builds it",
    )
}

/// Starts agents from configuration files, and ends everything that they started.
pub(crate) struct Nodes {
    dir: PathBuf,
    agents: Vec<Option<Child>>,
}

impl Nodes {
    /// Makes a pool and a volume `demo`, and starts so many nodes.
    pub(crate) fn start(dir: &Path, count: usize, endpoints: &[SocketAddr]) -> Self {
        let mut nodes = Self { dir: dir.to_owned(), agents: Vec::new() };
        nodes.csnap(&["pool", "create", nodes.path("pool").to_str().expect("text")]);
        for number in 1..=count {
            nodes.configure(number, endpoints);
            nodes.agents.push(None);
            nodes.start_agent(number);
        }
        let socks: Vec<_> = (1..=count).map(|n| nodes.path(&format!("n{n}/agent.sock"))).collect();
        wait_until("every agent answers", || socks.iter().all(|sock| sock.exists()));
        wait_until("a server serves", || nodes.status()["server"]["state"] == "serving");
        nodes.csnap(&["volume", "create", "demo", "--size", "64M"]);
        wait_until("every node exports", || {
            let status = nodes.status();
            let all = status["nodes"].as_array().cloned().unwrap_or_default();
            all.len() == count && all.iter().all(|node| node["nbd"].as_array().is_some_and(|n| !n.is_empty()))
        });
        nodes
    }

    fn path(&self, below: &str) -> PathBuf {
        self.dir.join("data").join(below)
    }

    fn configure(&self, number: usize, endpoints: &[SocketAddr]) {
        let home = self.path(&format!("n{number}"));
        std::fs::create_dir_all(&home).expect("a directory");
        let (pool, home_text) = (self.path("pool"), home.display());
        let text = format!(
            "node = \"n{number}\"\npool = \"{}\"\nagent_sock = \"{home_text}/agent.sock\"\n\
             state = \"{home_text}/state\"\nnbd_unix = \"{home_text}/nbd.sock\"\nfailback_after_ms = 300\n\
             [etcd]\nendpoints = {:?}\nprefix = \"/csnap/test\"\n",
            pool.display(),
            endpoints.iter().map(ToString::to_string).collect::<Vec<_>>(),
        );
        std::fs::write(home.join("agent.toml"), text).expect("a configuration");
    }

    pub(crate) fn start_agent(&mut self, number: usize) {
        assert!(self.agents[number - 1].is_none(), "it runs");
        let home = self.path(&format!("n{number}"));
        let log = File::options().create(true).append(true).open(home.join("log")).expect("a log");
        let agent = Command::new(binary())
            .args(["agent", "--config"])
            .arg(home.join("agent.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn();
        self.agents[number - 1] = Some(agent.expect("the binary starts"));
    }

    /// An agent dies, and its server with it.
    pub(crate) fn kill_agent(&mut self, number: usize) {
        let mut agent = self.agents[number - 1].take().expect("it runs");
        agent.kill().expect("it is ours to kill");
        agent.wait().expect("it ends");
    }

    pub(crate) fn agent(&self, number: usize) -> u32 {
        self.agents[number - 1].as_ref().expect("it runs").id()
    }

    /// Unix socket of a node's exporter.
    pub(crate) fn socket(&self, number: usize) -> PathBuf {
        self.path(&format!("n{number}/nbd.sock"))
    }

    /// Runs an operator's command that must succeed.
    pub(crate) fn csnap(&self, arguments: &[&str]) -> String {
        let output = Command::new(binary()).arg("--dir").arg(self.path("")).args(arguments).output();
        let output = output.expect("the binary starts");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "csnap {arguments:?} failed: {error}");
        String::from_utf8(output.stdout).expect("it prints text")
    }

    pub(crate) fn status(&self) -> Value {
        serde_json::from_str(&self.csnap(&["status", "--json"])).expect("status is JSON")
    }

    /// Whoever serves; waits until somebody does for whom `fits` holds.
    pub(crate) fn server(&self, what: &str, fits: impl Fn(&Server) -> bool) -> Server {
        let mut found = None;
        wait_until(what, || {
            let server = self.status()["server"].take();
            found = Some(server).filter(|server| server["state"] == "serving").and_then(|server| {
                Some(Server {
                    pid: u32::try_from(server["pid"].as_u64()?).ok()?,
                    node: server["node"].as_str()?.to_owned(),
                    term: server["term"].as_u64()?,
                })
            });
            found.as_ref().is_some_and(&fits)
        });
        found.expect("just found")
    }

    /// fio with verification on the exporter of a node, three rounds at a rate that outlasts the trouble.
    pub(crate) fn fio(&self, number: usize) -> Child {
        let uri = format!("nbd+unix:///demo?socket={}", self.socket(number).display());
        let log = File::create(self.dir.join("fio.log")).expect("a log");
        Command::new("fio")
            .current_dir(&self.dir)
            .args(["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=16"])
            .args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--loops=3", "--fsync=64"])
            .args(["--rate_iops=1000", "--verify_state_save=0", "--size=32M"])
            .arg(format!("--uri={uri}"))
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("fio is installed by ./test")
    }

    /// Processes whose command line names this test's directory: agents, servers, exporters.
    fn processes(&self) -> Vec<u32> {
        let data = self.path("");
        let data = data.to_str().expect("temporary directories are text").as_bytes();
        let entries = std::fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let names_us = |pid: &u32| {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command.windows(data.len()).any(|part| part == data)
        };
        pids.filter(names_us).collect()
    }
}

/// The number in a node's name.
pub(crate) fn number(node: &str) -> usize {
    node.trim_start_matches('n').parse().expect("nodes are numbered")
}

impl Drop for Nodes {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for number in 1..=self.agents.len() {
                let log = std::fs::read_to_string(self.path(&format!("n{number}/log"))).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(40).collect();
                eprintln!("--- n{number}");
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
        self.processes().into_iter().for_each(|pid| signal(pid, "KILL"));
        self.agents.iter_mut().flatten().for_each(|agent| drop(agent.wait()));
    }
}
