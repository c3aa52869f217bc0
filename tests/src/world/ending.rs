//! The end of a world: calm comes, and within a bounded time everything that waits must be answered; then every volume and
//! every snapshot is read from its first byte to its last, what is left is deleted and must leave nothing behind, the
//! power is lost once more, and the medium itself must hold what was promised.

use std::collections::BTreeSet;

use csnap_proto::{Name, RequestToken, Term, Time};
use csnap_server::check::{self, Finding};
use csnap_server::copy::{arena_path, head_path};
use csnap_server::replay::StateReplay;
use csnap_server::state::State;
use csnap_server::term::{Follower, open_pool, take_over};
use csnap_storage::sim::{SimDisk, SimNode, SimStorage, executor};
use csnap_storage::{Access, Storage};

use super::World;
use crate::model::Life;
use crate::process::Process;
use crate::sim::{POOL, ProcId};

/// What waits when calm comes must be answered within this, microseconds: a lease of a client's session, a takeover, a
/// session that somebody has to fence, and room.
const PATIENCE: u64 = 60_000_000;

impl World {
    pub(super) fn end_all(&mut self) {
        self.calm_down();
        self.calm_contenders();
        if !self.expect_of_locks() {
            return;
        }
        if !self.expect("everything that waited is answered", |world| {
            world.operators.are_idle() && world.guests_are_quiet() && world.serving().is_some()
        }) {
            return;
        }
        self.send_guests_home();
        if !self.expect("every volume is attached, flushed and read", Self::guests_are_home) {
            return;
        }
        if !self.read_all_snapshots() {
            return;
        }
        self.check_history();
        self.check_medium();
        if self.sim.violation.is_none() {
            self.delete_all();
        }
    }

    /// Liveness: without faults this comes within a bounded time.
    fn expect(&mut self, what: &str, done: impl Fn(&Self) -> bool) -> bool {
        self.expect_within(PATIENCE, what, done)
    }

    pub(super) fn expect_within(&mut self, patience: u64, what: &str, done: impl Fn(&Self) -> bool) -> bool {
        let until = self.sim.now() + patience;
        let came = self.run_until(until, done);
        if !came && self.sim.violation.is_none() {
            let waiting = self.waiting_guests();
            let (operators, serving) = (&self.operators, self.serving());
            let text = format!(
                "not within {patience} us of calm: {what}; serving: {serving:?}; {waiting:?}; {operators:?}"
            );
            self.sim.violation(text);
        }
        came
    }

    /// Lists what there is, and reads it.
    fn read_all_snapshots(&mut self) -> bool {
        let volumes = 0..self.sim.model.volumes.len();
        volumes.clone().for_each(|volume| self.list_snapshots(volume));
        self.settle();
        if !self.expect("snapshots are listed", |world| world.operators.are_idle()) {
            return false;
        }
        for volume in volumes {
            for (token, name) in self.listed(volume) {
                // A rename that nobody heard the end of is settled now.
                let snapshot = self.sim.model.volumes[volume].snapshots.get_mut(&token).expect("just listed");
                (snapshot.name, snapshot.renamed) = (name, None);
                snapshot.life = Life::Live;
                self.add_sweeper(volume, token);
            }
        }
        self.settle();
        self.expect("every snapshot is attached and read", Self::guests_are_home)
    }

    fn listed(&self, volume: usize) -> Vec<(RequestToken, Name)> {
        let model = &self.sim.model.volumes[volume];
        let listed: &BTreeSet<Name> = &self.operators.listed[volume];
        listed.iter().filter_map(|name| Some((model.snapshot_named(name)?, name.clone()))).collect()
    }

    /// What the medium holds if the power is lost now, and what a stranger makes of it.
    fn check_medium(&mut self) {
        let disk = self.sim.disks[POOL].fork();
        disk.power_loss(self.sim.rng.next_u64());
        let storage = disk.storage(SimNode(1));
        match executor::run(check::check(&storage, false)) {
            Ok(report) if report.damage.iter().all(|finding| self.is_explained(finding)) => {}
            Ok(report) => return self.sim.violation(format!("the verifier: {:?}", report.damage)),
            Err(error) => return self.sim.violation(format!("the verifier: {error}")),
        }
        let term = Term(self.sim.model.terms.last().0 + 1_000_000);
        let state = match take_over_pool(&storage, term) {
            Ok(state) => state,
            Err(what) => return self.sim.violation(format!("a takeover after the last power loss: {what}")),
        };
        if let Err(problems) = state.check() {
            self.sim.violation(format!("offline: {}", problems.join("; ")));
        }
        let verdict = self.check_contents(&disk, &state);
        self.sim.judge(verdict);
    }

    /// A sync of a directory that failed may lose a link that later syncs did not save. Nobody needs the link again, for
    /// a walk begins at the highest term with a Seal; but the verifier sees that it is missing.
    fn is_explained(&self, finding: &Finding) -> bool {
        self.sim.dir_sync_failed && finding.what.contains("chain of successors")
    }

    fn check_contents(&mut self, disk: &SimDisk, state: &State) -> Result<(), String> {
        for index in 0..self.sim.model.volumes.len() {
            let volume = &mut self.sim.model.volumes[index];
            let known =
                state.volume_by_name(&volume.name).ok_or_else(|| format!("{} is gone", volume.name))?;
            let head = disk.peek(&head_path(known.id)).ok_or_else(|| format!("{}: no head", volume.name))?;
            volume.check_survived(&head)?;
            let rows: Vec<_> = state.snapshots(known.id).cloned().collect();
            volume.check_list(u64::MAX, &rows.iter().map(|row| row.name.clone()).collect())?;
            for row in rows {
                let token = volume.snapshot_named(&row.name).expect("the list was just checked");
                let content = content_of(disk, state, known.id, row.epoch, row.size_bytes, &head)?;
                volume.read_snapshot(token, 0, &content)?;
            }
        }
        Ok(())
    }

    /// Everything is deleted: nothing stays behind in the store, and the live state is what its journal says.
    fn delete_all(&mut self) {
        for volume in 0..self.sim.model.volumes.len() {
            for (token, _) in self.listed(volume) {
                self.delete_snapshot(volume, token, true);
            }
        }
        if !self.expect("what was deleted is reaped", |world| {
            world.operators.are_idle() && world.store_is_empty()
        }) {
            return;
        }
        if !self.expect("the server comes to rest", |world| world.live_digest() == world.durable_digest()) {
            return;
        }
        let until = self.sim.now() + 100_000;
        self.run_until(until, |_| false);
    }

    fn store_is_empty(&self) -> bool {
        self.live_state().is_some_and(|state| state.used_bytes() == 0)
    }

    fn live_state(&self) -> Option<&State> {
        let server: ProcId = self.serving()?;
        match self.process(server)? {
            Process::Server(server) => server.state(),
            _ => None,
        }
    }

    fn live_digest(&self) -> Option<[u8; 32]> {
        self.live_state().map(State::digest)
    }

    fn durable_digest(&self) -> Option<[u8; 32]> {
        let disk = self.sim.disks[POOL].fork();
        read_pool(&disk.storage(SimNode(1))).ok().map(|state| state.digest())
    }
}

/// The state that the journal makes, as a standby reads it.
fn read_pool(storage: &SimStorage) -> Result<State, String> {
    let pool = executor::run(open_pool(storage)).map_err(|error| error.to_string())?;
    let mut follower = Follower::new(&pool, StateReplay::new(pool.id()));
    executor::run(follower.advance()).map_err(|error| error.to_string())?;
    Ok(follower.replay().state().clone())
}

/// The state that a server takes over which never saw the pool before.
fn take_over_pool(storage: &SimStorage, term: Term) -> Result<State, String> {
    let pool = executor::run(open_pool(storage)).map_err(|error| error.to_string())?;
    let follower = Follower::new(&pool, StateReplay::new(pool.id()));
    let taken =
        executor::run(take_over(&pool, term, follower, || Time(0))).map_err(|error| error.to_string())?;
    Ok(taken.replay.into_state())
}

/// A snapshot's bytes, put together from the medium by the state alone.
fn content_of(
    disk: &SimDisk,
    state: &State,
    volume: csnap_proto::VolumeId,
    epoch: csnap_proto::Epoch,
    size_bytes: u64,
    head: &[u8],
) -> Result<Vec<u8>, String> {
    use csnap_proto::message::volume::Place;
    let chunk = state.chunk_bytes(volume);
    let all = csnap_proto::ChunkRange { first: csnap_proto::Chunk(0), count: size_bytes.div_ceil(chunk) };
    let mut content = Vec::new();
    for extent in state.locate(volume, epoch, all) {
        let len = usize::try_from(extent.range.count * chunk).map_err(|_| "an extent is too long")?;
        let from = usize::try_from(extent.range.first.0 * chunk).map_err(|_| "an extent is too far")?;
        match extent.place {
            Place::Zero => content.resize(content.len() + len, 0),
            Place::Origin => content.extend_from_slice(&head[from..(from + len).min(head.len())]),
            Place::Store(at) => {
                let storage = disk.storage(SimNode(1));
                let piece = executor::run(async {
                    let arena = storage.open(&arena_path(at.term, at.arena), Access::Read).await?;
                    storage.read(&arena, at.offset(), len).await
                });
                content.extend_from_slice(&piece.map_err(|error| error.to_string())?);
            }
        }
    }
    content.truncate(usize::try_from(size_bytes).map_err(|_| "too large")?);
    Ok(content)
}
