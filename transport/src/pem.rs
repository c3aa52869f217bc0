//! Certificates and keys in files, and what a certificate says.

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use csnap_proto::Principal;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Longest file of certificates or of a key that is read, bytes: some hundred certificates.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// Others, of a file's mode.
const OTHERS: u32 = 0o007;

/// What a certificate says of its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stated {
    /// Who; absent if it is none of ours.
    pub(crate) principal: Option<Principal>,
    /// When it ends, seconds since 1970.
    pub(crate) not_after: i64,
    /// Names and addresses of the hosts that it is for.
    #[cfg_attr(not(feature = "issue"), allow(dead_code, reason = "who renews a certificate keeps them"))]
    pub(crate) hosts: Vec<String>,
}

/// Reads what a certificate says. Of one that came from a peer only after its signatures were verified.
pub(crate) fn stated(certificate: &CertificateDer<'_>) -> Result<Stated, String> {
    let broken = |_| "it is no certificate that can be read".to_owned();
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(broken)?;
    let names = parsed.subject_alternative_name().map_err(|_| "its names cannot be read".to_owned())?;
    let (mut principals, mut hosts) = (Vec::new(), Vec::new());
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        match name {
            GeneralName::URI(uri) => principals.extend(uri.parse::<Principal>()),
            GeneralName::DNSName(name) => hosts.push((*name).to_owned()),
            GeneralName::IPAddress(bytes) => hosts.extend(ip(bytes).map(|ip| ip.to_string())),
            _ => {}
        }
    }
    if principals.len() > 1 {
        return Err("it names several principals".to_owned());
    }
    let not_after = parsed.validity().not_after.timestamp();
    Ok(Stated { principal: principals.pop(), not_after, hosts })
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    four.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// The certificates of a file, one at least.
pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let at = path.display();
    let (bytes, _) = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(format!("{at} has no certificate: it must be a PEM file")),
        Err(error) => Err(format!("{at} is no PEM file: {error}")),
    }
}

/// The key of a file that others may not read.
pub(crate) fn key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let at = path.display();
    let (bytes, mode) = read(path)?;
    if mode & OTHERS != 0 {
        return Err(format!("{at} is a key that everybody may read or write: chmod o= {at}"));
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| format!("{at} has no key: {error}"))
}

fn read(path: &Path) -> Result<(Vec<u8>, u32), String> {
    let failed = |error: std::io::Error| format!("cannot read {}: {error}", path.display());
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.len() > PEM_BYTES_MAX {
        return Err(format!("{} is no file of at most {PEM_BYTES_MAX} bytes", path.display()));
    }
    let mut bytes = Vec::new();
    file.take(PEM_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok((bytes, metadata.mode()))
}

/// The common name of a certificate's subject.
#[cfg(feature = "issue")]
pub(crate) fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let name = parsed.subject().iter_common_name().next()?.as_str().ok()?;
    Some(name.to_owned())
}
