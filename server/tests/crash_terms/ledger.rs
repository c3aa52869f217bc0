//! What was promised, and to whom: the model that every serving term is held against.

use std::collections::BTreeMap;

use csnap_proto::Term;
use csnap_server::term::{Corrupt, Replay};

/// The state of these tests: the numbers of all batches, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log {
    pub(crate) ids: Vec<u64>,
}

/// The batch `id`, `bytes` long; its content follows from the number.
pub(crate) fn batch(id: u64, bytes: usize) -> Vec<u8> {
    id.to_le_bytes().into_iter().cycle().take(bytes.max(8)).collect()
}

impl Log {
    /// The pieces of a checkpoint, deliberately small.
    pub(crate) fn pieces(&self) -> Vec<Vec<u8>> {
        let bytes = |ids: &[u64]| ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        self.ids.chunks(5).map(bytes).collect()
    }
}

impl Replay for Log {
    fn begin_checkpoint(&mut self) {
        self.ids.clear();
    }

    fn piece(&mut self, bytes: &[u8]) -> Result<(), Corrupt> {
        self.ids.extend(bytes.chunks(8).map(|id| u64::from_le_bytes(id.try_into().expect("whole numbers"))));
        Ok(())
    }

    fn end_checkpoint(&mut self) -> Result<(), Corrupt> {
        Ok(())
    }

    fn batch(&mut self, body: &[u8]) -> Result<(), Corrupt> {
        let id =
            body.first_chunk().map(|id| u64::from_le_bytes(*id)).ok_or_else(|| Corrupt::new("too short"))?;
        if body != batch(id, body.len()) {
            return Err(Corrupt::new("a batch that nobody wrote"));
        }
        self.ids.push(id);
        Ok(())
    }
}

#[derive(Clone, Default)]
pub(crate) struct Ledger {
    acknowledged: Vec<(Term, u64)>,
    served: BTreeMap<Term, Vec<u64>>,
    pub(crate) violation: Option<String>,
    pub(crate) reached: BTreeMap<&'static str, u64>,
}

impl Ledger {
    pub(crate) fn violate(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    pub(crate) fn reach(&mut self, what: &'static str) {
        *self.reached.entry(what).or_default() += 1;
    }

    /// `term` told somebody that batch `id` is there.
    pub(crate) fn acknowledge(&mut self, term: Term, id: u64) {
        self.reach("batch acknowledged");
        for (later, ids) in self.served.range(term.next()..) {
            if !ids.contains(&id) {
                self.violation.get_or_insert(format!(
                    "term {term} acknowledged {id}, which term {later} serves without"
                ));
            }
        }
        self.acknowledged.push((term, id));
    }

    /// `term` begins to serve with this state.
    pub(crate) fn serve(&mut self, term: Term, ids: &[u64]) {
        self.reach("term served");
        if let Some(problem) = self.problem_with(term, ids) {
            self.violate(problem);
        }
        self.served.insert(term, ids.to_vec());
    }

    /// What is wrong with `term` serving this state.
    pub(crate) fn problem_with(&self, term: Term, ids: &[u64]) -> Option<String> {
        for (earlier, id) in self.acknowledged.iter().filter(|(earlier, _)| *earlier < term) {
            if !ids.contains(id) {
                return Some(format!("term {term} serves without {id}, which term {earlier} acknowledged"));
            }
        }
        for (other, theirs) in &self.served {
            let (before, after) = if *other < term { (&theirs[..], ids) } else { (ids, &theirs[..]) };
            if !after.starts_with(before) {
                return Some(format!(
                    "terms {other} and {term} go on from different pasts: {theirs:?} and {ids:?}"
                ));
            }
        }
        let mut sorted = ids.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        (sorted.len() != ids.len()).then(|| format!("term {term} serves a batch twice: {ids:?}"))
    }
}
