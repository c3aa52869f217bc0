//! How connections come in: one at a time through a door, until it is known who they are.
//!
//! Whoever connects is a stranger until TLS, or the machine, said who they are and the first words were exchanged. That has
//! [`HANDSHAKE_WITHIN`], a bounded number of bytes, and one of a bounded number of places, in which strangers only push out
//! strangers. Whoever is through is beyond the reach of those behind.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use csnap_proto::Caller;
use csnap_transport::{Source, Strangers, Stream, Ticket, Tls, unix};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::warn;

use super::socket;

/// Who connected has so long to prove who they are and to say the first words. A handshake takes milliseconds.
pub(super) const HANDSHAKE_WITHIN: Duration = Duration::from_secs(2);

/// Between two attempts to accept when the process is out of descriptors or memory.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Lines a second about strangers who did not come in: enough to see what is wrong, too few to fill a disk.
const COMPLAINTS_PER_SECOND_MAX: u32 = 10;

/// Where they come in.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(unix::Listener),
}

/// Somebody who came in.
pub(super) struct Guest {
    pub(super) stream: Stream,
    pub(super) caller: Caller,
    /// For the log.
    pub(super) from: String,
}

/// Of one port, or of several with the same strangers. Clones are the same door.
#[derive(Clone, Default)]
pub(super) struct Door {
    tls: Option<Tls>,
    hall: Rc<RefCell<Hall>>,
    complaints: Rc<RefCell<Complaints>>,
}

/// Who is half-way in.
#[derive(Default)]
struct Hall {
    strangers: Strangers,
    tasks: BTreeMap<Ticket, AbortHandle>,
}

/// A stranger's place; given back when dropped.
struct Place {
    hall: Rc<RefCell<Hall>>,
    ticket: Ticket,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut hall = self.hall.borrow_mut();
        hall.strangers.leave(self.ticket);
        hall.tasks.remove(&self.ticket);
    }
}

/// Somebody who just connected.
enum Arrival {
    Tcp(TcpStream),
    /// With who it is for the log, or why not.
    Unix(UnixStream, Result<String, String>),
}

impl Door {
    pub(super) fn new(tls: Option<Tls>) -> Self {
        Self { tls, ..Self::default() }
    }

    /// Lets strangers in for ever: each is admitted, greeted, and, if that went well, taken in.
    pub(super) async fn open<T: 'static>(
        self,
        listener: Listener,
        greet: impl AsyncFn(&mut Stream, &Caller) -> Result<T, String> + Clone + 'static,
        take_in: impl AsyncFn(Guest, T) + Clone + 'static,
    ) {
        loop {
            let (arrival, source, from) = match arrive(&listener).await {
                Ok(arrived) => arrived,
                Err(error) => {
                    warn!("cannot accept connections: {error}");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                    continue;
                }
            };
            let place = self.enter(source);
            let ticket = place.ticket;
            let (door, greet, take_in) = (self.clone(), greet.clone(), take_in.clone());
            let task = tokio::task::spawn_local(async move {
                let handshake = async {
                    let mut guest = door.admit(arrival, &from).await?;
                    let said = greet(&mut guest.stream, &guest.caller).await?;
                    Ok::<_, String>((guest, said))
                };
                let in_time = tokio::time::timeout(HANDSHAKE_WITHIN, handshake).await;
                drop(place);
                match in_time.unwrap_or_else(|_| Err("it did not say who it is in time".to_owned())) {
                    Ok((guest, said)) => take_in(guest, said).await,
                    Err(why) => door.complain(&from, &why),
                }
            });
            // The task has not run yet, so it has not left yet.
            self.hall.borrow_mut().tasks.insert(ticket, task.abort_handle());
        }
    }

    fn enter(&self, source: Source) -> Place {
        let mut hall = self.hall.borrow_mut();
        let (ticket, victim) = hall.strangers.enter(source);
        let victim = victim.and_then(|victim| hall.tasks.remove(&victim));
        if let Some(task) = victim {
            task.abort();
            self.complain("strangers", "too many at once, the oldest had to go");
        }
        Place { hall: Rc::clone(&self.hall), ticket }
    }

    /// Finds out who it is.
    async fn admit(&self, arrival: Arrival, from: &str) -> Result<Guest, String> {
        match (arrival, &self.tls) {
            (Arrival::Unix(stream, who), _) => {
                let from = who?;
                Ok(Guest { stream: Stream::Unix(stream), caller: Caller::local(), from })
            }
            (Arrival::Tcp(stream), Some(tls)) => {
                let (stream, caller) = tls.accept(stream).await?;
                let from = format!("{caller} at {from}");
                Ok(Guest { stream, caller, from })
            }
            // We listen without TLS on this machine only.
            (Arrival::Tcp(stream), None) => {
                Ok(Guest { stream: Stream::Tcp(stream), caller: Caller::local(), from: from.to_owned() })
            }
        }
    }

    /// Says in the log what is wrong with somebody, unless too much was said already.
    pub(super) fn complain(&self, from: &str, why: &str) {
        let (unsaid, says) = self.complaints.borrow_mut().next();
        if unsaid > 0 {
            warn!("{unsaid} more were refused");
        }
        if says {
            warn!("{from}: {why}");
        }
    }
}

async fn arrive(listener: &Listener) -> io::Result<(Arrival, Source, String)> {
    match listener {
        Listener::Tcp(listener) => {
            let (stream, from) = listener.accept().await?;
            socket::tune(&stream)?;
            Ok((Arrival::Tcp(stream), from.ip().into(), from.to_string()))
        }
        Listener::Unix(listener) => {
            let (stream, who) = listener.accept().await?;
            Ok((Arrival::Unix(stream, who), Source::Local, "unix socket".to_owned()))
        }
    }
}

/// What was said of strangers lately.
#[derive(Default)]
struct Complaints {
    since: Option<Instant>,
    count: u32,
}

impl Complaints {
    /// How many were not said in the last second, if it is over, and whether one more is.
    fn next(&mut self) -> (u32, bool) {
        let over = self.since.is_none_or(|since| since.elapsed() >= Duration::from_secs(1));
        let unsaid = if over { self.count.saturating_sub(COMPLAINTS_PER_SECOND_MAX) } else { 0 };
        if over {
            *self = Self { since: Some(Instant::now()), count: 0 };
        }
        self.count = self.count.saturating_add(1);
        (unsaid, self.count <= COMPLAINTS_PER_SECOND_MAX)
    }
}
