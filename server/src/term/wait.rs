//! Waiting for one's turn among the tasks of one thread. No runtime: whoever waits is woken through its own waker.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Wakes everybody who waits for a change of some state beside it.
#[derive(Default)]
pub(crate) struct Signal {
    wakers: RefCell<Vec<Waker>>,
}

impl Signal {
    /// The state changed.
    pub(crate) fn raise(&self) {
        for waker in self.wakers.take() {
            waker.wake();
        }
    }

    /// Waits until `look` finds something.
    pub(crate) async fn until<T>(&self, mut look: impl FnMut() -> Option<T>) -> T {
        poll_fn(|context| {
            if let Some(found) = look() {
                return Poll::Ready(found);
            }
            let mut wakers = self.wakers.borrow_mut();
            if !wakers.iter().any(|waker| waker.will_wake(context.waker())) {
                wakers.push(context.waker().clone());
            }
            Poll::Pending
        })
        .await
    }
}

/// A queue in which one at a time has the turn, in the order of asking.
#[derive(Default)]
pub(crate) struct Turns {
    queue: RefCell<VecDeque<u64>>,
    tickets: Cell<u64>,
    signal: Signal,
}

/// The turn, or a place in the queue for it; dropping it passes it on.
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
    ticket: u64,
}

impl Turns {
    /// Waits for the turn.
    pub(crate) async fn take(&self) -> Turn<'_> {
        let ticket = self.tickets.get();
        self.tickets.set(ticket + 1);
        self.queue.borrow_mut().push_back(ticket);
        let turn = Turn { turns: self, ticket };
        self.signal.until(|| (self.queue.borrow().front() == Some(&ticket)).then_some(())).await;
        turn
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.queue.borrow_mut().retain(|ticket| *ticket != self.ticket);
        self.turns.signal.raise();
    }
}
