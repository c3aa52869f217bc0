//! Accepts connections, bounds their number, ends them in order.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use csnap_proto::Descriptors;
use rustix::process::{Resource, getrlimit};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::connection::{Connection, End};
use super::listen::{Accepted, Listener, Stream};
use super::negotiate::{NegotiateError, negotiate};
use crate::core::handshake::Close;
use crate::core::limits::{CONNECTIONS_MAX, HANDSHAKE_INPUT_BYTES, SHUTDOWN_TIME_MAX};
use crate::core::window::Window;
use crate::export::Exports;

/// Pause after a failed accept: out of descriptors, most likely, which ends when a connection does.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves `exports` on every listener until `shutdown` is done; then finishes what clients were promised and returns.
pub async fn serve<X: Exports>(
    listeners: Vec<Listener>,
    exports: Arc<X>,
    shutdown: impl Future<Output = ()>,
) {
    let (stop, stopped) = watch::channel(false);
    let most = Descriptors::new(getrlimit(Resource::Nofile).current).connections(CONNECTIONS_MAX);
    let slots = Arc::new(Semaphore::new(most));
    let mut loops = JoinSet::new();
    for listener in listeners {
        loops.spawn(accept(listener, Arc::clone(&exports), Arc::clone(&slots), stopped.clone()));
    }
    shutdown.await;
    // Every loop holds a receiver until it has ended.
    let _ = stop.send(true);
    // What cannot be finished (nobody serves, say) is left behind; it was never promised.
    let _ = timeout(SHUTDOWN_TIME_MAX, async { while loops.join_next().await.is_some() {} }).await;
}

/// Accepts at one listener until told to stop, then waits for its connections.
async fn accept<X: Exports>(
    listener: Listener,
    exports: Arc<X>,
    slots: Arc<Semaphore>,
    mut stopped: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            _ = stopped.wait_for(|&stop| stop) => break,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) if is_of_one_connection(&error) => continue,
            Err(error) => {
                warn!(%error, "cannot accept a connection, trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            warn!("connection refused: there are too many already");
            continue;
        };
        let (exports, stopped) = (Arc::clone(&exports), stopped.clone());
        connections.spawn(async move {
            match stream {
                Accepted::Unix(stream) => serve_one(stream, &*exports, stopped).await,
                Accepted::Tcp(stream) => serve_one(stream, &*exports, stopped).await,
            }
            drop(slot);
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Whether a failure to accept concerns only the connection that was to be accepted.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
}

/// One connection from greeting to end.
pub async fn serve_one<X: Exports>(mut stream: impl Stream, exports: &X, mut stopped: watch::Receiver<bool>) {
    let mut input = Window::new(HANDSHAKE_INPUT_BYTES);
    let attached = match negotiate(&mut stream, &mut input, exports, &mut stopped).await {
        Ok(attached) => attached,
        Err(why @ (NegotiateError::Closed(Close::Violation(_)) | NegotiateError::TimedOut)) => {
            return warn!("connection closed: {why}");
        }
        Err(why) => return debug!("connection closed: {why}"),
    };
    let name = attached.info.name;
    info!(export = name, structured = attached.terms.structured, "attached");
    let connection = Connection::new(stream, attached.terms, Arc::clone(&attached.export), input.filled());
    drop(input);
    let end = connection.run(&mut stopped).await;
    exports.release(attached.export).await;
    match end {
        End::Violation(_) | End::Inside(_) => warn!(export = name, "connection closed: {end}"),
        _ => info!(export = name, "connection closed: {end}"),
    }
}
