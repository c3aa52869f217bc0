//! Who holds what, in words: sessions and owners as lockd lists them.

use std::collections::BTreeMap;

use csnap_proto::SessionId;
use csnap_proto::message::lock::{Holder, LockOp, LockReply, LockRow, Member, ResourceView, Watched};
use serde_json::{Value, json};

use super::session::{Session, unexpected};

/// The live sessions.
pub(super) struct Who(BTreeMap<SessionId, Member>);

impl Who {
    /// As of now.
    pub(super) async fn ask(session: &Session) -> anyhow::Result<Self> {
        let what = Watched::Members;
        let reply = session.ask(LockOp::Watch { what: what.clone(), once: true }).await?;
        let LockReply::Members(members) = reply else { return Err(unexpected(&reply)) };
        session.ask(LockOp::Unwatch { what }).await?;
        Ok(Self(members.into_iter().map(|member| (member.session, member)).collect()))
    }

    /// A holder on one line.
    pub(super) fn name(&self, holder: &Holder) -> String {
        let owner = holder.owner.map(|owner| format!("owner {owner}"));
        let session = holder.session.map(|session| match self.0.get(&session) {
            Some(member) => describe(member),
            None => format!("session {session}"),
        });
        let words: Vec<_> = session.into_iter().chain(owner).collect();
        if holder.session.is_none() { format!("{} (orphan)", words.join(", ")) } else { words.join(", ") }
    }

    /// A holder as scripts see it.
    pub(super) fn json(&self, holder: &Holder) -> Value {
        let member = holder.session.and_then(|session| self.0.get(&session));
        json!({
            "session": holder.session.map(|session| session.to_string()),
            "owner": holder.owner.map(|owner| owner.to_string()),
            "node": member.map(|member| member.node.as_str()),
            "info": member.and_then(text),
        })
    }

    /// A lock as scripts see it.
    pub(super) fn row_json(&self, row: &LockRow) -> Value {
        json!({
            "lock": row.lock.0,
            "mode": row.mode.map(mode_name),
            "wanted": row.wanted.map(mode_name),
            "term": row.term.0,
            "flags": row.flags.to_string(),
            "holder": self.json(&row.holder),
        })
    }
}

/// Node, and what its session says of itself, if that is text: agents describe themselves otherwise.
pub(super) fn describe(member: &Member) -> String {
    match text(member) {
        Some(text) => format!("{} {text}", member.node),
        None => format!("{} session {}", member.node, member.session),
    }
}

/// What a session says of itself, if it is meant for people.
pub(super) fn text(member: &Member) -> Option<String> {
    let text = String::from_utf8(member.info.clone()).ok()?;
    let printable = !text.is_empty() && !text.chars().any(char::is_control);
    printable.then_some(text)
}

/// The name that a mode has in the field.
pub(super) fn mode_name(mode: csnap_proto::message::lock::Mode) -> String {
    format!("{mode:?}").to_uppercase()
}

/// Who keeps others from a resource, on one line: its highest holder.
pub(super) async fn in_the_way(session: &Session, name: &str) -> anyhow::Result<String> {
    let reply = session.ask(LockOp::Show { resource: name.to_owned() }).await?;
    let LockReply::Resource(ResourceView { granted, waiting, .. }) = reply else {
        return Err(unexpected(&reply));
    };
    let who = Who::ask(session).await?;
    let highest = granted.iter().max_by_key(|row| row.mode);
    Ok(match (highest, waiting.len()) {
        (Some(row), waiting) => {
            let mode = row.mode.map(mode_name).unwrap_or_default();
            let others = match granted.len() - 1 + waiting {
                0 => String::new(),
                count => format!(", and {count} more hold or want it"),
            };
            format!("lock {} has it in {mode}: {}{others}", row.lock, who.name(&row.holder))
        }
        (None, 0) => "whoever had it is gone by now".to_owned(),
        (None, waiting) => format!("{waiting} wait for it"),
    })
}
