//! `csnap lock acquire`, `convert` and `release`: persistent locks of an owner, over any number of commands.
//!
//! Between two commands the lock has no session: it is an orphan that waits for its owner. Every command that acts on it
//! adopts it first, and an adoption in PW or EX is a new term. So the term that was printed last is the one to use.

use std::time::Duration;

use anyhow::bail;
use csnap_proto::message::lock::{
    Flags, LockOp, LockReply, LockRow, LockView, Mode, ResourceView, ValueBlock, ValueChange,
};
use serde_json::json;

use super::bytes;
use super::interrupts::Interrupts;
use super::obtain::{Obtained, Until, obtain};
use super::owner::OwnerFile;
use super::session::{LEASE, Place, Session, unexpected};
use super::show::value_json;
use super::who::{in_the_way, mode_name};
use crate::args::lock::{NewValue, Owned, Patience};
use crate::output;

/// Between two looks at what an earlier life of the owner waits for.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Said where a signal came first.
const INTERRUPTED: &str = "interrupted; nothing was granted";

/// A lock of an owner, and what is asked of it.
pub(super) struct Request<'a> {
    pub(super) place: &'a Place,
    pub(super) json: bool,
    pub(super) name: String,
    pub(super) owned: Owned,
}

impl Request<'_> {
    async fn open(&self, verb: &str) -> anyhow::Result<Session> {
        Session::open(self.place, &format!("lock {verb} {}", self.name), LEASE).await
    }

    /// A session, unless a signal comes first.
    async fn open_unless(&self, verb: &str, interrupts: &mut Interrupts) -> anyhow::Result<Session> {
        tokio::select! {
            session = self.open(verb) => session,
            _ = interrupts.next() => bail!(INTERRUPTED),
        }
    }

    /// `csnap lock acquire`
    pub(super) async fn acquire(self, mode: Option<Mode>, patience: &Patience) -> anyhow::Result<()> {
        let file = OwnerFile::open_or_make(&self.owned.owner)?;
        let mut interrupts = Interrupts::catch()?;
        let mut session = self.open_unless("acquire", &mut interrupts).await?;
        let outcome = self.take(&mut session, &file, mode, patience, &mut interrupts).await;
        session.close().await;
        let Taken { lock, value, adopted } = outcome?;
        self.print(&lock, value.as_ref(), adopted)
    }

    async fn take(
        &self,
        session: &mut Session,
        file: &OwnerFile,
        mode: Option<Mode>,
        patience: &Patience,
        interrupts: &mut Interrupts,
    ) -> anyhow::Result<Taken> {
        let until = Until::new(patience);
        loop {
            match self.find(session, file).await? {
                Some(LockRow { lock, mode: Some(had), .. }) => {
                    if let Some(wanted) = mode.filter(|wanted| *wanted != had) {
                        let (had, wanted) = (mode_name(had), mode_name(wanted));
                        bail!(
                            "the owner has {} in {had}; csnap lock convert --mode {wanted} changes that",
                            self.name
                        );
                    }
                    let owner = file.owner;
                    let (lock, value) = granted(session.ask(LockOp::Adopt { lock, owner }).await?)?;
                    return Ok(Taken { lock, value, adopted: true });
                }
                // An earlier command waited for it and died: its session ends, or it is granted, and adopted.
                Some(_) if patience.no_wait || until.is_reached() => {
                    bail!(self.not_free(session).await?);
                }
                Some(_) => tokio::select! {
                    () = tokio::time::sleep(LOOK_AGAIN) => {}
                    _ = interrupts.next() => bail!(INTERRUPTED),
                },
                None => break,
            }
        }
        let (resource, mode, owner) = (self.name.clone(), mode.unwrap_or(Mode::Ex), Some(file.owner));
        let op = LockOp::Lock { resource, mode, flags: flags(patience), owner };
        match obtain(session, op, until, interrupts).await? {
            Obtained::Granted(lock, value) => Ok(Taken { lock, value, adopted: false }),
            Obtained::NotFree => bail!(self.not_free(session).await?),
            Obtained::Interrupted(_) => bail!(INTERRUPTED),
        }
    }

    /// `csnap lock convert`
    pub(super) async fn convert(
        self,
        mode: Option<Mode>,
        value: &NewValue,
        patience: &Patience,
    ) -> anyhow::Result<()> {
        let change = bytes::change(value)?;
        let file = OwnerFile::open(&self.owned.owner)?;
        let mut interrupts = Interrupts::catch()?;
        let mut session = self.open_unless("convert", &mut interrupts).await?;
        let converting = async {
            let (had, _) = self.adopt(&session, &file).await?;
            let mode = mode.unwrap_or(had.mode);
            let op = LockOp::Convert { lock: had.lock, mode, flags: flags(patience), value: change };
            match obtain(&mut session, op, Until::new(patience), &mut interrupts).await? {
                Obtained::Granted(lock, value) => anyhow::Ok((lock, value)),
                Obtained::NotFree => bail!(self.not_free(&session).await?),
                Obtained::Interrupted(_) => bail!(INTERRUPTED),
            }
        };
        let outcome = converting.await;
        session.close().await;
        let (lock, value) = outcome?;
        self.print(&lock, value.as_ref(), true)
    }

    /// `csnap lock release`
    pub(super) async fn release(self, value: &NewValue) -> anyhow::Result<()> {
        let change = bytes::change(value)?;
        let file = OwnerFile::open(&self.owned.owner)?;
        let session = self.open("release").await?;
        let releasing = async {
            let (had, _) = self.adopt(&session, &file).await?;
            if change != ValueChange::Keep && had.mode < Mode::Pw {
                bail!("a lock in {} writes no value", mode_name(had.mode));
            }
            match session.ask(LockOp::unlock(had.lock, change)).await? {
                LockReply::Done => Ok(()),
                reply => Err(unexpected(&reply)),
            }
        };
        let outcome = releasing.await;
        session.close().await;
        outcome
    }

    /// The owner's lock of this name, granted or not.
    async fn find(&self, session: &Session, file: &OwnerFile) -> anyhow::Result<Option<LockRow>> {
        let reply = session.ask(LockOp::Show { resource: self.name.clone() }).await?;
        let LockReply::Resource(ResourceView { granted, waiting, .. }) = reply else {
            return Err(unexpected(&reply));
        };
        let rows = granted.into_iter().chain(waiting);
        Ok(rows.into_iter().find(|row| row.holder.owner == Some(file.owner.id)))
    }

    async fn adopt(
        &self,
        session: &Session,
        file: &OwnerFile,
    ) -> anyhow::Result<(LockView, Option<ValueBlock>)> {
        match self.find(session, file).await? {
            Some(LockRow { lock, mode: Some(_), .. }) => {
                granted(session.ask(LockOp::Adopt { lock, owner: file.owner }).await?)
            }
            _ => bail!("the owner in {} has no lock on {}", file.path(), self.name),
        }
    }

    async fn not_free(&self, session: &Session) -> anyhow::Result<String> {
        Ok(format!("{} is not free: {}", self.name, in_the_way(session, &self.name).await?))
    }

    fn print(&self, lock: &LockView, value: Option<&ValueBlock>, adopted: bool) -> anyhow::Result<()> {
        if !self.json {
            return output::print(&format!("lock {} term {}\n", lock.lock, lock.term));
        }
        output::json(&json!({
            "name": self.name,
            "lock": lock.lock.0,
            "mode": mode_name(lock.mode),
            "term": lock.term.0,
            "adopted": adopted,
            "value": value.map(value_json),
        }))
    }
}

/// A lock that the owner has by now.
struct Taken {
    lock: LockView,
    value: Option<ValueBlock>,
    adopted: bool,
}

fn granted(reply: LockReply) -> anyhow::Result<(LockView, Option<ValueBlock>)> {
    match reply {
        LockReply::Granted { lock, value, .. } => Ok((lock, value)),
        reply => Err(unexpected(&reply)),
    }
}

/// How a request waits.
pub(super) fn flags(patience: &Patience) -> Flags {
    if patience.no_wait { Flags::NOQUEUE } else { Flags::NONE }
}
