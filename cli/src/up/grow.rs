//! A directory that had one lockd gets three: the two new ones are added to the group of the old one.
//!
//! New lockds of a new directory found their group by themselves; those beside one that has a group wait to be added. A lockd
//! whose disk was lost is not added here: that it comes back empty is for a person to know (`csnap lockd add`).

use std::time::Duration;

use csnap_lockd::client::Lockds;
use csnap_proto::message::lock::{GroupRequest, ReplicaView};

use super::layout::Layout;
use crate::group::{self, Gathered};

/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Adds what is missing, one after another.
pub(super) async fn grow(layout: &Layout) {
    let lockds = Lockds::from(layout.lockds.iter().map(|lockd| lockd.listens).collect::<Vec<_>>());
    let count = lockds.addresses().len();
    if count == 1 {
        return;
    }
    loop {
        let gathered = group::gather(&lockds).await;
        let voters =
            gathered.leader_view().map_or(0, |view| view.replicas.iter().filter(|one| one.voter).count());
        if voters >= count {
            return;
        }
        if let Some(add) = first_apart(&gathered) {
            match group::request(&lockds, add).await {
                Ok(done) => eprintln!("csnap: {done}"),
                Err(error) => eprintln!("csnap: a lockd cannot join the others yet: {error:#}"),
            }
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// A lockd that runs, and does not vote in the leader's group.
fn first_apart(gathered: &Gathered) -> Option<GroupRequest> {
    let leader = gathered.leader_view()?;
    let votes = |own: &ReplicaView| leader.replicas.iter().any(|one| one.replica == own.replica && one.voter);
    let found = gathered.find(|own| !votes(own));
    found.iter().find_map(|(_, view)| {
        let own = view.replicas.iter().find(|one| one.replica == view.own)?;
        Some(GroupRequest::Add { replica: own.replica, node: own.node.clone()?, address: own.peer? })
    })
}
