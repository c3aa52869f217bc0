//! Messages that a correct replica cannot have sent, or that only another disk could have been meant by: dropped before
//! they reach the library, which would take them for a bug of its own and end the process.

use raft::RawNode;

use super::ReplicaId;
use super::message::{Body, PeerMessage};
use super::mirror::Mirror;

/// Why a message is not for this replica; `None` if it is.
pub(super) fn refuse(raw: &RawNode<Mirror>, id: ReplicaId, message: &PeerMessage) -> Option<&'static str> {
    if message.to != id {
        return Some("it is for another replica, or for one whose disk was lost");
    }
    let known = raw.store().cluster;
    if known.is_some_and(|cluster| cluster != message.cluster) {
        return Some("it is of another group");
    }
    if let Err(what) = message.check() {
        return Some(what);
    }
    let last = raw.raft.raft_log.last_index();
    match &message.body {
        Body::Heartbeat { commit } if *commit > last => {
            Some("it counts on entries that this replica never had")
        }
        Body::Appended { index, refused: None, .. } if *index > last => {
            Some("it has entries that this replica never sent")
        }
        Body::Install(image) if !image.members.contains_key(&id) => {
            Some("it is of a group without this replica")
        }
        _ => None,
    }
}
