//! Why there is no conversation with somebody, and whether to try again is of use.

/// See the module. The text is one line for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreached {
    /// Nobody answered, or what was begun broke: it may be different in a moment.
    #[error("{0}")]
    Away(String),
    /// One of the two does not speak with the other, for who it is or how it speaks: it stays so until somebody changes
    /// a configuration, a certificate or a program.
    #[error("{0}")]
    Refused(String),
}

impl From<Unreached> for String {
    fn from(unreached: Unreached) -> Self {
        unreached.to_string()
    }
}

#[cfg(feature = "shell")]
impl From<std::io::Error> for Unreached {
    /// What TLS found wrong it will find again; anything else happened on the way.
    fn from(error: std::io::Error) -> Self {
        use tokio_rustls::rustls;
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        if inner.is_some() { Self::Refused(super::explain(&error)) } else { Self::Away(error.to_string()) }
    }
}
