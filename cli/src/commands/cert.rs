//! `csnap cert`: a certificate authority of the cluster's own, in a directory, and certificates of it.
//!
//! ```text
//! DIR/ca.pem, DIR/ca.key                 the authority; its key stays where certificates are made
//! DIR/node-n1.pem, DIR/node-n1.key       a certificate and its key, for the machine that is named
//! ```
//!
//! Nothing is ever overwritten but a certificate that is renewed, which keeps its key.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use csnap_proto::{Caller, Name, Principal, Role};
use csnap_transport::issue::{Authority, Issued, Validity, make_authority};
use serde_json::json;

use crate::output;

/// Ten years: the authority is exchanged by hand.
const AUTHORITY_DAYS: u32 = 3650;

/// Two years.
const CERTIFICATE_DAYS: u32 = 730;

/// Longest that anything is valid: what the dates of certificates can say is far beyond.
const DAYS_MAX: i64 = 36_500;

/// Of a key: nobody but its owner.
const KEY_MODE: u32 = 0o600;

/// Of a certificate, which everybody may see.
const CERTIFICATE_MODE: u32 = 0o644;

/// What is made.
#[derive(Debug, Subcommand)]
pub(crate) enum Cert {
    /// Make a certificate authority in a directory; its key signs all certificates of the cluster.
    Ca {
        /// The directory; made if it is not there.
        path: PathBuf,
        /// Name of the cluster: certificates of another are refused.
        #[arg(long, default_value = "csnap")]
        cluster: Name,
        /// How long it is valid.
        #[arg(long, default_value_t = AUTHORITY_DAYS, value_parser = clap::value_parser!(u32).range(1..=DAYS_MAX))]
        days: u32,
    },
    /// For a node: its agent, server and exporter.
    Node(Wanted),
    /// For a lockd.
    Lockd(Wanted),
    /// For somebody who runs the cluster, or a tool of theirs.
    Operator(Wanted),
    /// For a program that uses locks and keys.
    Client(Wanted),
}

#[derive(Debug, Args)]
pub(crate) struct Wanted {
    /// Who: a node's certificate must have the node's name.
    name: Name,
    /// How long it is valid, at most as long as the authority.
    #[arg(long, default_value_t = CERTIFICATE_DAYS, value_parser = clap::value_parser!(u32).range(1..=DAYS_MAX))]
    days: u32,
    /// Name or address of a host that it is for; again for more. csnap's daemons do not look at it, NBD clients do.
    #[arg(long)]
    host: Vec<String>,
    /// Make the certificate anew for the key that is there.
    #[arg(long)]
    renew: bool,
}

/// Makes what is wanted; `dir` is the authority's.
pub(crate) fn run(dir: &Path, json: bool, cert: Cert) -> anyhow::Result<()> {
    let (role, wanted) = match cert {
        Cert::Ca { path, cluster, days } => return authority(&path, json, &cluster, days),
        Cert::Node(wanted) => (Role::Node, wanted),
        Cert::Lockd(wanted) => (Role::Lockd, wanted),
        Cert::Operator(wanted) => (Role::Operator, wanted),
        Cert::Client(wanted) => (Role::Client, wanted),
    };
    let ca = Files::new(dir, "ca");
    if !ca.cert.exists() {
        bail!(
            "{} has no ca.pem: make it with csnap cert ca DIR, or say its directory with --dir",
            dir.display()
        );
    }
    let authority = Authority::load(&ca.cert, &ca.key).map_err(anyhow::Error::msg)?;
    let files = Files::new(dir, &format!("{role}-{}", wanted.name));
    let valid = validity(wanted.days);
    if wanted.renew {
        let renewed = authority.renew(&files.cert, &files.key, &wanted.host, valid);
        replace(&files.cert, &renewed.map_err(anyhow::Error::msg)?)?;
    } else {
        files.check_absent("use another name, or --renew")?;
        let principal =
            Principal { cluster: authority.cluster().clone(), caller: Caller { role, name: wanted.name } };
        let issued = authority.issue(&principal, &wanted.host, valid);
        files.write(&issued.map_err(anyhow::Error::msg)?)?;
    }
    show(&ca.cert, &files, json)
}

fn authority(dir: &Path, json: bool, cluster: &Name, days: u32) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let files = Files::new(dir, "ca");
    files.check_absent("use another directory")?;
    files.write(&make_authority(cluster, validity(days)).map_err(anyhow::Error::msg)?)?;
    if json { output::json(&json!({ "ca": files.cert, "key": files.key })) } else { Ok(()) }
}

fn validity(days: u32) -> Validity {
    #[expect(clippy::disallowed_methods, reason = "certificates are dated by the wall clock")]
    let now = SystemTime::now();
    Validity::from_now(now, Duration::from_secs(u64::from(days) * 24 * 3600))
}

/// The lines that a configuration file needs.
fn show(ca: &Path, files: &Files, json: bool) -> anyhow::Result<()> {
    let absolute = |path: &Path| path.canonicalize().with_context(|| path.display().to_string());
    let (ca, cert, key) = (absolute(ca)?, absolute(&files.cert)?, absolute(&files.key)?);
    if json {
        return output::json(&json!({ "ca": ca, "cert": cert, "key": key }));
    }
    output::print(&format!("[tls]\nca = {ca:?}\ncert = {cert:?}\nkey = {key:?}\n"))
}

/// A certificate and its key.
struct Files {
    cert: PathBuf,
    key: PathBuf,
}

impl Files {
    fn new(dir: &Path, name: &str) -> Self {
        // Names have dots: the ending is added, not exchanged.
        Self { cert: dir.join(format!("{name}.pem")), key: dir.join(format!("{name}.key")) }
    }

    fn check_absent(&self, instead: &str) -> anyhow::Result<()> {
        match [&self.cert, &self.key].into_iter().find(|path| path.exists()) {
            Some(path) => bail!("{} is there and stays as it is: {instead}", path.display()),
            None => Ok(()),
        }
    }

    /// Key first: a certificate without one is of no use, and in the way.
    fn write(&self, issued: &Issued) -> anyhow::Result<()> {
        create(&self.key, &issued.key, KEY_MODE)?;
        let written = create(&self.cert, &issued.cert, CERTIFICATE_MODE);
        if written.is_err() {
            // It is ours, and made a moment ago.
            let _ = std::fs::remove_file(&self.key);
        }
        written
    }
}

/// Writes a file that is not there yet.
fn create(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    let file = File::options().write(true).create_new(true).mode(mode).open(path);
    let written = file.and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// Puts a file in the place of one, whole or not at all.
fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let new = PathBuf::from(format!("{}.new", path.display()));
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| new.display().to_string());
        }
        _ => {}
    }
    create(&new, text, CERTIFICATE_MODE)?;
    std::fs::rename(&new, path).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn wanted(name: &str, renew: bool) -> Wanted {
        Wanted { name: Name::new(name).expect("a name"), days: 1, host: vec!["n1.example".into()], renew }
    }

    fn make_ca(dir: &Path) -> anyhow::Result<()> {
        run(dir, true, Cert::Ca { path: dir.to_owned(), cluster: Name::new("c").expect("a name"), days: 2 })
    }

    #[test]
    fn nothing_is_overwritten_and_keys_are_for_their_owner() {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path();
        let error = run(dir, true, Cert::Node(wanted("n1", false))).expect_err("no authority");
        assert!(error.to_string().contains("has no ca.pem"), "{error}");
        make_ca(dir).expect("makes it");
        assert!(make_ca(dir).expect_err("once").to_string().contains("stays as it is"));
        run(dir, true, Cert::Node(wanted("n1", false))).expect("makes it");
        let read = |file: &str| std::fs::read_to_string(dir.join(file)).expect("is there");
        let (cert, key) = (read("node-n1.pem"), read("node-n1.key"));
        let error = run(dir, true, Cert::Node(wanted("n1", false))).expect_err("once");
        assert!(error.to_string().contains("--renew"), "{error}");
        assert_eq!((read("node-n1.pem"), read("node-n1.key")), (cert.clone(), key.clone()));
        for key in ["ca.key", "node-n1.key"] {
            let mode = std::fs::metadata(dir.join(key)).expect("is there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{key}");
        }
        run(dir, true, Cert::Node(wanted("n1", true))).expect("renews");
        assert!(read("node-n1.pem") != cert && read("node-n1.key") == key);
        let error = run(dir, true, Cert::Client(wanted("n1", true))).expect_err("there is none");
        assert!(error.to_string().contains("client-n1.pem"), "{error}");
    }
}
