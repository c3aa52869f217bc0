//! A node's one configuration file, `agent.toml`: the agent, the server and the exporter of the node each read from it
//! what they need. It is read once, at start; unknown keys are refused.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use csnap_proto::limits::PATH_BYTES_MAX;
use csnap_proto::{ClusterId, Name};
use csnap_transport::{Address, SOCKET_PATH_BYTES_MAX, TlsConfig, check_listen};
use serde::{Deserialize, Serialize};

use crate::core::Failback;
use crate::etcd::EtcdConfig;

/// Highest priority: room for any scheme, short in a table.
pub const PRIORITY_MAX: u32 = 1_000_000;

/// Everything that the daemons of one node are told. Times are milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Name of the node, unique in the cluster.
    pub node: Name,
    /// Directory that all nodes share; absolute.
    pub pool: PathBuf,
    /// Where the lockds are: numeric addresses, or unix sockets of this machine.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lockd: Vec<Address>,
    /// Id of the lockds' cluster, 32 hexadecimal digits. Unless given, it is that of the first one met, and remembered.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "hexadecimal")]
    pub cluster: Option<ClusterId>,
    /// An etcd in place of lockd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etcd: Option<EtcdConfig>,
    /// The agent's unix socket; absolute.
    pub agent_sock: PathBuf,
    /// Directory for what the agent remembers over a restart; absolute, local to the node.
    pub state: PathBuf,
    /// How the server reads and writes the pool.
    #[serde(default)]
    pub io: Io,
    /// Address that the server of this node listens on; every node must reach it. Port 0 takes a free one.
    #[serde(default = "default_server_listen")]
    pub server_listen: SocketAddr,
    /// Unix socket of the exporter; absolute.
    pub nbd_unix: PathBuf,
    /// TCP address of the exporter, if it has one.
    #[serde(default)]
    pub nbd_tcp: Option<SocketAddr>,
    /// The higher, the rather this node's server serves; 0 for never.
    #[serde(default = "default_priority")]
    pub priority: u32,
    /// Whether a better node gets the server back by itself.
    #[serde(default = "default_failback")]
    pub failback: Failback,
    /// How long a better node must have been ready for that.
    #[serde(default = "default_failback_after_ms")]
    pub failback_after_ms: u64,
    /// Lease of the session with lockd: a dead node's server is replaced after it.
    #[serde(default = "default_lease_ms")]
    pub lease_ms: u64,
    /// Between renewals of it.
    #[serde(default = "default_renew_ms")]
    pub renew_ms: u64,
    /// Between pings of the server child.
    #[serde(default = "default_ping_ms")]
    pub ping_ms: u64,
    /// A child that leaves a ping unanswered this long is killed.
    #[serde(default = "default_ping_timeout_ms")]
    pub ping_timeout_ms: u64,
    /// At a vacancy a node waits this long for each one that ranks before it.
    #[serde(default = "default_place_step_ms")]
    pub place_step_ms: u64,
    /// Lease of client sessions with the server.
    #[serde(default = "default_client_lease_ms")]
    pub client_lease_ms: u64,
    /// Bounds a client's memory of which chunks are its own, bytes a volume.
    #[serde(default = "default_unique_cache_bytes")]
    pub unique_cache_bytes: u64,
    /// Certificate of the node. With it the lockds are spoken to by TLS; without, only those of this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsConfig>,
}

/// How files are read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Io {
    /// io_uring where the kernel has it, else threads.
    #[default]
    Auto,
    /// io_uring, or an error at start.
    Uring,
    /// A few threads that make plain system calls, which tracers and sandboxes see.
    Threads,
}

/// Any free port of this machine.
fn default_server_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// Room below and above.
fn default_priority() -> u32 {
    100
}

fn default_failback() -> Failback {
    Failback::Auto
}

/// Long enough that a node which flaps does not drag the server along.
fn default_failback_after_ms() -> u64 {
    5000
}

/// Six renewals; far above any pause of a healthy machine.
fn default_lease_ms() -> u64 {
    1500
}

fn default_renew_ms() -> u64 {
    250
}

fn default_ping_ms() -> u64 {
    100
}

/// Five pings: a server that is merely busy answers within one.
fn default_ping_timeout_ms() -> u64 {
    500
}

/// Above the time in which lockd's news of a vacancy reaches every node and the best one's answer returns.
fn default_place_step_ms() -> u64 {
    40
}

fn default_client_lease_ms() -> u64 {
    15_000
}

fn default_unique_cache_bytes() -> u64 {
    64 << 20
}

/// Ids as people copy them.
mod hexadecimal {
    use csnap_proto::ClusterId;
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(id: &Option<ClusterId>, serializer: S) -> Result<S::Ok, S::Error> {
        match id {
            Some(id) => serializer.collect_str(id),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<ClusterId>, D::Error> {
        String::deserialize(deserializer)?.parse().map(Some).map_err(de::Error::custom)
    }
}

/// Why a configuration is of no use: one line for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {what}")]
pub struct ConfigError {
    /// The file.
    pub path: String,
    /// What is wrong with it.
    pub what: String,
}

impl NodeConfig {
    /// Defaults for a node whose sockets and state lie in `dir`.
    #[must_use]
    pub fn new(node: Name, pool: PathBuf, lockd: Vec<SocketAddr>, dir: &Path) -> Self {
        Self {
            node,
            pool,
            lockd: lockd.into_iter().map(Address::Tcp).collect(),
            cluster: None,
            etcd: None,
            agent_sock: dir.join("agent.sock"),
            state: dir.join("state"),
            io: Io::default(),
            server_listen: default_server_listen(),
            nbd_unix: dir.join("nbd.sock"),
            nbd_tcp: None,
            priority: default_priority(),
            failback: default_failback(),
            failback_after_ms: default_failback_after_ms(),
            lease_ms: default_lease_ms(),
            renew_ms: default_renew_ms(),
            ping_ms: default_ping_ms(),
            ping_timeout_ms: default_ping_timeout_ms(),
            place_step_ms: default_place_step_ms(),
            client_lease_ms: default_client_lease_ms(),
            unique_cache_bytes: default_unique_cache_bytes(),
            tls: None,
        }
    }

    /// Parses and checks a configuration; `path` is named in errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let fail = |what: String| ConfigError { path: path.display().to_string(), what };
        let config: Self = toml::from_str(text).map_err(|error| {
            let line = error.span().map(|span| text[..span.start.min(text.len())].lines().count().max(1));
            let line = line.map(|line| format!("line {line}: ")).unwrap_or_default();
            fail(format!("{line}{}", error.message()))
        })?;
        config.check().map_err(fail)?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        for (key, path) in [
            ("pool", &self.pool),
            ("agent_sock", &self.agent_sock),
            ("state", &self.state),
            ("nbd_unix", &self.nbd_unix),
        ] {
            let text = path.to_str().ok_or_else(|| format!("{key} must be UTF-8"))?;
            if !path.is_absolute() || text.len() > PATH_BYTES_MAX {
                return Err(format!("{key} must be an absolute path of at most {PATH_BYTES_MAX} bytes"));
            }
        }
        for (key, path) in [("agent_sock", &self.agent_sock), ("nbd_unix", &self.nbd_unix)] {
            if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
                return Err(format!(
                    "{key} is longer than the {SOCKET_PATH_BYTES_MAX} bytes that the kernel takes for a unix socket; \
                     use a shorter directory"
                ));
            }
        }
        if self.server_listen.ip().is_unspecified() {
            // It is published as it stands, and other nodes connect to it.
            return Err("server_listen must be an address of this node that every node reaches".to_owned());
        }
        match (&self.etcd, self.lockd.is_empty()) {
            (None, false) => {}
            (Some(etcd), true) => etcd.check()?,
            (None, true) => {
                return Err("lockd needs at least one address, or there must be an [etcd]".to_owned());
            }
            (Some(_), false) => {
                return Err("lockd and [etcd] are both there; keep the one that elects the server".to_owned());
            }
        }
        self.tls.as_ref().map_or(Ok(()), TlsConfig::check)?;
        check_listen(self.tls.as_ref(), "lockd", self.lockd.iter().cloned())?;
        if self.priority > PRIORITY_MAX {
            return Err(format!("priority is at most {PRIORITY_MAX}"));
        }
        let times = [
            ("lease_ms", self.lease_ms, 300, 60_000),
            ("renew_ms", self.renew_ms, 10, self.lease_ms / 3),
            ("ping_ms", self.ping_ms, 10, 10_000),
            ("ping_timeout_ms", self.ping_timeout_ms, self.ping_ms, 60_000),
            ("place_step_ms", self.place_step_ms, 1, 10_000),
            ("failback_after_ms", self.failback_after_ms, 1, 86_400_000),
            ("client_lease_ms", self.client_lease_ms, 1000, 600_000),
        ];
        for (key, value, min, max) in times {
            if !(min..=max).contains(&value) {
                return Err(format!("{key} is {value}, and must lie between {min} and {max}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        node = "n1"
        pool = "/srv/pool"
        lockd = ["127.0.0.1:7000"]
        agent_sock = "/run/csnap/agent.sock"
        state = "/var/lib/csnap"
        nbd_unix = "/run/csnap/nbd.sock"
    "#;

    fn parse(text: &str) -> Result<NodeConfig, ConfigError> {
        NodeConfig::parse(text, Path::new("agent.toml"))
    }

    #[test]
    fn defaults_are_those_of_the_documentation() {
        let config = parse(GOOD).expect("good");
        assert_eq!((config.lease_ms, config.renew_ms), (1500, 250));
        assert_eq!((config.ping_ms, config.ping_timeout_ms, config.place_step_ms), (100, 500, 40));
        assert_eq!((config.priority, config.failback, config.io), (100, Failback::Auto, Io::Auto));
    }

    #[test]
    fn what_was_written_is_read_again() {
        let config = parse(GOOD).expect("good");
        let text = toml::to_string(&config).expect("encodes");
        assert_eq!(parse(&text).expect("good"), config);
        let more = "cluster = \"000102030405060708090a0b0c0d0e0f\"\n[tls]\nca = \"/ca\"\ncert = \"/cert\"\nkey = \"/key\"";
        let config = parse(&format!("{GOOD}\n{more}")).expect("good");
        let text = toml::to_string(&config).expect("encodes");
        assert_eq!(parse(&text).expect("good"), config);
        let etcd = EtcdConfig {
            endpoints: vec![SocketAddr::from(([10, 0, 0, 1], 2379))],
            prefix: "/csnap/a".to_owned(),
        };
        assert_eq!(etcd.key_prefix(), "/csnap/a/");
        let config = NodeConfig { lockd: Vec::new(), etcd: Some(etcd), ..config };
        let text = toml::to_string(&config).expect("encodes");
        assert_eq!(parse(&text).expect("good"), config);
    }

    #[test]
    fn lockds_of_other_machines_need_certificates() {
        let other = GOOD.replace("127.0.0.1:7000\"", "unix:/run/lockd.sock\", \"10.0.0.1:7000\"");
        let error = parse(&other).expect_err("refused").to_string();
        assert!(error.contains("`lockd` has 10.0.0.1:7000") && error.lines().count() == 1, "{error}");
        parse(&format!("{other}\n[tls]\nca = \"/ca\"\ncert = \"/cert\"\nkey = \"/key\"")).expect("good");
    }

    #[test]
    fn every_error_names_the_file_and_the_key() {
        for (change, key) in [
            ("prioritty = 3", "prioritty"),
            ("priority = 2000000", "priority"),
            ("renew_ms = 501", "renew_ms"),
            ("ping_timeout_ms = 1", "ping_timeout_ms"),
            ("failback = \"never\"", "never"),
            ("io = \"mmap\"", "mmap"),
            ("pool_shared = true", "pool_shared"),
            ("server_listen = \"0.0.0.0:7\"", "server_listen"),
            ("cluster = \"7\"", "32 hexadecimal digits"),
            ("[tls]\nca = \"/ca\"\ncert = \"cert\"\nkey = \"/key\"", "`cert` in [tls]"),
        ] {
            let error = parse(&format!("{GOOD}\n{change}")).expect_err(change).to_string();
            assert!(error.starts_with("agent.toml: ") && error.contains(key), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        for (etcd, key) in [
            ("[etcd]\nendpoints = []\nprefix = \"p\"", "etcd.endpoints"),
            ("[etcd]\nendpoints = [\"10.0.0.1:2379\"]\nprefix = \"/\"", "etcd.prefix"),
            ("[etcd]\nendpoints = [\"10.0.0.1:2379\"]", "prefix"),
            ("", "lockd"),
        ] {
            let without = GOOD.replace("lockd = [\"127.0.0.1:7000\"]", "");
            let error = parse(&format!("{without}\n{etcd}")).expect_err(etcd).to_string();
            assert!(error.contains(key) && error.lines().count() == 1, "{error}");
        }
        let both = format!("{GOOD}\n[etcd]\nendpoints = [\"10.0.0.1:2379\"]\nprefix = \"p\"");
        assert!(parse(&both).expect_err("both").to_string().contains("both there"));
        let name = GOOD.replace("\"n1\"", "\"a/b\"");
        assert!(parse(&name).expect_err("name").to_string().contains("a name starts with"));
        let relative = GOOD.replace("/srv/pool", "pool");
        assert!(parse(&relative).expect_err("relative").to_string().contains("absolute"));
    }
}
