//! The `[tls]` of a configuration file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Address;

/// With what a daemon proves who it is, and whom it believes. PEM files; changed ones are noticed within a second and are
/// used for new connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// Certificates of the authorities that are believed; more than one while they are being exchanged.
    pub ca: PathBuf,
    /// Our certificate, with those between it and the authority, if there are any.
    pub cert: PathBuf,
    /// Its key. Nobody but its owner and group may read it.
    pub key: PathBuf,
}

impl TlsConfig {
    /// Whether the paths mean the same wherever the daemon is started.
    ///
    /// # Errors
    /// One line for people.
    pub fn check(&self) -> Result<(), String> {
        for (key, path) in [("ca", &self.ca), ("cert", &self.cert), ("key", &self.key)] {
            if !path.is_absolute() {
                return Err(format!("`{key}` in [tls] must be an absolute path"));
            }
        }
        Ok(())
    }
}

/// Whether a daemon may listen on these addresses, or speak to them: without a certificate only on this machine. `key`
/// is what the configuration calls them.
///
/// # Errors
/// One line for people.
pub fn check_listen(
    tls: Option<&TlsConfig>,
    key: &str,
    addresses: impl IntoIterator<Item = impl Into<Address>>,
) -> Result<(), String> {
    let mut addresses = addresses.into_iter().map(Into::into);
    match addresses.find(|address| !address.is_local()).filter(|_| tls.is_none()) {
        Some(address) => Err(format!(
            "`{key}` has {address}, which other machines reach, and there is no [tls]: make certificates with \
             csnap cert, or use a loopback address"
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_machines_need_certificates() {
        let [near, far] = ["127.0.0.1:1", "10.0.0.1:1"].map(|text| text.parse::<Address>().expect("good"));
        assert_eq!(check_listen(None, "listen", [near.clone()]), Ok(()));
        let error = check_listen(None, "listen", [near.clone(), far.clone()]).expect_err("refused");
        assert!(error.contains("`listen` has 10.0.0.1:1") && error.lines().count() == 1, "{error}");
        let tls = TlsConfig { ca: "/ca".into(), cert: "/cert".into(), key: "/key".into() };
        assert_eq!(check_listen(Some(&tls), "listen", [near, far]), Ok(()));
    }

    #[test]
    fn paths_are_absolute_and_keys_are_known() {
        let tls = |text: &str| toml::from_str::<TlsConfig>(text);
        let good = tls("ca = '/ca'\ncert = '/cert'\nkey = '/key'").expect("good");
        assert_eq!(good.check(), Ok(()));
        let relative = tls("ca = '/ca'\ncert = 'cert'\nkey = '/key'").expect("parses");
        assert!(relative.check().expect_err("relative").contains("`cert`"));
        assert!(tls("ca = '/ca'\ncert = '/cert'\nkey = '/key'\nkeys = '/k'").is_err());
    }
}
