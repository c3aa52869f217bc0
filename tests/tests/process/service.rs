//! Which lock service a node elects on: one, and one that this build has.

use std::process::Command;

use super::cluster::{Cluster, binary, changed};

/// The one line of an agent that must not start; `lines` stand in place of `lockd`.
fn refused(lines: &str, etcd: &str) -> String {
    let dir = tempfile::Builder::new().prefix("csnap-").tempdir().expect("a temporary directory");
    let home = dir.path().display();
    let text = format!(
        "node = \"n1\"\npool = \"{home}/pool\"\nagent_sock = \"{home}/agent.sock\"\nstate = \"{home}/state\"\n\
         nbd_unix = \"{home}/nbd.sock\"\n{lines}\n{etcd}\n"
    );
    let path = dir.path().join("agent.toml");
    std::fs::write(&path, text).expect("a configuration");
    let output = Command::new(binary()).args(["agent", "--config"]).arg(path).output();
    let output = output.expect("the binary starts");
    let error = String::from_utf8(output.stderr).expect("it prints text");
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert_eq!(error.trim_end().lines().count(), 1, "one line: {error}");
    error
}

const LOCKD: &str = "lockd = [\"127.0.0.1:7000\"]";
const ETCD: &str = "[etcd]\nendpoints = [\"127.0.0.1:2379\"]\nprefix = \"/csnap/test\"";

#[test]
fn both_services_none_and_one_that_is_not_built_in_get_a_line_each() {
    assert!(refused(LOCKD, ETCD).contains("lockd and [etcd] are both there"));
    assert!(refused("", "").contains("lockd needs at least one address, or there must be an [etcd]"));
    assert!(refused("", ETCD).contains("built without etcd; build it with --features etcd"));
}

#[test]
fn up_does_not_take_a_node_away_from_its_etcd() {
    let mut cluster = Cluster::start(1);
    cluster.down();
    let path = cluster.data().join("n1/agent.toml");
    let text = std::fs::read_to_string(&path).expect("a configuration");
    let lockd = text.lines().find(|line| line.starts_with("lockd = ")).expect("up writes it").to_owned();
    std::fs::write(&path, format!("{}\n{ETCD}\n", changed(&text, &lockd, ""))).expect("a configuration");
    let line = cluster.refused(1, &["up", "--nbd", "127.0.0.1:0"]);
    assert!(line.contains("csnap up runs a lockd of its own") && line.contains("agent.toml"), "{line}");
}
