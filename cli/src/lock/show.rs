//! `csnap lock list`, `show` and `break`.

use anyhow::bail;
use csnap_proto::LockId;
use csnap_proto::message::lock::{
    Fenced, ListedLock, LockOp, LockReply, LockRow, Mode, ResourceView, ValueBlock,
};
use serde_json::{Value, json};

use super::bytes::{self, quoted, shown};
use super::session::{LEASE, Place, Session, unexpected};
use super::who::{Who, mode_name};
use crate::output;

/// `csnap lock list`
pub(super) async fn list(place: &Place, json: bool, orphans: bool) -> anyhow::Result<()> {
    let session = Session::open(place, "lock list", LEASE).await?;
    let asked = every_lock(&session, orphans).await;
    session.close().await;
    let (locks, who) = asked?;
    if json {
        let listed = locks.iter().map(|listed| {
            let mut row = who.row_json(&listed.row);
            row["name"] = listed.resource.as_str().into();
            row
        });
        return output::json(&listed.collect());
    }
    let mode = |mode: Option<Mode>| mode.map_or("-".to_owned(), mode_name);
    let row = |ListedLock { resource, row, .. }: &ListedLock| {
        let (lock, term, holder) = (row.lock.to_string(), row.term.to_string(), who.name(&row.holder));
        vec![lock, shown(resource), mode(row.mode), mode(row.wanted), term, holder]
    };
    let rows: Vec<_> = locks.iter().map(row).collect();
    output::print(&output::table(&["LOCK", "NAME", "MODE", "WANTED", "TERM", "HOLDER"], &rows))
}

async fn every_lock(session: &Session, orphans: bool) -> anyhow::Result<(Vec<ListedLock>, Who)> {
    let mut all: Vec<ListedLock> = Vec::new();
    loop {
        let after = all.last().map_or(LockId(0), |last| last.row.lock);
        let reply = session.ask(LockOp::Locks { after, orphans }).await?;
        let LockReply::Locks { locks, more } = reply else { return Err(unexpected(&reply)) };
        let over = !more || locks.is_empty();
        all.extend(locks);
        if over {
            return Ok((all, Who::ask(session).await?));
        }
    }
}

/// `csnap lock show`
pub(super) async fn show(place: &Place, json: bool, name: String) -> anyhow::Result<()> {
    let session = Session::open(place, &format!("lock show {name}"), LEASE).await?;
    let asking = async {
        let reply = session.ask(LockOp::Show { resource: name.clone() }).await?;
        let LockReply::Resource(view) = reply else { return Err(unexpected(&reply)) };
        anyhow::Ok((view, Who::ask(&session).await?))
    };
    let asked = asking.await;
    session.close().await;
    let (view, who) = asked?;
    if json {
        return output::json(&resource_json(&name, &view, &who));
    }
    output::print(&resource_text(&name, &view, &who))
}

/// A resource as scripts see it.
pub(super) fn resource_json(name: &str, view: &ResourceView, who: &Who) -> Value {
    let rows = |rows: &[LockRow]| rows.iter().map(|row| who.row_json(row)).collect::<Vec<_>>();
    json!({
        "name": name,
        "value": value_json(&view.value),
        "granted": rows(&view.granted),
        "converting": view.converting.iter().map(|lock| lock.0).collect::<Vec<_>>(),
        "waiting": rows(&view.waiting),
    })
}

/// A resource for people, the first in each queue first.
fn resource_text(name: &str, view: &ResourceView, who: &Who) -> String {
    let mut text = format!("name        {}\nvalue       {}\n", shown(name), value_text(&view.value));
    let line = |queue: &str, row: &LockRow| {
        let mode = match (row.mode, row.wanted) {
            (Some(mode), None) => mode_name(mode),
            (Some(mode), Some(wanted)) => format!("{} to {}", mode_name(mode), mode_name(wanted)),
            (None, wanted) => wanted.map(mode_name).unwrap_or_default(),
        };
        let term = if row.term.0 == 0 { String::new() } else { format!(" term {}", row.term) };
        format!("{queue:<11} lock {} {mode}{term}: {}\n", row.lock, who.name(&row.holder))
    };
    for row in view.granted.iter().filter(|row| row.wanted.is_none()) {
        text += &line("granted", row);
    }
    for id in &view.converting {
        text.extend(view.granted.iter().filter(|row| row.lock == *id).map(|row| line("converting", row)));
    }
    for row in &view.waiting {
        text += &line("waiting", row);
    }
    text
}

/// A value block as scripts see it.
pub(super) fn value_json(value: &ValueBlock) -> Value {
    let mut shown = bytes::value_json(&value.bytes);
    shown["sequence"] = value.sequence.into();
    shown["valid"] = value.valid.into();
    shown["term"] = value.term.0.into();
    shown["session"] = value.writer.session.map(|session| session.to_string()).into();
    shown["owner"] = value.writer.owner.map(|owner| owner.to_string()).into();
    shown
}

/// A value block for people.
pub(super) fn value_text(value: &ValueBlock) -> String {
    if value.sequence == 0 {
        return "none".to_owned();
    }
    let valid = if value.valid { "valid" } else { "not valid" };
    let (bytes, sequence, term) = (quoted(&value.bytes), value.sequence, value.term);
    format!("{bytes}, {valid}, sequence {sequence}, written in term {term}")
}

/// `csnap lock break`
pub(super) async fn break_lock(place: &Place, json: bool, lock: u64) -> anyhow::Result<()> {
    let session = Session::open(place, &format!("lock break {lock}"), LEASE).await?;
    let breaking = async {
        // Before it is gone, for what is said of its holder.
        let who = Who::ask(&session).await?;
        match session.ask(LockOp::Break { lock: LockId(lock) }).await {
            Ok(LockReply::Broken(fenced)) => Ok((fenced, who)),
            Ok(reply) => Err(unexpected(&reply)),
            Err(why) if why.to_string().starts_with("denied: ") => Err(why),
            Err(why) => bail!("lock {lock}: {why:#}; csnap lock list has the numbers"),
        }
    };
    let broken = breaking.await;
    session.close().await;
    let (fenced, who) = broken?;
    if json { output::json(&fenced_json(&fenced, &who)) } else { output::print(&fenced_text(&fenced, &who)) }
}

fn fenced_json(fenced: &Fenced, who: &Who) -> Value {
    json!({
        "lock": fenced.lock.lock.0,
        "name": fenced.lock.resource,
        "mode": mode_name(fenced.lock.mode),
        "term": fenced.lock.term.0,
        "fenced_below": fenced.by.0,
        "holder": who.json(&fenced.holder),
    })
}

fn fenced_text(fenced: &Fenced, who: &Who) -> String {
    let (lock, name, mode) = (fenced.lock.lock, shown(&fenced.lock.resource), mode_name(fenced.lock.mode));
    let id = |label: &str, id: Option<String>| id.map_or(String::new(), |id| format!("{label:<9} {id}\n"));
    let term = if fenced.lock.mode < Mode::Pw {
        "none: it wrote nothing that a term fences".to_owned()
    } else {
        format!("{}; whoever refuses terms below {} refuses it", fenced.lock.term, fenced.by)
    };
    format!(
        "broke     lock {lock} on {name} in {mode}\nholder    {}\n{}{}term      {term}\n",
        who.name(&fenced.holder),
        id("session", fenced.holder.session.map(|session| session.to_string())),
        id("owner", fenced.holder.owner.map(|owner| owner.to_string())),
    )
}
