//! People: they make snapshots and delete them, rename, list, look, move the server, change priorities, and fence what is
//! lost for good. Each errand is a process of its own, which may be killed half-way; then nobody knows what came of it.

use std::collections::BTreeSet;

use csnap_proto::message::local::ToAgent;
use csnap_proto::message::operate::{Fenced, OperatorReply, OperatorRequest, Refusal, RefusalKind, Source};
use csnap_proto::{ChunkSize, Name, RequestToken, SessionId, Target};

use super::{Script, World};
use crate::model::{Life, Volume};
use crate::process::Process;
use crate::process::operator::Answer;
use crate::sim::{Ask, Event, HostId, POOL, ProcId, Spawn, node_name};

/// Operators look round so often, microseconds.
const LOOK_AGAIN: u64 = 20_000;

/// Snapshots of a volume beyond which one is deleted before another is made.
const SNAPSHOTS_MAX: usize = 6;

/// An operator is killed half-way with this probability.
const KILLED: f64 = 0.05;

/// What an operator is for.
#[derive(Clone, Debug)]
pub enum Errand {
    /// Makes a volume.
    CreateVolume(usize),
    /// Makes a snapshot.
    Create { volume: usize, token: RequestToken },
    /// Deletes one.
    Delete { volume: usize, token: RequestToken },
    /// Renames one.
    Rename { volume: usize, token: RequestToken, to: Name },
    /// Lists those of a volume.
    List { volume: usize },
    /// Looks who has a volume, to fence whoever is dead.
    FindDead { volume: usize },
    /// Anything that the model does not follow.
    Other,
}

#[derive(Debug)]
struct Running {
    proc: ProcId,
    errand: Errand,
    asked: u64,
    dies: Option<u64>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Operators {
    running: Vec<Running>,
    next_create: u64,
    next_other: u64,
    names: u64,
    /// What the last list of each volume said, for the ending.
    pub(super) listed: Vec<BTreeSet<Name>>,
}

impl Operators {
    /// Nobody is on an errand.
    #[must_use]
    pub fn are_idle(&self) -> bool {
        self.running.is_empty()
    }
}

impl World {
    /// Makes the volumes of the plan.
    pub fn make_volumes(&mut self) {
        let volumes = self.sim.plan.work.volumes.clone();
        for (index, (chunk, blocks)) in volumes.into_iter().enumerate() {
            let name = Name::new(format!("v{index}")).expect("a valid name");
            let size_bytes = blocks * 4096;
            self.sim.model.volumes.push(Volume::new(0, index as u64 + 1, name.clone(), size_bytes));
            self.operators.listed.push(BTreeSet::new());
            let chunk = ChunkSize::from_bytes(chunk).expect("plans have valid chunk sizes");
            let request = OperatorRequest::VolumeCreate { name, size_bytes, chunk, source: Source::Empty };
            self.send_operator(Errand::CreateVolume(index), request);
        }
        self.script_later(0, Script::Operators);
        let until = self.sim.now() + 20_000_000;
        let done = self.run_until(until, |world| world.operators.are_idle());
        if !done {
            self.sim.violation("the volumes are not made within 20 s of a quiet start");
        }
    }

    fn send_operator(&mut self, errand: Errand, request: OperatorRequest) {
        let nodes = self.sim.plan.nodes;
        let host = HostId(self.sim.rng.index(nodes));
        let proc = self.sim.spawn(host, Spawn::Operator);
        self.sim.tell(20_000, proc, Event::Ask(Ask::Operate(Box::new(request))));
        let asked = self.sim.instant();
        let mortal = !self.calm && !matches!(errand, Errand::CreateVolume(_)) && self.sim.rng.chance(KILLED);
        let dies = mortal.then(|| self.sim.now() + 20_000 + self.sim.rng.below(1_000_000));
        self.operators.running.push(Running { proc, errand, asked, dies });
    }

    fn ask_agent(&mut self, message: ToAgent) {
        let nodes = self.sim.plan.nodes;
        let host = HostId(self.sim.rng.index(nodes));
        let proc = self.sim.spawn(host, Spawn::Operator);
        self.sim.tell(20_000, proc, Event::Ask(Ask::AskAgent(Box::new(message))));
        let dies = Some(self.sim.now() + 15_000_000);
        let asked = self.sim.instant();
        self.operators.running.push(Running { proc, errand: Errand::Other, asked, dies });
    }

    pub(super) fn on_operators(&mut self) {
        self.script_later(LOOK_AGAIN, Script::Operators);
        self.take_answers();
        if self.calm || self.sim.plan.work.create_every == 0 || self.guests_not_begun() {
            return;
        }
        if self.sim.now() >= self.operators.next_create {
            let wait = self.about(self.sim.plan.work.create_every);
            self.operators.next_create = self.sim.now() + wait;
            self.begin_snapshot();
        }
        if self.sim.now() >= self.operators.next_other && self.sim.plan.work.operate_every > 0 {
            let wait = self.about(self.sim.plan.work.operate_every);
            self.operators.next_other = self.sim.now() + wait;
            self.begin_other();
        }
    }

    fn guests_not_begun(&self) -> bool {
        self.guests.is_empty()
    }

    fn take_answers(&mut self) {
        let mut running = std::mem::take(&mut self.operators.running);
        running.retain(|run| {
            let operator = match self.procs.get_mut(&run.proc).map(|slot| &mut slot.process) {
                Some(Some(Process::Operator(operator))) => operator,
                // Not started yet, or gone with its host.
                _ => {
                    let waits = self.sim.is_alive(run.proc);
                    if !waits {
                        self.forget(run);
                    }
                    return waits;
                }
            };
            let answers = std::mem::take(&mut operator.answers);
            let heard = !operator.agent_answers.is_empty();
            if let Some((_, answer)) = answers.into_iter().next() {
                self.on_answer(run, answer);
                self.sim.kill(run.proc);
                return false;
            }
            let dies = run.dies.is_some_and(|at| at <= self.sim.now());
            if dies && !heard {
                self.forget(run);
            }
            if dies || heard {
                self.sim.kill(run.proc);
            }
            !(dies || heard)
        });
        running.append(&mut self.operators.running);
        self.operators.running = running;
        self.settle();
    }

    /// An operator is gone without an answer.
    fn forget(&mut self, run: &Running) {
        let now = self.sim.instant();
        match run.errand {
            Errand::CreateVolume(index) => {
                self.sim.violation(format!("nobody knows whether volume {index} was made"));
            }
            Errand::Create { volume, token } | Errand::Delete { volume, token } => {
                self.sim.model.volumes[volume].set_life(now, token, Life::Unknown);
            }
            // Both names stay possible.
            Errand::Rename { .. } | Errand::List { .. } | Errand::FindDead { .. } | Errand::Other => {}
        }
    }

    /// A name that was never used.
    fn new_name(&mut self) -> Name {
        self.operators.names += 1;
        Name::new(format!("s{}", self.operators.names)).expect("a valid name")
    }

    fn begin_snapshot(&mut self) {
        let volume = self.sim.rng.index(self.sim.model.volumes.len());
        let there = |life: Life| !matches!(life, Life::Gone);
        let count = self.sim.model.volumes[volume].snapshots.values().filter(|s| there(s.life)).count();
        if count >= SNAPSHOTS_MAX {
            return self.begin_delete(volume);
        }
        self.create_snapshot(volume);
    }

    /// Asks for a snapshot; its token.
    pub fn create_snapshot(&mut self, volume: usize) -> RequestToken {
        let (name, token) = (self.new_name(), RequestToken(self.sim.draw()));
        let of = self.sim.model.volumes[volume].name.clone();
        let now = self.sim.instant();
        self.sim.model.volumes[volume].snapshot_asked(now, token, name.clone());
        let target = Target { volume: of, snapshot: Some(name) };
        let request = OperatorRequest::SnapshotCreate { target, token };
        self.send_operator(Errand::Create { volume, token }, request);
        self.settle();
        token
    }

    /// Any of the volume's snapshots that nobody renamed or deletes.
    pub(super) fn live_snapshot(&mut self, volume: usize) -> Option<RequestToken> {
        let snapshots = &self.sim.model.volumes[volume].snapshots;
        let live: Vec<RequestToken> = snapshots
            .iter()
            .filter(|(_, s)| s.life == Life::Live && s.renamed.is_none())
            .map(|(token, _)| *token)
            .collect();
        if live.is_empty() { None } else { Some(live[self.sim.rng.index(live.len())]) }
    }

    fn begin_delete(&mut self, volume: usize) {
        let force = self.sim.rng.chance(self.sim.plan.work.forced);
        if let Some(token) = self.live_snapshot(volume) {
            self.delete_snapshot(volume, token, force);
        }
    }

    /// Asks for the end of a snapshot.
    pub fn delete_snapshot(&mut self, volume: usize, token: RequestToken, force: bool) {
        let now = self.sim.instant();
        let model = &mut self.sim.model.volumes[volume];
        model.set_life(now, token, Life::Ending);
        let of = model.name.clone();
        let snapshot = model.snapshots.get_mut(&token).expect("callers chose one");
        snapshot.forced |= force;
        let target = Target { volume: of, snapshot: Some(snapshot.name.clone()) };
        self.send_operator(
            Errand::Delete { volume, token },
            OperatorRequest::SnapshotDelete { target, force },
        );
        self.settle();
    }

    fn begin_other(&mut self) {
        let volume = self.sim.rng.index(self.sim.model.volumes.len());
        let of = self.sim.model.volumes[volume].name.clone();
        let nodes = self.sim.plan.nodes;
        let node = node_name(HostId(self.sim.rng.index(nodes)));
        match self.sim.rng.below(10) {
            0 | 1 => self.begin_delete(volume),
            2 => self.begin_rename(volume),
            3 | 4 => self.list_snapshots(volume),
            5 => self.send_operator(Errand::Other, OperatorRequest::Status),
            6 => self.send_operator(Errand::Other, OperatorRequest::VolumeShow { name: of }),
            7 | 8 => self.ask_agent(ToAgent::MoveServer { node }),
            _ => {
                let priority = [100, 50, 10, 120][self.sim.rng.index(4)];
                self.ask_agent(ToAgent::SetPriority { node, priority });
            }
        }
    }

    fn begin_rename(&mut self, volume: usize) {
        let Some(token) = self.live_snapshot(volume) else { return };
        let to = self.new_name();
        let model = &mut self.sim.model.volumes[volume];
        let of = model.name.clone();
        let snapshot = model.snapshots.get_mut(&token).expect("chosen just now");
        snapshot.renamed = Some(to.clone());
        let target = Target { volume: of, snapshot: Some(snapshot.name.clone()) };
        let request = OperatorRequest::SnapshotRename { target, to: to.clone() };
        self.send_operator(Errand::Rename { volume, token, to }, request);
    }

    /// Asks for the snapshots of a volume.
    pub(super) fn list_snapshots(&mut self, volume: usize) {
        let name = self.sim.model.volumes[volume].name.clone();
        let request = OperatorRequest::SnapshotList { volume: Some(name), after: None };
        self.send_operator(Errand::List { volume }, request);
    }

    /// Someone cannot have a volume: whoever holds it is looked at, and fenced if it is dead.
    pub(super) fn wish_fence(&mut self, volume: usize) {
        let name = self.sim.model.volumes[volume].name.clone();
        self.send_operator(Errand::FindDead { volume }, OperatorRequest::VolumeShow { name });
    }

    fn on_answer(&mut self, run: &Running, answer: Answer) {
        let now = self.sim.instant();
        self.sim.tally.did("operators' requests", 1);
        match (&run.errand, answer) {
            (Errand::CreateVolume(index), Ok(OperatorReply::Volume(info))) => {
                self.sim.model.volumes[*index].id = Some(info.id);
            }
            (Errand::Create { volume, token }, answer) => self.on_created(*volume, *token, answer),
            (Errand::Delete { volume, token }, answer) => self.on_deleted(*volume, *token, answer),
            (Errand::Rename { volume, token, to }, answer) => {
                let snapshot =
                    self.sim.model.volumes[*volume].snapshots.get_mut(token).expect("it was there");
                (snapshot.renamed, snapshot.since) = (None, now);
                match answer {
                    Ok(_) => snapshot.former = Some(std::mem::replace(&mut snapshot.name, to.clone())),
                    // Somebody deleted it meanwhile.
                    Err(refusal) if refusal.kind == RefusalKind::NotFound && snapshot.life != Life::Live => {}
                    Err(refusal) => self.refused("a rename", &refusal),
                }
            }
            (Errand::List { volume }, Ok(OperatorReply::Snapshots { rows, more: false })) => {
                let listed: BTreeSet<Name> =
                    rows.iter().filter_map(|row| row.target.snapshot.clone()).collect();
                let verdict = self.sim.model.volumes[*volume].check_list(run.asked, &listed);
                self.sim.judge(verdict);
                let model = &mut self.sim.model.volumes[*volume];
                for name in &listed {
                    if let Some(token) = model.snapshot_named(name)
                        && model.snapshots[&token].life == Life::Unknown
                    {
                        model.snapshot_seen(now, token);
                    }
                }
                self.operators.listed[*volume] = listed;
            }
            (Errand::FindDead { .. }, Ok(OperatorReply::Volume(info))) => {
                let dead = info.attached.iter().find(|a| !self.sim.is_alive(ProcId(a.pid)));
                if let Some(session) = dead.map(|attachment| attachment.session) {
                    self.fence(session);
                }
            }
            (Errand::Other, _) => {}
            (errand, answer) => self.sim.violation(format!("{errand:?} was answered {answer:?}")),
        }
    }

    fn fence(&mut self, session: SessionId) {
        self.sim.tally.did("sessions fenced", 1);
        self.send_operator(Errand::Other, OperatorRequest::Fence { whom: Fenced::Session(session) });
    }

    fn on_created(&mut self, volume: usize, token: RequestToken, answer: Answer) {
        let now = self.sim.instant();
        match answer {
            Ok(_) => {
                self.sim.tally.did("snapshots made", 1);
                self.sim.model.volumes[volume].snapshot_made(now, token);
            }
            Err(refusal) => {
                match refusal.kind {
                    RefusalKind::TimedOut => {
                        self.sim.tally.reached("a create failed because the writer did not drain");
                    }
                    RefusalKind::Media | RefusalKind::NoSpace if self.may_fail() => {}
                    _ => self.refused("a create", &refusal),
                }
                self.sim.model.volumes[volume].set_life(now, token, Life::Gone);
            }
        }
    }

    fn on_deleted(&mut self, volume: usize, token: RequestToken, answer: Answer) {
        let now = self.sim.instant();
        let life = match answer {
            Ok(_) => {
                self.sim.tally.did("snapshots deleted", 1);
                Life::Gone
            }
            Err(refusal) if refusal.kind == RefusalKind::Busy => Life::Live,
            // A rename that nobody heard the end of gave it another name.
            Err(refusal) if refusal.kind == RefusalKind::NotFound => {
                let snapshot = &self.sim.model.volumes[volume].snapshots[&token];
                if snapshot.renamed.is_none() {
                    self.refused("a delete", &refusal);
                }
                Life::Unknown
            }
            Err(refusal) => {
                self.refused("a delete", &refusal);
                Life::Unknown
            }
        };
        self.sim.model.volumes[volume].set_life(now, token, life);
    }

    fn may_fail(&self) -> bool {
        self.sim.disks[POOL].faults_struck() > 0 || self.sim.was_full
    }

    fn refused(&mut self, what: &str, refusal: &Refusal) {
        self.sim.violation(format!("{what} was refused: {refusal}"));
    }
}
