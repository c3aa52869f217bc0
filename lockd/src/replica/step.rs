//! One replica's decisions.

mod pump;
mod time;

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use csnap_proto::Time;
use raft::{Config, Progress, ProgressState, RawNode, StateRole};

use super::disk::Saved;
use super::message::{Body, Content, Image, PeerMessage, conf_change};
use super::mirror::Mirror;
use super::{
    APPEND_BYTES_MAX, APPENDS_IN_FLIGHT_MAX, COMMAND_BYTES_MAX, Change, ClusterId, Members, ReplicaId,
    Timing, UNCOMMITTED_BYTES_MAX, encode, guard,
};
use crate::canary::Broken;

/// A replica that lacks fewer entries than this has caught up: less than a heartbeat's worth under load.
const CAUGHT_UP_ENTRIES: u64 = 100;

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// Time passed.
    Tick,
    /// A command to be committed. Only between [`Output::Established`] and [`Output::Deposed`]; elsewhere it is
    /// dropped. The caller bounds how many it leaves uncommitted.
    Propose(Bytes),
    /// A message came.
    Received(PeerMessage),
    /// What was said to a replica is lost, and it is not reached.
    Unreachable(ReplicaId),
    /// Every write up to this number is durable.
    Durable {
        /// The greatest one.
        number: u64,
    },
    /// The state after every command that came out so far. Asked for when the log is nearly full.
    Compact {
        /// The state machine's own.
        state: Bytes,
    },
    /// Make another voter the leader.
    Transfer(ReplicaId),
    /// Change the group.
    Change(Change),
}

/// What is to be done, in order.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// To the disk, after all earlier ones; told by [`Input::Durable`].
    Write(Write),
    /// To its receiver. It may be lost.
    Send(PeerMessage),
    /// A command is committed: apply it.
    Committed {
        /// Its place; they only grow.
        index: u64,
        /// What was proposed.
        command: Bytes,
        /// It was proposed here since the last [`Output::Established`]; such come in the order of their proposals, none
        /// left out.
        own: bool,
    },
    /// Another replica's state takes the place of one's own.
    Install(Image),
    /// Somebody leads, or nobody that is known.
    Leader {
        /// Who.
        leader: Option<ReplicaId>,
        /// In which term.
        term: u64,
    },
    /// This replica leads, and every command of earlier leaders came out. It may propose.
    Established {
        /// Its term.
        term: u64,
    },
    /// It leads no more. Of what it proposed and did not see, anything may have become.
    Deposed,
    /// The group is another.
    Members(Members),
    /// A transfer or change was not begun.
    Refused(&'static str),
}

/// Something for the disk.
#[derive(Debug, PartialEq, Eq)]
pub enum Write {
    /// Items to append, in one go where they fit.
    Append {
        /// Numbers only grow.
        number: u64,
        /// What.
        items: Vec<Bytes>,
    },
    /// A new base in place of everything, which another leader's state made necessary.
    Begin {
        /// As above.
        number: u64,
        /// Its bytes.
        base: Bytes,
    },
    /// A new base in place of everything before, to save space. Without space, everything before may stay.
    Roll {
        /// Its bytes.
        base: Bytes,
    },
}

/// What a replica is told.
#[derive(Clone, Copy, Debug)]
pub struct ReplicaConfig {
    /// The same for every replica of the group.
    pub timing: Timing,
    /// What is left to chance is drawn from it.
    pub seed: u64,
    /// The rule that it breaks: none, outside tests.
    pub broken: Broken,
}

/// A write that is not durable yet.
#[derive(Clone, Copy, Debug)]
struct Outstanding {
    number: u64,
    /// It has a term or a vote.
    promise: bool,
}

/// See the module.
pub struct Replica {
    id: ReplicaId,
    config: ReplicaConfig,
    raw: RawNode<Mirror>,
    /// As of the last entry that came out.
    members: Members,
    /// The last entry that came out.
    applied: u64,
    started: bool,
    last_tick: Time,
    campaigns: u64,
    outstanding: VecDeque<Outstanding>,
    /// Number of the library's last batch, written or not.
    last_batch: u64,
    /// Messages that wait for the write of that number.
    held: VecDeque<(u64, PeerMessage)>,
    /// Another replica's state, and the write that it waits for.
    installing: Option<(u64, Image)>,
    /// Its own term, while it leads and has everything.
    established: Option<u64>,
    /// What [`Output::Leader`] said last.
    reported: (u64, u64),
    /// Commands that wait until less is uncommitted, or a transfer is over.
    waiting: VecDeque<Bytes>,
    /// To whom states are on their way, and for how many ticks.
    sent_states: BTreeMap<u64, u64>,
    /// When each other member said something last.
    heard: BTreeMap<ReplicaId, Time>,
}

impl Replica {
    /// Goes on from what the disk gave. The state machine must be as `saved.base.image` says; what is committed after it
    /// comes out again.
    #[must_use]
    pub fn new(now: Time, config: ReplicaConfig, saved: Saved) -> Self {
        let (id, image) = (saved.id, &saved.base.image);
        let (members, applied) = (image.members.clone(), image.index);
        let reported = (0, saved.base.hard.term);
        let library = Config {
            id: id.0,
            election_tick: config.timing.election_ticks_min,
            min_election_tick: config.timing.election_ticks_min,
            max_election_tick: config.timing.election_ticks_max + 1,
            heartbeat_tick: config.timing.heartbeat_ticks,
            applied,
            max_size_per_msg: APPEND_BYTES_MAX,
            max_inflight_msgs: APPENDS_IN_FLIGHT_MAX,
            check_quorum: true,
            pre_vote: true,
            // The library would put entries into a waiting message without any, whatever that one comes after. Proposals
            // are batched before.
            batch_append: false,
            // Followers learn what is committed with the next entries or heartbeat, not by messages of its own.
            skip_bcast_commit: true,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            max_committed_size_per_ready: UNCOMMITTED_BYTES_MAX,
            ..Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raw =
            RawNode::new(&library, Mirror::new(saved), &logger).expect("a checked base and sound waits");
        let mut replica = Self {
            id,
            config,
            raw,
            members,
            applied,
            started: false,
            last_tick: now,
            campaigns: 0,
            outstanding: VecDeque::new(),
            last_batch: 0,
            held: VecDeque::new(),
            installing: None,
            established: None,
            reported,
            waiting: VecDeque::new(),
            sent_states: BTreeMap::new(),
            heard: BTreeMap::new(),
        };
        replica.draw_wait();
        replica
    }

    /// Takes in what happened. Outputs are to be carried out in order.
    pub fn step(&mut self, now: Time, input: Input, out: &mut Vec<Output>) {
        self.take_in(now, input, out);
        self.settle(out);
    }

    /// The first half of [`Self::step`]: any number of inputs, before they are settled together. What is proposed among
    /// them becomes one write, and one message to each replica.
    pub fn take_in(&mut self, now: Time, input: Input, out: &mut Vec<Output>) {
        self.pass_time(now, matches!(input, Input::Tick));
        match input {
            Input::Tick => {}
            Input::Propose(command) => self.on_propose(command),
            Input::Received(message) => {
                self.note_heard(now, message.from);
                self.on_message(message);
            }
            Input::Unreachable(id) => self.raw.report_unreachable(id.0),
            Input::Durable { number } => self.on_durable(number, out),
            Input::Compact { state } => self.on_compact(&state, out),
            Input::Transfer(to) => self.on_transfer(to, out),
            Input::Change(change) => self.on_change(&change, out),
        }
        self.draw_wait();
        self.note_role(out);
    }

    /// The second half: what follows from it.
    pub fn settle(&mut self, out: &mut Vec<Output>) {
        self.begin_alone();
        self.pump(out);
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> ReplicaId {
        self.id
    }

    /// The group that it belongs to, once it does.
    #[must_use]
    pub fn cluster(&self) -> Option<ClusterId> {
        self.raw.store().cluster
    }

    /// The group, as of the last entry that came out.
    #[must_use]
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// Who leads, as far as it knows.
    #[must_use]
    pub fn leader(&self) -> Option<ReplicaId> {
        Some(ReplicaId(self.raw.raft.leader_id)).filter(|id| id.0 != 0)
    }

    /// Its term.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.raw.raft.term
    }

    /// Index and term of the last entry that it has, durable or not.
    #[must_use]
    pub fn last(&self) -> (u64, u64) {
        (self.raw.raft.raft_log.last_index(), self.raw.raft.raft_log.last_term())
    }

    /// The last entry that came out.
    #[must_use]
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// Whether it leads and has everything: it takes proposals.
    #[must_use]
    pub fn is_established(&self) -> bool {
        self.established.is_some()
    }

    /// Whether `id` has, durably, all but a few of the entries that this leader has: a learner may be promoted, a
    /// transfer will be quick.
    #[must_use]
    pub fn has_caught_up(&self, id: ReplicaId) -> bool {
        let last = self.raw.raft.raft_log.last_index();
        // Behind a state that it was sent, it is only asked on with the next entry, which may be long in coming.
        let follows = |progress: &Progress| {
            let streams = progress.state == ProgressState::Replicate;
            progress.matched == last || (streams && progress.matched + CAUGHT_UP_ENTRIES > last)
        };
        self.is_leader() && self.raw.raft.prs().get(id.0).is_some_and(follows)
    }

    /// Whether `id` said something after `since`. A leader hears of whoever is well at every heartbeat; one that is
    /// frozen or cut off stays connected for much longer than that.
    #[must_use]
    pub fn heard_after(&self, since: Time, id: ReplicaId) -> bool {
        id == self.id || self.heard.get(&id).is_some_and(|heard| *heard > since)
    }

    fn note_heard(&mut self, now: Time, from: ReplicaId) {
        if self.members.contains_key(&from) {
            self.heard.insert(from, now);
        }
        self.heard.retain(|id, _| self.members.contains_key(id));
    }

    fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    /// Whether its own vote is a majority.
    fn is_alone(&self) -> bool {
        let voters = self.members.iter().filter(|(_, member)| member.voter).map(|(id, _)| *id);
        voters.eq([self.id])
    }

    /// A replica whose own vote is a majority waits for nobody, but for its disk: what it elects itself with must not
    /// overtake what it wrote before.
    fn begin_alone(&mut self) {
        if !std::mem::replace(&mut self.started, true) && self.is_alone() {
            self.raw.campaign().expect("it may elect itself at any time");
        }
    }

    fn on_propose(&mut self, command: Bytes) {
        assert!(!command.is_empty() && command.len() <= COMMAND_BYTES_MAX, "the caller makes sound commands");
        if self.established.is_some() {
            self.waiting.push_back(command);
        }
    }

    fn on_message(&mut self, message: PeerMessage) {
        let early = message.body == Body::TakeOver && self.waits_for_its_disk();
        if early || guard::refuse(&self.raw, self.id, &message).is_some() {
            return;
        }
        // Whoever knows this disk by its id was told so by it, or by who runs the group.
        self.raw.mut_store().cluster = Some(message.cluster);
        // An error says that the sender is no member (any more): its message is as good as lost.
        let _ = self.raw.step(message.into_raft());
    }

    fn on_transfer(&mut self, to: ReplicaId, out: &mut Vec<Output>) {
        let voter = self.members.get(&to).is_some_and(|member| member.voter);
        match (self.established, voter) {
            (None, _) => out.push(Output::Refused("this replica does not lead")),
            (Some(_), false) => out.push(Output::Refused("that replica does not vote")),
            (Some(_), true) => self.raw.transfer_leader(to.0),
        }
    }

    fn on_change(&mut self, change: &Change, out: &mut Vec<Output>) {
        let itself = *change == Change::Remove { id: self.id };
        let refused = match change.apply(&self.members) {
            _ if self.established.is_none() => Some("this replica does not lead"),
            Err(reason) => Some(reason),
            Ok(_) if itself => Some("the leader cannot remove itself: make another one the leader first"),
            Ok(_) if self.raw.raft.has_pending_conf() => Some("another change of the group is under way"),
            Ok(_) => {
                let context = encode(change).to_vec();
                let proposed = self.raw.propose_conf_change(context, conf_change(change));
                proposed.err().map(|_| "the leader is about to step aside")
            }
        };
        out.extend(refused.map(Output::Refused));
    }

    fn on_compact(&mut self, state: &Bytes, out: &mut Vec<Output>) {
        // A state on its way from another replica is younger than this one.
        if self.installing.is_none() {
            let (applied, members) = (self.applied, self.members.clone());
            self.raw.mut_store().compact(applied, members, state.to_vec());
        }
        out.push(Output::Write(Write::Roll { base: self.raw.store().base().encode() }));
    }
}

/// What of an entry is the state machine's.
fn command_of(content: Content) -> Option<Bytes> {
    match content {
        Content::Command(command) => Some(command.into()),
        Content::Nothing | Content::Change(_) => None,
    }
}
