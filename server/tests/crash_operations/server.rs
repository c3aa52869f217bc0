//! One server process on the simulated disk: the shipped terms, core and workbench, with a loop in place of the shell.
//!
//! Whatever it waits for is an operation of the disk, or time; time passes when nothing else is under way.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use csnap_proto::message::volume::{FromServer, ToServer};
use csnap_proto::{Frame, Name, RequestId, Term, Time, WallMillis};
use csnap_server::core::{self, Config, ConnId, Input, Output, ServerCore};
use csnap_server::replay::StateReplay;
use csnap_server::state::State;
use csnap_server::term::canary::Canaries;
use csnap_server::term::{Fatal, Follower, Prepared, TermError, open_pool, take_over};
use csnap_server::work::{Done, Workbench};
use csnap_storage::StorageError;
use csnap_storage::sim::{SimFile, SimStorage};

/// Time that passes at once when nothing is under way: the core's own tick.
const TICK: Duration = Duration::from_millis(50);

/// Ticks in a row after which what is waited for will not come.
const TICKS_MAX: u32 = 1000;

/// The rules that a server breaks: none, but where a test is tested.
#[derive(Clone, Debug, Default)]
pub(crate) struct Broken {
    pub(crate) core: core::canary::Broken,
    pub(crate) term: Canaries,
}

/// Why a server is no more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Gone {
    #[error("its gate is closed")]
    Deposed,
    /// On a sound disk, with nobody to take over, nothing else may happen.
    #[error("{0}")]
    Failed(String),
}

impl From<StorageError> for Gone {
    fn from(error: StorageError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<Fatal> for Gone {
    fn from(fatal: Fatal) -> Self {
        if let Fatal::Deposed(_) = fatal { Self::Deposed } else { Self::Failed(fatal.to_string()) }
    }
}

impl From<TermError> for Gone {
    fn from(error: TermError) -> Self {
        if let TermError::Deposed(_) = error { Self::Deposed } else { Self::Failed(error.to_string()) }
    }
}

enum Ended {
    Carried(Option<Done>),
    Checkpointed,
    FoundDead(Vec<Term>),
    Kept,
}

type Running = Pin<Box<dyn Future<Output = Result<Ended, Gone>>>>;

pub(crate) struct Server {
    core: ServerCore,
    bench: Workbench<SimStorage>,
    now: Time,
    inbox: VecDeque<Input>,
    running: Vec<Running>,
    /// Keeps the next segment ready; waits for the journal most of the time.
    keeper: Option<Running>,
    /// Whoever connects reads what is his and takes it out.
    pub(crate) sent: Vec<(ConnId, Frame<FromServer>)>,
    requests: u64,
    pub(crate) checkpoints: u64,
    /// Digest of the state that it took over.
    pub(crate) base: [u8; 32],
    _life: SimFile,
}

impl Server {
    /// Takes over, as every server begins.
    pub(crate) async fn begin(storage: &SimStorage, term: Term, broken: &Broken) -> Result<Self, Gone> {
        let mut pool = open_pool(storage).await.map_err(|error| Gone::Failed(error.to_string()))?;
        pool.canaries = broken.term.clone();
        let follower = Follower::new(&pool, StateReplay::new(pool.id()));
        let taken = take_over(&pool, term, follower, || Time(0)).await?;
        let bench = Workbench::new(&pool, taken.journal).breaking(broken.core);
        let life = bench.show_life().await?.expect("a new term's gate is nobody else's");
        let base = taken.replay.state().digest();
        let node = Name::new("n1").expect("a good name");
        // Small slices, so that crashes come in between.
        let config = Config { reap_slice_versions: 2, broken: broken.core, ..Config::of(node) };
        let core = ServerCore::new(term, config, taken.replay.into_state(), Time(0), WallMillis(0));
        let mut server = Self {
            core,
            bench,
            now: Time(0),
            inbox: VecDeque::new(),
            running: Vec::new(),
            keeper: None,
            sent: Vec::new(),
            requests: 0,
            checkpoints: 0,
            base,
            _life: life,
        };
        server.look_for_the_dead();
        Ok(server)
    }

    pub(crate) fn state(&self) -> &State {
        self.core.state()
    }

    pub(crate) fn give(&mut self, input: Input) {
        self.inbox.push_back(input);
    }

    /// Sends a request; its id.
    pub(crate) fn say(&mut self, conn: ConnId, message: ToServer) -> RequestId {
        self.requests += 1;
        let id = RequestId(self.requests);
        self.give(Input::Frame { conn, frame: Frame { id, term: Term(0), message } });
        id
    }

    /// Answers a message that the server began with.
    pub(crate) fn reply(&mut self, conn: ConnId, id: RequestId, message: ToServer) {
        self.give(Input::Frame { conn, frame: Frame { id, term: Term(0), message } });
    }

    /// Sends a request and waits for its answer.
    pub(crate) async fn ask(&mut self, conn: ConnId, message: ToServer) -> Result<FromServer, Gone> {
        let id = self.say(conn, message);
        self.answer(id).await
    }

    pub(crate) async fn answer(&mut self, id: RequestId) -> Result<FromServer, Gone> {
        self.until(|server| server.take(|frame| frame.id == id)).await.map(|frame| frame.message)
    }

    /// Takes out the first frame of a kind that was sent.
    pub(crate) fn take(&mut self, wanted: impl Fn(&Frame<FromServer>) -> bool) -> Option<Frame<FromServer>> {
        let index = self.sent.iter().position(|(_, frame)| wanted(frame))?;
        Some(self.sent.remove(index).1)
    }

    /// Goes on until `look` finds something.
    pub(crate) async fn until<T>(&mut self, mut look: impl FnMut(&mut Self) -> Option<T>) -> Result<T, Gone> {
        let mut ticks = 0;
        loop {
            self.turn()?;
            if let Some(found) = look(self) {
                return Ok(found);
            }
            if self.inbox.is_empty() && self.running.is_empty() {
                ticks += 1;
                if ticks > TICKS_MAX {
                    return Err(Gone::Failed("what is waited for does not come".to_owned()));
                }
                self.pass(TICK);
                continue;
            }
            ticks = 0;
            let ended = self.next_ended().await?;
            self.digest(ended);
        }
    }

    /// Goes on until nothing is left to do in the background.
    pub(crate) async fn settle(&mut self) -> Result<(), Gone> {
        self.pass(TICK);
        self.until(|server| server.is_settled().then_some(())).await
    }

    /// Goes on until nothing is under way.
    pub(crate) async fn rest(&mut self) -> Result<(), Gone> {
        let is_at_rest = |server: &mut Self| server.inbox.is_empty() && server.running.is_empty();
        self.until(|server| is_at_rest(server).then_some(())).await
    }

    fn is_settled(&self) -> bool {
        let state = self.state();
        self.inbox.is_empty()
            && self.running.is_empty()
            && state.next_reap(1).is_none()
            && state.confirmed_batches().next().is_none()
            && state.removable_heads().next().is_none()
            && state.older_terms().next().is_none()
            && state.clone().next_punch(1).is_none()
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        self.now = self.now.after(time);
        self.give(Input::Tick);
    }

    /// Takes what is at hand, and carries out what comes of it.
    pub(crate) fn turn(&mut self) -> Result<(), Gone> {
        let mut out = Vec::new();
        while let Some(input) = self.inbox.pop_front() {
            self.core.step(self.now, WallMillis(0), input, &mut out);
        }
        self.core.end_turn(&mut out);
        if self.keeper.is_none() {
            self.keeper = Some(self.keep());
        }
        for output in out {
            match output {
                Output::Send { conn, frame } => self.sent.push((conn, frame)),
                Output::Close { .. } => {}
                Output::Exit { .. } => return Err(Gone::Deposed),
                output => {
                    let bench = self.bench.clone();
                    self.run(async move { Ok(Ended::Carried(bench.carry_out(output).await?)) });
                }
            }
        }
        Ok(())
    }

    fn run(&mut self, procedure: impl Future<Output = Result<Ended, Gone>> + 'static) {
        self.running.push(Box::pin(procedure));
    }

    fn look_for_the_dead(&mut self) {
        let (bench, terms) = (self.bench.clone(), self.state().older_terms().collect());
        self.run(async move { Ok(Ended::FoundDead(bench.find_dead(terms).await?)) });
    }

    fn keep(&self) -> Running {
        let journal = self.bench.journal().clone();
        Box::pin(async move {
            if journal.prepare_segment().await? == Prepared::NoSpace {
                return Ok(Ended::Kept);
            }
            journal.set_aside().await?;
            journal.segment_taken().await;
            Ok(Ended::Kept)
        })
    }

    /// The next procedure that comes to its end, the oldest first.
    async fn next_ended(&mut self) -> Result<Ended, Gone> {
        let Self { running, keeper, .. } = self;
        poll_fn(|context| {
            // Twice: an append may wait for what the keeper does in this same round.
            for _ in 0..2 {
                if let Some(Poll::Ready(ended)) = keeper.as_mut().map(|keeper| keeper.as_mut().poll(context))
                {
                    *keeper = None;
                    return Poll::Ready(ended);
                }
                for index in 0..running.len() {
                    if let Poll::Ready(ended) = running[index].as_mut().poll(context) {
                        drop(running.remove(index));
                        return Poll::Ready(ended);
                    }
                }
            }
            Poll::Pending
        })
        .await
    }

    fn digest(&mut self, ended: Ended) {
        match ended {
            Ended::Carried(Some(Done { input, checkpoint })) => {
                if let Some((position, state)) = checkpoint {
                    let bench = self.bench.clone();
                    self.run(async move {
                        bench.checkpoint(position, &state).await?;
                        Ok(Ended::Checkpointed)
                    });
                }
                self.give(input);
            }
            Ended::Checkpointed => self.checkpoints += 1,
            Ended::FoundDead(terms) => self.give(Input::TermsDead { terms }),
            Ended::Carried(None) | Ended::Kept => {}
        }
    }
}
