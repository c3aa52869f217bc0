//! Members of a real etcd.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::cluster::wait_until;

/// A member that answers takes a fraction of it.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// The program under which agents are tested.
fn program() -> PathBuf {
    let path = std::env::var_os("CSNAP_ETCD").map(PathBuf::from);
    let path = path
        .expect("CSNAP_ETCD names the etcd of Debian's package etcd-server: run ./test, which unpacks it");
    assert!(path.exists(), "{} is not there: run ./test, which unpacks it", path.display());
    path
}

struct Member {
    name: String,
    client: SocketAddr,
    peer: SocketAddr,
    process: Option<Child>,
}

/// A group of members, each with a directory below one.
pub(crate) struct Etcd {
    dir: PathBuf,
    members: Vec<Member>,
}

impl Etcd {
    /// Starts so many members and waits for a leader.
    pub(crate) fn start(dir: &Path, count: usize) -> Self {
        let addresses = free_addresses(2 * count);
        let members = addresses.chunks(2).zip(1..).map(|(pair, number)| Member {
            name: format!("m{number}"),
            client: pair[0],
            peer: pair[1],
            process: None,
        });
        let mut etcd = Self { dir: dir.to_owned(), members: members.collect() };
        (0..count).for_each(|member| etcd.start_member(member));
        etcd.leader();
        etcd
    }

    pub(crate) fn start_member(&mut self, member: usize) {
        let peers = self.members.iter().map(|m| format!("{}=http://{}", m.name, m.peer));
        let cluster = peers.collect::<Vec<_>>().join(",");
        let Member { name, client, peer, process } = &mut self.members[member];
        assert!(process.is_none(), "{name} runs");
        let log = self.dir.join(format!("{name}.log"));
        let log = File::options().create(true).append(true).open(log).expect("a log");
        let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
        let started = Command::new(program())
            .args(["--name", name])
            .arg("--data-dir")
            .arg(self.dir.join(&*name))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &cluster, "--initial-cluster-token", "csnap-test"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn();
        *process = Some(started.expect("etcd starts"));
    }

    /// A member dies.
    pub(crate) fn kill(&mut self, member: usize) {
        let mut process = self.members[member].process.take().expect("it runs");
        process.kill().expect("it is ours to kill");
        process.wait().expect("it ends");
    }

    pub(crate) fn pid(&self, member: usize) -> u32 {
        self.members[member].process.as_ref().expect("it runs").id()
    }

    /// What an agent is told.
    pub(crate) fn endpoints(&self) -> Vec<SocketAddr> {
        self.members.iter().map(|member| member.client).collect()
    }

    /// The member that leads, as a majority of those that run says; waits until there is one.
    pub(crate) fn leader(&self) -> usize {
        let mut leader = None;
        wait_until("etcd has a leader", || {
            leader = (0..self.members.len()).find(|member| {
                self.members[*member].process.is_some()
                    && self
                        .status(*member)
                        .is_some_and(|status| status["leader"] == status["header"]["member_id"])
            });
            leader.is_some()
        });
        leader.expect("just found")
    }

    /// `/v3/maintenance/status` of a member, if it answers.
    fn status(&self, member: usize) -> Option<Value> {
        let address = self.members[member].client;
        let mut stream = TcpStream::connect_timeout(&address, ANSWER_WITHIN).ok()?;
        stream.set_read_timeout(Some(ANSWER_WITHIN)).ok()?;
        let request = format!(
            "POST /v3/maintenance/status HTTP/1.0\r\nHost: {address}\r\nContent-Length: 2\r\n\r\n{{}}"
        );
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let body = &answer[answer.find('{')?..=answer.rfind('}')?];
        serde_json::from_str(body).ok()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for process in self.members.iter_mut().filter_map(|member| member.process.as_mut()) {
            let _ = process.kill();
            let _ = process.wait();
        }
        if std::thread::panicking() {
            for member in &self.members {
                let log = std::fs::read_to_string(self.dir.join(format!("{}.log", member.name)));
                let log = log.unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(20).collect();
                eprintln!("--- etcd {}", member.name);
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
    }
}

/// Free addresses, all held until all are chosen. etcd must be told which before it starts.
fn free_addresses(count: usize) -> Vec<SocketAddr> {
    let held: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
    held.iter().map(|listener| listener.local_addr().expect("it is bound")).collect()
}
