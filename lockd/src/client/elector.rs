//! An [`Election`] on a session of its own, for owners that wait rather than step.

use std::collections::VecDeque;

use tokio::sync::mpsc;

use super::ClientEvent;
use super::election::{Election, ElectionEvent, Eligibility};
use super::shell::{LockSession, SessionOver};

/// Takes part in one election, as candidate or only looking on. Dropping it and its session ends the session in time, and
/// with it the reign.
pub struct Elector {
    session: LockSession,
    events: mpsc::Receiver<ClientEvent>,
    election: Election,
    news: VecDeque<ElectionEvent>,
}

impl Elector {
    /// Takes part in the election of this name through a session, as [`LockSession::spawn`] gave it with its events. The
    /// session serves nothing else that has events.
    #[must_use]
    pub fn new(session: LockSession, events: mpsc::Receiver<ClientEvent>, name: impl Into<String>) -> Self {
        Self { session, events, election: Election::new(name), news: VecDeque::new() }
    }

    /// The election as it stands; [`Election::leader`] is what was seen last.
    #[must_use]
    pub fn election(&self) -> &Election {
        &self.election
    }

    /// As [`Election::campaign`]; [`Self::next`] tells how it goes.
    ///
    /// # Errors
    /// When the session is over.
    pub async fn campaign(&mut self, eligibility: Eligibility) -> Result<(), SessionOver> {
        self.election.campaign(eligibility);
        self.pursue().await
    }

    /// As [`Election::proclaim`]; done when lockd has it.
    ///
    /// # Errors
    /// When the session is over.
    pub async fn proclaim(&mut self, data: Vec<u8>, floor: Eligibility) -> Result<(), SessionOver> {
        self.election.proclaim(data, floor);
        self.pursue().await
    }

    /// As [`Election::resign`]; done when lockd has the lock back.
    ///
    /// # Errors
    /// When the session is over.
    pub async fn resign(&mut self) -> Result<(), SessionOver> {
        self.election.resign();
        self.pursue().await
    }

    /// What happens next.
    ///
    /// # Errors
    /// When the session is over; if there was something to lose, [`ElectionEvent::Deposed`] came before.
    pub async fn next(&mut self) -> Result<ElectionEvent, SessionOver> {
        loop {
            if let Some(news) = self.news.pop_front() {
                return Ok(news);
            }
            self.pursue().await?;
            if !self.news.is_empty() {
                continue;
            }
            let news = match self.events.recv().await.ok_or(SessionOver)? {
                ClientEvent::Event(event) => self.election.on_event(&event),
                ClientEvent::Jeopardy => self.election.on_jeopardy(),
                ClientEvent::SessionLost { .. } | ClientEvent::Closed => self.election.on_session_lost(),
                _ => None,
            };
            self.news.extend(news);
        }
    }

    async fn pursue(&mut self) -> Result<(), SessionOver> {
        while let Some(op) = self.election.next_op() {
            let answered = self.session.operate(op.clone()).await;
            let Ok(reply) = answered else {
                // What was lost is told before the end is.
                let deposed = self.election.on_session_lost();
                if deposed.is_none() {
                    return Err(SessionOver);
                }
                self.news.extend(deposed);
                return Ok(());
            };
            self.news.extend(self.election.on_answer(&op, &reply));
        }
        Ok(())
    }
}
