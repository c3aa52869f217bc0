//! Configuration of the daemon, read once, checked at the edge.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use csnap_proto::Name;
use serde::{Deserialize, Serialize};

/// Most addresses to listen on: one a network.
const LISTEN_MAX: usize = 16;

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
}

impl LockdConfig {
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
        Ok(config)
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
        ] {
            let error = parse(bad).expect_err("bad");
            assert!(error.contains(says) && error.lines().count() == 1, "{error}");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let config = parse("node = 'n1'\ndir = '/d'\nlisten = ['127.0.0.1:0']").expect("good");
        assert_eq!(parse(&toml::to_string(&config).expect("plain values")), Ok(config));
    }
}
