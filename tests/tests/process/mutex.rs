//! A fenced mutex with real processes: holders append under the term of a lock of three lockds to a register that refuses old
//! terms, and are frozen past their lease. `CSNAP_MUTEX_RUNS` (6) runs.
//!
//! A holder is this test's own binary, started again for the one test that is only that. It does not look at its lease, and
//! holds the lock until the register refuses it: frozen and gone on, it tries to write as if nothing had happened.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use csnap_lockd::client::ClientEvent;
use csnap_lockd::client::shell::LockSession;
use csnap_proto::Term;
use csnap_proto::message::lock::{Flags, LockEvent, LockOp, LockReply, Mode};
use csnap_storage::sim::Rng;
use csnap_tests::model::mutex::{Answer, MESSAGE_BYTES, Mutex as Judge, Question};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::cluster::{number, signal, wait_until};
use super::replicas::{Lockds, SEATS, new_client, runtime};

/// Holders of a run.
const HOLDERS: u32 = 3;

/// Times that a holder is frozen in a run.
const FREEZES: u32 = 2;

/// A holder has appended so often, at most, when it is frozen.
const APPENDS: u64 = 20;

/// Runs at once, each with lockds of its own.
const LANES: u32 = 3;

const LEASE_MS: u64 = 200;

/// Between two appends.
const THINK: Duration = Duration::from_millis(2);

/// What a holder is told: where the register and the lockds are, what to lock, and its number.
const TOLD: &str = "CSNAP_TEST_HOLDER";

/// The register, what its clients know, and who wrote last.
#[derive(Default)]
struct Register {
    judge: Judge,
    /// The latest term that was here.
    reader: Term,
    writer: Option<(Term, u32)>,
    /// Its appends.
    appends: u64,
    refused: u64,
}

type Shared = Arc<Mutex<Register>>;

fn with<T>(register: &Shared, does: impl FnOnce(&mut Register) -> T) -> T {
    does(&mut register.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Serves one holder after its number; what it asks next says that it heard the answer before.
fn serve(mut stream: UnixStream, register: &Shared) -> std::io::Result<()> {
    let mut number = [0; 4];
    stream.read_exact(&mut number)?;
    let holder = u32::from_le_bytes(number);
    let mut bytes = [0; MESSAGE_BYTES];
    let mut told = None;
    loop {
        stream.read_exact(&mut bytes)?;
        let question = Question::decode(&bytes);
        let answer = with(register, |register| {
            if let Some(Answer::Written(term, entry)) = told {
                register.judge.on_acknowledged(term, entry);
            }
            if let Question::Read(term) = question {
                register.judge.on_granted(term, holder).expect("a term is granted once");
                (register.reader, register.appends) = (register.reader.max(term), 0);
            }
            let answer = register.judge.register.ask(question);
            match answer {
                Answer::Written(term, _) => {
                    register.writer = Some((term, holder));
                    register.appends += 1;
                }
                Answer::Refused => register.refused += 1,
                Answer::Length(_) => {}
            }
            answer
        });
        told = Some(answer);
        stream.write_all(&answer.encode())?;
    }
}

/// Takes the lock and appends until it is refused, for ever.
async fn hold(
    addresses: Vec<std::net::SocketAddr>,
    socket: &str,
    resource: &str,
    number: u32,
) -> std::io::Result<()> {
    let mut register = tokio::net::UnixStream::connect(socket).await?;
    register.write_all(&number.to_le_bytes()).await?;
    let mut rng = Rng::new(u64::from(std::process::id()));
    let mut entries = 0;
    loop {
        let (session, mut events) = LockSession::spawn(new_client(&mut rng, LEASE_MS), addresses.clone());
        let asked = session.operate(LockOp::lock(resource, Mode::Ex, Flags::NONE)).await;
        let term = match asked {
            Ok(LockReply::Granted { lock, .. }) => Some(lock.term),
            Ok(LockReply::Queued { .. }) => granted(&mut events).await,
            _ => None,
        };
        let Some(term) = term else { continue };
        let Answer::Length(mut length) = ask(&mut register, Question::Read(term)).await? else { continue };
        loop {
            entries += 1;
            match ask(&mut register, Question::Write(term, length, entries)).await? {
                Answer::Written(..) => length += 1,
                _ => break,
            }
            tokio::time::sleep(THINK).await;
        }
    }
}

/// The term, when the queue comes to it; none if the session ends first.
async fn granted(events: &mut tokio::sync::mpsc::Receiver<ClientEvent>) -> Option<Term> {
    loop {
        match events.recv().await? {
            ClientEvent::Event(LockEvent::Granted { lock, .. }) => return Some(lock.term),
            ClientEvent::SessionLost { .. } => return None,
            _ => {}
        }
    }
}

async fn ask(register: &mut tokio::net::UnixStream, question: Question) -> std::io::Result<Answer> {
    register.write_all(&question.encode()).await?;
    let mut bytes = [0; MESSAGE_BYTES];
    register.read_exact(&mut bytes).await?;
    Ok(Answer::decode(&bytes))
}

#[test]
#[ignore = "a process that the other test starts"]
fn holder_process() {
    let Ok(told) = std::env::var(TOLD) else { return };
    let mut parts = told.split(' ');
    let mut next = || parts.next().expect("four parts");
    let (socket, resource, number) = (next(), next(), next().parse().expect("a number"));
    let addresses = next().split(',').map(|address| address.parse().expect("an address")).collect();
    // It ends with the register.
    let _ = runtime().block_on(hold(addresses, socket, resource, number));
}

/// Holders of one run; they are gone with it.
struct Holders(Vec<Child>);

impl Holders {
    fn start(lockds: &Lockds, socket: &str, resource: &str) -> Self {
        let addresses: Vec<String> = lockds.addresses().iter().map(ToString::to_string).collect();
        let holder = |number: u32| {
            let told = format!("{socket} {resource} {number} {}", addresses.join(","));
            Command::new(std::env::current_exe().expect("this test is a file"))
                .args(["mutex::holder_process", "--exact", "--ignored"])
                .env(TOLD, told)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .expect("it starts")
        };
        Self((0..HOLDERS).map(holder).collect())
    }

    fn pid(&self, number: u32) -> u32 {
        self.0[number as usize].id()
    }
}

impl Drop for Holders {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What runs came to.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    grants: u64,
    acknowledged: u64,
    refused: u64,
    killed: u64,
}

/// One run; in every fourth a lockd is killed while a holder is frozen.
fn run(lockds: &mut Lockds, number: u32) -> Sum {
    let socket = lockds.scratch().join(format!("register{number}"));
    let listener = UnixListener::bind(&socket).expect("a new socket");
    let register = Shared::default();
    let shared = Arc::clone(&register);
    std::thread::spawn(move || {
        for stream in listener.incoming().take(HOLDERS as usize).flatten() {
            let register = Arc::clone(&shared);
            std::thread::spawn(move || serve(stream, &register));
        }
    });
    let socket = socket.to_str().expect("temporary directories are text");
    let holders = Holders::start(lockds, socket, &format!("register{number}"));
    let mut killed = 0;
    for freeze in 0..FREEZES {
        let mut found = None;
        let enough = 1 + u64::from(number) % APPENDS;
        wait_until("a holder writes, and nobody after it", || {
            found = with(&register, |register| {
                let goes_on =
                    |(term, _): &(Term, u32)| *term == register.reader && register.appends >= enough;
                let writer = register.writer.filter(goes_on);
                writer.map(|writer| (writer, register.refused))
            });
            found.is_some()
        });
        let ((term, holder), refused) = found.expect("just found");
        signal(holders.pid(holder), "STOP");
        if number.is_multiple_of(4) && freeze == 0 {
            let seat = (number / 4) as usize % SEATS;
            lockds.kill_one(seat);
            lockds.start_one(seat);
            killed += 1;
        }
        wait_until("another one writes", || {
            with(&register, |register| register.writer.is_some_and(|(now, _)| now > term))
        });
        signal(holders.pid(holder), "CONT");
        wait_until("the frozen one is refused", || with(&register, |register| register.refused > refused));
    }
    drop(holders);
    with(&register, |register| {
        register.judge.check().unwrap_or_else(|what| panic!("run {number}: {what}"));
        let judge = &register.judge;
        Sum { grants: judge.grants(), acknowledged: judge.acknowledged(), refused: register.refused, killed }
    })
}

#[test]
fn holders_frozen_past_their_lease_are_refused_and_nothing_acknowledged_is_lost() {
    let (runs, next, began) = (number("CSNAP_MUTEX_RUNS", 6), AtomicU32::new(0), Instant::now());
    let lane = || {
        let mut lockds = Lockds::on_loopback();
        let mut sum = Sum::default();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= runs {
                return sum;
            }
            let Sum { grants, acknowledged, refused, killed } = run(&mut lockds, number);
            sum.grants += grants;
            sum.acknowledged += acknowledged;
            sum.refused += refused;
            sum.killed += killed;
        }
    };
    let sums: Vec<Sum> = std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES.min(runs)).map(|_| scope.spawn(lane)).collect();
        lanes.into_iter().map(|lane| lane.join().expect("a lane")).collect()
    });
    let all = |of: fn(&Sum) -> u64| sums.iter().map(of).sum::<u64>();
    println!(
        "{runs} runs in {:.1} s: {} grants, {} appends acknowledged, {} with an old term refused, {} holders frozen, {} lockds killed",
        began.elapsed().as_secs_f64(),
        all(|sum| sum.grants),
        all(|sum| sum.acknowledged),
        all(|sum| sum.refused),
        runs * FREEZES,
        all(|sum| sum.killed)
    );
    assert!(all(|sum| sum.refused) >= u64::from(runs * FREEZES));
}
