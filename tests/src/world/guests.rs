//! Guests: whoever writes a volume through an exporter, and whoever reads snapshots. A guest that loses its exporter, or is
//! told that its attachment is over, attaches anew, here or on another node, and goes on.

use csnap_client::core::{Op, RequestError};
use csnap_proto::message::operate::RefusalKind;
use csnap_proto::{RequestToken, Target};

use super::{Script, World};
use crate::model::Life;
use crate::process::Process;
use crate::process::exporter::{Attach, Attachment, ExporterProc, Stage};
use crate::sim::{Ask, Event, HostId, ProcId};

/// Bytes of the smallest piece that guests write.
const BLOCK: u64 = 4096;

/// A guest that waits for something looks again after this, microseconds.
const LOOK_AGAIN: u64 = 20_000;

/// Before a guest that was refused tries again, microseconds.
const TRY_AGAIN: u64 = 300_000;

/// After this an operator fences a session that is lost for good, microseconds.
const FENCE_AFTER: u64 = 6_000_000;

/// What a guest has, or waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    Nothing,
    Attachment { exporter: ProcId, number: u64 },
    Leaving { exporter: ProcId, number: u64 },
}

/// One guest.
#[derive(Debug)]
pub struct Guest {
    volume: usize,
    /// Reads snapshots; writes the volume otherwise.
    reads: bool,
    host: HostId,
    snapshot: Option<RequestToken>,
    hold: Hold,
    requests_left: u64,
    refused_since: Option<u64>,
    /// When it began to attach what it has, for the model.
    since: u64,
    /// Where the last look at everything is, in the calm after the storm.
    swept: u64,
}

impl Guest {
    /// A guest that has nothing yet.
    #[must_use]
    pub fn new(volume: usize, reads: bool, host: HostId) -> Self {
        Self {
            volume,
            reads,
            host,
            snapshot: None,
            hold: Hold::Nothing,
            requests_left: 0,
            refused_since: None,
            since: 0,
            swept: 0,
        }
    }

    /// Has nothing and waits for nothing.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.hold == Hold::Nothing
    }
}

impl World {
    /// Writers of all volumes, and readers, begin.
    pub fn begin_work(&mut self) {
        let volumes = self.sim.model.volumes.len();
        for volume in 0..volumes {
            let host = self.any_node();
            self.add_guest(Guest::new(volume, false, host));
        }
        for reader in 0..self.sim.plan.work.readers {
            let host = self.any_node();
            self.add_guest(Guest::new(reader % volumes, true, host));
        }
        self.script_later(0, Script::Operators);
    }

    /// Another guest.
    pub fn add_guest(&mut self, guest: Guest) -> usize {
        self.guests.push(guest);
        self.script_later(0, Script::Guest(self.guests.len() - 1));
        self.guests.len() - 1
    }

    pub(super) fn any_node(&mut self) -> HostId {
        let nodes = self.sim.plan.nodes;
        HostId(self.sim.rng.index(nodes))
    }

    /// The exporter of a process id.
    fn exporter(&self, proc: ProcId) -> Option<&ExporterProc> {
        match self.process(proc)? {
            Process::Exporter(exporter) => Some(exporter),
            _ => None,
        }
    }

    pub(super) fn attachment(&self, proc: ProcId, number: u64) -> Option<&Attachment> {
        self.exporter(proc)?.attachments.get(&number)
    }

    /// What a guest has attached, if it takes requests.
    #[must_use]
    pub fn attached(&self, guest: usize) -> Option<&Attachment> {
        let Hold::Attachment { exporter, number } = self.guests[guest].hold else { return None };
        self.attachment(exporter, number).filter(|attachment| attachment.stage == Stage::Open)
    }

    /// Guests that wait, for people.
    pub(super) fn waiting_guests(&self) -> Vec<String> {
        let mut waiting = Vec::new();
        for (index, guest) in self.guests.iter().enumerate() {
            let (Hold::Attachment { exporter, number } | Hold::Leaving { exporter, number }) = guest.hold
            else {
                continue;
            };
            let what = match self.attachment(exporter, number) {
                None => "no attachment".to_owned(),
                Some(a) => {
                    format!("{:?}, {} under way, waits: {:?}, {:?}", a.stage, a.depth(), a.waiting(), a.error)
                }
            };
            waiting.push(format!("guest {index}: {:?}: {what}", guest.hold));
        }
        waiting
    }

    pub(super) fn on_guest(&mut self, index: usize) {
        let wait = match self.guests[index].hold {
            Hold::Nothing => self.attach_guest(index),
            // The exporter is gone, and the attachment with it.
            Hold::Attachment { exporter, .. } | Hold::Leaving { exporter, .. }
                if !self.sim.is_alive(exporter) =>
            {
                self.let_go(index, LOOK_AGAIN)
            }
            Hold::Attachment { exporter, number } => match self.attachment(exporter, number).map(|a| a.stage)
            {
                None | Some(Stage::Attaching) => LOOK_AGAIN,
                Some(Stage::Open) => self.work(index, exporter, number),
                Some(Stage::Failed) => self.give_up(index, exporter, number),
                Some(Stage::Released) => self.let_go(index, LOOK_AGAIN),
            },
            Hold::Leaving { exporter, number } => match self.attachment(exporter, number).map(|a| a.stage) {
                Some(Stage::Released) => self.let_go(index, TRY_AGAIN),
                _ => LOOK_AGAIN,
            },
        };
        self.script_later(wait, Script::Guest(index));
    }

    fn let_go(&mut self, index: usize, wait: u64) -> u64 {
        let guest = &mut self.guests[index];
        if let Hold::Attachment { exporter, number } | Hold::Leaving { exporter, number } =
            std::mem::replace(&mut guest.hold, Hold::Nothing)
            && let Some(Some(Process::Exporter(exporter))) =
                self.procs.get_mut(&exporter).map(|slot| &mut slot.process)
        {
            exporter.attachments.remove(&number);
        }
        guest.snapshot = None;
        wait
    }

    fn attach_guest(&mut self, index: usize) -> u64 {
        let Guest { volume, reads, host, .. } = self.guests[index];
        if self.calm && self.guests[index].swept == u64::MAX {
            return TRY_AGAIN;
        }
        let Some(exporter) = self.sim.find(host, "exporter") else { return LOOK_AGAIN };
        if self.exporter(exporter).is_none() {
            return LOOK_AGAIN;
        }
        let snapshot = if reads {
            let Some(token) = self.live_snapshot(volume) else { return TRY_AGAIN };
            Some(token)
        } else {
            None
        };
        let name = snapshot.map(|token| self.sim.model.volumes[volume].snapshots[&token].name.clone());
        let target = Target { volume: self.sim.model.volumes[volume].name.clone(), snapshot: name };
        let number = self.next_attachment();
        self.sim.tell(0, exporter, Event::Ask(Ask::Attach(Attach { number, volume, target, snapshot })));
        let (requests_left, since) = (20 + self.sim.rng.below(100), self.sim.instant());
        let guest = &mut self.guests[index];
        guest.hold = Hold::Attachment { exporter, number };
        (guest.snapshot, guest.since) = (snapshot, since);
        guest.requests_left = requests_left;
        LOOK_AGAIN
    }

    /// An attachment that failed is released, and another one made.
    fn give_up(&mut self, index: usize, exporter: ProcId, number: u64) -> u64 {
        let Some(attachment) = self.attachment(exporter, number) else { return LOOK_AGAIN };
        let (volume, error) = (attachment.volume(), attachment.error.clone());
        let kind = match &error {
            Some(RequestError::Refused(refusal)) => Some(refusal.kind),
            _ => None,
        };
        match kind {
            Some(RefusalKind::Busy) => {
                let since = *self.guests[index].refused_since.get_or_insert(self.sim.now());
                if self.sim.now() > since + FENCE_AFTER {
                    self.guests[index].refused_since = Some(self.sim.now());
                    self.wish_fence(volume);
                }
            }
            Some(RefusalKind::NotFound | RefusalKind::Gone) if self.guests[index].reads => {
                self.check_gone(index, &error)
            }
            Some(_) => self.sim.violation(format!("an attachment was refused: {error:?}")),
            None => {}
        }
        self.leave(index, exporter, number)
    }

    /// A snapshot that is known to live is not refused.
    fn check_gone(&mut self, index: usize, error: &Option<RequestError>) {
        let guest = &self.guests[index];
        let Some(token) = guest.snapshot else { return };
        let snapshot = &self.sim.model.volumes[guest.volume].snapshots[&token];
        if snapshot.life == Life::Live
            && snapshot.renamed.is_none()
            && self.guests[index].since > snapshot.since
        {
            self.sim.violation(format!("a live snapshot was refused: {error:?}"));
        }
    }

    fn leave(&mut self, index: usize, exporter: ProcId, number: u64) -> u64 {
        let ask = Ask::Io { attachment: number, op: Op::Release, offset: 0, len: 0, fast: false };
        self.sim.tell(0, exporter, Event::Ask(ask));
        self.guests[index].hold = Hold::Leaving { exporter, number };
        LOOK_AGAIN
    }

    /// One more request, if there may be one.
    fn work(&mut self, index: usize, exporter: ProcId, number: u64) -> u64 {
        self.guests[index].refused_since = None;
        let Some(attachment) = self.attachment(exporter, number) else { return LOOK_AGAIN };
        let (depth, size) = (attachment.depth(), attachment.size_bytes());
        if self.calm {
            return self.sweep(index, exporter, number, depth, size);
        }
        let plan = self.sim.plan.work.clone();
        let think = self.about(plan.think);
        if depth >= plan.depth {
            return think;
        }
        let leaves = if self.guests[index].reads {
            self.guests[index].requests_left = self.guests[index].requests_left.saturating_sub(1);
            self.guests[index].requests_left == 0
        } else {
            self.sim.rng.chance(plan.leave)
        };
        if leaves {
            if self.sim.rng.chance(0.5) {
                self.guests[index].host = self.any_node();
            }
            return self.leave(index, exporter, number);
        }
        let ask = if self.guests[index].reads {
            self.any_read(number, size)
        } else {
            self.any_request(exporter, number, size)
        };
        if let Some(ask) = ask {
            self.sim.tell(0, exporter, Event::Ask(ask));
        }
        think
    }

    fn any_read(&mut self, attachment: u64, size: u64) -> Option<Ask> {
        let rng = &mut self.sim.rng;
        let hot = self.sim.plan.work.hot_blocks.min(size / BLOCK);
        let first = if rng.chance(0.7) { rng.below(hot) } else { rng.below(size / BLOCK) };
        let blocks = (1 + rng.below(8)).min(size / BLOCK - first);
        Some(Ask::Io { attachment, op: Op::Read, offset: first * BLOCK, len: blocks * BLOCK, fast: false })
    }

    /// Guests do not touch what they have a request under way for, as file systems do not.
    fn any_request(&mut self, exporter: ProcId, number: u64, size: u64) -> Option<Ask> {
        let Some(Ask::Io { attachment, offset, len, .. }) = self.any_read(number, size) else { return None };
        let rng = &mut self.sim.rng;
        let op = match rng.below(100) {
            0..52 => Op::Write { fua: rng.chance(0.1) },
            52..62 => Op::Flush,
            62..66 => Op::Trim { fua: rng.chance(0.1) },
            66..70 => Op::WriteZeroes { fua: rng.chance(0.1), may_punch: rng.chance(0.5) },
            _ => Op::Read,
        };
        if op == Op::Flush {
            return Some(Ask::Io { attachment, op, offset: 0, len: 0, fast: false });
        }
        let fast = rng.chance(self.sim.plan.work.fast);
        let free = self.attachment(exporter, number).is_some_and(|a| !a.meets(offset, len));
        free.then_some(Ask::Io { attachment, op, offset, len, fast })
    }

    /// After the storm: a flush, then everything is read once, then the guest leaves for good.
    fn sweep(&mut self, index: usize, exporter: ProcId, number: u64, depth: usize, size: u64) -> u64 {
        const AT_ONCE: u64 = 64 << 10;
        if depth > 0 {
            return LOOK_AGAIN;
        }
        let guest = &mut self.guests[index];
        let at = guest.swept;
        let (op, offset, len) = if at == 0 {
            (Op::Flush, 0, 0)
        } else if (at - 1) * AT_ONCE < size {
            let offset = (at - 1) * AT_ONCE;
            (Op::Read, offset, AT_ONCE.min(size - offset))
        } else {
            guest.swept = u64::MAX;
            return self.leave(index, exporter, number);
        };
        guest.swept += 1;
        self.sim.tell(0, exporter, Event::Ask(Ask::Io { attachment: number, op, offset, len, fast: false }));
        LOOK_AGAIN / 10
    }

    /// A guest that reads one snapshot from its first byte to its last.
    pub(super) fn add_sweeper(&mut self, volume: usize, token: RequestToken) {
        let host = self.any_node();
        let Some(exporter) = self.sim.find(host, "exporter") else { return };
        let name = self.sim.model.volumes[volume].snapshots[&token].name.clone();
        let target = Target { volume: self.sim.model.volumes[volume].name.clone(), snapshot: Some(name) };
        let number = self.next_attachment();
        let attach = Attach { number, volume, target, snapshot: Some(token) };
        self.sim.tell(0, exporter, Event::Ask(Ask::Attach(attach)));
        let mut guest = Guest::new(volume, true, host);
        guest.hold = Hold::Attachment { exporter, number };
        (guest.snapshot, guest.since) = (Some(token), self.sim.instant());
        self.add_guest(guest);
    }

    /// Writers sweep their volumes; readers leave.
    pub(super) fn send_guests_home(&mut self) {
        for index in 0..self.guests.len() {
            let guest = &mut self.guests[index];
            guest.swept = if guest.reads { u64::MAX } else { 0 };
            if let (true, Hold::Attachment { exporter, number }) = (guest.reads, guest.hold) {
                self.leave(index, exporter, number);
            }
        }
    }

    /// Every guest did what it had to, and has nothing.
    pub(super) fn guests_are_home(&self) -> bool {
        self.guests.iter().all(|guest| guest.swept == u64::MAX && guest.hold == Hold::Nothing)
    }

    /// No guest waits for an answer.
    pub(super) fn guests_are_quiet(&self) -> bool {
        let quiet = |guest: &Guest| match guest.hold {
            Hold::Nothing => true,
            Hold::Leaving { .. } => false,
            Hold::Attachment { exporter, number } => match self.attachment(exporter, number) {
                Some(attachment) => attachment.depth() == 0 && attachment.stage != Stage::Attaching,
                None => !self.sim.is_alive(exporter),
            },
        };
        self.guests.iter().all(quiet)
    }
}
