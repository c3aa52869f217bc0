//! The lockds that a command talks to: named by the user, or found under a directory.
//!
//! A directory of `csnap up` has each lockd's socket (`lockd*/lockd.sock`), what each wrote when it began to listen
//! (`lockd*/data/address`), and what the agents were told (`n*/agent.toml`). One of several machines has some of them. A
//! lockd whose socket is there is asked through it. All that is found is tried: which of them leads, they say themselves.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use csnap_agent::NodeConfig;
use csnap_lockd::client::Lockds;
use csnap_proto::Name;
use csnap_transport::{Address, SOCKET_PATH_BYTES_MAX, Tls, TlsConfig, Unreached};
use serde::Deserialize;

/// Most lockds that a command tries: a group, and as many addresses that are stale.
const LOCKDS_MAX: usize = 32;

/// Longest file that is looked into, bytes; those that are meant have some hundred.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Names a file with the `[tls]` of whoever gives the command, as `csnap cert operator` prints it.
const TLS_VARIABLE: &str = "CSNAP_TLS";

/// The option of every command that talks to lockd.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct At {
    /// Where the lockds listen, IP:PORT or unix:/PATH each; unless given, what --dir says.
    #[arg(long = "lockd", env = "CSNAP_LOCKD", value_name = "ADDRESS,…", value_delimiter = ',')]
    pub(crate) lockd: Option<Vec<Address>>,
}

impl At {
    /// What the environment says, for commands that have no option of their own.
    pub(crate) fn from_environment() -> Self {
        let text = std::env::var("CSNAP_LOCKD").ok();
        Self { lockd: text.and_then(|text| text.split(',').map(|address| address.parse().ok()).collect()) }
    }
}

/// The option of commands about what is in a lockspace.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct In {
    /// Lockspace; unless given, the one that every group has, which csnap itself uses.
    #[arg(long = "space", env = "CSNAP_LOCKSPACE", value_name = "NAME")]
    pub(crate) space: Option<Name>,
}

/// The way to the lockds: those that are given if there are any, else those that `dir` tells of. At least one, none twice.
pub(crate) fn find(dir: &Path, given: &At) -> anyhow::Result<Lockds> {
    over(addresses(dir, given)?)
}

fn addresses(dir: &Path, given: &At) -> anyhow::Result<Vec<Address>> {
    let found = match given.lockd.as_deref() {
        Some(given) if !given.is_empty() => given.to_vec(),
        _ => found_under(dir)?,
    };
    let mut seen = BTreeSet::new();
    let found: Vec<_> = found.into_iter().filter(|address| seen.insert(address.clone())).collect();
    match found.len() {
        0 => bail!("{} names no lockd: start csnap up there, or say --dir or --lockd", dir.display()),
        1..=LOCKDS_MAX => Ok(found),
        count => bail!("{count} lockds are more than the {LOCKDS_MAX} that a command tries: say --lockd"),
    }
}

/// The way to lockds at these addresses: with the certificate that the environment names, if it names one.
pub(crate) fn over(addresses: Vec<Address>) -> anyhow::Result<Lockds> {
    let Some(path) = std::env::var_os(TLS_VARIABLE).map(PathBuf::from) else {
        return Ok(Lockds::new(addresses, None));
    };
    let at = || format!("{} ({TLS_VARIABLE})", path.display());
    let text = std::fs::read_to_string(&path).with_context(at)?;
    let file: TlsFile =
        toml::from_str(&text).map_err(|error| anyhow::anyhow!("{}: {}", at(), error.message()))?;
    let tls =
        file.tls.check().and_then(|()| Tls::load(&file.tls)).map_err(anyhow::Error::msg).with_context(at)?;
    Ok(Lockds::new(addresses, Some(tls)))
}

#[derive(Deserialize)]
struct TlsFile {
    tls: TlsConfig,
}

/// Their addresses, for people.
pub(crate) fn shown(addresses: &[Address]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// None of them is reached, for the reason that names each.
pub(crate) fn nobody(lockds: &Lockds, why: &Unreached) -> anyhow::Error {
    match why {
        Unreached::Away(why) => anyhow::anyhow!("no lockd answers: {why}; see that they run"),
        // A daemon has it in its configuration; where a command has it, only the environment says.
        Unreached::Refused(why) if lockds.caller().is_none() && why.contains("[tls]") => {
            anyhow::anyhow!(
                "{why}; {TLS_VARIABLE} names the file with the [tls] of a command (csnap cert operator)"
            )
        }
        Unreached::Refused(why) => anyhow::anyhow!("{why}"),
    }
}

/// The lockds below, then what the agents below were told.
fn found_under(dir: &Path) -> anyhow::Result<Vec<Address>> {
    let entries = std::fs::read_dir(dir)
        .with_context(|| format!("cannot read {}: start csnap up there, or say --lockd", dir.display()))?;
    let mut dirs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    dirs.sort_by_key(|path| (path.as_os_str().len(), path.clone()));
    dirs.insert(0, dir.to_path_buf());
    // Of those that have a socket, where else they listen: nobody is asked twice.
    let (mut found, mut also) = (Vec::new(), BTreeSet::new());
    for dir in &dirs {
        let written = [dir.join("address"), dir.join("data/address")];
        let tcp =
            written.iter().filter_map(|path| read(path)).flat_map(|text| lines(&text)).map(Address::Tcp);
        match socket_in(dir) {
            Some(socket) => {
                found.push(socket);
                also.extend(tcp);
            }
            None => found.extend(tcp),
        }
    }
    for path in dirs.iter().map(|dir| dir.join("agent.toml")) {
        if let Some(text) = read(&path) {
            found.extend(
                NodeConfig::parse(&text, &path)?.lockd.into_iter().filter(|told| !also.contains(told)),
            );
        }
    }
    Ok(found)
}

/// A lockd's socket, if it has one whose path the kernel takes.
fn socket_in(dir: &Path) -> Option<Address> {
    let path = std::path::absolute(dir.join("lockd.sock")).ok()?;
    let is_socket = std::fs::metadata(&path).is_ok_and(|metadata| metadata.file_type().is_socket());
    (is_socket && path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX).then_some(Address::Unix(path))
}

/// The text of a file of ours, if there is one.
fn read(path: &Path) -> Option<String> {
    let metadata = std::fs::metadata(path).ok()?;
    let ours = metadata.is_file() && metadata.len() <= FILE_BYTES_MAX;
    ours.then(|| std::fs::read_to_string(path).ok()).flatten()
}

fn lines(text: &str) -> Vec<SocketAddr> {
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> Address {
        SocketAddr::from(([127, 0, 0, 1], port)).into()
    }

    fn put(dir: &Path, path: &str, text: &str) {
        let path = dir.join(path);
        std::fs::create_dir_all(path.parent().expect("below dir")).expect("makes");
        std::fs::write(path, text).expect("writes");
    }

    fn given(addresses: &[Address]) -> At {
        At { lockd: Some(addresses.to_vec()) }
    }

    #[test]
    fn what_is_given_goes_before_what_is_found() {
        let dir = tempfile::tempdir().expect("a directory");
        put(dir.path(), "lockd1/data/address", "127.0.0.1:1\n");
        let socket: Address = "unix:/run/lockd.sock".parse().expect("an address");
        let both = [address(9), socket.clone(), address(9)];
        assert_eq!(addresses(dir.path(), &given(&both)).expect("given"), [address(9), socket]);
        assert_eq!(addresses(dir.path(), &given(&[])).expect("found"), [address(1)]);
    }

    #[test]
    fn lockds_and_agents_both_tell() {
        let dir = tempfile::tempdir().expect("a directory");
        put(dir.path(), "lockd2/data/address", "127.0.0.1:2\n");
        put(dir.path(), "lockd1/data/address", "127.0.0.1:1\nnonsense\n");
        let lockd = [2, 3].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let config = NodeConfig::new("n1".parse().expect("a name"), "/p".into(), lockd.to_vec(), dir.path());
        put(dir.path(), "n1/agent.toml", &toml::to_string(&config).expect("plain values"));
        let all = addresses(dir.path(), &At::default()).expect("found");
        assert_eq!(all, [address(1), address(2), address(3)]);
        // One that has a socket is asked through it, once.
        let socket = dir.path().join("lockd2/lockd.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a short path");
        let all = addresses(dir.path(), &At::default()).expect("found");
        assert_eq!(all, [address(1), Address::Unix(socket), address(3)]);
    }

    #[test]
    fn nothing_found_is_one_line_that_says_what_to_do() {
        let dir = tempfile::tempdir().expect("a directory");
        for dir in [dir.path(), Path::new("/nowhere")] {
            let error = format!("{:#}", addresses(dir, &At::default()).expect_err("nothing"));
            assert!(error.contains("--lockd") && error.lines().count() == 1, "{error}");
        }
    }
}
