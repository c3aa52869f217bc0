//! csnap's own lockspace moves to another lockd and back, under a guest, while lockds are killed.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::cluster::{Cluster, binary, number, signal, wait_until};
use super::writer::Writer;

/// A lockd alone beside the cluster's, started again whenever it is killed.
struct Other {
    dir: PathBuf,
    child: Child,
}

impl Other {
    fn start(cluster: &Cluster) -> Self {
        let dir = cluster.scratch().join("other");
        std::fs::create_dir(&dir).expect("new");
        let text =
            format!("node = 'other'\ndir = '{}'\nlisten = ['127.0.0.1:0']\n", dir.join("data").display());
        std::fs::write(dir.join("lockd.toml"), text).expect("writes");
        let other = Self { child: Self::spawn(&dir), dir };
        wait_until("the other lockd listens", || other.address().is_some());
        other
    }

    fn spawn(dir: &std::path::Path) -> Child {
        let log = std::fs::File::options().create(true).append(true).open(dir.join("log")).expect("a log");
        let mut command = Command::new(binary());
        command.args(["lockd", "--config"]).arg(dir.join("lockd.toml"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("the binary starts")
    }

    fn address(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.dir.join("data/address")).ok()?;
        text.lines().next().map(str::to_owned)
    }

    fn kill(&mut self) {
        self.child.kill().expect("runs");
        self.child.wait().expect("is ours");
        self.child = Self::spawn(&self.dir);
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lockspace(cluster: &Cluster, arguments: &[&str]) -> Output {
    let mut all = vec!["--json", "lockspace"];
    all.extend(arguments);
    cluster.run(&all)
}

/// What a group says of csnap's lockspace, once it says something.
fn state(cluster: &Cluster, at: &str) -> String {
    lockspace_state(cluster, at, "default")
}

fn lockspace_state(cluster: &Cluster, at: &str, name: &str) -> String {
    let output = lockspace(cluster, &["list", "--lockd", at]);
    let list: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let found = list.as_array().and_then(|all| all.iter().find(|space| space["name"] == name));
    found.and_then(|space| space["state"].as_str()).unwrap_or_default().to_owned()
}

/// The process of the cluster's own lockd: it is the one that has the configuration.
fn lockd_of(cluster: &Cluster) -> Option<u32> {
    let config = cluster.data().join("lockd1/lockd.toml");
    cluster.processes().into_iter().find(|pid| {
        let mut text = String::new();
        let file = std::fs::File::open(format!("/proc/{pid}/cmdline"));
        file.is_ok_and(|mut file| file.read_to_string(&mut text).is_ok())
            && text.contains(config.to_str().expect("plain"))
    })
}

#[test]
fn a_guest_does_not_notice_that_the_lockspace_moves_while_lockds_are_killed() {
    let cluster = Cluster::start(2);
    let mut other = Other::start(&cluster);
    let guest = Writer::start(&cluster.socket(1), "demo", 1024);
    guest.wait_for(100);
    let own = std::fs::read_to_string(cluster.data().join("lockd1/data/address")).expect("it listens");
    let addresses = [own.trim().to_owned(), other.address().expect("it listens")];
    let server = cluster.server();
    let (mut through, mut thawed) = (0, 0);
    for round in 0..number("CSNAP_LOCKSPACE_MOVES", 8) {
        let at = (0..2).find(|at| state(&cluster, &addresses[*at]) == "active").expect("one serves");
        let (from, to) = (&addresses[at], &addresses[1 - at]);
        let began = Instant::now();
        let moving = Command::new(binary())
            .args(["lockspace", "migrate", "default", "--lockd", from, "--to", to])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut moving = moving.expect("the binary starts");
        // The first two are not disturbed; then one side dies, a little later each time.
        if round >= 2 {
            std::thread::sleep(Duration::from_millis(u64::from(round) * 3 % 48));
            if round % 4 < 2 {
                other.kill();
            } else if let Some(pid) = lockd_of(&cluster) {
                signal(pid, "KILL");
            }
        }
        let ended = moving.wait().expect("is ours");
        wait_until("one of them serves, and the other knows where", || {
            let states = [state(&cluster, from), state(&cluster, to)];
            states == ["moved", "active"] || (states[0] == "active" && states[1] != "imported")
        });
        match state(&cluster, to).as_str() {
            "active" => through += 1,
            _ => thawed += 1,
        }
        println!("round {round}: {ended}, {} ms", began.elapsed().as_millis());
        assert!(round >= 2 || ended.success(), "nothing was in its way");
        guest.wait_for(50);
    }
    println!("{through} moves went through, {thawed} were given up");
    assert!(through >= 2);
    assert_eq!(cluster.server().term, server.term, "no session was lost");
    // The agents' locks work where they are now.
    let to = if server.node == "n1" { "n2" } else { "n1" };
    // An agent that still looks for the lockspace says that lockd does not answer.
    wait_until("the move is taken", || cluster.run(&["server", "move", to]).status.success());
    wait_until("the server moved", || cluster.server().node == to);
    guest.wait_for(100);
    guest.stop_and_verify();
}

#[test]
fn a_move_that_cannot_be_is_told_in_one_line_before_anybody_is_kept_waiting() {
    let cluster = Cluster::start(1);
    let other = Other::start(&cluster);
    let to = other.address().expect("it listens");
    for (arguments, says) in [
        (vec!["migrate", "nothing", "--to", &to], "no lockspace nothing"),
        (vec!["migrate", "default", "--to", "127.0.0.1:1"], "destination"),
        (vec!["abort", "default"], "not on its way"),
        (vec!["activate", "default"], "--source-is-lost"),
        (vec!["discard", "default"], "--source-serves"),
        (vec!["create", "default"], "already"),
        (vec!["list", "--lockd", "127.0.0.1:1"], "127.0.0.1:1"),
    ] {
        let output = lockspace(&cluster, &arguments);
        let text = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert!(text.contains(says) && text.lines().count() == 1, "{arguments:?}: {text}");
    }
    assert!(lockspace(&cluster, &["create", "work"]).status.success());
    let list = cluster.csnap(&["lockspace", "list"]);
    assert!(list.contains("default") && list.contains("work") && list.lines().count() == 3, "{list}");
    // Where something of the name is, nothing goes.
    assert!(lockspace(&cluster, &["create", "work", "--lockd", &to]).status.success());
    assert!(lockspace(&cluster, &["migrate", "work", "--to", &to]).status.success(), "nothing was in it");
    let output = lockspace(&cluster, &["create", "work"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("moved to another group"));
}

/// Locks of people and scripts, in a lockspace of their own: one held by a command that runs, one by an owner.
#[test]
fn locks_of_another_lockspace_are_held_through_its_move_and_found_by_its_name() {
    let cluster = Cluster::start(1);
    let other = Other::start(&cluster);
    let to = other.address().expect("it listens");
    let file = |name: &str| cluster.scratch().join(name).to_str().expect("UTF-8").to_owned();
    let (owner, began, over) = (file("owner"), file("began"), file("over"));
    cluster.csnap(&["lockspace", "create", "work"]);
    cluster.csnap(&["lock", "acquire", "owned", "--owner", &owner, "--space", "work"]);
    let script = format!("touch {began}; while ! [ -e {over} ]; do sleep 0.05; done");
    let mut running = Command::new(binary())
        .arg("--dir")
        .arg(cluster.data())
        .args(["lock", "run", "running", "--space", "work", "--", "sh", "-c", &script])
        .stdin(Stdio::null())
        .spawn()
        .expect("the binary starts");
    wait_until("the command runs", || std::path::Path::new(&began).exists());
    cluster.csnap(&["lockspace", "migrate", "work", "--to", &to]);
    assert_eq!(lockspace_state(&cluster, &to, "work"), "active");
    // The old group sends there; the new one knows both.
    for at in [vec!["--space", "work"], vec!["--space", "work", "--lockd", &to]] {
        for name in ["owned", "running"] {
            let said = cluster.csnap(&[&["lock", "show", name][..], &at].concat());
            assert!(said.contains(" EX term "), "{at:?}: {said}");
            let again = [&["lock", "run", name, "--no-wait"][..], &at, &["--", "true"]].concat();
            let line = cluster.refused(124, &again);
            assert!(line.contains("is not free"), "{line}");
        }
    }
    assert!(!cluster.csnap(&["lock", "show", "owned"]).contains(" EX "), "csnap's own lockspace has none");
    assert!(running.try_wait().expect("is ours").is_none(), "it noticed nothing");
    std::fs::write(&over, "").expect("writes");
    assert!(running.wait().expect("is ours").success(), "it held the lock to its end");
    cluster.csnap(&["lock", "run", "running", "--no-wait", "--space", "work", "--", "true"]);
    cluster.csnap(&["lock", "release", "owned", "--owner", &owner, "--space", "work"]);
    cluster.csnap(&["lock", "run", "owned", "--no-wait", "--space", "work", "--lockd", &to, "--", "true"]);
}
