//! Connections to etcd: made, fed and dropped as lockd's client says, with [`Session`] between the two.

mod calls;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use csnap_lockd::client::ClientInput;
use csnap_proto::message::lock::ToLockd;
use csnap_proto::{Frame, Term, Time};
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use self::calls::Calls;
use super::{Event, Events, now};
use crate::core::{Input, SERVER_LOCK};
use crate::etcd::{self, Call, EtcdConfig, Output, Session};

/// Until the terms of a pool that cannot be read are read again.
const READ_AGAIN: Duration = Duration::from_secs(1);

struct Current {
    attempt: u64,
    calls: Calls,
    task: JoinHandle<()>,
}

/// At most one connection at a time.
pub(super) struct Link {
    endpoints: Vec<SocketAddr>,
    prefix: String,
    events: Events,
    session: Session,
    current: Option<Current>,
    inputs: Vec<Input>,
}

impl Link {
    pub(super) fn new(config: &EtcdConfig, pool: &Path, events: Events) -> Self {
        tokio::spawn(tell_floor(pool.join("term"), events.clone()));
        Self {
            endpoints: config.endpoints.clone(),
            prefix: config.key_prefix(),
            events,
            session: Session::new(SERVER_LOCK),
            current: None,
            inputs: Vec::new(),
        }
    }

    pub(super) fn connect(&mut self, attempt: u64) {
        self.drop_current();
        let (calls, queues) = calls::queues();
        let (endpoints, prefix, events) = (self.endpoints.clone(), self.prefix.clone(), self.events.clone());
        let task = tokio::spawn(async move {
            let conversation = Box::pin(calls::converse(&endpoints, &prefix, attempt, queues, &events));
            if let Err(error) = conversation.await {
                debug!("etcd: {error:#}");
            }
            let input = etcd::Input::Disconnected;
            let _ = events.send(Event::Etcd { attempt: Some(attempt), input }).await;
        });
        self.current = Some(Current { attempt, calls, task });
    }

    pub(super) fn disconnect(&mut self, attempt: u64) {
        if self.is_current(attempt) {
            self.drop_current();
        }
    }

    pub(super) fn send(&mut self, attempt: u64, frame: Frame<ToLockd>) -> bool {
        let is_current = self.is_current(attempt);
        if is_current {
            self.step(etcd::Input::Frame(frame));
        }
        is_current
    }

    /// A task reports, for its attempt if it has one.
    pub(super) fn on_event(&mut self, attempt: Option<u64>, input: etcd::Input) {
        if attempt.is_some_and(|attempt| !self.is_current(attempt)) {
            return;
        }
        match (attempt, &input) {
            (Some(attempt), etcd::Input::Connected) => {
                self.step(input);
                self.inputs.push(Input::Lockd(ClientInput::Connected { attempt }));
            }
            (Some(_), etcd::Input::Disconnected) => self.give_up(),
            _ => self.step(input),
        }
    }

    pub(super) fn step(&mut self, input: etcd::Input) {
        let mut out = Vec::new();
        self.session.step(now(), input, &mut out);
        for output in out {
            match output {
                Output::Frame(frame) => {
                    if let Some(attempt) = self.current.as_ref().map(|current| current.attempt) {
                        self.inputs.push(Input::Lockd(ClientInput::Received { attempt, frame }));
                    }
                }
                Output::Call(call) => self.call(call),
                Output::Drop(why) => {
                    warn!("etcd: the connection is dropped: {why}");
                    self.give_up();
                }
                Output::Doubt(term) => doubt(term),
            }
        }
    }

    pub(super) fn take_inputs(&mut self) -> Vec<Input> {
        std::mem::take(&mut self.inputs)
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.session.next_deadline()
    }

    fn call(&mut self, call: Call) {
        let taken = self.current.as_ref().is_none_or(|current| current.calls.take(call));
        if !taken {
            warn!("etcd: the connection is dropped: it does not take calls");
            self.give_up();
        }
    }

    fn is_current(&self, attempt: u64) -> bool {
        self.current.as_ref().is_some_and(|current| current.attempt == attempt)
    }

    /// Drops the connection and says so.
    fn give_up(&mut self) {
        if let Some(attempt) = self.current.as_ref().map(|current| current.attempt) {
            self.drop_current();
            self.inputs.push(Input::Lockd(ClientInput::Disconnected { attempt }));
        }
    }

    fn drop_current(&mut self) {
        if let Some(current) = self.current.take() {
            current.task.abort();
            self.step(etcd::Input::Disconnected);
        }
    }
}

fn doubt(term: Option<Term>) {
    match term {
        Some(term) => warn!(
            "etcd confirmed no renewal for a lease's length: another node may be given the server lock. \
             The server of term {term} goes on, and ends when its gate is closed"
        ),
        None => warn!("etcd confirmed no renewal for a lease's length"),
    }
}

/// Reads the highest term that the pool has seen, once it can be read. An etcd that is new, or older than the pool since it
/// was restored from a backup, would give terms that the pool refuses.
async fn tell_floor(terms: PathBuf, events: Events) {
    loop {
        let read = terms.clone();
        if let Ok(Ok(floor)) = tokio::task::spawn_blocking(move || highest_term(&read)).await {
            let input = etcd::Input::Floor(floor);
            let _ = events.send(Event::Etcd { attempt: None, input }).await;
            return;
        }
        tokio::time::sleep(READ_AGAIN).await;
    }
}

fn highest_term(terms: &Path) -> std::io::Result<Term> {
    let mut highest = Term(0);
    for entry in std::fs::read_dir(terms)? {
        let term = entry?.file_name().to_str().and_then(|name| name.parse().ok()).map(Term);
        highest = highest.max(term.unwrap_or_default());
    }
    Ok(highest)
}
