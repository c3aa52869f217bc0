//! Servers, as somebody sees them who sees everything: terms only grow, and nothing that a server ever acted upon is
//! missing from what its successors go on from.

use std::collections::BTreeMap;

use csnap_proto::Term;

#[derive(Clone, Copy, Debug, Default)]
struct Reign {
    /// It served. One that froze between its Seal and that may find itself gone on from already.
    begun: bool,
    /// Frames of its journal that what it acted upon relies on.
    relied: u64,
    /// Frames of it that its successor goes on from.
    kept: Option<u64>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Terms {
    reigns: BTreeMap<Term, Reign>,
    last: Term,
}

impl Terms {
    /// The newest server that served.
    #[must_use]
    pub fn last(&self) -> Term {
        self.last
    }

    /// A server serves, having gone on from `base`, of whose journal it kept `kept` frames.
    pub fn begins(&mut self, term: Term, base: Term, kept: u64) -> Result<(), String> {
        if std::mem::replace(&mut self.reigns.entry(term).or_default().begun, true) {
            return Err(format!("two servers of term {term}"));
        }
        self.last = self.last.max(term);
        let reign = self.reigns.entry(base).or_default();
        if reign.kept.is_some() {
            return Err(format!("terms {term} and another both go on from term {base}"));
        }
        reign.kept = Some(kept);
        let lost = reign.relied > kept;
        let between = |(t, reign): (&Term, &Reign)| *t > base && *t < term && reign.relied > 0;
        if let Some((skipped, _)) = self.reigns.iter().find(|entry| between(*entry)) {
            return Err(format!("term {term} goes on from term {base}, but term {skipped} acted since"));
        }
        if lost {
            return Err(format!("term {base} acted on a record that term {term} does not have"));
        }
        Ok(())
    }

    /// The server of `term` acts on what its journal held `relied` frames in.
    pub fn acts(&mut self, term: Term, relied: u64) -> Result<(), String> {
        let successor = self.reigns.range(term..).nth(1).map(|(next, _)| *next);
        let reign = self.reigns.entry(term).or_default();
        reign.relied = reign.relied.max(relied);
        match reign.kept {
            Some(kept) if relied > kept => {
                Err(format!("term {term} acts on record {relied}, its successor goes on from {kept}"))
            }
            None if successor.is_some() => {
                Err(format!("term {term} acts, but term {successor:?} serves and did not go on from it"))
            }
            _ => Ok(()),
        }
    }
}
