//! The orderly end: requests finish, the head is synced, the session is given back.

use csnap_proto::RequestId;
use csnap_proto::message::operate::Refusal;
use csnap_proto::message::volume::ToServer;

use super::syncs::SyncFor;
use super::{ClientCore, IoFor, IoOp, Output, Pending, RequestKey};

#[derive(Clone, Copy, Debug)]
pub(super) enum Releasing {
    No,
    /// Requests that came before it finish.
    Finishing(RequestKey),
    Syncing(RequestKey),
    /// To be sent, or sent with this id on this connection.
    Asking(RequestKey, Option<RequestId>),
    /// The session is gone.
    Gone(RequestKey),
    Done,
}

impl Releasing {
    pub(super) fn begun(self) -> bool {
        !matches!(self, Self::No)
    }

    pub(super) fn on_synced(&mut self) {
        if let Self::Syncing(key) = *self {
            *self = Self::Asking(key, None);
        }
    }

    pub(super) fn on_broken(&mut self) {
        if let Self::Asking(key, _) = *self {
            *self = Self::Asking(key, None);
        }
    }

    pub(super) fn on_released(&mut self, id: RequestId) {
        if let Self::Asking(key, Some(sent)) = *self
            && sent == id
        {
            *self = Self::Gone(key);
        }
    }

    /// A release cannot be refused but by a server that does not know the session: it is gone. `false` if `id` is not it.
    pub(super) fn on_refused(&mut self, id: RequestId, _: &Refusal) -> bool {
        self.on_released(id);
        matches!(self, Self::Gone(_))
    }
}

impl ClientCore {
    pub(super) fn begin_release(&mut self, key: RequestKey) {
        self.requests.insert(key, Pending::Release);
        self.release = Releasing::Finishing(key);
    }

    pub(super) fn go_on_releasing(&mut self, out: &mut Vec<Output>) {
        if let Releasing::Finishing(key) = self.release
            && self.requests.len() == 1
            && self.nothing_in_flight()
        {
            let dirty = self.is_writer() && self.attached.is_some() && self.end.is_none();
            self.release = if dirty {
                self.start_io(IoFor::Sync(SyncFor::Release), IoOp::HeadSync, out);
                Releasing::Syncing(key)
            } else {
                Releasing::Asking(key, None)
            };
        }
        if let Releasing::Asking(key, None) = self.release {
            if self.link.is_closed() {
                self.release = Releasing::Gone(key);
            } else if let Some(id) = self.send(ToServer::Release, out) {
                self.release = Releasing::Asking(key, Some(id));
            }
        }
        if let Releasing::Gone(key) = self.release {
            self.release = Releasing::Done;
            self.close("released", out);
            self.complete(key, Ok(()), out);
        }
    }
}
