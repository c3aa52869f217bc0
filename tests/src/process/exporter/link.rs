//! Between an exporter and its node's agent, which knows where the server is; and the connections to servers that come of
//! it.

use csnap_client::core as client;
use csnap_client::core::Input;
use csnap_proto::message::local::{FromAgent, ToAgent};
use csnap_proto::message::volume::FromServer;
use csnap_proto::{Frame, RequestId, Term};

use super::{AGENT_PAUSE, ASK_AGAIN, Attachment, ExporterProc, HELLO_AGAIN};
use crate::net::NetConn;
use crate::sim::{Event, Sim, agent_address, plain};

impl ExporterProc {
    pub(super) fn on_hello(&mut self, sim: &mut Sim, conn: Option<NetConn>) {
        self.agent = conn;
        match conn {
            Some(conn) => {
                let hello =
                    ToAgent::ExporterHello { instance: self.instance, pid: self.id.0, nbd: Vec::new() };
                sim.send(self.id, conn, &plain(hello));
            }
            None => sim.tell(AGENT_PAUSE, self.id, Event::Timer(HELLO_AGAIN)),
        }
    }

    pub(super) fn on_closed(&mut self, sim: &mut Sim, conn: NetConn) {
        if Some(conn) == self.agent {
            self.agent = None;
            sim.tell(AGENT_PAUSE, self.id, Event::Timer(HELLO_AGAIN));
            sim.tally.reached("an exporter outlived its agent");
        }
        let numbers: Vec<u64> = self.attachments.keys().copied().collect();
        for number in numbers {
            let Some(attachment) = self.attachments.get_mut(&number) else { continue };
            if attachment.question.take_if(|mine| *mine == conn).is_some() {
                attachment.asking = false;
                sim.tell(AGENT_PAUSE, self.id, Event::Timer(ASK_AGAIN + number));
            }
            if attachment.conn.take_if(|mine| *mine == conn).is_some() {
                attachment.on_conn_lost();
                self.step(sim, number, Input::Disconnected { conn: client::ConnId(conn.0) });
            }
        }
    }

    /// Asks the agent for a server, if one is needed and nobody asks yet.
    pub(super) fn seek(&mut self, sim: &mut Sim, number: u64) {
        let Some(attachment) = self.attachments.get_mut(&number) else { return };
        if attachment.wanted.is_some() && !attachment.asking {
            attachment.asking = true;
            sim.connect(self.id, self.host, &agent_address(self.host), number);
        }
    }

    pub(super) fn on_question(&mut self, sim: &mut Sim, number: u64, conn: Option<NetConn>) {
        let Some(attachment) = self.attachments.get_mut(&number) else {
            conn.into_iter().for_each(|conn| sim.close(self.id, conn));
            return;
        };
        attachment.question = conn;
        match (conn, attachment.wanted) {
            (Some(conn), Some(suspect)) => {
                let frame =
                    Frame { id: RequestId(1), term: Term(0), message: ToAgent::NeedServer { suspect } };
                sim.send(self.id, conn, &frame);
            }
            (conn, _) => {
                attachment.asking = false;
                attachment.question = None;
                conn.into_iter().for_each(|conn| sim.close(self.id, conn));
                sim.tell(AGENT_PAUSE, self.id, Event::Timer(ASK_AGAIN + number));
            }
        }
    }

    pub(super) fn on_agent(
        &mut self,
        sim: &mut Sim,
        conn: NetConn,
        message: FromAgent,
        socket: Option<NetConn>,
    ) {
        match message {
            FromAgent::ReportPlease => {
                sim.send(self.id, conn, &plain(ToAgent::ExporterReport { clients: Vec::new() }));
            }
            FromAgent::ServerReady { term } if sim.plan.heeds_news => self.on_news(sim, term),
            FromAgent::Connected { node, term } => {
                let found = self.attachments.iter().find(|(_, a)| a.question == Some(conn)).map(|(n, _)| *n);
                let (Some(number), Some(server)) = (found, socket) else { return };
                sim.close(self.id, conn);
                let attachment = self.attachments.get_mut(&number).expect("found above");
                (attachment.question, attachment.asking) = (None, false);
                let better = attachment.conn.is_none() || term > attachment.term;
                if attachment.wanted.take().is_none() || !better {
                    return sim.close(self.id, server);
                }
                if let Some(older) = attachment.conn.replace(server) {
                    attachment.on_conn_lost();
                    sim.close(self.id, older);
                }
                if term > attachment.term {
                    attachment.note_replaced(sim);
                }
                attachment.term = attachment.term.max(term);
                self.step(sim, number, Input::Connected { conn: client::ConnId(server.0), node, term });
            }
            FromAgent::Failed { .. } => {
                sim.close(self.id, conn);
                self.on_closed(sim, conn);
            }
            _ => {}
        }
    }

    /// Another server serves: whoever holds a connection to an older one asks anew.
    fn on_news(&mut self, sim: &mut Sim, term: Term) {
        let older = |a: &Attachment| a.conn.is_some() && a.term < term && a.wanted.is_none();
        let older: Vec<u64> = self.attachments.iter().filter(|(_, a)| older(a)).map(|(n, _)| *n).collect();
        for number in older {
            let attachment = self.attachments.get_mut(&number).expect("just listed");
            attachment.wanted = Some(attachment.term);
            self.seek(sim, number);
        }
    }

    pub(super) fn on_server(&mut self, sim: &mut Sim, conn: NetConn, frame: Frame<FromServer>) {
        // An earlier frame of the same bytes may have ended it.
        let Some(number) = self.attachments.iter().find(|(_, a)| a.conn == Some(conn)).map(|(n, _)| *n)
        else {
            return;
        };
        let attachment = self.attachments.get_mut(&number).expect("found above");
        attachment.note_answer(sim, &frame);
        self.step(sim, number, Input::Frame { conn: client::ConnId(conn.0), frame });
    }
}
