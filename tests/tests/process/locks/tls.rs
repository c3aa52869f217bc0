//! Commands and lockds that require TLS: what each certificate may do, what is said to who has none, and moves between
//! groups of one authority and of two.

use std::process::Command;

use super::super::namespaces::Network;
use super::super::replicas::{Lockds, SEATS};
use super::*;

/// A certificate authority in a directory.
struct Ca(tempfile::TempDir);

impl Ca {
    fn new() -> Self {
        let ca = Self(tempfile::tempdir().expect("a directory"));
        let dir = text(ca.0.path()).to_owned();
        ca.csnap(&["cert", "ca", &dir]);
        ca
    }

    fn csnap(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(binary());
        let output = command.arg("--dir").arg(self.0.path()).args(arguments).output().expect("it starts");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("it prints text")
    }

    /// A `[tls]` for somebody who believes this authority, and those of `also`.
    fn tls(&self, role: &str, name: &str, also: &[&Self]) -> String {
        let lines = self.csnap(&["cert", role, name]);
        if also.is_empty() {
            return lines;
        }
        let all: Vec<String> = std::iter::once(&self).chain(also).map(|ca| ca.authority()).collect();
        let file = self.0.path().join(format!("believed-by-{name}.pem"));
        std::fs::write(&file, all.concat()).expect("writes");
        lines.replace(text(&self.0.path().join("ca.pem")), text(&file))
    }

    fn authority(&self) -> String {
        std::fs::read_to_string(self.0.path().join("ca.pem")).expect("it was made")
    }

    /// A file for `CSNAP_TLS`.
    fn file(&self, role: &str, name: &str, also: &[&Self]) -> PathBuf {
        let file = self.0.path().join(format!("{role}-{name}.toml"));
        std::fs::write(&file, self.tls(role, name, also)).expect("writes");
        file
    }
}

/// Status, and what was said on stderr or else on stdout; at most a line on stderr.
fn outcome(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().expect("the binary starts");
    let error = String::from_utf8(output.stderr).expect("it prints text");
    assert!(error.trim_end().lines().count() <= 1, "one line: {error}");
    let said = if error.is_empty() { String::from_utf8_lossy(&output.stdout).into_owned() } else { error };
    (output.status.code(), said)
}

fn as_whom(lockd: &Lockd, tls: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    outcome(lockd.command(arguments).env("CSNAP_TLS", tls))
}

/// Runs a command that must succeed; what it printed.
fn done(lockd: &Lockd, tls: &Path, arguments: &[&str]) -> String {
    let (status, said) = as_whom(lockd, tls, arguments);
    assert_eq!(status, Some(0), "csnap {arguments:?}: {said}");
    said
}

#[test]
fn commands_may_do_what_their_certificate_says_and_nothing_without_one() {
    let (ca, other) = (Ca::new(), Ca::new());
    let lockd = Lockd::start_with(&ca.tls("lockd", "n1", &[]));
    let [operator, client] = ["operator", "client"].map(|role| ca.file(role, "ann", &[]));
    assert!(done(&lockd, &operator, &["lockd", "show"]).contains(&lockd.address));
    assert!(done(&lockd, &operator, &["lockspace", "list"]).contains("default"));
    let script = "echo $CSNAP_LOCK_TERM";
    assert_eq!(done(&lockd, &operator, &["lock", "run", "n", "--", "sh", "-c", script]), "1\n");
    assert_eq!(done(&lockd, &client, &["lock", "run", "n", "--", "sh", "-c", script]), "2\n");
    let owner = text(&lockd.file("owner")).to_owned();
    let line = done(&lockd, &client, &["lock", "acquire", "n", "--owner", &owner]);
    let lock = line.split_whitespace().nth(1).expect("its number").to_owned();
    for (arguments, denied) in [
        (vec!["lock", "break", &lock], "denied: client ann may not break a lock"),
        (vec!["lockspace", "list"], "denied: client ann may not see, make or move lockspaces"),
        (vec!["lockd", "move", "n1"], "denied: client ann may not change the group"),
    ] {
        let (status, said) = as_whom(&lockd, &client, &arguments);
        assert!(status == Some(1) && said.contains(denied), "{arguments:?}: {status:?} {said}");
    }
    let stranger = other.file("operator", "eve", &[]);
    for arguments in
        [vec!["lock", "list"], vec!["kv", "get", "k"], vec!["lockd", "show"], vec!["lockspace", "list"]]
    {
        let (status, said) = outcome(&mut lockd.command(&arguments));
        assert!(status == Some(1) && said.contains("CSNAP_TLS names the file"), "{arguments:?}: {said}");
        let (status, said) = as_whom(&lockd, &stranger, &arguments);
        assert!(status == Some(1) && said.contains("not of a CA that we believe"), "{arguments:?}: {said}");
        let (status, said) = as_whom(&lockd, Path::new("/nowhere"), &arguments);
        assert!(status == Some(1) && said.contains("/nowhere (CSNAP_TLS)"), "{arguments:?}: {said}");
    }
    // Who may use its socket is an operator there, without a certificate.
    assert!(lockd.csnap(&["lock", "break", &lock, "--lockd", &lockd.socket()]).contains(&lock));
}

/// Holds a lock of `work` at `from`, and has `work` moved to `to`: status, and what was said.
fn moved(from: &Lockd, to: &Lockd, operator: &Path) -> (Option<i32>, String) {
    done(from, operator, &["lockspace", "create", "work"]);
    let owner = text(&from.file("owner")).to_owned();
    done(from, operator, &["lock", "acquire", "n", "--owner", &owner, "--space", "work"]);
    as_whom(from, operator, &["lockspace", "migrate", "work", "--to", &to.address])
}

#[test]
fn a_lockspace_moves_between_lockds_of_one_authority() {
    let ca = Ca::new();
    let [from, to] = ["n1", "n2"].map(|name| Lockd::start_with(&ca.tls("lockd", name, &[])));
    let operator = ca.file("operator", "ann", &[]);
    let (status, said) = moved(&from, &to, &operator);
    assert_eq!(status, Some(0), "{said}");
    for lockd in [&from, &to] {
        let said = done(lockd, &operator, &["lock", "show", "n", "--space", "work"]);
        assert!(said.contains("EX term 1"), "{said}");
    }
}

/// The operator and the destination believe both authorities, the source only its own: only the source cannot go there.
#[test]
fn a_lockspace_stays_where_it_is_if_the_source_does_not_believe_the_destination() {
    let (ca, other) = (Ca::new(), Ca::new());
    let from = Lockd::start_with(&ca.tls("lockd", "n1", &[]));
    let to = Lockd::start_with(&other.tls("lockd", "n2", &[&ca]));
    let operator = ca.file("operator", "ann", &[&other]);
    let (status, said) = moved(&from, &to, &operator);
    let why = "its certificate is not of a CA that we believe";
    let expected = format!("goes on where it was: lockd at {}: {why}", to.address);
    assert!(status == Some(1) && said.contains(&expected), "not after a wait, and with the reason: {said}");
    let said = done(&from, &operator, &["lock", "show", "n", "--space", "work"]);
    assert!(said.contains("EX term 1"), "{said}");
    // An operator who believes one of them is told so before anything stands still.
    let operator = ca.file("operator", "bob", &[]);
    let (status, said) = as_whom(&from, &operator, &["lockspace", "migrate", "work", "--to", &to.address]);
    assert!(status == Some(1) && said.contains(&format!("the destination: lockd at {}: {why}", to.address)));
}

/// Lockds, and whoever asks them.
const HOSTS: [(&str, u32); 4] = [("l1", 1), ("l2", 2), ("l3", 3), ("op", 9)];

/// Needs root, `ip` and `nft`.
#[test]
fn commands_reach_lockds_on_other_hosts_with_a_certificate_only() {
    let lockds = Lockds::on_hosts(Network::new("cli", &HOSTS), &HOSTS[..SEATS]);
    let tls = lockds.scratch().join("ann.toml");
    std::fs::write(&tls, lockds.csnap(&["cert", "operator", "ann"])).expect("writes");
    let addresses: Vec<_> = lockds.addresses().iter().map(ToString::to_string).collect();
    let command = |arguments: &[&str]| {
        let mut command = lockds.host(0).0.command("op", &binary());
        command.args(arguments).env("CSNAP_LOCKD", addresses.join(",")).stdin(Stdio::null());
        command
    };
    let csnap = |arguments: &[&str]| {
        let (status, said) = outcome(command(arguments).env("CSNAP_TLS", &tls));
        assert_eq!(status, Some(0), "csnap {arguments:?}: {said}");
        said
    };
    wait_until("one leads, and three vote", || csnap(&["lockd", "show"]).contains(" leads 3"));
    assert_eq!(csnap(&["lock", "run", "n", "--", "echo", "held"]), "held\n");
    assert!(csnap(&["lockspace", "list"]).contains("default"));
    for arguments in [["lock", "list"], ["lockd", "show"], ["lockspace", "list"]] {
        let (status, said) = outcome(&mut command(&arguments));
        let expected = "other machines are reached only with a [tls]";
        assert!(status == Some(1) && said.contains(expected) && said.contains("CSNAP_TLS"), "{said}");
    }
}
