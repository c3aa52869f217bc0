//! Reading the snapshot store: arenas that servers made, found by term and number.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use csnap_proto::Location;
use csnap_proto::limits::ARENA_BYTES;

use super::direct::Direct;
use super::{DataConfig, failure, open_data};
use crate::core::IoFailure;

/// Arenas that one attachment holds open: 64 GiB of the store; another costs an open.
const OPEN_MAX: usize = 64;

#[derive(Debug)]
pub(crate) struct Arenas {
    store: PathBuf,
    direct: Option<Direct>,
    open: Mutex<BTreeMap<(u64, u32), Arc<File>>>,
}

impl Arenas {
    pub(crate) fn new(config: &DataConfig) -> Self {
        let direct = config.shared.then(|| Direct::new(ARENA_BYTES).expect("arenas are aligned"));
        Self { store: config.pool.join("store"), direct, open: Mutex::default() }
    }

    /// Exactly `len` bytes, `skip` bytes after `location`.
    pub(crate) fn read(&self, location: Location, skip: u64, len: usize) -> Result<Bytes, IoFailure> {
        let path = self.path(location);
        let file = self.file(location)?;
        let offset = location.offset() + skip;
        let read = match &self.direct {
            Some(direct) => direct.read(&file, offset, len),
            None => {
                let mut buf = vec![0; len];
                file.read_exact_at(&mut buf, offset).map(|()| Bytes::from(buf))
            }
        };
        read.map_err(|error| failure("read", &path, &error))
    }

    fn path(&self, location: Location) -> PathBuf {
        self.store.join(location.term.to_string()).join(location.arena.to_string())
    }

    fn file(&self, location: Location) -> Result<Arc<File>, IoFailure> {
        let key = (location.term.0, location.arena);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = open.get(&key) {
            return Ok(file.clone());
        }
        let path = self.path(location);
        let file = open_data(&path, false, self.direct.is_some()).map_err(|e| failure("open", &path, &e))?;
        if open.len() == OPEN_MAX {
            open.pop_first();
        }
        Ok(open.entry(key).or_insert(Arc::new(file)).clone())
    }
}
