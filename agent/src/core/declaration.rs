//! How a dead process is declared: which files its last I/O could still be on its way to, and what the server is told when
//! it is not.
//!
//! A writing exporter holds an exclusive lock on the file description that it writes a head through, and a serving server
//! one on its gate. The kernel gives a lock up only when the last I/O through that description has returned, also I/O
//! that outlives its process; so whoever gets the lock of that very file knows. A lock of another file that has its name
//! by now says nothing. Which heads the dead had open for writing, the server's list says: those of the very sessions that
//! it ends when it is told. A list is read a page at a time, and a volume that is renamed meanwhile may be on none; so the
//! server is told which were looked at, and refuses if that is not all.
//!
//! [`Declaration`] is pure; whoever carries it out looks at files, asks the server, and passes on what came of it.

use std::collections::BTreeSet;
use std::time::Duration;

use csnap_proto::limits::LOOKED_AT_MAX;
use csnap_proto::message::operate::{OperatorReply, OperatorRequest, Refusal, RefusalKind, VolumeInfo};
use csnap_proto::message::volume::Head;
use csnap_proto::{InstanceId, Name, Term, VolumeId};

use super::Dead;

/// One declaration, from connecting to the answer; what takes longer is tried again.
pub const DECLARE_WITHIN: Duration = Duration::from_secs(5);

/// Between looks at a file whose I/O is still on its way.
pub const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A file that the dead held a lock on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// The gate of a term.
    Gate(Term),
    /// A head in the pool.
    Head(VolumeId),
    /// An adopted origin: exactly the file or device that was adopted.
    Origin {
        /// Absolute path.
        path: String,
        /// Device, as [`Head::Adopted`] has it.
        device: u64,
        /// Inode.
        inode: u64,
    },
}

/// What was seen of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sight {
    /// Its lock can be had: no I/O is left.
    Free,
    /// Somebody has it.
    Locked,
    /// The pool or the directory is there, the file is not.
    Missing,
    /// It is not the file that was adopted.
    Replaced,
    /// It cannot be looked at; for people.
    Unknown(String),
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Ask the server, and tell [`Declaration::on_answer`].
    Ask(OperatorRequest),
    /// Look at a file, and tell [`Declaration::on_sight`].
    Look(Held),
    /// The same after [`LOOK_AGAIN`].
    LookAgain(Held),
    /// The server knows.
    Done,
    /// Not now; one line for people.
    Failed(String),
}

/// One declaration under way. See the module.
#[derive(Debug)]
pub struct Declaration {
    dead: Dead,
    /// Still to be looked at.
    files: Vec<Held>,
    /// Volumes whose heads were, or are in `files`.
    looked_at: BTreeSet<VolumeId>,
    /// Volumes after this one were not listed yet.
    unlisted: Option<Name>,
    /// The server was told.
    told: bool,
}

impl Declaration {
    /// Begins, and says what to do first.
    #[must_use]
    pub fn begin(dead: Dead) -> (Self, Next) {
        let mut declaration =
            Self { dead, files: Vec::new(), looked_at: BTreeSet::new(), unlisted: None, told: false };
        let next = match dead {
            Dead::Server { term } => {
                declaration.files.push(Held::Gate(term));
                declaration.go_on()
            }
            Dead::Client(_) => Next::Ask(OperatorRequest::VolumeList { after: None }),
        };
        (declaration, next)
    }

    /// The server answered.
    pub fn on_answer(&mut self, answer: Result<OperatorReply, Refusal>) -> Next {
        match (self.dead, answer) {
            (_, Ok(_)) if self.told => Next::Done,
            // It held nothing.
            (_, Err(refusal)) if self.told && refusal.kind == RefusalKind::NotFound => Next::Done,
            (_, Err(refusal)) => Next::Failed(refusal.to_string()),
            (Dead::Client(run), Ok(OperatorReply::Volumes { rows, more })) => {
                // Pages are asked for when the files of the one before have been looked at.
                for (volume, head) in heads_written_by(&rows, run.instance) {
                    self.looked_at.insert(volume);
                    self.files.push(head);
                }
                if self.looked_at.len() > LOOKED_AT_MAX {
                    return Next::Failed(format!(
                        "it wrote more than {LOOKED_AT_MAX} volumes, says the server"
                    ));
                }
                self.unlisted = rows.last().filter(|_| more).map(|last| last.name.clone());
                self.go_on()
            }
            (_, Ok(_)) => Next::Failed("the server's answer is to another question".to_owned()),
        }
    }

    /// The file was looked at.
    pub fn on_sight(&mut self, sight: Sight) -> Next {
        let Some(file) = self.files.last() else {
            return Next::Failed("nothing was to be looked at".to_owned());
        };
        let why = match (sight, file) {
            (Sight::Locked, file) => return Next::LookAgain(file.clone()),
            // Only we make and delete files of the pool; a term without a gate never served.
            (Sight::Free, _) | (Sight::Missing, Held::Gate(_) | Held::Head(_)) => {
                self.files.pop();
                return self.go_on();
            }
            (Sight::Unknown(why), _) => why,
            (Sight::Missing, Held::Origin { path, .. }) => {
                format!(
                    "{path} is missing, so I/O to it may still be on its way; put it back, or fence the session"
                )
            }
            (Sight::Replaced, Held::Origin { path, .. }) => format!(
                "{path} is not the file that was adopted, so I/O to that may still be on its way; put the original back, \
                 or fence the session"
            ),
            (Sight::Replaced, file) => format!("{file:?} has no identity to differ from"),
        };
        Next::Failed(why)
    }

    fn go_on(&mut self) -> Next {
        if let Some(file) = self.files.last() {
            return Next::Look(file.clone());
        }
        if let Some(after) = self.unlisted.take() {
            return Next::Ask(OperatorRequest::VolumeList { after: Some(after) });
        }
        self.told = true;
        Next::Ask(match self.dead {
            Dead::Server { term } => OperatorRequest::ServerReaped { term },
            Dead::Client(run) => {
                let looked_at = std::mem::take(&mut self.looked_at).into_iter().collect();
                OperatorRequest::Reaped { instance: run.instance, looked_at }
            }
        })
    }
}

/// Heads that the dead run had open for writing, as the server knows it.
fn heads_written_by(volumes: &[VolumeInfo], dead: InstanceId) -> Vec<(VolumeId, Held)> {
    let written =
        |volume: &&VolumeInfo| volume.attached.iter().any(|a| a.snapshot.is_none() && a.instance == dead);
    let head = |volume: &VolumeInfo| match &volume.head {
        Head::Pool => Held::Head(volume.id),
        Head::Adopted { path, device, inode } => {
            Held::Origin { path: path.clone(), device: *device, inode: *inode }
        }
    };
    volumes.iter().filter(written).map(|volume| (volume.id, head(volume))).collect()
}

#[cfg(test)]
mod tests {
    use csnap_proto::message::operate::Attachment;
    use csnap_proto::{ChunkSize, Epoch, SessionId, WallMillis};

    use super::super::{ClientRun, Process};
    use super::*;

    const DEAD: InstanceId = InstanceId([1; 16]);
    const OTHER: InstanceId = InstanceId([2; 16]);

    fn client() -> Dead {
        Dead::Client(ClientRun { instance: DEAD, process: Process { pid: 1, started: 1 } })
    }

    fn origin() -> Head {
        Head::Adopted { path: "/dev/disk".to_owned(), device: 3, inode: 4 }
    }

    fn volume(id: u64, head: Head, attached: &[(InstanceId, bool)]) -> VolumeInfo {
        let name = || Name::new("demo").expect("a name");
        let attachment = |(instance, reads_snapshot): &(InstanceId, bool)| Attachment {
            session: SessionId([0; 16]),
            instance: *instance,
            node: name(),
            pid: 1,
            snapshot: reads_snapshot.then(name),
            present: false,
        };
        VolumeInfo {
            id: VolumeId(id),
            name: name(),
            size_bytes: 1 << 20,
            chunk: ChunkSize::MIN,
            head,
            created: WallMillis(0),
            snapshots: 0,
            epoch: Epoch(1),
            store_bytes: 0,
            attached: attached.iter().map(attachment).collect(),
            blocked: None,
        }
    }

    fn reaped(looked_at: &[u64]) -> OperatorRequest {
        let looked_at = looked_at.iter().copied().map(VolumeId).collect();
        OperatorRequest::Reaped { instance: DEAD, looked_at }
    }

    /// A declaration of a client that has this volume open, up to the look at its head.
    fn looking(head: Head) -> Declaration {
        let (mut declaration, first) = Declaration::begin(client());
        assert_eq!(first, Next::Ask(OperatorRequest::VolumeList { after: None }));
        let rows = vec![volume(7, head, &[(DEAD, false)])];
        let next = declaration.on_answer(Ok(OperatorReply::Volumes { rows, more: false }));
        assert!(matches!(next, Next::Look(_)), "{next:?}");
        declaration
    }

    #[test]
    fn the_heads_of_exactly_the_sessions_that_end_are_looked_at() {
        let volumes = [
            volume(1, Head::Pool, &[(DEAD, false)]),
            volume(2, Head::Pool, &[(DEAD, true), (OTHER, false)]),
            volume(3, origin(), &[(OTHER, true), (DEAD, false)]),
            volume(4, Head::Pool, &[]),
        ];
        let origin = Held::Origin { path: "/dev/disk".to_owned(), device: 3, inode: 4 };
        let expected = [(VolumeId(1), Held::Head(VolumeId(1))), (VolumeId(3), origin)];
        assert_eq!(heads_written_by(&volumes, DEAD), expected);
    }

    #[test]
    fn every_page_of_volumes_is_looked_at_before_the_client_is_declared() {
        let mut declaration = Declaration::begin(client()).0;
        let page = |id, more| {
            let rows = vec![volume(id, Head::Pool, &[(DEAD, false)])];
            Ok(OperatorReply::Volumes { rows, more })
        };
        assert_eq!(declaration.on_answer(page(1, true)), Next::Look(Held::Head(VolumeId(1))));
        let Next::Ask(next) = declaration.on_sight(Sight::Free) else { panic!("the next page") };
        assert!(matches!(next, OperatorRequest::VolumeList { after: Some(_) }));
        assert_eq!(declaration.on_answer(page(2, false)), Next::Look(Held::Head(VolumeId(2))));
        assert_eq!(declaration.on_sight(Sight::Missing), Next::Ask(reaped(&[1, 2])));
    }

    #[test]
    fn a_volume_that_was_on_no_page_is_not_claimed_to_be_looked_at() {
        let mut declaration = looking(Head::Pool);
        assert_eq!(declaration.on_sight(Sight::Free), Next::Ask(reaped(&[7])));
        let another = Refusal::new(RefusalKind::Busy, "another volume is written by it too");
        assert!(matches!(declaration.on_answer(Err(another)), Next::Failed(_)), "and all is looked at again");
    }

    #[test]
    fn a_client_is_declared_when_every_head_gave_its_lock() {
        let mut declaration = looking(Head::Pool);
        assert_eq!(declaration.on_sight(Sight::Locked), Next::LookAgain(Held::Head(VolumeId(7))));
        assert_eq!(declaration.on_sight(Sight::Free), Next::Ask(reaped(&[7])));
        assert_eq!(declaration.on_answer(Ok(OperatorReply::Done)), Next::Done);
    }

    #[test]
    fn a_server_is_declared_when_its_gate_gave_its_lock_or_was_never_made() {
        for sight in [Sight::Free, Sight::Missing] {
            let (mut declaration, first) = Declaration::begin(Dead::Server { term: Term(7) });
            assert_eq!(first, Next::Look(Held::Gate(Term(7))));
            assert_eq!(declaration.on_sight(Sight::Locked), Next::LookAgain(Held::Gate(Term(7))));
            let told = OperatorRequest::ServerReaped { term: Term(7) };
            assert_eq!(declaration.on_sight(sight), Next::Ask(told));
            let nothing = Refusal::new(RefusalKind::NotFound, "it held nothing");
            assert_eq!(declaration.on_answer(Err(nothing)), Next::Done);
        }
    }

    #[test]
    fn what_is_not_the_file_that_the_dead_wrote_proves_nothing() {
        for (head, sight) in [
            (origin(), Sight::Missing),
            (origin(), Sight::Replaced),
            (origin(), Sight::Unknown("no".to_owned())),
            (Head::Pool, Sight::Unknown("no".to_owned())),
        ] {
            let next = looking(head).on_sight(sight.clone());
            assert!(matches!(next, Next::Failed(_)), "{sight:?}: {next:?}");
        }
    }
}
