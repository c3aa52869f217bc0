//! `csnap lock watch` and `csnap kv watch`: what is now, then every change, a line or an object each.
//!
//! Nothing is left out while the session lasts, over any number of connections and lockds. When events were dropped, or the
//! session ended and another one began, that is said, and what is now follows once more.

use std::io::ErrorKind;
use std::time::Duration;

use csnap_proto::Revision;
use csnap_proto::message::lock::{
    Holder, KeyReply, KeyView, LockEvent, LockOp, LockReply, LockRow, Member, ValueBlock, Watched,
};
use serde_json::{Value, json};

use super::bytes::{quoted, shown};
use super::interrupts::Interrupts;
use super::kv::{Page, key_json, pages};
use super::session::{LEASE, News, Place, Session, unexpected};
use super::show::value_json;
use super::who::{describe, mode_name, text};
use crate::output;

/// What is watched, by one command.
pub(super) enum What {
    Lock(String),
    Key(String),
    Prefix(String),
    Members,
}

/// Between two attempts to have a session again.
const AGAIN: Duration = Duration::from_secs(1);

/// Watches until a signal, or until nobody reads any more.
pub(super) async fn watch(place: &Place, json: bool, what: What) -> anyhow::Result<()> {
    let mut interrupts = Interrupts::catch()?;
    let mut watcher = Watcher { json, what, seen: Seen::default() };
    let mut session = Session::open(place, "watch", LEASE).await?;
    loop {
        let ended = tokio::select! {
            ended = watcher.follow(&mut session) => ended,
            _ = interrupts.next() => {
                session.close().await;
                return Ok(());
            }
        };
        match ended {
            Ok(reason) => watcher.print(Line::again("session", &reason))?,
            Err(error) => {
                session.close().await;
                let gone = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
                return if gone == Some(ErrorKind::BrokenPipe) { Ok(()) } else { Err(error) };
            }
        }
        session = loop {
            tokio::select! {
                opened = Session::open(place, "watch", LEASE) => match opened {
                    Ok(session) => break session,
                    Err(error) => eprintln!("csnap: {error:#}; still trying"),
                },
                _ = interrupts.next() => return Ok(()),
            }
            tokio::select! {
                () = tokio::time::sleep(AGAIN) => {}
                _ = interrupts.next() => return Ok(()),
            }
        };
    }
}

struct Watcher {
    json: bool,
    what: What,
    seen: Seen,
}

impl Watcher {
    /// Looks, then tells every change until the session is over; gives the reason.
    async fn follow(&mut self, session: &mut Session) -> anyhow::Result<String> {
        self.look(session).await?;
        loop {
            match session.next().await {
                News::Event(LockEvent::Overrun) => {
                    self.print(Line::again("overrun", "events were dropped"))?;
                    self.look(session).await?;
                }
                News::Event(event) => self.tell(&event)?,
                News::Jeopardy => {}
                News::Over(reason) => return Ok(reason),
            }
        }
    }

    /// Begins to watch, and tells what is.
    async fn look(&mut self, session: &Session) -> anyhow::Result<()> {
        let begin = async |what: Watched| session.ask(LockOp::watch(what)).await;
        match &self.what {
            What::Lock(name) => {
                match begin(Watched::Value(name.clone())).await? {
                    LockReply::Value { value, vacant } => {
                        self.print(Line::value(name, &value, vacant).now())?
                    }
                    reply => return Err(unexpected(&reply)),
                }
                match begin(Watched::Grants(name.clone())).await? {
                    LockReply::Resource(view) => {
                        for row in &view.granted {
                            self.print(Line::held(name, row).now())?;
                        }
                    }
                    reply => return Err(unexpected(&reply)),
                }
            }
            What::Key(key) => match begin(Watched::Key(key.clone())).await? {
                LockReply::Key(KeyReply::Found(view)) => {
                    self.seen = Seen::key(view.as_ref());
                    self.print(Line::key(key, view.as_ref(), None).now())?;
                }
                reply => return Err(unexpected(&reply)),
            },
            What::Prefix(prefix) => match begin(Watched::Prefix(prefix.clone())).await? {
                LockReply::Key(first) => {
                    let pages = pages(session, prefix, Some(first)).await?;
                    self.seen = Seen::pages(&pages);
                    for view in pages.iter().flat_map(|page| &page.keys) {
                        self.print(Line::key(&view.key, Some(view), None).now())?;
                    }
                }
                reply => return Err(unexpected(&reply)),
            },
            What::Members => match begin(Watched::Members).await? {
                LockReply::Members(members) => {
                    for member in &members {
                        self.print(Line::up(member).now())?;
                    }
                }
                reply => return Err(unexpected(&reply)),
            },
        }
        Ok(())
    }

    fn tell(&self, event: &LockEvent) -> anyhow::Result<()> {
        match event {
            LockEvent::Changed { resource, value, vacant } => {
                self.print(Line::value(resource, value, *vacant))
            }
            LockEvent::Held { resource, row } => self.print(Line::held(resource, row)),
            LockEvent::Key { key, revision, .. } if !self.seen.is_new(key, *revision) => Ok(()),
            LockEvent::Key { key, entry, revision } => {
                self.print(Line::key(key, entry.as_ref(), Some(*revision)))
            }
            LockEvent::MemberUp(member) => self.print(Line::up(member)),
            LockEvent::MemberDown { session, node } => self.print(Line::new(
                format!("down {node} session {session}"),
                json!({ "event": "down", "node": node.as_str(), "session": session.to_string() }),
            )),
            _ => Ok(()),
        }
    }

    fn print(&self, line: Line) -> anyhow::Result<()> {
        if self.json { output::json(&line.json) } else { output::print(&line.text) }
    }
}

/// How new what was listed was. Lists come in pages that are not of one instant, and a list that was asked for again after
/// a reconnection may be newer than the events that follow it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    /// Names up to and with the first, for all that follow without a name, as of the revision; in order.
    listed: Vec<(Option<String>, Revision)>,
}

impl Seen {
    /// A key; of one that is not there nothing is known.
    fn key(view: Option<&KeyView>) -> Self {
        Self { listed: view.map(|view| (None, view.version)).into_iter().collect() }
    }

    fn pages(pages: &[Page]) -> Self {
        let count = pages.len();
        let end =
            |at: usize, page: &Page| page.keys.last().filter(|_| at + 1 < count).map(|last| last.key.clone());
        let listed = pages.iter().enumerate().map(|(at, page)| (end(at, page), page.revision));
        Self { listed: listed.collect() }
    }

    /// Whether a change of a key came after what was listed.
    fn is_new(&self, key: &str, revision: Revision) -> bool {
        let covers = |end: &Option<String>| end.as_deref().is_none_or(|end| key <= end);
        let page = self.listed.iter().find(|(end, _)| covers(end));
        page.is_none_or(|(_, listed)| revision > *listed)
    }
}

/// One event, in both forms.
struct Line {
    text: String,
    json: Value,
}

impl Line {
    fn new(text: String, mut json: Value) -> Self {
        json["now"] = false.into();
        Self { text: format!("new {text}\n"), json }
    }

    /// What is, not what changed.
    fn now(mut self) -> Self {
        self.text.replace_range(..3, "now");
        self.json["now"] = true.into();
        self
    }

    /// What is now follows once more, for this reason.
    fn again(event: &str, reason: &str) -> Self {
        let text = format!("{event}: {reason}; what is now follows");
        Self::new(text, json!({ "event": event, "reason": reason }))
    }

    fn value(name: &str, value: &ValueBlock, vacant: bool) -> Self {
        let [valid, writer] =
            [if value.valid { "valid" } else { "invalid" }, if vacant { "vacant" } else { "writer" }];
        let (shown, bytes, sequence) = (shown(name), quoted(&value.bytes), value.sequence);
        Self::new(
            format!("value {shown} sequence {sequence} {valid} {writer} {bytes}"),
            json!({ "event": "value", "name": name, "vacant": vacant, "value": value_json(value) }),
        )
    }

    fn held(name: &str, row: &LockRow) -> Self {
        let Holder { session, owner } = row.holder;
        let [session, owner] = [session.map(|id| id.to_string()), owner.map(|id| id.to_string())];
        let id = |label: &str, id: &Option<String>| {
            id.as_ref().map_or(String::new(), |id| format!(" {label} {id}"))
        };
        let whose = format!("{}{}", id("session", &session), id("owner", &owner));
        let (lock, term) = (row.lock, row.term);
        let (event, mode) = match row.mode {
            Some(mode) => ("held", Some(mode_name(mode))),
            None => ("gone", None),
        };
        let shown_mode = mode.as_ref().map_or(String::new(), |mode| format!(" {mode} term {term}"));
        Self::new(
            format!("{event} {} lock {lock}{shown_mode}{whose}", shown(name)),
            json!({ "event": event, "name": name, "lock": lock.0, "mode": mode, "term": term.0,
                "session": session, "owner": owner }),
        )
    }

    /// A key as it is; without one it is not there, since `revision` if it just went.
    fn key(key: &str, view: Option<&KeyView>, revision: Option<Revision>) -> Self {
        match (view, revision) {
            (Some(view), _) => {
                let mut json = key_json(view);
                json["event"] = "put".into();
                let (key, version, value) = (shown(key), view.version, quoted(&view.value));
                Self::new(format!("put {key} version {version} {value}"), json)
            }
            (None, Some(revision)) => Self::new(
                format!("deleted {} revision {revision}", shown(key)),
                json!({ "event": "deleted", "key": key, "revision": revision.0 }),
            ),
            (None, None) => {
                Self::new(format!("absent {}", shown(key)), json!({ "event": "absent", "key": key }))
            }
        }
    }

    fn up(member: &Member) -> Self {
        Self::new(
            format!("up {}", describe(member)),
            json!({ "event": "up", "node": member.node.as_str(), "session": member.session.to_string(),
                "info": text(member) }),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(key: &str, version: u64) -> KeyView {
        let (version, created) = (Revision(version), Revision(1));
        KeyView { key: key.to_owned(), value: Vec::new(), version, created, session: None }
    }

    #[test]
    fn what_a_list_already_showed_is_not_told_again() {
        let page = |names: &[&str], revision| Page {
            keys: names.iter().map(|name| view(name, 1)).collect(),
            revision: Revision(revision),
        };
        let seen = Seen::pages(&[page(&["a", "c"], 5), page(&["d"], 8)]);
        for (key, revision, new) in [
            ("b", 5, false),
            ("b", 6, true),
            ("c", 6, true),
            ("cc", 6, false),
            ("z", 8, false),
            ("z", 9, true),
        ] {
            assert_eq!(seen.is_new(key, Revision(revision)), new, "{key} {revision}");
        }
        assert!(!Seen::key(Some(&view("k", 7))).is_new("k", Revision(7)));
        assert!(Seen::key(None).is_new("k", Revision(1)), "of what is not there nothing is known");
    }
}
