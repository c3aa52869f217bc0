//! What an agent must know of its earlier life, and how it goes on from there.
//!
//! The session with lockd is resumed by its secret, so a restart costs no lease; the exporter is found again; whoever
//! died is declared. The server of the earlier life is no use (it dies with its agent), and is ended if it has not.

use std::collections::{BTreeMap, BTreeSet};

use csnap_lockd::client::{ClientConfig, Identity, LockClient};
use csnap_proto::{EventNumber, Secret, SessionId, Term, Time};
use serde::{Deserialize, Serialize};

use super::anointing::Anointing;
use super::attempts::Attempts;
use super::child::Child;
use super::exporter::{ClientRun, Exporter};
use super::members::Members;
use super::reaping::{Dead, Reaping};
use super::seekers::Seekers;
use super::wishes::Wishes;
use super::{AgentCore, CoreConfig, Output, Process};

/// See the module. Everything but the priority is about this boot of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// Session with lockd.
    pub session: SessionId,
    /// Its proof.
    pub secret: Secret,
    /// Last event of it that was acted on.
    pub last_event: EventNumber,
    /// Priority, if an operator changed it.
    pub priority: Option<u32>,
    /// The exporter that runs.
    pub exporter: Option<ClientRun>,
    /// Other processes that write volumes.
    pub writers: BTreeSet<ClientRun>,
    /// Servers that run or ran under a term, and are not known dead.
    pub servers: Vec<(Process, Term)>,
    /// Who is dead and not declared yet.
    pub dead: BTreeSet<Dead>,
}

impl AgentCore {
    /// A core that goes on from `saved`, if there is something. `is_alive` says whether a process of then still runs;
    /// `fresh` is the identity of the session if none is to be resumed.
    #[must_use]
    pub fn new(
        now: Time,
        config: CoreConfig,
        client: ClientConfig,
        fresh: Identity,
        saved: Option<SavedState>,
        is_alive: impl Fn(Process) -> bool,
    ) -> Self {
        let client = match &saved {
            Some(saved) => {
                let identity = Identity { session: saved.session, secret: saved.secret };
                LockClient::resume(client, identity, saved.last_event)
            }
            None => LockClient::new(client, fresh, Vec::new()),
        };
        let mut leftovers = Vec::new();
        let mut reaping = Reaping::new(saved.iter().flat_map(|saved| saved.dead.iter().copied()).collect());
        for &(process, term) in saved.iter().flat_map(|saved| &saved.servers) {
            if is_alive(process) {
                reaping.expect(process, term);
                leftovers.push(Output::Kill(process));
            } else {
                reaping.add(Dead::Server { term });
            }
        }
        for &run in saved.iter().flat_map(|saved| &saved.writers) {
            if is_alive(run.process) && reaping.expect_writer(run) {
                leftovers.push(Output::Watch(run.process));
            } else {
                reaping.add(Dead::Client(run));
            }
        }
        let recorded = saved.as_ref().and_then(|saved| saved.exporter);
        let (alive, dead) = match recorded {
            Some(run) if is_alive(run.process) => (Some(run), None),
            dead => (None, dead),
        };
        leftovers.extend(alive.map(|run| Output::Watch(run.process)));
        dead.into_iter().for_each(|run| reaping.add(Dead::Client(run)));
        Self {
            priority: saved.as_ref().and_then(|saved| saved.priority).unwrap_or(config.priority),
            config,
            client,
            anointing: Anointing::new(),
            members: Members::default(),
            child: Child::new(now),
            attempts: Attempts::default(),
            exporter: Exporter::new(now, alive),
            reaping,
            seekers: Seekers::default(),
            wishes: Wishes::default(),
            peers: BTreeMap::new(),
            refused: BTreeSet::new(),
            known: None,
            told: Term(0),
            lockd: None,
            published: None,
            publishing: false,
            statuses: Vec::new(),
            statuses_until: Time(0),
            saved,
            leftovers,
            stopping: None,
            stopped: false,
        }
    }

    /// What a later life must know, as of now.
    fn state(&self) -> SavedState {
        let Identity { session, secret } = self.client.identity();
        let child = self.child.process().and_then(|(process, term)| term.map(|term| (process, term)));
        SavedState {
            session,
            secret,
            last_event: self.client.last_event(),
            priority: (self.priority != self.config.priority).then_some(self.priority),
            exporter: self.exporter.run(),
            writers: self.reaping.writers().clone(),
            servers: child.into_iter().chain(self.reaping.expected()).collect(),
            dead: self.reaping.waiting().clone(),
        }
    }

    /// Saves what changed. An event alone is no reason: a later life looks anew anyway.
    pub(super) fn save_changes(&mut self, out: &mut Vec<Output>) {
        let state = self.state();
        let unchanged = self
            .saved
            .as_ref()
            .is_some_and(|saved| SavedState { last_event: state.last_event, ..saved.clone() } == state);
        if !unchanged {
            self.saved = Some(state.clone());
            out.push(Output::Save(state));
        }
    }
}
