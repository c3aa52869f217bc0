//! Locks and keys as people and scripts have them: `csnap lock` and `csnap kv` against a lockd of the test's own.

mod keys;
mod owners;
mod places;
mod run;
mod tls;
mod watches;

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use serde_json::Value;

use super::cluster::{binary, is_alive, signal, wait_until};

/// A lockd in a temporary directory. Killed when it goes.
struct Lockd {
    dir: tempfile::TempDir,
    child: Option<Child>,
    address: String,
}

impl Lockd {
    fn start() -> Self {
        Self::start_with("")
    }

    /// With more in its configuration.
    fn start_with(more: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("csnap-lockd-").tempdir().expect("a temporary directory");
        let at = dir.path().display();
        let config = format!(
            "node = 'n1'\ndir = '{at}/data'\nlisten = ['127.0.0.1:0']\nlisten_unix = '{at}/lockd.sock'\n{more}"
        );
        std::fs::write(dir.path().join("lockd.toml"), config).expect("a configuration");
        let mut lockd = Self { dir, child: None, address: String::new() };
        lockd.go_on();
        lockd
    }

    /// Starts it, again or for the first time; it keeps its address.
    fn go_on(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log"));
        let lockd = Command::new(binary())
            .args(["lockd", "--config"])
            .arg(self.dir.path().join("lockd.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.expect("a log"))
            .spawn();
        self.child = Some(lockd.expect("the binary starts"));
        let address = self.dir.path().join("data/address");
        wait_until("lockd listens", || {
            self.address = std::fs::read_to_string(&address).unwrap_or_default().trim().to_owned();
            std::net::TcpStream::connect(&self.address).is_ok()
        });
    }

    fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("it is ours to kill");
        child.wait().expect("it ends");
    }

    /// A file of the test's own.
    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(arguments).env("CSNAP_LOCKD", &self.address).current_dir(self.dir.path());
        command.stdin(Stdio::null());
        command
    }

    /// As `--lockd` takes its socket.
    fn socket(&self) -> String {
        format!("unix:{}", self.file("lockd.sock").display())
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the binary starts")
    }

    /// Runs a command that must succeed; what it printed.
    fn csnap(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "csnap {arguments:?}: {} {error}", output.status);
        String::from_utf8(output.stdout).expect("it prints text")
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let text = self.csnap(&[arguments, &["--json"]].concat());
        serde_json::from_str(&text).expect("JSON")
    }

    /// Runs a command that must end with this status and one line; the line.
    fn refused(&self, status: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let error = String::from_utf8(output.stderr).expect("it prints text");
        assert_eq!(output.status.code(), Some(status), "csnap {arguments:?}: {error}");
        assert_eq!(error.trim_end().lines().count(), 1, "one line: {error}");
        error
    }

    /// Starts `csnap lock run NAME OPTIONS -- sh -c SCRIPT`.
    fn holder(&self, name: &str, options: &[&str], script: &str) -> Holder {
        let words = [&["lock", "run", name], options, &["--", "sh", "-c", script]].concat();
        let child = self.command(&words).stderr(Stdio::piped()).spawn().expect("the binary starts");
        Holder { child: Some(child) }
    }

    /// What the file says once it is there and ends with a line.
    fn written(&self, name: &str) -> String {
        let mut text = String::new();
        wait_until(&format!("{name} is written"), || {
            text = std::fs::read_to_string(self.file(name)).unwrap_or_default();
            text.ends_with('\n')
        });
        text.trim_end().to_owned()
    }

    /// A process id that a command wrote.
    fn pid(&self, name: &str) -> u32 {
        self.written(name).parse().expect("a number")
    }

    /// The locks that are there.
    fn locks(&self) -> Vec<Value> {
        self.json(&["lock", "list"]).as_array().expect("a list").clone()
    }
}

impl Drop for Lockd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.file("log")).unwrap_or_default();
            eprintln!("--- lockd\n{log}");
        }
        if self.child.is_some() {
            self.kill();
        }
    }
}

/// A `csnap lock run` under way. Killed when it goes.
struct Holder {
    child: Option<Child>,
}

impl Holder {
    fn pid(&self) -> u32 {
        self.child.as_ref().expect("under way").id()
    }

    /// The process between it and its command.
    fn guard(&self) -> u32 {
        let pid = self.pid();
        let mut guard = None;
        wait_until("the guard runs", || {
            let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
            guard = children.unwrap_or_default().split_whitespace().next().and_then(|pid| pid.parse().ok());
            guard.is_some()
        });
        guard.expect("just found")
    }

    /// How it ended, and what it said.
    fn ended(mut self) -> (Option<i32>, String) {
        let output = self.child.take().expect("under way").wait_with_output().expect("it ends");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            signal(child.id(), "CONT");
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A `csnap … watch --json`, and what it says.
struct Watch {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Watch {
    fn start(lockd: &Lockd, arguments: &[&str]) -> Self {
        let mut child = lockd
            .command(&[arguments, &["--json"]].concat())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        Self { child, lines }
    }

    fn next(&mut self) -> Value {
        let line = self.lines.next().expect("it watches on").expect("text");
        serde_json::from_str(&line).expect("JSON")
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether nothing of the process runs any more.
fn gone(pid: u32) -> bool {
    !is_alive(pid)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary directories are text")
}
