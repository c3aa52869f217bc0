//! The client half of `benches/locks`: loads lockd, or etcd beside it, and says what came of it.
//!
//! Its lines on stdout are for that driver, one JSON object each. Times are microseconds of the clock that counts since
//! the machine started, which the driver reads too. What it is not: a judge. It reports; the driver compares.

#[cfg(feature = "etcd")]
mod etcd;
mod lockd;
mod mortal;
mod throughput;
mod witness;
mod writes;

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::lockd::Lockd;

#[derive(Parser)]
#[command(about = "Loads lockd, or etcd beside it, for benches/locks")]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Which service.
    #[arg(long, global = true, default_value = "lockd")]
    system: System,
}

#[derive(Subcommand)]
enum Command {
    /// As many operations as go, by clients that each wait for their own.
    Throughput {
        #[command(flatten)]
        at: At,
        /// What a client does again and again.
        #[arg(long)]
        job: Job,
        /// Clients, each with a connection and a session of its own.
        #[arg(long)]
        clients: usize,
        /// Length of the measurement.
        #[arg(long)]
        seconds: f64,
        /// Time before it that is not counted.
        #[arg(long, default_value_t = 0.3)]
        ramp_seconds: f64,
    },
    /// Each client writes a key of its own for ever; prints when each write was acknowledged.
    Writes {
        #[command(flatten)]
        at: At,
        /// Clients, each with a connection and a session of its own.
        #[arg(long, default_value_t = 1)]
        clients: usize,
        /// A client's pause after each write.
        #[arg(long, default_value_t = 2)]
        pause_ms: u64,
    },
    /// Holds a lock, renews once, says when, and never again.
    Mortal {
        #[command(flatten)]
        lock: Lock,
        /// Its lease; one of etcd is whole seconds.
        #[arg(long)]
        lease_ms: u64,
    },
    /// Waits for a lock, says when it was granted, and ends.
    Wait {
        #[command(flatten)]
        lock: Lock,
    },
    /// Prints every change of a resource of lockd: its locks, and whether it has a writer. Of etcd the same of a key.
    Watch {
        #[command(flatten)]
        lock: Lock,
    },
}

#[derive(Args)]
struct At {
    /// Where the service's replicas serve clients.
    #[arg(long, value_delimiter = ',', required = true)]
    addresses: Vec<SocketAddr>,
}

#[derive(Args)]
struct Lock {
    #[command(flatten)]
    at: At,
    /// What is locked, or watched.
    #[arg(long)]
    resource: String,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum System {
    Lockd,
    Etcd,
}

/// What a client does again and again.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Job {
    /// Lock and unlock a resource of its own.
    Lock,
    /// Lock and unlock the one resource of all clients, in turn.
    Contend,
    /// Convert its lock on a resource of its own from CR to PW, and back with a new value.
    Convert,
}

/// A client of a lock service, as [`throughput`] and [`writes`] use it.
trait Client: Sized + Send + 'static {
    /// The `number`th of several, with a session or lease of its own.
    fn connect(addresses: &[SocketAddr], number: usize) -> impl Future<Output = anyhow::Result<Self>> + Send;

    /// Does what a job needs once.
    fn prepare(&mut self, job: Job) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Does it, and waits until it is committed.
    fn work(&mut self, job: Job) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Writes a key, whatever happens to replicas meanwhile.
    fn write(&mut self, value: u64) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// What becomes of one lock of a service, and what others see of it.
trait Holders {
    /// Takes it, renews once, says when ([`Renewed`]), and waits to be killed.
    async fn live(addresses: Vec<SocketAddr>, resource: String, lease_ms: u64) -> anyhow::Result<()>;

    /// Queues for it, and gives it back once it was granted.
    async fn wait(addresses: &[SocketAddr], resource: &str) -> anyhow::Result<()>;

    /// Tells of it until it is killed.
    async fn watch(addresses: &[SocketAddr], resource: &str) -> anyhow::Result<()>;
}

/// A line of a client that renews no more.
#[derive(Serialize)]
struct Renewed {
    /// Before the renewal was sent: the service cannot have had it earlier.
    renewed_us: u64,
    lease_ms: u64,
}

/// A line of a client that waits for a lock, or watches one.
#[derive(Serialize)]
#[serde(tag = "what", rename_all = "lowercase")]
enum Seen {
    /// The watch stands, or the request for the lock is about to be sent.
    Ready,
    Granted {
        at_us: u64,
    },
    /// A lock as it is now; without a mode it is gone.
    Held {
        at_us: u64,
        session: String,
        mode: String,
        term: u64,
    },
    /// Whether nobody has it in PW or EX.
    Vacant {
        at_us: u64,
        vacant: bool,
    },
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build()?;
    runtime.block_on(async {
        match cli.system {
            System::Lockd => run::<Lockd>(cli.command).await,
            #[cfg(feature = "etcd")]
            System::Etcd => run::<etcd::Etcd>(cli.command).await,
            #[cfg(not(feature = "etcd"))]
            System::Etcd => {
                anyhow::bail!("built without etcd: build it with --features etcd, which needs protoc")
            }
        }
    })
}

async fn run<S: Client + Holders>(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Throughput { at, job, clients, seconds, ramp_seconds } => {
            let ramp = Duration::from_secs_f64(ramp_seconds);
            let plan = throughput::Plan { job, clients, ramp, length: Duration::from_secs_f64(seconds) };
            say(&throughput::measure::<S>(&at.addresses, plan).await?)
        }
        Command::Writes { at, clients, pause_ms } => {
            writes::write::<S>(&at.addresses, clients, Duration::from_millis(pause_ms)).await
        }
        Command::Mortal { lock, lease_ms } => S::live(lock.at.addresses, lock.resource, lease_ms).await,
        Command::Wait { lock } => S::wait(&lock.at.addresses, &lock.resource).await,
        Command::Watch { lock } => S::watch(&lock.at.addresses, &lock.resource).await,
    }
}

/// A line for the driver.
fn say(line: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(line)?);
    Ok(())
}

/// Microseconds since the machine started.
fn now_us() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let part = |part: i64| u64::try_from(part).unwrap_or(0);
    part(time.tv_sec) * 1_000_000 + part(time.tv_nsec) / 1000
}
