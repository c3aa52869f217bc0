//! A daemon that `up` keeps running: started, started again when it ends, stopped in order.

use std::fs::File;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::layout::{LockdDir, NodeDir};

/// A child that stays up this long starts again without waiting when it ends.
const HEALTHY_AFTER: Duration = Duration::from_secs(2);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// A child that was asked to end and has not is killed then: an agent gives its server three seconds.
const STOP_WITHIN: Duration = Duration::from_secs(4);

/// What is run.
pub(super) struct Program {
    name: String,
    daemon: &'static str,
    config: PathBuf,
    log: PathBuf,
}

impl Program {
    pub(super) fn lockd(lockd: &LockdDir) -> Self {
        let (config, log) = (lockd.dir.join("lockd.toml"), lockd.dir.join("log"));
        Self { name: lockd.name.clone(), daemon: "lockd", config, log }
    }

    pub(super) fn agent(node: &NodeDir) -> Self {
        let (config, log) = (node.dir.join("agent.toml"), node.dir.join("log"));
        Self { name: format!("agent {}", node.config.node), daemon: "agent", config, log }
    }

    fn spawn(&self) -> anyhow::Result<Child> {
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| self.log.display().to_string())?;
        Command::new(std::env::current_exe()?)
            .arg(self.daemon)
            .arg("--config")
            .arg(&self.config)
            .arg("--supervisor-pid")
            .arg(std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // ^C on the terminal is ours alone; we stop children in order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", self.name))
    }
}

/// A daemon that is kept running until it is asked to stop.
pub(super) struct Supervised {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Supervised {
    pub(super) fn start(program: Program) -> Self {
        let (stop, stopping) = watch::channel(false);
        Self { stop, task: tokio::spawn(keep(program, stopping)) }
    }

    pub(super) fn ask_to_stop(&self) {
        self.stop.send_replace(true);
    }

    pub(super) async fn stopped(self) {
        // The task ends with its child; a panic in it was reported by the runtime.
        let _ = self.task.await;
    }
}

async fn keep(program: Program, mut stopping: watch::Receiver<bool>) {
    let mut backoff = BACKOFF_MIN;
    loop {
        let started = Instant::now();
        let ended = match program.spawn() {
            Ok(child) => match run(child, &mut stopping).await {
                Some(status) => status.to_string(),
                None => return,
            },
            Err(error) => format!("{error:#}"),
        };
        let healthy = started.elapsed() >= HEALTHY_AFTER;
        backoff = if healthy { BACKOFF_MIN } else { (backoff * 2).min(BACKOFF_MAX) };
        eprintln!(
            "csnap: {} ended ({ended}), starting it again; its log is {}",
            program.name,
            program.log.display()
        );
        tokio::select! {
            () = tokio::time::sleep(backoff) => {}
            _ = stopping.wait_for(|stop| *stop) => return,
        }
    }
}

/// Waits for the child's end; none if it was asked to end.
async fn run(mut child: Child, stopping: &mut watch::Receiver<bool>) -> Option<ExitStatus> {
    tokio::select! {
        status = child.wait() => return status.ok(),
        _ = stopping.wait_for(|stop| *stop) => {}
    }
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw) {
        // Not reaped yet, so the number is its own. An error means that it has ended.
        let _ = kill_process(pid, Signal::TERM);
    }
    if tokio::time::timeout(STOP_WITHIN, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
    None
}
