//! Certificates that `csnap cert` makes, in the hands of others: nbdkit, libnbd and qemu take them, and refuse what is not
//! theirs.

use std::path::Path;
use std::process::{Command, Output};

use super::cluster::binary;

/// What is served.
const SIZE: &str = "1048576";

fn csnap(dir: &Path, arguments: &[&str]) {
    let output = Command::new(binary()).arg("--dir").arg(dir).args(arguments).output().expect("it starts");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A directory as NBD programs want it: `end` is client or server.
fn directory(of: &Path, name: &str, end: &str) -> String {
    let dir = of.join(format!("{end}-{name}"));
    std::fs::create_dir(&dir).expect("new");
    let ca = "ca.pem".to_owned();
    for (from, to) in [
        (ca, "ca-cert.pem".to_owned()),
        (format!("{name}.pem"), format!("{end}-cert.pem")),
        (format!("{name}.key"), format!("{end}-key.pem")),
    ] {
        std::fs::copy(of.join(from), dir.join(to)).expect("copies");
    }
    dir.to_str().expect("UTF-8").to_owned()
}

/// Runs a command while nbdkit serves with TLS, for clients with a certificate of its CA alone.
fn served(server: &str, command: &str) -> Output {
    let nbdkit = Command::new("nbdkit")
        .args(["--exit-with-parent", "-U", "-", "--tls=require", "--tls-verify-peer"])
        .arg(format!("--tls-certificates={server}"))
        .args(["memory", SIZE, "--run", command])
        .output();
    nbdkit.unwrap_or_else(|error| panic!("nbdkit does not start ({error}); ./test installs it"))
}

fn says_size(output: &Output) {
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains(SIZE),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn nbd_clients_and_servers_take_them() {
    let dirs = [0, 1].map(|_| tempfile::tempdir().expect("a directory"));
    for dir in &dirs {
        let dir = dir.path();
        csnap(dir, &["cert", "ca", dir.to_str().expect("UTF-8")]);
        csnap(dir, &["cert", "node", "n1", "--host", "localhost", "--host", "127.0.0.1"]);
        csnap(dir, &["cert", "client", "vm"]);
    }
    let server = directory(dirs[0].path(), "node-n1", "server");
    let [client, stranger] = [0, 1].map(|n| directory(dirs[n].path(), "client-vm", "client"));
    let nbdinfo = |client: &str| {
        format!("nbdinfo --size \"nbds+unix:///?socket=$unixsocket&tls-certificates={client}\"")
    };
    says_size(&served(&server, &nbdinfo(&client)));
    assert!(!served(&server, &nbdinfo(&stranger)).status.success(), "of another CA");
    let copy =
        format!("nbdcopy \"nbds+unix:///?socket=$unixsocket&tls-certificates={client}\" - | wc --bytes");
    says_size(&served(&server, &copy));
    let qemu = format!(
        "qemu-img info --object tls-creds-x509,id=t,endpoint=client,dir={client} --image-opts \
         driver=nbd,server.type=unix,server.path=$unixsocket,tls-creds=t,tls-hostname=localhost --output=json"
    );
    says_size(&served(&server, &qemu));
}
