//! Reads of a snapshot: two messages for what lies in the store, four for what is still on the origin.
//!
//! A read is cut into pieces of at most a message's chunks; waiting pieces share a message. Message 2 says where they lie.
//! What came from the origin counts only after message 4, on the connection and term of message 2: on a Retry or a broken
//! connection it is read again from message 1, and only when every I/O of the first try has returned, so that no late one
//! writes into the buffer of the second.
//!
//! A Retry says that a writer was granted some chunk of the message meanwhile. What it carried is asked for in messages of
//! half as many chunks, so a chunk is read again at most once for each halving and, alone in its message, once more: by
//! then it lies in the store. New reads begin with the last size that was too large, halved, and twice that after each
//! message that came through.

use std::collections::{BTreeMap, VecDeque};

use csnap_proto::limits::{CHUNKS_PER_MESSAGE_MAX, RANGES_PER_MESSAGE_MAX, SNAPSHOT_READS_MAX};
use csnap_proto::message::operate::{Refusal, RefusalKind};
use csnap_proto::message::volume::{Extent, Place, ToServer};
use csnap_proto::{BLOCKS_PER_ARENA, Chunk, ChunkRange, ChunkSize, Location, ReadId, RequestId, Time};

use super::{
    Canary, ClientCore, IoFailure, IoFor, IoOp, Output, Pending, QUERIES_IN_FLIGHT_MAX, Request,
    RequestError, RequestKey,
};

#[derive(Debug)]
pub(super) struct Reads {
    waiting: VecDeque<Piece>,
    batches: BTreeMap<ReadId, Batch>,
    /// Most chunks of a message that carries pieces of a new request.
    most_chunks: u64,
}

impl Default for Reads {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), batches: BTreeMap::new(), most_chunks: CHUNKS_PER_MESSAGE_MAX }
    }
}

/// A part of a request that fits a message.
#[derive(Clone, Copy, Debug)]
struct Piece {
    request: RequestKey,
    range: ChunkRange,
    offset: u64,
    len: u64,
    buffer_at: u64,
    /// Most chunks of a message that carries it; only shrinks, so that it is asked for a bounded number of times.
    most_chunks: u64,
    /// Its last query was refused as a whole, so the next asks for nobody else.
    alone: bool,
}

/// The pieces of one message 1.
#[derive(Debug)]
struct Batch {
    phase: Phase,
    pieces: Vec<Trying>,
    ios_left: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Message 1 is sent.
    Asked(RequestId),
    /// Message 2 is there, I/O is under way.
    Reading,
    /// The connection broke meanwhile: what is from the origin does not count.
    Broken,
    /// Message 3 is sent.
    Finishing(RequestId),
}

/// A piece that is being read.
#[derive(Debug)]
struct Trying {
    piece: Piece,
    ios_left: usize,
    origin: bool,
    failed: Option<RequestError>,
    over: bool,
}

/// Which piece an I/O is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct PieceIo {
    read: ReadId,
    index: usize,
    /// It reads the store.
    store: bool,
}

impl IoFor {
    pub(super) fn reads_store(&self) -> bool {
        matches!(self, Self::Piece(PieceIo { store: true, .. }))
    }
}

impl ClientCore {
    pub(super) fn read_snapshot(&mut self, request: Request) {
        let chunk = self.attached.as_ref().expect("checked on arrival").geometry.chunk;
        let whole = Piece {
            request: request.key,
            range: chunk.covering(request.offset, request.len),
            offset: request.offset,
            len: request.len,
            buffer_at: 0,
            most_chunks: self.reads.most_chunks,
            alone: false,
        };
        let pieces = cut(whole, chunk);
        self.requests.insert(request.key, Pending::SnapshotRead { pieces_left: pieces.len(), failed: None });
        self.reads.waiting.extend(pieces);
    }

    pub(super) fn go_on_reading(&mut self, now: Time, out: &mut Vec<Output>) {
        let asked = |batch: &&Batch| matches!(batch.phase, Phase::Asked(_));
        while !self.is_put_off(now)
            && self.end.is_none()
            && self.link.ready().is_some()
            && !self.reads.waiting.is_empty()
            && self.reads.batches.len() < SNAPSHOT_READS_MAX
            && self.reads.batches.values().filter(asked).count() < QUERIES_IN_FLIGHT_MAX
        {
            let pieces = self.reads.next_batch();
            let ranges = pieces.iter().map(|trying| trying.piece.range).collect();
            let read = ReadId(self.last_frame.next().0);
            let id = self.send(ToServer::QuerySnapshotRead { read, ranges }, out).expect("the link is ready");
            self.reads.batches.insert(read, Batch { phase: Phase::Asked(id), pieces, ios_left: 0 });
        }
    }

    pub(super) fn on_snapshot_read(
        &mut self,
        now: Time,
        id: RequestId,
        read: ReadId,
        extents: &[Extent],
        out: &mut Vec<Output>,
    ) {
        let Some(batch) = self.reads.batches.get_mut(&read).filter(|batch| batch.phase == Phase::Asked(id))
        else {
            return;
        };
        let chunk = self.attached.as_ref().expect("only an attached session reads").geometry.chunk;
        let Some(ios) = locate(&batch.pieces, extents, chunk) else {
            return self.break_off(now, "extents that do not cover the ranges asked for", out);
        };
        batch.phase = Phase::Reading;
        batch.ios_left = ios.len();
        for (index, op) in &ios {
            let trying = &mut batch.pieces[*index];
            trying.ios_left += 1;
            trying.origin |= matches!(op, IoOp::HeadRead { .. });
        }
        for (index, op) in ios {
            let store = matches!(op, IoOp::StoreRead { .. });
            self.start_io(IoFor::Piece(PieceIo { read, index, store }), op, out);
        }
    }

    pub(super) fn on_piece_done(
        &mut self,
        io: PieceIo,
        result: Result<(), IoFailure>,
        out: &mut Vec<Output>,
    ) {
        let early = self.config.canaries.has(Canary::CompleteReadAtMessage2);
        let batch = self.reads.batches.get_mut(&io.read).expect("a batch stays while its I/O is in flight");
        batch.ios_left -= 1;
        let batch_done = batch.ios_left == 0;
        let broken = batch.phase == Phase::Broken;
        let trying = &mut batch.pieces[io.index];
        trying.ios_left -= 1;
        if let Err(failure) = result {
            trying.failed = Some(failure.into());
        }
        // A place may be gone for a session that the server gave up: while the connection is broken, a failure proves
        // nothing yet and the piece is read again.
        let counts = if broken {
            !trying.origin && trying.failed.is_none()
        } else {
            !trying.origin || trying.failed.is_some()
        };
        if trying.ios_left == 0 && (counts || early) {
            trying.over = true;
            let (request, failed) = (trying.piece.request, trying.failed.clone());
            self.on_piece_over(request, failed, out);
        }
        if batch_done {
            self.on_batch_read(io.read, out);
        }
    }

    /// All I/O of a batch returned: message 3, or over, or again.
    fn on_batch_read(&mut self, read: ReadId, out: &mut Vec<Output>) {
        let batch = &self.reads.batches[&read];
        if batch.phase == Phase::Broken {
            return self.read_again(read, out);
        }
        if !batch.pieces.iter().any(|trying| trying.origin) {
            self.reads.batches.remove(&read);
            return self.reads.grow();
        }
        // Without a connection the batch is not whole, and is read anew.
        let Some(id) = self.send(ToServer::FinishSnapshotRead { read }, out) else {
            return self.read_again(read, out);
        };
        self.reads.batches.get_mut(&read).expect("looked up above").phase = Phase::Finishing(id);
    }

    /// Message 4.
    pub(super) fn on_finished(
        &mut self,
        id: RequestId,
        read: ReadId,
        confirmed: bool,
        out: &mut Vec<Output>,
    ) {
        let confirmed = confirmed || self.config.canaries.has(Canary::ConfirmBrokenMark);
        if self.reads.batches.get(&read).is_none_or(|batch| batch.phase != Phase::Finishing(id)) {
            return;
        }
        if !confirmed {
            self.read_smaller(read);
            return self.read_again(read, out);
        }
        let batch = self.reads.batches.remove(&read).expect("looked up above");
        self.reads.grow();
        for trying in batch.pieces.into_iter().filter(|trying| !trying.over) {
            self.on_piece_over(trying.piece.request, None, out);
        }
    }

    /// A writer was granted a chunk of the batch while it was read: the next messages for its pieces are half as large.
    fn read_smaller(&mut self, read: ReadId) {
        let chunk = self.attached.as_ref().expect("only an attached session reads").geometry.chunk;
        let batch = self.reads.batches.get_mut(&read).expect("the caller looked it up");
        let chunks: u64 = batch.pieces.iter().map(|trying| trying.piece.range.count).sum();
        let most_chunks = (chunks / 2).max(1);
        self.reads.most_chunks = most_chunks;
        let pieces = std::mem::take(&mut batch.pieces).into_iter().filter(|trying| !trying.over);
        for piece in pieces.map(|trying| trying.piece) {
            let parts = cut(Piece { most_chunks, ..piece }, chunk);
            if let Some(Pending::SnapshotRead { pieces_left, .. }) = self.requests.get_mut(&piece.request) {
                *pieces_left += parts.len() - 1;
            }
            batch.pieces.extend(parts.into_iter().map(Trying::from));
        }
    }

    /// What is not over of a batch waits for a new message 1.
    fn read_again(&mut self, read: ReadId, out: &mut Vec<Output>) {
        let batch = self.reads.batches.remove(&read).expect("the caller looked it up");
        for trying in batch.pieces.into_iter().rev().filter(|trying| !trying.over) {
            match self.end.clone() {
                None => self.reads.waiting.push_front(trying.piece),
                ended => self.on_piece_over(trying.piece.request, ended, out),
            }
        }
    }

    pub(super) fn on_reads_broken(&mut self, out: &mut Vec<Output>) {
        let reads: Vec<ReadId> = self.reads.batches.keys().copied().collect();
        for read in reads.into_iter().rev() {
            let batch = self.reads.batches.get_mut(&read).expect("just listed");
            if batch.ios_left > 0 && self.config.canaries.has(Canary::FinishElsewhere) {
                continue;
            }
            if batch.ios_left > 0 {
                batch.phase = Phase::Broken;
            } else {
                self.read_again(read, out);
            }
        }
    }

    fn on_piece_over(&mut self, key: RequestKey, error: Option<RequestError>, out: &mut Vec<Output>) {
        let Some(Pending::SnapshotRead { pieces_left, failed }) = self.requests.get_mut(&key) else {
            unreachable!("pieces belong to pending snapshot reads");
        };
        *pieces_left -= 1;
        *failed = failed.take().or(error);
        if *pieces_left == 0 {
            let result = failed.take().map_or(Ok(()), Err);
            self.complete(key, result, out);
        }
    }

    /// A query or a finish was refused. `false` if `id` is neither.
    pub(super) fn on_read_refused(
        &mut self,
        now: Time,
        id: RequestId,
        refusal: &Refusal,
        out: &mut Vec<Output>,
    ) -> bool {
        let phases = [Phase::Asked(id), Phase::Finishing(id)];
        let Some((&read, batch)) =
            self.reads.batches.iter_mut().find(|(_, batch)| phases.contains(&batch.phase))
        else {
            return false;
        };
        match refusal.kind {
            RefusalKind::Busy | RefusalKind::TimedOut => {
                self.put_off(now);
                self.read_again(read, out);
            }
            RefusalKind::Gone | RefusalKind::NotFound => {
                // Takes the batch along: none of its I/O is in flight while the server is asked.
                self.fail(RequestError::Lost(refusal.reason.clone()), out);
            }
            _ if batch.phase == Phase::Finishing(id) => self.read_again(read, out),
            _ if batch.pieces.len() > 1 => {
                batch.pieces.iter_mut().for_each(|trying| trying.piece.alone = true);
                self.read_again(read, out);
            }
            _ => {
                let batch = self.reads.batches.remove(&read).expect("just found");
                for trying in batch.pieces {
                    self.on_piece_over(
                        trying.piece.request,
                        Some(RequestError::Refused(refusal.clone())),
                        out,
                    );
                }
            }
        }
        true
    }

    /// Nothing will be read any more: pieces without I/O in flight are over.
    pub(super) fn fail_unread(&mut self, error: &RequestError, out: &mut Vec<Output>) {
        let mut over: Vec<RequestKey> = self.reads.waiting.drain(..).map(|piece| piece.request).collect();
        let idle: Vec<ReadId> = self
            .reads
            .batches
            .iter()
            .filter(|(_, batch)| batch.ios_left == 0)
            .map(|(read, _)| *read)
            .collect();
        for read in idle {
            let batch = self.reads.batches.remove(&read).expect("just listed");
            over.extend(batch.pieces.iter().filter(|trying| !trying.over).map(|trying| trying.piece.request));
        }
        for batch in self.reads.batches.values_mut() {
            batch.phase = Phase::Broken;
        }
        for key in over {
            self.on_piece_over(key, Some(error.clone()), out);
        }
    }
}

impl Reads {
    /// A message came through whole: larger ones may, too.
    fn grow(&mut self) {
        self.most_chunks = (self.most_chunks * 2).min(CHUNKS_PER_MESSAGE_MAX);
    }

    /// As many waiting pieces as fit a message, and as each of them may share.
    fn next_batch(&mut self) -> Vec<Trying> {
        let mut pieces: Vec<Trying> = Vec::new();
        let mut chunks = 0;
        let mut most_chunks = CHUNKS_PER_MESSAGE_MAX;
        while let Some(piece) = self.waiting.front().copied() {
            chunks += piece.range.count;
            most_chunks = most_chunks.min(piece.most_chunks);
            let fits = pieces.len() < RANGES_PER_MESSAGE_MAX && chunks <= most_chunks;
            if !pieces.is_empty() && (!fits || piece.alone) {
                break;
            }
            self.waiting.pop_front();
            pieces.push(piece.into());
            if piece.alone {
                break;
            }
        }
        pieces
    }
}

impl From<Piece> for Trying {
    fn from(piece: Piece) -> Self {
        Self { piece, ios_left: 0, origin: false, failed: None, over: false }
    }
}

/// Cuts a piece so that each part fits a message of its size.
fn cut(whole: Piece, chunk: ChunkSize) -> Vec<Piece> {
    let end = whole.offset + whole.len;
    let mut parts = Vec::new();
    let mut at = whole.offset;
    while at < end {
        let last = Chunk(chunk.chunk_at(at).0 + whole.most_chunks);
        let to = chunk.offset_of(last).min(end);
        parts.push(Piece {
            range: chunk.covering(at, to - at),
            offset: at,
            len: to - at,
            buffer_at: whole.buffer_at + (at - whole.offset),
            ..whole
        });
        at = to;
    }
    parts
}

/// Which I/O reads the pieces from where the extents say; `None` when these do not cover their ranges exactly, in order.
fn locate(pieces: &[Trying], extents: &[Extent], chunk: ChunkSize) -> Option<Vec<(usize, IoOp)>> {
    let mut extents = extents.iter();
    let mut ios = Vec::with_capacity(extents.len());
    for (index, trying) in pieces.iter().enumerate() {
        let mut left = trying.piece.range;
        while left.count > 0 {
            let extent =
                extents.next().filter(|e| e.range.first == left.first && e.range.count <= left.count)?;
            left = ChunkRange { first: extent.range.end(), count: left.count - extent.range.count };
            ios.push((index, part(&trying.piece, extent, chunk)?));
        }
    }
    extents.next().is_none().then_some(ios)
}

/// The I/O for what a piece wants of an extent of its range.
fn part(piece: &Piece, extent: &Extent, chunk: ChunkSize) -> Option<IoOp> {
    let start = chunk.offset_of(extent.range.first);
    let from = start.max(piece.offset);
    let to = chunk.offset_of(extent.range.end()).min(piece.offset + piece.len);
    let (request, len, buffer_at) = (piece.request, to - from, piece.buffer_at + (from - piece.offset));
    Some(match extent.place {
        Place::Zero => IoOp::ReadZeros { request, len, buffer_at },
        Place::Origin => IoOp::HeadRead { request, offset: from, len, buffer_at },
        Place::Store(location) => {
            check_in_arena(location, extent.range.count, chunk)?;
            IoOp::StoreRead { request, location, skip: from - start, len, buffer_at }
        }
    })
}

fn check_in_arena(location: Location, chunks: u64, chunk: ChunkSize) -> Option<()> {
    let end = chunks.checked_mul(chunk.blocks().into())?.checked_add(location.block.into())?;
    (end <= BLOCKS_PER_ARENA.into()).then_some(())
}
