//! `csnap lockd show | add | remove | move`: the group of lockds.

use std::path::Path;

use anyhow::{Context, bail};
use csnap_lockd::client::Lockds;
use csnap_proto::message::lock::{GroupRequest, ReplicaNumber, ReplicaView};
use csnap_transport::Address;
use serde_json::{Value, json};

use crate::args::{LockdAction, Whom};
use crate::group::{self, Gathered};
use crate::{lockds, output};

pub(crate) async fn run(dir: &Path, json: bool, action: LockdAction) -> anyhow::Result<()> {
    let (LockdAction::Show { at }
    | LockdAction::Add { at, .. }
    | LockdAction::Remove { at, .. }
    | LockdAction::Move { at, .. }) = &action;
    let lockds = lockds::find(dir, at)?;
    let done = match action {
        LockdAction::Show { .. } => return show(&lockds, json).await,
        LockdAction::Add { new, .. } => add(&lockds, &new).await?,
        LockdAction::Remove { replica, .. } => {
            let replica = find(&lockds, &replica, "remove").await?;
            group::request(&lockds, GroupRequest::Remove { replica }).await?
        }
        LockdAction::Move { replica, .. } => {
            let to = find(&lockds, &replica, "move").await?;
            group::request(&lockds, GroupRequest::Move { to }).await?
        }
    };
    if json { output::json(&json!({ "done": done })) } else { output::print(&format!("{done}\n")) }
}

async fn show(lockds: &Lockds, json: bool) -> anyhow::Result<()> {
    let gathered = group::gather(lockds).await;
    gathered.check(lockds)?;
    if json { output::json(&as_json(&gathered)) } else { output::print(&as_text(&gathered)) }
}

/// The new one says itself who it is.
async fn add(lockds: &Lockds, new: &Whom) -> anyhow::Result<String> {
    let address = match new {
        Whom::Address(address) => address.clone(),
        Whom::Replica(_) | Whom::Node(_) => find_new(&group::gather(lockds).await, new)?,
    };
    let view = group::show(lockds, &address).await.with_context(|| format!("{new} must run to be added"))?;
    let own = view.replicas.iter().find(|one| one.replica == view.own);
    let own = own.with_context(|| format!("lockd at {address} does not say who it is"))?;
    let node = own.node.clone().with_context(|| format!("lockd at {address} does not say its node"))?;
    let peer = own.peer.with_context(|| {
        format!("lockd of {node} has no `peer_listen`, so the others cannot reach it: set it, and `peers`, and start it again")
    })?;
    let others: Vec<_> = lockds.addresses().iter().filter(|known| **known != address).cloned().collect();
    let others = if others.is_empty() { lockds.clone() } else { lockds::over(others)? };
    group::request(&others, GroupRequest::Add { replica: own.replica, node, address: peer }).await
}

/// Among those that answer: one that is no member before one that is.
fn find_new(gathered: &Gathered, new: &Whom) -> anyhow::Result<Address> {
    let found = gathered.find(|own| is(own, new));
    let apart = found.iter().find(|(_, view)| !gathered.is_member(view.own));
    let found = apart.or(found.first()).map(|(address, _)| (*address).clone());
    found.with_context(|| {
        format!(
            "no lockd of {new} answers: start it, or say where it listens for clients (IP:PORT or unix:/PATH)"
        )
    })
}

/// The member that is meant.
async fn find(lockds: &Lockds, whom: &Whom, what: &str) -> anyhow::Result<ReplicaNumber> {
    let gathered = group::gather(lockds).await;
    gathered.check(lockds)?;
    let replicas = gathered.replicas();
    let members = || replicas.iter().filter(|one| gathered.is_member(one.replica));
    let found: Vec<_> = members().filter(|one| is(one, whom)).collect();
    match found[..] {
        [one] => Ok(one.replica),
        [] => {
            let names: Vec<_> = members().map(name).collect();
            match names.is_empty() {
                true => bail!("the lockds that answer belong to no group yet; see csnap lockd show"),
                false => bail!("the group has no replica {whom}; it has {}", names.join(", ")),
            }
        }
        _ => {
            let numbers: Vec<_> = found.iter().map(|one| one.replica.to_string()).collect();
            bail!(
                "{whom} has several replicas: say which one to {what} by its number, {}",
                numbers.join(" or ")
            )
        }
    }
}

fn is(one: &ReplicaView, whom: &Whom) -> bool {
    match whom {
        Whom::Address(Address::Tcp(address)) => one.listens.contains(address) || one.peer == Some(*address),
        Whom::Address(Address::Unix(_)) => false,
        Whom::Replica(number) => one.replica == *number,
        Whom::Node(node) => one.node.as_ref() == Some(node),
    }
}

fn name(one: &ReplicaView) -> String {
    one.node.as_ref().map_or_else(|| one.replica.to_string(), ToString::to_string)
}

/// What a replica does, in a word.
fn state(gathered: &Gathered, one: &ReplicaView) -> &'static str {
    let leads = gathered.leader().is_some_and(|leader| leader.replica == one.replica);
    match (gathered.is_member(one.replica), one.reached) {
        (false, _) => "no member",
        (true, false) => "away",
        (true, true) if leads => "leads",
        (true, true) if !one.voter => "learns",
        (true, true) => "follows",
    }
}

/// In a line: who leads, and which of the others does not follow.
pub(crate) fn summary(gathered: &Gathered) -> String {
    let replicas = gathered.replicas();
    let voters = replicas.iter().filter(|one| one.voter && gathered.is_member(one.replica));
    let leader = gathered.leader().map_or("nobody leads".into(), |leader| format!("{} leads", name(&leader)));
    let others = replicas.iter().filter(|one| !matches!(state(gathered, one), "leads" | "follows"));
    let others: String = others.map(|one| format!(", {} {}", name(one), state(gathered, one))).collect();
    format!("{leader} {}{others}", voters.count())
}

pub(crate) fn as_json(gathered: &Gathered) -> Value {
    let replica = |one: &ReplicaView| {
        json!({
            "node": one.node,
            "replica": one.replica.to_string(),
            "pid": one.pid,
            "state": state(gathered, one),
            "votes": one.voter,
            "caught_up": one.caught_up,
            "listens": one.listens,
            "peer": one.peer,
        })
    };
    json!({
        "leader": gathered.leader().map(|leader| name(&leader)),
        "term": gathered.views().map(|view| view.replica_term.0).max(),
        "members": gathered.replicas().iter().map(replica).collect::<Vec<_>>(),
    })
}

fn as_text(gathered: &Gathered) -> String {
    let row = |one: &ReplicaView| {
        vec![
            one.node.as_ref().map_or("-".into(), ToString::to_string),
            state(gathered, one).to_owned(),
            if one.voter { "yes" } else { "no" }.to_owned(),
            one.replica.to_string(),
            one.pid.map_or("-".into(), |pid| pid.to_string()),
            if one.listens.is_empty() {
                "-".into()
            } else {
                one.listens.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
            },
            one.peer.map_or("-".into(), |peer| peer.to_string()),
        ]
    };
    let rows: Vec<_> = gathered.replicas().iter().map(row).collect();
    let headings = ["NODE", "STATE", "VOTES", "REPLICA", "PID", "LISTENS", "PEER"];
    format!("{}\n\n{}", summary(gathered), output::table(&headings, &rows))
}
