//! `csnap up`: everything on this machine, in the foreground until ^C.
//!
//! It prepares the directory, starts lockd and the agents as children of its own binary, starts again what dies, makes
//! the first volume, prints where the volumes are to be had, and ends everything in order. It decides nothing about
//! data; killed at any moment, it leaves nothing running (every child is tied to it) and nothing that the next `up`
//! does not clean.

mod child;
mod first;
mod grow;
mod layout;

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use csnap_proto::message::local::ToAgent;
use tokio::signal::unix::{SignalKind, signal};

use crate::{agents, args, output};
use child::{Program, Supervised};
use layout::Layout;

/// An exporter that has not ended by then is left to end with us.
const EXPORTERS_WITHIN: Duration = Duration::from_secs(5);

/// Runs until ^C or SIGTERM.
pub(crate) fn run(dir: &Path, up: args::Up) -> anyhow::Result<()> {
    // One thread: children ask for a signal at the death of the thread that started them.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    runtime.block_on(run_up(dir, up))
}

async fn run_up(dir: &Path, up: args::Up) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let layout = Layout::prepare(dir, &up).await?;
    let lockds: Vec<_> = layout.lockds.iter().map(|lockd| Supervised::start(Program::lockd(lockd))).collect();
    let agents: Vec<_> = layout.nodes.iter().map(|node| Supervised::start(Program::agent(node))).collect();
    let result = tokio::select! {
        (result, ()) = async { tokio::join!(serve(&layout), grow::grow(&layout)) } => result,
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    };
    let stopping = async {
        stop_exporters(&layout).await;
        stop_all(agents).await;
        stop_all(lockds).await;
    };
    tokio::select! {
        () = stopping => {}
        // Asked twice: at once. Children end with us.
        _ = interrupt.recv() => {}
    }
    result
}

/// Waits until everything serves, says so, and then for ever.
async fn serve(layout: &Layout) -> anyhow::Result<()> {
    first::wait_for_server(layout).await?;
    let has_first_volume = first::make_volume(layout).await?;
    first::wait_for_exporters(layout).await;
    output::print(&layout.announcement(has_first_volume))?;
    std::future::pending().await
}

/// Exporters first, while a server is there to take their volumes back.
async fn stop_exporters(layout: &Layout) {
    let asked: Vec<_> = layout
        .nodes
        .iter()
        .map(|node| {
            let socket = node.config.agent_sock.clone();
            tokio::spawn(async move { agents::ask(&socket, ToAgent::StopExporter, EXPORTERS_WITHIN).await })
        })
        .collect();
    for answer in asked {
        // An agent that does not answer is stopped next; its exporter ends with us.
        let _ = answer.await;
    }
}

async fn stop_all(children: Vec<Supervised>) {
    children.iter().for_each(Supervised::ask_to_stop);
    for child in children {
        child.stopped().await;
    }
}
