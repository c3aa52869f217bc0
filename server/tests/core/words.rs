//! What is said to the desk: names, ranges, requests, and who says it.

use csnap_proto::message::operate::{OperatorRequest, RefusalKind, Source};
use csnap_proto::message::volume::{Attach, FromServer, Identify, ToServer};
use csnap_proto::{
    Chunk, ChunkRange, ChunkSize, InstanceId, Name, RequestToken, Secret, Sequence, SessionId, Target,
};

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

pub(crate) fn target(text: &str) -> Target {
    text.parse().expect("a target")
}

pub(crate) fn token(n: u64) -> RequestToken {
    RequestToken([u8::try_from(n).expect("small"); 16])
}

pub(crate) fn range(first: u64, count: u64) -> ChunkRange {
    ChunkRange { first: Chunk(first), count }
}

/// 4096 chunks of nothing.
pub(crate) fn create_volume(volume: &str) -> OperatorRequest {
    volume_from(Source::Empty, volume, 4096 * 4096)
}

pub(crate) fn import_volume(volume: &str) -> OperatorRequest {
    volume_from(Source::Import, volume, 4096)
}

pub(crate) fn volume_from(source: Source, volume: &str, size_bytes: u64) -> OperatorRequest {
    OperatorRequest::VolumeCreate { name: name(volume), size_bytes, chunk: ChunkSize::MIN, source }
}

pub(crate) fn create_snapshot(sequence: u64, snapshot: &str) -> ToServer {
    let request =
        OperatorRequest::SnapshotCreate { target: target(&format!("v@{snapshot}")), token: token(sequence) };
    let sequence = Sequence(sequence);
    ToServer::Operate { sequence, lowest_unanswered: sequence, request }
}

pub(crate) fn refused(message: &FromServer) -> Option<RefusalKind> {
    if let FromServer::Refused(refusal) = message { Some(refusal.kind) } else { None }
}

/// A session of its own process on node n1, with a pid and ids that are all `who`.
pub(crate) fn newcomer(who: u8, attach: Attach) -> Identify {
    Identify {
        session: SessionId([who; 16]),
        secret: Secret([who; 16]),
        instance: InstanceId([who; 16]),
        node: name("n1"),
        pid: u32::from(who),
        attach,
        cached_epoch: None,
    }
}
