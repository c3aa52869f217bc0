//! The lockds that a command talks to: named by the user, or found under a directory.
//!
//! A directory of `csnap up` has what each lockd wrote when it began to listen (`lockd*/data/address`), and what the agents
//! were told (`n*/agent.toml`). One of several machines has the one or the other. All that is found is tried: which of
//! them leads, they say themselves.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use csnap_agent::NodeConfig;
use csnap_lockd::client::Lockds;
use csnap_transport::{Address, Tls, TlsConfig};
use serde::Deserialize;

/// Most lockds that a command tries: a group, and as many addresses that are stale.
const LOCKDS_MAX: usize = 32;

/// Longest file that is looked into, bytes; those that are meant have some hundred.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// The option of every command that talks to lockd.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct At {
    /// Where the lockds listen; unless given, what --dir says.
    #[arg(long = "lockd", env = "CSNAP_LOCKD", value_name = "IP:PORT,…", value_delimiter = ',')]
    pub(crate) lockd: Option<Vec<SocketAddr>>,
}

/// What the environment says, for commands that have no option of their own.
pub(crate) fn from_environment() -> Option<Vec<SocketAddr>> {
    let text = std::env::var("CSNAP_LOCKD").ok()?;
    text.split(',').map(|address| address.parse().ok()).collect()
}

/// Where the lockds listen: `given` if there are any, else what `dir` tells. Never empty, none twice.
pub(crate) fn addresses(dir: &Path, given: Option<&[SocketAddr]>) -> anyhow::Result<Vec<SocketAddr>> {
    let found = match given {
        Some(given) if !given.is_empty() => given.to_vec(),
        _ => found_under(dir)?,
    };
    let mut seen = BTreeSet::new();
    let found: Vec<_> = found.into_iter().filter(|address| seen.insert(*address)).collect();
    match found.len() {
        0 => bail!("{} names no lockd: start csnap up there, or say --dir or --lockd", dir.display()),
        1..=LOCKDS_MAX => Ok(found),
        count => bail!("{count} lockds are more than the {LOCKDS_MAX} that a command tries: say --lockd"),
    }
}

/// The way to lockds at these addresses: with the certificate that the environment names, if it names one.
pub(crate) fn over(addresses: &[SocketAddr]) -> anyhow::Result<Lockds> {
    let addresses = addresses.iter().copied().map(Address::Tcp).collect();
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

/// Names a file with the `[tls]` of whoever gives the command, as `csnap cert operator` prints it.
const TLS_VARIABLE: &str = "CSNAP_TLS";

#[derive(Deserialize)]
struct TlsFile {
    tls: TlsConfig,
}

/// What the lockds below wrote themselves, then what the agents below were told.
fn found_under(dir: &Path) -> anyhow::Result<Vec<SocketAddr>> {
    let entries = std::fs::read_dir(dir)
        .with_context(|| format!("cannot read {}: start csnap up there, or say --lockd", dir.display()))?;
    let mut dirs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    dirs.sort_by_key(|path| (path.as_os_str().len(), path.clone()));
    dirs.insert(0, dir.to_path_buf());
    let written = dirs.iter().flat_map(|dir| [dir.join("address"), dir.join("data/address")]);
    let mut found: Vec<SocketAddr> =
        written.filter_map(|path| read(&path)).flat_map(|text| lines(&text)).collect();
    for path in dirs.iter().map(|dir| dir.join("agent.toml")) {
        if let Some(text) = read(&path) {
            let told = NodeConfig::parse(&text, &path)?.lockd;
            found.extend(told.into_iter().filter_map(|address| match address {
                Address::Tcp(address) => Some(address),
                Address::Unix(_) => None,
            }));
        }
    }
    Ok(found)
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

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    fn put(dir: &Path, path: &str, text: &str) {
        let path = dir.join(path);
        std::fs::create_dir_all(path.parent().expect("below dir")).expect("makes");
        std::fs::write(path, text).expect("writes");
    }

    #[test]
    fn what_is_given_goes_before_what_is_found() {
        let dir = tempfile::tempdir().expect("a directory");
        put(dir.path(), "lockd1/data/address", "127.0.0.1:1\n");
        let given = [address(9), address(9)];
        assert_eq!(addresses(dir.path(), Some(&given)).expect("given"), [address(9)]);
        assert_eq!(addresses(dir.path(), Some(&[])).expect("found"), [address(1)]);
    }

    #[test]
    fn lockds_and_agents_both_tell() {
        let dir = tempfile::tempdir().expect("a directory");
        put(dir.path(), "lockd2/data/address", "127.0.0.1:2\n");
        put(dir.path(), "lockd1/data/address", "127.0.0.1:1\nnonsense\n");
        let lockd = vec![address(2), address(3)];
        let config = NodeConfig::new("n1".parse().expect("a name"), "/p".into(), lockd, dir.path());
        put(dir.path(), "n1/agent.toml", &toml::to_string(&config).expect("plain values"));
        assert_eq!(addresses(dir.path(), None).expect("found"), [address(1), address(2), address(3)]);
    }

    #[test]
    fn nothing_found_is_one_line_that_says_what_to_do() {
        let dir = tempfile::tempdir().expect("a directory");
        for dir in [dir.path(), Path::new("/nowhere")] {
            let error = format!("{:#}", addresses(dir, None).expect_err("nothing"));
            assert!(error.contains("--lockd") && error.lines().count() == 1, "{error}");
        }
    }
}
