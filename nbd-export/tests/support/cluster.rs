//! A pool with a real server, and the least of an agent: it anoints whatever server comes, hands out connected sockets to
//! it, and notes what exporters report.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::BytesMut;
use csnap_client::{Operator, ServerSource};
use csnap_nbd_export::{ExportConfig, run};
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::message::local::{ClientReport, FromAgent, ToAgent};
use csnap_proto::message::operate::{OperatorReply, OperatorRequest, Source};
use csnap_proto::{ChunkSize, Frame, InstanceId, Name, PoolId, RequestId, RequestToken, Term};
use csnap_server::shell::ServerConfig;
use csnap_server::term::{PoolToml, create_pool};
use csnap_storage::posix::{Backend, PosixOptions, PosixStorage};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::sync::oneshot;

/// What the agent knows.
#[derive(Default)]
struct Known {
    /// Terms given so far.
    term: u64,
    /// The server that serves: address and term.
    server: Option<(String, Term)>,
    /// Connections on which an exporter said hello.
    exporters: Vec<UnixStream>,
    reports: Vec<ClientReport>,
}

#[derive(Clone, Default)]
struct Agent(Arc<(Mutex<Known>, Condvar)>);

impl Agent {
    fn with<T>(&self, change: impl FnOnce(&mut Known) -> T) -> T {
        let result = change(&mut self.0.0.lock().expect("no panic"));
        self.0.1.notify_all();
        result
    }

    fn listen(&self, listener: UnixListener) {
        for stream in listener.incoming() {
            let (agent, stream) = (self.clone(), stream.expect("accepts"));
            std::thread::spawn(move || agent.converse(stream));
        }
    }

    fn converse(&self, mut stream: UnixStream) {
        let mut decoder = FrameDecoder::default();
        let mut address = String::new();
        while let Some(Frame { id, message, .. }) = receive(&mut stream, &mut decoder) {
            match message {
                ToAgent::ServerHello { tcp } => {
                    address = tcp;
                    let term = self.with(|known| {
                        known.term += 1;
                        Term(known.term)
                    });
                    say(&mut stream, id, FromAgent::Serve { term });
                }
                ToAgent::ServerServing { term } => {
                    self.with(|known| known.server = Some((address.clone(), term)))
                }
                ToAgent::NeedServer { suspect } => self.hand_over(&stream, id, suspect),
                ToAgent::ExporterHello { .. } => {
                    self.with(|known| known.exporters.push(stream.try_clone().expect("clones")));
                }
                ToAgent::ExporterReport { clients } => self.with(|known| known.reports = clients),
                _ => {}
            }
        }
        self.with(|known| {
            if known.server.as_ref().is_some_and(|(serving, _)| *serving == address) {
                known.server = None;
            }
        });
    }

    /// Waits for a server that is not the suspect, connects to it, and sends the socket.
    fn hand_over(&self, stream: &UnixStream, id: RequestId, suspect: Term) {
        let mut known = self.0.0.lock().expect("no panic");
        let (socket, term) = loop {
            let server = known.server.clone().filter(|(_, term)| *term != suspect);
            match server.and_then(|(tcp, term)| TcpStream::connect(tcp).ok().zip(Some(term))) {
                Some(connected) => break connected,
                None => known = self.0.1.wait_timeout(known, Duration::from_millis(20)).expect("no panic").0,
            }
        };
        let message = FromAgent::Connected { node: node(), term };
        let mut bytes = BytesMut::new();
        encode(&Frame { id, term: Term(0), message }, &mut bytes);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [socket.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        // Whoever asked may have gone meanwhile.
        let _ = rustix::net::sendmsg(stream, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL);
    }
}

fn receive(stream: &mut UnixStream, decoder: &mut FrameDecoder) -> Option<Frame<ToAgent>> {
    loop {
        if let Some(frame) = decoder.next().expect("well-formed") {
            return Some(frame);
        }
        let mut bytes = [0; 4096];
        let count = stream.read(&mut bytes).ok().filter(|&count| count > 0)?;
        decoder.buffer().extend_from_slice(&bytes[..count]);
    }
}

fn say(stream: &mut UnixStream, id: RequestId, message: FromAgent) {
    let mut bytes = BytesMut::new();
    encode(&Frame { id, term: Term(0), message }, &mut bytes);
    let _ = stream.write_all(&bytes);
}

fn node() -> Name {
    Name::new("n1").expect("a name")
}

/// A daemon on a thread of its own.
pub struct Daemon {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Daemon {
    fn start(run: impl FnOnce(oneshot::Receiver<()>) + Send + 'static) -> Self {
        let (stop, stopped) = oneshot::channel();
        Self { stop: Some(stop), thread: Some(std::thread::spawn(move || run(stopped))) }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        let ended = self.thread.take().expect("joined once").join();
        assert!(ended.is_ok() || std::thread::panicking(), "a daemon panicked");
    }
}

pub struct Cluster {
    server: Option<Daemon>,
    agent: Agent,
    runtime: tokio::runtime::Runtime,
    /// Last: the server has its files here until it has ended.
    pub dir: tempfile::TempDir,
}

impl Cluster {
    /// A new pool with a server.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let pool = dir.path().join("pool");
        std::fs::create_dir(&pool).expect("makes it");
        runtime.block_on(async {
            let options = PosixOptions { backend: Backend::Threads, shared: false };
            let storage = PosixStorage::open(&pool, options).expect("opens");
            create_pool(&storage, &PoolToml::new(PoolId([7; 16]), false)).await.expect("makes a pool");
        });
        let agent = Agent::default();
        let listener = UnixListener::bind(dir.path().join("agent.sock")).expect("binds");
        let listening = agent.clone();
        std::thread::spawn(move || listening.listen(listener));
        let mut cluster = Self { server: None, agent, runtime, dir };
        cluster.start_server();
        cluster
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a server; it takes over under a new term.
    pub fn start_server(&mut self) {
        let config = ServerConfig {
            node: node(),
            pool: self.path("pool"),
            agent_sock: self.path("agent.sock"),
            listen: "127.0.0.1:0".parse().expect("an address"),
            backend: Backend::Threads,
            client_lease: Duration::from_secs(15),
            drain_patience: Duration::from_secs(5),
        };
        self.server = Some(Daemon::start(move |stopped| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let shutdown = async { drop(stopped.await) };
            runtime
                .block_on(Box::pin(csnap_server::shell::run(config, shutdown)))
                .expect("the server ends well");
        }));
    }

    /// Ends the server without a word to anyone.
    pub fn kill_server(&mut self) {
        self.server = None;
        crate::support::wait_until("the agent knows", || self.agent.with(|known| known.server.is_none()));
    }

    /// Starts an exporter; gives its socket.
    pub fn start_exporter(&self, name: &str) -> (Daemon, PathBuf) {
        let socket = self.path(&format!("{name}.sock"));
        let config = ExportConfig {
            node: Name::new(name).expect("a name"),
            pool: self.path("pool"),
            pool_shared: false,
            agent_sock: self.path("agent.sock"),
            nbd_unix: socket.clone(),
            nbd_tcp: None,
            unique_cache_bytes: 1 << 20,
        };
        let daemon = Daemon::start(move |stopped| {
            let runtime = csnap_nbd_export::runtime().expect("a runtime");
            runtime.block_on(run(config, async { drop(stopped.await) })).expect("the exporter ends well");
        });
        crate::support::wait_until("it listens", || UnixStream::connect(&socket).is_ok());
        (daemon, socket)
    }

    /// Asks the server as an operator.
    pub fn operate(&self, request: OperatorRequest) -> OperatorReply {
        let source = ServerSource::Agents(vec![self.path("agent.sock")]);
        self.runtime.block_on(async {
            let mut operator = Operator::new(source, node(), InstanceId([9; 16])).expect("random numbers");
            let reply = operator.request(request).await.expect("the server does it");
            operator.close().await;
            reply
        })
    }

    /// Creates an empty volume.
    pub fn create_volume(&self, name: &str, size_bytes: u64) {
        let (name, chunk) = (Name::new(name).expect("a name"), ChunkSize::MIN);
        self.operate(OperatorRequest::VolumeCreate { name, size_bytes, chunk, source: Source::Empty });
    }

    /// Creates the snapshot `target`, as `VOL@SNAP`.
    pub fn create_snapshot(&self, target: &str) {
        let target = target.parse().expect("a target");
        let mut token = [0; 16];
        getrandom::fill(&mut token).expect("random numbers");
        self.operate(OperatorRequest::SnapshotCreate { target, token: RequestToken(token) });
    }

    /// What the exporter reported last.
    pub fn reports(&self) -> Vec<ClientReport> {
        self.agent.with(|known| known.reports.clone())
    }

    /// Asks every exporter for a report, as agents do.
    pub fn ask_for_reports(&self) {
        self.agent.with(|known| {
            known.exporters.iter_mut().for_each(|stream| say(stream, RequestId(1), FromAgent::ReportPlease));
        });
    }

    /// Breaks every exporter's connection to the agent.
    pub fn forget_exporters(&self) {
        self.agent.with(|known| {
            known.reports.clear();
            for stream in known.exporters.drain(..) {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        });
    }
}
