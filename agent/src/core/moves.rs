//! What changes by plan: the server goes to a better node, or to where an operator or the end of this agent sends it;
//! priorities are set. The parent starts a move here; the anointing carries it out.

use csnap_proto::message::local::{Wish, WishKind};
use csnap_proto::{SessionId, Time};

use super::anointing::{Reign, Succession};
use super::{AgentCore, Failback, Output};

impl AgentCore {
    /// Starts a planned move when a better node waits, an operator wishes it, or this agent ends.
    pub(super) fn plan_moves(&mut self, now: Time, out: &mut Vec<Output>) {
        let wished = self.take_on_move();
        let better =
            self.failback_at().filter(|at| *at <= now).and_then(|_| self.members.better_than(self.priority));
        let better = better.map(|(_, node)| Succession::To { node: node.clone(), pinned: false });
        let stopping = self.stopping.map(|_| Succession::Open);
        let Some(reign) = self.anointing.reign_mut() else { return };
        if reign.succession.is_some() || self.child.serving_term() != Some(reign.term) {
            // A server that is still taking over has nothing to drain; one told to stop is simply ended.
            if self.stopping.is_some() && reign.succession.is_none() {
                self.child.stop(out);
            }
            return;
        }
        if let Some(succession) = stopping.or(wished).or(better) {
            out.push(Output::Note(format!(
                "the server of term {} is handed over: {succession:?}",
                reign.term
            )));
            reign.succession = Some(succession);
            self.child.drain(now, out);
        }
    }

    pub(super) fn failback_at(&self) -> Option<Time> {
        let (since, _) = self.members.better_than(self.priority)?;
        (self.config.failback == Failback::Auto).then(|| since.after(self.config.timing.failback_after))
    }

    /// Our reign, once our child serves under it.
    pub(super) fn reign_that_serves(&self) -> Option<&Reign> {
        self.anointing.reign().filter(|reign| self.child.serving_term() == Some(reign.term))
    }

    /// Every wish that is published, our own included.
    fn all_wishes(&self) -> Vec<(SessionId, Wish)> {
        let own = self.client.identity().session;
        let mine = self.wishes.published().into_iter().map(|wish| (own, wish));
        mine.chain(self.members.wishes().map(|(session, wish)| (session, wish.clone()))).collect()
    }

    /// A wish to move the server that we did not act on yet, if the server is ours to move.
    fn take_on_move(&mut self) -> Option<Succession> {
        self.reign_that_serves().filter(|reign| reign.succession.is_none())?;
        for (session, wish) in self.all_wishes() {
            if let WishKind::MoveServer { node } = &wish.what
                && self.members.find(node).is_some_and(|peer| peer.info.standby_ready)
                && self.wishes.take_on(session, &wish)
            {
                return Some(Succession::To { node: node.clone(), pinned: true });
            }
        }
        None
    }

    fn wish_fulfilled(&self, what: &WishKind) -> bool {
        match what {
            WishKind::MoveServer { node } => self.known.as_ref().is_some_and(|known| known.node == *node),
            WishKind::SetPriority { node, priority } if *node == self.config.node => {
                self.priority == *priority
            }
            WishKind::SetPriority { node, priority } => {
                self.members.find(node).is_some_and(|peer| peer.info.priority == *priority)
            }
        }
    }

    pub(super) fn settle_wishes(&mut self, now: Time, out: &mut Vec<Output>) {
        self.act_on_priority_wishes(out);
        let mut wishes = std::mem::take(&mut self.wishes);
        wishes.settle(now, |what| self.wish_fulfilled(what), |what| self.why_not(what), out);
        self.wishes = wishes;
    }

    fn act_on_priority_wishes(&mut self, out: &mut Vec<Output>) {
        let published = self.all_wishes();
        self.wishes.forget_but(&published);
        for (session, wish) in published {
            if let WishKind::SetPriority { node, priority } = wish.what.clone()
                && node == self.config.node
                && self.wishes.take_on(session, &wish)
            {
                out.push(Output::Note(format!("priority is {priority} from now on")));
                self.priority = priority;
            }
        }
    }
}
