//! A lockd with its replica: what the daemon and the simulated world run. Pure.
//!
//! The lock table's commands are what the replica commits. Between "established" and "deposed" this lockd leads:
//! it appends by proposing, and its own commands come out in the order in which it proposed them, none left out. Before
//! and after, it follows and applies what another one proposed.
//!
//! What it is not: the disk or the network. Its outputs are carried out in order; writes are told when durable.
//!
//! `contact`: how replicas know each other; `operator`: what operators ask of the group; `view`: how the group is shown.

mod contact;
mod operator;
mod view;

// An address is a value; nothing is opened here.
use ::core::net::SocketAddr;
use std::collections::VecDeque;

use bytes::Bytes;
use csnap_proto::message::lock::{FromLockd, GroupReply, GroupRequest, KeyOp, LockOp, ToLockd};
use csnap_proto::{Caller, Frame, Name, Term, Time};

use self::contact::Reached;
pub use self::contact::{Contact, Presence};
use self::operator::{Begun, Desk, Next, Operator, Situation};

use crate::canary::{self, Canary};
use crate::core::canary as table_canary;
use crate::core::permission::Denied;
use crate::core::spaces::mover::{self, CallId, Lost, Mover};
use crate::core::spaces::{Command, Spaces};
use crate::core::{self, ConnectionId, Leader, Lockd, Overslept};
use crate::replica::{self, Change, Members, PeerMessage, Replica, ReplicaConfig, ReplicaId, Saved, Write};

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// Time passed.
    Tick,
    /// A client's connection was accepted, and the client proved to be this one.
    Opened(ConnectionId, Caller),
    /// It broke, or the client closed it.
    Closed(ConnectionId),
    /// A frame of a client came.
    Received(ConnectionId, Frame<ToLockd>),
    /// Another replica said something.
    Peer(PeerMessage),
    /// Another replica is reached, and says this of itself.
    Reached(ReplicaId, Presence),
    /// Another replica is not reached; what was said to it is lost.
    Unreachable(ReplicaId),
    /// Every write up to this number is durable.
    Durable {
        /// The greatest one.
        number: u64,
    },
    /// The log wants a new base before its next write.
    WantsBase,
    /// Make another voter the leader.
    Transfer(ReplicaId),
    /// Change the group.
    Change(Change),
    /// A connection to another group is there.
    Called(CallId),
    /// It could not be made, or broke.
    Lost(CallId, Lost),
    /// The other group said something.
    Heard(CallId, Frame<FromLockd>),
}

/// What is to be done, in order.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// To the disk, after all earlier ones; told by [`Input::Durable`].
    Write(Write),
    /// To another replica. It may be lost.
    Peer(PeerMessage),
    /// To a client.
    Send(ConnectionId, Frame<FromLockd>),
    /// Close a client's connection after what was sent to it; why, unless nothing is wrong.
    Close(ConnectionId, Option<String>),
    /// A client asked for what it may not. For the log.
    Denied(ConnectionId, Denied),
    /// This lockd leads from now on, in this term.
    Leads {
        /// It.
        term: u64,
    },
    /// It leads no more.
    Follows,
    /// The group is another.
    Members(Members),
    /// A transfer or change was not begun.
    Refused(&'static str),
    /// Leases began anew because this lockd came late to them: who should have lost his has it longer. For the log.
    Overslept(Overslept),
    /// Connect to a lockd of another group.
    Call(CallId, SocketAddr),
    /// To another group.
    Say(CallId, Frame<ToLockd>),
    /// Drop a connection to another group, or stop trying to make it.
    HangUp(CallId),
}

/// A committed command, or another replica's state, that this version does not understand: it must not go on, since its
/// table would be another one than the others'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the log has {0}: this lockd is older than the one that wrote it, start a newer one")]
pub struct Unknown(&'static str);

/// One thing to do next.
enum Work {
    Core(core::Input),
    Replica(replica::Input),
    /// What the replica put off.
    Settle,
    Mover(mover::Input),
}

/// See the module.
pub struct Replicated {
    lockd: Lockd,
    replica: Replica,
    own: Presence,
    reached: Reached,
    desk: Desk,
    /// The group changed: what a replica without entries is sent must name it, or it would not take it.
    wants_image: bool,
    /// The replica was told something and has not settled it.
    unsettled: bool,
    mover: Mover,
    /// Rules that it breaks: none, outside tests.
    broken: (canary::Broken, table_canary::Broken),
    /// Commands that took effect before the log had them; see [`Canary::AnswerWhenGathered`].
    answered_early: usize,
}

impl Replicated {
    /// Goes on from what the disk gave. It follows until a step says otherwise.
    ///
    /// # Errors
    /// If the lockspaces are none of this version.
    pub fn new(
        now: Time,
        config: ReplicaConfig,
        node: Name,
        pid: u32,
        saved: Saved,
    ) -> Result<Self, Unknown> {
        let spaces = decode_spaces(&saved.base.image.state)?;
        let own = Presence { node: node.clone(), pid, peer: None, clients: Vec::new() };
        let lockd = Lockd::following(node, pid, spaces);
        let (reached, desk) = (Reached::default(), Desk::default());
        let broken = (config.broken, table_canary::Broken::NONE);
        let replica = Replica::new(now, config, saved);
        Ok(Self {
            lockd,
            replica,
            own,
            reached,
            desk,
            wants_image: false,
            unsettled: false,
            mover: Mover::default(),
            broken,
            answered_early: 0,
        })
    }

    /// The same, with a table that breaks a rule: for tests of the tests. Without the cargo feature `canary` there is none.
    #[must_use]
    pub fn breaking(mut self, rule: table_canary::Broken) -> Self {
        self.broken.1 = rule;
        self.lockd.break_rule(rule);
        self
    }

    /// What a new group begins with.
    #[must_use]
    pub fn first_state() -> Vec<u8> {
        encode_spaces(&Spaces::default())
    }

    /// Breaks a rule of lockspaces.
    #[cfg(feature = "canary")]
    #[must_use]
    pub fn breaking_lockspaces(self, rule: core::spaces::canary::Canary) -> Self {
        Self { lockd: self.lockd.breaking(rule), mover: Mover::breaking(rule), ..self }
    }

    /// One thing happened, and nothing that belongs together with it: it is taken in and settled. Outputs are to be carried
    /// out in order.
    ///
    /// # Errors
    /// The process must end, and may be started again with another version.
    pub fn step(&mut self, now: Time, input: Input, out: &mut Vec<Output>) -> Result<(), Unknown> {
        self.take_in(now, input, out)?;
        self.settle(now, out)
    }

    /// The first half of [`Self::step`]: any number of inputs, before they are settled together. What clients ask for among
    /// them becomes one write, and one message to each other replica. Outputs are to be carried out in order.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn take_in(&mut self, now: Time, input: Input, out: &mut Vec<Output>) -> Result<(), Unknown> {
        let first = match input {
            Input::Tick => {
                // Both have deadlines.
                self.run(now, Work::Core(core::Input::Tick), out)?;
                Work::Replica(replica::Input::Tick)
            }
            Input::Opened(id, caller) => Work::Core(core::Input::Opened(id, caller)),
            Input::Closed(id) => {
                self.desk.forget(id);
                Work::Core(core::Input::Closed(id))
            }
            Input::Received(id, Frame { id: request, message: ToLockd::Group(asked), .. }) => {
                return self.on_operator(now, Operator { connection: id, request }, asked, out);
            }
            Input::Received(id, frame) => {
                self.read_early(id, &frame, out);
                Work::Core(core::Input::Received(id, frame))
            }
            Input::Peer(message) => Work::Replica(replica::Input::Received(message)),
            Input::Reached(id, presence) => {
                self.reached.reached(id, presence);
                return self.tell_leader(now, id, out);
            }
            Input::Unreachable(id) => {
                self.reached.lost(id, self.replica.members());
                self.tell_leader(now, id, out)?;
                Work::Replica(replica::Input::Unreachable(id))
            }
            Input::Durable { number } => Work::Replica(replica::Input::Durable { number }),
            Input::WantsBase => {
                let state = encode_spaces(self.lockd.spaces()).into();
                Work::Replica(replica::Input::Compact { state })
            }
            Input::Transfer(to) => Work::Replica(replica::Input::Transfer(to)),
            Input::Change(change) => Work::Replica(replica::Input::Change(change)),
            Input::Called(call) => Work::Mover(mover::Input::Reached(call)),
            Input::Lost(call, lost) => Work::Mover(mover::Input::Lost(call, lost)),
            Input::Heard(call, frame) => Work::Mover(mover::Input::Heard(call, frame)),
        };
        self.run(now, first, out)?;
        // Whatever happened may have changed a lockspace that moves.
        self.run(now, Work::Mover(mover::Input::Tick), out)?;
        self.serve_operator(now, out)
    }

    /// What one thing leads to, and a new image if it changed the group: now that all that came out is applied.
    fn run(&mut self, now: Time, first: Work, out: &mut Vec<Output>) -> Result<(), Unknown> {
        self.run_all(now, first, out)?;
        while std::mem::take(&mut self.wants_image) {
            let state = encode_spaces(self.lockd.spaces()).into();
            self.run_all(now, Work::Replica(replica::Input::Compact { state }), out)?;
        }
        Ok(())
    }

    /// Where clients and other replicas find this lockd: they are told.
    pub fn set_addresses(&mut self, clients: Vec<SocketAddr>, peer: Option<SocketAddr>) {
        (self.own.clients, self.own.peer) = (clients, peer);
    }

    /// What it says of itself to other replicas.
    #[must_use]
    pub fn presence(&self) -> &Presence {
        &self.own
    }

    /// The second half: what replicas write and say because of it, and whatever follows from that. Outputs are to be carried
    /// out in order.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn settle(&mut self, now: Time, out: &mut Vec<Output>) -> Result<(), Unknown> {
        loop {
            self.run(now, Work::Settle, out)?;
            // What came of it may have changed a lockspace that moves, or be what an operator waits for.
            self.run(now, Work::Mover(mover::Input::Tick), out)?;
            self.serve_operator(now, out)?;
            if !self.unsettled {
                return Ok(());
            }
        }
    }

    /// When to step again at the latest, if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        let deadlines = [
            self.lockd.next_deadline(),
            self.replica.next_deadline(),
            self.desk.next_deadline(),
            self.mover.next_deadline(),
        ];
        deadlines.into_iter().flatten().min()
    }

    /// The lock manager.
    #[must_use]
    pub fn lockd(&self) -> &Lockd {
        &self.lockd
    }

    /// The replica.
    #[must_use]
    pub fn replica(&self) -> &Replica {
        &self.replica
    }

    /// See [`Canary::ReadWithoutTheLog`].
    fn read_early(&self, id: ConnectionId, frame: &Frame<ToLockd>, out: &mut Vec<Output>) {
        if let ToLockd::Operate { sequence, op: op @ LockOp::Key(KeyOp::Get { .. }), .. } = &frame.message
            && self.broken.0.breaks(Canary::ReadWithoutTheLog)
        {
            let message = FromLockd::Answer { sequence: *sequence, reply: self.lockd.table().look(op) };
            out.push(Output::Send(id, Frame { id: frame.id, term: frame.term, message }));
        }
    }

    /// See [`Canary::AnswerWhenGathered`].
    fn answer_early(&mut self) -> Option<core::Input> {
        if !self.broken.0.breaks(Canary::AnswerWhenGathered) {
            return None;
        }
        self.answered_early += 1;
        Some(core::Input::Durable { count: 1 })
    }

    /// What one thing leads to, until nothing is left.
    fn run_all(&mut self, now: Time, first: Work, out: &mut Vec<Output>) -> Result<(), Unknown> {
        let mut work = VecDeque::from([first]);
        while let Some(next) = work.pop_front() {
            match next {
                Work::Mover(input) => {
                    let mut outputs = Vec::new();
                    self.mover.step(now, input, self.lockd.spaces(), self.lockd.leads(), &mut outputs);
                    for output in outputs {
                        match output {
                            mover::Output::Call(call, address) => out.push(Output::Call(call, address)),
                            mover::Output::Say(call, frame) => out.push(Output::Say(call, frame)),
                            mover::Output::HangUp(call) => out.push(Output::HangUp(call)),
                            mover::Output::Decide(command) => {
                                work.push_back(Work::Core(core::Input::Decide(command)));
                            }
                        }
                    }
                }
                Work::Core(input) => {
                    let mut outputs = Vec::new();
                    self.lockd.step(now, input, &mut outputs);
                    for output in outputs {
                        match output {
                            core::Output::Append(command) => {
                                work.push_back(Work::Replica(replica::Input::Propose(command)));
                                work.extend(self.answer_early().map(Work::Core));
                            }
                            core::Output::Send(id, frame) => out.push(Output::Send(id, frame)),
                            core::Output::Close(id, why) => out.push(Output::Close(id, why)),
                            core::Output::Denied(id, denied) => out.push(Output::Denied(id, denied)),
                            core::Output::Overslept(overslept) => out.push(Output::Overslept(overslept)),
                        }
                    }
                }
                replica @ (Work::Replica(_) | Work::Settle) => {
                    let mut outputs = Vec::new();
                    self.unsettled = matches!(replica, Work::Replica(_));
                    match replica {
                        Work::Replica(input) => self.replica.take_in(now, input, &mut outputs),
                        _ => self.replica.settle(&mut outputs),
                    }
                    for output in outputs {
                        self.on_replica(output, &mut work, out)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn on_replica(
        &mut self,
        output: replica::Output,
        work: &mut VecDeque<Work>,
        out: &mut Vec<Output>,
    ) -> Result<(), Unknown> {
        let input = match output {
            replica::Output::Write(write) => return push(out, Output::Write(write)),
            replica::Output::Send(message) => return push(out, Output::Peer(message)),
            replica::Output::Members(members) => {
                self.wants_image = true;
                return push(out, Output::Members(members));
            }
            replica::Output::Refused(why) => return push(out, Output::Refused(why)),
            replica::Output::Committed { own: true, .. } if self.answered_early > 0 => {
                self.answered_early -= 1;
                return Ok(());
            }
            replica::Output::Committed { own: true, .. } => core::Input::Durable { count: 1 },
            replica::Output::Committed { command, .. } => core::Input::Foreign(decode_command(&command)?),
            replica::Output::Install(image) => {
                // It names the group as it is there.
                self.wants_image = false;
                let mut spaces = decode_spaces(&image.state)?;
                spaces.break_tables(self.broken.1);
                core::Input::Installed(Box::new(spaces))
            }
            replica::Output::Established { term } => {
                out.push(Output::Leads { term });
                // Those who waited for a leader ask it anew, and find it leading.
                let (name, clients) = (self.own.node.to_string(), self.own.clients.clone());
                let leader = Some(Leader { name, clients });
                work.push_back(Work::Core(core::Input::Follows { leader }));
                core::Input::Leads
            }
            replica::Output::Deposed => {
                self.answered_early = 0;
                out.push(Output::Follows);
                core::Input::Follows { leader: self.leader() }
            }
            replica::Output::Leader { .. } if self.replica.is_established() => return Ok(()),
            replica::Output::Leader { .. } => core::Input::Follows { leader: self.leader() },
        };
        work.push_back(Work::Core(input));
        Ok(())
    }

    /// Who else leads, as far as clients can be told. One that is not reached is as good as none: it is gone, or will be
    /// replaced. Neither is this replica itself before it has everything.
    fn leader(&self) -> Option<Leader> {
        let leader = self.replica.leader().filter(|leader| *leader != self.replica.id())?;
        let member = self.replica.members().get(&leader)?;
        if self.reached.is_lost(leader) {
            return None;
        }
        Some(match self.reached.presence(leader) {
            Some(Presence { node, clients, .. }) => {
                Leader { name: node.to_string(), clients: clients.clone() }
            }
            None => Leader { name: member.address.clone(), clients: Vec::new() },
        })
    }

    /// The leader is reached, or no more: that changes what clients are told.
    fn tell_leader(&mut self, now: Time, about: ReplicaId, out: &mut Vec<Output>) -> Result<(), Unknown> {
        if !self.replica.is_established() && self.replica.leader() == Some(about) {
            let leader = self.leader();
            self.run(now, Work::Core(core::Input::Follows { leader }), out)?;
        }
        self.serve_operator(now, out)
    }

    fn on_operator(
        &mut self,
        now: Time,
        by: Operator,
        request: GroupRequest,
        out: &mut Vec<Output>,
    ) -> Result<(), Unknown> {
        if let Some(denied) = self.lockd.denied(by.connection, &ToLockd::Group(request.clone())) {
            let reason = denied.to_string();
            out.push(Output::Denied(by.connection, denied));
            answer(by, FromLockd::Group(GroupReply::Refused { reason }), out);
            return Ok(());
        }
        if request == GroupRequest::Show {
            answer(by, FromLockd::Group(GroupReply::Group(self.view())), out);
            return Ok(());
        }
        match self.desk.ask(now, by, request) {
            Some(reply) => answer(by, FromLockd::Group(reply), out),
            None => {
                let waits = core::Input::Waits { connection: by.connection, waits: true };
                self.run(now, Work::Core(waits), out)?;
            }
        }
        self.serve_operator(now, out)
    }

    /// Does what the operator's request needs next.
    fn serve_operator(&mut self, now: Time, out: &mut Vec<Output>) -> Result<(), Unknown> {
        loop {
            let (replica, own, reached) = (&self.replica, &self.own, &self.reached);
            let situation = Situation { now, replica, own, reached };
            let Some(next) = self.desk.pursue(&situation) else { return Ok(()) };
            let next = match next {
                Next::Begin(begun) => match self.begin(now, begun, out)? {
                    Some(why) => self.desk.on_refused(why),
                    None => None,
                },
                next => Some(next),
            };
            let (by, message) = match next {
                Some(Next::Answer(by, reply)) => (by, FromLockd::Group(reply)),
                Some(Next::NotLeader(by)) => {
                    let leader = self.leader().map(|leader| leader.clients).unwrap_or_default();
                    (by, FromLockd::NotLeader { leader })
                }
                Some(Next::Begin(_)) | None => continue,
            };
            answer(by, message, out);
            let waits = core::Input::Waits { connection: by.connection, waits: false };
            self.run(now, Work::Core(waits), out)?;
        }
    }

    /// Why it was not begun, if so.
    fn begin(
        &mut self,
        now: Time,
        begun: Begun,
        out: &mut Vec<Output>,
    ) -> Result<Option<&'static str>, Unknown> {
        let input = match begun {
            Begun::Transfer(to) => replica::Input::Transfer(to),
            Begun::Change(change) => replica::Input::Change(change),
        };
        let before = out.len();
        self.run(now, Work::Replica(input), out)?;
        let refused = |output: &Output| matches!(output, Output::Refused(_));
        let at = out.iter().skip(before).position(refused).map(|at| before + at);
        Ok(at.and_then(|at| if let Output::Refused(why) = out.remove(at) { Some(why) } else { None }))
    }
}

fn answer(to: Operator, message: FromLockd, out: &mut Vec<Output>) {
    out.push(Output::Send(to.connection, Frame { id: to.request, term: Term(0), message }));
}

fn push(out: &mut Vec<Output>, output: Output) -> Result<(), Unknown> {
    out.push(output);
    Ok(())
}

fn encode_spaces(spaces: &Spaces) -> Vec<u8> {
    postcard::to_stdvec(spaces).expect("writing to memory does not fail")
}

/// A replica without a group has no state yet.
fn decode_spaces(state: &[u8]) -> Result<Spaces, Unknown> {
    if state.is_empty() {
        return Ok(Spaces::default());
    }
    let spaces: Spaces = postcard::from_bytes(state).map_err(|_| Unknown("lockspaces that do not decode"))?;
    spaces.check().map_err(Unknown)?;
    Ok(spaces)
}

fn decode_command(command: &Bytes) -> Result<Command, Unknown> {
    postcard::from_bytes(command).map_err(|_| Unknown("a command that does not decode"))
}
