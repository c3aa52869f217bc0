//! Worlds that are driven by hand: a test attaches, asks, stops and kills exactly what it wants, and the world does the rest.
//! The judge is the same.

use csnap_client::core::{Op, RequestError};
use csnap_proto::message::operate::OperatorRequest;
use csnap_proto::{RequestToken, Target};
use csnap_storage::sim::OperationKind;

use super::World;
use crate::model::Life;
use crate::plan::Plan;
use crate::process::Process;
use crate::process::exporter::{Attach, Attachment, Stage};
use crate::process::operator::Answer;
use crate::sim::{Ask, Event, HostId, ProcId, Spawn};

/// What a test waits for comes within this, microseconds.
const SOON: u64 = 20_000_000;

/// An attachment of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hand {
    /// The process that has it.
    pub exporter: ProcId,
    number: u64,
}

impl World {
    /// A world of a calm plan, with its volumes made.
    ///
    /// # Panics
    /// If it does not begin well.
    #[must_use]
    pub fn calm(seed: u64) -> Self {
        Self::begun(Plan::calm(seed))
    }

    /// As [`Self::calm`], of any plan.
    ///
    /// # Panics
    /// If it does not begin well.
    #[must_use]
    pub fn begun(plan: Plan) -> Self {
        let mut world = Self::new(plan);
        world.start();
        world.make_volumes();
        world.wait("every node has its exporter", |world| {
            (0..world.sim.plan.nodes).all(|node| world.sim.find(HostId(node), "exporter").is_some())
        });
        world
    }

    /// Lets time pass until `done`.
    ///
    /// # Panics
    /// If it does not come soon, or a law is broken.
    pub fn wait(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let came = self.run_until(self.sim.now() + SOON, done);
        assert!(came, "{what}: did not come; {:?}", self.sim.violation);
    }

    /// Lets so much time pass, microseconds.
    ///
    /// # Panics
    /// If a law is broken meanwhile.
    pub fn pass(&mut self, time: u64) {
        self.run_until(self.sim.now() + time, |_| false);
        assert_eq!(self.sim.violation, None);
    }

    /// Attaches a volume or one of its snapshots on a host, without waiting for it.
    ///
    /// # Panics
    /// If the host has no exporter.
    pub fn begin_attach(&mut self, host: usize, volume: usize, snapshot: Option<RequestToken>) -> Hand {
        let exporter = self.sim.find(HostId(host), "exporter").expect("the host has an exporter");
        let model = &self.sim.model.volumes[volume];
        let name = snapshot.map(|token| model.snapshots[&token].name.clone());
        let target = Target { volume: model.name.clone(), snapshot: name };
        let number = self.next_attachment();
        self.sim.tell(0, exporter, Event::Ask(Ask::Attach(Attach { number, volume, target, snapshot })));
        Hand { exporter, number }
    }

    /// As [`Self::begin_attach`], and waits until it is there.
    ///
    /// # Panics
    /// If it does not come.
    pub fn attach(&mut self, host: usize, volume: usize, snapshot: Option<RequestToken>) -> Hand {
        let hand = self.begin_attach(host, volume, snapshot);
        self.wait("it is attached", |world| world.stage(hand) == Some(Stage::Open));
        hand
    }

    /// An attachment of a test.
    #[must_use]
    pub fn held(&self, hand: Hand) -> Option<&Attachment> {
        self.attachment(hand.exporter, hand.number)
    }

    /// How far an attachment is.
    #[must_use]
    pub fn stage(&self, hand: Hand) -> Option<Stage> {
        self.held(hand).map(|attachment| attachment.stage)
    }

    /// Why an attachment failed.
    #[must_use]
    pub fn error(&self, hand: Hand) -> Option<RequestError> {
        self.held(hand)?.error.clone()
    }

    /// A message that it sent or got, how often.
    #[must_use]
    pub fn messages(&self, hand: Hand, name: &str) -> u64 {
        self.held(hand).and_then(|attachment| attachment.messages().get(name).copied()).unwrap_or(0)
    }

    /// Asks for I/O without waiting for it.
    pub fn begin_io(&mut self, hand: Hand, op: Op, offset: u64, len: u64) {
        let ask = Ask::Io { attachment: hand.number, op, offset, len, fast: false };
        self.sim.tell(0, hand.exporter, Event::Ask(ask));
    }

    /// As [`Self::begin_io`], and waits for it. What is read is judged by the model.
    ///
    /// # Panics
    /// If it does not come, or a law is broken.
    pub fn io(&mut self, hand: Hand, op: Op, offset: u64, len: u64) {
        let before = self.sim.tally.count("requests");
        self.begin_io(hand, op, offset, len);
        self.wait("an I/O returns", |world| {
            world.sim.tally.count("requests") > before && world.held(hand).is_some_and(|a| a.depth() == 0)
        });
    }

    /// Makes a snapshot.
    ///
    /// # Panics
    /// If it is not made.
    pub fn snapshot(&mut self, volume: usize) -> RequestToken {
        let token = self.create_snapshot(volume);
        self.wait("the snapshot is made", |world| {
            world.sim.model.volumes[volume].snapshots[&token].life == Life::Live
        });
        token
    }

    /// Asks the server something as an operator.
    ///
    /// # Panics
    /// If there is no answer.
    pub fn ask(&mut self, host: usize, request: OperatorRequest) -> Answer {
        let proc = self.sim.spawn(HostId(host), Spawn::Operator);
        self.sim.tell(20_000, proc, Event::Ask(Ask::Operate(Box::new(request))));
        self.settle();
        let answers = |world: &Self| match world.process(proc) {
            Some(Process::Operator(operator)) => operator.answers.clone(),
            _ => Vec::new(),
        };
        self.wait("an operator is answered", |world| !answers(world).is_empty());
        let answer = answers(self).remove(0).1;
        self.kill(proc, false);
        self.settle();
        answer
    }

    /// SIGKILL.
    pub fn kill_now(&mut self, proc: ProcId) {
        self.kill(proc, false);
        self.settle();
    }

    /// SIGCONT.
    pub fn thaw_now(&mut self, proc: ProcId) {
        self.thaw(proc);
        self.settle();
    }

    /// SIGSTOP at the next operation of the pool that this process asks for, of this kind on a path that begins so.
    pub fn stop_at(&mut self, proc: ProcId, kind: OperationKind, path: &'static str) {
        self.stop_at = Some((proc, kind, path));
    }

    /// The server that the last trap sprung on.
    #[must_use]
    pub fn trapped(&self) -> Option<ProcId> {
        self.trapped
    }

    /// Everything is looked at, down to the medium; see [`World::run`].
    ///
    /// # Panics
    /// If a law is broken.
    pub fn finish(mut self) -> super::Outcome {
        self.end_all();
        assert_eq!(self.sim.violation, None);
        self.outcome()
    }
}
