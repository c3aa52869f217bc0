//! What operators ask of the group, one request at a time, and when each is answered. Pure.
//!
//! A request is a goal: at every step it is compared with the group as it is, and the next thing is done that it lacks. So a
//! request that is made again, of this leader or the next, goes on where the last one stopped.
//!
//! What it is not: a judge of what the replicas can do safely; they refuse what they cannot. It refuses what an operator
//! would regret: a group without a majority that is reached, a leader that lags.

use std::time::Duration;

use csnap_proto::message::lock::{GroupReply, GroupRequest};
use csnap_proto::{Name, RequestId, Time};

use super::contact::{Contact, Presence, Reached};
use crate::core::ConnectionId;
use crate::replica::{Change, Members, Replica, ReplicaId};

/// A leader that steps aside is followed within this, or not at all: the library gives up after an election's time.
const MOVE_WITHIN: Duration = Duration::from_secs(2);

/// A change of the group is committed within this, while there is a majority.
const CHANGE_WITHIN: Duration = Duration::from_secs(10);

/// A replica learns everything within this; a larger state takes another request.
const LEARN_WITHIN: Duration = Duration::from_secs(60);

/// A replica that is well is heard of within this: it answers every heartbeat.
const HEARD_WITHIN: Duration = Duration::from_secs(1);

/// A new replica is reached within this.
const REACH_WITHIN: Duration = Duration::from_secs(5);

/// Who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operator {
    pub(super) connection: ConnectionId,
    pub(super) request: RequestId,
}

#[derive(Clone, Debug)]
enum Goal {
    Lead(ReplicaId),
    Member { id: ReplicaId, contact: Contact },
    NoMember(ReplicaId),
}

/// What was begun towards it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Begun {
    Transfer(ReplicaId),
    Change(Change),
}

/// The request under way.
#[derive(Debug)]
struct Asked {
    by: Operator,
    goal: Goal,
    /// Whom it is about, as people knew it when it was asked for.
    name: Option<String>,
    /// What was begun last; it is not begun twice.
    begun: Option<Begun>,
    asked_at: Time,
    /// Whoever learns is reached, or was then.
    reached_at: Time,
    until: Time,
}

/// What follows.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Begin(Begun),
    Answer(Operator, GroupReply),
    /// Another one must be asked.
    NotLeader(Operator),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Desk {
    asked: Option<Asked>,
}

/// The group as it is now.
pub(super) struct Situation<'a> {
    pub(super) now: Time,
    pub(super) replica: &'a Replica,
    /// What that one says of itself.
    pub(super) own: &'a Presence,
    pub(super) reached: &'a Reached,
}

impl Desk {
    /// Takes a request in; what it is answered with at once, if it is.
    pub(super) fn ask(&mut self, now: Time, by: Operator, request: GroupRequest) -> Option<GroupReply> {
        if self.asked.is_some() {
            return Some(refused("another request of an operator is under way; try again in a moment"));
        }
        let (goal, within) = match request {
            GroupRequest::Move { to } => (Goal::Lead(ReplicaId(to.0)), MOVE_WITHIN),
            GroupRequest::Add { replica, node, address } if replica.0 != 0 => {
                let contact = Contact { node: Some(node), address };
                (Goal::Member { id: ReplicaId(replica.0), contact }, LEARN_WITHIN)
            }
            GroupRequest::Remove { replica } => (Goal::NoMember(ReplicaId(replica.0)), CHANGE_WITHIN),
            GroupRequest::Add { .. } | GroupRequest::Show => return Some(refused("that names no replica")),
        };
        let until = now.after(within);
        self.asked = Some(Asked { by, goal, name: None, begun: None, asked_at: now, reached_at: now, until });
        None
    }

    /// Whoever asked is gone; what was begun goes on.
    pub(super) fn forget(&mut self, connection: ConnectionId) {
        self.asked.take_if(|asked| asked.by.connection == connection);
    }

    /// What was begun last was refused.
    pub(super) fn on_refused(&mut self, why: &str) -> Option<Next> {
        let asked = self.asked.take()?;
        Some(Next::Answer(asked.by, refused(why)))
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        let asked = self.asked.as_ref()?;
        let look = match asked.goal {
            Goal::Member { .. } => Some(asked.reached_at.after(REACH_WITHIN)),
            Goal::NoMember(_) => Some(asked.asked_at.after(HEARD_WITHIN)),
            Goal::Lead(_) => None,
        };
        look.into_iter().chain([asked.until]).min()
    }

    /// The next thing to do, if there is one now.
    pub(super) fn pursue(&mut self, situation: &Situation<'_>) -> Option<Next> {
        let asked = self.asked.as_mut()?;
        let by = asked.by;
        let step = match asked.step(situation) {
            Step::Begin(begun) if asked.begun.as_ref() == Some(&begun) => Step::Wait,
            step => step,
        };
        let step = match step {
            Step::Wait if situation.now >= asked.until => Step::Refuse(asked.too_late(situation)),
            step => step,
        };
        let next = match step {
            Step::Wait => return None,
            Step::Begin(begun) => {
                asked.begun = Some(begun.clone());
                return Some(Next::Begin(begun));
            }
            Step::Done(what) => Next::Answer(by, GroupReply::Done { what }),
            Step::Refuse(reason) => Next::Answer(by, refused(&reason)),
            Step::NotLeader => Next::NotLeader(by),
        };
        self.asked = None;
        Some(next)
    }
}

enum Step {
    Wait,
    Begin(Begun),
    Done(String),
    Refuse(String),
    NotLeader,
}

impl Asked {
    fn step(&mut self, situation: &Situation<'_>) -> Step {
        let replica = situation.replica;
        match self.goal.clone() {
            Goal::Lead(to) if replica.leader() == Some(to) && replica.id() != to => {
                Step::Done(format!("{} leads", situation.name(to)))
            }
            Goal::Lead(to) if replica.id() == to && replica.is_established() => {
                Step::Done(format!("{} leads", situation.name(to)))
            }
            _ if !replica.is_established() => self.step_aside(situation),
            Goal::Lead(to) => situation.lead(to),
            Goal::Member { id, contact } => self.join(situation, id, &contact),
            Goal::NoMember(id) => {
                let name = self.name.get_or_insert_with(|| situation.name(id));
                situation.leave(id, name, self.asked_at)
            }
        }
    }

    /// A leader that stepped aside for another one waits for it; otherwise the next leader is to be asked.
    fn step_aside(&self, situation: &Situation<'_>) -> Step {
        let waits = matches!(self.begun, Some(Begun::Transfer(_))) && situation.replica.leader().is_none();
        if waits && situation.now < self.until { Step::Wait } else { Step::NotLeader }
    }

    fn join(&mut self, situation: &Situation<'_>, id: ReplicaId, contact: &Contact) -> Step {
        let Situation { now, replica, reached, .. } = situation;
        let is_reached = id == replica.id() || reached.presence(id).is_some();
        match replica.members().get(&id) {
            None => Step::Begin(Begun::Change(Change::Add { id, address: contact.to_string() })),
            Some(member) if member.voter => situation.replace(id, contact),
            Some(_) if is_reached && replica.has_caught_up(id) => {
                Step::Begin(Begun::Change(Change::Promote { id }))
            }
            Some(_) => {
                if is_reached {
                    self.reached_at = *now;
                }
                if *now >= self.reached_at.after(REACH_WITHIN) {
                    return Step::Refuse(format!(
                        "{contact} is not reached from {}: see that it runs, that the network lets them talk, and repeat \
                         this; until then it only learns",
                        situation.name(replica.id())
                    ));
                }
                Step::Wait
            }
        }
    }

    fn too_late(&self, situation: &Situation<'_>) -> String {
        match &self.goal {
            Goal::Lead(to) => format!(
                "{} did not take over in time; {} leads on",
                situation.name(*to),
                situation.name(situation.replica.id())
            ),
            Goal::Member { id, .. } if situation.replica.members().contains_key(id) => format!(
                "{} has not caught up yet; it goes on learning, repeat this to let it vote",
                situation.name(*id)
            ),
            Goal::Member { .. } | Goal::NoMember(_) => {
                "the change was not committed in time: too few replicas answer; see csnap lockd show".into()
            }
        }
    }
}

impl Situation<'_> {
    /// As people know it.
    pub(super) fn name(&self, id: ReplicaId) -> String {
        let node = self.node(id);
        node.map_or_else(|| format!("replica {:016x}", id.0), |node| node.to_string())
    }

    fn node(&self, id: ReplicaId) -> Option<Name> {
        if id == self.replica.id() {
            return Some(self.own.node.clone());
        }
        let contact = self.contact(id).and_then(|contact| contact.node);
        contact.or_else(|| self.reached.presence(id).map(|presence| presence.node.clone()))
    }

    fn contact(&self, id: ReplicaId) -> Option<Contact> {
        self.replica.members().get(&id)?.address.parse().ok()
    }

    fn lead(&self, to: ReplicaId) -> Step {
        let name = self.name(to);
        match self.replica.members().get(&to) {
            None => Step::Refuse(format!("{name} is no replica of the group; see csnap lockd show")),
            Some(member) if !member.voter => {
                Step::Refuse(format!("{name} only learns yet, so it cannot lead"))
            }
            Some(_) if self.reached.is_lost(to) => {
                Step::Refuse(format!("{name} is not reached, so it cannot lead"))
            }
            Some(_) if !self.replica.has_caught_up(to) => Step::Refuse(format!(
                "{name} has not caught up yet, so it would lead late; try again in a moment"
            )),
            Some(_) => Step::Begin(Begun::Transfer(to)),
        }
    }

    /// `id` votes: whoever else is said to be at its address is a disk that is gone, for it is not reached anywhere.
    fn replace(&self, id: ReplicaId, contact: &Contact) -> Step {
        let replaced = self.replica.members().keys().copied().find(|other| {
            let same = self.contact(*other).is_some_and(|other| other.address == contact.address);
            same && *other != id && *other != self.replica.id() && self.reached.presence(*other).is_none()
        });
        match replaced {
            Some(other) => Step::Begin(Begun::Change(Change::Remove { id: other })),
            None => Step::Done(format!("{contact} votes as replica {:016x}; {}", id.0, self.bears())),
        }
    }

    fn leave(&self, id: ReplicaId, name: &str, asked_at: Time) -> Step {
        let members = self.replica.members();
        let Some(member) = members.get(&id) else {
            return Step::Done(format!("{name} is no replica of the group; {}", self.bears()));
        };
        if id == self.replica.id() {
            return Step::Refuse(format!(
                "{name} leads: let another one lead first (csnap lockd move NODE), then remove it"
            ));
        }
        let (voters, answering) = self.count_without(members, id, asked_at);
        if member.voter && answering * 2 <= voters {
            if self.now < asked_at.after(HEARD_WITHIN) {
                return Step::Wait;
            }
            return Step::Refuse(format!(
                "without {name} only {answering} of {voters} replicas would answer, which is no majority: start the \
                 others or add one first"
            ));
        }
        Step::Begin(Begun::Change(Change::Remove { id }))
    }

    /// Voters but for `id`, and those of them that said something since it was asked.
    fn count_without(&self, members: &Members, id: ReplicaId, asked_at: Time) -> (usize, usize) {
        let voters: Vec<_> = members
            .iter()
            .filter(|(other, member)| **other != id && member.voter)
            .map(|(other, _)| *other)
            .collect();
        let answers = |other: &&ReplicaId| {
            !self.reached.is_lost(**other) && self.replica.heard_after(asked_at, **other)
        };
        (voters.len(), voters.iter().filter(answers).count())
    }

    /// What the group bears now.
    fn bears(&self) -> String {
        let voters = self.replica.members().values().filter(|member| member.voter).count();
        let bears = voters.saturating_sub(1) / 2;
        format!("{voters} vote, and the group bears the loss of {bears}")
    }
}

fn refused(reason: &str) -> GroupReply {
    GroupReply::Refused { reason: reason.into() }
}
