//! An attached volume or snapshot as an export: the words of one API in those of the other.

use std::sync::Arc;

use bytes::Bytes;
use csnap_client::{ErrnoClass, RequestError, Volume};

use crate::export::{Attempt, BlockExtent, ErrorKind, Export, ExportError, Zeroing};

/// Most of a range whose allocation is looked at for one request, bytes: bounds the runs that a head full of holes has.
const STATUS_BYTES_MAX: u64 = 1 << 30;

/// How much CACHE reads at a time, and at most, bytes; the rest of the hint is ignored.
const CACHE_PIECE_BYTES: u64 = 1 << 20;
const CACHE_BYTES_MAX: u64 = 64 << 20;

/// See the module.
#[derive(Debug)]
pub struct VolumeExport {
    volume: Arc<Volume>,
}

impl VolumeExport {
    pub(super) fn new(volume: Arc<Volume>) -> Self {
        Self { volume }
    }

    /// The attachment.
    #[must_use]
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }
}

impl From<RequestError> for ExportError {
    fn from(error: RequestError) -> Self {
        let kind = match error.errno() {
            ErrnoClass::Io => ErrorKind::Io,
            ErrnoClass::NoSpace => ErrorKind::NoSpace,
            ErrnoClass::ReadOnly => ErrorKind::ReadOnly,
            ErrnoClass::Invalid => ErrorKind::Invalid,
        };
        Self::new(kind, error.to_string())
    }
}

fn attempted(result: Result<csnap_client::Attempt, RequestError>) -> Attempt {
    match result {
        Ok(csnap_client::Attempt::Done) => Attempt::Done,
        Ok(csnap_client::Attempt::WouldBlock) => Attempt::WouldBlock,
        Err(error) => Attempt::Failed(error.into()),
    }
}

impl Export for VolumeExport {
    fn try_read(&self, offset: u64, out: &mut [u8]) -> Attempt {
        attempted(self.volume.try_read(offset, out))
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Attempt {
        attempted(self.volume.try_write(offset, data))
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Bytes, ExportError> {
        Ok(self.volume.read(offset, len).await?)
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), ExportError> {
        Ok(self.volume.write(offset, data, false).await?)
    }

    async fn flush(&self) -> Result<(), ExportError> {
        Ok(self.volume.flush().await?)
    }

    async fn trim(&self, offset: u64, len: u64) -> Result<(), ExportError> {
        Ok(self.volume.trim(offset, len, false).await?)
    }

    async fn write_zeroes(&self, offset: u64, len: u64, how: Zeroing) -> Result<(), ExportError> {
        // Chunks that a snapshot shares are copied out first: never sure to be cheap, and so never offered as such.
        if how.fast_only {
            return Err(ExportError::new(ErrorKind::NotSupported, "zeroing a volume may have to copy"));
        }
        Ok(self.volume.write_zeroes(offset, len, false, how.may_punch).await?)
    }

    async fn cache(&self, offset: u64, len: u64) -> Result<(), ExportError> {
        let end = offset + len.min(CACHE_BYTES_MAX);
        let mut at = offset;
        while at < end {
            let piece = (end - at).min(CACHE_PIECE_BYTES);
            let len = usize::try_from(piece).expect("pieces are small");
            self.volume.read(at, len).await?;
            at += piece;
        }
        Ok(())
    }

    async fn block_status(
        &self,
        offset: u64,
        len: u64,
        extents_max: usize,
    ) -> Result<Vec<BlockExtent>, ExportError> {
        let runs = self.volume.block_status(offset, len.min(STATUS_BYTES_MAX)).await?;
        let extents =
            runs.into_iter().map(|run| BlockExtent { len: run.len, hole: run.hole, zero: run.zero });
        Ok(extents.take(extents_max).collect())
    }
}
