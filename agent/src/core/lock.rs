//! Between the agent and its lockd session: what the session tells, and what is published in it.

use csnap_lockd::client::{ClientEvent, ClientOutput, Identity, LockClient};
use csnap_proto::Time;
use csnap_proto::limits::MEMBER_INFO_BYTES_MAX;
use csnap_proto::message::local::{LockdInfo, NodeInfo};
use csnap_proto::message::lock::{LockEvent, LockOp, LockReply, LockView, Watched};

use super::anointing::Anointed;
use super::{AgentCore, Output};

/// How far a look at something that lockd keeps is. An event says when a look is out of date; one that is asked for and
/// not answered yet never is, for its answer comes after every event before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Look {
    /// No session to look in.
    #[default]
    Idle,
    /// To be asked for.
    Due,
    /// Asked for.
    Asked,
    /// Answered: what events told since then is all there is.
    Done,
}

impl Look {
    /// News was lost: what was seen may not be so any more.
    pub(super) fn again(&mut self) {
        if *self == Self::Done {
            *self = Self::Due;
        }
    }

    /// True once for each time that it is due.
    pub(super) fn take_on(&mut self) -> bool {
        let due = *self == Self::Due;
        if due {
            *self = Self::Asked;
        }
        due
    }
}

impl AgentCore {
    /// Lets the client act, and takes in what it tells.
    pub(super) fn feed_client(
        &mut self,
        now: Time,
        act: impl FnOnce(&mut LockClient, &mut Vec<ClientOutput>),
        out: &mut Vec<Output>,
    ) {
        let mut outputs = Vec::new();
        act(&mut self.client, &mut outputs);
        for output in outputs {
            match output {
                ClientOutput::Event(event) => self.on_client(now, event, out),
                output => out.push(Output::Lockd(output)),
            }
        }
    }

    /// Asks for a lock operation. Callers see first that lockd's client has room; what finds none stays due, and is asked
    /// for when answers have made some. So whatever lockd does or leaves undone, what waits for it is bounded.
    pub(super) fn operate(&mut self, now: Time, op: LockOp, out: &mut Vec<Output>) {
        self.feed_client(
            now,
            |client, out| {
                let ticket = client.operate(now, op, out);
                assert!(ticket.is_some(), "the caller saw that there is room");
            },
            out,
        );
    }

    fn on_client(&mut self, now: Time, event: ClientEvent, out: &mut Vec<Output>) {
        match event {
            ClientEvent::Opened { locks, resumed, .. } => {
                out.push(Output::Note(format!("lockd answers (resumed: {resumed})")));
                if self.anointing.is_away() && self.stopping.is_none() {
                    self.begin(&locks);
                }
                let ask = csnap_lockd::client::ClientInput::Status;
                self.feed_client(now, |client, out| client.step(now, ask, out), out);
            }
            ClientEvent::Answer { op, reply, .. } => self.on_answer(now, &op, reply, out),
            ClientEvent::Event(event) => self.on_lock_event(now, event, out),
            ClientEvent::Jeopardy => out.push(Output::Note("lockd does not answer renewals".to_owned())),
            ClientEvent::Disconnected => {
                self.lockd = None;
                out.push(Output::Note("lockd is gone, trying to reach it again".to_owned()));
            }
            ClientEvent::SessionLost { reason } => self.on_session_lost(&reason, out),
            ClientEvent::Closed => {}
            ClientEvent::Status(status) => {
                let members = vec![(status.node.clone(), status.pid)];
                self.lockd = Some(LockdInfo { leader: status.node, members });
            }
        }
    }

    fn begin(&mut self, locks: &[LockView]) {
        self.members.begin();
        (self.published, self.publishing) = (None, false);
        self.anointing.begin(locks);
    }

    /// Everything that the session held is gone, and someone else may have it: our server must not go on under it.
    fn on_session_lost(&mut self, reason: &str, out: &mut Vec<Output>) {
        out.push(Output::Note(format!("the lockd session is lost: {reason}")));
        self.lockd = None;
        if self.anointing.reign().is_some() {
            self.child.excuse();
            self.child.kill(out);
        }
        self.anointing.lose();
        self.members.forget();
        if self.stopping.is_none() {
            out.push(Output::DrawIdentity);
        }
    }

    pub(super) fn on_identity(&mut self, now: Time, identity: Identity, out: &mut Vec<Output>) {
        if self.client.is_over() && self.stopping.is_none() {
            let info = encode(&mut self.node_info());
            self.feed_client(now, |client, out| client.restart(now, identity, info, out), out);
        }
    }

    fn on_answer(&mut self, now: Time, op: &LockOp, reply: LockReply, out: &mut Vec<Output>) {
        match (op, reply) {
            (LockOp::Watch { what: Watched::Members, .. }, LockReply::Members(members)) => {
                self.members.reset(now, &self.config.node, members);
            }
            (LockOp::SetInfo { .. }, _) => self.publishing = false,
            (op, LockReply::Invalid(why)) => {
                // Only a lockd that we do not understand says so; starting over is the one thing left.
                out.push(Output::Note(format!("lockd refuses {op:?}: {why}")));
                let anointed = self.anointing.on_answer(now, &self.config.node, op, LockReply::Invalid(why));
                assert!(anointed.is_none(), "a refusal grants nothing");
            }
            (op, reply) => {
                let anointed = self.anointing.on_answer(now, &self.config.node, op, reply);
                self.on_anointed(now, anointed, out);
            }
        }
    }

    fn on_lock_event(&mut self, now: Time, event: LockEvent, out: &mut Vec<Output>) {
        match event {
            LockEvent::MemberUp(member) => self.members.up(now, &self.config.node, member),
            LockEvent::MemberDown { session, .. } => self.members.down(session),
            LockEvent::Overrun => {
                self.anointing.look_again();
                self.members.look.again();
            }
            event => {
                let anointed = self.anointing.on_event(now, &self.config.node, event);
                self.on_anointed(now, anointed, out);
            }
        }
    }

    /// The lock is ours: so is the term. If the child cannot serve after all, the next settling gives it back.
    fn on_anointed(&mut self, now: Time, anointed: Option<Anointed>, out: &mut Vec<Output>) {
        let Some(Anointed { term, pinned }) = anointed else { return };
        if pinned {
            self.members.overrule_better(self.priority);
        }
        if self.child.is_ready_standby() {
            out.push(Output::Note(format!("our server is anointed, term {term}")));
            let patience = self.attempts.patience(!self.members.any_ready_without_trouble());
            self.attempts.begin(now);
            self.child.anoint(now, term, patience, out);
        }
    }

    /// What the others see of this node.
    pub(super) fn node_info(&self) -> NodeInfo {
        NodeInfo {
            agent_pid: self.config.pid,
            server_pid: self.child.process().map(|(process, _)| process.pid),
            export_pid: self.exporter.process().map(|process| process.pid),
            priority: self.priority,
            standby_ready: self.could_serve(),
            trouble: self.attempts.trouble(),
            nbd: self.exporter.nbd.clone(),
            wishes: self.wishes.published(),
        }
    }

    /// Lists the members, if that is due.
    pub(super) fn list_members(&mut self, now: Time, out: &mut Vec<Output>) {
        if self.client.has_room() && self.members.look.take_on() {
            self.operate(now, LockOp::watch(Watched::Members), out);
        }
    }

    /// Tells what changed of this node, one description at a time: while lockd is away only the last one waits.
    pub(super) fn publish_node(&mut self, now: Time, out: &mut Vec<Output>) {
        let mut info = self.node_info();
        let may = !self.anointing.is_away() && !self.publishing && self.client.has_room();
        if !may || self.published.as_ref() == Some(&info) {
            return;
        }
        (self.published, self.publishing) = (Some(info.clone()), true);
        let info = encode(&mut info);
        self.operate(now, LockOp::SetInfo { info }, out);
    }
}

/// The description as bytes that lockd takes: addresses that do not fit are left out, they are for people.
pub(super) fn encode(info: &mut NodeInfo) -> Vec<u8> {
    loop {
        let bytes = postcard::to_stdvec(info).expect("a description encodes");
        if bytes.len() <= MEMBER_INFO_BYTES_MAX {
            return bytes;
        }
        assert!(info.nbd.pop().is_some(), "without addresses a description is short");
    }
}
