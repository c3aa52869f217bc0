//! A history: what operators, a writer and the disk do to a pool, one step after the other, and the one process of each
//! sort that does it. Everything acknowledged is noted in the ledger, everything begun before it is begun.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use csnap_proto::message::operate::OperatorReply;
use csnap_proto::message::volume::{Attach, FromServer, Identify, ToServer};
use csnap_proto::{Chunk, ChunkRange, ChunkSize, InstanceId, RequestId, Secret, Sequence, SessionId, Term};
use csnap_server::core::{ConnId, Input};
use csnap_server::state::Attached;
use csnap_storage::sim::{Rng, SimDisk, SimFile, SimNode};
use csnap_storage::{Access, Storage};

use crate::model::{Change, Ledger, name, open_head, origin_path};
use crate::server::{Broken, Gone, Server};

/// Sizes of the two volumes of a history: chunks of 4 and of 8 KiB, the last one of the second a half.
const SMALL: (u64, u64) = (8 * 4096, 4096);
const LARGE: (u64, u64) = (5 * 4096, 8192);

/// Bytes left when the disk is full: enough for heads and journal, too little for the store to grow.
const FULL_BUT: u64 = 1 << 20;

/// Ticks while a request is on its way to the disk: enough for all the background work that it may begin.
const TICKS_ON_THE_WAY: u32 = 16;

const OPERATOR: ConnId = ConnId(1);
const WRITER: ConnId = ConnId(2);
const CLIENT: SimNode = SimNode(1000);

/// What happens next.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    /// An operator asks for a change.
    Ask(Change),
    /// A snapshot is deleted while the writer asks for chunks that it shares with the next one.
    DeleteWhileWriting {
        volume: &'static str,
        snapshot: &'static str,
        chunks: ChunkRange,
    },
    Attach(&'static str),
    Write(ChunkRange),
    Flush,
    /// The writer flushes and goes.
    Release,
    /// The writer dies; its agent has seen it.
    Lose,
    /// Everything that deletes left to do in the background.
    Settle,
    Checkpoint,
    /// The disk has no room for the store; what the writer asks for is refused.
    FullFor(ChunkRange),
    /// The server dies, another one takes over.
    Takeover,
}

impl Step {
    /// What it is counted as.
    fn kind(self) -> &'static str {
        match self {
            Self::Ask(Change::Create { .. }) => "volume create",
            Self::Ask(Change::Adopt { .. }) => "volume adopt",
            Self::Ask(Change::Rename { .. }) => "volume rename",
            Self::Ask(Change::Delete { .. }) => "volume delete",
            Self::Ask(Change::Snapshot { .. }) => "snapshot create",
            Self::Ask(Change::RenameSnapshot { .. }) => "snapshot rename",
            Self::Ask(Change::DeleteSnapshot { .. }) | Self::DeleteWhileWriting { .. } => "snapshot delete",
            Self::Ask(Change::Reap { .. }) | Self::Lose => "writer lost",
            Self::Attach(_) | Self::Flush | Self::Release => "attach, flush, release",
            Self::Write(_) => "write, copy-out",
            Self::Settle => "reap, free, punch, unlink",
            Self::Checkpoint => "checkpoint",
            Self::FullFor(_) => "full disk",
            Self::Takeover => "takeover",
        }
    }
}

fn run(first: u64, count: u64) -> ChunkRange {
    ChunkRange { first: Chunk(first), count }
}

/// Everything once, in an order in which each step meets what the others left. Other seeds write to other chunks, and
/// have flushes, checkpoints, takeovers and background work at other places.
pub(crate) fn history(seed: u64) -> Vec<Step> {
    use Step::{
        Ask, Attach, Checkpoint, DeleteWhileWriting, Flush, FullFor, Lose, Release, Settle, Takeover, Write,
    };
    let rng = &mut Rng::new(seed);
    let mut some = |chunks: u64| {
        let first = rng.below(chunks - 1);
        run(first, 1 + rng.below((chunks - first).min(4)))
    };
    let create = |volume, (size_bytes, chunk)| {
        let chunk = ChunkSize::from_bytes(chunk).expect("a power of two");
        Ask(Change::Create { volume, size_bytes, chunk })
    };
    let snapshot = |volume, snapshot| Ask(Change::Snapshot { volume, snapshot });
    let delete_snapshot = |volume, snapshot| Ask(Change::DeleteSnapshot { volume, snapshot });
    let delete = |volume| Ask(Change::Delete { volume });
    let rename = |volume, to| Ask(Change::Rename { volume, to });
    let mut steps = vec![
        create("a", SMALL),
        Attach("a"),
        Write(run(0, 5)),
        Flush,
        Write(some(8)),
        snapshot("a", "s1"),
        FullFor(run(1, 2)),
        Write(run(0, 4)),
        Write(some(8)),
        create("b", LARGE),
        snapshot("a", "s2"),
        Write(run(0, 2)),
        rename("a", "c"),
        Ask(Change::RenameSnapshot { volume: "c", snapshot: "s1", to: "s0" }),
        DeleteWhileWriting { volume: "c", snapshot: "s0", chunks: run(2, 3) },
        Settle,
        Checkpoint,
        Write(some(8)),
        Lose,
        snapshot("c", "s3"),
        Takeover,
        Attach("b"),
        Write(some(3)),
        snapshot("b", "x"),
        Write(run(0, 3)),
        Release,
        delete_snapshot("c", "s3"),
        delete_snapshot("b", "x"),
        delete("b"),
        Settle,
        Ask(Change::Adopt { volume: "d", size_bytes: SMALL.0 }),
        snapshot("d", "y"),
        Attach("d"),
        Write(some(8)),
        Release,
        delete_snapshot("c", "s2"),
        delete("c"),
        create("a", LARGE),
        rename("a", "e"),
        delete_snapshot("d", "y"),
        delete("d"),
        delete("e"),
        Settle,
    ];
    if seed > 0 {
        for _ in 0..4 {
            let extra = [Settle, Checkpoint, Takeover][rng.index(3)];
            steps.insert(1 + rng.index(steps.len() - 1), extra);
        }
    }
    steps
}

/// Content of the origin that is adopted: durable before anybody of us sees it, and zeros, as far as the ledger knows.
pub(crate) fn put_origins(disk: &SimDisk) {
    disk.put_file(&origin_path("d"), &vec![0; usize::try_from(SMALL.0).expect("small")]).expect("a new disk");
}

/// The writer, as far as it outlives servers.
struct Writer {
    volume: &'static str,
    number: u8,
    file: SimFile,
}

struct Life {
    disk: SimDisk,
    ledger: Rc<RefCell<Ledger>>,
    broken: Broken,
    term: Term,
    server: Server,
    writer: Option<Writer>,
    writers: u8,
}

/// Lives through the steps, or until the server is gone.
pub(crate) async fn live(
    disk: SimDisk,
    ledger: Rc<RefCell<Ledger>>,
    broken: Broken,
    steps: Vec<Step>,
) -> Result<(), Gone> {
    ledger.borrow_mut().doing = "takeover";
    let term = Term(1);
    let server = Server::begin(&disk.storage(SimNode(term.0)), term, &broken).await?;
    let mut life = Life { disk, ledger, broken, term, server, writer: None, writers: 0 };
    identify(&mut life.server, OPERATOR, 1, Attach::Operator).await?;
    for step in steps {
        life.ledger.borrow_mut().doing = step.kind();
        life.take(step).await?;
    }
    Ok(())
}

impl Life {
    async fn take(&mut self, step: Step) -> Result<(), Gone> {
        match step {
            Step::Ask(change) => {
                let id = self.ask(change);
                self.let_time_pass()?;
                self.done(id).await
            }
            Step::DeleteWhileWriting { volume, snapshot, chunks } => {
                let id = self.ask(Change::DeleteSnapshot { volume, snapshot });
                self.let_time_pass()?;
                let query = self.server.say(WRITER, ToServer::QueryWrite { ranges: vec![chunks] });
                self.done(id).await?;
                self.granted(query, chunks, true).await
            }
            Step::Attach(volume) => self.attach(volume).await,
            Step::Write(chunks) => {
                let query = self.server.say(WRITER, ToServer::QueryWrite { ranges: vec![chunks] });
                self.granted(query, chunks, true).await
            }
            Step::Flush => self.flush().await,
            Step::Release => {
                self.flush().await?;
                self.writer = None;
                self.server.ask(WRITER, ToServer::Release).await.map(drop)
            }
            Step::Lose => {
                self.writer = None;
                self.server.give(Input::Closed { conn: WRITER });
                let writer = InstanceId([self.writers; 16]);
                let id = self.ask(reap(&self.server, writer));
                self.done(id).await
            }
            Step::Settle => self.server.settle().await,
            Step::Checkpoint => {
                let before = self.server.checkpoints;
                self.server.give(Input::CheckpointDue);
                self.server.until(|server| (server.checkpoints > before).then_some(())).await
            }
            Step::FullFor(chunks) => self.full_for(chunks).await,
            Step::Takeover => self.takeover().await,
        }
    }

    /// Asks for a change; nothing is waited for.
    fn ask(&mut self, change: Change) -> RequestId {
        let mut ledger = self.ledger.borrow_mut();
        ledger.ask(change);
        self.server.say(OPERATOR, operate(&ledger))
    }

    /// Ticks, while the disk does nothing: what is in hand is on its way to it.
    fn let_time_pass(&mut self) -> Result<(), Gone> {
        for _ in 0..TICKS_ON_THE_WAY {
            self.server.pass(Duration::from_millis(50));
            self.server.turn()?;
        }
        Ok(())
    }

    /// Waits for the answer, with the writer doing its part.
    async fn done(&mut self, id: RequestId) -> Result<(), Gone> {
        loop {
            let is_advice = |message: &FromServer| matches!(message, FromServer::SnapshotAdvice { .. });
            let next = |server: &mut Server| server.take(|frame| frame.id == id || is_advice(&frame.message));
            let frame = self.server.until(next).await?;
            match frame.message {
                FromServer::SnapshotAdvice { advice } => {
                    self.flush().await?;
                    self.server.reply(WRITER, frame.id, ToServer::SnapshotAdviceOk { advice });
                }
                FromServer::Operated(_) => {
                    let done = self.ledger.borrow_mut().acknowledged();
                    if let (Change::Rename { volume, to }, Some(writer)) = (done, &mut self.writer)
                        && writer.volume == volume
                    {
                        writer.volume = to;
                    }
                    return Ok(());
                }
                other => return Err(Gone::Failed(format!("{:?}: {other:?}", self.ledger.borrow().in_hand))),
            }
        }
    }

    async fn attach(&mut self, volume: &'static str) -> Result<(), Gone> {
        self.writers += 1;
        let number = self.writers;
        identify(&mut self.server, WRITER, number, Attach::Writer(name(volume))).await?;
        let found = self.server.state().volume_by_name(&name(volume)).expect("it is attached").clone();
        let file = open_head(&self.disk.storage(CLIENT), &found, Access::ReadWrite).await?;
        self.writer = Some(Writer { volume, number, file });
        Ok(())
    }

    /// Waits for a grant and overwrites what is granted, all of it or, on a full disk, none.
    async fn granted(&mut self, query: RequestId, chunks: ChunkRange, all: bool) -> Result<(), Gone> {
        let answer = self.server.answer(query).await?;
        let refused = if all { Vec::new() } else { vec![chunks] };
        match answer {
            FromServer::WriteOk { no_space, .. } if no_space == refused => {}
            other => return Err(Gone::Failed(format!("a write to {chunks:?}: {other:?}"))),
        }
        let writer = self.writer.as_ref().expect("a writer asked");
        let storage = self.disk.storage(CLIENT);
        for chunk in chunks.chunks().take(if all { usize::MAX } else { 0 }) {
            let (offset, bytes) = self.ledger.borrow_mut().write(writer.volume, chunk);
            storage.write(&writer.file, offset, bytes.into()).await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Gone> {
        let Some(writer) = &self.writer else { return Ok(()) };
        self.disk.storage(CLIENT).sync(&writer.file).await?;
        self.ledger.borrow_mut().flushed(writer.volume);
        Ok(())
    }

    async fn full_for(&mut self, chunks: ChunkRange) -> Result<(), Gone> {
        const ROOMY: u64 = 1 << 40;
        self.disk.set_capacity(Some(ROOMY));
        let used = ROOMY - self.disk.storage(CLIENT).free_bytes().await?;
        self.disk.set_capacity(Some(used + FULL_BUT));
        let query = self.server.say(WRITER, ToServer::QueryWrite { ranges: vec![chunks] });
        self.granted(query, chunks, false).await?;
        self.disk.set_capacity(None);
        // The server looks again after a while.
        self.server.pass(Duration::from_secs(2));
        Ok(())
    }

    /// The server is killed and another one takes over. The writer comes back to it, with what it has open.
    async fn takeover(&mut self) -> Result<(), Gone> {
        self.disk.crash_node(SimNode(self.term.0));
        self.term = self.term.next();
        self.server =
            Server::begin(&self.disk.storage(SimNode(self.term.0)), self.term, &self.broken).await?;
        identify(&mut self.server, OPERATOR, 1, Attach::Operator).await?;
        if let Some(Writer { volume, number, .. }) = self.writer {
            identify(&mut self.server, WRITER, number, Attach::Writer(name(volume))).await?;
        }
        Ok(())
    }
}

/// The request in hand, as it is sent and sent again.
fn operate(ledger: &Ledger) -> ToServer {
    let change = ledger.in_hand.expect("a request is in hand");
    let sequence = Sequence(ledger.sequence);
    ToServer::Operate { sequence, lowest_unanswered: sequence, request: change.request(ledger.token()) }
}

async fn identify(server: &mut Server, conn: ConnId, who: u8, attach: Attach) -> Result<(), Gone> {
    server.give(Input::Accepted { conn });
    let operator = u8::from(attach == Attach::Operator) << 7;
    let identify = Identify {
        session: SessionId([who | operator; 16]),
        secret: Secret([who; 16]),
        instance: InstanceId([who | operator; 16]),
        node: name("n1"),
        pid: u32::from(who),
        attach,
        cached_epoch: None,
    };
    match server.ask(conn, ToServer::Identify(identify)).await? {
        FromServer::IdentifyOk(_) => Ok(()),
        other => Err(Gone::Failed(format!("identifying: {other:?}"))),
    }
}

/// After a crash: every writer is lost and was seen dead, the operator sends what it has in hand again, and the server
/// works off what deletes left.
pub(crate) async fn recover(server: &mut Server, ledger: &Ledger) -> Result<(), Gone> {
    const AGENT: ConnId = ConnId(3);
    identify(server, AGENT, 2, Attach::Operator).await?;
    let writers: Vec<InstanceId> = server
        .state()
        .sessions()
        .filter(|session| session.attached != Attached::Operator)
        .map(|session| session.instance)
        .collect();
    for instance in writers {
        let request = reap(server, instance).request(ledger.token());
        let sequence = Sequence(instance.0[0].into());
        let lowest_unanswered = sequence;
        operated(server.ask(AGENT, ToServer::Operate { sequence, lowest_unanswered, request }).await?)?;
    }
    send_again(server, ledger).await?;
    server.settle().await
}

/// The operator comes to another server, and asks again for what it has in hand.
pub(crate) async fn send_again(server: &mut Server, ledger: &Ledger) -> Result<(), Gone> {
    identify(server, OPERATOR, 1, Attach::Operator).await?;
    if ledger.in_hand.is_some() {
        operated(server.ask(OPERATOR, operate(ledger)).await?)?;
    }
    Ok(())
}

/// What an agent says of a writer that it saw dead.
fn reap(server: &Server, writer: InstanceId) -> Change {
    let of_writer = server.state().sessions().filter(|session| session.instance == writer);
    let wrote = of_writer.filter_map(|session| match session.attached {
        Attached::Writer(volume) => Some(volume),
        Attached::Snapshot(..) | Attached::Operator => None,
    });
    Change::Reap { writer, wrote: wrote.last() }
}

fn operated(answer: FromServer) -> Result<OperatorReply, Gone> {
    match answer {
        FromServer::Operated(reply) => Ok(reply),
        other => Err(Gone::Failed(format!("sent again, and refused: {other:?}"))),
    }
}
