//! The configuration store: small values by name, each with a version, some of which go with their session.
//!
//! A version is the revision of the whole store at which the key was written. Revisions only grow, so a version never
//! comes back, also not for a key that was deleted and made anew.

use serde::{Deserialize, Serialize};

use super::check_text;
use crate::ids::{Revision, SessionId};
use crate::limits::{KEY_BYTES_MAX, KEY_VALUE_BYTES_MAX};

/// What must be so for a change to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Expect {
    /// Nothing.
    Any,
    /// There is no such key.
    Absent,
    /// It has this version.
    Version(Revision),
}

/// An operation on keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeyOp {
    /// Write a key. → [`KeyReply::Done`] or [`KeyReply::Conflict`].
    Put {
        /// Which, 1 to [`KEY_BYTES_MAX`] bytes.
        key: String,
        /// Content, at most [`KEY_VALUE_BYTES_MAX`] bytes.
        value: Vec<u8>,
        /// Only if.
        expect: Expect,
        /// It goes when this session ends. A later write decides anew.
        ephemeral: bool,
    },
    /// Delete a key. → [`KeyReply::Done`], [`KeyReply::Conflict`], or [`KeyReply::Found`] with nothing where there was
    /// none and none was expected.
    Delete {
        /// Which.
        key: String,
        /// Only if.
        expect: Expect,
    },
    /// Read a key. → [`KeyReply::Found`].
    Get {
        /// Which.
        key: String,
    },
    /// Read the keys that begin with a prefix, in order, a page at a time. → [`KeyReply::Page`].
    List {
        /// What they begin with; empty for all.
        prefix: String,
        /// Those after this one: the last of the page before.
        after: Option<String>,
    },
}

/// A key as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyView {
    /// Its name.
    pub key: String,
    /// Its content.
    pub value: Vec<u8>,
    /// Revision at which it was written.
    pub version: Revision,
    /// Revision at which it was made.
    pub created: Revision,
    /// The session that it goes with, if any.
    pub session: Option<SessionId>,
}

/// Answer to a [`KeyOp`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeyReply {
    /// Written or deleted, at this revision.
    Done {
        /// For a write, the key's version.
        version: Revision,
    },
    /// Not done: the key is not as expected.
    Conflict {
        /// Version that it has; absent where there is no such key.
        version: Option<Revision>,
    },
    /// The key, or that there is none.
    Found(Option<KeyView>),
    /// Some keys.
    Page {
        /// In order of their names.
        keys: Vec<KeyView>,
        /// There are more after the last of these.
        more: bool,
        /// Revision of the store.
        revision: Revision,
    },
}

impl KeyOp {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::Put { key, value, .. } => {
                check_key(key)?;
                if value.len() > KEY_VALUE_BYTES_MAX { Err("length of a key's value") } else { Ok(()) }
            }
            Self::Delete { key, .. } | Self::Get { key } => check_key(key),
            Self::List { prefix, after } => {
                check_prefix(prefix)?;
                after.as_deref().map_or(Ok(()), check_prefix)
            }
        }
    }
}

pub(super) fn check_key(key: &str) -> Result<(), &'static str> {
    check_text(key, KEY_BYTES_MAX, "length of a key")
}

pub(super) fn check_prefix(prefix: &str) -> Result<(), &'static str> {
    if prefix.len() > KEY_BYTES_MAX { Err("length of a prefix of keys") } else { Ok(()) }
}
