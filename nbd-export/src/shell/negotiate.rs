//! One connection until it has its export: drives the negotiation, asks the exports, keeps the time.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::listen::Stream;
use crate::core::handshake::{Answer, Ask, Close, Handshake, Progress};
use crate::core::limits::HANDSHAKE_TIME_MAX;
use crate::core::request::Terms;
use crate::core::window::Window;
use crate::export::{ExportInfo, Exports};

/// Why a connection has no export.
#[derive(Debug, thiserror::Error)]
pub enum NegotiateError {
    /// Decided by the protocol.
    #[error(transparent)]
    Closed(#[from] Close),
    /// The client was too slow.
    #[error("the client took longer than {HANDSHAKE_TIME_MAX:?} for its handshake")]
    TimedOut,
    /// The exporter ends.
    #[error("shut down during the handshake")]
    ShutDown,
    /// The client went away.
    #[error("the client went away during the handshake: {0}")]
    Gone(#[from] io::Error),
}

/// An attached connection.
pub struct Attached<E> {
    /// What was negotiated.
    pub terms: Terms,
    /// What the export is.
    pub info: ExportInfo,
    /// The export; to be released by the caller.
    pub export: Arc<E>,
}

/// Negotiates on `stream`, until `shutdown` turns true. What arrives beyond the negotiation stays in `input`.
pub async fn negotiate<X: Exports>(
    stream: &mut impl Stream,
    input: &mut Window,
    exports: &X,
    shutdown: &mut watch::Receiver<bool>,
) -> Result<Attached<X::Export>, NegotiateError> {
    let mut opened = None;
    let result = tokio::select! {
        result = converse(stream, input, exports, &mut opened) => result,
        _ = shutdown.wait_for(|&down| down) => Err(NegotiateError::ShutDown),
    };
    match (result, opened) {
        (Ok(terms), Some((info, export))) => Ok(Attached { terms, info, export }),
        (Ok(_), None) => unreachable!("attached without an export"),
        (Err(why), opened) => {
            if let Some((_, export)) = opened {
                exports.release(export).await;
            }
            Err(why)
        }
    }
}

async fn converse<X: Exports>(
    stream: &mut impl Stream,
    input: &mut Window,
    exports: &X,
    opened: &mut Option<(ExportInfo, Arc<X::Export>)>,
) -> Result<Terms, NegotiateError> {
    let mut patience = Patience(HANDSHAKE_TIME_MAX);
    let mut out = Vec::new();
    let mut machine = Handshake::new(&mut out);
    let mut progress = Progress::NeedInput;
    loop {
        patience.wait_for(stream.write_all(&out)).await?;
        out.clear();
        progress = match progress {
            Progress::NeedInput => {
                patience.wait_for(arrival(stream, input)).await?;
                advance(&mut machine, input, &mut out)
            }
            Progress::Ask(ask) => {
                let answer = tokio::select! {
                    biased;
                    answer = answer(exports, ask, opened) => answer,
                    gone = hang_up(stream, input) => return Err(gone.into()),
                };
                match machine.answer(answer, &mut out) {
                    Progress::NeedInput => advance(&mut machine, input, &mut out),
                    progress => progress,
                }
            }
            Progress::Attached(terms) => return Ok(terms),
            Progress::Close(why) => return Err(why.into()),
        };
    }
}

/// How long the client may still keep us waiting.
struct Patience(Duration);

impl Patience {
    async fn wait_for(&mut self, what: impl Future<Output = io::Result<()>>) -> Result<(), NegotiateError> {
        let begun = Instant::now();
        let done = timeout(self.0, what).await.map_err(|_| NegotiateError::TimedOut)?;
        self.0 = self.0.saturating_sub(begun.elapsed());
        Ok(done?)
    }
}

fn advance(machine: &mut Handshake, input: &mut Window, out: &mut Vec<u8>) -> Progress {
    let mut rest = input.filled();
    let before = rest.len();
    let progress = machine.advance(&mut rest, out);
    let taken = before - rest.len();
    input.consume(taken);
    progress
}

async fn answer<X: Exports>(
    exports: &X,
    ask: Ask,
    opened: &mut Option<(ExportInfo, Arc<X::Export>)>,
) -> Answer {
    match ask {
        Ask::List => Answer::List(exports.list().await),
        Ask::Info(name) => Answer::Export(exports.info(&name).await),
        Ask::Open(name) => Answer::Export(exports.open(&name).await.map(|(info, export)| {
            *opened = Some((info.clone(), export));
            info
        })),
    }
}

/// Waits until something arrives.
async fn arrival(stream: &mut impl Stream, input: &mut Window) -> io::Result<()> {
    // What waits for more is one incomplete option, so there is always room.
    let count = stream.read(input.free(input.room())).await?;
    input.commit(count);
    if count == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

/// Ends when the client is gone; what it sends meanwhile is kept. Cannot tell once the input is full.
async fn hang_up(stream: &mut impl Stream, input: &mut Window) -> io::Error {
    while input.room() > 0 {
        match stream.read(input.free(1)).await {
            Ok(0) => return io::ErrorKind::UnexpectedEof.into(),
            Ok(count) => input.commit(count),
            Err(error) => return error,
        }
    }
    std::future::pending().await
}
