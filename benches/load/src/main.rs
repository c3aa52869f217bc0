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
}

#[derive(Subcommand)]
enum Command {
    /// As many operations as go, by clients that each wait for their own.
    Throughput {
        #[command(flatten)]
        service: Service,
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
    /// Writes one key for ever, and prints when each write was acknowledged.
    Writes {
        #[command(flatten)]
        service: Service,
        /// Pause after each write.
        #[arg(long, default_value_t = 2)]
        pause_ms: u64,
    },
    /// Holds a lock of lockd, renews once, says when, and never again.
    Mortal {
        #[command(flatten)]
        lock: Lock,
        /// Its lease.
        #[arg(long)]
        lease_ms: u64,
    },
    /// Waits for a lock of lockd, says when it was granted, and ends.
    Wait {
        #[command(flatten)]
        lock: Lock,
    },
    /// Prints every change of a resource of lockd: its locks, and whether it has a writer.
    Watch {
        #[command(flatten)]
        lock: Lock,
    },
}

#[derive(Args)]
struct Service {
    /// Which one.
    #[arg(long)]
    system: System,
    /// Where its replicas serve clients.
    #[arg(long, value_delimiter = ',', required = true)]
    addresses: Vec<SocketAddr>,
}

#[derive(Args)]
struct Lock {
    /// Where lockd's replicas serve clients.
    #[arg(long, value_delimiter = ',', required = true)]
    addresses: Vec<SocketAddr>,
    /// What is locked.
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

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build()?;
    runtime.block_on(run(cli.command))
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Throughput {
            service: Service { system, addresses },
            job,
            clients,
            seconds,
            ramp_seconds,
        } => {
            let ramp = Duration::from_secs_f64(ramp_seconds);
            let plan = throughput::Plan { job, clients, ramp, length: Duration::from_secs_f64(seconds) };
            say(&match system {
                System::Lockd => throughput::measure::<Lockd>(&addresses, plan).await?,
                #[cfg(feature = "etcd")]
                System::Etcd => throughput::measure::<etcd::Etcd>(&addresses, plan).await?,
                #[cfg(not(feature = "etcd"))]
                System::Etcd => return Err(without_etcd()),
            })
        }
        Command::Writes { service: Service { system, addresses }, pause_ms } => {
            let pause = Duration::from_millis(pause_ms);
            match system {
                System::Lockd => writes::write::<Lockd>(&addresses, pause).await,
                #[cfg(feature = "etcd")]
                System::Etcd => writes::write::<etcd::Etcd>(&addresses, pause).await,
                #[cfg(not(feature = "etcd"))]
                System::Etcd => Err(without_etcd()),
            }
        }
        Command::Mortal { lock: Lock { addresses, resource }, lease_ms } => {
            tokio::task::spawn_blocking(move || mortal::live(&addresses, &resource, lease_ms)).await?
        }
        Command::Wait { lock: Lock { addresses, resource } } => witness::wait(&addresses, &resource).await,
        Command::Watch { lock: Lock { addresses, resource } } => witness::watch(&addresses, &resource).await,
    }
}

#[cfg(not(feature = "etcd"))]
fn without_etcd() -> anyhow::Error {
    anyhow::anyhow!("built without etcd: build it with --features etcd, which needs protoc")
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
