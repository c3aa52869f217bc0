//! Connections come and go; the session stays. Identify on each, resend what is unanswered, keep the server believing that
//! we live, and notice when it does not.
//!
//! Invariants: at most one connection counts; frames of any other, and of any term but that connection's, change nothing;
//! the newest identified term only grows.

use std::time::Duration;

use csnap_proto::limits::VOLUME_BYTES_MAX;
use csnap_proto::message::operate::{Refusal, RefusalKind};
use csnap_proto::message::volume::{Forget, FromServer, Identify, IdentifyOk, ToServer};
use csnap_proto::{Epoch, Frame, RequestId, Term, Time};

use super::{Attached, ClientCore, ConnId, Fast, Output, RequestError};

/// Before a lease is known, an Identify that is not answered for this long is taken for a dead server: half of the
/// default lease.
const IDENTIFY_PATIENCE: Duration = Duration::from_millis(7_500);

/// Pause before asking for a server again when the last one hung up or refused before it identified: a standby closes
/// connections at once, and asking in a loop would not make it serve sooner.
const PAUSE: Duration = Duration::from_millis(20);

/// What readers of a snapshot are told.
const SNAPSHOT_GONE: &str = "the snapshot was deleted by force";

/// Bounds on the lease that a server may tell.
const LEASE_MIN: Duration = Duration::from_millis(100);
const LEASE_MAX: Duration = Duration::from_secs(600);

/// Every read fails with it.
pub(super) fn snapshot_gone() -> RequestError {
    RequestError::Lost(SNAPSHOT_GONE.to_owned())
}

/// The connection that counts.
#[derive(Clone, Copy, Debug)]
pub(super) enum Link {
    /// Nothing asked for yet.
    New,
    /// A server is asked for.
    Wanted,
    /// A server is to be asked for after a pause.
    Pause { until: Time, suspect: Term },
    /// Identify is sent.
    Identifying { conn: ConnId, term: Term, id: RequestId, deadline: Time },
    /// Usual state.
    Ready { conn: ConnId, term: Term },
    /// No connection is wanted any more.
    Closed,
}

/// Liveness of the identified connection.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Renewal {
    /// When to send the next one.
    next: Time,
    /// The one that is not answered, and since when.
    unanswered: Option<(RequestId, Time)>,
}

impl Link {
    pub(super) fn ready(self) -> Option<(ConnId, Term)> {
        match self {
            Self::Ready { conn, term } => Some((conn, term)),
            _ => None,
        }
    }

    fn conn(self) -> Option<(ConnId, Term)> {
        match self {
            Self::Identifying { conn, term, .. } | Self::Ready { conn, term } => Some((conn, term)),
            _ => None,
        }
    }

    pub(super) fn is_closed(self) -> bool {
        matches!(self, Self::Closed)
    }

    pub(super) fn waiting(self) -> Option<&'static str> {
        match self {
            Self::New | Self::Wanted | Self::Pause { .. } => {
                Some("no server answers; waiting for one to serve")
            }
            Self::Identifying { .. } => Some("connected, waiting for the server to accept the session"),
            Self::Ready { .. } | Self::Closed => None,
        }
    }
}

impl ClientCore {
    pub(super) fn link_deadline(&self) -> Option<Time> {
        match self.link {
            Link::New => Some(Time(0)),
            Link::Wanted | Link::Closed => None,
            Link::Pause { until, .. } => Some(until),
            Link::Identifying { deadline, .. } => Some(deadline),
            Link::Ready { .. } => Some(match self.renewal.unanswered {
                Some((_, since)) => since.after(self.lease() / 2),
                None => self.renewal.next,
            }),
        }
    }

    fn lease(&self) -> Duration {
        self.attached.as_ref().map_or(IDENTIFY_PATIENCE * 2, |attached| attached.lease)
    }

    pub(super) fn on_time(&mut self, now: Time, out: &mut Vec<Output>) {
        if self.link_deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        match self.link {
            Link::New => self.want_server(Term(0), out),
            Link::Pause { suspect, .. } => self.want_server(suspect, out),
            Link::Identifying { conn, term, .. } => {
                out.push(Output::Disconnect { conn, why: "the server does not answer an Identify" });
                self.want_server(term, out);
            }
            Link::Ready { conn, term } if self.renewal.unanswered.is_some() => {
                out.push(Output::Disconnect { conn, why: "a Renew is unanswered for half a lease" });
                self.want_server(term, out);
                self.on_broken(out);
            }
            Link::Ready { .. } => self.renew(now, out),
            Link::Wanted | Link::Closed => {}
        }
    }

    fn want_server(&mut self, suspect: Term, out: &mut Vec<Output>) {
        self.link = Link::Wanted;
        out.push(Output::NeedServer { suspect });
    }

    fn renew(&mut self, now: Time, out: &mut Vec<Output>) {
        let forgotten = self.forgets.confirmed();
        let id = self.send(ToServer::Renew { forgotten }, out).expect("only an identified connection renews");
        self.renewal = Renewal { next: now.after(self.lease() / 5), unanswered: Some((id, now)) };
    }

    pub(super) fn on_connected(&mut self, now: Time, conn: ConnId, term: Term, out: &mut Vec<Output>) {
        if let Link::Closed = self.link {
            out.push(Output::Disconnect { conn, why: "no server is needed any more" });
            return;
        }
        if let Some((old, old_term)) = self.link.conn() {
            if term <= old_term {
                out.push(Output::Disconnect { conn, why: "there is a connection already" });
                return;
            }
            out.push(Output::Disconnect { conn: old, why: "a newer server serves" });
            self.on_broken(out);
        }
        let identify = Identify {
            session: self.config.session,
            secret: self.config.secret,
            instance: self.config.instance,
            node: self.config.node.clone(),
            pid: self.config.pid,
            attach: self.config.attach.clone(),
            cached_epoch: self.epoch(),
        };
        let frame = self.frame(ToServer::Identify(identify));
        let deadline = now.after(self.lease() / 2);
        self.link = Link::Identifying { conn, term, id: frame.id, deadline };
        out.push(Output::Send { conn, frame });
    }

    pub(super) fn on_disconnected(&mut self, now: Time, conn: ConnId, out: &mut Vec<Output>) {
        match self.link {
            Link::Ready { conn: mine, term } if mine == conn => {
                self.want_server(term, out);
                self.on_broken(out);
            }
            Link::Identifying { conn: mine, term, .. } if mine == conn => self.pause(now, term),
            _ => {}
        }
    }

    /// A newer server than ours serves: it alone can answer.
    pub(super) fn on_server_serves(&mut self, term: Term, out: &mut Vec<Output>) {
        let Some((conn, mine)) = self.link.conn().filter(|(_, mine)| *mine < term) else { return };
        out.push(Output::Disconnect { conn, why: "a newer server serves" });
        self.want_server(mine, out);
        self.on_broken(out);
    }

    /// The identified connection is no more: everything unanswered is to be asked again on the next one.
    fn on_broken(&mut self, out: &mut Vec<Output>) {
        self.renewal.unanswered = None;
        self.ask_writes_again();
        self.on_reads_broken(out);
        self.on_drain_broken();
        self.release.on_broken();
    }

    fn pause(&mut self, now: Time, suspect: Term) {
        self.link = Link::Pause { until: now.after(PAUSE), suspect };
    }

    /// Ends a connection whose peer does not keep to the protocol.
    pub(super) fn break_off(&mut self, now: Time, why: &'static str, out: &mut Vec<Output>) {
        let Some((conn, term)) = self.link.conn() else { return };
        out.push(Output::Disconnect { conn, why });
        self.pause(now, term);
        self.on_broken(out);
    }

    pub(super) fn on_frame(
        &mut self,
        now: Time,
        conn: ConnId,
        frame: Frame<FromServer>,
        out: &mut Vec<Output>,
    ) {
        match self.link {
            Link::Ready { conn: mine, term } if mine == conn => {
                if frame.term != term {
                    return;
                }
                *self.messages.entry(frame.message.name()).or_default() += 1;
                self.on_message(now, frame, out);
            }
            Link::Identifying { conn: mine, id, .. } if mine == conn => {
                *self.messages.entry(frame.message.name()).or_default() += 1;
                match frame.message {
                    _ if frame.term < self.term => self.break_off(now, "a server of an older term", out),
                    FromServer::IdentifyOk(ok) if frame.id == id => {
                        self.on_identified(now, conn, frame.term, ok, out);
                    }
                    FromServer::Refused(refusal) if frame.id == id => {
                        self.on_identify_refused(now, refusal, out);
                    }
                    _ => self.break_off(now, "an answer before the session is identified", out),
                }
            }
            _ => {}
        }
    }

    fn on_identified(&mut self, now: Time, conn: ConnId, term: Term, ok: IdentifyOk, out: &mut Vec<Output>) {
        let lease = Duration::from_millis(ok.lease_ms).clamp(LEASE_MIN, LEASE_MAX);
        let Some(geometry) = ok.geometry else {
            return self.on_identified_without_snapshot(now, conn, term, lease, out);
        };
        if geometry.size_bytes > VOLUME_BYTES_MAX {
            return self.break_off(now, "a volume beyond the largest size", out);
        }
        match &mut self.attached {
            Some(attached) => {
                let known = &attached.geometry;
                let same = (known.volume, known.snapshot, known.chunk)
                    == (geometry.volume, geometry.snapshot, geometry.chunk);
                if !same {
                    return self.break_off(now, "the session has another volume", out);
                }
                attached.lease = lease;
            }
            None => {
                self.attached = Some(Attached { geometry: geometry.clone(), epoch: ok.epoch, lease });
                out.push(Output::Attached { geometry, epoch: ok.epoch });
            }
        }
        self.be_ready(now, conn, term, lease);
        if ok.advice_follows {
            self.await_advice();
        }
        self.enter_epoch(ok.epoch, ok.all_unique);
        if !ok.advice_follows {
            self.open_writes();
        }
    }

    fn be_ready(&mut self, now: Time, conn: ConnId, term: Term, lease: Duration) {
        self.term = term;
        self.link = Link::Ready { conn, term };
        self.renewal = Renewal { next: now.after(lease / 5), unanswered: None };
    }

    /// The session lives, its snapshot was deleted by force. The connection is kept until the release: the server reuses
    /// the snapshot's space when it hears in a Renew, or by the Release, that no read of it is in flight.
    fn on_identified_without_snapshot(
        &mut self,
        now: Time,
        conn: ConnId,
        term: Term,
        lease: Duration,
        out: &mut Vec<Output>,
    ) {
        if self.is_writer() {
            return self.break_off(now, "a session without a volume", out);
        }
        self.be_ready(now, conn, term, lease);
        let error = match &self.attached {
            Some(_) => snapshot_gone(),
            None => RequestError::Refused(Refusal::new(RefusalKind::Gone, SNAPSHOT_GONE)),
        };
        self.fail(error, out);
    }

    /// Everything known of the old epoch goes when another one began.
    pub(super) fn enter_epoch(&mut self, epoch: Epoch, all_unique: bool) {
        let attached = self.attached.as_mut().expect("epochs begin after the attachment");
        let same = attached.epoch == epoch;
        attached.epoch = epoch;
        if !same {
            self.forget_unique();
        }
        self.all_unique |= all_unique && self.is_writer();
    }

    fn on_identify_refused(&mut self, now: Time, refusal: Refusal, out: &mut Vec<Output>) {
        let gone = matches!(refusal.kind, RefusalKind::NotFound | RefusalKind::Gone | RefusalKind::Denied);
        if self.attached.is_some() && !gone {
            return self.break_off(now, "the server does not take the session back yet", out);
        }
        let error = match &self.attached {
            Some(_) => RequestError::Lost(refusal.reason),
            None => RequestError::Refused(refusal),
        };
        self.close("refused by the server", out);
        self.fail(error, out);
    }

    /// No connection is wanted from now on.
    pub(super) fn close(&mut self, why: &'static str, out: &mut Vec<Output>) {
        if let Some((conn, _)) = self.link.conn() {
            out.push(Output::Disconnect { conn, why });
        }
        self.link = Link::Closed;
    }

    pub(super) fn on_renewed(
        &mut self,
        now: Time,
        id: RequestId,
        forget: &[Forget],
        all_unique: bool,
        epoch: Epoch,
        out: &mut Vec<Output>,
    ) {
        if self.renewal.unanswered.take_if(|(sent, _)| *sent == id).is_none() {
            return self.break_off(now, "a Renewed that nobody asked for", out);
        }
        self.forgets.on_forget(forget, &self.ios);
        if all_unique && self.is_writer() && self.may_take_grants() && self.epoch() == Some(epoch) {
            self.all_unique = true;
            self.writes.look_again = true;
        }
    }

    pub(super) fn on_refused(&mut self, now: Time, id: RequestId, refusal: Refusal, out: &mut Vec<Output>) {
        if self.on_query_refused(now, id, &refusal, out)
            || self.on_read_refused(now, id, &refusal, out)
            || self.release.on_refused(id, &refusal)
        {
            return;
        }
        self.break_off(now, "a refusal of something that cannot be refused", out);
    }

    /// Whether writes may be issued at all; uniqueness comes on top.
    pub(super) fn may_issue(&self) -> bool {
        self.end.is_none() && self.is_writer() && self.stop.issues()
    }

    /// Whether the shell was told to stop and has reported that nothing is in flight, and neither is anything of ours.
    pub(super) fn nothing_in_flight(&self) -> bool {
        self.fast == Fast::Closed && self.writes.in_flight == 0
    }
}
