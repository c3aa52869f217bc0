//! Makes a certificate authority, and certificates of it.
//!
//! Keys are ECDSA over P-256, which every TLS library has. Certificates are for both ends of a connection, and name a
//! [`Principal`]; hosts too, for clients that look at those (qemu, libnbd).

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use csnap_proto::{Name, Principal};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use time::OffsetDateTime;

use super::pem;

/// Longest common name that other programs take, bytes (RFC 5280, ub-common-name).
const COMMON_NAME_BYTES_MAX: usize = 64;

/// A certificate counts from so long before it is made: clocks of a cluster differ.
const BEFORE_NOW: Duration = Duration::from_secs(3600);

/// A certificate and its key, as PEM.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate.
    pub cert: String,
    /// Its key.
    pub key: String,
}

/// From when to when.
#[derive(Clone, Copy, Debug)]
pub struct Validity {
    from: OffsetDateTime,
    until: OffsetDateTime,
}

impl Validity {
    /// From an hour ago, until so long after `now`.
    #[must_use]
    pub fn from_now(now: SystemTime, length: Duration) -> Self {
        let now = OffsetDateTime::from(now);
        Self { from: now - BEFORE_NOW, until: now + length }
    }

    /// Was over before `now`; for tests of what is refused.
    #[must_use]
    pub fn over(now: SystemTime) -> Self {
        let now = OffsetDateTime::from(now);
        Self { from: now - 2 * BEFORE_NOW, until: now - BEFORE_NOW }
    }
}

/// An authority: what its certificates are signed with.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    cluster: Name,
    until: OffsetDateTime,
}

/// Makes the authority of a cluster.
///
/// # Errors
/// One line for people.
pub fn make_authority(cluster: &Name, validity: Validity) -> Result<Issued, String> {
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = params(&authority_name(cluster), validity)?;
    // It signs certificates of peers and nothing below them.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let cert = params.self_signed(&key).map_err(failed)?;
    Ok(Issued { cert: cert.pem(), key: key.serialize_pem() })
}

impl Authority {
    /// Reads one that [`make_authority`] made.
    ///
    /// # Errors
    /// One line that says which file is wrong.
    pub fn load(cert: &Path, key: &Path) -> Result<Self, String> {
        let wrong = |what: &str| format!("{}: {what}", cert.display());
        let found = pem::certificates(cert)?;
        let until = pem::stated(&found[0]).map_err(|error| wrong(&error))?.not_after;
        let until = OffsetDateTime::from_unix_timestamp(until).map_err(|_| wrong("its end is no time"))?;
        let issuer =
            Issuer::from_ca_cert_der(&found[0], key_pair(key)?).map_err(|error| wrong(&error.to_string()))?;
        let cluster = cluster_of(&found[0]).ok_or_else(|| wrong("not a CA that csnap cert made"))?;
        Ok(Self { issuer, cluster, until })
    }

    /// The cluster that it is for.
    #[must_use]
    pub fn cluster(&self) -> &Name {
        &self.cluster
    }

    /// Makes a certificate with a key of its own. It ends with the authority at the latest.
    ///
    /// # Errors
    /// One line for people.
    pub fn issue(
        &self,
        principal: &Principal,
        hosts: &[String],
        validity: Validity,
    ) -> Result<Issued, String> {
        let key = KeyPair::generate().map_err(failed)?;
        let cert = self.sign(principal, hosts, validity, &key)?;
        Ok(Issued { cert, key: key.serialize_pem() })
    }

    /// Makes another certificate for the same key, and for the same hosts unless there are others.
    ///
    /// # Errors
    /// One line for people.
    pub fn renew(
        &self,
        cert: &Path,
        key: &Path,
        hosts: &[String],
        validity: Validity,
    ) -> Result<String, String> {
        let wrong = |what: &str| format!("{}: {what}", cert.display());
        let stated = pem::stated(&pem::certificates(cert)?[0]).map_err(|error| wrong(&error))?;
        let principal = stated.principal.ok_or_else(|| wrong("not a certificate that csnap cert made"))?;
        if principal.cluster != self.cluster {
            return Err(wrong(&format!(
                "it is of cluster {}, the CA of {}",
                principal.cluster, self.cluster
            )));
        }
        let hosts = if hosts.is_empty() { &stated.hosts } else { hosts };
        self.sign(&principal, hosts, validity, &key_pair(key)?)
    }

    fn sign(
        &self,
        principal: &Principal,
        hosts: &[String],
        validity: Validity,
        key: &KeyPair,
    ) -> Result<String, String> {
        let mut params = params(principal.caller.name.as_str(), validity)?;
        params.not_after = params.not_after.min(self.until);
        params.distinguished_name.push(DnType::OrganizationalUnitName, principal.caller.role.as_str());
        let uri = principal.to_string().try_into().map_err(failed)?;
        params.subject_alt_names.push(SanType::URI(uri));
        for host in hosts {
            params.subject_alt_names.push(match host.parse::<IpAddr>() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName(dns_name(host)?.try_into().map_err(failed)?),
            });
        }
        // qemu wants encipherment of keys even of keys that only sign.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(key, &self.issuer).map_err(failed)?.pem())
    }
}

fn params(common_name: &str, validity: Validity) -> Result<CertificateParams, String> {
    if common_name.len() > COMMON_NAME_BYTES_MAX {
        return Err(format!(
            "{common_name:?} is too long for a certificate: it takes {COMMON_NAME_BYTES_MAX} bytes"
        ));
    }
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "csnap");
    params.distinguished_name.push(DnType::CommonName, common_name);
    (params.not_before, params.not_after) = (validity.from, validity.until);
    let mut serial = [0; 16];
    getrandom::fill(&mut serial).map_err(failed)?;
    // A serial is positive, and has no zero in front.
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

fn authority_name(cluster: &Name) -> String {
    format!("CA of {cluster}")
}

fn cluster_of(certificate: &tokio_rustls::rustls::pki_types::CertificateDer<'_>) -> Option<Name> {
    let name = pem::common_name(certificate)?;
    Name::new(name.strip_prefix("CA of ")?).ok()
}

fn key_pair(path: &Path) -> Result<KeyPair, String> {
    let key = pem::key(path)?;
    KeyPair::try_from(&key).map_err(|error| format!("{}: {error}", path.display()))
}

/// A name of hosts in letters, digits, hyphens and dots, a wildcard in front or not.
fn dns_name(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("*.").unwrap_or(text);
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if text.len() <= 253 && rest.split('.').all(label) {
        return Ok(text.to_owned());
    }
    Err(format!("{text:?} is neither the name of a host nor an address"))
}

fn failed(error: impl std::fmt::Display) -> String {
    format!("cannot make a certificate: {error}")
}
