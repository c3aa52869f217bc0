//! What must be true of every world.

use std::collections::BTreeMap;
use std::fmt;

use csnap_lockd::replica::{Body, Content, Image, LogEntry, PeerMessage, ReplicaId};

/// The state machine of the worlds: what it was fed, as a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Machine {
    pub(crate) index: u64,
    pub(crate) sum: u64,
}

impl Machine {
    pub(crate) fn apply(&mut self, index: u64, command: &[u8]) {
        self.index = index;
        self.sum = command.iter().fold(self.sum ^ index, |sum, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
        });
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        [self.index.to_le_bytes(), self.sum.to_le_bytes()].concat()
    }

    pub(crate) fn decode(state: &[u8]) -> Self {
        let number = |at: usize| u64::from_le_bytes(state[at..at + 8].try_into().expect("eight bytes"));
        Self { index: number(0), sum: number(8) }
    }
}

/// How often what happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally(pub(crate) BTreeMap<&'static str, u64>);

impl Tally {
    pub(crate) fn did(&mut self, what: &'static str) {
        *self.0.entry(what).or_default() += 1;
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (what, count) in &other.0 {
            *self.0.entry(what).or_default() += count;
        }
    }

    /// A campaign in which something never happened shows nothing about it.
    pub(crate) fn check_rich(&self) {
        for what in [
            "terms",
            "committed",
            "kills",
            "power losses",
            "cuts",
            "amnesias",
            "changes",
            "transfers",
            "installs",
            "rolls",
        ] {
            assert!(self.0.get(what).is_some_and(|count| *count > 0), "no {what} in {self}");
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(|(what, count)| format!("{count} {what}")).collect();
        f.write_str(&parts.join(", "))
    }
}

/// Knows everything that was ever said.
#[derive(Default)]
pub(crate) struct Judge {
    leaders: BTreeMap<u64, ReplicaId>,
    /// Every committed command, and the machine after it.
    committed: BTreeMap<u64, (Vec<u8>, Machine)>,
    /// Of every entry by index and term: its content, and the term before it.
    entries: BTreeMap<(u64, u64), (Content, Option<u64>)>,
    pub(crate) tally: Tally,
}

type Verdict = Result<(), String>;

impl Judge {
    pub(crate) fn last_committed(&self) -> u64 {
        self.committed.keys().next_back().copied().unwrap_or(0)
    }

    /// One leader a term.
    pub(crate) fn on_leader(&mut self, id: ReplicaId, term: u64) -> Verdict {
        let known = *self.leaders.entry(term).or_insert_with(|| {
            *self.tally.0.entry("terms").or_default() += 1;
            id
        });
        if known == id { Ok(()) } else { Err(format!("{known:?} and {id:?} lead term {term}")) }
    }

    /// A leader that takes proposals has everything that was ever committed.
    pub(crate) fn on_established(&self, id: ReplicaId, applied: u64) -> Verdict {
        let last = self.last_committed();
        if last > applied {
            Err(format!("{id:?} leads from {applied} and {last} was committed"))
        } else {
            Ok(())
        }
    }

    /// The same commands in the same order, everywhere.
    pub(crate) fn on_committed(&mut self, machine: &Machine, index: u64, command: &[u8]) -> Verdict {
        let (known, after) = self.committed.entry(index).or_insert_with(|| {
            *self.tally.0.entry("committed").or_default() += 1;
            (command.to_vec(), *machine)
        });
        if known != command || after != machine {
            return Err(format!("two histories at {index}: {after:?} and {machine:?}"));
        }
        Ok(())
    }

    /// A state that was sent is one that the committed commands make.
    pub(crate) fn on_installed(&self, image: &Image) -> Verdict {
        let machine = Machine::decode(&image.state);
        let before = self.committed.range(..=image.index).next_back().map(|(_, (_, machine))| *machine);
        if before.unwrap_or_default() == machine {
            Ok(())
        } else {
            Err(format!("a state of {} that nobody had: {machine:?}, not {before:?}", image.index))
        }
    }

    /// Two logs that have an entry of one index and term are alike up to it.
    pub(crate) fn on_sent(&mut self, message: &PeerMessage) -> Verdict {
        let Body::Append { index, log_term, entries, .. } = &message.body else { return Ok(()) };
        let mut before = *log_term;
        assert!(entries.first().is_none_or(|first| first.index == index + 1));
        for LogEntry { index, term, content } in entries {
            let known =
                self.entries.entry((*index, *term)).or_insert_with(|| (content.clone(), Some(before)));
            if known.0 != *content || known.1 != Some(before) {
                return Err(format!("two entries {index} of term {term}, or two histories of it"));
            }
            before = *term;
        }
        Ok(())
    }
}
