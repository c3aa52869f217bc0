//! Real clients against an exporter with a real server behind it: libnbd (nbdinfo, nbdcopy, its Python binding with all
//! checks switched off), QEMU (qemu-img, qemu-io), fio, and the legacy client of the `nbd` crate.
//!
//! A missing program fails the test with the name of its package; nothing is skipped in silence.

#[path = "support/cluster.rs"]
mod cluster;
mod support;

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use cluster::{Cluster, Daemon};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

/// An exporter of the volume `disk`.
struct Disk {
    socket: PathBuf,
    _exporter: Daemon,
    cluster: Cluster,
}

impl Disk {
    fn new() -> Self {
        let cluster = Cluster::start();
        cluster.create_volume("disk", SIZE);
        let (exporter, socket) = cluster.start_exporter("n1");
        Self { socket, _exporter: exporter, cluster }
    }

    /// Of an export, or of all if it has no name.
    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// A snapshot, and its URI.
    fn snapshot(&self, name: &str) -> String {
        self.cluster.create_snapshot(&format!("disk@{name}"));
        self.uri(&format!("disk@{name}"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    fn dir(&self) -> &Path {
        self.cluster.dir.path()
    }
}

/// Runs `program`; gives its standard output. `package` is where it comes from.
fn run(dir: &Path, package: &str, program: &str, arguments: &[&str]) -> String {
    let result = Command::new(program).args(arguments).current_dir(dir).output();
    let output = result.unwrap_or_else(|error| panic!("{program}: {error}: install the package {package}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{text}\n{errors}", output.status);
    text
}

/// A file with data, holes and zeros at odd places.
fn write_image(path: &Path) {
    let mut file = std::fs::File::create(path).expect("creates");
    file.set_len(SIZE).expect("grows");
    for (index, at) in [0, 3 * MIB + 512, 17 * MIB, 40 * MIB - 4096, SIZE - 70_000].into_iter().enumerate() {
        let byte = |at: usize| u8::try_from((at * 31 / 8 + index) % 251).expect("below 251");
        let data: Vec<u8> = (0..70_000).map(byte).collect();
        file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(&data)).expect("writes");
    }
}

fn assert_equal(a: &Path, b: &Path) {
    assert!(
        std::fs::read(a).expect("readable") == std::fs::read(b).expect("readable"),
        "{a:?} and {b:?} differ"
    );
}

#[test]
fn nbdinfo_sees_what_is_there() {
    let disk = Disk::new();
    let info = run(disk.dir(), "libnbd-bin", "nbdinfo", &["--json", &disk.uri("disk")]);
    for expected in [
        "\"export-size\": 67108864",
        "\"is_read_only\": false",
        "\"can_multi_conn\": true",
        "\"can_fast_zero\": false",
        "\"can_df\": true",
        "\"base:allocation\"",
        "\"block_size_preferred\": 4096",
        "\"block_size_minimum\": 1",
    ] {
        assert!(info.contains(expected), "{expected} in {info}");
    }
    let frozen = disk.snapshot("frozen");
    let list = run(disk.dir(), "libnbd-bin", "nbdinfo", &["--list", &disk.uri("")]);
    assert!(list.contains("export=\"disk\"") && list.contains("export=\"disk@frozen\""), "{list}");
    let read_only = run(disk.dir(), "libnbd-bin", "nbdinfo", &["--json", &frozen]);
    assert!(read_only.contains("\"is_read_only\": true"), "{read_only}");
}

#[test]
fn nbdcopy_brings_an_image_in_and_out() {
    let disk = Disk::new();
    let (image, back) = (disk.path("image"), disk.path("back"));
    write_image(&image);
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    run(disk.dir(), "libnbd-bin", "nbdcopy", &["--flush", &text(&image), &disk.uri("disk")]);
    let frozen = disk.snapshot("frozen");
    for uri in [&disk.uri("disk"), &frozen] {
        run(disk.dir(), "libnbd-bin", "nbdcopy", &[uri, &text(&back)]);
        assert_equal(&image, &back);
    }
    let map = run(disk.dir(), "libnbd-bin", "nbdinfo", &["--map", &disk.uri("disk")]);
    assert!(map.contains("hole,zero") && map.contains("data"), "{map}");
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let disk = Disk::new();
    let image = disk.path("image");
    write_image(&image);
    let (image, uri) = (image.to_str().expect("UTF-8"), disk.uri("disk"));
    let qemu = |arguments: &[&str]| run(disk.dir(), "qemu-utils", "qemu-img", arguments);
    qemu(&["convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", image, &uri]);
    qemu(&["compare", "-f", "raw", "-F", "raw", image, &uri]);
    let map = qemu(&["map", "-f", "raw", "--output=json", &uri]);
    assert!(map.contains("\"zero\": true, \"data\": false"), "{map}");
    qemu(&["bench", "-f", "raw", "-c", "5000", "-d", "64", "-w", "--flush-interval", "100", &uri]);
}

#[test]
fn qemu_io_writes_zeroes_and_discards() {
    let disk = Disk::new();
    let uri = disk.uri("disk");
    let commands = [
        "write -P 0xaa 0 4M",
        "write -f -P 0xbb 1M 64k",
        "read -P 0xaa 0 1M",
        "read -P 0xbb 1M 64k",
        "write -z 0 64k",
        "read -P 0 0 64k",
        "write -z -u 64k 64k",
        "read -P 0 64k 64k",
        "write -z 128k 64k",
        "discard 2M 1M",
        "read -P 0 2M 1M",
        "read -P 0xaa 3M 1M",
        "write -P 0xcc 12345 513",
        "read -P 0xcc 12345 513",
        "aio_write -P 0xdd 8M 8M",
        "aio_flush",
        "read -P 0xdd 8M 8M",
        "flush",
        "map",
    ];
    let mut arguments = vec!["-f", "raw"];
    commands.iter().for_each(|command| arguments.extend(["-c", *command]));
    arguments.push(&uri);
    let text = run(disk.dir(), "qemu-utils", "qemu-io", &arguments);
    assert!(!text.contains("failed") && !text.contains("rror"), "{text}");
}

#[test]
fn fio_verifies_what_it_wrote() {
    let disk = Disk::new();
    let uri = format!("--uri={}", disk.uri("disk"));
    let jobs = [
        ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--fsync=64"],
        ["--rw=randrw", "--bs=512-64k", "--iodepth=16", "--fsync=64"],
        ["--rw=write", "--bs=1M", "--iodepth=8", "--fsync=8"],
    ];
    for job in jobs {
        let common =
            ["--name=v", "--ioengine=nbd", &uri, "--size=48M", "--verify=crc32c", "--verify_fatal=1"];
        let arguments = [&common[..], &job, &["--verify_state_save=0", "--verify_backlog=256"]].concat();
        run(disk.dir(), "fio", "fio", &arguments);
    }
}

#[test]
fn libnbd_without_its_own_checks_gets_the_errors_of_the_protocol() {
    let disk = Disk::new();
    let script = disk.path("strict.py");
    std::fs::write(&script, include_str!("interop.py")).expect("writes");
    let script = script.to_str().expect("UTF-8");
    // The packaged Python: the binding is installed for no other.
    let text = run(
        disk.dir(),
        "python3-libnbd",
        "/usr/bin/python3",
        &[script, &disk.uri("disk"), &disk.snapshot("frozen")],
    );
    assert!(text.ends_with("all as it should be\n"), "{text}");
}

#[test]
fn a_legacy_client_reads_and_writes() {
    let disk = Disk::new();
    let mut stream = UnixStream::connect(&disk.socket).expect("connects");
    let export = nbd::client::handshake(&mut stream, b"disk").expect("a handshake by EXPORT_NAME");
    assert_eq!(export.size, SIZE);
    let mut client = nbd::client::NbdClient::new(&mut stream, &export);
    client.seek(SeekFrom::Start(12345)).expect("seeks");
    client.write_all(b"as in 1997").expect("writes");
    client.seek(SeekFrom::Start(12340)).expect("seeks");
    let mut back = [0; 20];
    client.read_exact(&mut back).expect("reads");
    assert_eq!(&back, b"\0\0\0\0\0as in 1997\0\0\0\0\0");
}
