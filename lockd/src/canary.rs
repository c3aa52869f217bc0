//! Deliberate breaks of the rules of the replicas and of their log, each of which a test must catch. They exist only
//! under the cargo feature `canary`, which no release build has; without it every question is `false`.

/// A rule to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Canary {
    /// Ask for votes and give them before the vote is durable.
    SendBeforeVote,
    /// Count and acknowledge entries before they are durable.
    AckBeforeSync,
    /// Take damage in the middle of the log for its end.
    AcceptTornMiddle,
    /// Name a replica by its seat and not by its disk, so that one whose disk was lost votes again. Who opens the log
    /// breaks it, by what it draws.
    VoteAfterAmnesia,
    /// Answer a read at once, from a table that may be behind: the log would have said whether this lockd still leads.
    ReadWithoutTheLog,
    /// Answer what was gathered when it is taken in: neither written nor, with others, replicated.
    AnswerWhenGathered,
}

impl Canary {
    /// All of them, with the names by which they are chosen.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::SendBeforeVote, "send-before-vote"),
        (Self::AckBeforeSync, "ack-before-sync"),
        (Self::AcceptTornMiddle, "accept-torn-middle"),
        (Self::VoteAfterAmnesia, "vote-after-amnesia"),
        (Self::ReadWithoutTheLog, "read-without-the-log"),
        (Self::AnswerWhenGathered, "answer-when-gathered"),
    ];
}

/// The one rule that this lockd breaks: none, outside tests.
pub type Broken = crate::broken::Broken<Canary>;
