//! A server before it serves: it follows the journal, takes over, and a bystander looks at the takeover.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};

use csnap_proto::message::local::ToAgent;
use csnap_proto::{Term, Time, WallMillis};
use csnap_server::core::{Config, ConnId, Input, ServerCore};
use csnap_server::term::state::seal_of;
use csnap_server::term::{Followed, Pool, TermError, take_over, verify};
use csnap_server::work::Workbench;
use csnap_storage::sim::{SimNode, SimStorage, executor};

use super::{Ended, FOLLOW, LOOK_EVERY, LOOK_ROUND, Phase, Ready, ServerProc, Serving, Standby};
use crate::sim::{Event, POOL, Sim, node_name};

impl ServerProc {
    pub(super) fn follow(&mut self) {
        let Phase::Following { resting, .. } = &mut self.phase else { return };
        let Some(mut follower) = resting.take() else { return };
        self.tasks.spawn(async move {
            let followed = follower.advance().await;
            Ended::Followed(follower, followed)
        });
    }

    pub(super) fn on_followed(
        &mut self,
        sim: &mut Sim,
        follower: Box<Standby>,
        result: Result<Followed, TermError>,
    ) {
        let ready = match result {
            Ok(_) => true,
            Err(TermError::Corrupt(corrupt)) => return self.fail(sim, &corrupt.to_string(), true),
            Err(_) => false,
        };
        if self.told_ready != ready {
            self.told_ready = ready;
            self.tell(sim, ToAgent::ServerStandby { ready });
        }
        let every = sim.plan.follow_every;
        let Phase::Following { resting, loads, .. } = &mut self.phase else { return };
        if *loads > 0 && follower.loads() > *loads {
            sim.tally.reached("a standby followed past a seal and loaded anew");
        }
        *loads = follower.loads();
        *resting = Some(follower);
        sim.tell(every, self.id, Event::Timer(FOLLOW));
        self.obey(sim);
    }

    pub(super) fn on_taken_over(&mut self, sim: &mut Sim, taken: Result<Ready, TermError>) {
        let Phase::TakingOver { term } = self.phase else { return };
        sim.taking_over.remove(&self.id);
        match taken {
            Ok(taken) => self.serve(sim, term, taken),
            Err(TermError::Deposed(_)) => {
                sim.tally.reached("a server began to take over and found itself deposed");
                self.end(sim, "deposed before it served");
            }
            Err(TermError::Storage(error)) => self.fail(sim, &error.to_string(), false),
            Err(error) => self.fail(sim, &error.to_string(), true),
        }
    }

    pub(super) fn serve(&mut self, sim: &mut Sim, term: Term, ready: Ready) {
        let Ready { taken, bench, life } = ready;
        self.check_takeover(sim, term, taken.base);
        let state = taken.replay.into_state();
        if let Err(problems) = state.check() {
            sim.violation(format!("the state that term {term} took over: {}", problems.join("; ")));
        }
        if state.next_reap(1).is_some() {
            sim.tally.reached("reaping was cut short by a takeover");
        }
        let config = Config {
            node: node_name(self.host),
            client_lease: sim.plan.client_lease,
            drain_patience: sim.plan.drain_patience,
            // Small, so that takeovers come in between.
            reap_slice_versions: 4,
            broken: sim.plan.canaries.core,
        };
        let wall = WallMillis(sim.now() / 1000);
        let core = ServerCore::new(term, config, state, sim.clock(self.host), wall);
        self.phase = Phase::Serving(Box::new(Serving {
            term,
            core,
            bench,
            next_look: sim.now(),
            _life: life,
            inbox: VecDeque::new(),
            turn_is_due: false,
            checkpointing: false,
            appended: BTreeMap::new(),
            looks: BTreeMap::new(),
        }));
        sim.note(|| format!("server {} serves as term {term}", self.id.0));
        sim.tally.did("takeovers", 1);
        self.tell(sim, ToAgent::ServerServing { term });
        self.keep_segments();
        self.input(sim, Input::Tick);
        sim.tell(LOOK_EVERY, self.id, Event::Timer(LOOK_ROUND));
        for (conn, events) in std::mem::take(&mut self.backlog) {
            self.input(sim, Input::Accepted { conn: ConnId(conn.0) });
            events.into_iter().for_each(|event| self.on_client(sim, conn, event));
        }
    }

    /// What a bystander who sees the whole disk says of a takeover.
    fn check_takeover(&self, sim: &mut Sim, term: Term, base: Term) {
        let disk = sim.disks[POOL].fork();
        let pool = Pool {
            storage: disk.storage(SimNode(0)),
            toml: sim.plan.pool.clone(),
            canaries: Default::default(),
        };
        let seal = match executor::run(seal_of(&pool, term)) {
            Ok(Some(seal)) => seal,
            // Its first segment may have been made superfluous already, by a successor.
            _ => return,
        };
        let kept = seal.base.filter(|named| named.term == base);
        let kept = kept.map_or(0, |named| named.position.0 + u64::from(seal.carried.is_some()));
        let verdict = sim.model.terms.begins(term, base, kept);
        sim.judge(verdict);
        let chain = executor::run(verify::chain(&pool)).unwrap_or_default();
        let place = |wanted: Term| chain.iter().position(|known| *known == wanted);
        if let (Some(from), Some(to)) = (place(base), place(term))
            && to > from + 1
        {
            sim.tally.reached("a takeover walked over a term that never served");
        }
    }
}

pub(super) async fn begin(
    pool: &Pool<SimStorage>,
    term: Term,
    follower: Standby,
    clock: &Cell<u64>,
) -> Result<Ready, TermError> {
    let taken = Box::pin(take_over(pool, term, follower, || Time(clock.get()))).await?;
    let bench = Workbench::new(pool, taken.journal.clone());
    let life = bench.show_life().await?;
    Ok(Ready { taken, bench, life })
}
