//! `csnap lock acquire`, `convert`, `release`: an owner's lock over any number of commands.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use super::*;

/// `lock N term T`, as acquire and convert print it.
fn parsed(line: &str) -> (u64, u64) {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        ["lock", lock, "term", term] => (lock.parse().expect("a number"), term.parse().expect("a number")),
        _ => panic!("{line}"),
    }
}

#[test]
fn an_owner_has_its_lock_from_acquire_to_release() {
    let lockd = Lockd::start();
    let [a, b] = ["a", "b"].map(|owner| text(&lockd.file(owner)).to_owned());
    let (lock, first) = parsed(&lockd.csnap(&["lock", "acquire", "n", "--owner", &a]));
    let mode = std::fs::metadata(&a).expect("it was made").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let orphans = lockd.json(&["lock", "list", "--orphans"]);
    assert_eq!((orphans[0]["lock"].as_u64(), orphans[0]["name"].as_str()), (Some(lock), Some("n")));
    let line = lockd.refused(1, &["lock", "acquire", "n", "--owner", &b, "--no-wait"]);
    assert!(line.contains("n is not free: lock"), "{line}");
    lockd.refused(1, &["lock", "acquire", "n", "--owner", &b, "--wait", "0.1"]);
    lockd.refused(1, &["lock", "release", "n", "--owner", &b]);
    let (again, second) = parsed(&lockd.csnap(&["lock", "acquire", "n", "--owner", &a]));
    assert!(again == lock && second > first, "the same lock under a new term");
    let (_, third) = parsed(&lockd.csnap(&["lock", "convert", "n", "--owner", &a, "--value", "v1"]));
    assert!(third > second);
    let value = lockd.json(&["lock", "show", "n"])["value"].clone();
    assert_eq!((value["text"].as_str(), value["valid"].as_bool()), (Some("v1"), Some(true)));
    lockd.refused(1, &["lock", "acquire", "n", "--owner", &a, "--mode", "PR"]);
    lockd.csnap(&["lock", "convert", "n", "--owner", &a, "--mode", "CR", "--invalidate"]);
    assert_eq!(lockd.json(&["lock", "show", "n"])["value"]["valid"], false);
    lockd.csnap(&["lock", "acquire", "n", "--owner", &b, "--mode", "PR"]);
    let line = lockd.refused(1, &["lock", "convert", "n", "--owner", &a, "--mode", "EX", "--no-wait"]);
    assert!(line.contains("not free"), "{line}");
    lockd.csnap(&["lock", "release", "n", "--owner", &b]);
    let (_, last) = parsed(&lockd.csnap(&["lock", "convert", "n", "--owner", &a, "--mode", "EX"]));
    assert!(last > third);
    lockd.csnap(&["lock", "release", "n", "--owner", &a, "--value", "v2"]);
    assert!(lockd.locks().is_empty());
    assert_eq!(lockd.json(&["lock", "show", "n"])["value"]["text"], "v2");
    lockd.refused(1, &["lock", "release", "n", "--owner", &a]);
}

#[test]
fn an_acquire_that_was_killed_at_any_moment_can_be_done_again() {
    let mut lockd = Lockd::start();
    let owner = text(&lockd.file("owner")).to_owned();
    let mut last = 0;
    for turn in 0..12 {
        let mut acquire =
            lockd.command(&["lock", "acquire", "n", "--owner", &owner]).spawn().expect("starts");
        std::thread::sleep(Duration::from_millis(turn * 4));
        let _ = acquire.kill();
        acquire.wait().expect("it ends");
        if turn == 6 {
            lockd.kill();
            lockd.go_on();
        }
        let (_, term) = parsed(&lockd.csnap(&["lock", "acquire", "n", "--owner", &owner]));
        assert!(term > last, "terms only grow");
        assert_eq!(lockd.locks().len(), 1, "it is one lock");
        last = term;
        if turn % 2 == 1 {
            lockd.csnap(&["lock", "release", "n", "--owner", &owner]);
        }
    }
}

#[test]
fn who_died_waiting_gets_the_lock_when_its_owner_asks_again() {
    let lockd = Lockd::start();
    let [a, b] = ["a", "b"].map(|owner| text(&lockd.file(owner)).to_owned());
    lockd.csnap(&["lock", "acquire", "n", "--owner", &a]);
    let mut waiter = lockd.command(&["lock", "acquire", "n", "--owner", &b]).spawn().expect("starts");
    wait_until("it waits", || {
        lockd.json(&["lock", "show", "n"])["waiting"].as_array().is_some_and(|waiting| waiting.len() == 1)
    });
    let line = lockd.refused(1, &["lock", "release", "n", "--owner", &b]);
    assert!(line.contains("in use by another"), "{line}");
    waiter.kill().expect("ours");
    waiter.wait().expect("it ends");
    lockd.csnap(&["lock", "release", "n", "--owner", &a]);
    lockd.csnap(&["lock", "acquire", "n", "--owner", &b]);
    let locks = lockd.locks();
    assert_eq!(locks.len(), 1, "{locks:?}");
    lockd.csnap(&["lock", "release", "n", "--owner", &b]);
}

#[test]
fn an_owner_whose_lock_was_broken_is_told() {
    let lockd = Lockd::start();
    let owner = text(&lockd.file("owner")).to_owned();
    let (lock, term) = parsed(&lockd.csnap(&["lock", "acquire", "n", "--owner", &owner]));
    let said = lockd.csnap(&["lock", "break", &lock.to_string()]);
    let about = lockd.json(&["lock", "show", "n"]);
    assert_eq!(about["granted"].as_array().map(Vec::len), Some(0));
    for part in [format!("lock {lock} on n in EX"), format!("term      {term};"), "owner ".to_owned()] {
        assert!(said.contains(&part), "{part}: {said}");
    }
    let line = lockd.refused(1, &["lock", "release", "n", "--owner", &owner]);
    assert!(line.contains("has no lock on n"), "{line}");
    let (_, next) = parsed(&lockd.csnap(&["lock", "acquire", "n", "--owner", &owner]));
    assert!(next > term);
}

#[test]
fn what_lockd_or_a_file_would_not_have_is_one_line() {
    let lockd = Lockd::start();
    let owner = text(&lockd.file("owner")).to_owned();
    lockd.refused(1, &["lock", "release", "n", "--owner", &owner]);
    assert!(!lockd.file("owner").exists(), "only acquire makes one");
    lockd.refused(1, &["lock", "acquire", "n", "--owner", "/no/such/directory/owner"]);
    lockd.csnap(&["lock", "acquire", "n", "--owner", &owner, "--mode", "PR"]);
    let long = "x".repeat(257);
    lockd.refused(1, &["lock", "convert", "n", "--owner", &owner, "--value", &long]);
    lockd.refused(1, &["lock", "convert", "n", "--owner", &owner, "--value", "v"]);
    lockd.refused(1, &["lock", "release", "n", "--owner", &owner, "--invalidate"]);
    lockd.refused(2, &["lock", "show", &long]);
    std::fs::set_permissions(&owner, std::fs::Permissions::from_mode(0o644)).expect("ours");
    let line = lockd.refused(1, &["lock", "release", "n", "--owner", &owner]);
    assert!(line.contains("chmod 600"), "{line}");
    std::fs::write(&owner, "nonsense").expect("ours");
    std::fs::set_permissions(&owner, std::fs::Permissions::from_mode(0o600)).expect("ours");
    lockd.refused(1, &["lock", "acquire", "n", "--owner", &owner]);
}
