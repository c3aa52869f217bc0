//! strace on processes that run: it sees their system calls, and lets some of them fail, wait, or be the last for a while.
//!
//! It does not see io_uring: nodes whose files matter are configured with [`PLAIN_CALLS`]. It counts calls of each thread
//! apart. `-P PATH` takes files by the path of their descriptor, absolute, and where a call names a path, as the call spells
//! it: the daemons name the pool's files relative to its root.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::cluster::{is_alive, signal};

/// What makes a node's daemons do file operations by calls that strace sees: from, to.
pub(crate) const PLAIN_CALLS: (&str, &str) = ("io = \"auto\"", "io = \"threads\"");

/// States of TCP sockets in `/proc`.
pub(crate) const ESTABLISHED: &str = "01";
pub(crate) const LISTENING: &str = "0A";

/// A process that dies is gone well within this time.
const DYING_WITHIN: Duration = Duration::from_millis(300);

/// strace, until it or what it is attached to ends.
pub(crate) struct Strace {
    pids: Vec<u32>,
    log: PathBuf,
    /// It lets a call fail, and does not kill: a process that ends otherwise was not struck.
    fails_a_call: bool,
    let_go: Arc<AtomicBool>,
    watcher: JoinHandle<()>,
}

impl Strace {
    /// Attaches, with all threads and children; when this returns, no call passes unseen. `None` if a process has just gone.
    /// strace is ended after `within`, should it hang.
    pub(crate) fn attach(log: PathBuf, pids: &[u32], within: Duration, arguments: &[&str]) -> Option<Self> {
        let mut strace = Command::new("strace")
            .args(["-f", "-y", "-o"])
            .arg(&log)
            .args(pids.iter().flat_map(|pid| ["-p".to_owned(), pid.to_string()]))
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("strace is installed by ./test");
        let mut lines = BufReader::new(strace.stderr.take().expect("piped")).lines().map_while(Result::ok);
        let is_one_of_us = |line: &String| {
            let mut words = line.split_whitespace().skip_while(|word| *word != "Process").skip(1);
            let pid = words.next().and_then(|pid| pid.parse().ok());
            pid.is_some_and(|pid: u32| pids.contains(&pid)) && words.next() == Some("attached")
        };
        let attached = lines.by_ref().filter(is_one_of_us).take(pids.len()).count();
        // Further lines name further threads; they fit into the pipe, which must stay open.
        std::thread::spawn(move || lines.for_each(drop));
        if attached < pids.len() {
            let _ = strace.kill();
            strace.wait().expect("it ends");
            return None;
        }
        let let_go = Arc::<AtomicBool>::default();
        let watched = (pids.to_vec(), log.clone(), let_go.clone());
        let watcher =
            std::thread::spawn(move || watch(&mut strace, &watched.0, &watched.1, within, &watched.2));
        let fails_a_call = arguments.iter().any(|argument| argument.contains(":error="));
        Some(Self { pids: pids.to_vec(), log, fails_a_call, let_go, watcher })
    }

    /// Whether strace has ended, and with it all that it brought about.
    pub(crate) fn ended(&self) -> bool {
        self.watcher.is_finished()
    }

    /// What it saw so far.
    pub(crate) fn seen(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Whether a SIGSTOP of strace's has stopped a process. Its state alone does not say so: it is stopped for a moment at
    /// every call.
    pub(crate) fn has_stopped(&self) -> bool {
        self.seen().contains("stopped by SIGSTOP")
    }

    /// Lets go of the processes, if they live; one that is stopped stays so. What it saw.
    pub(crate) fn detach(self) -> String {
        self.let_go.store(true, Ordering::Relaxed);
        self.watcher.join().expect("the watcher does not fail");
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// As [`Strace::detach`]; whether a fault struck.
    pub(crate) fn struck(self) -> bool {
        let (pids, fails_a_call) = (self.pids.clone(), self.fails_a_call);
        let log = self.detach();
        let died = || is_dying(&log) && pids.iter().any(|pid| !is_alive(*pid));
        log.contains("(INJECTED)") || !fails_a_call && died()
    }
}

/// Sees strace to its end. A process that dies under strace with several threads is at times never let go, and then never
/// dead, so that everybody rightly waits for its end: strace is killed then, which frees it.
fn watch(strace: &mut Child, pids: &[u32], log: &Path, within: Duration, let_go: &AtomicBool) {
    let began = Instant::now();
    let (mut dying_since, mut asked) = (None, false);
    while strace.try_wait().expect("it is our child").is_none() {
        if !asked && let_go.load(Ordering::Relaxed) {
            asked = true;
            signal(strace.id(), "INT");
        }
        let dying = || {
            pids.iter().any(|pid| !is_alive(*pid))
                || is_dying(&std::fs::read_to_string(log).unwrap_or_default())
        };
        if dying_since.is_none() && dying() {
            dying_since = Some(Instant::now());
        }
        if dying_since.is_some_and(|since| since.elapsed() > DYING_WITHIN) || began.elapsed() > within {
            strace.kill().expect("it is our child");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether strace saw a call from which its thread does not return.
fn is_dying(log: &str) -> bool {
    log.contains("killed by SIGKILL") || log.contains("= ?")
}

/// TCP sockets of a process in a state: port and inode. strace takes one as the path `socket:[INODE]`.
pub(crate) fn tcp_sockets(pid: u32, state: &str) -> Vec<(u16, String)> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("/proc").flatten();
    let links =
        entries.filter_map(|entry| std::fs::read_link(entry.path()).ok()?.to_str().map(str::to_owned));
    let links: Vec<String> = links.collect();
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).expect("/proc");
    let ours = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (local, inode) = (fields.get(1)?.rsplit_once(':')?.1, (*fields.get(9)?).to_owned());
        let is_ours = fields[3] == state && links.contains(&format!("socket:[{inode}]"));
        is_ours.then_some((u16::from_str_radix(local, 16).ok()?, inode))
    };
    table.lines().filter_map(ours).collect()
}
