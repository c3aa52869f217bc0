//! Bad input: garbage on sockets, commands that make no sense. One clear line each, nothing lost, a good client unaffected.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use csnap_proto::frame::VERSION;

use super::cluster::{Cluster, is_alive};
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
    vec![Vec::new(), vec![0; 4096], frame, short, option, noise, b"GET / HTTP/1.0\r\n\r\n".to_vec()]
}

/// Sends it and waits for the other side to close, or for a while.
fn offend(mut stream: impl Read + Write, bytes: &[u8]) {
    let _ = stream.write_all(bytes);
    let mut answer = [0; 4096];
    while matches!(stream.read(&mut answer), Ok(n) if n > 0) {}
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
    let status = cluster.status();
    let server_address = status["server"]["address"].as_str().expect("an address").to_owned();
    let lockd = std::fs::read_to_string(cluster.data().join("lockd1/data/address")).expect("lockd's address");
    let exporter = cluster.pid("n1", "export_pid");
    let agent = cluster.pid("n1", "agent_pid");
    for bytes in garbage() {
        for tcp in [server_address.trim(), lockd.trim(), &cluster.tcp()] {
            let stream = TcpStream::connect(tcp).expect("it listens");
            stream.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
            offend(stream, &bytes);
        }
        for unix in [cluster.socket(1), cluster.data().join("n1/agent.sock")] {
            let stream = UnixStream::connect(unix).expect("it listens");
            stream.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
            offend(stream, &bytes);
        }
    }
    guest.wait_for(50);
    assert_eq!(cluster.server(), server, "nobody died");
    for pid in [server.pid, exporter, agent] {
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
