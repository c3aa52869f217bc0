//! Bad input: garbage on sockets, commands that make no sense. One clear line each, nothing lost, a good client unaffected.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use csnap_proto::frame::VERSION;

use super::cluster::{Cluster, is_alive, wait_until};
use super::writer::Writer;

/// What a hostile peer might send first.
fn garbage() -> Vec<Vec<u8>> {
    let begun = || [&b"CSNP"[..], &[VERSION, 1, 0, 0]].concat();
    let mut frame = begun();
    frame.extend_from_slice(&u32::MAX.to_le_bytes());
    frame.extend_from_slice(&[0xff; 64]);
    let mut short = begun();
    short.extend_from_slice(&16u32.to_le_bytes());
    short.extend_from_slice(&[0; 40]);
    let mut option = b"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x07".to_vec();
    option.extend_from_slice(&u32::MAX.to_be_bytes());
    let noise: Vec<u8> = (0..65536u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    vec![vec![0; 4096], frame, short, option, noise, b"GET / HTTP/1.0\r\n\r\n".to_vec()]
}

/// Longer than any service waits for a stranger to say something.
const CLOSED_WITHIN: Duration = Duration::from_secs(60);

/// Waits until the other side closes, whatever it says before.
fn must_be_closed(mut stream: impl Read, whom: &str) {
    let mut answer = [0; 4096];
    loop {
        match stream.read(&mut answer) {
            Ok(0) => return,
            Ok(_) => {}
            // It closed with bytes of ours unread.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
            Err(error) => panic!("{whom} keeps the connection: {error}"),
        }
    }
}

fn tcp(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(CLOSED_WITHIN)).expect("a timeout");
    stream
}

fn unix(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("it listens");
    stream.set_read_timeout(Some(CLOSED_WITHIN)).expect("a timeout");
    stream
}

/// Lines of a log that say that a connection was closed, and why.
fn closings(log: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(log).expect("a log");
    text.lines().filter(|line| line.contains("closed: ")).map(str::to_owned).collect()
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or(0)
}

#[test]
fn garbage_on_every_socket_harms_nobody() {
    let cluster = Cluster::start(1);
    let guest = Writer::start(&cluster.socket(1), "demo", 256);
    guest.wait_for(50);
    let server = cluster.server();
    let (server_address, lockd_address, exporter_address) =
        (cluster.server_address(), cluster.lockd_address(), cluster.tcp());
    let (exporter_socket, agent_socket) = (cluster.socket(1), cluster.data().join("n1/agent.sock"));
    let (node_log, lockd_log) = (cluster.data().join("n1/log"), cluster.data().join("lockd1/log"));
    let daemons =
        [server.pid, cluster.lockd(), cluster.pid("n1", "agent_pid"), cluster.pid("n1", "export_pid")];
    let silent = (tcp(&server_address), tcp(&lockd_address), unix(&agent_socket), unix(&exporter_socket));
    for bytes in garbage() {
        for (address, log, whom) in [
            (&server_address, Some(&node_log), "server"),
            (&lockd_address, Some(&lockd_log), "lockd"),
            (&exporter_address, None, "exporter"),
        ] {
            let mut stream = tcp(address);
            let own = stream.local_addr().expect("an address").to_string();
            let _ = stream.write_all(&bytes);
            must_be_closed(stream, whom);
            if let Some(log) = log {
                let logged = || {
                    let text = std::fs::read_to_string(log).expect("a log");
                    text.lines().filter(|line| line.contains(&own)).count()
                };
                wait_until(&format!("{whom} says why it closed {own}"), || logged() > 0);
                assert_eq!(logged(), 1, "{whom} says it once");
            }
        }
        for (path, whom) in [(&exporter_socket, "exporter"), (&agent_socket, "agent")] {
            let before = closings(&node_log).len();
            let mut stream = unix(path);
            let _ = stream.write_all(&bytes);
            must_be_closed(stream, whom);
            wait_until(&format!("{whom} says why"), || closings(&node_log).len() > before);
        }
    }
    must_be_closed(silent.0, "server");
    must_be_closed(silent.1, "lockd");
    must_be_closed(silent.2, "agent");
    must_be_closed(silent.3, "exporter");
    guest.wait_for(50);
    assert_eq!(cluster.server(), server, "nobody died");
    let now = [
        cluster.server().pid,
        cluster.lockd(),
        cluster.pid("n1", "agent_pid"),
        cluster.pid("n1", "export_pid"),
    ];
    assert_eq!(now, daemons, "nobody died");
    for pid in daemons {
        assert!(is_alive(pid));
        assert!(resident_kib(pid) < 256 << 10, "memory stays bounded");
    }
    guest.stop_and_verify();
}

#[test]
fn commands_that_make_no_sense_get_one_clear_line() {
    let cluster = Cluster::start(1);
    cluster.csnap(&["volume", "create", "v", "--size", "1M"]);
    cluster.csnap(&["snapshot", "create", "v@a"]);
    for arguments in [
        &["volume", "create", "v", "--size", "1M"][..],
        &["volume", "create", "w", "--size", "9000000T"],
        &["volume", "create", "w", "--origin", "/no/such/file"],
        &["volume", "create", "w", "--from", "/no/such/file"],
        &["volume", "show", "nobody"],
        &["volume", "rename", "v", "demo"],
        &["volume", "delete", "v"],
        &["volume", "delete", "nobody"],
        &["snapshot", "create", "v@a"],
        &["snapshot", "create", "nobody@a"],
        &["snapshot", "show", "v@b"],
        &["snapshot", "delete", "v@b"],
        &["attach", "nobody"],
        &["server", "move", "n7"],
        &["clone", "v@a", "w"],
        &["diff", "v@a", "v"],
    ] {
        let line = cluster.refused(1, arguments);
        println!("{arguments:?}: {}", line.trim_end());
    }
    for arguments in [&["clone", "v@a", "w"][..], &["volume", "create", "w", "--from", "v@a"]] {
        let line = cluster.refused(1, arguments);
        assert!(line.contains("not yet"), "{arguments:?}: {line}");
    }
    for arguments in [
        &["volume", "create", "../etc", "--size", "1M"][..],
        &["volume", "create", "w", "--size", "many"],
        &["volume", "create", "w", "--size", "1M", "--chunk", "5000"],
        &["volume", "create", "w", "--size", "0"],
        &["no-such-command"],
        &["status", "--no-such-flag"],
    ] {
        cluster.refused(2, arguments);
    }
    assert!(cluster.csnap(&["volume", "list"]).contains("demo"), "nothing was lost");
}
