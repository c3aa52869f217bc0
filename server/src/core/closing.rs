//! Why the server closes a connection of its own accord: a line in its log, and nothing that the peer is told.

/// Why a connection is closed. Where nothing is wrong (a session was given back, or the server drains) there is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// [`csnap_proto::limits::CONNECTIONS_MAX`], or what the process may have open.
    #[error("there are too many")]
    TooMany,
    /// No Identify within [`csnap_proto::limits::HANDSHAKE_MS_MAX`].
    #[error("it did not say in time who it is")]
    Unidentified,
    /// Nothing was heard for the lease. Its session stays.
    #[error("it was silent for longer than its lease")]
    Silent,
    /// A request with id 0, which would not count against the limit of unanswered ones.
    #[error("it sent a request without a number")]
    Unnumbered,
    /// Something else came before Identify.
    #[error("it did not begin with Identify")]
    NotIdentified,
    /// A second Identify.
    #[error("it said twice who it is")]
    IdentifiedTwice,
    /// Its Identify was answered with a refusal.
    #[error("its session was refused")]
    Refused,
    /// The session came on a newer connection.
    #[error("its session came on another connection")]
    Superseded,
    /// The session was ended: its process is dead, or an operator said so.
    #[error("its session was ended")]
    SessionEnded,
    /// What it leaves unread grew beyond what is kept for it.
    #[error("it does not read its answers")]
    Unread,
    /// It speaks something else.
    #[error("it does not speak our protocol: {0}")]
    Garbled(csnap_proto::FrameError),
}
