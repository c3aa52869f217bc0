//! A register that refuses old terms, and what must be true of it however long its clients were stopped: the terms in its list
//! never decrease, and nothing that was acknowledged is lost.
//!
//! A client reads once under each grant and writes from there on; a write replaces everything from its place on. So a write
//! of a deposed client, if it were taken, would take away what others were told is there.

use std::collections::{BTreeMap, BTreeSet};

use csnap_proto::Term;

/// Bytes of a message.
pub const MESSAGE_BYTES: usize = 25;

/// A question to the register, with the term of the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// How long is the list? From now on nobody with a lower term is answered.
    Read(Term),
    /// This entry at this place, and nothing after it.
    Write(Term, u64, u64),
}

/// What it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// So long.
    Length(u64),
    /// This entry of this term is there.
    Written(Term, u64),
    /// A higher term was here.
    Refused,
}

fn pack(kind: u8, numbers: [u64; 3]) -> [u8; MESSAGE_BYTES] {
    let mut bytes = [0; MESSAGE_BYTES];
    bytes[0] = kind;
    for (at, number) in numbers.iter().enumerate() {
        bytes[1 + 8 * at..9 + 8 * at].copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

fn unpack(bytes: &[u8]) -> (u8, [u64; 3]) {
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    (bytes[0], [number(1), number(9), number(17)])
}

impl Question {
    /// Its bytes.
    #[must_use]
    pub fn encode(self) -> [u8; MESSAGE_BYTES] {
        match self {
            Self::Read(term) => pack(0, [term.0, 0, 0]),
            Self::Write(term, at, entry) => pack(1, [term.0, at, entry]),
        }
    }

    /// Of [`MESSAGE_BYTES`] bytes.
    ///
    /// # Panics
    /// If it is none: only tests send them.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Self {
        match unpack(bytes) {
            (0, [term, ..]) => Self::Read(Term(term)),
            (1, [term, at, entry]) => Self::Write(Term(term), at, entry),
            (kind, _) => panic!("no question: {kind}"),
        }
    }
}

impl Answer {
    /// Its bytes.
    #[must_use]
    pub fn encode(self) -> [u8; MESSAGE_BYTES] {
        match self {
            Self::Length(length) => pack(0, [length, 0, 0]),
            Self::Written(term, entry) => pack(1, [term.0, entry, 0]),
            Self::Refused => pack(2, [0; 3]),
        }
    }

    /// Of [`MESSAGE_BYTES`] bytes.
    ///
    /// # Panics
    /// If it is none: only tests send them.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Self {
        match unpack(bytes) {
            (0, [length, ..]) => Self::Length(length),
            (1, [term, entry, _]) => Self::Written(Term(term), entry),
            (2, _) => Self::Refused,
            (kind, _) => panic!("no answer: {kind}"),
        }
    }
}

/// The register.
#[derive(Debug, Default)]
pub struct Register {
    /// Terms and entries.
    pub list: Vec<(Term, u64)>,
    highest: Term,
    /// Questions of deposed clients.
    pub refused: u64,
    /// It does not look at terms: for tests of the tests.
    pub careless: bool,
}

impl Register {
    /// Answers.
    pub fn ask(&mut self, question: Question) -> Answer {
        let (Question::Read(term) | Question::Write(term, ..)) = question;
        if term < self.highest {
            self.refused += 1;
            if !self.careless {
                return Answer::Refused;
            }
        }
        self.highest = self.highest.max(term);
        match question {
            Question::Read(_) => Answer::Length(self.list.len() as u64),
            Question::Write(term, at, entry) => {
                self.list.truncate(usize::try_from(at).expect("a place in the list"));
                self.list.push((term, entry));
                Answer::Written(term, entry)
            }
        }
    }
}

/// What clients saw, and the register that they wrote to.
#[derive(Debug, Default)]
pub struct Mutex {
    /// It.
    pub register: Register,
    /// Who was granted the lock, by term.
    granted: BTreeMap<Term, u32>,
    acknowledged: BTreeSet<(Term, u64)>,
}

impl Mutex {
    /// Grants so far.
    #[must_use]
    pub fn grants(&self) -> u64 {
        self.granted.len() as u64
    }

    /// Entries that a client knows to be there.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.len() as u64
    }

    /// A client was granted the lock.
    ///
    /// # Errors
    /// If the term was given before.
    pub fn on_granted(&mut self, term: Term, client: u32) -> Result<(), String> {
        match self.granted.insert(term, client) {
            Some(earlier) => Err(format!("term {} was granted to {earlier} and to {client}", term.0)),
            None => Ok(()),
        }
    }

    /// A client heard that its entry is there.
    pub fn on_acknowledged(&mut self, term: Term, entry: u64) {
        self.acknowledged.insert((term, entry));
    }

    /// Looks at everything.
    ///
    /// # Errors
    /// What is not as it must be.
    pub fn check(&self) -> Result<(), String> {
        let list = &self.register.list;
        if let Some(pair) = list.windows(2).find(|pair| pair[1].0 < pair[0].0) {
            return Err(format!("terms decrease: {:?} after {:?}", pair[1], pair[0]));
        }
        let there: BTreeSet<(Term, u64)> = list.iter().copied().collect();
        let lost = self.acknowledged.difference(&there).next();
        match lost {
            Some((term, entry)) => {
                Err(format!("entry {entry} of term {} was acknowledged and is lost", term.0))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client stops after its read, another one writes, and the first goes on.
    fn overtaken(careless: bool) -> Result<(), String> {
        let mut mutex = Mutex::default();
        mutex.register.careless = careless;
        assert_eq!(mutex.register.ask(Question::Read(Term(1))), Answer::Length(0));
        assert_eq!(mutex.register.ask(Question::Read(Term(2))), Answer::Length(0));
        assert_eq!(mutex.register.ask(Question::Write(Term(2), 0, 7)), Answer::Written(Term(2), 7));
        mutex.on_acknowledged(Term(2), 7);
        mutex.register.ask(Question::Write(Term(1), 0, 8));
        mutex.check()
    }

    #[test]
    fn a_late_write_is_refused_and_taken_would_be_noticed() {
        assert_eq!(overtaken(false), Ok(()));
        assert!(overtaken(true).is_err_and(|what| what.contains("lost")));
    }

    #[test]
    fn messages_come_back_as_they_were() {
        for question in [Question::Read(Term(3)), Question::Write(Term(u64::MAX), 5, 9)] {
            assert_eq!(Question::decode(&question.encode()), question);
        }
        for answer in [Answer::Length(4), Answer::Written(Term(7), 1), Answer::Refused] {
            assert_eq!(Answer::decode(&answer.encode()), answer);
        }
    }
}
