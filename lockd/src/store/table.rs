//! A log of commands, whose content is the table that they make: what the tests of the log keep in it.

use bytes::Bytes;
use csnap_storage::Storage;

use super::log::{Log, LogOptions};
use super::{Result, StoreError};
use crate::core::table::{Command, Table};

/// A [`Log`] of commands.
pub(super) struct Store<S: Storage> {
    pub(super) log: Log<S>,
}

impl<S: Storage> Store<S> {
    /// Opens the directory, or makes a store in an empty one. Safe to interrupt and to repeat.
    ///
    /// # Errors
    /// As [`Log::open`], and if what is there makes no table.
    pub(super) async fn open(storage: S, options: LogOptions) -> Result<(Self, Table)> {
        let (log, recovered) = Log::open(storage, options, |_| encode(&Table::default())).await?;
        let corrupt = |what| StoreError::Corrupt { file: "snapshot".into(), at: 0, what };
        let mut table: Table =
            postcard::from_bytes(&recovered.content).map_err(|_| corrupt("its table does not decode"))?;
        table.check().map_err(corrupt)?;
        let mut effects = Vec::new();
        for (at, item) in recovered.items {
            let what = "a command that does not decode";
            let command: Command = postcard::from_bytes(&item).map_err(|_| StoreError::Corrupt {
                file: recovered.file.clone(),
                at,
                what,
            })?;
            table.apply(command, &mut effects);
            effects.clear();
        }
        Ok((Self { log }, table))
    }

    /// Appends a batch of commands and makes it durable.
    ///
    /// # Errors
    /// As [`Log::append`].
    pub(super) async fn append(&mut self, commands: &[Bytes]) -> Result<()> {
        self.log.append(commands).await
    }

    /// Begins the next generation with `table`, which must be what the commands appended so far make.
    ///
    /// # Errors
    /// As [`Log::roll`].
    pub(super) async fn roll(&mut self, table: &Table) -> Result<()> {
        self.log.roll(&encode(table)).await
    }
}

fn encode(table: &Table) -> Bytes {
    postcard::to_stdvec(table).expect("writing to memory does not fail").into()
}
