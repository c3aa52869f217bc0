//! Sets of instants, as ordered spans of virtual time, both ends included.

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans(Vec<(u64, u64)>);

impl Spans {
    /// One span.
    #[must_use]
    pub fn one(from: u64, to: u64) -> Self {
        Self(vec![(from, to)])
    }

    /// No instant is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// First and last instant.
    #[must_use]
    pub fn bounds(&self) -> Option<(u64, u64)> {
        Some((self.0.first()?.0, self.0.last()?.1))
    }

    /// The one span, if it is one.
    #[must_use]
    pub fn single(&self) -> Option<(u64, u64)> {
        if let [span] = self.0[..] { Some(span) } else { None }
    }

    /// Adds a span that does not begin before the last one.
    pub fn push(&mut self, from: u64, to: u64) {
        match self.0.last_mut() {
            Some(last) if last.1 >= from => last.1 = last.1.max(to),
            _ => self.0.push((from, to)),
        }
    }

    /// What both have.
    #[must_use]
    pub fn meet(&self, other: &Self) -> Self {
        let mut met = Vec::new();
        let (mut i, mut j) = (0, 0);
        while let (Some(a), Some(b)) = (self.0.get(i), other.0.get(j)) {
            let (from, to) = (a.0.max(b.0), a.1.min(b.1));
            if from <= to {
                met.push((from, to));
            }
            if a.1 < b.1 { i += 1 } else { j += 1 }
        }
        Self(met)
    }

    /// Forgets what comes after `to`.
    pub fn cut(&mut self, to: u64) {
        *self = self.meet(&Self::one(0, to));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_meet_where_both_are() {
        let mut a = Spans::one(1, 5);
        a.push(8, 10);
        assert_eq!(a.meet(&Spans::one(5, 9)), {
            let mut m = Spans::one(5, 5);
            m.push(8, 9);
            m
        });
        assert!(a.meet(&Spans::one(6, 7)).is_empty());
        a.cut(8);
        assert_eq!(a.bounds(), Some((1, 8)));
    }
}
