//! A csnap volume as an asynchronous API: caches, resends, four-message reads.
