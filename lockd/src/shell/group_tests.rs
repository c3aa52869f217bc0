//! Three daemons as they are, on real directories and real sockets.

use csnap_proto::message::lock::{LockOp, LockReply, Mode, ValueChange};
use csnap_proto::{LockId, Name, Term};

use super::tests::{Running, client, granted_term, lock, runtime, start_with};
use super::*;
use crate::client::shell::LockSession;

/// An address that was free a moment ago.
fn free_address() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("it has one")
}

pub(super) struct Group {
    dirs: Vec<tempfile::TempDir>,
    configs: Vec<LockdConfig>,
    running: Vec<Option<Running>>,
}

impl Group {
    pub(super) async fn start() -> Self {
        let peers: Vec<SocketAddr> = (0..3).map(|_| free_address()).collect();
        let dirs: Vec<tempfile::TempDir> =
            (0..3).map(|_| tempfile::tempdir().expect("a directory")).collect();
        let config = |n: usize| LockdConfig {
            node: Name::new(format!("n{n}")).expect("a name"),
            dir: dirs[n].path().join("data"),
            listen: vec![free_address()],
            peer_listen: Some(peers[n]),
            peers: peers.clone(),
            fast_elections: false,
            listen_unix: None,
            tls: None,
        };
        let configs: Vec<LockdConfig> = (0..3).map(config).collect();
        for config in &configs {
            fs::create_dir(&config.dir).expect("new");
        }
        let mut group = Self { dirs, configs, running: vec![None, None, None] };
        for n in 0..3 {
            group.start_one(n).await;
        }
        group
    }

    pub(super) async fn start_one(&mut self, n: usize) {
        self.running[n] = Some(start_with(self.configs[n].clone()).await.expect("starts"));
    }

    pub(super) fn stop_one(&mut self, n: usize) {
        self.running[n].take().expect("runs").stop();
    }

    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.configs.iter().map(|config| config.listen[0]).collect()
    }
}

async fn write(session: &LockSession, n: u8) {
    let reply =
        session.operate(LockOp::write(LockId(1), Mode::Pw, vec![n])).await.expect("the session lives");
    assert_eq!(granted_term(&reply), Term(1), "the same lock");
}

#[test]
fn a_session_and_its_lock_outlive_each_lockd_in_turn() {
    runtime().block_on(async {
        let mut group = Group::start().await;
        let (session, _events) = LockSession::spawn(client(1), group.addresses());
        assert_eq!(granted_term(&session.operate(lock(Mode::Pw)).await.expect("opens")), Term(1));
        for n in 0..3 {
            group.stop_one(n);
            write(&session, u8::try_from(n).expect("small")).await;
            group.start_one(n).await;
        }
        let done = session.operate(LockOp::unlock(LockId(1), ValueChange::Keep)).await;
        assert_eq!(done, Ok(LockReply::Done));
        (0..3).for_each(|n| group.stop_one(n));
    });
}

#[test]
fn a_group_forgets_nothing_when_all_of_it_restarts() {
    runtime().block_on(async {
        let mut group = Group::start().await;
        let (session, _events) = LockSession::spawn(client(1), group.addresses());
        session.operate(lock(Mode::Pw)).await.expect("opens");
        write(&session, 1).await;
        (0..3).for_each(|n| group.stop_one(n));
        for n in 0..3 {
            group.start_one(n).await;
        }
        write(&session, 2).await;
        (0..3).for_each(|n| group.stop_one(n));
    });
}

#[test]
fn a_lost_disk_founds_no_second_group() {
    runtime().block_on(async {
        let mut group = Group::start().await;
        let (session, _events) = LockSession::spawn(client(1), group.addresses());
        session.operate(lock(Mode::Pw)).await.expect("opens");
        // Whoever is to found a group is among them.
        for n in 0..3 {
            group.stop_one(n);
            let kept = group.dirs[n].path().join("kept");
            fs::rename(&group.configs[n].dir, &kept).expect("moves");
            fs::create_dir(&group.configs[n].dir).expect("new");
            group.start_one(n).await;
            // The others are the group still; a session with a new one would begin at another lock.
            write(&session, u8::try_from(n).expect("small")).await;
            group.stop_one(n);
            fs::remove_dir_all(&group.configs[n].dir).expect("removes");
            fs::rename(&kept, &group.configs[n].dir).expect("moves back");
            group.start_one(n).await;
        }
        (0..3).for_each(|n| group.stop_one(n));
    });
}
