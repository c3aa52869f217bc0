//! One attached connection: requests in, replies out.
//!
//! ```text
//! socket ─► input window ─► handle: try at once ──► output window ─► socket
//!                              └─ would wait ─► Work (a task each) ─┘
//! ```
//!
//! Everything that has arrived is handled before anything is sent. Large reads and writes are cut into pieces:
//! [`mod@read`] sends a structured read's as they are read, [`mod@write`] writes a write's as they arrive.
//!
//! Invariants: a request is handled only when its reply has room in the output and, should it have to wait, in [`Work`];
//! otherwise nothing more is read from the client. A cookie is answered once.

mod read;
mod write;

use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::io::ReadBuf;
use tokio::sync::watch;
use tokio::time::timeout;

use self::write::{Parts, Receiving};
use super::listen::Stream;
use super::work::{Change, Outcome, Reading, Work, WriteId};
use crate::core::errno::{Problem, errno};
use crate::core::limits::{
    DRAIN_TIME_MAX, INPUT_BYTES, OUTPUT_BYTES, OUTPUT_HIGH_BYTES, SHUTDOWN_DRAIN_TIME_MAX, WAITING_PART_BYTES,
};
use crate::core::request::{Command, Header, Request, Terms, Verdict, judge};
use crate::core::window::Window;
use crate::core::wire::REQUEST_BYTES;
use crate::core::{reply, status};
use crate::export::{ErrorKind, Export, ExportError, Zeroing};

/// Free space that a read from the socket wants; less is not worth the call while the rest is being handled.
const ARRIVAL_BYTES: usize = 64 << 10;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The client said DISC.
    #[error("disconnected")]
    Disconnected,
    /// The exporter ends.
    #[error("shut down")]
    ShutDown,
    /// The client went away; in this trade that is a normal way to leave.
    #[error("the client went away: {0}")]
    Gone(#[from] io::Error),
    /// The client broke the protocol.
    #[error("protocol violation: {0}")]
    Violation(&'static str),
    /// A task panicked.
    #[error("a request failed inside: {0}")]
    Inside(#[from] tokio::task::JoinError),
}

/// A refused request whose payload is being skipped.
struct Skipping {
    cookie: u64,
    problem: Problem,
    left: usize,
}

/// The connection. See the module.
pub struct Connection<S, E> {
    stream: S,
    terms: Terms,
    export: Arc<E>,
    input: Window,
    output: Window,
    /// Data of the reply whose header was the last thing put into the output; nothing else may be put there before it.
    body: Bytes,
    skipping: Option<Skipping>,
    receiving: Option<Receiving>,
    readings: VecDeque<Reading>,
    writes: BTreeMap<WriteId, Parts>,
    next_write: u64,
    work: Work<E>,
    /// The client may still say something.
    listening: bool,
}

impl<S: Stream, E: Export> Connection<S, E> {
    /// An attached connection; `arrived` is what came beyond the negotiation, at most [`HANDSHAKE_INPUT_BYTES`].
    ///
    /// [`HANDSHAKE_INPUT_BYTES`]: crate::core::limits::HANDSHAKE_INPUT_BYTES
    pub fn new(stream: S, terms: Terms, export: Arc<E>, arrived: &[u8]) -> Self {
        let mut input = Window::new(INPUT_BYTES);
        input.put(arrived);
        Self {
            stream,
            terms,
            work: Work::new(Arc::clone(&export)),
            export,
            input,
            output: Window::new(OUTPUT_BYTES),
            body: Bytes::new(),
            skipping: None,
            receiving: None,
            readings: VecDeque::new(),
            writes: BTreeMap::new(),
            next_write: 0,
            listening: true,
        }
    }

    /// Serves until the client leaves or `shutdown` turns true. What was accepted by then is finished, except for a client
    /// that is not there any more.
    pub async fn run(mut self, shutdown: &mut watch::Receiver<bool>) -> End {
        let end = tokio::select! {
            biased;
            end = self.serve() => end,
            _ = shutdown.wait_for(|&down| down) => End::ShutDown,
        };
        let patience = match &end {
            End::Disconnected => Some(DRAIN_TIME_MAX),
            End::ShutDown => Some(SHUTDOWN_DRAIN_TIME_MAX),
            _ => None,
        };
        if let Some(patience) = patience {
            self.listening = false;
            // A client that does not read its last replies, or a request that cannot end, is left behind.
            let _ = timeout(patience, self.drain()).await;
        }
        self.work.abort().await;
        end
    }

    async fn serve(&mut self) -> End {
        loop {
            if let Err(end) = self.handle() {
                return end;
            }
            if let Err(end) = poll_fn(|cx| self.poll_progress(cx)).await {
                return end;
            }
        }
    }

    /// Finishes what was accepted.
    async fn drain(&mut self) -> Result<(), End> {
        loop {
            self.handle()?;
            if self.work.is_idle()
                && self.readings.is_empty()
                && self.body.is_empty()
                && self.output.is_empty()
            {
                return Ok(());
            }
            poll_fn(|cx| self.poll_progress(cx)).await?;
        }
    }

    /// Sends, collects what tasks have finished, receives: whatever is possible now. Ready as soon as anything was.
    fn poll_progress(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let mut moved = false;
        while !self.output.is_empty() {
            match Pin::new(&mut self.stream).poll_write(cx, self.output.filled()) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(End::Gone(io::ErrorKind::WriteZero.into()))),
                Poll::Ready(Ok(count)) => self.output.consume(count),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                Poll::Pending => break,
            }
            moved = true;
        }
        while self.may_reply() && !self.work.is_idle() {
            match self.work.poll_next(cx) {
                Poll::Ready(Some(outcome)) => self.on_outcome(outcome?),
                Poll::Ready(None) | Poll::Pending => break,
            }
            moved = true;
        }
        if self.listening && self.input.room() > 0 {
            moved |= self.poll_arrival(cx)?.is_ready();
        }
        if moved { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn poll_arrival(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let wanted = ARRIVAL_BYTES.min(self.input.room());
        let mut free = ReadBuf::new(self.input.free(wanted));
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut free))?;
        let count = free.filled().len();
        self.input.commit(count);
        if count == 0 {
            Poll::Ready(Err(End::Gone(io::ErrorKind::UnexpectedEof.into())))
        } else {
            Poll::Ready(Ok(()))
        }
    }

    /// The output takes one more reply, of any kind.
    fn may_reply(&self) -> bool {
        self.body.is_empty() && self.output.len() < OUTPUT_HIGH_BYTES
    }

    /// Handles what has arrived, as far as there is room for the replies.
    fn handle(&mut self) -> Result<(), End> {
        self.pour_body();
        while self.may_reply() {
            if !self.work.has_room(WAITING_PART_BYTES) {
                break;
            }
            if let Some(reading) = self.readings.pop_front() {
                self.read_piece(reading);
                continue;
            }
            let moved = if self.skipping.is_some() {
                self.skip_piece()
            } else if self.receiving.is_some() {
                self.receive_piece()
            } else {
                self.take_request()?
            };
            if !moved {
                break;
            }
        }
        Ok(())
    }

    /// Takes the next request, once enough of it is there.
    fn take_request(&mut self) -> Result<bool, End> {
        let Some(bytes) = self.input.filled().first_chunk::<REQUEST_BYTES>() else { return Ok(false) };
        let Some(header) = Header::decode(bytes) else {
            return Err(End::Violation("a request without its magic"));
        };
        match judge(&header, &self.terms) {
            Verdict::Disconnect if self.listening => return Err(End::Disconnected),
            Verdict::Disconnect => return Ok(false),
            Verdict::Refuse { cookie, problem, payload_bytes } => {
                self.input.consume(REQUEST_BYTES);
                self.skipping = Some(Skipping { cookie, problem, left: payload_bytes as usize });
            }
            Verdict::Accept(request) if matches!(request.command, Command::Write) => {
                return Ok(self.take_write(&request));
            }
            Verdict::Accept(request) => {
                self.input.consume(REQUEST_BYTES);
                self.start(&request);
            }
        }
        Ok(true)
    }

    /// Starts a request without payload.
    fn start(&mut self, request: &Request) {
        let Request { cookie, command, offset, len, fua } = *request;
        match command {
            Command::Write => unreachable!("writes have a payload"),
            Command::Flush => self.work.flush(cookie),
            Command::BlockStatus { one } => self.work.status(cookie, offset, len, one),
            Command::Read { .. } if len == 0 => {
                reply::no_data(&mut self.output, self.terms.structured, cookie);
            }
            _ if len == 0 => reply::done(&mut self.output, cookie),
            Command::Read { whole } => {
                let reading = Reading { cookie, offset, end: offset + u64::from(len) };
                if whole { self.read_whole(reading, len as usize) } else { self.read_piece(reading) }
            }
            Command::Trim => self.work.change(cookie, Change::Trim, offset, len, fua),
            Command::Cache => self.work.change(cookie, Change::Cache, offset, len, fua),
            Command::WriteZeroes { no_hole, fast_only } => {
                let how = Zeroing { may_punch: !no_hole, fast_only };
                self.work.change(cookie, Change::Zero(how), offset, len, fua);
            }
        }
    }

    /// Skips what has arrived of a refused request's payload, and answers at its end.
    fn skip_piece(&mut self) -> bool {
        let Some(skipping) = &mut self.skipping else { return false };
        let skipped = skipping.left.min(self.input.len());
        self.input.consume(skipped);
        skipping.left -= skipped;
        if skipping.left > 0 {
            return false;
        }
        let (cookie, problem) = (skipping.cookie, skipping.problem);
        self.skipping = None;
        reply::error(&mut self.output, self.terms.structured, cookie, errno(problem), problem.message());
        true
    }

    /// Answers with an export's failure.
    fn refuse(&mut self, cookie: u64, error: &ExportError) {
        let number = errno(Problem::Export(error.kind));
        reply::error(&mut self.output, self.terms.structured, cookie, number, &error.message);
    }

    fn on_outcome(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Read(reading, Ok(data)) => self.on_read(reading, data),
            Outcome::Read(Reading { cookie, .. }, Err(error)) => self.refuse(cookie, &error),
            Outcome::Done(cookie, Ok(())) => reply::done(&mut self.output, cookie),
            Outcome::Done(cookie, Err(error)) => self.refuse(cookie, &error),
            Outcome::Part(write, result) => self.on_part(write, result),
            Outcome::Status { cookie, len, one, result } => self.on_status(cookie, len, one, result),
        }
    }

    fn on_status(
        &mut self,
        cookie: u64,
        len: u32,
        one: bool,
        result: Result<Vec<crate::BlockExtent>, ExportError>,
    ) {
        let described = result.map(|extents| status::describe(&extents, len, one));
        match described {
            Ok(extents) if !extents.is_empty() => reply::block_status(&mut self.output, cookie, &extents),
            Ok(_) => self
                .refuse(cookie, &ExportError::new(ErrorKind::Io, "the export does not know its allocation")),
            Err(error) => self.refuse(cookie, &error),
        }
    }
}
