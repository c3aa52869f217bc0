//! The fenced register of the worlds of [`crate::mutex`]: answers one question after the other, and never dies.

use bytes::Bytes;

use crate::model::mutex::{MESSAGE_BYTES, Question};
use crate::net::Payload;
use crate::sim::{Event, HostId, ProcId, Sim};

/// Where it listens.
pub const ADDRESS: &str = "register";

/// See the module.
pub struct RegisterProc {
    id: ProcId,
    host: HostId,
}

impl RegisterProc {
    pub(super) fn start(id: ProcId, host: HostId) -> Self {
        Self { id, host }
    }

    pub(super) fn on_event(&mut self, sim: &mut Sim, event: Event) {
        match event {
            Event::Start => sim.net.listen(ADDRESS, self.id, self.host),
            Event::Received { conn, payload } => {
                for question in payload.bytes.chunks_exact(MESSAGE_BYTES).map(Question::decode) {
                    let answer = sim.mutex.register.ask(question);
                    let bytes = Bytes::copy_from_slice(&answer.encode());
                    sim.net.send(conn, self.id, Payload { bytes, socket: None }, &mut sim.queue);
                }
            }
            _ => {}
        }
    }
}
