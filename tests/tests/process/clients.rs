//! Real NBD clients, as witnesses that we speak NBD and not a dialect of our own.

use std::path::Path;
use std::process::{Command, Output};

use super::cluster::Cluster;

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output();
    output.unwrap_or_else(|error| panic!("{program} does not start ({error}); ./test installs it"))
}

pub(crate) fn must(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

pub(crate) fn path(path: &Path) -> &str {
    path.to_str().expect("temporary directories are text")
}

#[test]
fn nbdinfo_sees_volumes_and_snapshots() {
    let cluster = Cluster::start(1);
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    let info = must("nbdinfo", &["--json", &cluster.uri(1, "demo")]);
    let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 1 << 30);
    for flag in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"] {
        assert_eq!(export[flag], true, "{flag}");
    }
    let snapshot = must("nbdinfo", &["--json", &cluster.uri(1, "demo@a")]);
    let snapshot: serde_json::Value = serde_json::from_str(&snapshot).expect("JSON");
    assert_eq!(snapshot["exports"][0]["is_read_only"], true);
    let list = must("nbdinfo", &["--list", &cluster.uri(1, "")]);
    assert!(list.contains("demo") && list.contains("demo@a"), "{list}");
    must("nbdinfo", &["--map", &cluster.uri(1, "demo")]);
}

#[test]
fn nbdcopy_goes_both_ways_with_four_connections() {
    let cluster = Cluster::start(1);
    let (image, back) = (cluster.scratch().join("image"), cluster.scratch().join("back"));
    must("truncate", &["-s", "1G", path(&image)]);
    must("mkfs.ext4", &["-q", "-F", "-d", "/usr/share/doc", path(&image)]);
    let uri = cluster.uri(1, "demo");
    must("nbdcopy", &["--connections=4", path(&image), &uri]);
    must("nbdcopy", &["--connections=4", &uri, path(&back)]);
    must("cmp", &[path(&image), path(&back)]);
    must("nbdcopy", &[&format!("nbd://{}/demo", cluster.tcp()), path(&back)]);
    must("cmp", &[path(&image), path(&back)]);
    let bytes = std::fs::metadata(&back).expect("it is there").len();
    println!("{bytes} bytes of an ext4 image copied in once and out twice, no difference");
}

#[test]
fn qemu_tools_read_write_compare_and_map() {
    let cluster = Cluster::start(1);
    let uri = cluster.uri(1, "demo");
    let script = [
        "-c",
        "write -P 0x11 0 1M",
        "-c",
        "write -f -P 0x22 512k 64k",
        "-c",
        "write -z 128k 64k",
        "-c",
        "flush",
        "-c",
        "read -P 0x22 512k 64k",
        "-c",
        "read -P 0 128k 64k",
        "-c",
        "discard 0 64k",
        "-c",
        "write -P 0x33 513 3",
    ];
    let output = must("qemu-io", &[&["-f", "raw"][..], &script, &[&uri]].concat());
    assert!(!output.contains("failed") && !output.contains("Pattern verification"), "{output}");
    let copy = cluster.scratch().join("copy.qcow2");
    must("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, path(&copy)]);
    let compared = must("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, path(&copy)]);
    assert!(compared.contains("identical"), "{compared}");
    must("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
}

#[test]
fn fio_verifies_what_it_wrote_over_a_snapshot() {
    let cluster = Cluster::start(1);
    let uri = format!("--uri={}", cluster.uri(1, "demo"));
    let job = [
        "--name=v",
        "--ioengine=nbd",
        "--bs=4k",
        "--iodepth=32",
        "--size=32M",
        "--verify=crc32c",
        "--verify_state_save=0",
    ];

    let fio = |more: &[&str]| must("fio", &[&job[..], more, &[&uri]].concat());
    fio(&["--rw=randwrite", "--verify_fatal=1"]);
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    fio(&["--rw=randwrite", "--verify_fatal=1", "--randseed=7"]);
    println!("fio verified 32 MiB, before and after a snapshot");
}
