//! What the library has ready becomes outputs: writes first, then the messages that do not wait for them, then what is
//! committed.

use bytes::Bytes;
use raft::eraftpb::{Entry, Message, MessageType};
use raft::{INVALID_ID, Ready};

use super::super::APPEND_BYTES_MAX;
use super::super::disk::{Hard, Item};
use super::super::message::{Body, Content, Image, LogEntry, PeerMessage, conf_change};
use super::{Change, Output, Outstanding, Replica, Write, command_of};
use crate::canary::Canary;

impl Replica {
    /// Until nothing is left to do.
    pub(super) fn pump(&mut self, out: &mut Vec<Output>) {
        loop {
            self.draw_wait();
            self.note_role(out);
            self.propose_waiting();
            if !self.raw.has_ready() {
                return;
            }
            let ready = self.raw.ready();
            self.carry_out(ready, out);
        }
    }

    /// Writes up to `number` are durable: what waited for them goes out.
    pub(super) fn on_durable(&mut self, number: u64, out: &mut Vec<Output>) {
        self.outstanding.retain(|write| write.number > number);
        let persisted = self.outstanding.front().map_or(self.last_batch, |write| write.number - 1);
        self.raw.on_persist_ready(persisted);
        if let Some((_, image)) = self.installing.take_if(|(waits_for, _)| *waits_for <= number) {
            self.install(image, out);
        }
        while let Some((_, message)) = self.held.pop_front_if(|(waits_for, _)| *waits_for <= number) {
            self.send(message, out);
        }
    }

    fn carry_out(&mut self, mut ready: Ready, out: &mut Vec<Output>) {
        let number = ready.number();
        self.last_batch = number;
        let promise = self.write(&ready, out);
        let committed = ready.take_committed_entries();
        let (at_once, after) = (ready.take_messages(), ready.take_persisted_messages());
        let written = promise.is_some();
        self.raw.advance_append_async(ready);
        if let Some(promise) = promise {
            self.outstanding.push_back(Outstanding { number, promise });
        }
        let early = self.config.broken.breaks(Canary::AckBeforeSync);
        if early || (!written && self.outstanding.is_empty()) {
            self.raw.on_persist_ready(number);
        }
        // A leader speaks before its own entries are durable, but not before its term is: one that elected itself alone
        // might lead the same term again after a crash, with other entries.
        let last_promise =
            self.outstanding.iter().rev().find(|write| write.promise).map(|write| write.number);
        let last_write = self.outstanding.back().map(|write| write.number);
        // That it is there says a follower while its disk is busy with entries, or a slow disk would depose the leader.
        let (signs, after): (Vec<_>, Vec<_>) = after.into_iter().partition(is_sign_of_life);
        self.send_all(at_once, last_promise, out);
        self.send_all(signs, last_promise, out);
        self.send_all(after, last_write, out);
        for entry in &committed {
            self.apply(entry, out);
        }
        if let Some(last) = committed.last() {
            self.raw.advance_apply_to(last.index);
        }
    }

    /// What the library wants to be kept; whether there was something, and a promise in it.
    fn write(&mut self, ready: &Ready, out: &mut Vec<Output>) -> Option<bool> {
        let number = ready.number();
        let mirror = self.raw.mut_store();
        let before = (mirror.hard.term, mirror.hard.vote);
        if let Some(hard) = ready.hs() {
            mirror.hard = hard.clone();
        }
        let promise = (mirror.hard.term, mirror.hard.vote) != before;
        if !ready.must_sync() {
            return None;
        }
        let image = (!ready.snapshot().is_empty()).then(|| Image::from_raft(ready.snapshot()));
        if let Some(image) = &image {
            mirror.install(image.clone());
        }
        mirror.append(ready.entries());
        let write = if image.is_some() {
            Write::Begin { number, base: mirror.base().encode() }
        } else {
            let hard = Hard { term: mirror.hard.term, vote: mirror.hard.vote, commit: mirror.hard.commit };
            let promised = Item::Hard { cluster: mirror.cluster, hard };
            let entries = ready.entries().iter().map(|entry| Item::Entry(LogEntry::from_raft(entry)));
            let items = std::iter::once(promised).chain(entries).map(|item| item.encode()).collect();
            Write::Append { number, items }
        };
        out.push(Output::Write(write));
        self.installing = image.map(|image| (number, image)).or(self.installing.take());
        Some(promise)
    }

    fn send_all(&mut self, messages: Vec<Message>, after: Option<u64>, out: &mut Vec<Output>) {
        let Some(cluster) = self.raw.store().cluster else { return };
        for message in messages.into_iter().filter_map(|message| PeerMessage::from_raft(cluster, message)) {
            let broken = self.config.broken;
            let early = match &message.body {
                Body::AskVote { .. } | Body::Vote { .. } => broken.breaks(Canary::SendBeforeVote),
                Body::Appended { .. } => broken.breaks(Canary::AckBeforeSync),
                _ => false,
            };
            match after.filter(|_| !early) {
                Some(number) => self.held.push_back((number, message)),
                None => self.send(message, out),
            }
        }
    }

    fn send(&mut self, message: PeerMessage, out: &mut Vec<Output>) {
        if matches!(message.body, Body::Install(_)) {
            self.sent_states.insert(message.to.0, 0);
        }
        out.push(Output::Send(message));
    }

    fn apply(&mut self, entry: &Entry, out: &mut Vec<Output>) {
        let LogEntry { index, term, content } = LogEntry::from_raft(entry);
        self.applied = index;
        let leads = self.is_leader() && term == self.raw.raft.term;
        if leads && self.established.is_none() {
            self.established = Some(term);
            out.push(Output::Established { term });
        }
        if let Content::Change(change) = &content {
            self.apply_change(change, out);
        }
        if let Some(command) = command_of(content) {
            out.push(Output::Committed { index, command, own: self.established == Some(term) });
        }
    }

    /// Every replica comes to the same: by the group that it changes, which the same entries made.
    fn apply_change(&mut self, change: &Change, out: &mut Vec<Output>) {
        let Ok(members) = change.apply(&self.members) else { return };
        if self.raw.apply_conf_change(&conf_change(change)).is_err() {
            return;
        }
        self.members = members;
        if self.is_leader() && !self.members.contains_key(&self.id) {
            let term = self.raw.raft.term;
            self.raw.raft.become_follower(term, INVALID_ID);
        }
        out.push(Output::Members(self.members.clone()));
    }

    fn install(&mut self, image: Image, out: &mut Vec<Output>) {
        self.applied = image.index;
        self.members = image.members.clone();
        self.raw.advance_apply_to(image.index);
        out.push(Output::Members(self.members.clone()));
        out.push(Output::Install(image));
    }

    /// Says who leads, when that changed, and before anything that comes of it.
    pub(super) fn note_role(&mut self, out: &mut Vec<Output>) {
        let raft = &self.raw.raft;
        let now = (raft.leader_id, raft.term);
        if self.established.is_some_and(|term| !self.is_leader() || term != now.1) {
            self.established = None;
            self.waiting.clear();
            self.sent_states.clear();
            out.push(Output::Deposed);
        }
        if self.reported != now {
            self.reported = now;
            out.push(Output::Leader { leader: self.leader(), term: now.1 });
        }
    }

    /// As many at once as go into one message to a follower.
    fn propose_waiting(&mut self) {
        while self.established.is_some() && !self.waiting.is_empty() {
            let mut left = APPEND_BYTES_MAX;
            let fits = |command: &&Bytes| {
                let first = left == APPEND_BYTES_MAX;
                left = left.saturating_sub(command.len() as u64);
                first || left > 0
            };
            let batch: Vec<Entry> = self.waiting.iter().take_while(fits).map(proposed).collect();
            let count = batch.len();
            let mut propose = Message { from: self.id.0, entries: batch.into(), ..Message::default() };
            propose.set_msg_type(MessageType::MsgPropose);
            // Refused as a whole, or taken.
            if self.raw.raft.step(propose).is_err() {
                return;
            }
            self.waiting.drain(..count);
        }
    }
}

/// It says nothing of entries.
fn is_sign_of_life(message: &Message) -> bool {
    message.get_msg_type() == MessageType::MsgHeartbeatResponse
}

/// A command on its way into the log.
fn proposed(command: &Bytes) -> Entry {
    Entry { data: command.clone(), ..Entry::default() }
}
