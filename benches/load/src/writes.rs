//! Writers that go on whatever happens to replicas: the gaps between their writes are what a failover or a move costs.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;
use tokio::task::JoinSet;

use super::{Client, now_us, say};

#[derive(Serialize)]
struct Acknowledged {
    client: usize,
    acknowledged_us: u64,
}

/// Until it is killed, or a session is lost.
pub(crate) async fn write<C: Client>(
    addresses: &[SocketAddr],
    clients: usize,
    pause: Duration,
) -> anyhow::Result<()> {
    let mut writing = JoinSet::new();
    for client in 0..clients {
        writing.spawn(write_one::<C>(addresses.to_vec(), client, pause));
    }
    while let Some(ended) = writing.join_next().await {
        ended??;
    }
    Ok(())
}

async fn write_one<C: Client>(
    addresses: Vec<SocketAddr>,
    number: usize,
    pause: Duration,
) -> anyhow::Result<()> {
    let mut client = C::connect(&addresses, number).await?;
    for value in 0.. {
        client.write(value).await?;
        say(&Acknowledged { client: number, acknowledged_us: now_us() })?;
        tokio::time::sleep(pause).await;
    }
    Ok(())
}
