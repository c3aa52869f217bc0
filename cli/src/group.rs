//! Conversations with lockds about themselves: each asked what it knows, or the leader, whoever it is, asked for something.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::BytesMut;
use csnap_lockd::client::Lockds;
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::message::lock::{
    FromLockd, GroupReply, GroupRequest, GroupView, ReplicaNumber, ReplicaView, SpaceReply, SpaceRequest,
    ToLockd,
};
use csnap_proto::{Frame, RequestId, Term};
use csnap_transport::{Address, Unreached};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::lockds;

/// A lockd that lives answers within a millisecond; one that takes this long is frozen or not reached.
const SHOW_WITHIN: Duration = Duration::from_millis(500);

/// The longest request, a replica that learns everything, is answered within 60 s.
const DONE_WITHIN: Duration = Duration::from_secs(75);

/// What is asked about lockspaces is a commit, or none.
const SPACE_WITHIN: Duration = Duration::from_secs(2);

/// Without a leader, one is waited for this long: a few elections.
const LEADER_WITHIN: Duration = Duration::from_secs(5);

/// Between two looks for a leader.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Hints followed in a row before the addresses are asked anew.
const HINTS_MAX: u32 = 3;

/// The group as those who answered see it together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gathered {
    /// What each said, with the address that it was asked at.
    views: Vec<(Address, GroupView)>,
    /// Who did not, and why.
    silent: Vec<(Address, Unreached)>,
}

/// Asks all of them, and whoever they say leads, at once each.
pub(crate) async fn gather(lockds: &Lockds) -> Gathered {
    let mut gathered = Gathered::default();
    gathered.ask(lockds, lockds.addresses()).await;
    // The leader may be none of those that were named. Who answered is not asked again at another address of its.
    let answered: BTreeSet<_> = gathered.views().map(|view| view.own).collect();
    let others =
        gathered.views().flat_map(|view| &view.replicas).filter(|one| !answered.contains(&one.replica));
    let known = others.flat_map(|one| one.listens.clone());
    let more: BTreeSet<Address> =
        known.map(Address::Tcp).filter(|address| !lockds.addresses().contains(address)).collect();
    if gathered.leader_view().is_none() && !more.is_empty() {
        gathered.ask(lockds, &more.into_iter().collect::<Vec<_>>()).await;
    }
    gathered
}

impl Gathered {
    async fn ask(&mut self, lockds: &Lockds, addresses: &[Address]) {
        let start = |address: &Address| {
            let (lockds, address) = (lockds.clone(), address.clone());
            tokio::spawn(async move { (ask_to_show(&lockds, &address).await, address) })
        };
        let asked: Vec<_> = addresses.iter().map(start).collect();
        for answer in asked {
            match answer.await {
                Ok((Ok(view), address)) => self.views.push((address, view)),
                Ok((Err(why), address)) => self.silent.push((address, why)),
                Err(_) => {}
            }
        }
    }

    /// An error if nobody answered, with the reasons.
    pub(crate) fn check(&self, lockds: &Lockds) -> anyhow::Result<()> {
        if !self.views.is_empty() {
            return Ok(());
        }
        let reasons: Vec<_> = self.silent.iter().map(|(at, why)| format!("lockd at {at}: {why}")).collect();
        let reasons = reasons.join("; ");
        let refused = self.is_refused();
        Err(lockds::nobody(
            lockds,
            &if refused { Unreached::Refused(reasons) } else { Unreached::Away(reasons) },
        ))
    }

    /// All that were asked answered that they will not speak with us: to ask again is of no use.
    fn is_refused(&self) -> bool {
        let refused = |(_, why): &(_, Unreached)| matches!(why, Unreached::Refused(_));
        self.views.is_empty() && self.silent.iter().all(refused)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.views.is_empty()
    }

    /// What each said.
    pub(crate) fn views(&self) -> impl Iterator<Item = &GroupView> {
        self.views.iter().map(|(_, view)| view)
    }

    /// Where a lockd listens of which this is true.
    pub(crate) fn find(&self, is: impl Fn(&ReplicaView) -> bool) -> Vec<(&Address, &GroupView)> {
        let own = |view: &GroupView| view.replicas.iter().find(|one| one.replica == view.own).cloned();
        let found = self.views.iter().filter(|(_, view)| own(view).is_some_and(|own| is(&own)));
        found.map(|(address, view)| (address, view)).collect()
    }

    /// What the leader said: it had a majority a moment ago.
    pub(crate) fn leader_view(&self) -> Option<&GroupView> {
        self.views().filter(|view| view.leads).max_by_key(|view| view.replica_term)
    }

    /// The leader, if there is one that answers.
    pub(crate) fn leader(&self) -> Option<ReplicaView> {
        let view = self.leader_view()?;
        view.replicas.iter().find(|one| one.replica == view.own).cloned()
    }

    /// Every member, as the leader or else the one that knows most says, and whoever else answered; each knows itself best.
    pub(crate) fn replicas(&self) -> Vec<ReplicaView> {
        let in_group = self.views().filter(|view| view.has_group);
        let best = self.leader_view().or_else(|| in_group.max_by_key(|view| view.replica_term));
        let mut replicas = best.map(|view| view.replicas.clone()).unwrap_or_default();
        let answered = |number: ReplicaNumber| {
            let view = self.views().find(|view| view.own == number)?;
            view.replicas.iter().find(|one| one.replica == number)
        };
        for one in &mut replicas {
            if let Some(own) = answered(one.replica) {
                (one.pid, one.reached) = (own.pid, true);
                (one.listens, one.node) = (own.listens.clone(), own.node.clone());
            } else {
                // Another one may still hold a connection to a process that does not go on.
                one.reached = false;
            }
        }
        // Who answers and is none of them: it belongs to no group, or not any more to this one.
        let known: BTreeSet<_> = replicas.iter().map(|one| one.replica).collect();
        for view in self.views().filter(|view| !known.contains(&view.own)) {
            let own = view.replicas.iter().find(|one| one.replica == view.own);
            replicas.extend(own.map(|own| ReplicaView { voter: false, ..own.clone() }));
        }
        replicas.sort_by_key(|one| {
            let node = one.node.as_ref().map(|node| node.to_string()).unwrap_or_default();
            (node.len(), node, one.replica)
        });
        replicas
    }

    /// Whether a replica that is shown belongs to the group.
    pub(crate) fn is_member(&self, number: ReplicaNumber) -> bool {
        let apart = self.views().any(|view| view.own == number && !view.has_group);
        let member =
            |view: &GroupView| view.has_group && view.replicas.iter().any(|one| one.replica == number);
        self.leader_view().map_or(!apart, member)
    }
}

/// What one lockd knows.
pub(crate) async fn show(lockds: &Lockds, address: &Address) -> anyhow::Result<GroupView> {
    ask_to_show(lockds, address).await.with_context(|| format!("lockd at {address}"))
}

async fn ask_to_show(lockds: &Lockds, address: &Address) -> Result<GroupView, Unreached> {
    match ask(lockds, address, ToLockd::Group(GroupRequest::Show), SHOW_WITHIN).await? {
        FromLockd::Group(GroupReply::Group(view)) => Ok(view),
        FromLockd::Refused { reason } => Err(Unreached::Refused(reason)),
        _ => Err(Unreached::Away("it answered another question".to_owned())),
    }
}

/// Asks for something about the group; what is so now.
pub(crate) async fn request(lockds: &Lockds, request: GroupRequest) -> anyhow::Result<String> {
    match lead(lockds, ToLockd::Group(request), DONE_WITHIN).await? {
        FromLockd::Group(GroupReply::Done { what }) => Ok(what),
        FromLockd::Group(GroupReply::Refused { reason }) | FromLockd::Refused { reason } => bail!("{reason}"),
        _ => bail!("lockd answered another question"),
    }
}

/// Asks for something about its lockspaces.
pub(crate) async fn request_space(lockds: &Lockds, request: SpaceRequest) -> anyhow::Result<SpaceReply> {
    match lead(lockds, ToLockd::Space(request), SPACE_WITHIN).await? {
        FromLockd::Space(SpaceReply::Refused { reason }) | FromLockd::Refused { reason } => bail!("{reason}"),
        FromLockd::Space(reply) => Ok(reply),
        _ => bail!("lockd answered another question"),
    }
}

/// Asks the leader, whoever it is by then. What was asked for and not answered is asked for again: what is done already is
/// answered as done.
async fn lead(lockds: &Lockds, question: ToLockd, within: Duration) -> anyhow::Result<FromLockd> {
    let mut until = tokio::time::Instant::now() + LEADER_WITHIN;
    loop {
        let why = match ask_leader(lockds, &question, within).await {
            Ok(answer) => return Ok(answer),
            Err(NoAnswer::Refused(why)) => return Err(why),
            Err(NoAnswer::NoLeader(why)) => why,
            Err(NoAnswer::Leader(why)) => {
                // It may be another one's turn now.
                until = until.max(tokio::time::Instant::now() + LEADER_WITHIN);
                why
            }
        };
        if tokio::time::Instant::now() >= until {
            return Err(why.context("no lockd leads: a majority must run and be reached"));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

enum NoAnswer {
    /// Nobody speaks with us.
    Refused(anyhow::Error),
    /// Nobody was asked who leads.
    NoLeader(anyhow::Error),
    /// Somebody who leads, or did, was asked.
    Leader(anyhow::Error),
}

async fn ask_leader(lockds: &Lockds, question: &ToLockd, within: Duration) -> Result<FromLockd, NoAnswer> {
    let gathered = gather(lockds).await;
    if let Err(why) = gathered.check(lockds) {
        return Err(if gathered.is_refused() { NoAnswer::Refused(why) } else { NoAnswer::NoLeader(why) });
    }
    let leads = |one: &ReplicaView| gathered.leader().is_some_and(|leader| leader.replica == one.replica);
    let Some(mut address) = gathered.find(leads).first().map(|(address, _)| (*address).clone()) else {
        let why = anyhow::anyhow!("{} lockds answer, none leads", gathered.views.len());
        return Err(NoAnswer::NoLeader(why));
    };
    for _ in 0..HINTS_MAX {
        match ask(lockds, &address, question.clone(), within).await {
            Ok(FromLockd::NotLeader { leader }) => match leader.first() {
                Some(leader) => address = (*leader).into(),
                None => break,
            },
            Ok(answer) => return Ok(answer),
            Err(why) => return Err(NoAnswer::Leader(anyhow::anyhow!("lockd at {address}: {why}"))),
        }
    }
    Err(NoAnswer::Leader(anyhow::anyhow!("the leader changed")))
}

/// One question to one lockd, one answer.
async fn ask(
    lockds: &Lockds,
    address: &Address,
    question: ToLockd,
    within: Duration,
) -> Result<FromLockd, Unreached> {
    let conversation = async {
        let mut stream = lockds.connect_to(address).await?;
        let id = RequestId(1);
        let mut bytes = BytesMut::new();
        encode(&Frame { id, term: Term(0), message: question }, &mut bytes);
        stream.write_all(&bytes).await?;
        stream.flush().await?;
        let mut decoder = FrameDecoder::default();
        loop {
            let frame = decoder.next::<FromLockd>().map_err(|error| Unreached::Away(error.to_string()))?;
            match frame {
                Some(Frame { message: message @ FromLockd::NotLeader { .. }, .. }) => return Ok(message),
                Some(frame) if frame.id == id => return Ok(frame.message),
                Some(_) => continue,
                None => decoder.buffer().reserve(16 << 10),
            }
            if stream.read_buf(decoder.buffer()).await? == 0 {
                return Err(Unreached::Away("it closed the connection".to_owned()));
            }
        }
    };
    let answer = tokio::time::timeout(within, conversation).await;
    answer.unwrap_or_else(|_| Err(Unreached::Away("it does not answer in time".to_owned())))
}
