//! Lockspaces, as those see them who ask: operators, the group that one comes from, and clients of one that moves.
//!
//! Of a frozen lockspace clients are told what it was when it was frozen, and that their renewals count; what they ask
//! for is not taken in, so nothing is held for them here, and their own resend brings it to where the lockspace goes on.

use csnap_proto::message::lock::{FromLockd, SpaceReply, SpaceRequest};
use csnap_proto::{Name, Time};

use super::{Attendance, Attendee, Lockd, Origin, Output, send};
use crate::core::connection::Role;
use crate::core::spaces::canary::Canary;
use crate::core::spaces::{Command, Effect, SpaceId, State};

/// Requests about lockspaces on their way to the log: a few windows of pieces of one that comes.
const SPACE_REQUESTS_MAX: usize = 64;

impl Lockd {
    /// Every session of a lockspace that is here is attended to; its lease runs if the lockspace is served.
    pub(super) fn attend_all(&mut self, now: Time, space: SpaceId) {
        let Some(table) = self.spaces.table(space) else { return };
        let active = self.spaces.is_active(space);
        for (session, lease_ms) in table.leases() {
            let attendee = Attendee { space, session };
            if active {
                self.leases.start(now, attendee, lease_ms);
            }
            let view = table.view(session).expect("listed just now");
            let forgetting = table.forgotten(session).expect("listed just now");
            self.attendance.insert(attendee, Attendance::new(view.last_sequence, forgetting));
        }
    }

    /// Whether the lockspace takes operations in.
    pub(super) fn takes_operations(&self, space: SpaceId) -> bool {
        let early = self.spaces.broken().breaks(Canary::ApplyWhileFrozen);
        self.spaces.is_active(space) || (early && self.spaces.table(space).is_some())
    }

    pub(super) fn on_enter(&mut self, origin: Origin, name: &Name, out: &mut Vec<Output>) {
        match self.spaces.find(name) {
            Some(space) => self.connections.enter(origin.connection, space),
            None => self.refuse(origin, &format!("there is no lockspace {name} here"), out),
        }
    }

    /// A stranger who is about to open or resume a session where none is served is sent on, or told to come again. Whether
    /// that is so.
    pub(super) fn send_on(&mut self, origin: Origin, space: SpaceId, out: &mut Vec<Output>) -> bool {
        let Some(state) = self.spaces.get(space) else {
            self.close(origin.connection, "the lockspace is gone", out);
            return true;
        };
        if let Some(to) = state.moved_to() {
            send(origin, FromLockd::Moved { to: to.to_vec() }, out);
            self.close(origin.connection, "the lockspace moved to another group", out);
        } else if state.table().is_none() {
            self.close(origin.connection, "the lockspace is on its way here, come again", out);
        } else {
            return false;
        }
        true
    }

    pub(super) fn on_space_request(
        &mut self,
        now: Time,
        origin: Origin,
        request: SpaceRequest,
        out: &mut Vec<Output>,
    ) {
        self.connections.stay(now, origin.connection);
        let command = match self.command_of(request) {
            Ok(Some(command)) => command,
            Ok(None) => {
                let spaces = SpaceReply::Spaces(self.spaces.view());
                return send(origin, FromLockd::Space(spaces), out);
            }
            Err(reason) => return send(origin, FromLockd::Space(SpaceReply::Refused { reason }), out),
        };
        if self.space_requests >= SPACE_REQUESTS_MAX {
            return self.close(origin.connection, "asks more about lockspaces than is answered", out);
        }
        self.space_requests += 1;
        self.propose(command, Some(origin), out);
    }

    /// What a request becomes in the log; nothing where it only looks.
    fn command_of(&self, request: SpaceRequest) -> Result<Option<Command>, String> {
        let find = |name: &Name| self.spaces.find(name).ok_or(format!("there is no lockspace {name} here"));
        Ok(Some(match request {
            SpaceRequest::List => return Ok(None),
            SpaceRequest::Create { name } => Command::Create { name },
            SpaceRequest::Migrate { name, way } => Command::Freeze { space: find(&name)?, way },
            SpaceRequest::Abort { name } => {
                let space = find(&name)?;
                match self.spaces.get(space).map(crate::core::spaces::Space::state) {
                    Some(State::Frozen { way, .. } | State::Forwarded { way, .. }) => {
                        let why = "an operator gave it up".to_owned();
                        Command::Thaw { space, migration: way.migration, why }
                    }
                    _ => return Err(format!("lockspace {name} is not on its way from here")),
                }
            }
            SpaceRequest::Import { name, migration, manifest, offset, bytes } => {
                Command::Import { name, migration, manifest, offset, bytes }
            }
            SpaceRequest::Activate { name, migration } => Command::Activate { name, migration },
            SpaceRequest::Discard { name, migration } => Command::Discard { name, migration },
        }))
    }

    /// What becomes of the clients of a lockspace whose state changed, and of who asked.
    pub(super) fn release_of_spaces(
        &mut self,
        now: Time,
        effect: Effect,
        origin: Option<Origin>,
        out: &mut Vec<Output>,
    ) {
        match effect {
            Effect::In(..) => unreachable!("the caller releases those"),
            Effect::Dropped(space) => self.on_dropped(space, origin, out),
            Effect::Frozen(space) => self.on_frozen(space, out),
            Effect::Thawed(space) => self.on_thawed(now, space, out),
            Effect::Forwarded(space) => self.on_forwarded(space, out),
            Effect::Activated(space) => {
                self.attend_all(now, space);
                if self.spaces.broken().breaks(Canary::ShortenLeases) {
                    self.shorten_leases(now, space);
                }
            }
            Effect::Answer(reply) => {
                if let Some(origin) = origin {
                    self.space_requests = self.space_requests.saturating_sub(1);
                    send(origin, FromLockd::Space(reply), out);
                }
            }
        }
    }

    fn shorten_leases(&mut self, now: Time, space: SpaceId) {
        let Some(table) = self.spaces.table(space) else { return };
        for (session, lease_ms) in table.leases() {
            self.leases.start(now, Attendee { space, session }, lease_ms / 8);
        }
    }

    /// Operations are asked again by their owners; who wanted a session is told at once.
    fn on_dropped(&mut self, space: SpaceId, origin: Option<Origin>, out: &mut Vec<Output>) {
        let opening = |origin: &Origin| self.connections.role(origin.connection) == Some(Role::Opening);
        if let Some(origin) = origin.filter(opening)
            && !self.send_on(origin, space, out)
        {
            self.close(origin.connection, "the lockspace is being moved, come again", out);
        }
    }

    fn attendees(&self, space: SpaceId) -> Vec<Attendee> {
        self.attendance.keys().filter(|attendee| attendee.space == space).copied().collect()
    }

    /// What is on its way to the log will have no effect: nobody waits for it, and no lease runs.
    fn on_frozen(&mut self, space: SpaceId, out: &mut Vec<Output>) {
        for attendee in self.attendees(space) {
            self.leases.remove(attendee);
            let table = self.spaces.table(space).expect("it was frozen just now");
            let taken = table.view(attendee.session).expect("every session is in the table").last_sequence;
            let attendance = self.attendance.get_mut(&attendee).expect("listed just now");
            (attendance.taken, attendance.closing) = (taken, false);
            if let Some(resuming) = &mut attendance.resuming {
                resuming.after = taken;
            }
            self.resume_if_done(attendee, out);
        }
    }

    /// Owners come again at once, and ask again for what was not taken in.
    fn on_thawed(&mut self, now: Time, space: SpaceId, out: &mut Vec<Output>) {
        for attendee in self.attendees(space) {
            let attendance = self.attendance.remove(&attendee).expect("listed just now");
            if let Some(id) = attendance.speaker() {
                self.close(id, "the lockspace goes on here, come again", out);
            }
        }
        self.attend_all(now, space);
    }

    /// Owners go on at the destination, which alone has their sessions.
    fn on_forwarded(&mut self, space: SpaceId, out: &mut Vec<Output>) {
        let to = self.spaces.get(space).and_then(|space| space.moved_to()).unwrap_or_default().to_vec();
        for attendee in self.attendees(space) {
            let attendance = self.attendance.remove(&attendee).expect("listed just now");
            let Some(connection) = attendance.speaker() else { continue };
            let asked = Origin { connection, request: csnap_proto::RequestId(0) };
            send(asked, FromLockd::Moved { to: to.clone() }, out);
            self.close(connection, "the lockspace moved to another group", out);
        }
    }
}
