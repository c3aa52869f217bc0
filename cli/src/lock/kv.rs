//! `csnap kv get`, `put`, `delete` and `list`.

use std::path::Path;

use anyhow::bail;
use csnap_proto::Revision;
use csnap_proto::limits::KEY_VALUE_BYTES_MAX;
use csnap_proto::message::lock::{Expect, KeyOp, KeyReply, KeyView, LockOp, LockReply};
use serde_json::{Value, json};

use super::bytes::{self, quoted, shown};
use super::run;
use super::session::{LEASE, Place, Session, unexpected};
use crate::args::kv::KvPut;
use crate::output;

/// `csnap kv get`
pub(super) async fn get(place: &Place, json: bool, key: String) -> anyhow::Result<()> {
    match once(place, "get", KeyOp::Get { key: key.clone() }).await? {
        KeyReply::Found(Some(view)) if json => output::json(&key_json(&view)),
        KeyReply::Found(Some(view)) => output::bytes(&view.value),
        KeyReply::Found(None) => bail!("{} is not there", shown(&key)),
        reply => Err(unexpected(&LockReply::Key(reply))),
    }
}

/// `csnap kv put`; gives the status to end with.
pub(super) async fn put(place: &Place, json: bool, put: KvPut) -> anyhow::Result<u8> {
    let what = "a key's value";
    let value = match &put.value {
        Some(value) => bytes::given(value, KEY_VALUE_BYTES_MAX, what)?,
        None => bytes::read(Path::new("-"), KEY_VALUE_BYTES_MAX, what)?,
    };
    let expect = match (put.if_absent, put.if_version) {
        (true, _) => Expect::Absent,
        (false, Some(version)) => Expect::Version(Revision(version)),
        (false, None) => Expect::Any,
    };
    if put.ephemeral {
        return run::run_with_key(place, put, value, expect).await;
    }
    let op = KeyOp::Put { key: put.key.clone(), value, expect, ephemeral: false };
    match once(place, "put", op).await? {
        KeyReply::Done { version } if json => output::json(&json!({ "key": put.key, "version": version.0 }))?,
        KeyReply::Done { version } => output::print(&format!("version {version}\n"))?,
        KeyReply::Conflict { version } => bail!(conflict(&put.key, expect, version)),
        reply => return Err(unexpected(&LockReply::Key(reply))),
    }
    Ok(0)
}

/// `csnap kv delete`
pub(super) async fn delete(
    place: &Place,
    json: bool,
    key: String,
    if_version: Option<u64>,
) -> anyhow::Result<()> {
    let expect = if_version.map_or(Expect::Any, |version| Expect::Version(Revision(version)));
    match once(place, "delete", KeyOp::Delete { key: key.clone(), expect }).await? {
        KeyReply::Done { version } if json => output::json(&json!({ "key": key, "revision": version.0 })),
        KeyReply::Done { .. } => Ok(()),
        KeyReply::Found(_) => bail!("{} is not there", shown(&key)),
        KeyReply::Conflict { version } => bail!(conflict(&key, expect, version)),
        reply => Err(unexpected(&LockReply::Key(reply))),
    }
}

/// `csnap kv list`
pub(super) async fn list(place: &Place, json: bool, prefix: String) -> anyhow::Result<()> {
    let session = Session::open(place, "kv list", LEASE).await?;
    let pages = pages(&session, &prefix, None).await;
    session.close().await;
    let keys: Vec<_> = pages?.into_iter().flat_map(|page| page.keys).collect();
    if json {
        return output::json(&keys.iter().map(key_json).collect());
    }
    let row = |view: &KeyView| {
        let session = view.session.map_or("-".to_owned(), |session| session.to_string());
        vec![shown(&view.key), view.version.to_string(), session, quoted(&view.value)]
    };
    let rows: Vec<_> = keys.iter().map(row).collect();
    output::print(&output::table(&["KEY", "VERSION", "SESSION", "VALUE"], &rows))
}

/// Some keys, as they were at one revision.
pub(super) struct Page {
    pub(super) keys: Vec<KeyView>,
    pub(super) revision: Revision,
}

/// Every key with the prefix, from a first page that was asked for otherwise, if there is one.
pub(super) async fn pages(
    session: &Session,
    prefix: &str,
    first: Option<KeyReply>,
) -> anyhow::Result<Vec<Page>> {
    let mut pages: Vec<Page> = Vec::new();
    let mut given = first;
    loop {
        let last = pages.iter().rev().find_map(|page| page.keys.last());
        let after = last.map(|last| last.key.clone());
        let reply = match given.take() {
            Some(reply) => LockReply::Key(reply),
            None => session.ask(LockOp::Key(KeyOp::List { prefix: prefix.to_owned(), after })).await?,
        };
        let LockReply::Key(KeyReply::Page { keys, more, revision }) = reply else {
            return Err(unexpected(&reply));
        };
        let over = !more || keys.is_empty();
        pages.push(Page { keys, revision });
        if over {
            return Ok(pages);
        }
    }
}

/// One question, one answer.
async fn once(place: &Place, verb: &str, op: KeyOp) -> anyhow::Result<KeyReply> {
    let session = Session::open(place, &format!("kv {verb}"), LEASE).await?;
    let answer = session.ask(LockOp::Key(op)).await;
    session.close().await;
    match answer? {
        LockReply::Key(reply) => Ok(reply),
        reply => Err(unexpected(&reply)),
    }
}

/// Why a key was not changed.
pub(super) fn conflict(key: &str, expect: Expect, version: Option<Revision>) -> String {
    let key = shown(key);
    match (version, expect) {
        (None, _) => format!("{key} is not there"),
        (Some(version), Expect::Version(expected)) => format!("{key} has version {version}, not {expected}"),
        (Some(version), _) => format!("{key} is there already, with version {version}"),
    }
}

/// A key as scripts see it.
pub(super) fn key_json(view: &KeyView) -> Value {
    json!({
        "key": view.key,
        "value": bytes::value_json(&view.value),
        "version": view.version.0,
        "created": view.created.0,
        "session": view.session.map(|session| session.to_string()),
    })
}
