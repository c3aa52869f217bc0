//! What went wrong with a handshake, in words of somebody who runs a cluster.

use std::io;

use tokio_rustls::rustls::{AlertDescription, CertificateError, Error, PeerIncompatible};

/// One line for people: what of TLS failed, or the error as it is.
#[must_use]
pub fn explain(error: &io::Error) -> String {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(error) => explain_tls(error),
        None => error.to_string(),
    }
}

fn explain_tls(error: &Error) -> String {
    let text = match error {
        Error::InvalidCertificate(why) => return explain_certificate(why),
        Error::NoCertificatesPresented => "it shows no certificate",
        Error::InvalidMessage(_) => "it does not speak TLS, or what it says was damaged on the way",
        Error::PeerIncompatible(
            PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::Tls13RequiredForQuic
            | PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled
            | PeerIncompatible::ServerDoesNotSupportTls12Or13
            | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig,
        )
        | Error::AlertReceived(AlertDescription::ProtocolVersion) => "it does not speak TLS 1.3",
        // Two authorities of one name differ by their signatures.
        Error::AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => {
            "it does not believe the CA of our certificate"
        }
        Error::AlertReceived(AlertDescription::CertificateExpired) => {
            "it says that our certificate has expired"
        }
        Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "it wants a certificate, and we have none"
        }
        Error::AlertReceived(
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied,
        ) => "it refuses our certificate",
        other => return format!("TLS: {other}"),
    };
    text.to_owned()
}

fn explain_certificate(error: &CertificateError) -> String {
    let text = match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "its certificate has expired",
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "its certificate is not valid yet: compare the clocks"
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "its certificate is not of a CA that we believe"
        }
        other => return format!("its certificate is of no use: {other}"),
    };
    text.to_owned()
}
