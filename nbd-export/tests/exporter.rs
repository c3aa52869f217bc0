//! The exporter with a real server behind it: names, attachments, failover, reports.

#[path = "support/cluster.rs"]
mod cluster;
mod support;

use cluster::Cluster;
use csnap_nbd_export::core::wire::{command as cmd, option, option_reply};
use csnap_proto::Name;
use csnap_proto::message::operate::{OperatorReply, OperatorRequest};
use support::client::{Client, go_bytes, option_bytes};
use support::wait_until;

const MIB: usize = 1 << 20;

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

/// Sessions that have `volume` or a snapshot of it open, as the server knows.
fn attached(cluster: &Cluster, volume: &str) -> usize {
    match cluster.operate(OperatorRequest::VolumeShow { name: name(volume) }) {
        OperatorReply::Volume(info) => info.attached.len(),
        other => panic!("{other:?}"),
    }
}

fn write(client: &mut Client, offset: u64, data: &[u8]) {
    client.request(cmd::WRITE, 0, 1, offset, u32::try_from(data.len()).expect("short"), data);
    assert_eq!(client.reply().expect("an answer").errno, 0);
}

fn read(client: &mut Client, offset: u64, len: u32) -> Vec<u8> {
    client.request(cmd::READ, 0, 2, offset, len, b"");
    let reply = client.reply().expect("an answer");
    assert_eq!((reply.errno, reply.message.as_str()), (0, ""));
    reply.bytes()
}

fn flush(client: &mut Client) {
    client.request(cmd::FLUSH, 0, 3, 0, 0, b"");
    assert_eq!(client.reply().expect("an answer").errno, 0);
}

/// The answer to a GO for `export`.
fn go(socket: &std::path::Path, export: &str) -> (u32, String) {
    let mut client = Client::connect(socket);
    client.send(&[&3u32.to_be_bytes()[..], &go_bytes(export)].concat());
    let (_, kind, text) = client.option_reply();
    (kind, String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn volumes_and_snapshots_have_names() {
    let cluster = Cluster::start();
    let (_exporter, socket) = cluster.start_exporter("n1");
    assert_eq!(go(&socket, ""), (option_reply::ERR_UNKNOWN, "there is no volume yet".to_owned()));
    cluster.create_volume("other", 16 * MIB as u64);
    assert_eq!(go(&socket, "").0, option_reply::INFO, "the only volume");
    cluster.create_volume("third", 16 * MIB as u64);
    let (kind, text) = go(&socket, "");
    assert!(kind == option_reply::ERR_UNKNOWN && text.contains("name one"), "{text}");
    cluster.create_volume("demo", 16 * MIB as u64);
    cluster.create_snapshot("demo@a");
    for (export, kind) in [
        ("", option_reply::INFO),
        ("demo@a", option_reply::INFO),
        ("none", option_reply::ERR_UNKNOWN),
        ("demo@none", option_reply::ERR_UNKNOWN),
        ("../etc", option_reply::ERR_UNKNOWN),
    ] {
        assert_eq!(go(&socket, export).0, kind, "{export:?}");
    }
    let mut client = Client::connect(&socket);
    client.send(&[&3u32.to_be_bytes()[..], &option_bytes(option::LIST, b"")].concat());
    let mut names = Vec::new();
    loop {
        let (_, kind, data) = client.option_reply();
        if kind == option_reply::ACK {
            break;
        }
        let len = u32::from_be_bytes(data[..4].try_into().expect("four bytes")) as usize;
        names.push(String::from_utf8_lossy(&data[4..4 + len]).into_owned());
    }
    assert_eq!(names, ["demo", "demo@a", "other", "third"]);
}

#[test]
fn a_snapshot_keeps_what_the_head_overwrites() {
    let cluster = Cluster::start();
    cluster.create_volume("demo", 16 * MIB as u64);
    let (_exporter, socket) = cluster.start_exporter("n1");
    let mut head = Client::attach(&socket, "demo", true);
    write(&mut head, 4096, &[1; 3 * MIB]);
    cluster.create_snapshot("demo@a");
    let mut frozen = Client::attach(&socket, "demo@a", true);
    assert!(read(&mut frozen, 4096, 3 << 20) == [1; 3 * MIB]);
    write(&mut head, 0, &[2; MIB]);
    flush(&mut head);
    assert!(read(&mut head, 0, 1 << 20) == [2; MIB]);
    assert_eq!(read(&mut frozen, 0, 4096), [0; 4096]);
    assert!(read(&mut frozen, 4096, 3 << 20) == [1; 3 * MIB]);
    frozen.request(cmd::WRITE, 0, 4, 0, 512, &[3; 512]);
    assert_eq!(frozen.reply().expect("an answer").errno, 1, "read-only");
    head.request(cmd::WRITE_ZEROES, 0, 5, 4096, 1 << 20, b"");
    assert_eq!(head.reply().expect("an answer").errno, 0);
    head.request(cmd::TRIM, 0, 6, 2 << 20, 1 << 20, b"");
    assert_eq!(head.reply().expect("an answer").errno, 0);
    assert!(read(&mut head, 4096, 1 << 20) == [0; MIB]);
    assert!(read(&mut frozen, 4096, 3 << 20) == [1; 3 * MIB]);
}

#[test]
fn one_exporter_has_a_volume_until_its_last_connection_ends() {
    let cluster = Cluster::start();
    cluster.create_volume("demo", 16 * MIB as u64);
    let (_one, first) = cluster.start_exporter("n1");
    let (_two, second) = cluster.start_exporter("n2");
    let mut info = Client::connect(&first);
    info.send(&[&3u32.to_be_bytes()[..], &option_bytes(option::INFO, b"\0\0\0\x04demo\0\0")].concat());
    assert_eq!(info.option_reply().1, option_reply::INFO);
    assert_eq!(attached(&cluster, "demo"), 0, "INFO attaches nothing");

    let mut a = Client::attach(&first, "demo", true);
    let mut b = Client::attach(&first, "demo", false);
    assert_eq!(attached(&cluster, "demo"), 1, "connections share an attachment");
    let (kind, text) = go(&second, "demo");
    assert_eq!(kind, option_reply::ERR_POLICY);
    assert!(text.contains("n1"), "the holder is named: {text}");
    write(&mut a, 0, &[5; 4096]);
    assert_eq!(read(&mut b, 0, 4096), [5; 4096]);
    drop(a);
    flush(&mut b);
    assert_eq!(attached(&cluster, "demo"), 1);
    drop(b);
    wait_until("it is given back", || attached(&cluster, "demo") == 0);
    let mut other = Client::attach(&second, "demo", true);
    assert_eq!(read(&mut other, 0, 4096), [5; 4096]);
}

#[test]
fn a_name_means_what_it_is_called_now() {
    let cluster = Cluster::start();
    let (_exporter, socket) = cluster.start_exporter("n1");
    let rename = |from: &str, to: &str| {
        cluster.operate(OperatorRequest::VolumeRename { from: name(from), to: name(to) });
    };
    cluster.create_volume("demo", 16 * MIB as u64);
    let mut guest = Client::attach(&socket, "demo", true);
    write(&mut guest, 0, &[1; 4096]);
    cluster.create_snapshot("demo@a");
    let mut reader = Client::attach(&socket, "demo@a", true);

    rename("demo", "old");
    cluster.create_volume("demo", 8 * MIB as u64);
    let mut other = Client::attach(&socket, "demo", true);
    assert_eq!(read(&mut other, 0, 4096), [0; 4096], "a new volume, not the guest's");
    write(&mut other, 0, &[2; 4096]);
    assert_eq!(read(&mut guest, 0, 4096), [1; 4096]);
    let mut second = Client::attach(&socket, "old", true);
    assert_eq!(read(&mut second, 0, 4096), [1; 4096], "the guest's disk by its new name");
    assert_eq!((attached(&cluster, "old"), attached(&cluster, "demo")), (2, 1));
    wait_until("the report names them as they were opened last", || {
        let told: Vec<String> = cluster.reports().iter().map(|report| report.target.to_string()).collect();
        told == ["old", "demo@a", "demo"]
    });

    write(&mut guest, 0, &[3; 4096]);
    let from = "old@a".parse().expect("a target");
    cluster.operate(OperatorRequest::SnapshotRename { target: from, to: name("b") });
    cluster.create_snapshot("old@a");
    let mut younger = Client::attach(&socket, "old@a", true);
    assert_eq!(read(&mut younger, 0, 4096), [3; 4096], "the snapshot that has the name now");
    assert_eq!(read(&mut reader, 0, 4096), [1; 4096]);

    let target = "old@a".parse().expect("a target");
    cluster.operate(OperatorRequest::SnapshotDelete { target, force: true });
    cluster.create_snapshot("old@a");
    let mut youngest = Client::attach(&socket, "old@a", true);
    assert_eq!(read(&mut youngest, 0, 4096), [3; 4096], "a reader of the deleted one is not in the way");
    drop(younger);
}

#[test]
fn connections_outlive_servers_and_requests_wait() {
    let mut cluster = Cluster::start();
    cluster.create_volume("demo", 16 * MIB as u64);
    cluster.create_snapshot("demo@a");
    let (_exporter, socket) = cluster.start_exporter("n1");
    let mut head = Client::attach(&socket, "demo", true);
    let mut frozen = Client::attach(&socket, "demo@a", true);
    for round in 2..5u8 {
        write(&mut head, 0, &[1; 4096]);
        cluster.kill_server();
        // What is known needs no server; a first write after a snapshot, and a snapshot read, wait for one.
        write(&mut head, 0, &[round; 4096]);
        let place = u64::from(round) * MIB as u64;
        head.request(cmd::WRITE, 0, 1, place, 4096, &[round; 4096]);
        frozen.request(cmd::READ, 0, 1, place, 4096, b"");
        assert_eq!(read(&mut head, 0, 4096), vec![round; 4096], "a request that waits holds up no other");
        // Only a server knows what a name means now: who joins waits for it.
        let joining = std::thread::spawn({
            let socket = socket.clone();
            move || Client::attach(&socket, "demo", true)
        });
        cluster.start_server();
        let mut late = joining.join().expect("joined");
        assert_eq!(read(&mut late, 0, 4096), vec![round; 4096]);
        assert_eq!(head.reply().expect("an answer").errno, 0);
        assert_eq!(frozen.reply().expect("an answer").bytes(), [0; 4096]);
        cluster.create_snapshot(&format!("demo@s{round}"));
    }
}

#[test]
fn the_agent_is_told_what_is_attached_and_may_be_replaced() {
    let cluster = Cluster::start();
    cluster.create_volume("demo", 16 * MIB as u64);
    let (_exporter, socket) = cluster.start_exporter("n1");
    let told = |connections: &[u32]| {
        wait_until("the report is right", || {
            cluster.reports().iter().map(|report| report.connections).collect::<Vec<_>>() == connections
        });
    };
    let mut a = Client::attach(&socket, "demo", true);
    told(&[1]);
    let b = Client::attach(&socket, "demo", true);
    told(&[2]);
    cluster.create_snapshot("demo@a");
    write(&mut a, 0, &[1; 4096]);
    let asked = |message: &str| cluster.reports()[0].messages.get(message).copied().unwrap_or(0);
    cluster.ask_for_reports();
    wait_until("counts are reported", || asked("QueryWrite") == 1 && asked("WriteOk") == 1);
    write(&mut a, 0, &[2; 4096]);
    cluster.forget_exporters();
    told(&[2]);
    assert_eq!(asked("QueryWrite"), 1, "a rewrite asks nothing");
    assert_eq!(read(&mut a, 0, 4096), [2; 4096], "the connections did not notice");
    drop(b);
    told(&[1]);
    drop(a);
    told(&[]);
}
