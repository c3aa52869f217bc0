//! `csnap lock run`: the command holds the lock while it runs, and does not outlive it.

use std::io::Write as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::super::cluster::is_stopped;
use super::*;

/// Contenders for one lock.
const CONTENDERS: usize = 20;

/// Lease of those that are to lose it, seconds.
const LEASE: Duration = Duration::from_secs(2);
const SHORT: &[&str] = &["--lease", "2"];

/// Says that it runs, then does so for longer than any test.
const FOR_EVER: &str = "echo $$ > pid; while :; do echo x >> steps; sleep 0.01; done";

#[test]
fn twenty_at_once_exclude_each_other_and_each_has_a_higher_term() {
    let lockd = Lockd::start();
    std::fs::write(lockd.file("count"), "0\n").expect("a file");
    let script = "n=$(cat count); sleep 0.01; echo $((n+1)) > count; echo $CSNAP_LOCK_TERM >> terms";
    let began = Instant::now();
    let holders: Vec<_> = (0..CONTENDERS).map(|_| lockd.holder("count", &[], script)).collect();
    for holder in holders {
        let (status, said) = holder.ended();
        assert_eq!(status, Some(0), "{said}");
    }
    println!("{CONTENDERS} contenders in {:?}", began.elapsed());
    assert_eq!(lockd.written("count"), CONTENDERS.to_string());
    let terms: Vec<u64> = lockd.written("terms").lines().map(|term| term.parse().expect("a term")).collect();
    assert_eq!(terms.len(), CONTENDERS);
    assert!(terms.is_sorted_by(|a, b| a < b), "{terms:?}");
    assert!(lockd.locks().is_empty(), "nothing is left");
}

#[test]
fn the_commands_status_is_passed_on_and_csnaps_own_are_others() {
    let lockd = Lockd::start();
    let status = |words: &[&str]| lockd.run(&[&["lock", "run", "n"], words].concat()).status.code();
    assert_eq!(status(&["--", "sh", "-c", "exit 7"]), Some(7));
    assert_eq!(status(&["--", "sh", "-c", "kill -TERM $$"]), Some(128 + 15));
    assert_eq!(status(&["--", "/no/such/program"]), Some(127));
    assert_eq!(status(&["--", text(lockd.dir.path())]), Some(126));
    assert_eq!(status(&["--mode", "XX", "--", "true"]), Some(2));
    let holder = lockd.holder("n", &[], FOR_EVER);
    lockd.pid("pid");
    let line = lockd.refused(124, &["lock", "run", "n", "--no-wait", "--", "touch", "ran"]);
    assert!(line.contains("csnap lock run n"), "it says who: {line}");
    lockd.refused(124, &["lock", "run", "n", "--wait", "0.2", "--", "touch", "ran"]);
    assert_eq!(
        lockd.run(&["lock", "run", "n", "--mode", "NL", "--no-wait", "--", "true"]).status.code(),
        Some(0)
    );
    drop(holder);
    lockd.refused(125, &["lock", "run", "n", "--lockd", "127.0.0.1:1", "--wait", "0", "--", "touch", "ran"]);
    assert!(!lockd.file("ran").exists(), "what was refused did not run");
}

#[test]
fn the_command_has_its_stdin_its_lock_and_its_signals() {
    let lockd = Lockd::start();
    let owner = text(&lockd.file("owner")).to_owned();
    lockd.csnap(&["lock", "acquire", "n", "--owner", &owner]);
    lockd.csnap(&["lock", "release", "n", "--owner", &owner, "--value", "seen"]);
    let script = "cat; echo $CSNAP_LOCK_NAME $CSNAP_LOCK_MODE $CSNAP_LOCK_VALUE $CSNAP_LOCK_VALUE_VALID";
    let mut run = lockd
        .command(&["lock", "run", "n", "--", "sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    run.stdin.take().expect("a pipe").write_all(b"from stdin\n").expect("it reads");
    let output = run.wait_with_output().expect("it ends");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "from stdin\nn EX seen 1\n");
    let holder = lockd.holder("n", &[], "trap 'exit 5' USR1; echo $$ > pid; while :; do sleep 0.01; done");
    lockd.pid("pid");
    signal(holder.pid(), "USR1");
    assert_eq!(holder.ended().0, Some(5));
    let value = lockd.json(&["lock", "show", "n"])["value"].clone();
    assert_eq!((value["text"].as_str(), value["valid"].as_bool()), (Some("seen"), Some(true)), "kept");
}

#[test]
fn a_killed_csnap_takes_its_command_along_with_all_that_it_started() {
    let lockd = Lockd::start();
    for victim in ["keeper", "guard", "both"] {
        let _ = std::fs::remove_file(lockd.file("pid"));
        let _ = std::fs::remove_file(lockd.file("child"));
        let script = "sleep 1000 & echo $! > child; echo $$ > pid; wait";
        let holder = lockd.holder("n", SHORT, script);
        let (child, pid, guard) = (lockd.pid("child"), lockd.pid("pid"), holder.guard());
        match victim {
            "keeper" => signal(holder.pid(), "KILL"),
            "guard" => signal(guard, "KILL"),
            _ => {
                // Stopped first, so that neither sees the other's end.
                signal(guard, "STOP");
                wait_until("it is stopped", || is_stopped(guard));
                signal(holder.pid(), "KILL");
                signal(guard, "KILL");
            }
        }
        wait_until("the command is gone", || gone(pid));
        if victim == "both" {
            signal(child, "KILL");
        }
        wait_until("what it started is gone", || gone(child));
        if victim == "guard" {
            let (status, said) = holder.ended();
            assert!(status == Some(125) && said.contains("guard"), "{status:?} {said}");
        }
        // Free at once where csnap lived on, else with the lease.
        lockd.csnap(&["lock", "run", "n", "--", "true"]);
    }
}

#[test]
fn a_frozen_csnap_does_not_keep_its_command_alive_past_the_lease() {
    let lockd = Lockd::start();
    let holder = lockd.holder("n", SHORT, FOR_EVER);
    let (pid, guard) = (lockd.pid("pid"), holder.guard());
    signal(holder.pid(), "STOP");
    wait_until("it is frozen", || is_stopped(holder.pid()));
    // Who comes next sees that the command is dead, and so is everything else in its group.
    let states = format!("cat /proc/{pid}/stat /proc/{guard}/stat 2>/dev/null | grep -v ' Z ' > left; true");
    lockd.csnap(&["lock", "run", "n", "--", "sh", "-c", &states]);
    assert_eq!(std::fs::read_to_string(lockd.file("left")).expect("it looked"), "", "the command lived on");
    signal(holder.pid(), "CONT");
    let (status, said) = holder.ended();
    assert_eq!(status, Some(123), "{said}");
    assert!(said.contains("was lost while the command ran"), "{said}");
}

#[test]
fn who_is_frozen_with_its_command_past_the_lease_goes_on_with_nothing() {
    for thawed_first in ["keeper", "guard"] {
        let lockd = Lockd::start();
        let holder = lockd.holder("n", SHORT, FOR_EVER);
        let (pid, guard) = (lockd.pid("pid"), holder.guard());
        lockd.written("steps");
        let processes = [holder.pid(), guard, pid];
        for process in processes {
            signal(process, "STOP");
        }
        for process in processes {
            wait_until("all are frozen", || is_stopped(process));
        }
        let steps = || std::fs::read(lockd.file("steps")).expect("it wrote").len();
        let before = steps();
        lockd.csnap(&["lock", "run", "n", "--", "sh", "-c", "echo $CSNAP_LOCK_TERM > term"]);
        assert_eq!(lockd.written("term"), "2", "the next term");
        // Whichever runs first kills what is still frozen.
        signal(if thawed_first == "keeper" { holder.pid() } else { guard }, "CONT");
        wait_until("the command is gone", || gone(pid) && gone(guard));
        signal(holder.pid(), "CONT");
        let (status, said) = holder.ended();
        assert_eq!(status, Some(123), "{said}");
        assert_eq!(steps(), before, "it did nothing more");
    }
}

#[test]
fn without_lockd_the_command_is_told_to_end_and_then_killed_before_the_lease_can_be_over() {
    let mut lockd = Lockd::start();
    let polite = "trap 'echo told > told; exit 0' TERM; echo $$ > pid; while :; do sleep 0.01; done";
    let stubborn = "trap 'echo told > told2' TERM; echo $$ > pid2; while :; do sleep 0.01; done";
    let holders = [lockd.holder("a", SHORT, polite), lockd.holder("b", SHORT, stubborn)];
    let pids = [lockd.pid("pid"), lockd.pid("pid2")];
    lockd.kill();
    let killed = Instant::now();
    wait_until("both are gone", || pids.iter().all(|pid| gone(*pid)));
    let took = killed.elapsed();
    println!("gone {took:?} after lockd, of a lease of {LEASE:?}");
    for holder in holders {
        let (status, said) = holder.ended();
        assert_eq!(status, Some(123), "{said}");
    }
    assert_eq!((lockd.written("told").as_str(), lockd.written("told2").as_str()), ("told", "told"));
    // The last renewal was before lockd died, so the lease was over at this moment at the latest.
    assert!(took < LEASE, "{took:?}");
}

#[test]
fn a_lockd_that_comes_back_in_time_is_not_noticed() {
    let mut lockd = Lockd::start();
    let holder = lockd.holder(
        "n",
        &["--lease", "20"],
        "echo $$ > pid; while ! test -e end; do sleep 0.01; done; exit 4",
    );
    lockd.pid("pid");
    for _ in 0..3 {
        lockd.kill();
        lockd.go_on();
        assert_eq!(lockd.locks().len(), 1);
    }
    std::fs::write(lockd.file("end"), "").expect("a file");
    let (status, said) = holder.ended();
    assert_eq!((status, said.as_str()), (Some(4), ""));
}

#[test]
fn a_broken_lock_kills_its_command_and_says_what_it_fenced() {
    let lockd = Lockd::start();
    let holder = lockd.holder("n", &[], FOR_EVER);
    let pid = lockd.pid("pid");
    let lock = lockd.locks()[0].clone();
    let number = lock["lock"].to_string();
    for wrong in ["999", "0"] {
        let line = lockd.refused(1, &["lock", "break", wrong]);
        assert!(line.contains("no such lock"), "{line}");
    }
    lockd.refused(2, &["lock", "break", "n"]);
    let broken = lockd.json(&["lock", "break", &number]);
    for same in ["lock", "name", "mode", "term"] {
        assert_eq!(broken[same], lock[same], "{same}");
    }
    assert_eq!(broken["holder"]["session"], lock["holder"]["session"]);
    assert!(broken["fenced_below"].as_u64() > lock["term"].as_u64());
    let (status, said) = holder.ended();
    assert_eq!(status, Some(123));
    assert!(said.contains("an operator broke it"), "{said}");
    assert!(gone(pid));
    lockd.csnap(&[
        "lock",
        "run",
        "n",
        "--",
        "sh",
        "-c",
        "echo $CSNAP_LOCK_TERM $CSNAP_LOCK_VALUE_VALID > next",
    ]);
    let next = lockd.written("next");
    let term: u64 = next.split(' ').next().and_then(|term| term.parse().ok()).expect("a term");
    assert!(Some(term) >= broken["fenced_below"].as_u64(), "{next}");
}

#[test]
fn who_is_interrupted_while_it_waits_leaves_the_queue() {
    let lockd = Lockd::start();
    let holder = lockd.holder("n", &[], FOR_EVER);
    lockd.pid("pid");
    let waiting = |count: usize| {
        wait_until("the queue is as long as it should be", || {
            lockd.json(&["lock", "show", "n"])["waiting"]
                .as_array()
                .is_some_and(|waiting| waiting.len() == count)
        });
    };
    let waiter = lockd.holder("n", &[], "touch ran");
    waiting(1);
    signal(waiter.pid(), "INT");
    assert_eq!(waiter.ended().0, Some(128 + 2));
    let owner = text(&lockd.file("owner")).to_owned();
    let mut acquire = lockd
        .command(&["lock", "acquire", "n", "--owner", &owner])
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    waiting(1);
    signal(acquire.id(), "TERM");
    assert_eq!(acquire.wait().expect("it ends").code(), Some(1));
    waiting(0);
    assert!(!lockd.file("ran").exists());
    drop(holder);
}
