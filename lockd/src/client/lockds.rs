//! The way to the lockds: where they are, how we prove who we are, and which cluster is ours.

use std::fs::File;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use csnap_proto::{Caller, ClusterId};
use csnap_transport::{Address, Stream, Tls, Unreached};
use tracing::{info, warn};

use crate::shell::greeting::{greet_any_lockd, greet_lockd};
use crate::shell::socket::dial;

/// An address that did not greet by then is passed over for the next: lockds are a local network apart, and one that is
/// frozen still takes connections.
const REACH_WITHIN: Duration = Duration::from_millis(250);

/// Longest file that remembers a cluster, bytes.
const REMEMBERED_BYTES_MAX: u64 = 64;

/// See the module. Clones share what was learned.
#[derive(Clone, Debug, Default)]
pub struct Lockds {
    addresses: Vec<Address>,
    tls: Option<Tls>,
    /// Known from the beginning, or learned at the first contact, and the same from then on.
    cluster: Arc<OnceLock<ClusterId>>,
    /// Where it is kept for the next life.
    kept: Option<PathBuf>,
}

impl From<Vec<SocketAddr>> for Lockds {
    fn from(addresses: Vec<SocketAddr>) -> Self {
        Self::new(addresses.into_iter().map(Address::Tcp).collect(), None)
    }
}

impl From<Vec<Address>> for Lockds {
    fn from(addresses: Vec<Address>) -> Self {
        Self::new(addresses, None)
    }
}

impl Lockds {
    /// Lockds of whatever cluster answers first. Without `tls` only those of this machine.
    #[must_use]
    pub fn new(addresses: Vec<Address>, tls: Option<Tls>) -> Self {
        Self { addresses, tls, ..Self::default() }
    }

    /// Only those of this cluster.
    #[must_use]
    pub fn of(self, cluster: ClusterId) -> Self {
        // A second one would be a contradiction; the first stays.
        let _ = self.cluster.set(cluster);
        self
    }

    /// Only those of the cluster that the file names; it is made at the first contact.
    ///
    /// # Errors
    /// One line for people, if the file is there and does not say.
    pub fn remembered_in(self, path: PathBuf) -> Result<Self, String> {
        match read(&path) {
            Ok(Some(cluster)) => Ok(self.of(cluster)),
            Ok(None) => Ok(Self { kept: Some(path), ..self }),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    /// Those of another group, which our own group said that it moved what we use to. It is a cluster of its own, and not
    /// remembered for the next life: then our own group says so again.
    #[must_use]
    pub fn moved_to(&self, addresses: Vec<SocketAddr>) -> Self {
        Self::new(addresses.into_iter().map(Address::Tcp).collect(), self.tls.clone())
    }

    /// The cluster, once it is known.
    #[must_use]
    pub fn cluster(&self) -> Option<ClusterId> {
        self.cluster.get().copied()
    }

    /// The first of our cluster that can be reached: where the leader is said to be (`hint`), then all, another one first at
    /// each attempt. What can be read then is frames.
    ///
    /// # Errors
    /// One line that says why for each address; refused if every one of them did.
    pub async fn connect_any(&self, attempt: u64, hint: Option<SocketAddr>) -> Result<Stream, Unreached> {
        let (mut errors, mut some_away) = (Vec::new(), false);
        for address in &self.in_order(attempt, hint) {
            let reached = tokio::time::timeout(REACH_WITHIN, self.reach(address)).await;
            match reached.unwrap_or_else(|_| Err(Unreached::Away("it does not answer in time".to_owned()))) {
                Ok(stream) => return Ok(stream),
                Err(error) => {
                    some_away |= matches!(error, Unreached::Away(_));
                    errors.push(format!("lockd at {address}: {error}"));
                }
            }
        }
        // The same for the same errors, whichever address was tried first.
        errors.sort_unstable();
        if errors.is_empty() {
            return Err(Unreached::Refused("no address of a lockd is given".to_owned()));
        }
        let errors = errors.join("; ");
        Err(if some_away { Unreached::Away(errors) } else { Unreached::Refused(errors) })
    }

    /// A lockd that is asked about itself. It may belong to no cluster yet.
    ///
    /// # Errors
    /// One line that says why not.
    pub async fn connect_to(&self, address: &Address) -> Result<Stream, Unreached> {
        let mut stream = dial(address, self.tls.as_ref()).await?;
        greet_any_lockd(&mut stream, self.cluster()).await?;
        Ok(stream)
    }

    /// Who we are to them, by our certificate.
    #[must_use]
    pub fn caller(&self) -> Option<Caller> {
        self.tls.as_ref().map(|tls| tls.own().caller)
    }

    /// Where they are.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    fn in_order(&self, attempt: u64, hint: Option<SocketAddr>) -> Vec<Address> {
        let (count, hint) = (self.addresses.len(), hint.map(Address::Tcp));
        let first = usize::try_from(attempt % count.max(1) as u64).expect("below a count");
        let all = self.addresses.iter().cycle().skip(first).take(count);
        let others = all.filter(|address| Some(*address) != hint.as_ref()).cloned();
        hint.iter().cloned().chain(others).collect()
    }

    async fn reach(&self, address: &Address) -> Result<Stream, Unreached> {
        let mut stream = dial(address, self.tls.as_ref()).await?;
        let cluster = greet_lockd(&mut stream, self.cluster()).await?;
        // Another connection may have learned in the meantime.
        if *self.cluster.get_or_init(|| cluster) != cluster {
            return Err(Unreached::Refused(format!("it belongs to cluster {cluster}, and we to another")));
        }
        if let Some(path) = self.kept.as_ref().filter(|path| !path.exists()) {
            match write(path, cluster) {
                Ok(()) => info!("from now on of cluster {cluster}, as {} says", path.display()),
                Err(error) => warn!("{}: {error}; the cluster will be learned again", path.display()),
            }
        }
        Ok(stream)
    }
}

fn read(path: &Path) -> io::Result<Option<ClusterId>> {
    let length = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if length > REMEMBERED_BYTES_MAX {
        return Err(io::Error::other("too long for the id of a cluster"));
    }
    std::fs::read_to_string(path)?.trim().parse().map(Some).map_err(io::Error::other)
}

/// Whole or not at all. A few bytes, once in the life of a node.
fn write(path: &Path, cluster: ClusterId) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    writeln!(file, "{cluster}")?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    File::open(path.parent().ok_or(io::ErrorKind::InvalidInput)?)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_learned_is_remembered_and_nonsense_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("cluster");
        let lockds = || Lockds::default().remembered_in(path.clone());
        assert_eq!(lockds().expect("nothing yet").cluster(), None);
        write(&path, ClusterId([7; 16])).expect("writes");
        assert_eq!(lockds().expect("is there").cluster(), Some(ClusterId([7; 16])));
        for bad in ["", "77", &"7".repeat(100)] {
            std::fs::write(&path, bad).expect("writes");
            let error = lockds().expect_err("nonsense");
            assert!(error.contains("cluster") && error.lines().count() == 1, "{error}");
        }
    }

    #[tokio::test]
    async fn other_machines_are_not_spoken_to_without_certificates() {
        let lockds = Lockds::from(vec![SocketAddr::from(([192, 0, 2, 1], 7))]);
        let error = lockds.connect_any(0, None).await.expect_err("refused");
        let expected = "lockd at 192.0.2.1:7: other machines are reached only with a [tls]";
        assert_eq!(error, Unreached::Refused(expected.to_owned()));
    }
}
