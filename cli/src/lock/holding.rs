//! What is owed while a command runs on what a session holds. Pure: the shell around it is `run`.
//!
//! Invariant: once the lock may be another's, the command was killed before anything else is done, and its status is not
//! passed on as if it had held the lock to its end.

use csnap_lockd::client::{Duty, Tenure};
use csnap_proto::Time;

/// What happened.
#[derive(Debug)]
pub(super) enum Input {
    /// Time passed.
    Tick,
    /// A renewal was answered that was sent then.
    Confirmed(Time),
    /// What the command runs on is gone, with the reason.
    Lost(String),
    /// The command ended, with this status; without one it was killed because its guard was.
    Ended(Option<u8>),
}

/// What is to be done, in order.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// Tell people.
    Tell(String),
    /// Tell the guard that a renewal was answered that was sent then.
    Confirm(Time),
    /// Kill the command and everything in its process group.
    Kill,
    /// It is over.
    Over(Ending),
}

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// With the command's own status; it held to its end.
    Status(u8),
    /// The command was killed because its guard was, and held until then.
    Unguarded,
    /// The command ran on something that was lost, or was about to be.
    Lost(String),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Holding {
    tenure: Tenure,
    told: bool,
    lost: Option<String>,
}

impl Holding {
    pub(super) fn new(tenure: Tenure) -> Self {
        Self { tenure, told: false, lost: None }
    }

    /// Takes in what happened. Outputs are to be carried out in order.
    pub(super) fn step(&mut self, now: Time, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Tick => {}
            Input::Confirmed(sent_at) => {
                self.tenure.confirm(now, sent_at);
                out.push(Output::Confirm(sent_at));
            }
            Input::Lost(reason) => self.lose(reason, out),
            Input::Ended(status) => {
                self.look(now, out);
                let doubt = || self.told.then(|| "lockd did not answer in time".to_owned());
                let ending = match (self.lost.clone().or_else(doubt), status) {
                    (Some(reason), _) => Ending::Lost(reason),
                    (None, Some(status)) => Ending::Status(status),
                    (None, None) => Ending::Unguarded,
                };
                return out.push(Output::Over(ending));
            }
        }
        self.look(now, out);
    }

    /// When to step again at the latest, if nothing else happens.
    pub(super) fn next_deadline(&self, now: Time) -> Option<Time> {
        if self.lost.is_some() { None } else { self.tenure.next_deadline(now) }
    }

    fn look(&mut self, now: Time, out: &mut Vec<Output>) {
        match self.tenure.duty(now) {
            Duty::Act => {}
            // The guard, which has the same clock, asks the command to end.
            Duty::End if !self.told => {
                self.told = true;
                out.push(Output::Tell("lockd does not answer: the command is told to end".to_owned()));
            }
            Duty::End => {}
            Duty::Stop => self.lose("lockd did not answer in time".to_owned(), out),
        }
    }

    fn lose(&mut self, reason: String, out: &mut Vec<Output>) {
        if self.lost.is_none() {
            self.lost = Some(reason);
            out.push(Output::Kill);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn s(seconds: u64) -> Time {
        Time(seconds * 1_000_000)
    }

    fn holding() -> Holding {
        Holding::new(Tenure::new(Duration::from_secs(12), s(0)))
    }

    fn step(holding: &mut Holding, at: u64, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        holding.step(s(at), input, &mut out);
        out
    }

    #[test]
    fn a_command_that_ends_while_the_lock_is_held_passes_its_status_on() {
        let mut holding = holding();
        assert_eq!(step(&mut holding, 5, Input::Confirmed(s(4))), [Output::Confirm(s(4))]);
        assert_eq!(step(&mut holding, 12, Input::Tick), []);
        assert_eq!(step(&mut holding, 12, Input::Ended(Some(7))), [Output::Over(Ending::Status(7))]);
    }

    #[test]
    fn a_guard_that_ended_the_command_in_time_is_not_blamed() {
        assert_eq!(step(&mut holding(), 1, Input::Ended(None)), [Output::Over(Ending::Unguarded)]);
        let over = step(&mut holding(), 11, Input::Ended(None));
        assert!(matches!(over[..], [.., Output::Over(Ending::Lost(_))]), "{over:?}");
    }

    #[test]
    fn a_lost_lock_kills_at_once_and_once() {
        let mut holding = holding();
        assert_eq!(step(&mut holding, 1, Input::Lost("broken".into())), [Output::Kill]);
        assert_eq!(step(&mut holding, 1, Input::Lost("expired".into())), []);
        assert_eq!(step(&mut holding, 50, Input::Tick), []);
        let over = step(&mut holding, 50, Input::Ended(Some(0)));
        assert_eq!(over, [Output::Over(Ending::Lost("broken".into()))]);
    }

    #[test]
    fn who_cannot_renew_is_told_to_end_then_killed_before_the_lease_is_over() {
        let mut holding = holding();
        assert!(matches!(step(&mut holding, 9, Input::Tick)[..], [Output::Tell(_)]));
        assert_eq!(step(&mut holding, 10, Input::Tick), []);
        assert_eq!(holding.next_deadline(s(10)), Some(s(11)));
        assert_eq!(step(&mut holding, 11, Input::Tick), [Output::Kill]);
        assert_eq!(holding.next_deadline(s(11)), None);
    }

    #[test]
    fn who_ends_as_told_has_not_held_to_its_end() {
        let mut holding = holding();
        step(&mut holding, 9, Input::Tick);
        step(&mut holding, 10, Input::Confirmed(s(10)));
        assert!(matches!(step(&mut holding, 10, Input::Ended(Some(0)))[..], [Output::Over(Ending::Lost(_))]));
    }

    #[test]
    fn who_was_frozen_past_its_lease_kills_before_anything_else() {
        let mut holding = holding();
        assert_eq!(
            step(&mut holding, 100, Input::Confirmed(s(1)))[..],
            [Output::Confirm(s(1)), Output::Kill]
        );
        let mut holding = self::holding();
        let out = step(&mut holding, 100, Input::Ended(Some(0)));
        assert!(matches!(out[..], [Output::Kill, Output::Over(Ending::Lost(_))]));
    }
}
