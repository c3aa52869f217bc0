//! Bad input: garbage on sockets, commands that make no sense. One clear line each, nothing lost, a good client unaffected.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use csnap_nbd_export::core::limits::{
    HANDSHAKE_INPUT_BYTES, INPUT_BYTES, OPTION_BYTES_MAX, OUTPUT_BYTES, PAYLOAD_BYTES_MAX, PIECE_BYTES,
};
use csnap_proto::frame::{HEADER_BYTES, Message, VERSION};
use csnap_proto::limits::{IMPORT_BYTES_MAX, INTRODUCTION_BYTES_MAX};
use csnap_proto::message::local::ToAgent;
use csnap_proto::message::lock::ToLockd;
use csnap_proto::message::volume::ToServer;

use super::cluster::{Cluster, binary, is_alive, wait_until};
use super::nbd::{Nbd, WRITE};
use super::writer::{Writer, ms};

/// What an NBD client says first, up to the length of the option GO.
const GO: &[u8] = b"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x07";

/// What a hostile peer might send first.
fn garbage() -> Vec<Vec<u8>> {
    let begun = || [&b"CSNP"[..], &[VERSION, 1, 0, 0]].concat();
    let mut frame = begun();
    frame.extend_from_slice(&u32::MAX.to_le_bytes());
    frame.extend_from_slice(&[0xff; 64]);
    let mut short = begun();
    short.extend_from_slice(&16u32.to_le_bytes());
    short.extend_from_slice(&[0; 40]);
    let mut option = GO.to_vec();
    option.extend_from_slice(&u32::MAX.to_be_bytes());
    let noise: Vec<u8> = (0..65536u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    vec![vec![0; 4096], frame, short, option, noise, b"GET / HTTP/1.0\r\n\r\n".to_vec()]
}

/// Longer than any service waits for a stranger to say something.
const CLOSED_WITHIN: Duration = Duration::from_secs(60);

/// A connection of ours.
enum Peer {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Read for Peer {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Peer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Peer {
    /// Waits until the other side closes, whatever it says before.
    fn must_be_closed(mut self, whom: &str) {
        let mut answer = [0; 4096];
        loop {
            match self.read(&mut answer) {
                Ok(0) => return,
                Ok(_) => {}
                // It closed with bytes of ours unread.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
                Err(error) => panic!("{whom} keeps the connection: {error}"),
            }
        }
    }

    /// Whether the other side has not closed it. What it said is thrown away.
    fn is_open(&mut self) -> bool {
        let nonblocking = |peer: &Self, on| match peer {
            Self::Tcp(stream) => stream.set_nonblocking(on),
            Self::Unix(stream) => stream.set_nonblocking(on),
        };
        nonblocking(self, true).expect("it is a socket");
        let mut answer = [0; 4096];
        let open = loop {
            match self.read(&mut answer) {
                Ok(0) => break false,
                Ok(_) => {}
                Err(error) => break error.kind() == ErrorKind::WouldBlock,
            }
        };
        nonblocking(self, false).expect("it is a socket");
        open
    }
}

/// Where a service listens.
enum Place {
    Tcp(String),
    Unix(PathBuf),
}

struct Service {
    name: &'static str,
    place: Place,
    log: PathBuf,
    /// What its lines about closed connections contain; the address of the other end, if it is not told.
    says: Option<&'static str>,
}

impl Service {
    /// A connection, and what a line of the log about its end contains.
    fn connect(&self) -> (Peer, String) {
        match &self.place {
            Place::Tcp(address) => {
                let stream = TcpStream::connect(address).expect("it listens");
                stream.set_read_timeout(Some(CLOSED_WITHIN)).expect("a timeout");
                let own = stream.local_addr().expect("an address").to_string();
                (Peer::Tcp(stream), self.says.map_or(own, str::to_owned))
            }
            Place::Unix(path) => {
                let stream = UnixStream::connect(path).expect("it listens");
                stream.set_read_timeout(Some(CLOSED_WITHIN)).expect("a timeout");
                (Peer::Unix(stream), self.says.expect("it has no address").to_owned())
            }
        }
    }

    /// How many lines of its log contain something.
    fn lines(&self, text: &str) -> usize {
        let log = std::fs::read_to_string(&self.log).expect("a log");
        log.lines().filter(|line| line.contains(text)).count()
    }

    /// Sends garbage; the connection is closed, and one line says why. How many lines were written meanwhile.
    fn feed(&self, bytes: &[u8]) -> usize {
        let (mut peer, says) = self.connect();
        let before = self.lines(&says);
        let _ = peer.write_all(bytes);
        peer.must_be_closed(self.name);
        wait_until(&format!("{} says why it closed ({says})", self.name), || self.lines(&says) > before);
        let lines = self.lines(&says) - before;
        assert!(self.says.is_some() || lines == 1, "{} says it once", self.name);
        lines
    }
}

/// Feeds all kinds of garbage to every service, and lets a silent peer wait at each.
fn feed_garbage(services: &[Service]) {
    let silent: Vec<Peer> = services.iter().map(|service| service.connect().0).collect();
    let mut lines = vec![0; services.len()];
    for bytes in garbage() {
        for (service, lines) in services.iter().zip(&mut lines) {
            *lines += service.feed(&bytes);
        }
    }
    for (service, silent) in services.iter().zip(silent) {
        silent.must_be_closed(service.name);
    }
    for (service, lines) in services.iter().zip(lines) {
        println!(
            "{}: {} connections with garbage and a silent one closed, {lines} lines in the log",
            service.name,
            garbage().len()
        );
    }
}

/// A process, and two of the numbers that the kernel has of it.
struct Daemon {
    name: &'static str,
    pid: u32,
}

/// Bytes: the most that was resident, and the most that was mapped.
#[derive(Clone, Copy, Debug)]
struct Memory {
    resident: u64,
    mapped: u64,
}

impl Daemon {
    fn memory(&self) -> Memory {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).expect("it lives");
        let bytes = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).expect("the kernel says so");
            let kib: u64 = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number");
            kib << 10
        };
        Memory { resident: bytes("VmHWM:"), mapped: bytes("VmPeak:") }
    }

    /// Forgets what was resident before, so that what comes is seen.
    fn forget_peak(&self) -> Memory {
        std::fs::write(format!("/proc/{}/clear_refs", self.pid), "5").expect("it is our process");
        self.memory()
    }

    /// Prints what came since, and gives the growth.
    fn print_growth(&self, what: &str, before: Memory) -> Memory {
        let now = self.memory();
        let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
        println!(
            "{}, {what}: VmHWM {} MiB, then {}; VmPeak {} MiB, then {}",
            self.name,
            mib(before.resident),
            mib(now.resident),
            mib(before.mapped),
            mib(now.mapped)
        );
        Memory {
            resident: now.resident.saturating_sub(before.resident),
            mapped: now.mapped.saturating_sub(before.mapped),
        }
    }

    /// What this many connections made it hold is within `each` of all of them, and what it takes anyway.
    fn assert_bounded(&self, what: &str, before: Memory, each: usize) {
        let grown = self.print_growth(what, before);
        let most = (HELD * each) as u64 + MARGIN_BYTES;
        assert!(grown.resident <= most, "{} holds {} bytes, at most {most}", self.name, grown.resident);
        let most = most + STACKS_BYTES;
        assert!(grown.mapped <= most, "{} maps {} bytes, at most {most}", self.name, grown.mapped);
    }
}

/// Connections that are held at once at each service.
const HELD: usize = 200;

/// What a daemon takes beside what connections hold, for work of its own.
const MARGIN_BYTES: u64 = 32 << 20;

/// What it maps beside that and hardly uses: stacks of 2 MiB, of a few dozen threads that begin when the disk is slow.
const STACKS_BYTES: u64 = 128 << 20;

/// Where such a write goes: nobody else's blocks.
const ASIDE: u64 = 512 << 20;

/// The beginning of a frame: a header that announces this body, and half of it.
fn half_a_frame<M: Message>(body_bytes: usize) -> Vec<u8> {
    let mut bytes = [&b"CSNP"[..], &[VERSION, M::FAMILY as u8, 0, 0]].concat();
    bytes.extend_from_slice(&u32::try_from(body_bytes).expect("short").to_le_bytes());
    bytes.resize(HEADER_BYTES + body_bytes / 2, 0);
    bytes
}

/// How often [`hold`] tries: on a busy machine the first connections may be closed for their silence before the last begin.
const ATTEMPTS: u32 = 5;

/// Holds [`HELD`] connections, each of which began and does not go on, until the service closes them.
fn hold(service: &Service, begin: impl Fn(&mut Peer) -> std::io::Result<()>) {
    let begun = || {
        let mut peer = service.connect().0;
        // Closed for its silence already, perhaps: that is looked at below.
        let _ = begin(&mut peer);
        peer
    };
    let at_once = (0..ATTEMPTS).any(|_| {
        let mut held: Vec<Peer> = (0..HELD).map(|_| begun()).collect();
        let open = held.iter_mut().filter_map(|peer| peer.is_open().then_some(())).count();
        held.into_iter().for_each(|peer| peer.must_be_closed(service.name));
        open == HELD
    });
    assert!(at_once, "{} has them all at once", service.name);
}

/// The services of a node, and of the only lockd.
fn services(cluster: &Cluster) -> [Service; 5] {
    let (node, lockd) = (cluster.data().join("n1/log"), cluster.data().join("lockd1/log"));
    let tcp = |name, address, log: &Path, says| Service {
        name,
        place: Place::Tcp(address),
        log: log.to_owned(),
        says,
    };
    let unix =
        |name, path| Service { name, place: Place::Unix(path), log: node.clone(), says: Some("closed: ") };
    [
        tcp("server", cluster.server_address(), &node, None),
        tcp("lockd", cluster.lockd_address(), &lockd, None),
        unix("agent", cluster.data().join("n1/agent.sock")),
        unix("exporter", cluster.socket(1)),
        tcp("exporter over TCP", cluster.tcp(), &node, Some("closed: ")),
    ]
}

fn daemons(cluster: &Cluster) -> [Daemon; 4] {
    [
        Daemon { name: "server", pid: cluster.server().pid },
        Daemon { name: "lockd", pid: cluster.lockd() },
        Daemon { name: "agent", pid: cluster.pid("n1", "agent_pid") },
        Daemon { name: "exporter", pid: cluster.pid("n1", "export_pid") },
    ]
}

#[test]
fn garbage_on_every_socket_harms_nobody() {
    let cluster = Cluster::start(1);
    let guest = Writer::start(&cluster.socket(1), "demo", 256);
    guest.wait_for(50);
    let (server, daemons_before) = (cluster.server(), daemons(&cluster));
    guest.take_stall();
    let before: Vec<Memory> = daemons_before.iter().map(Daemon::forget_peak).collect();
    feed_garbage(&services(&cluster));
    guest.wait_for(50);
    println!("a good client's longest stall meanwhile {}", ms(guest.take_stall()));
    assert_eq!(cluster.server(), server, "nobody died");
    for (daemon, (now, before)) in daemons_before.iter().zip(daemons(&cluster).iter().zip(before)) {
        assert_eq!(daemon.pid, now.pid, "{} lives", daemon.name);
        assert!(is_alive(daemon.pid));
        daemon.print_growth("garbage", before);
    }
    guest.stop_and_verify();
}

#[test]
fn garbage_on_a_replica_s_sockets_harms_nobody() {
    let cluster = Cluster::start(3);
    let guest = Writer::start(&cluster.socket(1), "demo", 256);
    guest.wait_for(50);
    let group = || {
        let members = cluster.status()["lockd"]["members"].take();
        let pids = members.as_array().into_iter().flatten().map(|member| member["pid"].as_u64());
        (pids.collect::<Vec<_>>(), members[0]["peer"].as_str().map(str::to_owned))
    };
    let before = group();
    let (directory, server) = (cluster.data().join("lockd1"), cluster.server());
    let place = |name, place, says| Service { name, place, log: directory.join("log"), says };
    guest.take_stall();
    feed_garbage(&[
        place("lockd over its unix socket", Place::Unix(directory.join("lockd.sock")), Some("unix socket: ")),
        place("lockd's port for replicas", Place::Tcp(before.1.clone().expect("a group of three")), None),
    ]);
    guest.wait_for(50);
    println!("a good client's longest stall meanwhile {}", ms(guest.take_stall()));
    assert_eq!((group(), cluster.server()), (before, server), "nobody died, and nothing moved");
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    guest.stop_and_verify();
}

#[test]
fn what_half_frames_make_a_daemon_hold_is_bounded() {
    let cluster = Cluster::start_with_one_arena(1);
    let guest = Writer::start(&cluster.socket(1), "demo", 256);
    guest.wait_for(50);
    let [at_server, at_lockd, at_agent, at_exporter, _] = services(&cluster);
    let [server, lockd, agent, exporter] = daemons(&cluster);
    let send = |bytes: Vec<u8>| move |peer: &mut Peer| peer.write_all(&bytes);
    guest.take_stall();

    let before = server.forget_peak();
    hold(&at_server, send(half_a_frame::<ToServer>(INTRODUCTION_BYTES_MAX - HEADER_BYTES)));
    server.assert_bounded("half frames", before, 2 * INTRODUCTION_BYTES_MAX);

    let before = agent.forget_peak();
    hold(&at_agent, send(half_a_frame::<ToAgent>(INTRODUCTION_BYTES_MAX - HEADER_BYTES)));
    agent.assert_bounded("half frames", before, 2 * INTRODUCTION_BYTES_MAX);

    // No request to lockd is longer than a piece of a lockspace with its names.
    let request = half_a_frame::<ToLockd>(IMPORT_BYTES_MAX);
    let before = lockd.forget_peak();
    hold(&at_lockd, |peer| {
        // A greeting fits, if it is what lockd says itself.
        let mut greeting = [0; 28];
        peer.read_exact(&mut greeting)?;
        peer.write_all(&greeting)?;
        peer.write_all(&request)
    });
    lockd.assert_bounded("half requests", before, 2 * IMPORT_BYTES_MAX);

    let mut option = [GO, &OPTION_BYTES_MAX.to_be_bytes()].concat();
    option.resize(option.len() + OPTION_BYTES_MAX as usize / 2, 0);
    let before = exporter.forget_peak();
    hold(&at_exporter, send(option));
    exporter.assert_bounded("half options", before, HANDSHAKE_INPUT_BYTES);

    // Payloads are written as they come; what is held is what came last.
    let before = exporter.forget_peak();
    let half = vec![0; 4 * PIECE_BYTES - 1000];
    let attached = || {
        let mut disk = Nbd::must_open(&cluster.socket(1), "demo");
        disk.send(WRITE, ASIDE, PAYLOAD_BYTES_MAX, &half);
        disk
    };
    let held: Vec<Nbd> = (0..HELD).map(|_| attached()).collect();
    drop(held);
    exporter.assert_bounded("half writes", before, INPUT_BYTES + OUTPUT_BYTES + PIECE_BYTES);

    guest.wait_for(50);
    println!("a good client's longest stall meanwhile {}", ms(guest.take_stall()));
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
    ] {
        println!("{arguments:?}: {}", cluster.refused(1, arguments));
    }
    for arguments in [
        &["volume", "create", "../etc", "--size", "1M"][..],
        &["volume", "create", "w", "--size", "many"],
        &["volume", "create", "w", "--size", "1M", "--chunk", "5000"],
        &["volume", "create", "w", "--size", "0"],
        &["volume", "create", "w"],
        &["snapshot", "create", "v"],
        &["node", "priority", "n1", "often"],
        &["no-such-command"],
        &["status", "--no-such-flag"],
    ] {
        println!("{arguments:?}: {}", cluster.refused(2, arguments));
    }
    assert!(cluster.csnap(&["volume", "list"]).contains("demo"), "nothing was lost");
}

#[test]
fn help_in_a_file_is_plain_text() {
    for (arguments, code) in
        [(&["--help"][..], 0), (&["volume", "create", "--help"], 0), (&["volume"], 2), (&[], 2)]
    {
        let output = Command::new(binary()).args(arguments).output().expect("the binary starts");
        assert_eq!(output.status.code(), Some(code), "csnap {arguments:?}");
        let text = String::from_utf8([output.stdout, output.stderr].concat()).expect("it prints text");
        assert!(text.contains("Usage: csnap") && !text.contains('\x1b'), "csnap {arguments:?}: {text:?}");
    }
}

#[test]
fn what_is_not_built_says_so_and_does_nothing() {
    let cluster = Cluster::start(1);
    cluster.csnap(&["volume", "create", "v", "--size", "1M"]);
    cluster.csnap(&["snapshot", "create", "v@a"]);
    let shown = || {
        (cluster.csnap(&["volume", "list", "--json"]), cluster.csnap(&["snapshot", "list", "--json"]), {
            cluster.csnap(&["node", "list", "--json"])
        })
    };
    let before = shown();
    for arguments in [
        &["volume", "resize", "v", "--size", "2M"][..],
        &["volume", "flatten", "v"],
        &["volume", "create", "w", "--size", "1M", "--layout", "thin"],
        &["volume", "create", "w", "--from", "v@a"],
        &["diff", "v@a", "v"],
        &["snapshot", "rollback", "v@a"],
        &["snapshot", "priority", "v@a", "-5"],
        &["clone", "v@a", "w"],
        &["attach", "v", "/dev/nbd0"],
        &["detach", "/dev/nbd0"],
        &["node", "priority", "n1", "auto"],
    ] {
        let line = cluster.refused(1, arguments);
        println!("{arguments:?}: {line}");
        assert!(line.contains("not yet"), "{arguments:?}: {line}");
    }
    assert_eq!(shown(), before, "nothing was done");
}
