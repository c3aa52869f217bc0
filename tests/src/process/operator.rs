//! A command of an operator: it gets a server through an agent, asks one thing after another in its own session, and asks
//! again, under the same number, until it is answered or killed.

use std::collections::VecDeque;

use csnap_proto::message::local::{FromAgent, ToAgent};
use csnap_proto::message::operate::{OperatorReply, OperatorRequest, Refusal};
use csnap_proto::message::volume::{Attach, FromServer, Identify, ToServer};
use csnap_proto::{Frame, InstanceId, RequestId, Secret, Sequence, SessionId, Term, Time};

use crate::net::NetConn;
use crate::sim::{Ask, Event, HostId, ProcId, Sim, agent_address, frames, node_name};

/// Connects for questions to the agent; those for its own purposes have odd tags.
const SEEK: u64 = 0;
const ADMIN: u64 = 1;

const AGAIN: u64 = 0;
const PATIENCE: u64 = 1;

/// Before the agent is asked again, microseconds.
const PAUSE: u64 = 50_000;

/// A server that does not answer for so long is suspected, microseconds.
const ANSWER_WITHIN: u64 = 8_000_000;

/// What came of a request.
pub type Answer = Result<OperatorReply, Refusal>;

/// See the module.
pub struct OperatorProc {
    id: ProcId,
    host: HostId,
    session: SessionId,
    secret: Secret,
    instance: InstanceId,
    /// Not answered, in order; the first is in hand.
    queue: VecDeque<OperatorRequest>,
    sequence: Sequence,
    question: Option<NetConn>,
    conn: Option<NetConn>,
    identified: bool,
    suspect: Term,
    term: Term,
    last_id: RequestId,
    /// Which patience counts.
    asked: u64,
    admin: Option<(NetConn, ToAgent)>,
    to_agent: Option<ToAgent>,
    /// Answers, for the world to take.
    pub answers: Vec<(OperatorRequest, Answer)>,
    /// What the agent said.
    pub agent_answers: Vec<FromAgent>,
}

impl OperatorProc {
    pub(super) fn start(sim: &mut Sim, id: ProcId, host: HostId) -> Self {
        let (session, secret) = sim.draw_session();
        Self {
            id,
            host,
            session,
            secret,
            instance: sim.draw_instance(),
            queue: VecDeque::new(),
            sequence: Sequence(1),
            question: None,
            conn: None,
            identified: false,
            suspect: Term(0),
            term: Term(0),
            last_id: RequestId(0),
            asked: 0,
            admin: None,
            to_agent: None,
            answers: Vec::new(),
            agent_answers: Vec::new(),
        }
    }

    /// What is not answered yet.
    #[must_use]
    pub fn pending(&self) -> &VecDeque<OperatorRequest> {
        &self.queue
    }

    /// It waits for its agent.
    #[must_use]
    pub fn asks_agent(&self) -> bool {
        self.admin.is_some() || self.to_agent.is_some()
    }

    #[allow(clippy::unused_self, reason = "processes are asked alike")]
    pub(super) fn deadline(&self) -> Option<Time> {
        None
    }

    pub(super) fn on_event(&mut self, sim: &mut Sim, event: Event) {
        match event {
            Event::Ask(Ask::Operate(request)) => {
                self.queue.push_back(*request);
                if self.queue.len() == 1 {
                    self.go_on(sim);
                }
            }
            Event::Ask(Ask::AskAgent(message)) => {
                self.to_agent = Some(*message);
                sim.connect(self.id, self.host, &agent_address(self.host), ADMIN);
            }
            Event::Connected { tag: SEEK, conn } => self.on_agent_connected(sim, conn),
            Event::Connected { conn, .. } => self.on_admin_connected(sim, conn),
            Event::Closed { conn } => self.on_closed(sim, conn),
            Event::Received { conn, payload } if Some(conn) == self.conn => {
                for frame in frames::<FromServer>(&payload.bytes) {
                    self.on_frame(sim, frame);
                }
            }
            Event::Received { conn, payload } => {
                for frame in frames::<FromAgent>(&payload.bytes) {
                    self.on_agent(sim, conn, frame.message, payload.socket);
                }
            }
            Event::Timer(AGAIN) => self.go_on(sim),
            Event::Timer(timer) if timer == PATIENCE + self.asked => self.lose_patience(sim),
            _ => {}
        }
    }

    fn go_on(&mut self, sim: &mut Sim) {
        if self.queue.is_empty() || self.question.is_some() {
            return;
        }
        match self.conn {
            Some(_) if self.identified => self.ask(sim),
            Some(_) => {}
            None => sim.connect(self.id, self.host, &agent_address(self.host), SEEK),
        }
    }

    fn on_agent_connected(&mut self, sim: &mut Sim, conn: Option<NetConn>) {
        let Some(conn) = conn else {
            return sim.tell(PAUSE, self.id, Event::Timer(AGAIN));
        };
        if self.question.is_some() || self.conn.is_some() {
            return sim.close(self.id, conn);
        }
        self.question = Some(conn);
        let message = ToAgent::NeedServer { suspect: self.suspect };
        sim.send(self.id, conn, &Frame { id: RequestId(1), term: Term(0), message });
    }

    fn on_admin_connected(&mut self, sim: &mut Sim, conn: Option<NetConn>) {
        let Some(message) = self.to_agent.take() else { return };
        match conn {
            Some(conn) => {
                self.admin = Some((conn, message.clone()));
                sim.send(self.id, conn, &Frame { id: RequestId(1), term: Term(0), message });
            }
            None => self.agent_answers.push(FromAgent::Failed { reason: "no agent".to_owned() }),
        }
    }

    fn on_agent(&mut self, sim: &mut Sim, conn: NetConn, message: FromAgent, socket: Option<NetConn>) {
        if self.admin.take_if(|(mine, _)| *mine == conn).is_some() {
            self.agent_answers.push(message);
            return sim.close(self.id, conn);
        }
        let (FromAgent::Connected { term, .. }, Some(server)) = (message, socket) else { return };
        self.question = None;
        sim.close(self.id, conn);
        self.conn = Some(server);
        self.term = term;
        self.identified = false;
        self.last_id = RequestId(self.last_id.0 + 1);
        let message = ToServer::Identify(Identify {
            session: self.session,
            secret: self.secret,
            instance: self.instance,
            node: node_name(self.host),
            pid: self.id.0,
            attach: Attach::Operator,
            cached_epoch: None,
        });
        sim.send(self.id, server, &Frame { id: self.last_id, term: Term(0), message });
        self.wait(sim);
    }

    fn ask(&mut self, sim: &mut Sim) {
        let (Some(conn), Some(request)) = (self.conn, self.queue.front().cloned()) else { return };
        self.last_id = RequestId(self.last_id.0 + 1);
        let (sequence, lowest_unanswered) = (self.sequence, self.sequence);
        let message = ToServer::Operate { sequence, lowest_unanswered, request };
        sim.send(self.id, conn, &Frame { id: self.last_id, term: Term(0), message });
        self.wait(sim);
    }

    fn wait(&mut self, sim: &mut Sim) {
        self.asked += 1;
        sim.tell(ANSWER_WITHIN, self.id, Event::Timer(PATIENCE + self.asked));
    }

    fn lose_patience(&mut self, sim: &mut Sim) {
        if let Some(conn) = self.conn {
            sim.close(self.id, conn);
            self.on_closed(sim, conn);
        }
    }

    fn on_closed(&mut self, sim: &mut Sim, conn: NetConn) {
        if self.admin.take_if(|(mine, _)| *mine == conn).is_some() {
            self.agent_answers.push(FromAgent::Failed { reason: "the agent is gone".to_owned() });
        }
        if self.conn.take_if(|mine| *mine == conn).is_some() {
            self.suspect = self.term;
            sim.tell(PAUSE, self.id, Event::Timer(AGAIN));
        }
        if self.question.take_if(|mine| *mine == conn).is_some() {
            sim.tell(PAUSE, self.id, Event::Timer(AGAIN));
        }
    }

    fn on_frame(&mut self, sim: &mut Sim, frame: Frame<FromServer>) {
        if frame.id != self.last_id {
            return;
        }
        match frame.message {
            FromServer::IdentifyOk(_) => {
                self.identified = true;
                self.suspect = Term(0);
                self.ask(sim);
            }
            FromServer::Operated(reply) => self.answered(sim, Ok(reply)),
            FromServer::Refused(refusal) if self.identified => self.answered(sim, Err(refusal)),
            // Not let in: the connection closes, and it asks again.
            _ => {}
        }
    }

    fn answered(&mut self, sim: &mut Sim, answer: Answer) {
        let Some(request) = self.queue.pop_front() else { return };
        self.asked += 1;
        self.sequence = self.sequence.next();
        sim.note(|| format!("operator {}: {request:?}: {answer:?}", self.id.0));
        self.answers.push((request, answer));
        self.go_on(sim);
    }
}
