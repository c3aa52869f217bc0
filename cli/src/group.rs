//! Conversations with lockds about themselves: each asked what it knows, or the leader, whoever it is, asked for something.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::BytesMut;
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::message::lock::{
    FromLockd, GroupReply, GroupRequest, GroupView, ReplicaNumber, ReplicaView, ToLockd,
};
use csnap_proto::{Frame, RequestId, Term};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::lockds;

/// A lockd that lives answers within a millisecond; one that takes this long is frozen or not reached.
const SHOW_WITHIN: Duration = Duration::from_millis(500);

/// The longest request, a replica that learns everything, is answered within 60 s.
const DONE_WITHIN: Duration = Duration::from_secs(75);

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
    views: Vec<(SocketAddr, GroupView)>,
}

/// Asks all of them, and whoever they say leads, at once each.
pub(crate) async fn gather(addresses: &[SocketAddr]) -> Gathered {
    let mut gathered = Gathered::default();
    gathered.ask(addresses).await;
    // The leader may be none of those that were named.
    let asked: BTreeSet<_> = addresses.iter().copied().collect();
    let known =
        gathered.views.iter().flat_map(|(_, view)| view.replicas.iter().flat_map(|one| one.listens.clone()));
    let more: BTreeSet<SocketAddr> = known.filter(|address| !asked.contains(address)).collect();
    if gathered.leader_view().is_none() && !more.is_empty() {
        gathered.ask(&more.into_iter().collect::<Vec<_>>()).await;
    }
    gathered
}

impl Gathered {
    async fn ask(&mut self, addresses: &[SocketAddr]) {
        let asked = addresses.iter().map(|address| tokio::spawn(show(*address)));
        let asked: Vec<_> = addresses.iter().copied().zip(asked.collect::<Vec<_>>()).collect();
        for (address, answer) in asked {
            if let Ok(Ok(view)) = answer.await {
                self.views.push((address, view));
            }
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.views.is_empty()
    }

    /// What each said.
    pub(crate) fn views(&self) -> impl Iterator<Item = &GroupView> {
        self.views.iter().map(|(_, view)| view)
    }

    /// Where a lockd listens of which this is true.
    pub(crate) fn find(&self, is: impl Fn(&ReplicaView) -> bool) -> Vec<(SocketAddr, &GroupView)> {
        let own = |view: &GroupView| view.replicas.iter().find(|one| one.replica == view.own).cloned();
        let found = self.views.iter().filter(|(_, view)| own(view).is_some_and(|own| is(&own)));
        found.map(|(address, view)| (*address, view)).collect()
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
pub(crate) async fn show(address: SocketAddr) -> anyhow::Result<GroupView> {
    match ask(address, GroupRequest::Show, SHOW_WITHIN).await? {
        FromLockd::Group(GroupReply::Group(view)) => Ok(view),
        _ => bail!("lockd at {address} answered another question"),
    }
}

/// Asks the leader for something, whoever it is by then; what is so now. What was asked for and not answered is asked for
/// again: what is done already is answered as done.
pub(crate) async fn request(addresses: &[SocketAddr], request: GroupRequest) -> anyhow::Result<String> {
    let mut until = tokio::time::Instant::now() + LEADER_WITHIN;
    loop {
        let why = match ask_leader(addresses, &request).await {
            Ok(GroupReply::Done { what }) => return Ok(what),
            Ok(GroupReply::Refused { reason }) => bail!("{reason}"),
            Ok(GroupReply::Group(_)) => bail!("lockd answered another question"),
            Err(NoAnswer { why, asked_a_leader }) => {
                // It may be another one's turn now.
                if asked_a_leader {
                    until = until.max(tokio::time::Instant::now() + LEADER_WITHIN);
                }
                why
            }
        };
        if tokio::time::Instant::now() >= until {
            return Err(
                why.context("no lockd leads, so nothing can be changed: a majority must run and be reached")
            );
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

struct NoAnswer {
    why: anyhow::Error,
    asked_a_leader: bool,
}

async fn ask_leader(addresses: &[SocketAddr], request: &GroupRequest) -> Result<GroupReply, NoAnswer> {
    let gathered = gather(addresses).await;
    let no_answer = |why, asked_a_leader| NoAnswer { why, asked_a_leader };
    if gathered.is_empty() {
        let list = addresses.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", ");
        return Err(no_answer(anyhow::anyhow!("no lockd answers at {list}; see that they run"), false));
    }
    let leads = |one: &ReplicaView| gathered.leader().is_some_and(|leader| leader.replica == one.replica);
    let Some((mut address, _)) = gathered.find(leads).first().copied() else {
        return Err(no_answer(anyhow::anyhow!("{} lockds answer, none leads", gathered.views.len()), false));
    };
    for _ in 0..HINTS_MAX {
        match ask(address, request.clone(), DONE_WITHIN).await {
            Ok(FromLockd::Group(reply)) => return Ok(reply),
            Ok(FromLockd::NotLeader { leader }) => match leader.first() {
                Some(leader) => address = *leader,
                None => break,
            },
            Ok(_) => {
                return Err(no_answer(anyhow::anyhow!("lockd at {address} answered another question"), true));
            }
            Err(why) => return Err(no_answer(why, true)),
        }
    }
    Err(no_answer(anyhow::anyhow!("the leader changed"), true))
}

/// One question, one answer.
async fn ask(address: SocketAddr, question: GroupRequest, within: Duration) -> anyhow::Result<FromLockd> {
    let conversation = async {
        let lockds = lockds::over(&[address])?;
        let mut stream = lockds.connect_to(&address.into()).await.map_err(anyhow::Error::msg)?;
        let id = RequestId(1);
        let mut bytes = BytesMut::new();
        encode(&Frame { id, term: Term(0), message: ToLockd::Group(question) }, &mut bytes);
        stream.write_all(&bytes).await?;
        stream.flush().await?;
        let mut decoder = FrameDecoder::default();
        loop {
            while let Some(frame) = decoder.next::<FromLockd>()? {
                if frame.id == id || matches!(frame.message, FromLockd::NotLeader { .. }) {
                    return anyhow::Ok(frame.message);
                }
            }
            decoder.buffer().reserve(16 << 10);
            if stream.read_buf(decoder.buffer()).await? == 0 {
                bail!("it closed the connection");
            }
        }
    };
    let answer = tokio::time::timeout(within, conversation).await;
    answer
        .map_err(|_| anyhow::anyhow!("no answer in time"))
        .and_then(|answer| answer)
        .with_context(|| format!("lockd at {address}"))
}
