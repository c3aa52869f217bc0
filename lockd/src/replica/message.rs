//! What replicas tell each other, in a form of our own: nothing that came over a wire reaches a protobuf decoder, and
//! what the library could not bear is refused before.

use bytes::Bytes;
use raft::eraftpb::{
    ConfChange, ConfChangeType, ConfState, Entry, EntryType, Message, MessageType, Snapshot,
};
use serde::{Deserialize, Serialize};

use super::{
    ADDRESS_BYTES_MAX, COMMAND_BYTES_MAX, Change, ClusterId, MEMBERS_MAX, Member, Members, NUMBER_MAX,
    ReplicaId, STATE_BYTES_MAX, encode,
};

/// Marks a request for a vote that a leader that steps aside asked for. The library's own value.
const CAMPAIGN_TRANSFER: &[u8] = b"CampaignTransfer";

/// An entry of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Its place.
    pub index: u64,
    /// The term of the leader that made it.
    pub term: u64,
    /// What it says.
    pub content: Content,
}

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// A leader began its term, or a change of the group was refused.
    Nothing,
    /// For the state machine; never empty.
    Command(#[serde(with = "crate::blob")] Vec<u8>),
    /// The group changes.
    Change(Change),
}

/// The state after some entry, and the group as of then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Last entry that it contains.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// The group.
    pub members: Members,
    /// The state machine's own.
    #[serde(with = "crate::blob")]
    pub state: Vec<u8>,
}

/// A message from one replica to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerMessage {
    /// The group that both belong to.
    pub cluster: ClusterId,
    /// Sender.
    pub from: ReplicaId,
    /// Receiver; another one drops it.
    pub to: ReplicaId,
    /// The sender's term, or the one that it asks for.
    pub term: u64,
    /// What.
    pub body: Body,
}

/// What a message says. Durable before it goes out: whatever the sender says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// Leader: entries to append after (`index`, `log_term`).
    Append {
        /// The entry before the first.
        index: u64,
        /// Its term.
        log_term: u64,
        /// What the leader knows to be committed.
        commit: u64,
        /// In order, without gaps.
        entries: Vec<LogEntry>,
    },
    /// Follower: has everything up to `index` durably, or does not have what should come before.
    Appended {
        /// See above; of a refusal, the index that did not match.
        index: u64,
        /// What it knows to be committed.
        commit: u64,
        /// Of a refusal: where to try next, and the term there.
        refused: Option<(u64, u64)>,
    },
    /// Asks for a vote.
    AskVote {
        /// Only asks whether it would get one.
        before: bool,
        /// Its last entry.
        index: u64,
        /// Its term.
        log_term: u64,
        /// What it knows to be committed.
        commit: u64,
        /// The term there.
        commit_term: u64,
        /// The leader asked it to.
        transfer: bool,
    },
    /// Answers that.
    Vote {
        /// As asked.
        before: bool,
        /// No.
        refused: bool,
        /// What it knows to be committed.
        commit: u64,
        /// The term there.
        commit_term: u64,
    },
    /// Leader: the state, for one that is too far behind.
    Install(Image),
    /// Leader: is there.
    Heartbeat {
        /// What is committed of what the receiver has.
        commit: u64,
    },
    /// Follower: is there too.
    Heartbeaten {
        /// What it knows to be committed.
        commit: u64,
    },
    /// Leader, to a voter that has everything: campaign now.
    TakeOver,
}

impl PeerMessage {
    /// The bytes of a frame, without its length.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        encode(self)
    }

    /// Reads and checks one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let message: Self = postcard::from_bytes(bytes).map_err(|_| "it does not decode")?;
        message.check()?;
        Ok(message)
    }

    /// Whether any replica could have sent it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.from == self.to || self.from.0 == 0 || self.to.0 == 0 {
            return Err("it names no sender and receiver");
        }
        if self.term == 0 || self.term > NUMBER_MAX {
            return Err("its term is none");
        }
        let numbers = match &self.body {
            Body::Append { index, log_term, commit, entries } => {
                // The library takes no term for the term of any entry that it does not have.
                if (*index == 0) != (*log_term == 0) {
                    return Err("it comes after no entry");
                }
                check_entries(entries, *index, *log_term)?;
                if entries.last().is_some_and(|last| last.term > self.term) {
                    return Err("an entry is from a later term");
                }
                [*index, *log_term, *commit, 0]
            }
            Body::Appended { index, commit, refused } => {
                let (hint, term) = refused.unwrap_or_default();
                [*index, *commit, hint, term]
            }
            Body::AskVote { index, log_term, commit, commit_term, .. } => {
                [*index, *log_term, *commit, *commit_term]
            }
            Body::Vote { commit, commit_term, .. } => [*commit, *commit_term, 0, 0],
            Body::Install(image) => {
                image.check()?;
                [image.index, image.term, 0, 0]
            }
            Body::Heartbeat { commit } | Body::Heartbeaten { commit } => [*commit, 0, 0, 0],
            Body::TakeOver => [0; 4],
        };
        if numbers.iter().any(|number| *number > NUMBER_MAX) {
            return Err("a number is out of all bounds");
        }
        Ok(())
    }

    /// As the library wants it.
    pub(super) fn into_raft(self) -> Message {
        let mut raft = Message { from: self.from.0, to: self.to.0, term: self.term, ..Message::default() };
        match self.body {
            Body::Append { index, log_term, commit, entries } => {
                raft.set_msg_type(MessageType::MsgAppend);
                (raft.index, raft.log_term, raft.commit) = (index, log_term, commit);
                raft.set_entries(entries.iter().map(LogEntry::to_raft).collect());
            }
            Body::Appended { index, commit, refused } => {
                raft.set_msg_type(MessageType::MsgAppendResponse);
                (raft.index, raft.commit, raft.reject) = (index, commit, refused.is_some());
                (raft.reject_hint, raft.log_term) = refused.unwrap_or_default();
            }
            Body::AskVote { before, index, log_term, commit, commit_term, transfer } => {
                raft.set_msg_type(either(
                    before,
                    MessageType::MsgRequestPreVote,
                    MessageType::MsgRequestVote,
                ));
                (raft.index, raft.log_term, raft.commit) = (index, log_term, commit);
                raft.commit_term = commit_term;
                raft.context = if transfer { CAMPAIGN_TRANSFER.into() } else { Bytes::new() };
            }
            Body::Vote { before, refused, commit, commit_term } => {
                let (pre, real) =
                    (MessageType::MsgRequestPreVoteResponse, MessageType::MsgRequestVoteResponse);
                raft.set_msg_type(either(before, pre, real));
                (raft.reject, raft.commit, raft.commit_term) = (refused, commit, commit_term);
            }
            Body::Install(image) => {
                raft.set_msg_type(MessageType::MsgSnapshot);
                raft.set_snapshot(image.to_raft());
            }
            Body::Heartbeat { commit } => {
                raft.set_msg_type(MessageType::MsgHeartbeat);
                raft.commit = commit;
            }
            Body::Heartbeaten { commit } => {
                raft.set_msg_type(MessageType::MsgHeartbeatResponse);
                raft.commit = commit;
            }
            Body::TakeOver => raft.set_msg_type(MessageType::MsgTimeoutNow),
        }
        raft
    }

    /// What the library wants to be sent; `None` for what replicas of ours never say to each other.
    pub(super) fn from_raft(cluster: ClusterId, mut raft: Message) -> Option<Self> {
        let (index, log_term, commit) = (raft.index, raft.log_term, raft.commit);
        let (before, refused, commit_term) = (true, raft.reject, raft.commit_term);
        let body = match raft.get_msg_type() {
            MessageType::MsgAppend => {
                let entries = raft.entries.iter().map(LogEntry::from_raft).collect();
                Body::Append { index, log_term, commit, entries }
            }
            MessageType::MsgAppendResponse => {
                Body::Appended { index, commit, refused: refused.then_some((raft.reject_hint, log_term)) }
            }
            kind @ (MessageType::MsgRequestVote | MessageType::MsgRequestPreVote) => {
                let before = kind == MessageType::MsgRequestPreVote;
                let transfer = raft.context == CAMPAIGN_TRANSFER;
                Body::AskVote { before, index, log_term, commit, commit_term, transfer }
            }
            MessageType::MsgRequestPreVoteResponse => Body::Vote { before, refused, commit, commit_term },
            MessageType::MsgRequestVoteResponse => Body::Vote { before: false, refused, commit, commit_term },
            MessageType::MsgSnapshot => Body::Install(Image::from_raft(&raft.take_snapshot())),
            MessageType::MsgHeartbeat => Body::Heartbeat { commit },
            MessageType::MsgHeartbeatResponse => Body::Heartbeaten { commit },
            MessageType::MsgTimeoutNow => Body::TakeOver,
            _ => return None,
        };
        let (from, to) = (ReplicaId(raft.from), ReplicaId(raft.to));
        Some(Self { cluster, from, to, term: raft.term, body })
    }
}

fn either<T>(first: bool, yes: T, no: T) -> T {
    if first { yes } else { no }
}

/// Entries that follow (`index`, `term`): without gaps, terms not falling, none too long.
pub(super) fn check_entries(entries: &[LogEntry], index: u64, term: u64) -> Result<(), &'static str> {
    let (mut index, mut term) = (index.min(NUMBER_MAX), term);
    for entry in entries {
        if entry.index != index + 1 || entry.term < term || entry.term > NUMBER_MAX {
            return Err("its entries do not follow each other");
        }
        entry.content.check()?;
        (index, term) = (entry.index, entry.term);
    }
    Ok(())
}

impl Content {
    fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::Command(command) if command.is_empty() => Err("a command is empty"),
            Self::Command(command) if command.len() > COMMAND_BYTES_MAX => Err("a command is too long"),
            Self::Change(Change::Add { address, .. }) if address.len() > ADDRESS_BYTES_MAX => {
                Err("an address is too long")
            }
            Self::Change(change) if change.id().0 == 0 => Err("a change names no replica"),
            _ => Ok(()),
        }
    }
}

impl LogEntry {
    pub(super) fn to_raft(&self) -> Entry {
        let mut raft = Entry { index: self.index, term: self.term, ..Entry::default() };
        match &self.content {
            Content::Nothing => {}
            Content::Command(command) => raft.data = command.clone().into(),
            Content::Change(change) => {
                raft.set_entry_type(EntryType::EntryConfChange);
                raft.data = conf_change_bytes(change);
                raft.context = encode(change);
            }
        }
        raft
    }

    /// An entry that this process made, or took in by [`Self::to_raft`].
    pub(super) fn from_raft(raft: &Entry) -> Self {
        let content = if !raft.context.is_empty() {
            let change = postcard::from_bytes(&raft.context);
            Content::Change(change.expect("entries are made here, and from checked ones"))
        } else if raft.data.is_empty() {
            Content::Nothing
        } else {
            Content::Command(raft.data.to_vec())
        };
        Self { index: raft.index, term: raft.term, content }
    }
}

/// The library's form of a change.
pub(super) fn conf_change(change: &Change) -> ConfChange {
    let kind = match change {
        Change::Add { .. } => ConfChangeType::AddLearnerNode,
        Change::Promote { .. } => ConfChangeType::AddNode,
        Change::Remove { .. } => ConfChangeType::RemoveNode,
    };
    ConfChange { change_type: kind, node_id: change.id().0, ..ConfChange::default() }
}

fn conf_change_bytes(change: &Change) -> Bytes {
    use protobuf::Message as _;
    conf_change(change).write_to_bytes().expect("writing to memory does not fail").into()
}

/// The library's form of a group.
pub(super) fn conf_state(members: &Members) -> ConfState {
    let ids = |voter: bool| {
        let chosen = members.iter().filter(move |(_, member)| member.voter == voter);
        chosen.map(|(id, _)| id.0).collect::<Vec<u64>>()
    };
    ConfState::from((ids(true), ids(false)))
}

impl Image {
    /// Whether any replica could have made it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), &'static str> {
        let bad = |(id, member): (&ReplicaId, &Member)| id.0 == 0 || member.address.len() > ADDRESS_BYTES_MAX;
        if self.members.len() > MEMBERS_MAX || self.members.iter().any(bad) {
            return Err("its group is none");
        }
        if self.index > 0 && !self.members.values().any(|member| member.voter) {
            return Err("nobody in its group votes");
        }
        if (self.index == 0) != (self.term == 0) || self.index > NUMBER_MAX || self.term > NUMBER_MAX {
            return Err("its place is none");
        }
        if self.state.len() > STATE_BYTES_MAX {
            return Err("its state is too large");
        }
        Ok(())
    }

    pub(super) fn to_raft(&self) -> Snapshot {
        let mut raft = Snapshot { data: encode(&(&self.members, &self.state)), ..Snapshot::default() };
        let metadata = raft.mut_metadata();
        (metadata.index, metadata.term) = (self.index, self.term);
        metadata.set_conf_state(conf_state(&self.members));
        raft
    }

    /// One that this process made by [`Self::to_raft`].
    pub(super) fn from_raft(raft: &Snapshot) -> Self {
        let (members, state) = postcard::from_bytes(&raft.data).expect("made here, from a checked one");
        let metadata = raft.get_metadata();
        Self { index: metadata.index, term: metadata.term, members, state }
    }
}
