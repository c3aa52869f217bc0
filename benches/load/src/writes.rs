//! One writer that goes on whatever happens to replicas: the gaps between its writes are what a failover costs.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;

use super::{Client, now_us, say};

#[derive(Serialize)]
struct Acknowledged {
    acknowledged_us: u64,
}

/// Until it is killed, or its session is lost.
pub(crate) async fn write<C: Client>(addresses: &[SocketAddr], pause: Duration) -> anyhow::Result<()> {
    let mut client = C::connect(addresses, 0).await?;
    for value in 0.. {
        client.write(value).await?;
        say(&Acknowledged { acknowledged_us: now_us() })?;
        tokio::time::sleep(pause).await;
    }
    Ok(())
}
