//! Who may ask for what: one table, and nothing beside it. Pure.
//!
//! Whoever is at the other end proved a role and a name before anything of theirs is read. Every request is of a
//! [`Request`]; the table says which role may make it, and what it does not name is denied. A new message must be given its
//! kind here, or it does not compile.
//!
//! Whose lock, session or key it is, is not asked here: that is proved by secrets, and judged by the table of locks.

use std::fmt;

use csnap_proto::message::lock::{GroupRequest, KeyOp, LockOp, SpaceRequest, ToLockd, Watched};
use csnap_proto::{Caller, Role};

/// Before the names of locks and keys that csnap's own daemons use.
pub const RESERVED: &str = "csnap/";

/// A deliberate break of the table's rule, for the test that must notice it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Canary {
    /// What the table does not name is allowed.
    AllowByDefault,
}

/// The rule that is broken: none, outside tests.
pub type Broken = crate::broken::Broken<Canary>;

/// What is asked for, as far as it matters who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Request {
    /// Who leads, who is there.
    Status,
    /// A session under the caller's own name.
    Open,
    /// A session under another name.
    OpenAsAnother,
    /// To go on with a session; its secret proves whose it is.
    Resume,
    /// To keep a session alive, or to end it.
    Keep,
    /// To publish a description, which agents take for a node's.
    Describe,
    /// A new lock.
    Lock,
    /// A new lock that csnap's own daemons use.
    LockReserved,
    /// To convert, give up or cancel a lock of one's own, or to adopt one with its owner's secret.
    UseLock,
    /// To take a lock from whoever has it.
    Break,
    /// To see a lock, a key or the members, once or with every change.
    Watch,
    /// To see all locks.
    ListLocks,
    /// To change the group of lockds, or who leads it.
    ChangeGroup,
    /// To read keys.
    ReadKeys,
    /// To write or delete a key.
    WriteKeys,
    /// To write or delete a key that csnap's own daemons use.
    WriteReservedKeys,
    /// To say which lockspace a session is about.
    Enter,
    /// To see lockspaces, or to make or move one.
    Spaces,
    /// To bring a lockspace from another group, and to say what becomes of it.
    Bring,
    /// To be a replica of the group, on the port for replicas.
    Replicate,
}

impl Request {
    /// All of them.
    pub const ALL: [Self; 20] = [
        Self::Status,
        Self::Open,
        Self::OpenAsAnother,
        Self::Resume,
        Self::Keep,
        Self::Describe,
        Self::Lock,
        Self::LockReserved,
        Self::UseLock,
        Self::Break,
        Self::Watch,
        Self::ListLocks,
        Self::ChangeGroup,
        Self::ReadKeys,
        Self::WriteKeys,
        Self::WriteReservedKeys,
        Self::Enter,
        Self::Spaces,
        Self::Bring,
        Self::Replicate,
    ];

    /// Of which kind a message is; `caller` tells one's own name from another.
    #[must_use]
    pub fn of(caller: &Caller, message: &ToLockd) -> Self {
        match message {
            ToLockd::Status | ToLockd::Group(GroupRequest::Show) => Self::Status,
            ToLockd::Group(
                GroupRequest::Move { .. } | GroupRequest::Add { .. } | GroupRequest::Remove { .. },
            ) => Self::ChangeGroup,
            ToLockd::Open { node, .. } if *node != caller.name => Self::OpenAsAnother,
            ToLockd::Open { info, .. } if !info.is_empty() => Self::Describe,
            ToLockd::Open { .. } => Self::Open,
            ToLockd::Resume { .. } => Self::Resume,
            ToLockd::Renew { .. } | ToLockd::Close => Self::Keep,
            ToLockd::Operate { op, .. } => Self::of_operation(op),
            ToLockd::Enter { .. } => Self::Enter,
            ToLockd::Space(
                SpaceRequest::List
                | SpaceRequest::Create { .. }
                | SpaceRequest::Migrate { .. }
                | SpaceRequest::Abort { .. },
            ) => Self::Spaces,
            ToLockd::Space(
                SpaceRequest::Import { .. } | SpaceRequest::Activate { .. } | SpaceRequest::Discard { .. },
            ) => Self::Bring,
        }
    }

    fn of_operation(op: &LockOp) -> Self {
        match op {
            LockOp::Lock { resource, .. } if resource.starts_with(RESERVED) => Self::LockReserved,
            LockOp::Lock { .. } => Self::Lock,
            LockOp::Convert { .. } | LockOp::Unlock { .. } | LockOp::Cancel { .. } | LockOp::Adopt { .. } => {
                Self::UseLock
            }
            LockOp::Break { .. } => Self::Break,
            LockOp::Watch { what: Watched::Key(_) | Watched::Prefix(_), .. } => Self::ReadKeys,
            LockOp::Watch { what: Watched::Value(_) | Watched::Grants(_) | Watched::Members, .. }
            | LockOp::Unwatch { .. }
            | LockOp::Show { .. } => Self::Watch,
            LockOp::SetInfo { .. } => Self::Describe,
            LockOp::Key(KeyOp::Put { key, .. } | KeyOp::Delete { key, .. }) => {
                if key.starts_with(RESERVED) {
                    Self::WriteReservedKeys
                } else {
                    Self::WriteKeys
                }
            }
            LockOp::Key(KeyOp::Get { .. } | KeyOp::List { .. }) => Self::ReadKeys,
            LockOp::Locks { .. } => Self::ListLocks,
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Status => "ask for the status",
            Self::Open => "open a session",
            Self::OpenAsAnother => "open a session under another name",
            Self::Resume => "resume a session",
            Self::Keep => "renew or close a session",
            Self::Describe => "publish a description",
            Self::Lock => "lock",
            Self::LockReserved => "lock what begins with csnap/",
            Self::UseLock => "convert, unlock, cancel or adopt a lock",
            Self::Break => "break a lock",
            Self::Watch => "watch",
            Self::ListLocks => "list all locks",
            Self::ChangeGroup => "change the group of lockds",
            Self::ReadKeys => "read keys",
            Self::WriteKeys => "write keys",
            Self::WriteReservedKeys => "write keys that begin with csnap/",
            Self::Enter => "enter a lockspace",
            Self::Spaces => "see, make or move lockspaces",
            Self::Bring => "bring a lockspace, activate or discard it",
            Self::Replicate => "replicate",
        })
    }
}

/// The table.
#[must_use]
pub fn allows(role: Role, request: Request) -> bool {
    use Request as R;
    match role {
        Role::Operator => matches!(
            request,
            R::Status
                | R::Open
                | R::OpenAsAnother
                | R::Resume
                | R::Keep
                | R::Describe
                | R::Lock
                | R::LockReserved
                | R::UseLock
                | R::Break
                | R::Watch
                | R::ListLocks
                | R::ChangeGroup
                | R::ReadKeys
                | R::WriteKeys
                | R::WriteReservedKeys
                | R::Enter
                | R::Spaces
                | R::Bring
        ),
        Role::Node => matches!(
            request,
            R::Status
                | R::Open
                | R::Resume
                | R::Keep
                | R::Describe
                | R::Lock
                | R::LockReserved
                | R::UseLock
                | R::Watch
                | R::ReadKeys
                | R::WriteKeys
                | R::WriteReservedKeys
                | R::Enter
        ),
        Role::Client => matches!(
            request,
            R::Status
                | R::Open
                | R::Resume
                | R::Keep
                | R::Lock
                | R::UseLock
                | R::Watch
                | R::ReadKeys
                | R::WriteKeys
                | R::Enter
        ),
        Role::Lockd => matches!(request, R::Bring | R::Replicate),
    }
}

/// Somebody asked for what their role may not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("denied: {caller} may not {request}")]
pub struct Denied {
    /// Who.
    pub caller: Caller,
    /// For what.
    pub request: Request,
}

/// Whether `caller` may.
///
/// # Errors
/// If not.
pub fn check(caller: &Caller, request: Request, broken: Broken) -> Result<(), Denied> {
    if allows(caller.role, request) || broken.breaks(Canary::AllowByDefault) {
        return Ok(());
    }
    Err(Denied { caller: caller.clone(), request })
}

#[cfg(test)]
mod tests {
    use csnap_proto::message::lock::{Expect, Flags, Manifest, Mode, Owner, ReplicaNumber, ValueChange, Way};
    use csnap_proto::{EventNumber, LockId, MigrationId, Name, OwnerId, Secret, Sequence, SessionId};

    use super::*;

    fn caller(role: Role) -> Caller {
        Caller { role, name: Name::new("n1").expect("a name") }
    }

    fn open(node: &str, info: &[u8]) -> ToLockd {
        ToLockd::Open {
            session: SessionId([1; 16]),
            secret: Secret([1; 16]),
            node: Name::new(node).expect("a name"),
            lease_ms: 1500,
            info: info.to_vec(),
        }
    }

    /// A message of every kind that there is, and of each the kind that it must be.
    fn messages() -> Vec<(ToLockd, Request)> {
        let operate = |op| ToLockd::Operate { sequence: Sequence(1), lowest_unanswered: Sequence(1), op };
        let (lock, value) = (LockId(1), ValueChange::Keep);
        let put = |key: &str| KeyOp::Put {
            key: key.into(),
            value: Vec::new(),
            expect: Expect::Any,
            ephemeral: false,
        };
        let operations = [
            (LockOp::lock("a", Mode::Ex, Flags::NONE), Request::Lock),
            (LockOp::lock("csnap/server", Mode::Ex, Flags::NONE), Request::LockReserved),
            (LockOp::convert(lock, Mode::Ex, Flags::NONE), Request::UseLock),
            (LockOp::unlock(lock, value), Request::UseLock),
            (LockOp::Cancel { lock }, Request::UseLock),
            (
                LockOp::Adopt { lock, owner: Owner { id: OwnerId([1; 16]), secret: Secret([1; 16]) } },
                Request::UseLock,
            ),
            (LockOp::Break { lock }, Request::Break),
            (LockOp::watch(Watched::Value("a".into())), Request::Watch),
            (LockOp::watch(Watched::Grants("a".into())), Request::Watch),
            (LockOp::watch(Watched::Members), Request::Watch),
            (LockOp::watch(Watched::Key("a".into())), Request::ReadKeys),
            (LockOp::watch(Watched::Prefix("a".into())), Request::ReadKeys),
            (LockOp::Unwatch { what: Watched::Members }, Request::Watch),
            (LockOp::SetInfo { info: vec![1] }, Request::Describe),
            (LockOp::Key(put("a")), Request::WriteKeys),
            (LockOp::Key(put("csnap/a")), Request::WriteReservedKeys),
            (LockOp::Key(KeyOp::Delete { key: "a".into(), expect: Expect::Any }), Request::WriteKeys),
            (
                LockOp::Key(KeyOp::Delete { key: "csnap/a".into(), expect: Expect::Any }),
                Request::WriteReservedKeys,
            ),
            (LockOp::Key(KeyOp::Get { key: "csnap/a".into() }), Request::ReadKeys),
            (LockOp::Key(KeyOp::List { prefix: String::new(), after: None }), Request::ReadKeys),
            (LockOp::Show { resource: "a".into() }, Request::Watch),
            (LockOp::Locks { after: LockId(0), orphans: false }, Request::ListLocks),
        ];
        let resume = ToLockd::Resume {
            session: SessionId([1; 16]),
            secret: Secret([1; 16]),
            last_event: EventNumber(0),
        };
        let replica = ReplicaNumber(1);
        let (node, address) = (Name::new("n1").expect("a name"), ([127, 0, 0, 1], 1).into());
        let add = GroupRequest::Add { replica, node, address };
        let (name, migration) = (Name::new("work").expect("a name"), MigrationId([1; 16]));
        let spaces = [
            SpaceRequest::List,
            SpaceRequest::Create { name: name.clone() },
            SpaceRequest::Migrate { name: name.clone(), way: Way { migration, to: vec![address] } },
            SpaceRequest::Abort { name: name.clone() },
        ];
        let brought = [
            SpaceRequest::Import {
                name: name.clone(),
                migration,
                manifest: Manifest { bytes: 1, hash: [0; 32] },
                offset: 0,
                bytes: Vec::new(),
            },
            SpaceRequest::Activate { name: name.clone(), migration },
            SpaceRequest::Discard { name: name.clone(), migration },
        ];
        let mut messages = vec![
            (ToLockd::Status, Request::Status),
            (ToLockd::Group(GroupRequest::Show), Request::Status),
            (ToLockd::Group(GroupRequest::Move { to: replica }), Request::ChangeGroup),
            (ToLockd::Group(GroupRequest::Remove { replica }), Request::ChangeGroup),
            (ToLockd::Group(add), Request::ChangeGroup),
            (open("n1", b""), Request::Open),
            (open("n1", b"x"), Request::Describe),
            (open("n2", b""), Request::OpenAsAnother),
            (open("n2", b"x"), Request::OpenAsAnother),
            (resume, Request::Resume),
            (ToLockd::Renew { last_event: EventNumber(0) }, Request::Keep),
            (ToLockd::Close, Request::Keep),
            (ToLockd::Enter { space: name.clone() }, Request::Enter),
        ];
        messages.extend(spaces.map(|asked| (ToLockd::Space(asked), Request::Spaces)));
        messages.extend(brought.map(|asked| (ToLockd::Space(asked), Request::Bring)));
        messages.extend(operations.map(|(op, request)| (operate(op), request)));
        messages
    }

    #[test]
    fn every_message_is_of_its_kind_and_every_kind_but_one_has_a_message() {
        let mut seen = Vec::new();
        for (message, request) in messages() {
            for role in Role::ALL {
                assert_eq!(Request::of(&caller(role), &message), request, "{message:?}");
            }
            seen.push(request);
        }
        for request in Request::ALL {
            assert_eq!(seen.contains(&request), request != Request::Replicate, "{request:?}");
        }
    }

    /// The table once more, as docs/lockd.md has it: lockd, node, operator, client.
    const DOCUMENTED: [(Request, &str); 20] = [
        (Request::Status, "-yyy"),
        (Request::Open, "-yyy"),
        (Request::OpenAsAnother, "--y-"),
        (Request::Resume, "-yyy"),
        (Request::Keep, "-yyy"),
        (Request::Describe, "-yy-"),
        (Request::Lock, "-yyy"),
        (Request::LockReserved, "-yy-"),
        (Request::UseLock, "-yyy"),
        (Request::Break, "--y-"),
        (Request::Watch, "-yyy"),
        (Request::ListLocks, "--y-"),
        (Request::ChangeGroup, "--y-"),
        (Request::ReadKeys, "-yyy"),
        (Request::WriteKeys, "-yyy"),
        (Request::WriteReservedKeys, "-yy-"),
        (Request::Enter, "-yyy"),
        (Request::Spaces, "--y-"),
        (Request::Bring, "y-y-"),
        (Request::Replicate, "y---"),
    ];

    /// Where the table and `broken` do not say what the documentation does.
    fn differences(broken: Broken) -> Vec<Denied> {
        let mut different = Vec::new();
        for (request, row) in DOCUMENTED {
            for (role, column) in Role::ALL.into_iter().zip(row.chars()) {
                if check(&caller(role), request, broken).is_ok() != (column == 'y') {
                    different.push(Denied { caller: caller(role), request });
                }
            }
        }
        different
    }

    #[test]
    fn every_role_may_ask_for_what_is_documented_and_nothing_else() {
        assert_eq!(DOCUMENTED.map(|(request, _)| request), Request::ALL);
        assert_eq!(differences(Broken::NONE), []);
    }

    #[test]
    fn a_refusal_names_role_and_request() {
        let denied = check(&caller(Role::Node), Request::Break, Broken::NONE).expect_err("not allowed");
        assert_eq!(denied.to_string(), "denied: node n1 may not break a lock");
    }

    #[cfg(feature = "canary")]
    #[test]
    fn a_table_that_allows_by_default_is_noticed() {
        assert!(!differences(Broken::rule(Canary::AllowByDefault)).is_empty());
    }
}
