//! A table that came from another group: bytes from outside, which must not make this group fail later, whatever is
//! asked of it then.

use csnap_proto::LockId;
use csnap_proto::frame::BODY_BYTES_MAX;
use csnap_proto::limits::{
    EVENTS_PER_SESSION_MAX, KEY_BYTES_MAX, KEY_VALUE_BYTES_MAX, KEYS_MAX, KEYS_TOTAL_BYTES_MAX, LEASE_MS_MAX,
    LEASE_MS_MIN, LOCK_NAME_BYTES_MAX, LOCKD_SESSIONS_MAX, LOCKS_PER_RESOURCE_MAX, LOCKS_PER_SESSION_MAX,
    MEMBER_INFO_BYTES_MAX, OPERATIONS_PER_SESSION_MAX, PERSISTENT_LOCKS_MAX, VALUE_BLOCK_BYTES_MAX,
    WATCHES_PER_SESSION_MAX,
};
use csnap_proto::message::lock::{KeyOp, LockOp};

use super::resource::Resource;
use super::session::{Session, StoredReply};
use super::{RESOURCES_MAX, Table};

/// Counters beyond are no honest table's: a million steps a second for thirty thousand years do not reach them. What is
/// counted on from below does not run out.
const NUMBER_MAX: u64 = 1 << 60;

/// Room for what a frame carries beside an answer.
const ANSWER_BYTES_MAX: usize = BODY_BYTES_MAX - 64;

type Check = Result<(), &'static str>;

fn within(number: u64) -> bool {
    number < NUMBER_MAX
}

fn require(holds: bool, what: &'static str) -> Check {
    if holds { Ok(()) } else { Err(what) }
}

impl Table {
    /// As [`Table::check`], and that it is within every limit that a table made here is within.
    ///
    /// # Errors
    /// What is not.
    pub fn check_foreign(&self) -> Check {
        self.check()?;
        let counters = [self.last_lock.0, self.term.0, self.value_sequence];
        require(counters.into_iter().all(within), "a counter that is about to end")?;
        let sizes = self.sessions.len() <= LOCKD_SESSIONS_MAX
            && self.resources.len() <= RESOURCES_MAX
            && self.persistent <= PERSISTENT_LOCKS_MAX;
        require(sizes, "more sessions, resources or persistent locks than there may be")?;
        let granted = self.resources.values().map(|resource| resource.granted.len()).sum::<usize>();
        let queued = |resource: &Resource| resource.converting.len() + resource.waiting.len();
        let queued = self.resources.values().map(queued).sum::<usize>();
        let known =
            |wanted: fn(&super::resource::Lock) -> bool| self.locks.values().filter(|l| wanted(l)).count();
        let once =
            granted == known(|lock| lock.granted.is_some()) && queued == known(|lock| lock.wanted.is_some());
        require(once, "a lock that is in a queue twice")?;
        self.resources.iter().try_for_each(|(name, resource)| check_resource(name, resource))?;
        self.sessions.values().try_for_each(|session| self.check_foreign_session(session))?;
        self.keys.check_foreign()
    }

    fn check_foreign_session(&self, session: &Session) -> Check {
        let waits = |id: &LockId| self.locks.get(id).is_some_and(|lock| lock.wanted.is_some());
        require(
            session.waits.iter().all(waits) && session.waits.is_subset(&session.locks),
            "a wait without a lock",
        )?;
        let lease = (LEASE_MS_MIN..=LEASE_MS_MAX).contains(&session.lease_ms);
        require(
            lease && session.info.len() <= MEMBER_INFO_BYTES_MAX,
            "a lease or description out of bounds",
        )?;
        let sizes = session.locks.len() <= LOCKS_PER_SESSION_MAX
            && session.watches.len() <= WATCHES_PER_SESSION_MAX
            && session.answers.len() <= OPERATIONS_PER_SESSION_MAX
            && session.event_count() <= EVENTS_PER_SESSION_MAX;
        require(sizes, "a session with more than one may have")?;
        let counters = within(session.last_event.0) && within(session.last_sequence.0);
        require(counters && session.event_bytes_fit(), "events of a session out of bounds")?;
        session.answers.values().try_for_each(|answer| check_answer(&answer.reply))
    }
}

impl super::key::Keys {
    fn check_foreign(&self) -> Check {
        let sizes = self.len() <= KEYS_MAX && self.bytes() <= KEYS_TOTAL_BYTES_MAX;
        require(sizes && within(self.revision().0), "more keys than there may be")?;
        let fits = |(key, value): (&String, &Vec<u8>)| {
            key.len() <= KEY_BYTES_MAX && value.len() <= KEY_VALUE_BYTES_MAX
        };
        require(self.iter().all(fits), "a key that is too long")
    }
}

fn check_resource(name: &str, resource: &Resource) -> Check {
    let locks = resource.granted.len() + resource.waiting.len();
    let named = !name.is_empty() && name.len() <= LOCK_NAME_BYTES_MAX;
    let fits = locks <= LOCKS_PER_RESOURCE_MAX && resource.value.bytes.len() <= VALUE_BLOCK_BYTES_MAX;
    require(named && fits && within(resource.value.term.0), "a resource out of bounds")
}

/// What is stored to be looked up again is only what looks, and what is stored as it is fits a frame.
fn check_answer(stored: &StoredReply) -> Check {
    let fits = match stored {
        StoredReply::Reply(reply) => {
            postcard::to_stdvec(reply).is_ok_and(|bytes| bytes.len() <= ANSWER_BYTES_MAX)
        }
        StoredReply::Again(
            LockOp::Watch { .. }
            | LockOp::Show { .. }
            | LockOp::Locks { .. }
            | LockOp::Key(KeyOp::Get { .. } | KeyOp::List { .. }),
        ) => true,
        StoredReply::Again(_) => false,
    };
    require(fits, "an answer that cannot be given again")
}
