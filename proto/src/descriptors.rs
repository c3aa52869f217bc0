//! How the files that a process may have open are shared out, so that connections, which strangers make, never take what
//! its own files need.

/// What a process may have open at once: its soft limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptors {
    limit: usize,
}

impl Descriptors {
    /// Of a process with this limit; none where there is no limit.
    #[must_use]
    pub fn new(limit: Option<u64>) -> Self {
        Self { limit: limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX)) }
    }

    /// Connections at once: half of what there is, and not more than `most`.
    #[must_use]
    pub fn connections(self, most: usize) -> usize {
        (self.limit / 2).min(most)
    }

    /// Files of one kind that are kept open for the next use: an eighth, and not more than `most`. Two kinds leave a
    /// quarter for everything that is open only while it is used.
    #[must_use]
    pub fn kept_open(self, most: usize) -> usize {
        (self.limit / 8).clamp(1, most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::CONNECTIONS_MAX;

    #[test]
    fn connections_and_files_that_are_kept_leave_a_quarter() {
        for limit in [64, 256, 1024, 4096, 65_536] {
            let descriptors = Descriptors::new(Some(limit));
            let taken = descriptors.connections(CONNECTIONS_MAX) + 2 * descriptors.kept_open(256);
            assert!(taken <= usize::try_from(limit).expect("small") * 3 / 4, "{limit}: {taken}");
        }
        assert_eq!(Descriptors::new(None).connections(CONNECTIONS_MAX), CONNECTIONS_MAX);
        assert_eq!(Descriptors::new(Some(0)).kept_open(256), 1);
    }
}
