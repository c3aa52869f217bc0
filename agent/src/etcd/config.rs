//! `[etcd]` of `agent.toml`.

// An address is a value; nothing is opened here.
use ::core::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::session::LEASE_S_MIN;

/// Longest prefix, bytes.
const PREFIX_BYTES_MAX: usize = 128;

/// An etcd in lockd's place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EtcdConfig {
    /// Client addresses of its members, numeric.
    pub endpoints: Vec<SocketAddr>,
    /// Below which csnap keeps its keys: the same for every node of a pool, another for every pool.
    pub prefix: String,
}

impl EtcdConfig {
    /// What is wrong with it, in one line.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.endpoints.is_empty() {
            return Err("etcd.endpoints needs at least one address".to_owned());
        }
        let prefix = self.prefix.trim_end_matches('/');
        if prefix.is_empty()
            || prefix.len() > PREFIX_BYTES_MAX
            || !prefix.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Err(format!(
                "etcd.prefix must be 1 to {PREFIX_BYTES_MAX} printable characters without spaces, \
                 another for every pool"
            ));
        }
        Ok(())
    }

    /// What every key begins with.
    #[must_use]
    pub fn key_prefix(&self) -> String {
        format!("{}/", self.prefix.trim_end_matches('/'))
    }
}

/// The lease that etcd is asked for where `lease_ms` is configured: whole seconds, and no fewer than it grants.
#[must_use]
pub fn lease_ms(lease_ms: u64) -> u64 {
    lease_ms.div_ceil(1000).max(u64::from(LEASE_S_MIN)) * 1000
}
