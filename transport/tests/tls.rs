//! Both ends of TLS over real sockets, with certificates of every kind that is right or wrong.

#![allow(clippy::disallowed_methods, reason = "certificates end by the wall clock")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use csnap_proto::{Caller, Name, Principal, Role};
use csnap_transport::issue::{Authority, Issued, Validity, make_authority};
use csnap_transport::{Stream, Tls, TlsConfig, Unreached, is_tls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

fn day() -> Validity {
    Validity::from_now(SystemTime::now(), Duration::from_secs(24 * 3600))
}

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

fn principal(cluster: &str, role: Role, text: &str) -> Principal {
    Principal { cluster: name(cluster), caller: Caller { role, name: name(text) } }
}

fn put(path: &Path, text: &str) {
    std::fs::write(path, text).expect("writes");
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).expect("is ours");
}

/// An authority in a directory of its own.
struct Ca {
    dir: tempfile::TempDir,
    authority: Authority,
}

impl Ca {
    fn new(cluster: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let made = make_authority(&name(cluster), day()).expect("makes one");
        let (cert, key) = (dir.path().join("ca.pem"), dir.path().join("ca.key"));
        put(&cert, &made.cert);
        put(&key, &made.key);
        let authority = Authority::load(&cert, &key).expect("reads what it made");
        assert_eq!(authority.cluster(), &name(cluster));
        Self { dir, authority }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    fn config(&self, file: &str) -> TlsConfig {
        TlsConfig {
            ca: self.path("ca.pem"),
            cert: self.path(&format!("{file}.pem")),
            key: self.path(&format!("{file}.key")),
        }
    }

    fn write(&self, file: &str, issued: &Issued) -> TlsConfig {
        let config = self.config(file);
        put(&config.cert, &issued.cert);
        put(&config.key, &issued.key);
        config
    }

    fn issue(&self, cluster: &str, role: Role, text: &str, validity: Validity) -> TlsConfig {
        let issued = self.authority.issue(&principal(cluster, role, text), &[], validity).expect("issues");
        self.write(text, &issued)
    }

    fn tls(&self, role: Role, text: &str) -> Tls {
        Tls::load(&self.issue(self.authority.cluster().as_str(), role, text, day())).expect("loads")
    }
}

/// Both ends: what the server and the client make of each other.
async fn meet(server: &Tls, client: &Tls) -> (Result<Caller, String>, Result<Caller, String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = listener.local_addr().expect("bound");
    let serve = async {
        let (stream, _) = listener.accept().await.expect("accepts");
        let (mut stream, caller) = server.accept(stream).await?;
        greet(&mut stream).await.map(|()| caller)
    };
    let ask = async {
        let stream = TcpStream::connect(address).await.expect("it listens");
        let (mut stream, caller) = client.connect(stream).await?;
        // A client learns only now whether its own certificate was taken.
        greet(&mut stream).await.map(|()| caller)
    };
    tokio::join!(serve, ask)
}

/// Says something and hears something.
async fn greet(stream: &mut Stream) -> Result<(), String> {
    let explain = |error| csnap_transport::explain(&error);
    stream.write_all(b"hello").await.map_err(explain)?;
    stream.flush().await.map_err(explain)?;
    let mut heard = [0; 5];
    stream.read_exact(&mut heard).await.map_err(explain)?;
    assert_eq!(&heard, b"hello");
    Ok(())
}

#[tokio::test]
async fn both_ends_learn_who_the_other_is() {
    let ca = Ca::new("prod");
    let (lockd, node) = (ca.tls(Role::Lockd, "l1"), ca.tls(Role::Node, "n1"));
    let (seen, reached) = meet(&lockd, &node).await;
    assert_eq!(seen, Ok(principal("prod", Role::Node, "n1").caller));
    assert_eq!(reached, Ok(principal("prod", Role::Lockd, "l1").caller));
}

#[tokio::test]
async fn another_ca_another_cluster_and_the_past_are_refused() {
    let ca = Ca::new("prod");
    let lockd = ca.tls(Role::Lockd, "l1");
    let other = Ca::new("prod");
    let (seen, reached) = meet(&lockd, &other.tls(Role::Node, "n1")).await;
    assert!(reached.expect_err("refused").contains("not of a CA that we believe"));
    seen.expect_err("refused");
    // One that believes ours, with a certificate of another's: the server is the one to refuse.
    let mut mixed = other.config("n1");
    mixed.ca = ca.path("ca.pem");
    let (seen, reached) = meet(&lockd, &Tls::load(&mixed).expect("loads")).await;
    assert!(seen.expect_err("refused").contains("not of a CA that we believe"));
    assert!(reached.expect_err("refused").contains("CA of our certificate"));
    let over = Validity::over(SystemTime::now());
    let expired = Tls::load(&ca.issue("prod", Role::Node, "old", over)).expect("loads");
    let (seen, reached) = meet(&lockd, &expired).await;
    assert!(seen.expect_err("refused").contains("has expired"));
    assert!(reached.expect_err("refused").contains("our certificate has expired"));
    let stray = Tls::load(&ca.issue("test", Role::Node, "stray", day())).expect("loads");
    let (seen, _) = meet(&lockd, &stray).await;
    assert!(seen.expect_err("refused").contains("csnap://test/node/stray, and this cluster is prod"));
}

#[tokio::test]
async fn files_that_change_count_for_the_next_connection() {
    let ca = Ca::new("prod");
    let (lockd, node) = (ca.tls(Role::Lockd, "l1"), ca.tls(Role::Node, "n1"));
    meet(&lockd, &node).await.0.expect("good");
    // A certificate whose key is not there yet changes nothing.
    let issued = ca.authority.issue(&principal("prod", Role::Node, "n2"), &[], day()).expect("issues");
    let config = ca.config("n1");
    put(&config.cert, &issued.cert);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(meet(&lockd, &node).await.0.expect("the old one goes on").name, name("n1"));
    put(&config.key, &issued.key);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(meet(&lockd, &node).await.0.expect("the new one").name, name("n2"));
}

#[test]
fn what_is_wrong_with_a_file_is_one_line_that_names_it() {
    let ca = Ca::new("prod");
    let good = ca.issue("prod", Role::Node, "n1", day());
    ca.issue("prod", Role::Node, "n2", day());
    Tls::load(&good).expect("good");
    std::fs::set_permissions(&good.key, PermissionsExt::from_mode(0o640)).expect("is ours");
    Tls::load(&good).expect("a group may read it");
    put(&ca.path("empty"), "");
    for (bad, says) in [
        (TlsConfig { ca: ca.path("none"), ..good.clone() }, "cannot read"),
        (TlsConfig { ca: ca.path("empty"), ..good.clone() }, "no certificate"),
        (TlsConfig { cert: ca.path("ca.pem"), ..good.clone() }, "does not say who it is for"),
        (TlsConfig { key: ca.path("n2.key"), ..good.clone() }, "not the key of"),
        (TlsConfig { key: ca.path("n1.pem"), ..good.clone() }, "has no key"),
    ] {
        let error = Tls::load(&bad).expect_err(says);
        assert!(error.contains(says) && error.lines().count() == 1, "{error}");
    }
    std::fs::set_permissions(&good.key, PermissionsExt::from_mode(0o604)).expect("is ours");
    assert!(Tls::load(&good).expect_err("refused").contains("everybody may read"));
}

#[test]
fn a_renewed_certificate_is_for_the_same_key_and_hosts() {
    let ca = Ca::new("prod");
    let hosts = ["n1.example".to_owned(), "10.0.0.1".to_owned()];
    let issued = ca.authority.issue(&principal("prod", Role::Node, "n1"), &hosts, day()).expect("issues");
    let config = ca.write("n1", &issued);
    let renewed = ca.authority.renew(&config.cert, &config.key, &[], day()).expect("renews");
    assert_ne!(renewed, issued.cert);
    put(&config.cert, &renewed);
    assert_eq!(Tls::load(&config).expect("fits its key").own(), principal("prod", Role::Node, "n1"));
    let again = ca.authority.renew(&config.cert, &config.key, &[], day()).expect("renews again");
    put(&config.cert, &again);
    let other = Ca::new("test");
    let error = other.authority.renew(&config.cert, &config.key, &[], day()).expect_err("another cluster's");
    assert!(error.contains("it is of cluster prod"), "{error}");
    let error = ca.authority.issue(&principal("prod", Role::Node, "n1"), &["no host".into()], day());
    assert!(error.expect_err("refused").contains("neither the name of a host"));
    let error = ca.authority.issue(&principal("prod", Role::Node, &"n".repeat(65)), &[], day());
    assert!(error.expect_err("refused").contains("too long for a certificate"));
}

#[tokio::test]
async fn one_without_tls_is_told_and_told_apart() {
    let ca = Ca::new("prod");
    let lockd = ca.tls(Role::Lockd, "l1");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = listener.local_addr().expect("bound");
    let plain = async {
        let mut stream = TcpStream::connect(address).await.expect("it listens");
        stream.write_all(b"CSNL").await.expect("sends");
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said).await;
        said
    };
    let serve = async {
        let (stream, _) = listener.accept().await.expect("accepts");
        lockd.accept(stream).await.expect_err("refused")
    };
    let (said, error) = tokio::join!(plain, serve);
    assert!(is_tls(&said) && error.contains("without TLS"), "{said:?} {error}");
    // And the reverse.
    let node = ca.tls(Role::Node, "n1");
    let serve = async {
        let (mut stream, _) = listener.accept().await.expect("accepts");
        let mut first = [0; 2];
        stream.read_exact(&mut first).await.expect("it speaks first");
        stream.write_all(b"CSNL and no TLS at all").await.expect("sends");
        first
    };
    let ask = async {
        let stream = TcpStream::connect(address).await.expect("it listens");
        node.connect(stream).await.expect_err("refused")
    };
    let (first, error) = tokio::join!(serve, ask);
    let Unreached::Refused(error) = error else { panic!("to try again is of no use: {error}") };
    assert!(is_tls(&first) && error.contains("does not speak TLS"), "{error}");
}
