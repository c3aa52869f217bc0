//! A lockd with its replica: what the daemon and the simulated world run. Pure.
//!
//! The lock table's commands are what the replica commits. Between "established" and "deposed" this lockd leads:
//! it appends by proposing, and its own commands come out in the order in which it proposed them, none left out. Before
//! and after, it follows and applies what another one proposed.
//!
//! What it is not: the disk or the network. Its outputs are carried out in order; writes are told when durable.

use std::collections::VecDeque;

use bytes::Bytes;
use csnap_proto::message::lock::{FromLockd, ToLockd};
use csnap_proto::{Frame, Name, Time};

use crate::core::table::{Command, Table};
use crate::core::{self, ConnectionId, Lockd};
use crate::replica::{self, Change, Members, PeerMessage, Replica, ReplicaConfig, ReplicaId, Saved, Write};

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// Time passed.
    Tick,
    /// A client's connection was accepted.
    Opened(ConnectionId),
    /// It broke, or the client closed it.
    Closed(ConnectionId),
    /// A frame of a client came.
    Received(ConnectionId, Frame<ToLockd>),
    /// Another replica said something.
    Peer(PeerMessage),
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
}

/// A committed command, or another replica's table, that this version does not understand: it must not go on, since its
/// table would be another one than the others'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the log has {0}: this lockd is older than the one that wrote it, start a newer one")]
pub struct Unknown(&'static str);

/// One thing to do next.
enum Work {
    Core(core::Input),
    Replica(replica::Input),
}

/// See the module.
pub struct Replicated {
    lockd: Lockd,
    replica: Replica,
}

impl Replicated {
    /// Goes on from what the disk gave. It follows until a step says otherwise.
    ///
    /// # Errors
    /// If the table is none of this version.
    pub fn new(
        now: Time,
        config: ReplicaConfig,
        node: Name,
        pid: u32,
        saved: Saved,
    ) -> Result<Self, Unknown> {
        let table = decode_table(&saved.base.image.state)?;
        let lockd = Lockd::following(node, pid, table);
        Ok(Self { lockd, replica: Replica::new(now, config, saved) })
    }

    /// What a new group begins with.
    #[must_use]
    pub fn first_state() -> Vec<u8> {
        encode_table(&Table::default())
    }

    /// Takes in what happened. Outputs are to be carried out in order.
    ///
    /// # Errors
    /// The process must end, and may be started again with another version.
    pub fn step(&mut self, now: Time, input: Input, out: &mut Vec<Output>) -> Result<(), Unknown> {
        let first = match input {
            Input::Tick => {
                // Both have deadlines.
                self.run(now, Work::Core(core::Input::Tick), out)?;
                Work::Replica(replica::Input::Tick)
            }
            Input::Opened(id) => Work::Core(core::Input::Opened(id)),
            Input::Closed(id) => Work::Core(core::Input::Closed(id)),
            Input::Received(id, frame) => Work::Core(core::Input::Received(id, frame)),
            Input::Peer(message) => Work::Replica(replica::Input::Received(message)),
            Input::Unreachable(id) => Work::Replica(replica::Input::Unreachable(id)),
            Input::Durable { number } => Work::Replica(replica::Input::Durable { number }),
            Input::WantsBase => {
                let state = encode_table(self.lockd.table()).into();
                Work::Replica(replica::Input::Compact { state })
            }
            Input::Transfer(to) => Work::Replica(replica::Input::Transfer(to)),
            Input::Change(change) => Work::Replica(replica::Input::Change(change)),
        };
        self.run(now, first, out)
    }

    /// When to step again at the latest, if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        self.lockd.next_deadline().into_iter().chain(self.replica.next_deadline()).min()
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

    /// What one thing leads to, until nothing is left.
    fn run(&mut self, now: Time, first: Work, out: &mut Vec<Output>) -> Result<(), Unknown> {
        let mut work = VecDeque::from([first]);
        while let Some(next) = work.pop_front() {
            match next {
                Work::Core(input) => {
                    let mut outputs = Vec::new();
                    self.lockd.step(now, input, &mut outputs);
                    for output in outputs {
                        match output {
                            core::Output::Append(command) => {
                                work.push_back(Work::Replica(replica::Input::Propose(command)));
                            }
                            core::Output::Send(id, frame) => out.push(Output::Send(id, frame)),
                            core::Output::Close(id, why) => out.push(Output::Close(id, why)),
                        }
                    }
                }
                Work::Replica(input) => {
                    let mut outputs = Vec::new();
                    self.replica.step(now, input, &mut outputs);
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
            replica::Output::Members(members) => return push(out, Output::Members(members)),
            replica::Output::Refused(why) => return push(out, Output::Refused(why)),
            replica::Output::Committed { own: true, .. } => core::Input::Durable { count: 1 },
            replica::Output::Committed { command, .. } => core::Input::Foreign(decode_command(&command)?),
            replica::Output::Install(image) => core::Input::Installed(Box::new(decode_table(&image.state)?)),
            replica::Output::Established { term } => {
                out.push(Output::Leads { term });
                core::Input::Leads
            }
            replica::Output::Deposed => {
                out.push(Output::Follows);
                core::Input::Follows { leader: self.leader_address() }
            }
            replica::Output::Leader { .. } if self.replica.is_established() => return Ok(()),
            replica::Output::Leader { .. } => core::Input::Follows { leader: self.leader_address() },
        };
        work.push_back(Work::Core(input));
        Ok(())
    }

    fn leader_address(&self) -> Option<String> {
        let leader = self.replica.leader()?;
        self.replica.members().get(&leader).map(|member| member.address.clone())
    }
}

fn push(out: &mut Vec<Output>, output: Output) -> Result<(), Unknown> {
    out.push(output);
    Ok(())
}

fn encode_table(table: &Table) -> Vec<u8> {
    postcard::to_stdvec(table).expect("writing to memory does not fail")
}

/// A replica without a group has no state yet.
fn decode_table(state: &[u8]) -> Result<Table, Unknown> {
    if state.is_empty() {
        return Ok(Table::default());
    }
    let table: Table = postcard::from_bytes(state).map_err(|_| Unknown("a table that does not decode"))?;
    table.check().map_err(Unknown)?;
    Ok(table)
}

fn decode_command(command: &Bytes) -> Result<Command, Unknown> {
    postcard::from_bytes(command).map_err(|_| Unknown("a command that does not decode"))
}
