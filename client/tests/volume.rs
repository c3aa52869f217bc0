//! A volume and an operator over real sockets and files, against a small agent and a small server that do as a script says.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use csnap_client::{Attempt, ClientConfig, Operator, RequestError, ServerSource, Volume};
use csnap_proto::frame::Message;
use csnap_proto::message::local::{FromAgent, ToAgent};
use csnap_proto::message::operate::{OperatorReply, OperatorRequest, Refusal, RefusalKind};
use csnap_proto::message::volume::{
    Attach, Extent, FromServer, Geometry, Head, IdentifyOk, Place, ToServer, UniquePage,
};
use csnap_proto::*;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::mpsc;

const SIZE: u64 = 4 << 20;
const CHUNK: usize = 4096;

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

fn target(text: &str) -> Target {
    text.parse().expect("a target")
}

/// What the server does, changed by tests as they go.
#[derive(Default)]
struct Script {
    term: AtomicU64,
    epoch: AtomicU64,
    /// Snapshots live: writes need grants.
    snapshots: AtomicBool,
    /// Break the connection instead of answering the next so many frames other than Identify.
    breaks: AtomicU64,
    busy: AtomicBool,
    /// Operators' requests that arrived, with their sequences.
    operated: Mutex<Vec<Sequence>>,
    /// To the open connection.
    to_client: Mutex<Option<mpsc::UnboundedSender<(RequestId, FromServer)>>>,
    /// Told of each AdviceOk.
    advised: tokio::sync::Notify,
    /// Told of each writer that is let in.
    identified: tokio::sync::Notify,
    /// Told of each Release.
    released: tokio::sync::Notify,
}

struct World {
    dir: tempfile::TempDir,
    script: Arc<Script>,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        std::fs::create_dir(dir.path().join("head")).expect("fresh");
        std::fs::create_dir_all(dir.path().join("store/1")).expect("fresh");
        let script = Arc::new(Script::default());
        script.term.store(1, Ordering::SeqCst);
        script.epoch.store(1, Ordering::SeqCst);
        let world = Self { dir, script };
        std::fs::File::create(world.head()).expect("fresh").set_len(SIZE).expect("sparse");
        let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = server.local_addr().expect("bound");
        let agent = UnixListener::bind(world.agent()).expect("fresh");
        tokio::spawn(run_agent(agent, address, world.script.clone()));
        tokio::spawn(run_server(server, world.script.clone()));
        world
    }

    fn head(&self) -> PathBuf {
        self.dir.path().join("head").join(VolumeId(7).file_name())
    }

    fn agent(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    fn config(&self) -> ClientConfig {
        let source = ServerSource::Agents(vec![self.dir.path().join("absent.sock"), self.agent()]);
        ClientConfig::new(source, self.dir.path().to_owned(), name("n1"), InstanceId([9; 16]))
    }

    async fn open(&self, what: &str) -> Arc<Volume> {
        Volume::open(self.config(), target(what)).await.expect("attaches")
    }

    fn say(&self, id: u64, message: FromServer) {
        let sender = self.script.to_client.lock().expect("no panic").clone();
        sender.expect("a connection").send((RequestId(id), message)).expect("open");
    }
}

async fn run_agent(listener: UnixListener, server: std::net::SocketAddr, script: Arc<Script>) {
    loop {
        let (stream, _) = listener.accept().await.expect("listens");
        let script = script.clone();
        tokio::spawn(async move {
            let mut stream = stream;
            let mut decoder = FrameDecoder::default();
            let frame = next::<ToAgent>(&mut stream, &mut decoder).await?;
            assert!(matches!(frame.message, ToAgent::NeedServer { .. }));
            let socket = TcpStream::connect(server).await.expect("the server listens");
            let term = Term(script.term.load(Ordering::SeqCst));
            let message = FromAgent::Connected { node: name("n1"), term };
            let mut bytes = BytesMut::new();
            frame::encode(&Frame { id: frame.id, term: Term(0), message }, &mut bytes);
            // The frame in two pieces: the socket comes with the first.
            let (first, second) = bytes.split_at(10);
            let sent = stream.async_io(Interest::WRITABLE, || send_beside(&stream, first, &socket)).await;
            assert_eq!(sent.expect("sends"), 10);
            stream.write_all(second).await.expect("sends");
            Some(())
        });
    }
}

fn send_beside(stream: &UnixStream, bytes: &[u8], socket: &TcpStream) -> std::io::Result<usize> {
    let fds = [socket.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    Ok(rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::DONTWAIT)?)
}

async fn next<M: Message>(
    stream: &mut (impl AsyncReadExt + Unpin),
    decoder: &mut FrameDecoder,
) -> Option<Frame<M>> {
    loop {
        if let Some(frame) = decoder.next().expect("frames") {
            return Some(frame);
        }
        if stream.read_buf(decoder.buffer()).await.ok()? == 0 {
            return None;
        }
    }
}

async fn run_server(listener: TcpListener, script: Arc<Script>) {
    loop {
        let (stream, _) = listener.accept().await.expect("listens");
        tokio::spawn(serve(stream, script.clone()));
    }
}

async fn serve(stream: TcpStream, script: Arc<Script>) -> Option<()> {
    let (mut reader, mut writer) = stream.into_split();
    let (sender, mut receiver) = mpsc::unbounded_channel();
    *script.to_client.lock().expect("no panic") = Some(sender);
    let mut decoder = FrameDecoder::default();
    let term = Term(script.term.load(Ordering::SeqCst));
    loop {
        let (id, message) = tokio::select! {
            frame = next::<ToServer>(&mut reader, &mut decoder) => {
                let frame = frame?;
                let identifies = matches!(frame.message, ToServer::Identify(_));
                let fewer = |left: u64| left.checked_sub(1);
                if !identifies && script.breaks.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fewer).is_ok() {
                    script.term.fetch_add(1, Ordering::SeqCst);
                    return None;
                }
                match answer(&script, &frame) {
                    Some(message) => (frame.id, message),
                    None => continue,
                }
            }
            message = receiver.recv() => message?,
        };
        let mut bytes = BytesMut::new();
        frame::encode(&Frame { id, term, message }, &mut bytes);
        writer.write_all(&bytes).await.ok()?;
    }
}

fn answer(script: &Script, frame: &Frame<ToServer>) -> Option<FromServer> {
    let epoch = Epoch(script.epoch.load(Ordering::SeqCst));
    let all_unique = !script.snapshots.load(Ordering::SeqCst);
    Some(match &frame.message {
        ToServer::Identify(_) if script.busy.load(Ordering::SeqCst) => {
            FromServer::Refused(Refusal::new(RefusalKind::Busy, "held by n2"))
        }
        ToServer::Identify(identify) => {
            script.identified.notify_one();
            FromServer::IdentifyOk(IdentifyOk {
                geometry: (identify.attach != Attach::Operator).then(|| Geometry {
                    volume: VolumeId(7),
                    snapshot: None,
                    target: target("demo"),
                    size_bytes: SIZE,
                    chunk: ChunkSize::MIN,
                    head: Head::Pool,
                }),
                epoch,
                all_unique,
                lease_ms: 1000,
                advice_follows: false,
            })
        }
        ToServer::QueryWrite { ranges } => {
            let mut pages: Vec<u64> = ranges.iter().map(|range| range.first.0 / 512).collect();
            pages.dedup();
            let pages = pages.into_iter().map(|page| UniquePage { page, bits: vec![] }).collect();
            FromServer::WriteOk { epoch, no_space: vec![], all_unique: false, pages }
        }
        ToServer::QuerySnapshotRead { read, ranges } => FromServer::SnapshotRead {
            read: *read,
            extents: ranges.iter().flat_map(|range| locate(*range)).collect(),
        },
        ToServer::FinishSnapshotRead { read } => FromServer::FinishSnapshotReadOk { read: *read },
        ToServer::SnapshotAdviceOk { .. } => {
            script.advised.notify_one();
            return None;
        }
        ToServer::Renew { .. } => FromServer::Renewed { forget: vec![], all_unique, epoch },
        ToServer::Release => {
            script.released.notify_one();
            FromServer::Released
        }
        ToServer::Operate { sequence, .. } => {
            script.operated.lock().expect("no panic").push(*sequence);
            FromServer::Operated(OperatorReply::Done)
        }
    })
}

/// Chunks 0 and 1 are zero, 2 and 3 in the store at block 5, the rest on the origin.
fn locate(range: ChunkRange) -> Vec<Extent> {
    let place = |chunk: u64| match chunk {
        0 | 1 => Place::Zero,
        2 | 3 => {
            let block = u32::try_from(chunk + 3).expect("small");
            Place::Store(Location { term: Term(1), arena: 0, block })
        }
        _ => Place::Origin,
    };
    range.chunks().map(|chunk| Extent { range: ChunkRange::one(chunk), place: place(chunk.0) }).collect()
}

/// As an exporter does: at once if it goes, which a loaded machine may not let it.
async fn write(volume: &Volume, offset: u64, data: &[u8]) {
    if volume.try_write(offset, data) != Ok(Attempt::Done) {
        volume.write(offset, Bytes::copy_from_slice(data), false).await.expect("writes");
    }
}

fn count(volume: &Volume, message: &str) -> u64 {
    volume.messages().get(message).copied().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_without_snapshots_is_used_without_messages() {
    let world = World::new().await;
    let volume = world.open("demo").await;
    assert_eq!(volume.geometry().size_bytes, SIZE);
    write(&volume, 0, &[1; CHUNK]).await;
    volume.write(4096, Bytes::from(vec![2; CHUNK]), true).await.expect("writes");
    let mut buf = vec![0; 2 * CHUNK];
    assert_eq!(volume.try_read(0, &mut buf), Ok(Attempt::Done), "it was just written");
    assert_eq!(volume.read(0, 2 * CHUNK).await.expect("reads"), buf);
    assert!(buf[..CHUNK].iter().all(|b| *b == 1) && buf[CHUNK..].iter().all(|b| *b == 2));
    volume.write_zeroes(0, 4096, false, true).await.expect("zeroes");
    volume.trim(4096, 4096, false).await.expect("trims");
    volume.flush().await.expect("flushes");
    assert!(volume.read(0, 2 * CHUNK).await.expect("reads").iter().all(|b| *b == 0));
    assert!(volume.block_status(0, SIZE).await.expect("known").iter().all(|run| run.hole));
    assert_eq!((count(&volume, "QueryWrite"), count(&volume, "WriteOk")), (0, 0));
    assert!(matches!(
        volume.write(SIZE, Bytes::from_static(b"x"), false).await,
        Err(RequestError::Invalid(_))
    ));
    volume.release().await.expect("releases");
    assert_eq!(volume.write(0, Bytes::from_static(b"x"), false).await, Err(RequestError::Released));
    assert_eq!(count(&volume, "Released"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_write_asks_and_a_rewrite_does_not() {
    let world = World::new().await;
    world.script.snapshots.store(true, Ordering::SeqCst);
    let volume = world.open("demo").await;
    assert_eq!(volume.try_write(0, &[1; CHUNK]), Ok(Attempt::WouldBlock));
    volume.write(0, Bytes::from(vec![1; CHUNK]), false).await.expect("writes");
    write(&volume, 0, &[2; CHUNK]).await;
    assert_eq!((count(&volume, "QueryWrite"), count(&volume, "WriteOk")), (1, 1));
    volume.release().await.expect("releases");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_survive_servers_that_break_off() {
    let world = World::new().await;
    world.script.snapshots.store(true, Ordering::SeqCst);
    let volume = world.open("demo").await;
    for chunk in 0..20u64 {
        world.script.breaks.store(chunk % 3, Ordering::SeqCst);
        let at = chunk * 512 % 1024 * 4096 + chunk * 4096;
        volume.write(at, Bytes::from(vec![3; CHUNK]), false).await.expect("writes");
    }
    let snapshot = world.open("demo@a").await;
    for _ in 0..10 {
        world.script.breaks.store(1, Ordering::SeqCst);
        snapshot.read(0, 20 * CHUNK).await.expect_err("the arena is absent, whoever serves");
        world.script.breaks.store(2, Ordering::SeqCst);
        snapshot.read(4 * CHUNK as u64, 8 * CHUNK).await.expect("reads");
    }
    snapshot.release().await.expect("releases");
    volume.release().await.expect("releases");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_is_put_together_from_zeros_store_and_origin() {
    let world = World::new().await;
    let mut head = vec![7u8; 16 * CHUNK];
    head[..8 * CHUNK].fill(6);
    std::fs::write(world.head(), &head).expect("writes");
    std::fs::OpenOptions::new()
        .write(true)
        .open(world.head())
        .expect("is there")
        .set_len(SIZE)
        .expect("grows");
    let mut arena = vec![0u8; 8 * CHUNK];
    arena[5 * CHUNK..7 * CHUNK].fill(5);
    std::fs::write(world.dir.path().join("store/1/0"), &arena).expect("writes");

    let snapshot = world.open("demo@a").await;
    assert!(snapshot.is_read_only());
    let data = snapshot.read(100, 9 * CHUNK).await.expect("reads");
    let mut expected = vec![0u8; 16 * CHUNK];
    expected[2 * CHUNK..4 * CHUNK].fill(5);
    expected[4 * CHUNK..8 * CHUNK].fill(6);
    expected[8 * CHUNK..].fill(7);
    assert_eq!(data, expected[100..100 + 9 * CHUNK]);
    let sent = ["QuerySnapshotRead", "SnapshotReadOriginOk", "FinishSnapshotRead", "FinishSnapshotReadOk"];
    assert_eq!(sent.map(|message| count(&snapshot, message)), [1; 4]);
    snapshot.read(2 * CHUNK as u64, CHUNK).await.expect("reads");
    assert_eq!((count(&snapshot, "QuerySnapshotRead"), count(&snapshot, "SnapshotReadOk")), (2, 1));
    assert_eq!(snapshot.write(0, Bytes::from_static(b"x"), false).await, Err(RequestError::ReadOnly));
    snapshot.release().await.expect("releases");
}

/// Writers on every thread, through the fast path and the slow one; each time the client says that it has drained, the head
/// must stand still until it is resumed.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn nothing_changes_the_head_between_an_advice_ok_and_its_resume() {
    let world = World::new().await;
    let volume = world.open("demo").await;
    let over = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for writer in 0..3u64 {
        let (volume, over) = (volume.clone(), over.clone());
        writers.push(tokio::spawn(async move {
            let mut round = 0u64;
            while !over.load(Ordering::SeqCst) {
                round += 1;
                let at = (round * 7 + writer * 331) % 1024 * 4096;
                let data = vec![u8::try_from(round % 251).expect("small"); CHUNK];
                write(&volume, at, &data).await;
                tokio::task::yield_now().await;
            }
            round
        }));
    }
    for create in 1..=20u8 {
        let advice = RequestToken([create; 16]);
        world.say(create.into(), FromServer::SnapshotAdvice { advice });
        world.script.advised.notified().await;
        let first = std::fs::read(world.head()).expect("reads");
        // Not a wait for something: time for a write to happen that must not.
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert!(first == std::fs::read(world.head()).expect("reads"), "create {create}");
        let epoch = Epoch(world.script.epoch.fetch_add(1, Ordering::SeqCst) + 1);
        let all_unique = create % 2 == 0;
        world.script.snapshots.store(!all_unique, Ordering::SeqCst);
        world.say(0, FromServer::Resume { advice, epoch, all_unique });
        volume.write(0, Bytes::from(vec![1; CHUNK]), false).await.expect("writes go on");
    }
    over.store(true, Ordering::SeqCst);
    for writer in writers {
        assert!(writer.await.expect("no panic") > 20);
    }
    volume.release().await.expect("releases");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_writer_waits_for_the_lock_of_the_last() {
    let world = World::new().await;
    let first = world.open("demo").await;
    let config = world.config();
    let second = tokio::spawn(Volume::open(config, target("demo")));
    first.write(0, Bytes::from(vec![1; CHUNK]), false).await.expect("writes");
    assert!(!second.is_finished());
    drop(first);
    let second = second.await.expect("no panic").expect("attaches once the first is gone");
    second.release().await.expect("releases");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attach_that_is_given_up_while_it_waits_for_the_lock_gives_its_session_back() {
    let world = World::new().await;
    let holder = std::fs::File::open(world.head()).expect("is there");
    rustix::fs::flock(&holder, rustix::fs::FlockOperation::LockExclusive).expect("nobody has it");
    let opening = tokio::spawn(Volume::open(world.config(), target("demo")));
    world.script.identified.notified().await;
    opening.abort();
    world.script.released.notified().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_names_the_holder() {
    let world = World::new().await;
    world.script.busy.store(true, Ordering::SeqCst);
    let refused = Volume::open(world.config(), target("demo")).await.expect_err("busy");
    assert_eq!(refused.to_string(), "held by n2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operators_request_is_resent_with_its_sequence() {
    let world = World::new().await;
    let source = ServerSource::Agents(vec![world.agent()]);
    let mut operator = Operator::new(source, name("n1"), InstanceId([8; 16])).expect("random numbers");
    let list = || OperatorRequest::VolumeRename { from: name("a"), to: name("b") };
    assert_eq!(operator.request(list()).await.expect("done"), OperatorReply::Done);
    world.script.breaks.store(2, Ordering::SeqCst);
    assert_eq!(operator.request(list()).await.expect("done"), OperatorReply::Done);
    assert_eq!(*world.script.operated.lock().expect("no panic"), [Sequence(1), Sequence(2)]);
    operator.close().await;
}
