//! Reading a journal frame by frame, in its one line: while its term still writes it, or long after.
//!
//! A reader decides nothing about damage. Where the next frame is not valid it stops, and may be asked again;
//! [`tail`](super::tail) tells a torn end from corruption.

use bytes::Bytes;
use csnap_proto::Term;
use csnap_storage::{Access, BLOCK_BYTES, Storage, StorageError};

use super::frame::{self, Damage, File, Frame, Hash, Kind, Place};
use super::pool::Pool;
use super::{Position, TermError, names};

/// Most that is read ahead, bytes: large enough that loading a journal is sequential I/O.
const AHEAD_BYTES_MAX: usize = 256 << 10;

/// Where the next frame of a journal is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Segment.
    pub segment: u64,
    /// Offset in it, bytes.
    pub offset: u64,
    /// Frames before it.
    pub position: Position,
    /// Hash of the last of them.
    pub hash: Hash,
}

impl Cursor {
    /// Where a journal begins.
    pub const START: Self = Self { segment: 0, offset: 0, position: Position(0), hash: Hash([0; 32]) };
}

/// Reads one term's journal onward from a cursor.
pub struct Reader<S: Storage> {
    pool: Pool<S>,
    term: Term,
    cursor: Cursor,
    file: Option<(u64, S::File)>,
    window: Window,
    ahead_bytes: usize,
}

/// What was last read of the file, which may have changed since.
#[derive(Default)]
struct Window {
    segment: u64,
    offset: u64,
    bytes: Bytes,
}

impl<S: Storage> Reader<S> {
    /// A reader that expects its first frame at `cursor`.
    #[must_use]
    pub fn new(pool: &Pool<S>, term: Term, cursor: Cursor) -> Self {
        Self {
            pool: pool.clone(),
            term,
            cursor,
            file: None,
            window: Window::default(),
            ahead_bytes: AHEAD_BYTES_MAX,
        }
    }

    /// Whose journal it is.
    #[must_use]
    pub fn term(&self) -> Term {
        self.term
    }

    /// Where it stands.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// The next frame in line, here or at the start of the next segment; `None` if there is none (yet).
    pub async fn next(&mut self) -> Result<Option<Frame>, TermError> {
        let mut found = self.look(self.cursor.segment, self.cursor.offset).await?;
        if found.is_none() && self.cursor.offset > 0 {
            found = self.look(self.cursor.segment + 1, 0).await?;
        }
        match &found {
            Some(frame) => {
                self.cursor = Cursor {
                    segment: frame.place.number,
                    offset: frame.place.offset + frame.padded_bytes(),
                    position: Position(frame.sequence + 1),
                    hash: frame.hash,
                };
                self.ahead_bytes = (self.ahead_bytes * 4).min(AHEAD_BYTES_MAX);
            }
            None => self.ahead_bytes = BLOCK_BYTES,
        }
        Ok(found)
    }

    /// The frame at that place, if it is valid and the next in line. What was read ahead may be stale: then it is read
    /// again before the answer is no.
    async fn look(&mut self, segment: u64, offset: u64) -> Result<Option<Frame>, TermError> {
        let place = place(&self.pool, self.term, segment, offset);
        let cursor = self.cursor;
        let in_line = |frame: &Frame| {
            frame.sequence == cursor.position.0
                && frame.previous == cursor.hash
                && (offset == 0) == (frame.kind != Kind::Batch)
        };
        if let Some(bytes) = self.window.from(segment, offset)
            && let Ok(frame) = frame::decode(&place, &bytes)
        {
            return Ok(Some(frame).filter(in_line));
        }
        self.window = Window::default();
        let Some(file) = self.open(segment).await? else { return Ok(None) };
        let mut bytes = self.pool.storage.read(&file, offset, self.ahead_bytes).await?;
        if let Ok(length) = frame::peek(&bytes)
            && length > bytes.len()
        {
            bytes = self.pool.storage.read(&file, offset, length).await?;
        }
        let frame = frame::decode(&place, &bytes);
        self.window = Window { segment, offset, bytes };
        Ok(frame.ok().filter(in_line))
    }

    async fn open(&mut self, segment: u64) -> Result<Option<S::File>, TermError> {
        if let Some((number, file)) = &self.file
            && *number == segment
        {
            return Ok(Some(file.clone()));
        }
        match self.pool.storage.open(&names::journal(self.term, segment), Access::Read).await {
            Err(StorageError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
            Ok(file) => {
                // A segment that is only looked into to see whether the line goes on there does not replace the open one.
                if segment == self.cursor.segment || self.file.is_none() {
                    self.file = Some((segment, file.clone()));
                }
                Ok(Some(file))
            }
        }
    }
}

impl Window {
    fn from(&self, segment: u64, offset: u64) -> Option<Bytes> {
        let skip = usize::try_from(offset.checked_sub(self.offset)?).ok()?;
        (self.segment == segment && skip < self.bytes.len()).then(|| self.bytes.slice(skip..))
    }
}

/// A place in a journal.
pub(super) fn place<S: Storage>(pool: &Pool<S>, term: Term, segment: u64, offset: u64) -> Place {
    Place { pool: pool.id(), term, file: File::Journal, number: segment, offset }
}

/// The frame at `place` of the open `file`, whatever its line.
pub(super) async fn read_frame<S: Storage>(
    storage: &S,
    file: &S::File,
    place: &Place,
) -> Result<Result<Frame, Damage>, StorageError> {
    let start = storage.read(file, place.offset, BLOCK_BYTES).await?;
    let length = match frame::peek(&start) {
        Err(damage) => return Ok(Err(damage)),
        Ok(length) => length,
    };
    let bytes = if length > start.len() { storage.read(file, place.offset, length).await? } else { start };
    Ok(frame::decode(place, &bytes))
}

/// The first frame of a segment, whatever its line; `None` without such a file or without a valid frame there.
pub(super) async fn first_frame<S: Storage>(
    pool: &Pool<S>,
    term: Term,
    segment: u64,
) -> Result<Option<Frame>, TermError> {
    let file = match pool.storage.open(&names::journal(term, segment), Access::Read).await {
        Err(StorageError::NotFound { .. }) => return Ok(None),
        file => file?,
    };
    let frame = read_frame(&pool.storage, &file, &place(pool, term, segment, 0)).await?;
    let expected = if segment == 0 { Kind::Seal } else { Kind::Segment };
    Ok(frame.ok().filter(|frame| frame.kind == expected))
}
