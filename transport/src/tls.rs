//! Mutual TLS 1.3: both ends show a certificate of the same authority, and are whom it names.
//!
//! Whom we speak to is decided by role and name in the certificate, not by the host's name or address: an address says
//! where somebody is, and a node that was taken over could be at any. Nothing is resumed, so every connection proves both
//! ends anew, by the files as they are now.
//!
//! The files are looked at again, at most once a second, when a connection is made. Files that do not fit each other (two
//! of them are never replaced at one instant) are logged once, and the last good ones are used on.

use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use csnap_proto::{Caller, Principal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{
    ClientConfig, CommonState, DigitallySignedStruct, Error, PeerIncompatible, RootCertStore, ServerConfig,
    SignatureScheme,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use tracing::{info, warn};

use super::metered::Metered;
use super::stream::Encrypted;
use super::{Stream, TlsConfig, Unreached, explain, pem};

/// Most that is read of a peer before it has proved who it is, bytes: a chain of certificates and room. rustls bounds
/// single messages; this bounds all of them.
pub const HANDSHAKE_BYTES_MAX: usize = 64 << 10;

/// Between two looks at the files.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// From here on every load of our certificate warns that it ends: time to notice, and to renew.
const EXPIRES_SOON: Duration = Duration::from_secs(30 * 24 * 3600);

/// One that is refused has so long to read why.
const PART_WITHIN: Duration = Duration::from_millis(250);

/// What one that speaks TLS says first: a record of its handshake.
const HANDSHAKE_RECORD: u8 = 0x16;

/// What one that speaks TLS answers to nonsense.
const ALERT_RECORD: u8 = 0x15;

/// An alert as a record of TLS: fatal, unexpected message. It tells one that speaks without TLS what it reached.
const NOT_WITHOUT_TLS: [u8; 7] = [ALERT_RECORD, 3, 3, 0, 2, 2, 10];

/// Whether these are the first bytes of somebody who speaks TLS.
#[must_use]
pub fn is_tls(first: &[u8]) -> bool {
    matches!(first, [HANDSHAKE_RECORD | ALERT_RECORD, 3, ..])
}

/// Our certificate and whom it makes us believe. Clones share it.
#[derive(Clone, Debug)]
pub struct Tls(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: TlsConfig,
    kept: Mutex<Kept>,
}

#[derive(Debug)]
struct Kept {
    loaded: Loaded,
    stamp: Stamp,
    looked_at: Instant,
}

#[derive(Clone, Debug)]
struct Loaded {
    own: Principal,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

/// Tells files from what they were: inode, length and time of change of each; none of one that is not there.
type Stamp = [Option<(u64, u64, i64, i64)>; 3];

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// One line that says which file is wrong.
    pub fn load(config: &TlsConfig) -> Result<Self, String> {
        let stamp = stamp(config);
        let kept = Kept { loaded: load(config)?, stamp, looked_at: Instant::now() };
        Ok(Self(Arc::new(Inner { config: config.clone(), kept: Mutex::new(kept) })))
    }

    /// Who we are.
    #[must_use]
    pub fn own(&self) -> Principal {
        self.current().own
    }

    /// Takes somebody in who connected. Nothing of what they say was read before they proved who they are. The caller
    /// bounds the time.
    ///
    /// # Errors
    /// One line that says why not.
    pub async fn accept(&self, stream: TcpStream) -> Result<(Stream, Caller), String> {
        let mut first = [0];
        let seen = stream.peek(&mut first).await.map_err(|error| error.to_string())?;
        if seen == 0 {
            return Err("it said nothing".to_owned());
        }
        let mut stream = Metered::new(stream, HANDSHAKE_BYTES_MAX);
        if first[0] != HANDSHAKE_RECORD {
            // It may be gone.
            let _ = stream.write_all(&NOT_WITHOUT_TLS).await;
            part(stream).await;
            return Err("it speaks without TLS, which is required here: give it a [tls]".to_owned());
        }
        let loaded = self.current();
        match TlsAcceptor::from(loaded.server).accept(stream).into_fallible().await {
            Ok(stream) => admit(stream.into(), &loaded.own),
            Err((error, stream)) => {
                part(stream).await;
                Err(explain(&error))
            }
        }
    }

    /// Makes a connection ours and somebody's.
    ///
    /// # Errors
    /// One line that says why not.
    pub async fn connect(&self, stream: TcpStream) -> Result<(Stream, Caller), Unreached> {
        let loaded = self.current();
        let ip = stream.peer_addr()?.ip();
        let stream = Metered::new(stream, HANDSHAKE_BYTES_MAX);
        let connecting = TlsConnector::from(loaded.client).connect(ServerName::IpAddress(ip.into()), stream);
        admit(connecting.await?.into(), &loaded.own).map_err(Unreached::Refused)
    }

    /// By the files as they are, or the last good ones.
    fn current(&self) -> Loaded {
        let Inner { config, kept } = &*self.0;
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.looked_at.elapsed() >= LOOK_AGAIN {
            kept.looked_at = Instant::now();
            let found = stamp(config);
            if found != kept.stamp {
                kept.stamp = found;
                match load(config) {
                    Ok(loaded) => {
                        info!("certificates were read anew: {}", loaded.own);
                        kept.loaded = loaded;
                    }
                    Err(error) => {
                        warn!("certificates changed and are of no use, the old ones go on: {error}")
                    }
                }
            }
        }
        kept.loaded.clone()
    }
}

/// Lets somebody read why they are refused: what they sent and nobody read would otherwise take the alert with it.
async fn part(mut stream: Metered) {
    let read_all = async {
        stream.shutdown().await?;
        let mut nothing = [0; 512];
        while stream.read(&mut nothing).await? > 0 {}
        std::io::Result::Ok(())
    };
    let _ = tokio::time::timeout(PART_WITHIN, read_all).await;
}

/// Whoever proved to have a certificate is whom it names, if that is somebody of our cluster.
fn admit(mut stream: TlsStream<Metered>, own: &Principal) -> Result<(Stream, Caller), String> {
    let principal = principal(stream.get_ref().1)?;
    if principal.cluster != own.cluster {
        return Err(format!("it is {principal}, and this cluster is {}", own.cluster));
    }
    stream.get_mut().0.lift();
    Ok((Stream::Tls(Box::new(Encrypted(stream))), principal.caller))
}

fn principal(session: &CommonState) -> Result<Principal, String> {
    let certificate = session.peer_certificates().and_then(|chain| chain.first());
    let certificate = certificate.ok_or("it shows no certificate")?;
    let stated = pem::stated(certificate)?;
    stated
        .principal
        .ok_or_else(|| "its certificate has no name of the form csnap://CLUSTER/ROLE/NAME".to_owned())
}

fn load(config: &TlsConfig) -> Result<Loaded, String> {
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in pem::certificates(&config.ca)? {
        let bad = |error| format!("{}: not the certificate of a CA: {error}", config.ca.display());
        roots.add(certificate).map_err(bad)?;
    }
    let roots = Arc::new(roots);
    let chain = pem::certificates(&config.cert)?;
    let stated = pem::stated(&chain[0]).map_err(|error| format!("{}: {error}", config.cert.display()))?;
    let own = stated.principal.ok_or_else(|| {
        format!(
            "{} does not say who it is for: it needs a URI csnap://CLUSTER/ROLE/NAME, as csnap cert writes",
            config.cert.display()
        )
    })?;
    warn_of_end(config, stated.not_after);
    let server = server_config(config, &provider, &roots, chain.clone())?;
    let client = client_config(config, provider, roots, chain)?;
    Ok(Loaded { own, server: Arc::new(server), client: Arc::new(client) })
}

fn warn_of_end(config: &TlsConfig, not_after: i64) {
    #[expect(clippy::disallowed_methods, reason = "certificates end by the wall clock")]
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let left = u64::try_from(not_after).unwrap_or(0).saturating_sub(now.as_secs());
    if left < EXPIRES_SOON.as_secs() {
        let (cert, days) = (config.cert.display(), left / (24 * 3600));
        warn!("{cert} ends in {days} days: renew it with csnap cert, no restart is needed");
    }
}

fn server_config(
    config: &TlsConfig,
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
) -> Result<ServerConfig, String> {
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider))
        // Strangers need not know whom we believe.
        .clear_root_hint_subjects()
        .build()
        .map_err(|error| format!("{}: {error}", config.ca.display()))?;
    let mut server = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has TLS 1.3")
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, pem::key(&config.key)?)
        .map_err(|error| unfit(config, &error))?;
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    Ok(server)
}

fn client_config(
    config: &TlsConfig,
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
) -> Result<ClientConfig, String> {
    let verifier = Arc::new(OfOurCa { roots, provider: Arc::clone(&provider) });
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(chain, pem::key(&config.key)?)
        .map_err(|error| unfit(config, &error))?;
    client.resumption = Resumption::disabled();
    Ok(client)
}

fn unfit(config: &TlsConfig, error: &Error) -> String {
    format!("{} is not the key of {}: {error}", config.key.display(), config.cert.display())
}

fn stamp(config: &TlsConfig) -> Stamp {
    [&config.ca, &config.cert, &config.key].map(|path| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.ino(), metadata.len(), metadata.ctime(), metadata.ctime_nsec()))
    })
}

/// Believes every server whose certificate an authority of ours signed, whatever its host is called: [`admit`] looks
/// at who it is.
#[derive(Debug)]
struct OfOurCa {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for OfOurCa {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(certificate)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
