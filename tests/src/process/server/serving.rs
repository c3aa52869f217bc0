//! A server that serves: its turns, what they order, and what comes of it.

use csnap_proto::message::local::ToAgent;
use csnap_proto::{Term, WallMillis};
use csnap_server::core::{BatchId, Exit, Input, Output};
use csnap_server::term::{Fatal, Journal, Position, Prepared, names};
use csnap_server::work::Done;
use csnap_storage::sim::SimStorage;

use super::{Ended, LOOK_EVERY, LOOK_FOR_DEAD, LOOK_ROUND, Phase, ServerProc, Serving};
use crate::net::NetConn;
use crate::sim::{Event, POOL, ProcId, Sim};

impl ServerProc {
    pub(super) fn keep_segments(&mut self) {
        let Phase::Serving(serving) = &self.phase else { return };
        let journal = serving.bench.journal().clone();
        self.tasks.spawn(async move { Ended::Kept(keep(&journal).await) });
    }

    pub(super) fn turn(&mut self, sim: &mut Sim) {
        let now = sim.clock(self.host);
        let wall = WallMillis(sim.now() / 1000);
        let Phase::Serving(serving) = &mut self.phase else { return };
        serving.turn_is_due = false;
        let mut out = Vec::new();
        while let Some(input) = serving.inbox.pop_front() {
            if let Input::Gate { batch, open } = input {
                let verdict = serving.on_gate(batch, open);
                if !open {
                    sim.tally.reached("a gate was found closed by its own server");
                    sim.tally.reached("a deposed server attempted an answer");
                }
                if let Some(Some(relied)) = sim.judge(verdict) {
                    let verdict = sim.model.terms.acts(serving.term, relied);
                    sim.judge(verdict);
                }
            }
            serving.core.step(now, wall, input, &mut out);
        }
        if !serving.checkpointing && serving.bench.journal().wants_checkpoint() {
            serving.checkpointing = true;
            serving.core.step(now, wall, Input::CheckpointDue, &mut out);
        }
        let terms: Vec<Term> = serving.core.state().older_terms().collect();
        if !terms.is_empty() && sim.now() >= serving.next_look {
            serving.next_look = sim.now() + LOOK_FOR_DEAD;
            let bench = serving.bench.clone();
            self.tasks
                .spawn(async move { Ended::FoundDead(bench.find_dead(terms).await.unwrap_or_default()) });
        }
        serving.core.end_turn(&mut out);
        for output in out {
            self.carry_out(sim, output);
        }
    }

    fn carry_out(&mut self, sim: &mut Sim, output: Output) {
        let Phase::Serving(serving) = &mut self.phase else { return };
        match output {
            Output::Send { conn, frame } => sim.send(self.id, NetConn(conn.0), &frame),
            Output::Close { conn, .. } => {
                self.sessions.remove(&NetConn(conn.0));
                sim.close(self.id, NetConn(conn.0));
            }
            Output::Exit { reason } => {
                if reason == Exit::Drained {
                    sim.tally.reached("a server was handed over by plan");
                    self.tell(sim, ToAgent::ServerDrained);
                }
                self.end(sim, if reason == Exit::Drained { "drained" } else { "deposed" });
            }
            output => {
                let open = gate_is_open(sim, serving.term);
                match &output {
                    Output::Append { .. } if !open => {
                        sim.tally.reached("a deposed server attempted an append");
                    }
                    Output::ReadGate { batch } => {
                        let relied = serving.appended.range(..=*batch).next_back().map_or(0, |(_, p)| *p);
                        serving.looks.insert(*batch, (relied, open));
                    }
                    Output::CopyOut { job, .. } => {
                        let (term, volume, moves) = (serving.term, job.volume, &job.moves);
                        sim.note(|| format!("term {term} copies of {volume}: {moves:?}"));
                        for (_, extent) in &job.moves {
                            sim.note_store_use(*extent);
                        }
                    }
                    Output::Punch { extents } => {
                        let term = serving.term;
                        sim.note(|| format!("term {term} punches {extents:?}"));
                    }
                    _ => {}
                }
                let bench = serving.bench.clone();
                self.tasks.spawn(async move {
                    let batch = matches!(output, Output::Append { .. });
                    let done = bench.carry_out(output).await;
                    let position = if batch { bench.journal().position() } else { Position(0) };
                    Ended::Carried(done, position)
                });
            }
        }
    }

    pub(super) fn on_carried(&mut self, sim: &mut Sim, done: Option<Done>, position: Position) {
        let Phase::Serving(serving) = &mut self.phase else { return };
        let Some(Done { input, checkpoint }) = done else { return };
        if let Input::Appended { batch } = input {
            serving.appended.insert(batch, position.0);
        }
        if let Some((position, state)) = checkpoint {
            let bench = serving.bench.clone();
            self.tasks.spawn(async move { Ended::Checkpointed(bench.checkpoint(position, &state).await) });
        }
        self.input(sim, input);
    }

    pub(super) fn look_round(&mut self, sim: &mut Sim) {
        sim.tell(LOOK_EVERY, self.id, Event::Timer(LOOK_ROUND));
        let Phase::Serving(serving) = &mut self.phase else { return };
        let state = serving.core.state();
        let absent = |pid: u32| !sim.is_alive(ProcId(pid)) || sim.is_paused(ProcId(pid));
        let mut sessions = state.sessions();
        if sessions.any(|s| state.unconfirmed_frees(s.id).next().is_some() && absent(s.pid)) {
            sim.tally.reached("freed space was held for an absent session");
        }
        // Old enough for nobody to ask about.
        while serving.appended.len() > 64 {
            serving.appended.pop_first();
        }
        while serving.looks.len() > 64 {
            serving.looks.pop_first();
        }
    }
}

impl Serving {
    /// The gate was read: what the batches behind it rely on, if they are acted upon now.
    fn on_gate(&mut self, batch: BatchId, open: bool) -> Result<Option<u64>, String> {
        match self.looks.remove(&batch) {
            Some((_, false)) if open => {
                Err(format!("term {} acts, though its gate was closed before it looked", self.term))
            }
            Some((relied, _)) => Ok(open.then_some(relied)),
            None => Ok(None),
        }
    }
}

async fn keep(journal: &Journal<SimStorage>) -> Result<Prepared, Fatal> {
    if journal.prepare_segment().await? == Prepared::NoSpace
        || journal.set_aside().await? == Prepared::NoSpace
    {
        return Ok(Prepared::NoSpace);
    }
    journal.segment_taken().await;
    Ok(Prepared::Ready)
}

/// Whether the gate of a term is open, as somebody sees who sees the disk itself.
pub(super) fn gate_is_open(sim: &Sim, term: Term) -> bool {
    let gate = sim.disks[POOL].peek(&names::gate(term));
    gate.is_some_and(|block| !block.is_empty() && block.iter().all(|byte| *byte == 0))
}
