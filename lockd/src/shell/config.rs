//! Configuration of the daemon, read once, checked at the edge.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use csnap_proto::Name;
use csnap_transport::{TlsConfig, check_listen};
use serde::{Deserialize, Serialize};

use crate::replica::MEMBERS_MAX;

/// Most addresses to listen on.
const LISTEN_MAX: usize = csnap_proto::limits::LOCKD_ADDRESSES_MAX;

/// Everything that a lockd is told. Unknown keys are refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockdConfig {
    /// Name of the node that it runs on.
    pub node: Name,
    /// Its own directory, local to the node; made if it is not there.
    pub dir: PathBuf,
    /// Numeric addresses to listen on. Port 0 takes a free one; `DIR/address` says which.
    pub listen: Vec<SocketAddr>,
    /// Numeric address to listen on for other replicas, under which they know this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_listen: Option<SocketAddr>,
    /// Where the replicas of the group are found: of a new group all its founders, this one among them, the same for each;
    /// of a group that is there, any of its replicas. Empty for a lockd alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<SocketAddr>,
    /// Gives a silent leader up after 50 to 100 ms rather than 150 to 300: for quiet machines with fast disks.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fast_elections: bool,
    /// A unix socket to listen on too; absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen_unix: Option<PathBuf>,
    /// Certificates. With them every TCP address speaks TLS; without, none may be reached from other machines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsConfig>,
}

impl LockdConfig {
    /// Of a lockd alone.
    #[must_use]
    pub fn alone(node: Name, dir: PathBuf, listen: Vec<SocketAddr>) -> Self {
        Self {
            node,
            dir,
            listen,
            peer_listen: None,
            peers: Vec::new(),
            fast_elections: false,
            listen_unix: None,
            tls: None,
        }
    }

    /// Reads the text of the configuration file at `path`, which is only named in errors.
    ///
    /// # Errors
    /// One line that says what is wrong and where.
    pub fn parse(text: &str, path: &Path) -> anyhow::Result<Self> {
        let at = path.display();
        let config: Self = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start].lines().count().max(1));
            anyhow::anyhow!("{at}, line {line}: {}", error.message())
        })?;
        if config.listen.is_empty() || config.listen.len() > LISTEN_MAX {
            anyhow::bail!("{at}: `listen` needs 1 to {LISTEN_MAX} addresses");
        }
        let checked = config.check_peers().and_then(|()| config.check_exposed());
        checked.map_err(|what| anyhow::anyhow!("{at}: {what}"))?;
        Ok(config)
    }

    /// Whether nobody on another machine gets in without a certificate.
    pub(super) fn check_exposed(&self) -> Result<(), String> {
        let tls = self.tls.as_ref();
        tls.map_or(Ok(()), TlsConfig::check)?;
        if self.listen_unix.as_ref().is_some_and(|path| !path.is_absolute()) {
            return Err("`listen_unix` must be an absolute path".into());
        }
        check_listen(tls, "listen", self.listen.iter().copied())?;
        check_listen(tls, "peer_listen", self.peer_listen)?;
        check_listen(tls, "peers", self.peers.iter().copied())
    }

    fn check_peers(&self) -> Result<(), String> {
        if self.peers.is_empty() && self.peer_listen.is_none() {
            return Ok(());
        }
        let Some(own) = self.peer_listen else {
            return Err("`peers` needs `peer_listen`, the address among them that is this lockd's".into());
        };
        if own.port() == 0 || own.ip().is_unspecified() {
            return Err(
                "`peer_listen` must be an address and port at which the other replicas find this one".into(),
            );
        }
        if self.peers.len() > MEMBERS_MAX || !self.peers.contains(&own) {
            return Err(format!("`peers` needs up to {MEMBERS_MAX} addresses, {own} among them"));
        }
        let mut sorted = self.peers.clone();
        sorted.sort_unstable();
        sorted.dedup();
        if sorted.len() != self.peers.len() {
            return Err("`peers` has an address twice".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<LockdConfig, String> {
        LockdConfig::parse(text, Path::new("l.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_configuration_is_checked_at_the_edge() {
        let good = "node = 'n1'\ndir = '/d'\nlisten = ['127.0.0.1:0', '[::1]:7']\n";
        assert_eq!(parse(good).expect("good").listen.len(), 2);
        for (bad, says) in [
            ("node = 'n1'\ndir = '/d'\nlisten = []\n", "`listen` needs"),
            ("node = 'n1'\ndir = '/d'\nlisten = ['localhost:1']\n", "line 3"),
            ("node = '../x'\ndir = '/d'\nlisten = ['127.0.0.1:0']\n", "line 1"),
            ("node = 'n1'\ndir = '/d'\nlisten = ['127.0.0.1:0']\nport = 1\n", "port"),
            ("node = 'n1'\ndir = '/d'\n", "listen"),
            ("node = 'n1'\ndir = '/d'\nlisten = ['127.0.0.1:0']\npeers = ['10.0.0.1:1']\n", "peer_listen"),
            (
                "node = 'n1'\ndir = '/d'\nlisten = ['127.0.0.1:0']\npeer_listen = '10.0.0.1:0'\n",
                "find this one",
            ),
            ("node = 'n1'\ndir = '/d'\nlisten = ['127.0.0.1:0']\npeer_listen = '10.0.0.1:1'\n", "among them"),
            ("node = 'n1'\ndir = '/d'\nlisten = ['10.0.0.1:0']\n", "`listen` has 10.0.0.1:0"),
            ("node = 'n1'\ndir = '/d'\nlisten = ['0.0.0.0:0']\n", "no [tls]"),
            (
                "node = 'n1'\ndir = '/d'\nlisten = ['127.0.0.1:0']\npeer_listen = '127.0.0.1:1'\n\
                 peers = ['127.0.0.1:1', '10.0.0.1:1']\n",
                "`peers` has 10.0.0.1:1",
            ),
            ("node = 'n1'\ndir = '/d'\nlisten = ['127.0.0.1:0']\nlisten_unix = 'lockd.sock'\n", "absolute"),
            (
                "node = 'n1'\ndir = '/d'\nlisten = ['10.0.0.1:0']\n[tls]\nca = 'a'\ncert = '/c'\nkey = '/k'\n",
                "`ca` in [tls]",
            ),
        ] {
            let error = parse(bad).expect_err("bad");
            assert!(error.contains(says) && error.lines().count() == 1, "{error}");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let tls = "[tls]\nca = '/ca'\ncert = '/cert'\nkey = '/key'\n";
        for more in ["", "listen_unix = '/s'\n", tls] {
            let config =
                parse(&format!("node = 'n1'\ndir = '/d'\nlisten = ['127.0.0.1:0']\n{more}")).expect("good");
            assert_eq!(parse(&toml::to_string(&config).expect("plain values")), Ok(config));
        }
    }
}
