//! A lockspace that moves between daemons as they are: from a group of three to one alone, and back.

use csnap_proto::message::lock::{
    LockEvent, LockOp, LockReply, Mode, SpaceReply, SpaceRequest, SpaceState, ValueChange, Way,
};
use csnap_proto::{LockId, MigrationId, Name, RequestId, Term};
use csnap_transport::Address;

use super::group_tests::Group;
use super::tests::{client, granted_term, lock, runtime, start};
use super::*;
use crate::client::shell::LockSession;
use crate::client::{ClientEvent, Lockds};

pub(super) async fn ask(at: impl Into<Lockds>, request: &SpaceRequest) -> SpaceReply {
    let lockds = at.into();
    loop {
        for address in lockds.addresses() {
            if let Ok(reply) = ask_one(&lockds, address, request).await {
                return reply;
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn ask_one(lockds: &Lockds, address: &Address, request: &SpaceRequest) -> anyhow::Result<SpaceReply> {
    use csnap_proto::frame::{FrameDecoder, encode};
    use csnap_proto::message::lock::FromLockd;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = lockds.connect_to(address).await.map_err(anyhow::Error::msg)?;
    let mut bytes = bytes::BytesMut::new();
    let message = ToLockd::Space(request.clone());
    encode(&Frame { id: RequestId(1), term: Term(0), message }, &mut bytes);
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    let mut decoder = FrameDecoder::default();
    loop {
        if let Some(frame) = decoder.next::<FromLockd>()? {
            return match frame.message {
                FromLockd::Space(reply) => Ok(reply),
                FromLockd::Refused { reason } => Ok(SpaceReply::Refused { reason }),
                other => anyhow::bail!("{other:?}"),
            };
        }
        anyhow::ensure!(stream.read_buf(decoder.buffer()).await? > 0, "it follows");
    }
}

async fn state(at: &[SocketAddr]) -> SpaceState {
    match ask(at.to_vec(), &SpaceRequest::List).await {
        SpaceReply::Spaces(all) => all[0].state.clone(),
        other => panic!("{other:?}"),
    }
}

async fn moved(from: &[SocketAddr], to: &[SocketAddr], n: u8) {
    let (name, migration) = (Name::new("default").expect("a name"), MigrationId([n; 16]));
    let way = Way { migration, to: to.to_vec() };
    assert_eq!(ask(from.to_vec(), &SpaceRequest::Migrate { name, way }).await, SpaceReply::Done);
}

async fn settled(from: &[SocketAddr]) {
    while !matches!(state(from).await, SpaceState::Forwarded { activated: true, .. }) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn sessions_locks_and_waiters_move_to_another_group_and_back_while_its_lockds_restart() {
    runtime().block_on(async {
        let mut group = Group::start().await;
        let dir = tempfile::tempdir().expect("a directory");
        let alone = start(dir.path()).await.expect("starts");
        let (many, one) = (group.addresses(), vec![alone.address]);
        let (holder, _holder_events) = LockSession::spawn(client(1), many.clone());
        let (waiter, mut events) = LockSession::spawn(client(2), many.clone());
        assert_eq!(granted_term(&holder.operate(lock(Mode::Ex)).await.expect("opens")), Term(1));
        let waits = waiter.operate(lock(Mode::Ex)).await.expect("opens");
        assert!(matches!(waits, LockReply::Queued { .. }), "{waits:?}");
        for n in 0..4u8 {
            let (from, to) = if n % 2 == 0 { (&many, &one) } else { (&one, &many) };
            moved(from, to, n).await;
            // Whoever is hit, mid-way or not: the others, or it again, go on.
            group.stop_one(usize::from(n) % 3);
            group.start_one(usize::from(n) % 3).await;
            settled(from).await;
            assert_eq!(state(to).await, SpaceState::Active);
            let reply = holder.operate(LockOp::write(LockId(1), Mode::Ex, vec![n])).await.expect("lives");
            assert_eq!(granted_term(&reply), Term(1), "the same lock");
        }
        let done = holder.operate(LockOp::unlock(LockId(1), ValueChange::Keep)).await;
        assert_eq!(done, Ok(LockReply::Done));
        loop {
            match events.recv().await.expect("lives") {
                ClientEvent::Event(LockEvent::Granted { lock, value, .. }) => {
                    assert_eq!((lock.lock, lock.term), (LockId(2), Term(2)));
                    assert_eq!(value.expect("a new lock reads").bytes, [3]);
                    break;
                }
                ClientEvent::SessionLost { reason } => panic!("{reason}"),
                _ => {}
            }
        }
        (0..3).for_each(|n| group.stop_one(n));
        alone.stop();
    });
}
