//! A lockd that requires TLS, and everybody who should not get in: each is refused for the right reason, learns nothing,
//! and a good client does not notice.

#![allow(clippy::disallowed_methods, reason = "certificates end by the wall clock")]

use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::SystemTime;

use csnap_proto::message::lock::{Flags, LockOp, LockReply, Mode, SpaceReply, SpaceRequest, Way};
use csnap_proto::{Caller, LockId, MigrationId, Name, Principal, Role, Term};
use csnap_transport::issue::{Authority, Validity, make_authority};
use csnap_transport::{Address, TlsConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::door::HANDSHAKE_WITHIN;
use super::space_tests::ask;
use super::tests::{Running, client, granted_term, lock, members, runtime, start_with};
use super::*;
use crate::client::shell::LockSession;
use crate::client::{ClientConfig, ClientEvent, Identity, LockClient, Lockds};

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

/// An authority in a directory, which has what it issues too.
struct Ca {
    dir: tempfile::TempDir,
    authority: Authority,
}

impl Ca {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let day = Validity::from_now(SystemTime::now(), Duration::from_secs(24 * 3600));
        let made = make_authority(&name("prod"), day).expect("makes one");
        let (cert, key) = (dir.path().join("ca.pem"), dir.path().join("ca.key"));
        put(&cert, &made.cert);
        put(&key, &made.key);
        let authority = Authority::load(&cert, &key).expect("reads what it made");
        Self { dir, authority }
    }

    fn issue(&self, role: Role, text: &str) -> TlsConfig {
        self.issue_for(role, text, Validity::from_now(SystemTime::now(), Duration::from_secs(3600)))
    }

    fn issue_for(&self, role: Role, text: &str, validity: Validity) -> TlsConfig {
        let principal = Principal { cluster: name("prod"), caller: Caller { role, name: name(text) } };
        let issued = self.authority.issue(&principal, &[], validity).expect("issues");
        let at = |end: &str| self.dir.path().join(format!("{role}-{text}.{end}"));
        let config = TlsConfig { ca: self.dir.path().join("ca.pem"), cert: at("pem"), key: at("key") };
        put(&config.cert, &issued.cert);
        put(&config.key, &issued.key);
        config
    }

    fn lockds(&self, lockd: &Running, role: Role, text: &str) -> Lockds {
        reach(lockd, &self.issue(role, text))
    }

    async fn lockd(&self, dir: &Path) -> Running {
        self.lockd_named("l1", dir).await
    }

    async fn lockd_named(&self, text: &str, dir: &Path) -> Running {
        let listen = vec![SocketAddr::from(([127, 0, 0, 1], 0))];
        let config = LockdConfig::alone(name(text), dir.to_path_buf(), listen);
        let tls = Some(self.issue(Role::Lockd, text));
        start_with(LockdConfig { tls, ..config }).await.expect("starts")
    }
}

fn put(path: &Path, text: &str) {
    fs::write(path, text).expect("writes");
    fs::set_permissions(path, PermissionsExt::from_mode(0o600)).expect("is ours");
}

fn reach(lockd: &Running, tls: &TlsConfig) -> Lockds {
    Lockds::new(vec![Address::Tcp(lockd.address)], Some(Tls::load(tls).expect("loads")))
}

fn client_of(n: u8, node: &str) -> LockClient {
    let identity =
        Identity { session: csnap_proto::SessionId([n; 16]), secret: csnap_proto::Secret([n; 16]) };
    LockClient::new(ClientConfig { node: name(node), lease_ms: 30_000, renew_ms: 100 }, identity, Vec::new())
}

/// Why nobody gets in so.
async fn refused(lockds: Lockds) -> String {
    let error = lockds.connect_any(0, None).await.expect_err("refused").to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

#[test]
fn who_has_no_right_certificate_learns_nothing_and_disturbs_nobody() {
    runtime().block_on(async {
        let (ca, other, dir) = (Ca::new(), Ca::new(), tempfile::tempdir().expect("a directory"));
        let lockd = ca.lockd(dir.path()).await;
        let lockds = ca.lockds(&lockd, Role::Operator, "ann");
        let (good, mut events) = LockSession::spawn(client_of(1, "ann"), lockds.clone());
        good.operate(lock(Mode::Ex)).await.expect("open");

        let mut stranger = other.issue(Role::Operator, "eve");
        assert!(refused(reach(&lockd, &stranger)).await.contains("not of a CA that we believe"));
        stranger.ca = ca.dir.path().join("ca.pem");
        assert!(refused(reach(&lockd, &stranger)).await.contains("CA of our certificate"));
        let over = ca.issue_for(Role::Operator, "old", Validity::over(SystemTime::now()));
        assert!(refused(reach(&lockd, &over)).await.contains("certificate has expired"));
        let plain = refused(Lockds::from(vec![lockd.address])).await;
        assert!(plain.contains("it speaks TLS"), "{plain}");
        for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0x16; 70_000], &[0; 3], &[0xff; 64]] {
            let mut stream = TcpStream::connect(lockd.address).await.expect("it listens");
            let _ = stream.write_all(garbage).await;
            let _ = stream.shutdown().await;
            let mut said = Vec::new();
            let _ = stream.read_to_end(&mut said).await;
            assert!(said.len() <= 7 && said.iter().all(|byte| *byte < 0x80), "an alert at most: {said:?}");
        }

        good.operate(lock(Mode::Nl)).await.expect("open");
        while let Ok(event) = events.try_recv() {
            assert!(matches!(event, ClientEvent::Opened { .. }), "it noticed: {event:?}");
        }
        assert_eq!(members(&lockds).await, 1, "nobody else got in");
        lockd.stop();
    });
}

#[test]
fn a_role_has_its_rights_and_no_others() {
    runtime().block_on(async {
        let (ca, dir) = (Ca::new(), tempfile::tempdir().expect("a directory"));
        let lockd = ca.lockd(dir.path()).await;
        let (node, _events) = LockSession::spawn(client(1), ca.lockds(&lockd, Role::Node, "n1"));
        node.operate(lock(Mode::Ex)).await.expect("open");
        let denied = |text: &str| LockReply::Invalid(format!("denied: {text}"));
        let broken = node.operate(LockOp::Break { lock: LockId(1) }).await.expect("lives on");
        assert_eq!(broken, denied("node n1 may not break a lock"));
        let (app, _events) = LockSession::spawn(client_of(2, "app"), ca.lockds(&lockd, Role::Client, "app"));
        let reply = app.operate(lock(Mode::Cr)).await.expect("open");
        assert_eq!(reply, denied("client app may not lock what begins with csnap/"));
        let reply = app.operate(LockOp::lock("app", Mode::Ex, Flags::NONE)).await.expect("lives on");
        assert!(matches!(reply, LockReply::Granted { .. }), "{reply:?}");
        // A node's certificate is for that node.
        let (_other, mut events) = LockSession::spawn(client(3), ca.lockds(&lockd, Role::Node, "n2"));
        let Some(ClientEvent::SessionLost { reason }) = events.recv().await else { panic!("it got in") };
        assert_eq!(reason, "denied: node n2 may not open a session under another name");
        // Whoever answers must be a lockd: a node that listens at its address is none.
        let node = Tls::load(&ca.issue(Role::Node, "n1")).expect("loads");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let address = Address::Tcp(listener.local_addr().expect("bound"));
        let lockds = Lockds::new(vec![address], Some(node.clone()));
        let serve = async {
            let (stream, _) = listener.accept().await.expect("accepts");
            node.accept(stream).await.expect("of the same CA")
        };
        let (_, error) = tokio::join!(serve, refused(lockds));
        assert!(error.contains("it is node n1, and no lockd"), "{error}");
        let operator = ca.lockds(&lockd, Role::Operator, "ann");
        assert_eq!(members(&operator).await, 2);
        lockd.stop();
    });
}

#[test]
fn the_slow_and_the_many_keep_nobody_out() {
    runtime().block_on(async {
        let (ca, dir) = (Ca::new(), tempfile::tempdir().expect("a directory"));
        let lockd = ca.lockd(dir.path()).await;
        // Each says the beginning of a handshake, and then nothing.
        let mut slow = Vec::new();
        for _ in 0..2 * csnap_transport::HANDSHAKES_MAX {
            let mut stream = TcpStream::connect(lockd.address).await.expect("it listens");
            stream.write_all(&[0x16, 3, 1, 2, 0, 1]).await.expect("sends");
            slow.push(stream);
        }
        let (good, _events) =
            LockSession::spawn(client_of(1, "ann"), ca.lockds(&lockd, Role::Operator, "ann"));
        good.operate(lock(Mode::Ex)).await.expect("open");
        // The first ones had to make room, the last ones were too slow: in the end all are closed.
        let closed = async {
            for stream in &mut slow {
                let mut said = Vec::new();
                let _ = stream.read_to_end(&mut said).await;
                assert_eq!(said, b"", "nothing is said to them");
            }
        };
        tokio::time::timeout(10 * HANDSHAKE_WITHIN, closed).await.expect("they are closed");
        good.operate(lock(Mode::Nl)).await.expect("open");
        lockd.stop();
    });
}

/// An independent client that may speak no TLS later than 1.2.
const TLS_1_2: &str = "
import socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname = False
context.load_verify_locations(sys.argv[2])
context.load_cert_chain(sys.argv[3], sys.argv[4])
context.maximum_version = getattr(ssl.TLSVersion, sys.argv[5])
try:
    with context.wrap_socket(socket.create_connection(('127.0.0.1', int(sys.argv[1])))) as tls:
        print(tls.version(), tls.recv(4))
except ssl.SSLError as error:
    print(error.reason)
";

#[test]
fn tls_1_3_is_spoken_and_nothing_older() {
    runtime().block_on(async {
        let (ca, dir) = (Ca::new(), tempfile::tempdir().expect("a directory"));
        let lockd = ca.lockd(dir.path()).await;
        let tls = ca.issue(Role::Operator, "ann");
        for (version, says) in [("TLSv1_2", "TLSV1_ALERT_PROTOCOL_VERSION"), ("TLSv1_3", "TLSv1.3 b'CSNL'")] {
            let output = std::process::Command::new("python3")
                .args(["-c", TLS_1_2, &lockd.address.port().to_string()])
                .args([&tls.ca, &tls.cert, &tls.key])
                .arg(version)
                .stderr(Stdio::inherit())
                .output()
                .expect("python3 is there");
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(said.contains(says), "{version}: {said}");
        }
        lockd.stop();
    });
}

/// The source comes to the destination as the lockd that it is, which may bring a lockspace and nothing else.
#[test]
fn a_lockspace_moves_between_groups_that_require_tls() {
    runtime().block_on(async {
        let (ca, dirs) = (Ca::new(), [0, 1].map(|_| tempfile::tempdir().expect("a directory")));
        let from = ca.lockd_named("l1", dirs[0].path()).await;
        let to = ca.lockd_named("l2", dirs[1].path()).await;
        let (node, _events) = LockSession::spawn(client(1), ca.lockds(&from, Role::Node, "n1"));
        assert_eq!(granted_term(&node.operate(lock(Mode::Ex)).await.expect("open")), Term(1));
        let (space, migration) = (name("default"), MigrationId([1; 16]));
        let request =
            SpaceRequest::Migrate { name: space.clone(), way: Way { migration, to: vec![to.address] } };
        let operator = ca.lockds(&from, Role::Operator, "ann");
        assert_eq!(ask(operator, &request).await, SpaceReply::Done);
        // Nobody else may bring one, or say what becomes of it.
        let discard = SpaceRequest::Discard { name: space, migration };
        let reply = ask(ca.lockds(&to, Role::Node, "n1"), &discard).await;
        let SpaceReply::Refused { reason } = reply else { panic!("{reply:?}") };
        assert_eq!(reason, "denied: node n1 may not bring a lockspace, activate or discard it");
        let reply = node.operate(LockOp::write(LockId(1), Mode::Ex, b"moved".to_vec())).await;
        assert_eq!(granted_term(&reply.expect("lives")), Term(1), "the same lock");
        assert_eq!(members(&ca.lockds(&to, Role::Operator, "ann")).await, 1, "it is served there");
        from.stop();
        to.stop();
    });
}

/// A destination of another authority will refuse the source however long it asks: nobody waits for that.
#[test]
fn a_move_to_a_group_of_another_ca_is_given_up_at_once_with_the_reason() {
    runtime().block_on(async {
        let (cas, dirs) = ([Ca::new(), Ca::new()], [0, 1].map(|_| tempfile::tempdir().expect("a directory")));
        let from = cas[0].lockd_named("l1", dirs[0].path()).await;
        let to = cas[1].lockd_named("l2", dirs[1].path()).await;
        let (node, _events) = LockSession::spawn(client(1), cas[0].lockds(&from, Role::Node, "n1"));
        node.operate(lock(Mode::Ex)).await.expect("open");
        let way = Way { migration: MigrationId([1; 16]), to: vec![to.address] };
        let operator = cas[0].lockds(&from, Role::Operator, "ann");
        let began = std::time::Instant::now();
        let request = SpaceRequest::Migrate { name: name("default"), way };
        assert_eq!(ask(operator.clone(), &request).await, SpaceReply::Done);
        let reply = node.operate(LockOp::write(LockId(1), Mode::Ex, b"here".to_vec())).await;
        assert_eq!(granted_term(&reply.expect("lives")), Term(1), "it goes on where it was");
        assert!(began.elapsed() < crate::core::spaces::mover::FROZEN_MAX, "{:?}", began.elapsed());
        let SpaceReply::Spaces(all) = ask(operator, &SpaceRequest::List).await else { panic!("a list") };
        let why = all[0].trouble.as_deref().expect("it says why");
        let expected = "its certificate is not of a CA that we believe";
        assert_eq!(why, format!("lockd at {}: {expected}", to.address));
        from.stop();
        to.stop();
    });
}

/// Three replicas that trust nobody without a certificate, and one that has a certificate of the wrong role.
#[test]
fn replicas_talk_to_replicas_only() {
    runtime().block_on(async {
        let ca = Ca::new();
        let dirs = [0, 1, 2].map(|_| tempfile::tempdir().expect("a directory"));
        let free =
            || std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port");
        let peers: Vec<SocketAddr> = (0..3).map(|_| free()).collect();
        let mut running = Vec::new();
        for n in 0..3 {
            let config =
                LockdConfig::alone(name(&format!("l{n}")), dirs[n].path().join("data"), vec![free()]);
            fs::create_dir(&config.dir).expect("new");
            let tls = Some(ca.issue(Role::Lockd, &format!("l{n}")));
            let config = LockdConfig { peer_listen: Some(peers[n]), peers: peers.clone(), tls, ..config };
            running.push(start_with(config).await.expect("starts"));
        }
        let addresses = running.iter().map(|lockd| Address::Tcp(lockd.address)).collect();
        let tls = Tls::load(&ca.issue(Role::Operator, "ann")).expect("loads");
        let (good, _events) =
            LockSession::spawn(client_of(1, "ann"), Lockds::new(addresses, Some(tls.clone())));
        good.operate(lock(Mode::Ex)).await.expect("a group was formed");
        // A certificate of the cluster, and no replica: closed before anything is said.
        for tls in [tls, Tls::load(&ca.issue(Role::Node, "n1")).expect("loads")] {
            let stream = TcpStream::connect(peers[0]).await.expect("it listens");
            let (mut stream, _) = tls.connect(stream).await.expect("of the same CA");
            let mut said = Vec::new();
            stream.read_to_end(&mut said).await.expect("closed in order");
            assert_eq!(said, b"");
        }
        good.operate(lock(Mode::Nl)).await.expect("open");
        running.into_iter().for_each(Running::stop);
    });
}
