//! Many clients, each in a closed loop: how many operations a second, and how long each takes.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;
use tokio::task::JoinSet;

use super::{Client, Job, now_us};

/// What to do, and for how long.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) job: Job,
    pub(crate) clients: usize,
    /// Before anything is counted.
    pub(crate) ramp: Duration,
    /// Of what is counted.
    pub(crate) length: Duration,
}

/// What came of it.
#[derive(Serialize)]
pub(crate) struct Measured {
    /// Pairs of lock and unlock, or of two conversions.
    pairs: usize,
    seconds: f64,
    p50_us: u64,
    p99_us: u64,
    max_us: u64,
    /// Processor time of this process, microseconds a pair.
    client_us: f64,
}

/// Connects all clients, then lets them work.
pub(crate) async fn measure<C: Client>(addresses: &[SocketAddr], plan: Plan) -> anyhow::Result<Measured> {
    let mut connecting = JoinSet::new();
    for number in 0..plan.clients {
        let addresses = addresses.to_vec();
        connecting.spawn(async move {
            let mut client = C::connect(&addresses, number).await?;
            client.prepare(plan.job).await?;
            anyhow::Ok(client)
        });
    }
    let mut clients = Vec::new();
    while let Some(connected) = connecting.join_next().await {
        clients.push(connected??);
    }
    let from_us = now_us() + micros(plan.ramp);
    let to_us = from_us + micros(plan.length);
    let mut working = JoinSet::new();
    for client in clients {
        working.spawn(work(client, plan.job, from_us, to_us));
    }
    tokio::time::sleep(Duration::from_micros(from_us.saturating_sub(now_us()))).await;
    let cpu_before = cpu_us();
    tokio::time::sleep(Duration::from_micros(to_us.saturating_sub(now_us()))).await;
    let cpu = cpu_us() - cpu_before;
    let mut taken_us = Vec::new();
    while let Some(done) = working.join_next().await {
        taken_us.append(&mut done??);
    }
    taken_us.sort_unstable();
    let pairs = taken_us.len();
    // None, where the disk stalled for all of a short measurement.
    let slowest = |percent: usize| taken_us.get((pairs * percent / 100).min(pairs.saturating_sub(1)));
    Ok(Measured {
        pairs,
        seconds: plan.length.as_secs_f64(),
        p50_us: slowest(50).copied().unwrap_or(0),
        p99_us: slowest(99).copied().unwrap_or(0),
        max_us: slowest(100).copied().unwrap_or(0),
        client_us: cpu / pairs.max(1) as f64,
    })
}

/// What each piece of work took that ended in time, microseconds.
async fn work<C: Client>(mut client: C, job: Job, from_us: u64, to_us: u64) -> anyhow::Result<Vec<u64>> {
    let mut taken_us = Vec::new();
    loop {
        let began_us = now_us();
        if began_us >= to_us {
            return Ok(taken_us);
        }
        client.work(job).await?;
        let ended_us = now_us();
        if (from_us..to_us).contains(&ended_us) {
            taken_us.push(ended_us - began_us);
        }
    }
}

fn micros(length: Duration) -> u64 {
    u64::try_from(length.as_micros()).expect("a measurement of this age")
}

/// Processor time that this process took, microseconds.
fn cpu_us() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}
