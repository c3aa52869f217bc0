//! `csnap kv`: a small configuration store for scripts.

use std::io::Write as _;
use std::time::Duration;

use super::*;

/// Writers of one key, and how often each adds one.
const WRITERS: u32 = 10;
const TURNS: u32 = 4;

fn add_one(lockd: &Lockd) -> u32 {
    let mut conflicts = 0;
    loop {
        let now = lockd.json(&["kv", "get", "count"]);
        let count: u64 = now["value"]["text"].as_str().and_then(|text| text.parse().ok()).expect("a number");
        let (next, version) = ((count + 1).to_string(), now["version"].to_string());
        match lockd.run(&["kv", "put", "count", &next, "--if-version", &version]).status.code() {
            Some(0) => return conflicts,
            Some(1) => conflicts += 1,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn ten_writers_that_compare_and_swap_lose_nothing() {
    let lockd = Lockd::start();
    lockd.csnap(&["kv", "put", "count", "0", "--if-absent"]);
    lockd.refused(1, &["kv", "put", "count", "0", "--if-absent"]);
    let conflicts: u32 = std::thread::scope(|scope| {
        let writer = || (0..TURNS).map(|_| add_one(&lockd)).sum::<u32>();
        let writers: Vec<_> = (0..WRITERS).map(|_| scope.spawn(writer)).collect();
        writers.into_iter().map(|writer| writer.join().expect("no panic")).sum()
    });
    println!("{} additions, {conflicts} conflicts", WRITERS * TURNS);
    assert_eq!(lockd.csnap(&["kv", "get", "count"]), (WRITERS * TURNS).to_string());
}

#[test]
fn values_are_bytes_and_limits_are_one_line() {
    let lockd = Lockd::start();
    let put = |key: &str, bytes: &[u8]| {
        let mut put = lockd
            .command(&["kv", "put", key])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        // It stops reading where a value is too long.
        let _ = put.stdin.take().expect("a pipe").write_all(bytes);
        put.wait_with_output().expect("it ends")
    };
    let bytes: Vec<u8> = (0..=255u8).cycle().take(4096).collect();
    assert!(put("k/bytes", &bytes).status.success());
    assert_eq!(lockd.run(&["kv", "get", "k/bytes"]).stdout, bytes);
    let entry = lockd.json(&["kv", "get", "k/bytes"]);
    assert!(entry["value"]["text"].is_null() && entry["value"]["hex"].as_str().map(str::len) == Some(8192));
    assert!(put("k/empty", b"").status.success());
    assert_eq!(lockd.csnap(&["kv", "get", "k/empty"]), "");
    let refused = put("k/long", &vec![0; 100_000]);
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&refused.stderr).lines().count(), 1);
    lockd.refused(1, &["kv", "get", "k/long"]);
    lockd.refused(1, &["kv", "delete", "k/long"]);
    lockd.refused(1, &["kv", "delete", "k/empty", "--if-version", "999"]);
    lockd.refused(2, &["kv", "get", &"k".repeat(257)]);
    lockd.csnap(&["kv", "delete", "k/empty"]);
    assert_eq!(lockd.json(&["kv", "list", "k/"]).as_array().map(Vec::len), Some(1));
}

#[test]
fn a_list_has_all_its_pages() {
    let lockd = Lockd::start();
    let count = 150;
    std::thread::scope(|scope| {
        for part in 0..5 {
            let lockd = &lockd;
            scope.spawn(move || {
                for n in (part..count).step_by(5) {
                    lockd.csnap(&["kv", "put", &format!("p/{n:04}"), "v"]);
                }
            });
        }
    });
    lockd.csnap(&["kv", "put", "q", "v"]);
    let keys = lockd.json(&["kv", "list", "p/"]);
    let names: Vec<&str> =
        keys.as_array().expect("a list").iter().filter_map(|key| key["key"].as_str()).collect();
    let expected: Vec<String> = (0..count).map(|n| format!("p/{n:04}")).collect();
    assert_eq!(names, expected);
    let mut watch = Watch::start(&lockd, &["kv", "watch", "--prefix", "p/"]);
    for name in &expected {
        assert_eq!(watch.next()["key"].as_str(), Some(name.as_str()));
    }
}

#[test]
fn an_ephemeral_key_is_there_as_long_as_its_command() {
    let lockd = Lockd::start();
    let put = |script: &str| {
        let words = [
            "kv",
            "put",
            "me",
            "here",
            "--if-absent",
            "--ephemeral",
            "--lease",
            "1",
            "--",
            "sh",
            "-c",
            script,
        ];
        let child = lockd.command(&words).stderr(Stdio::piped()).spawn().expect("the binary starts");
        Holder { child: Some(child) }
    };
    let first = put("echo $CSNAP_KEY_VERSION > version; while ! test -e end; do sleep 0.01; done; exit 6");
    let version = lockd.written("version");
    let entry = lockd.json(&["kv", "get", "me"]);
    assert_eq!(entry["version"].to_string(), version);
    assert!(entry["session"].is_string());
    assert_eq!(put("touch ran").ended().0, Some(124), "another is there");
    std::fs::write(lockd.file("end"), "").expect("a file");
    assert_eq!(first.ended().0, Some(6));
    lockd.refused(1, &["kv", "get", "me"]);
    let second = put("echo $$ > pid; while :; do sleep 0.01; done");
    let pid = lockd.pid("pid");
    signal(second.pid(), "KILL");
    wait_until("the command is gone", || gone(pid));
    let began = std::time::Instant::now();
    wait_until("the key goes with the lease", || lockd.run(&["kv", "get", "me"]).status.code() == Some(1));
    assert!(began.elapsed() < Duration::from_secs(10));
    assert!(!lockd.file("ran").exists());
}
