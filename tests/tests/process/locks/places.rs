//! Where commands find what they ask for: lockds by their sockets, and lockspaces by their names.

use super::*;

#[test]
fn every_command_finds_a_lockd_by_its_socket() {
    let lockd = Lockd::start();
    let (socket, dir) = (lockd.socket(), text(lockd.dir.path()).to_owned());
    for at in [["--lockd", &socket], ["--dir", &dir]] {
        let csnap = |arguments: &[&str]| {
            let mut command = lockd.command(arguments);
            let output = command.args(at).env_remove("CSNAP_LOCKD").output().expect("the binary starts");
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "csnap {arguments:?} {at:?}: {error}");
            String::from_utf8(output.stdout).expect("it prints text")
        };
        assert!(csnap(&["lock", "watch", "--help"]).contains("--lockd"));
        csnap(&["kv", "put", "k", "v"]);
        assert_eq!(csnap(&["kv", "get", "k"]), "v");
        assert!(csnap(&["lock", "list"]).contains("NAME"));
        assert!(csnap(&["lockd", "show"]).contains(&lockd.address));
        assert!(csnap(&["lockspace", "list"]).contains("default"));
    }
    // The environment has both kinds; one of them is nobody's.
    let mut command = lockd.command(&["kv", "get", "k"]);
    let output = command.env("CSNAP_LOCKD", format!("127.0.0.1:1,{socket}")).output().expect("starts");
    assert_eq!(output.stdout, b"v");
    let line = lockd.refused(1, &["lockd", "show", "--lockd", "unix:/nowhere"]);
    assert!(line.contains("no lockd answers: lockd at unix:/nowhere: No such file"), "{line}");
    let line = lockd.refused(2, &["kv", "get", "k", "--lockd", "unix:nowhere"]);
    assert!(line.contains("absolute"), "{line}");
}

#[test]
fn lockspaces_know_nothing_of_each_other_s_locks_and_keys() {
    let lockd = Lockd::start();
    lockd.csnap(&["lockspace", "create", "work"]);
    lockd.csnap(&["kv", "put", "k", "default's"]);
    lockd.csnap(&["kv", "put", "k", "work's", "--space", "work"]);
    assert_eq!(lockd.csnap(&["kv", "get", "k"]), "default's");
    let mut command = lockd.command(&["kv", "get", "k"]);
    let output = command.env("CSNAP_LOCKSPACE", "work").output().expect("the binary starts");
    assert_eq!(output.stdout, b"work's");
    let holds = ["lock", "run", "n", "--no-wait", "--", "sh", "-c"];
    let inside = format!("{} lock run n --no-wait -- true", binary().display());
    let [other, same] = [" --space work", ""].map(|space| inside.replace(" -- ", &format!("{space} -- ")));
    lockd.csnap(&[&holds[..], &[&other]].concat());
    assert!(lockd.refused(124, &[&holds[..], &[&same]].concat()).contains("not free"));
    let line = lockd.refused(1, &["lock", "list", "--space", "nothing"]);
    assert!(line.contains("no lockspace nothing"), "{line}");
    lockd.refused(2, &["lock", "list", "--space", "a/b"]);
}
