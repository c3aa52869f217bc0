//! Server and agent of one node stopped together at a named step, and thawed once another node serves.
//!
//! strace stops the server in the very system call that is the step: the call is done, nothing after it is. The steps are
//! those of a first write after a snapshot, and those of a takeover; the simulated world does the same at every operation of
//! the cores, here it is the shipped binary and the kernel's files.
//!
//! What must hold: thawed, the server goes on, looks at its gate and ends by itself, before its agent is thawed; nothing
//! that it still writes is seen by anybody, nobody gets an answer of it; the agent finds its session gone and stands by
//! again.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::BytesMut;
use csnap_proto::frame::encode;
use csnap_proto::message::volume::{Attach, Identify, ToServer};
use csnap_proto::{Frame, InstanceId, Name, RequestId, Secret, SessionId, Target, Term};

use super::cluster::{Cluster, Server, is_alive, is_stopped, signal, wait_until};
use super::guest::Story;
use super::strace::{ESTABLISHED, LISTENING, PLAIN_CALLS, Strace, tcp_sockets};

/// The frozen agent must not have killed its server a moment before it was frozen.
const PATIENT_PINGS: (&str, &str) = ("ping_timeout_ms = 500", "ping_timeout_ms = 30000");

/// No case takes so long, unless strace hangs.
const TRACED_WITHIN: Duration = Duration::from_secs(60);

/// A step: what it is, the call that it is, the files by which strace tells it from others.
struct Step {
    name: &'static str,
    call: &'static str,
    files: fn(&Places) -> Vec<String>,
}

/// Where things are for the server that is to be stopped.
struct Places {
    pool: PathBuf,
    /// Its process.
    pid: u32,
    /// Its term, or the one that it will have.
    term: u64,
    /// The term before, where it takes over.
    before: u64,
}

impl Places {
    /// The path of an open file of the pool.
    fn open(&self, path: &str) -> Vec<String> {
        vec![self.pool.join(path).to_str().expect("temporary directories are text").to_owned()]
    }

    fn own(&self, name: &str) -> Vec<String> {
        self.open(&format!("term/{}/{name}", self.term))
    }

    /// The segment that records go to: the lowest, for a checkpoint has removed those before, and the next one is ready.
    fn journal(&self) -> Vec<String> {
        self.own(&format!(
            "journal-{}",
            journals(&self.pool, self.term).into_iter().min().expect("a journal")
        ))
    }

    /// Arenas of the store, also of earlier terms that are known dead.
    fn arenas(&self) -> Vec<String> {
        (1..=self.term).flat_map(|term| self.open(&format!("store/{term}/0"))).collect()
    }

    /// Its connections to clients, as `/proc` names them.
    fn clients(&self) -> Vec<String> {
        let established = tcp_sockets(self.pid, ESTABLISHED);
        established.into_iter().map(|(_, inode)| format!("socket:[{inode}]")).collect()
    }
}

/// The first write after a snapshot, from the query to the answer.
const WRITE_PATH: [Step; 8] = [
    Step { name: "the query is received", call: "recvfrom", files: Places::clients },
    Step { name: "the old content is read", call: "pread64", files: |at| at.open("head/00000001-00000000") },
    Step { name: "the old content is written to the store", call: "pwrite64", files: Places::arenas },
    Step { name: "the store is synced", call: "fdatasync", files: Places::arenas },
    Step { name: "the record is written", call: "pwrite64", files: Places::journal },
    Step { name: "the record is synced", call: "fdatasync", files: Places::journal },
    Step { name: "the gate was seen open", call: "pread64", files: |at| at.own("gate") },
    Step { name: "an answer is sent", call: "sendto,writev,write", files: Places::clients },
];

/// A takeover, from its directory to the first sign of life as the server. What a standby does all the time, reading
/// journals, cannot be told from outside.
const TAKEOVER: [Step; 15] = [
    Step { name: "its directory is made", call: "mkdirat", files: |at| vec![format!("term/{}", at.term)] },
    Step { name: "its directory is made durable", call: "fsync", files: |at| at.open("term") },
    Step { name: "its gate is written", call: "pwrite64", files: |at| at.own("gate") },
    Step { name: "its gate is synced", call: "fdatasync", files: |at| at.own("gate") },
    Step {
        name: "its gate's name is made durable",
        call: "fsync",
        files: |at| at.open(&format!("term/{}", at.term)),
    },
    Step {
        name: "its claim is written",
        call: "pwrite64",
        files: |at| at.own(&format!("claim-{}", at.before)),
    },
    Step {
        name: "its claim is synced",
        call: "fdatasync",
        files: |at| at.own(&format!("claim-{}", at.before)),
    },
    Step {
        name: "it is the successor",
        call: "linkat",
        files: |at| vec![format!("term/{}/successor", at.before)],
    },
    Step { name: "that is made durable", call: "fsync", files: |at| at.open(&format!("term/{}", at.before)) },
    Step {
        name: "the gate before it is closed",
        call: "pwrite64",
        files: |at| at.open(&format!("term/{}/gate", at.before)),
    },
    Step {
        name: "the closing is synced",
        call: "fdatasync",
        files: |at| at.open(&format!("term/{}/gate", at.before)),
    },
    Step { name: "its Seal is written", call: "pwrite64", files: |at| at.own("journal-0") },
    Step { name: "its Seal is synced", call: "fdatasync", files: |at| at.own("journal-0") },
    Step { name: "its own gate was seen open", call: "pread64", files: |at| at.own("gate") },
    Step { name: "it shows that it lives", call: "flock", files: |at| at.own("gate") },
];

/// Numbers of a term's journal segments.
fn journals(pool: &Path, term: u64) -> Vec<u64> {
    let entries = std::fs::read_dir(pool.join(format!("term/{term}"))).into_iter().flatten().flatten();
    let number = |name: &str| name.strip_prefix("journal-")?.parse().ok();
    entries.filter_map(|entry| number(entry.file_name().to_str()?)).collect()
}

/// Three nodes; the guest is on the one that never serves, so that its agent is never frozen.
fn start() -> Cluster {
    let cluster = Cluster::start_configured(3, &[PLAIN_CALLS, PATIENT_PINGS]);
    cluster.csnap(&["node", "priority", "n3", "0"]);
    let server = cluster.server();
    if server.node == "n3" {
        cluster.csnap(&["server", "move", "n1"]);
    }
    cluster
}

/// Waits until a server of n1 or n2 serves with nothing left to tidy, and the other node's stands by. Who serves.
fn settle(cluster: &Cluster) -> Server {
    let pool = cluster.data().join("pool");
    let mut server = cluster.server();
    wait_until("all is quiet", || {
        server = cluster.server();
        let first_checkpoint = pool.join(format!("term/{}/checkpoint-0", server.term)).exists();
        let aside = (0..2).all(|i| pool.join(format!("term/{}/next-{i}", server.term)).exists());
        let segments = journals(&pool, server.term).len() == 2;
        first_checkpoint && aside && segments && cluster.node(other(&server.node))["standby_ready"] == true
    });
    server
}

fn other(node: &str) -> &'static str {
    if node == "n1" { "n2" } else { "n1" }
}

/// Attaches strace so that the process stops in the step.
fn lay_trap(cluster: &Cluster, step: &Step, at: &Places) -> Strace {
    let files = (step.files)(at);
    assert!(!files.is_empty(), "nothing tells the step: {}", step.name);
    let mut arguments = vec!["-e".to_owned(), format!("trace={}", step.call)];
    arguments.extend(["-e".to_owned(), format!("inject={}:signal=SIGSTOP:when=1", step.call)]);
    arguments.extend(files.into_iter().flat_map(|file| ["-P".to_owned(), file]));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let log = cluster.scratch().join("trap.log");
    Strace::attach(log, &[at.pid], TRACED_WITHIN, &arguments).expect("the server lives")
}

/// What thawed servers tried, over all cases.
#[derive(Debug, Default)]
struct Tried {
    appends: u32,
    answers: u32,
    /// By step: what it tried, what it answered, how it ended.
    steps: BTreeMap<&'static str, String>,
}

impl Tried {
    /// What one did after it was thawed, as strace saw it, and what it answered to somebody who had asked.
    fn add(&mut self, step: &Step, at: &Places, seen: &str, answer: &[u8]) {
        let own = |name: &str| format!("/term/{}/{name}", at.term);
        let calls = |call: &str, file: &str| {
            seen.lines().filter(|line| line.contains(call) && line.contains(file)).count() > 0
        };
        let (appended, looked) = (calls("pwrite64(", &own("journal-")), calls("pread64(", &own("gate")));
        self.appends += u32::from(appended);
        self.answers += u32::from(looked);
        let tried = match (appended, looked) {
            (true, true) => "appended, and looked at its gate",
            (true, false) => "appended",
            (false, true) => "looked at its gate",
            (false, false) => "ended before it came so far",
        };
        let line = format!("{tried}; {} bytes answered; {}", answer.len(), end(seen));
        self.steps.insert(step.name, line);
    }
}

/// How a process ended, as strace saw it.
fn end(seen: &str) -> String {
    let status = seen.rsplit_once("exit_group(").and_then(|(_, rest)| rest.split_once(')'));
    status.map_or("no exit status".to_owned(), |(status, _)| format!("exit status {status}"))
}

/// A server that was stopped in a step.
struct Frozen<'a> {
    node: &'a str,
    step: &'a Step,
    at: &'a Places,
    /// A snapshot that somebody wants to read of it.
    snapshot: &'a str,
}

/// From the stop on: freezes the agent too, waits for a successor, asks the frozen server something, thaws it and sees it
/// end by itself, thaws the agent and sees it stand by again.
fn outlive(cluster: &Cluster, frozen: &Frozen<'_>, trap: Strace, tried: &mut Tried) {
    let Frozen { node, step, at, snapshot } = *frozen;
    let agent = cluster.pid(node, "agent_pid");
    signal(agent, "STOP");
    wait_until("the agent is frozen", || is_stopped(agent));
    let (port, _) = tcp_sockets(at.pid, LISTENING).remove(0);
    let mut asked = ask(port, snapshot);
    let log = trap.detach();
    assert!(is_stopped(at.pid), "{}: it goes on: {log}", step.name);
    let arguments = ["-e", "trace=pwrite64,pread64,linkat,flock,exit_group"];
    let watch = Strace::attach(cluster.scratch().join("thawed.log"), &[at.pid], TRACED_WITHIN, &arguments);
    let watch = watch.expect("it is only stopped");
    wait_until("another node serves", || {
        let now = cluster.server();
        now.node != node && now.term > at.term
    });
    signal(at.pid, "CONT");
    wait_until("the thawed server ends by itself", || !is_alive(at.pid));
    assert!(is_stopped(agent), "nobody else ended it");
    let mut answer = Vec::new();
    let _ = asked.read_to_end(&mut answer);
    tried.add(step, at, &watch.detach(), &answer);
    assert!(answer.is_empty(), "{}: a deposed server answered {} bytes", step.name, answer.len());
    signal(agent, "CONT");
    wait_until("its agent notices and has a standby again", || {
        cluster.node(node)["server_pid"].as_u64().is_some_and(|pid| pid != u64::from(at.pid))
            && cluster.node(node)["standby_ready"] == true
    });
}

/// Introduces a new reader of a snapshot to a server, which must record the session before it answers.
fn ask(port: u16, snapshot: &str) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the kernel takes connections for it");
    let snapshot = Some(Name::new(snapshot).expect("a name"));
    let message = ToServer::Identify(Identify {
        session: SessionId([7; 16]),
        secret: Secret([7; 16]),
        instance: InstanceId([7; 16]),
        node: Name::new("stranger").expect("a name"),
        pid: std::process::id(),
        attach: Attach::Snapshot(Target { volume: Name::new("demo").expect("a name"), snapshot }),
        cached_epoch: None,
    });
    let mut bytes = BytesMut::new();
    encode(&Frame { id: RequestId(1), term: Term(0), message }, &mut bytes);
    stream.write_all(&bytes).expect("it fits into the kernel's buffer");
    stream
}

/// The pool is undamaged after all that.
fn check_pool(mut cluster: Cluster) {
    cluster.down();
    let pool = cluster.data().join("pool");
    println!(
        "{}",
        cluster.csnap(&["check", "--pool", pool.to_str().expect("temporary directories are text")])
    );
}

#[test]
fn a_server_frozen_at_each_step_of_the_write_path_changes_nothing_and_ends() {
    let cluster = start();
    let mut story = Story::new(&cluster, 3);
    let mut tried = Tried::default();
    story.fill();
    for step in &WRITE_PATH {
        let server = settle(&cluster);
        story.snapshot();
        // Whatever the store has to reserve first is not the step.
        story.burst(false);
        let pool = cluster.data().join("pool");
        let at = Places { pool, pid: server.pid, term: server.term, before: server.term };
        let trap = lay_trap(&cluster, step, &at);
        let flying = story.begin_burst();
        wait_until(&format!("the server is stopped: {}", step.name), || trap.has_stopped());
        let frozen = Frozen { node: &server.node, step, at: &at, snapshot: story.newest() };
        outlive(&cluster, &frozen, trap, &mut tried);
        story.end_burst(flying, false);
        story.forget_oldest();
        story.verify();
    }
    drop(story);
    println!("write path, thawed: {tried:#?}");
    let all = u32::try_from(WRITE_PATH.len()).expect("a few");
    assert_eq!(tried.answers, all, "each was about to answer: {tried:#?}");
    assert!(tried.appends > 0, "none appended: {tried:#?}");
    check_pool(cluster);
}

#[test]
fn a_server_frozen_at_each_step_of_its_takeover_changes_nothing_and_ends() {
    let cluster = start();
    let mut story = Story::new(&cluster, 3);
    let mut tried = Tried::default();
    story.fill();
    for step in &TAKEOVER {
        let server = settle(&cluster);
        story.provoke(false);
        let next = other(&server.node);
        let pid = cluster.pid(next, "server_pid");
        let pool = cluster.data().join("pool");
        let at = Places { pool, pid, term: server.term + 1, before: server.term };
        let trap = lay_trap(&cluster, step, &at);
        signal(server.pid, "KILL");
        let flying = story.begin_burst();
        wait_until(&format!("the successor is stopped: {}", step.name), || trap.has_stopped());
        let frozen = Frozen { node: next, step, at: &at, snapshot: story.newest() };
        outlive(&cluster, &frozen, trap, &mut tried);
        story.end_burst(flying, false);
        story.verify();
        // A node whose takeovers fail again and again rests between them: it serves once, and the other one is next.
        cluster.csnap(&["server", "move", next]);
    }
    drop(story);
    println!("takeover, thawed: {tried:#?}");
    assert!(
        tried.appends > 0 && tried.answers > 0,
        "those that were sealed go on until they look at their gate"
    );
    check_pool(cluster);
}
