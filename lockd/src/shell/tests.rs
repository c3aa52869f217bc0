//! The daemon as it is, on a real directory and real sockets, against real clients and garbage.

use std::path::PathBuf;
use std::thread::JoinHandle;

use csnap_proto::limits::FRAME_BYTES_MAX;
use csnap_proto::message::lock::{Flags, FromLockd, LockEvent, LockOp, LockReply, Mode, ValueChange};
use csnap_proto::{LockId, Name, RequestId, Secret, SessionId, Term, frame};
use csnap_transport::Address;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::*;
use crate::client::election::{ElectionEvent, Eligibility, Leader};
use crate::client::elector::Elector;
use crate::client::shell::LockSession;
use crate::client::{ClientConfig, ClientEvent, Identity, LockClient, Lockds};

/// A lockd on a thread of its own. Dropping it stops it where it stands.
pub(super) struct Running {
    pub(super) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

fn config(dir: &Path) -> LockdConfig {
    let listen = vec![SocketAddr::from(([127, 0, 0, 1], 0))];
    LockdConfig::alone(Name::new("n1").expect("a name"), dir.to_path_buf(), listen)
}

pub(super) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Starts one; returns when it listens, or with why it does not.
pub(super) async fn start(dir: &Path) -> anyhow::Result<Running> {
    start_with(config(dir)).await
}

pub(super) async fn start_with(config: LockdConfig) -> anyhow::Result<Running> {
    let (stop, stopped) = oneshot::channel::<()>();
    let (ended, mut end) = oneshot::channel();
    let path = config.dir.join(ADDRESS_FILE);
    let written = |path: PathBuf| fs::metadata(path).and_then(|m| m.modified()).ok();
    let before = written(path.clone());
    let thread = std::thread::spawn(move || {
        let result = runtime().block_on(run(config, async { drop(stopped.await) }));
        let _ = ended.send(());
        result
    });
    loop {
        tokio::select! {
            _ = &mut end => {
                thread.join().expect("does not panic")?;
                anyhow::bail!("ended before it served");
            }
            () = tokio::time::sleep(Duration::from_millis(1)) => {}
        }
        if written(path.clone()) != before {
            let address = fs::read_to_string(&path)?.trim().parse()?;
            return Ok(Running { address, stop: Some(stop), thread: Some(thread) });
        }
    }
}

impl Running {
    pub(super) fn stop(mut self) {
        drop(self.stop.take());
        let thread = self.thread.take().expect("runs");
        thread.join().expect("does not panic").expect("ends well");
    }
}

pub(super) fn client(n: u8) -> LockClient {
    let identity = Identity { session: SessionId([n; 16]), secret: Secret([n; 16]) };
    let config = ClientConfig { node: Name::new("n1").expect("a name"), lease_ms: 30_000, renew_ms: 100 };
    LockClient::new(config, identity, vec![n])
}

pub(super) fn lock(mode: Mode) -> LockOp {
    LockOp::lock("csnap/server", mode, Flags::NONE)
}

pub(super) fn granted_term(reply: &LockReply) -> Term {
    match reply {
        LockReply::Granted { lock, .. } => lock.term,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_restart_forgets_nothing_and_grants_nothing_twice() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().expect("a directory");
        let lockd = start(dir.path()).await.expect("starts");
        let address = lockd.address;
        let (a, _a_events) = LockSession::spawn(client(1), vec![address]);
        let (b, mut b_events) = LockSession::spawn(client(2), vec![address]);
        assert_eq!(granted_term(&a.operate(lock(Mode::Pw)).await.expect("open")), Term(1));
        let waiting = b.operate(lock(Mode::Pw)).await.expect("open");
        assert!(matches!(waiting, LockReply::Queued { .. }), "{waiting:?}");
        lockd.stop();
        let lockd = start(dir.path()).await.expect("starts again");
        assert_eq!(lockd.address, address, "its clients know it by its port");
        let write = LockOp::write(LockId(1), Mode::Pw, b"here".to_vec());
        assert_eq!(granted_term(&a.operate(write).await.expect("resumed")), Term(1));
        let unlock = LockOp::unlock(LockId(1), ValueChange::Keep);
        assert_eq!(a.operate(unlock).await, Ok(LockReply::Done));
        let value = loop {
            if let ClientEvent::Event(LockEvent::Granted { lock, value, .. }) =
                b_events.recv().await.expect("lives on")
            {
                assert_eq!(lock.term, Term(2));
                break value;
            }
        };
        let value = value.expect("a new lock reads");
        assert_eq!((value.bytes.as_slice(), value.valid), (b"here".as_slice(), true));
        lockd.stop();
    });
}

#[test]
fn a_leader_is_followed_by_a_candidate_and_everybody_sees_it() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().expect("a directory");
        let lockd = start(dir.path()).await.expect("starts");
        let elector = |n| {
            let (session, events) = LockSession::spawn(client(n), vec![lockd.address]);
            (session.clone(), Elector::new(session, events, "leader"))
        };
        let ((first, mut a), (_, mut b)) = (elector(1), elector(2));
        a.campaign(Eligibility(1, 1)).await.expect("open");
        assert_eq!(a.next().await, Ok(ElectionEvent::Elected { term: Term(1), clean: true }));
        a.proclaim(b"a".to_vec(), Eligibility(1, 2)).await.expect("open");
        b.campaign(Eligibility(1, 2)).await.expect("open");
        let leader = Leader { term: Term(1), data: b"a".to_vec() };
        assert_eq!(b.next().await, Ok(ElectionEvent::Observed(Some(leader))));
        first.close().await;
        let followed = loop {
            if let ElectionEvent::Elected { term, clean } = b.next().await.expect("open") {
                break (term, clean);
            }
        };
        assert_eq!(followed, (Term(2), false));
        while a.next().await.expect("told first") != ElectionEvent::Deposed {}
        b.proclaim(b"b".to_vec(), Eligibility(1, 2)).await.expect("open");
        b.resign().await.expect("open");
        lockd.stop();
    });
}

#[test]
fn a_directory_has_one_lockd() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().expect("a directory");
        let lockd = start(dir.path()).await.expect("starts");
        let error = start(dir.path()).await.err().expect("refused");
        assert!(format!("{error:#}").contains("another lockd"), "{error:#}");
        lockd.stop();
        start(dir.path()).await.expect("free again").stop();
    });
}

#[test]
fn a_log_that_is_full_is_followed_by_the_next() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().expect("a directory");
        let lockd = start(dir.path()).await.expect("starts");
        let (a, _events) = LockSession::spawn(client(1), vec![lockd.address]);
        a.operate(lock(Mode::Pw)).await.expect("open");
        let writes = u32::try_from(LOG_BYTES / 4096).expect("small");
        for n in 0..writes {
            a.operate(LockOp::write(LockId(1), Mode::Pw, n.to_le_bytes())).await.expect("open");
        }
        assert!(dir.path().join("log-2").exists() && !dir.path().join("log-1").exists());
        lockd.stop();
        let lockd = start(dir.path()).await.expect("starts again");
        let reply = a.operate(lock(Mode::Cr)).await.expect("resumed");
        let LockReply::Granted { value: Some(value), .. } = reply else { panic!("{reply:?}") };
        assert_eq!(value.bytes, (writes - 1).to_le_bytes());
        lockd.stop();
    });
}

/// A client that knows its cluster, and comes to another's lockd.
#[test]
fn a_client_opens_no_session_in_another_cluster() {
    runtime().block_on(async {
        let dirs = [0, 1].map(|_| tempfile::tempdir().expect("a directory"));
        let ours = start(dirs[0].path()).await.expect("starts");
        let theirs = start(dirs[1].path()).await.expect("starts");
        let lockds = Lockds::from(vec![ours.address]);
        assert_eq!(lockds.cluster(), None);
        lockds.connect_any(0, None).await.expect("the first contact");
        let cluster = lockds.cluster().expect("learned");
        let lockds = Lockds::from(vec![theirs.address]).of(cluster);
        let error = lockds.connect_any(0, None).await.expect_err("refused").to_string();
        assert!(error.contains("it belongs to cluster") && error.lines().count() == 1, "{error}");
        // Both addresses: the right one is found.
        let lockds = Lockds::from(vec![theirs.address, ours.address]).of(cluster);
        let (session, _events) = LockSession::spawn(client(1), lockds);
        session.operate(lock(Mode::Ex)).await.expect("open");
        let status = |lockd: &Running| Lockds::from(vec![lockd.address]);
        assert_eq!(members(&status(&theirs)).await, 0);
        assert_eq!(members(&status(&ours)).await, 1);
        ours.stop();
        theirs.stop();
    });
}

#[test]
fn a_unix_socket_is_a_way_in_for_this_machine_s_operators() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("lockd.sock");
        let lockd =
            start_with(LockdConfig { listen_unix: Some(socket.clone()), ..config(&dir.path().join("data")) });
        let lockd = lockd.await.expect("starts");
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&socket).expect("is there").permissions());
        assert_eq!(mode & 0o777, 0o660);
        let (session, _events) = LockSession::spawn(client(1), vec![Address::Unix(socket)]);
        session.operate(lock(Mode::Ex)).await.expect("open");
        let broken = session.operate(LockOp::Break { lock: LockId(1) }).await.expect("open");
        assert!(matches!(broken, LockReply::Broken(_)), "an operator may: {broken:?}");
        lockd.stop();
    });
}

/// How many members a lockd tells of.
pub(super) async fn members(lockds: &Lockds) -> usize {
    let mut stream = lockds.connect_any(0, None).await.expect("it greets");
    let mut bytes = bytes::BytesMut::new();
    let asks = Frame { id: RequestId(5), term: Term(0), message: ToLockd::Status };
    frame::encode(&asks, &mut bytes);
    stream.write_all(&bytes).await.expect("it reads");
    stream.flush().await.expect("it reads");
    bytes.clear();
    loop {
        stream.read_buf(&mut bytes).await.expect("it answers");
        if let Some(Frame { message: FromLockd::Status(status), .. }) =
            frame::decode(&mut bytes).expect("a frame")
        {
            return status.members.len();
        }
    }
}

/// Sends bytes; returns when the daemon closed the connection, with what it had said.
async fn say(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    // The daemon may close before all is sent.
    let _ = stream.write_all(bytes).await;
    let mut said = Vec::new();
    let _ = stream.read_to_end(&mut said).await;
    said
}

#[test]
fn garbage_is_closed_and_a_good_client_does_not_notice() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().expect("a directory");
        let lockd = start(dir.path()).await.expect("starts");
        let (good, mut events) = LockSession::spawn(client(1), vec![lockd.address]);
        good.operate(lock(Mode::Ex)).await.expect("open");
        let mut status = bytes::BytesMut::new();
        let asks = Frame { id: RequestId(5), term: Term(0), message: ToLockd::Status };
        frame::encode(&asks, &mut status);
        let mut long = status.to_vec();
        long[8..12].copy_from_slice(&u32::try_from(FRAME_BYTES_MAX / 2).expect("small").to_le_bytes());
        let mut flipped = status.to_vec();
        flipped[14] ^= 1;
        for bytes in [b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0; 100_000], long, flipped, status[..40.min(status.len()) - 1].to_vec()] {
            let mut bytes = bytes;
            bytes.extend(std::iter::repeat_n(0xff, 64));
            let greeted = [&greeting::encode(None)[..], &bytes].concat();
            for bytes in [bytes, greeted] {
                let said = say(lockd.address, &bytes).await;
                assert!(said.len() <= greeting::GREETING_BYTES, "greeted, and nothing else: {said:?}");
            }
        }
        let lockds = Lockds::from(vec![lockd.address]);
        let mut stream = lockds.connect_any(0, None).await.expect("it greets");
        stream.write_all(&status).await.expect("it reads");
        let mut buffer = bytes::BytesMut::new();
        let answer = loop {
            stream.read_buf(&mut buffer).await.expect("it answers");
            if let Some(frame) = frame::decode::<FromLockd>(&mut buffer).expect("a frame") {
                break frame;
            }
        };
        assert!(matches!(answer.message, FromLockd::Status(status) if status.members.len() == 1 && status.term == Term(1)));
        good.operate(lock(Mode::Nl)).await.expect("open");
        while let Ok(event) = events.try_recv() {
            assert!(matches!(event, ClientEvent::Opened { .. }), "{event:?}");
        }
        lockd.stop();
    });
}

#[test]
fn a_damaged_directory_is_refused_in_one_line() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().expect("a directory");
        start(dir.path()).await.expect("starts").stop();
        fs::write(dir.path().join("snapshot"), b"not a snapshot").expect("writes");
        let error = format!("{:#}", start(dir.path()).await.err().expect("refused"));
        assert!(error.contains("damaged") && error.lines().count() == 1, "{error}");
    });
}
