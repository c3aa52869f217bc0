//! What operators ask an agent for and another one must do: moving the server, setting a priority.
//!
//! The asking agent publishes the wish in its member description and waits until lockd shows it fulfilled; the agent
//! whom it concerns acts on it, once. Nothing has to be connected to anything but lockd, and a wish whose asker dies
//! goes with its session.

use std::collections::BTreeSet;
use std::time::Duration;

use csnap_proto::message::local::{FromAgent, WISHES_MAX, Wish, WishKind};
use csnap_proto::{RequestId, SessionId, Time};

use super::{ConnId, Output};

/// A wish that nobody fulfilled by then is given up: a move takes milliseconds, a drain at most two seconds.
const GIVE_UP_AFTER: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Asked {
    wish: Wish,
    conn: ConnId,
    id: RequestId,
    until: Time,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Wishes {
    number: u64,
    asked: Vec<Asked>,
    /// Wishes of others and our own that we acted on, while they are published.
    acted: BTreeSet<(SessionId, u64)>,
}

impl Wishes {
    /// Takes an operator's request in; false if too many wait.
    pub(super) fn ask(&mut self, now: Time, what: WishKind, conn: ConnId, id: RequestId) -> bool {
        if self.asked.len() >= WISHES_MAX {
            return false;
        }
        // Grows over restarts of the agent too, which may keep its session.
        self.number = now.0.max(self.number + 1);
        let wish = Wish { number: self.number, what };
        self.asked.push(Asked { wish, conn, id, until: now.after(GIVE_UP_AFTER) });
        true
    }

    /// What is to be published.
    pub(super) fn published(&self) -> Vec<Wish> {
        self.asked.iter().map(|asked| asked.wish.clone()).collect()
    }

    /// Answers those that are fulfilled, and those that waited too long with `why_not`.
    pub(super) fn settle(
        &mut self,
        now: Time,
        fulfilled: impl Fn(&WishKind) -> bool,
        why_not: impl Fn(&WishKind) -> String,
        out: &mut Vec<Output>,
    ) {
        self.asked.retain(|Asked { wish, conn, id, until }| {
            let message = if fulfilled(&wish.what) {
                FromAgent::Done
            } else if *until <= now {
                FromAgent::Failed { reason: why_not(&wish.what) }
            } else {
                return true;
            };
            out.push(Output::Send { conn: *conn, id: *id, message });
            false
        });
    }

    /// Takes a wish on: true the first time.
    pub(super) fn take_on(&mut self, session: SessionId, wish: &Wish) -> bool {
        self.acted.insert((session, wish.number))
    }

    /// Forgets what is published no more.
    pub(super) fn forget_but(&mut self, published: &[(SessionId, Wish)]) {
        self.acted.retain(|(session, number)| {
            published.iter().any(|(other, wish)| other == session && wish.number == *number)
        });
    }

    pub(super) fn on_gone(&mut self, conn: ConnId) {
        self.asked.retain(|asked| asked.conn != conn);
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.asked.iter().map(|asked| asked.until).min()
    }
}
