//! A running `csnap up` in a temporary directory.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::disk::Disk;

/// Long enough for a debug build on a busy machine; nothing that works takes a tenth of it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Becomes its arguments, refused `io_uring_setup` (425) by a seccomp filter that answers ENOSYS.
const WITHOUT_URING: &str = r#"
import ctypes, os, struct, sys
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | 38), (0x06, 0, 0, 0x7fff0000)]
filter = b"".join(struct.pack("HBBI", *step) for step in code)
program = struct.pack("HxxxxxxP", len(code), ctypes.cast(filter, ctypes.c_void_p).value)
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    sys.exit("no seccomp filter: " + os.strerror(ctypes.get_errno()))
os.execv(sys.argv[1], sys.argv[1:])
"#;

/// The binary under test.
pub(crate) fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("CSNAP_BIN") {
        return path.into();
    }
    let mut path = std::env::current_exe().expect("this test is a file");
    path.pop(); // deps
    path.pop(); // the profile
    let path = path.join("csnap");
    assert!(path.exists(), "{} is not there: run ./test, or cargo build -p csnap-cli", path.display());
    path
}

/// Kills what it holds when a test ends, however it ends.
pub(crate) struct Cluster {
    dir: tempfile::TempDir,
    nodes: u32,
    /// What `up` is run by, with the binary as its argument: none but in special cases.
    wrapper: Vec<String>,
    /// The file system that the data directory is, if it has one of its own.
    disk: Option<Disk>,
    up: Option<Child>,
}

impl Cluster {
    /// Starts `nodes` nodes and waits until the volume `demo` can be had.
    pub(crate) fn start(nodes: u32) -> Self {
        Self::start_by(nodes, Vec::new())
    }

    /// As [`Cluster::start`], with processes that may open so many files: soft and hard limit.
    pub(crate) fn start_with_descriptors(nodes: u32, soft: u32, hard: u32) -> Self {
        Self::start_limited(nodes, &format!("ulimit -Sn {soft} && ulimit -Hn {hard}"))
    }

    /// As [`Cluster::start`], with processes to which no file may be larger, as if the file system took none.
    pub(crate) fn start_with_file_size(nodes: u32, bytes: u64) -> Self {
        // sh counts in blocks of 512 bytes.
        Self::start_limited(nodes, &format!("trap '' XFSZ && ulimit -f {}", bytes / 512))
    }

    /// As [`Cluster::start`], with processes that map one arena of the allocator and not 64 MiB more for each thread, so that
    /// what they map is what they use.
    pub(crate) fn start_with_one_arena(nodes: u32) -> Self {
        Self::start_limited(nodes, "export MALLOC_ARENA_MAX=1")
    }

    fn start_limited(nodes: u32, limits: &str) -> Self {
        let script = format!("{limits} && exec \"$@\"");
        Self::start_by(nodes, ["sh", "-c", &script, "sh"].map(str::to_owned).to_vec())
    }

    /// As [`Cluster::start`], with processes that the kernel refuses io_uring: all that they do to files is seen by strace.
    pub(crate) fn start_without_uring(nodes: u32) -> Self {
        Self::start_by(nodes, ["/usr/bin/python3", "-c", WITHOUT_URING].map(str::to_owned).to_vec())
    }

    /// As [`Cluster::start`], on a file system of its own of so many bytes.
    pub(crate) fn start_on_disk(nodes: u32, bytes: u64) -> Self {
        let mut cluster = Self::new(nodes, Vec::new());
        cluster.disk = Some(Disk::mount(&cluster.scratch().join("image"), bytes, &cluster.data()));
        cluster.up();
        cluster
    }

    fn start_by(nodes: u32, wrapper: Vec<String>) -> Self {
        let mut cluster = Self::new(nodes, wrapper);
        cluster.up();
        cluster
    }

    fn new(nodes: u32, wrapper: Vec<String>) -> Self {
        let dir = tempfile::Builder::new().prefix("csnap-").tempdir().expect("a temporary directory");
        Self { dir, nodes, wrapper, disk: None, up: None }
    }

    /// The file system of [`Cluster::start_on_disk`].
    pub(crate) fn disk(&self) -> &Disk {
        self.disk.as_ref().expect("it has one of its own")
    }

    /// As [`Cluster::start`], with something changed in every node's configuration: from, to.
    pub(crate) fn start_configured(nodes: u32, changes: &[(&str, &str)]) -> Self {
        let mut cluster = Self::start(nodes);
        cluster.down();
        cluster.configure(changes);
        cluster.up();
        cluster
    }

    /// Changes every node's configuration, for the next `up`.
    pub(crate) fn configure(&self, changes: &[(&str, &str)]) {
        assert!(self.up.is_none(), "it runs");
        for node in 1..=self.nodes {
            let path = self.data().join(format!("n{node}")).join("agent.toml");
            let text = std::fs::read_to_string(&path).expect("a configuration");
            let text = changes.iter().fold(text, |text, (from, to)| changed(&text, from, to));
            std::fs::write(&path, text).expect("a configuration");
        }
    }

    /// How many nodes the next `up` has.
    pub(crate) fn set_nodes(&mut self, nodes: u32) {
        self.nodes = nodes;
    }

    /// Starts `csnap up` on the directory, again or for the first time.
    pub(crate) fn up(&mut self) {
        assert!(self.up.is_none(), "it runs already");
        let log = std::fs::File::create(self.dir.path().join("up.log")).expect("a log");
        let mut words = self.wrapper.iter().map(Into::into).chain([binary().into_os_string()]);
        let mut command = Command::new(words.next().expect("the binary at least"));
        command.args(words);
        let up = command
            .arg("--dir")
            .arg(self.data())
            .args(["up", "--nodes", &self.nodes.to_string(), "--nbd", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("the binary starts");
        self.up = Some(up);
        wait_until("the cluster serves", || self.serves());
    }

    fn serves(&self) -> bool {
        let status = self.try_status();
        let serving = status["server"]["state"] == "serving";
        let exporting = status["nodes"].as_array().is_some_and(|nodes| {
            nodes.len() == self.nodes as usize
                && nodes.iter().all(|node| node["nbd"].as_array().is_some_and(|uris| !uris.is_empty()))
        });
        let volumes = status["volumes"].as_array().is_some_and(|volumes| !volumes.is_empty());
        serving && exporting && volumes
    }

    /// The data directory, `DIR` of the command line.
    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Somewhere for the test's own files.
    pub(crate) fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// Runs a command of the operator's.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        Command::new(binary())
            .arg("--dir")
            .arg(self.data())
            .args(arguments)
            .output()
            .expect("the binary starts")
    }

    /// Runs a command that must succeed; what it printed.
    pub(crate) fn csnap(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "csnap {arguments:?} failed: {error}");
        String::from_utf8(output.stdout).expect("it prints text")
    }

    /// Runs a command that must be refused with one line, and exit status `code`; the line.
    pub(crate) fn refused(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let error = String::from_utf8(output.stderr).expect("it prints text");
        assert_eq!(output.status.code(), Some(code), "csnap {arguments:?}: {error}");
        assert_eq!(error.trim_end().lines().count(), 1, "one line: {error}");
        error.trim_end().to_owned()
    }

    /// `csnap status --json`, which works without a server.
    pub(crate) fn status(&self) -> Value {
        serde_json::from_str(&self.csnap(&["status", "--json"])).expect("status is JSON")
    }

    fn try_status(&self) -> Value {
        let output = self.run(&["status", "--json"]);
        serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
    }

    /// Process id of whoever serves, its node and its term; waits until there is one.
    pub(crate) fn server(&self) -> Server {
        let mut found = None;
        wait_until("a server serves", || {
            let server = self.try_status()["server"].take();
            if server["state"] == "serving" {
                let pid = server["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
                let node = server["node"].as_str().map(str::to_owned);
                found = pid.zip(node).zip(server["term"].as_u64()).map(|((pid, node), term)| Server {
                    pid,
                    node,
                    term,
                });
            }
            found.is_some()
        });
        found.expect("just found")
    }

    /// What `status` says of a node.
    pub(crate) fn node(&self, node: &str) -> Value {
        let status = self.status();
        let nodes = status["nodes"].as_array().expect("nodes").iter();
        nodes.clone().find(|n| n["id"] == node).cloned().unwrap_or(Value::Null)
    }

    /// A process id that `status` gives for a node; waits until it is there.
    pub(crate) fn pid(&self, node: &str, which: &str) -> u32 {
        let mut found = None;
        wait_until(&format!("{node} has its {which}"), || {
            found = self.node(node)[which].as_u64().and_then(|pid| u32::try_from(pid).ok());
            found.is_some()
        });
        found.expect("just found")
    }

    /// Where whoever serves listens.
    pub(crate) fn server_address(&self) -> String {
        let status = self.status();
        status["server"]["address"].as_str().expect("an address").trim().to_owned()
    }

    /// Where the first lockd listens.
    pub(crate) fn lockd_address(&self) -> String {
        let path = self.data().join("lockd1/data/address");
        std::fs::read_to_string(path).expect("lockd's address").lines().next().expect("a line").to_owned()
    }

    /// Process id of the only lockd.
    pub(crate) fn lockd(&self) -> u32 {
        let is_lockd = |pid: &u32| {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command.split(|&byte| byte == 0).any(|word| word == b"lockd")
        };
        let all: Vec<u32> = self.processes().into_iter().filter(is_lockd).collect();
        assert_eq!(all.len(), 1, "one lockd: {all:?}");
        all[0]
    }

    /// URI of a volume or snapshot on a node's exporter, over its unix socket.
    pub(crate) fn uri(&self, node: u32, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket(node).display())
    }

    /// Unix socket of a node's exporter.
    pub(crate) fn socket(&self, node: u32) -> PathBuf {
        self.data().join(format!("n{node}")).join("nbd.sock")
    }

    /// TCP address of node 1's exporter.
    pub(crate) fn tcp(&self) -> String {
        let node = self.node("n1");
        let uris = node["nbd"].as_array().expect("URIs");
        let tcp = uris.iter().filter_map(Value::as_str).find_map(|uri| uri.strip_prefix("nbd://"));
        tcp.expect("node 1 listens on TCP").trim_end_matches('/').to_owned()
    }

    /// Messages of a node's client of `volume`, by name.
    pub(crate) fn messages(&self, node: &str, volume: &str) -> std::collections::BTreeMap<String, u64> {
        let status = self.status();
        let clients = status["clients"].as_array().expect("clients");
        let client = clients.iter().find(|c| c["node"] == node && c["volume"] == volume);
        let messages = client.and_then(|c| c["messages"].as_object()).cloned().unwrap_or_default();
        messages.into_iter().filter_map(|(name, count)| Some((name, count.as_u64()?))).collect()
    }

    /// Kills `up` itself, and forgets it.
    pub(crate) fn kill_up(&mut self) {
        let mut up = self.up.take().expect("it runs");
        up.kill().expect("it is ours to kill");
        up.wait().expect("it ends");
    }

    /// Stops `up` in an orderly way.
    pub(crate) fn down(&mut self) {
        let Some(mut up) = self.up.take() else { return };
        signal(up.id(), "TERM");
        let deadline = Instant::now() + PATIENCE;
        while up.try_wait().expect("it is our child").is_none() {
            if Instant::now() > deadline {
                let _ = up.kill();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Processes whose command line names this cluster's directory.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let data = self.data();
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

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
        }
        self.down();
        for pid in self.processes() {
            signal(pid, "KILL");
        }
        drop(self.disk.take());
    }
}

impl Cluster {
    fn print_logs(&self) {
        let mut logs = vec![self.dir.path().join("up.log")];
        let entries = std::fs::read_dir(self.data()).into_iter().flatten().filter_map(Result::ok);
        logs.extend(entries.map(|entry| entry.path().join("log")));
        for log in logs {
            let mut text = String::new();
            let read = std::fs::File::open(&log).and_then(|mut file| file.read_to_string(&mut text));
            if read.is_ok() && !text.is_empty() {
                let tail: Vec<&str> = text.lines().rev().take(40).collect();
                eprintln!("--- {}", log.display());
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
    }
}

/// Whoever serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    pub(crate) pid: u32,
    pub(crate) node: String,
    pub(crate) term: u64,
}

/// Sends a signal by name; a process that is gone is fine.
pub(crate) fn signal(pid: u32, name: &str) {
    assert_ne!(pid, 0, "that is our own process group");
    let signal = match name {
        "CONT" => Signal::CONT,
        "INT" => Signal::INT,
        "KILL" => Signal::KILL,
        "STOP" => Signal::STOP,
        "TERM" => Signal::TERM,
        "USR1" => Signal::USR1,
        other => panic!("no test sends {other}"),
    };
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("the kernel gave it");
    let _ = kill_process(pid, signal);
}

/// A text with one thing changed, which must be there.
pub(crate) fn changed(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "no {from} in {text}");
    text.replace(from, to)
}

/// Whether a process is stopped, by a signal or by its tracer.
pub(crate) fn is_stopped(pid: u32) -> bool {
    state(pid).is_some_and(|state| state.eq_ignore_ascii_case(&'T'))
}

/// Whether a process is there, and not a zombie.
pub(crate) fn is_alive(pid: u32) -> bool {
    state(pid).is_some_and(|state| state != 'Z')
}

/// The letter that the kernel has for what a process does.
fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// Waits until something is so, looking often; fails the test when it takes too long.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A number for campaigns, from the environment.
pub(crate) fn number(variable: &str, default: u32) -> u32 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}
