//! `csnap lock run` and `csnap kv put --ephemeral`: a command that runs on what a session holds, and no longer.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use anyhow::bail;
use csnap_lockd::client::Tenure;
use csnap_lockd::client::shell::now;
use csnap_proto::message::lock::{
    Expect, KeyOp, KeyReply, LockEvent, LockOp, LockReply, LockView, Loss, ValueBlock, ValueChange,
};
use csnap_proto::{LockId, Revision};
use rustix::process::Signal;

use super::alarm::Alarm;
use super::bytes::hex;
use super::command::{Command, signalled};
use super::holding::{Ending, Holding, Input, Output};
use super::interrupts::{ALSO, Interrupts};
use super::kv::conflict;
use super::obtain::{Obtained, Until, obtain};
use super::owned::flags;
use super::session::{News, Place, Session, unexpected};
use super::who::{in_the_way, mode_name};
use crate::args::kv::KvPut;
use crate::args::lock::LockRun;

/// Status where the lock was lost while the command ran. The command is dead.
const LOST: u8 = 123;

/// Status where somebody was in the way, for as long as the command would wait. The command was not started.
const NOT_FREE: u8 = 124;

/// Status where csnap itself failed. The command was not started, or is dead.
pub(super) const FAILED: u8 = 125;

/// Between two looks at whether the terminal is ours to give to the command.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// What the command runs on.
enum Held {
    Lock(LockId),
    Key(String, Revision),
}

/// `csnap lock run`; gives the status to end with.
pub(super) async fn run(place: &Place, args: LockRun) -> anyhow::Result<u8> {
    let mut interrupts = Interrupts::catch()?;
    let until = Until::new(&args.patience);
    let purpose = format!("lock run {}", args.name);
    let mut session = tokio::select! {
        session = Session::open(place, &purpose, args.lease.length) => session?,
        signal = interrupts.next() => return Ok(signalled(signal.as_raw())),
    };
    let op = LockOp::Lock {
        resource: args.name.clone(),
        mode: args.mode,
        flags: flags(&args.patience),
        owner: None,
    };
    let outcome = match obtain(&mut session, op, until, &mut interrupts).await {
        Ok(Obtained::Granted(lock, value)) => {
            let environment = lock_environment(&lock, value.as_ref());
            let held = Held::Lock(lock.lock);
            hold(&mut session, &mut interrupts, &args.name, held, &args.command, &environment).await
        }
        Ok(Obtained::NotFree) => in_the_way(&session, &args.name).await.map(|why| {
            eprintln!("csnap: {} is not free: {why}", args.name);
            NOT_FREE
        }),
        Ok(Obtained::Interrupted(signal)) => Ok(signalled(signal.as_raw())),
        Err(error) => Err(error),
    };
    session.close().await;
    outcome
}

/// `csnap kv put --ephemeral`; gives the status to end with.
pub(super) async fn run_with_key(
    place: &Place,
    put: KvPut,
    value: Vec<u8>,
    expect: Expect,
) -> anyhow::Result<u8> {
    let mut interrupts = Interrupts::catch()?;
    let purpose = format!("kv put {}", put.key);
    let mut session = tokio::select! {
        session = Session::open(place, &purpose, put.lease.length) => session?,
        signal = interrupts.next() => return Ok(signalled(signal.as_raw())),
    };
    let op = KeyOp::Put { key: put.key.clone(), value, expect, ephemeral: true };
    let outcome = match session.ask(LockOp::Key(op)).await {
        Ok(LockReply::Key(KeyReply::Done { version })) => {
            let environment =
                [("CSNAP_KEY", put.key.clone().into()), ("CSNAP_KEY_VERSION", version.to_string().into())];
            let held = Held::Key(put.key.clone(), version);
            hold(&mut session, &mut interrupts, &put.key, held, &put.command, &environment).await
        }
        Ok(LockReply::Key(KeyReply::Conflict { version })) => {
            eprintln!("csnap: {}", conflict(&put.key, expect, version));
            Ok(NOT_FREE)
        }
        Ok(reply) => Err(unexpected(&reply)),
        Err(error) => Err(error),
    };
    session.close().await;
    outcome
}

/// What the command learns of its lock.
fn lock_environment(lock: &LockView, value: Option<&ValueBlock>) -> Vec<(&'static str, OsString)> {
    let mut environment: Vec<(&str, OsString)> = vec![
        ("CSNAP_LOCK_NAME", lock.resource.clone().into()),
        ("CSNAP_LOCK_ID", lock.lock.to_string().into()),
        ("CSNAP_LOCK_MODE", mode_name(lock.mode).into()),
        ("CSNAP_LOCK_TERM", lock.term.to_string().into()),
    ];
    if let Some(value) = value {
        environment.push(("CSNAP_LOCK_VALUE_VALID", u8::from(value.valid).to_string().into()));
        environment.push(("CSNAP_LOCK_VALUE_HEX", hex(&value.bytes).into()));
        // An environment cannot hold a NUL; the digits are there in any case.
        if !value.bytes.contains(&0) {
            environment.push(("CSNAP_LOCK_VALUE", OsString::from_vec(value.bytes.clone())));
        }
    }
    environment
}

/// Runs the command to its end, or to that of what it runs on, and gives that back.
async fn hold(
    session: &mut Session,
    interrupts: &mut Interrupts,
    name: &str,
    held: Held,
    words: &[OsString],
    environment: &[(&str, OsString)],
) -> anyhow::Result<u8> {
    interrupts.also(&ALSO)?;
    let confirmed_at = session.fresh_confirmation().await?;
    let command = match Command::start(words, environment, session.lease, confirmed_at) {
        Ok(command) => command,
        Err(error) => {
            give_up(session, &held, ValueChange::Keep).await?;
            return Err(error);
        }
    };
    let holding = Holding::new(Tenure::new(session.lease, confirmed_at));
    let ending = keep(session, interrupts, &held, command, holding).await?;
    // A holder that was killed did not let go by its own will: what the value says may not be true any more.
    let value = match ending {
        Ending::Status(_) => ValueChange::Keep,
        Ending::Lost(_) | Ending::Unguarded => ValueChange::Invalidate,
    };
    let lost = match (ending, give_up(session, &held, value).await) {
        (Ending::Lost(reason), _) => reason,
        (Ending::Unguarded, _) => bail!("the guard of the command was killed, and so was the command"),
        (Ending::Status(status), Ok(true)) => return Ok(status),
        // It was gone when it was to be given up: so it may have been while the command ran.
        (Ending::Status(status), Ok(false)) => {
            format!("it was taken away before the command ended, with status {status}")
        }
        // Held to the command's end, by the clock; lockd will notice by itself.
        (Ending::Status(status), Err(error)) => {
            eprintln!("csnap: {name} could not be given up and goes with its lease: {error:#}");
            return Ok(status);
        }
    };
    eprintln!("csnap: {name} was lost while the command ran: {lost}");
    Ok(LOST)
}

/// Carries out what [`Holding`] decides.
async fn keep(
    session: &mut Session,
    interrupts: &mut Interrupts,
    held: &Held,
    mut command: Command,
    mut holding: Holding,
) -> anyhow::Result<Ending> {
    let mut confirmed = session.confirmed();
    let alarm = Alarm::new()?;
    let mut over = false;
    let mut out = Vec::new();
    holding.step(now(), Input::Tick, &mut out);
    loop {
        for output in out.drain(..) {
            match output {
                Output::Tell(text) => eprintln!("csnap: {text}"),
                Output::Confirm(sent_at) => command.confirm(sent_at),
                Output::Kill => command.signal(Signal::KILL),
                Output::Over(_) => unreachable!("only what ended is over"),
            }
        }
        alarm.set(holding.next_deadline(now()))?;
        let input = tokio::select! {
            biased;
            rung = alarm.rings() => rung.map(|()| Input::Tick)?,
            ended = command.ended() => {
                ended?;
                break;
            }
            news = session.next(), if !over => match loss(news, held) {
                Some(reason) => Input::Lost(reason),
                None => Input::Tick,
            },
            changed = confirmed.changed(), if !over => match (changed, *confirmed.borrow_and_update()) {
                (Ok(()), Some(sent_at)) => Input::Confirmed(sent_at),
                _ => Input::Tick,
            },
            signal = interrupts.next() => {
                match signal {
                    Signal::CONT => {}
                    Signal::TSTP => eprintln!("csnap: it goes on: it holds a lock"),
                    signal => command.pass(signal),
                }
                Input::Tick
            }
            // A shell that brings us to the foreground tells nobody.
            () = tokio::time::sleep(LOOK_AGAIN), if command.wants_terminal() => {
                command.give_terminal();
                Input::Tick
            }
        };
        over |= matches!(input, Input::Lost(_));
        holding.step(now(), input, &mut out);
    }
    let status = command.reap()?;
    holding.step(now(), Input::Ended(status), &mut out);
    let ending = out.into_iter().find_map(|output| match output {
        Output::Over(ending) => Some(ending),
        _ => None,
    });
    match ending {
        Some(ending) => Ok(ending),
        None => bail!("the command ended and that was not the end"),
    }
}

/// Why what is held is gone, if this news says so.
fn loss(news: News, held: &Held) -> Option<String> {
    match (news, held) {
        (News::Over(reason), _) => Some(format!("the session with lockd is over: {reason}")),
        (News::Event(LockEvent::Lost { lock, how }), Held::Lock(id)) if lock.lock == *id => Some(match how {
            Loss::Broken(fenced) => format!("an operator broke it; its term {} is fenced", fenced.lock.term),
            Loss::Adopted(term) => format!("its owner took it over, in term {term}"),
        }),
        _ => None,
    }
}

/// Gives back what is held. False: it was somebody else's by then.
async fn give_up(session: &mut Session, held: &Held, value: ValueChange) -> anyhow::Result<bool> {
    let op = match held {
        Held::Lock(lock) => LockOp::unlock(*lock, value),
        Held::Key(key, version) => {
            LockOp::Key(KeyOp::Delete { key: key.clone(), expect: Expect::Version(*version) })
        }
    };
    let answer = session.ask(op).await;
    // Told before the answer, if so.
    let broken = std::iter::from_fn(|| session.take()).any(
        |event| matches!((event, held), (LockEvent::Lost { lock, .. }, Held::Lock(id)) if lock.lock == *id),
    );
    match answer {
        _ if broken => Ok(false),
        // Somebody may have changed the key meanwhile: then it is theirs.
        Ok(LockReply::Done | LockReply::Key(_)) => Ok(true),
        Ok(reply) => Err(unexpected(&reply)),
        Err(error) => Err(error),
    }
}
