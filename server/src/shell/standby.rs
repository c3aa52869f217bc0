//! A standby: follows the journal of whoever serves, so that taking over costs the tail and not the map.

use std::time::Duration;

use csnap_proto::Term;
use csnap_proto::message::local::ToAgent;
use csnap_storage::Storage;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::link::{Link, Order};
use crate::replay::StateReplay;
use crate::term::{Follower, Pool, TakenOver, TermError, take_over};

/// How often a standby looks for news. What it has not seen yet is read at takeover, so this bounds only that.
const FOLLOW_EVERY: Duration = Duration::from_millis(50);

/// A look that fails (files vanish under a reader when a checkpoint supersedes them) is repeated; so many failures in a
/// row are not that.
const FAILURES_MAX: u32 = 100;

/// Follows until anointed, then takes over. `None` when told to go, or when the agent is gone.
pub(super) async fn stand_by<S: Storage>(
    pool: &Pool<S>,
    listener: &TcpListener,
    link: &mut Link,
    mut orders: mpsc::UnboundedReceiver<Order>,
) -> anyhow::Result<Option<(TakenOver<S, StateReplay>, mpsc::UnboundedReceiver<Order>)>> {
    let mut follower = Follower::new(pool, StateReplay::new(pool.id()));
    let mut ready = false;
    let mut failures = 0;
    loop {
        match follower.advance().await {
            Ok(_) => failures = 0,
            Err(TermError::Corrupt(corrupt)) => return Err(corrupt.into()),
            Err(error) if failures == FAILURES_MAX => return Err(error.into()),
            Err(error) => {
                tracing::debug!(%error, "following the journal");
                failures += 1;
            }
        }
        if ready != (failures == 0) {
            ready = failures == 0;
            link.tell(ToAgent::ServerStandby { ready });
        }
        let order = tokio::select! {
            order = orders.recv() => order,
            _ = listener.accept() => continue, // Not serving: the client asks its agent again.
            () = tokio::time::sleep(FOLLOW_EVERY) => continue,
        };
        match order {
            Some(Order::Serve(term)) => {
                return Ok(anoint(pool, term, follower).await?.map(|taken| (taken, orders)));
            }
            Some(Order::Drain) => {
                link.tell(ToAgent::ServerDrained);
                return Ok(None);
            }
            None => return Ok(None),
        }
    }
}

async fn anoint<S: Storage>(
    pool: &Pool<S>,
    term: Term,
    follower: Follower<S, StateReplay>,
) -> Result<Option<TakenOver<S, StateReplay>>, TermError> {
    match take_over(pool, term, follower, super::now).await {
        Ok(taken) => Ok(Some(taken)),
        Err(TermError::Deposed(term)) => {
            tracing::info!(%term, "a later term has begun already");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
