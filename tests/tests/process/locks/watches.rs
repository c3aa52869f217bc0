//! `csnap lock watch` and `csnap kv watch`: every change, over connections and lockds.

use super::*;

/// Changes while lockd is killed and started again.
const CHANGES: u64 = 30;

#[test]
fn a_watch_over_restarts_of_lockd_misses_nothing() {
    let mut lockd = Lockd::start();
    lockd.csnap(&["kv", "put", "w/0", "before"]);
    let mut watch = Watch::start(&lockd, &["kv", "watch", "--prefix", "w/"]);
    let now = watch.next();
    assert_eq!((now["event"].as_str(), now["now"].as_bool()), (Some("put"), Some(true)));
    let mut versions = Vec::new();
    for change in 1..=CHANGES {
        if change % 10 == 0 {
            lockd.kill();
            lockd.go_on();
        }
        let put = lockd.json(&["kv", "put", &format!("w/{}", change % 3), &change.to_string()]);
        versions.push(put["version"].as_u64());
    }
    lockd.csnap(&["kv", "delete", "w/1"]);
    for (version, change) in versions.into_iter().zip(1u64..) {
        let event = watch.next();
        assert_eq!(event["event"], "put", "{event}");
        assert_eq!((event["version"].as_u64(), event["now"].as_bool()), (version, Some(false)), "{event}");
        assert_eq!(event["value"]["text"], change.to_string(), "{event}");
    }
    assert_eq!(watch.next()["event"], "deleted");
}

#[test]
fn a_watch_of_a_lock_sees_its_holders_and_its_value() {
    let lockd = Lockd::start();
    let owner = text(&lockd.file("owner")).to_owned();
    let mut watch = Watch::start(&lockd, &["lock", "watch", "n"]);
    assert_eq!(watch.next()["event"], "value");
    lockd.csnap(&["lock", "run", "n", "--mode", "PR", "--", "true"]);
    let next = |watch: &mut Watch, event: &str| loop {
        let found = watch.next();
        if found["event"] == event {
            return found;
        }
    };
    let held = next(&mut watch, "held");
    assert_eq!((held["mode"].as_str(), held["term"].as_u64()), (Some("PR"), Some(0)));
    assert_eq!(next(&mut watch, "gone")["lock"], held["lock"]);
    let taken = lockd.json(&["lock", "acquire", "n", "--owner", &owner]);
    let held = next(&mut watch, "held");
    assert_eq!(
        (&held["lock"], &held["term"], &held["mode"]),
        (&taken["lock"], &taken["term"], &taken["mode"])
    );
    lockd.csnap(&["lock", "release", "n", "--owner", &owner, "--value", "new"]);
    let value = loop {
        let value = next(&mut watch, "value");
        if value["value"]["text"] == "new" {
            break value;
        }
    };
    assert_eq!((value["value"]["valid"].as_bool(), value["vacant"].as_bool()), (Some(true), Some(true)));
}

#[test]
fn members_come_and_go_and_an_interrupted_watch_ends_well() {
    let lockd = Lockd::start();
    let mut watch = Watch::start(&lockd, &["lock", "watch", "--members"]);
    let me = watch.next();
    assert_eq!((me["event"].as_str(), me["now"].as_bool()), (Some("up"), Some(true)));
    lockd.csnap(&["kv", "put", "k", "v"]);
    let (up, down) = (watch.next(), watch.next());
    assert_eq!((up["event"].as_str(), down["event"].as_str()), (Some("up"), Some("down")));
    assert_eq!(up["session"], down["session"]);
    assert!(up["info"].as_str().is_some_and(|info| info.contains("kv put")), "{up}");
    signal(watch.child.id(), "INT");
    assert_eq!(watch.child.wait().expect("it ends").code(), Some(0));
    assert_eq!(lockd.json(&["lock", "list"]).as_array().map(Vec::len), Some(0));
}
