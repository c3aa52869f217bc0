//! Failover asks nobody and looks nothing up: between the kill of a server and its successor's service, no configuration is
//! opened and no name is resolved.
//!
//! strace watches every process that is there when the server is killed: agents, standby servers, exporters, lockd, `up`.
//! A process that is started afterwards (the standby that replaces the dead one) reads its configuration by its nature, and
//! has no part in the path to service; strace lets go of it when it is executed. The nodes make plain system calls, so that
//! io_uring hides nothing. The trace begins before the kill and ends when guests' writes go on: more than what is promised.

use std::process::{Command, Stdio};
use std::time::Duration;

use super::cluster::{Cluster, signal, wait_until};
use super::strace::{PLAIN_CALLS, Strace};
use super::writer::Writer;

/// No failover takes so long, unless strace hangs.
const TRACED_WITHIN: Duration = Duration::from_secs(60);

/// Calls that open something or talk to somebody.
const CALLS: &str = "trace=open,openat,openat2,connect,sendto,sendmsg,sendmmsg,mkdirat,linkat";

/// A line that shows a configuration being opened or a name being looked up.
fn is_lookup(line: &str) -> bool {
    let opens = ["open(", "openat(", "openat2("].iter().any(|call| line.contains(call));
    let configuration = line.contains(".toml\"") || line.contains("\"/etc/");
    let services = ["/nscd", "systemd/resolve", "sss/pipes"].iter().any(|name| line.contains(name));
    let asks_dns = line.contains("htons(53)");
    opens && configuration || line.contains("connect(") && services || asks_dns
}

#[test]
fn the_way_from_a_kill_to_service_opens_no_configuration_and_resolves_no_name() {
    let cluster = Cluster::start_configured(3, &[PLAIN_CALLS]);
    let guest = Writer::start(&cluster.socket(1), "demo", 1024);
    guest.wait_for(100);
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    for turn in 0..3 {
        let server = cluster.server();
        wait_until("two servers stand by", || {
            let status = cluster.status();
            let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
            nodes.iter().filter(|node| node["standby_ready"] == true).count() == 2
        });
        let witnesses: Vec<u32> = cluster.processes().into_iter().filter(|pid| *pid != server.pid).collect();
        assert!(witnesses.len() > 3 + 2 + 3, "agents, standbys, exporters, and lockd: {witnesses:?}");
        let log = cluster.scratch().join(format!("quiet-{turn}.log"));
        let arguments = ["-e", CALLS, "--detach-on=execve"];
        let trace = Strace::attach(log, &witnesses, TRACED_WITHIN, &arguments).expect("they live");
        signal(server.pid, "KILL");
        let mut next = cluster.server();
        wait_until("another server serves", || {
            next = cluster.server();
            next.pid != server.pid
        });
        guest.wait_for(100);
        let seen = trace.detach();
        // The whole takeover was watched, from its first step to the clients that come.
        let shows = |call: &str, what: &str| {
            let count = seen.lines().filter(|line| line.contains(call) && line.contains(what)).count();
            assert!(count > 0, "the trace does not show {call}…{what}");
            count
        };
        shows("mkdirat(", &format!("\"term/{}\"", next.term));
        shows("linkat(", &format!("\"term/{}/successor\"", server.term));
        shows("linkat(", &format!("\"term/{}/journal-0\"", next.term));
        let status = cluster.status();
        let address = status["server"]["address"].as_str().expect("an address");
        let (_, port) = address.rsplit_once(':').expect("it has a port");
        let connects = shows("connect(", &format!("htons({port})"));
        let lookups: Vec<&str> = seen.lines().filter(|line| is_lookup(line)).collect();
        assert!(lookups.is_empty(), "{lookups:#?}");
        let opened = seen.lines().filter(|line| line.contains("openat")).count();
        println!(
            "{} processes watched, {opened} files opened, {connects} connections to the successor: no configuration, no name",
            witnesses.len()
        );
    }
    guest.stop_and_verify();
}

/// The two things that are looked for would be seen.
#[test]
fn a_configuration_that_is_read_and_a_name_that_is_resolved_are_seen() {
    let cluster = Cluster::start(1);
    let log = cluster.scratch().join("child.log");
    let agent = cluster.pid("n1", "agent_pid");
    let trace = Strace::attach(log, &[agent], TRACED_WITHIN, &["-e", CALLS]).expect("it lives");
    signal(cluster.server().pid, "KILL");
    wait_until("the server that is started anew reads its configuration", || {
        trace.seen().lines().any(|line| is_lookup(line) && line.contains("n1/agent.toml"))
    });
    trace.detach();
    let log = cluster.scratch().join("name.log");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-e", CALLS, "-o"]).arg(&log).args(["getent", "hosts", "csnap.invalid"]);
    strace.stdout(Stdio::null()).status().expect("strace is installed by ./test");
    let seen = std::fs::read_to_string(log).expect("a log");
    assert!(seen.lines().any(is_lookup), "{seen}");
}
