//! Signals that a command must not die of by chance: it cleans up, or passes them on.

use std::pin::Pin;
use std::task::{Context, Poll};

use rustix::process::Signal;
use tokio::signal::unix::SignalKind;

/// Those that end a program, or that it may use as it likes.
const PASSED: [Signal; 6] =
    [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM, Signal::USR1, Signal::USR2];

/// What a terminal, or a shell with its jobs, stops and continues. While something is held nobody may stand still: the lease
/// would run out.
pub(super) const ALSO: [Signal; 2] = [Signal::TSTP, Signal::CONT];

/// Signals of this process from now on. One that was ignored when it started (nohup, a shell's background) stays so, for
/// this process and for those that it starts.
pub(super) struct Interrupts {
    caught: Vec<(Signal, tokio::signal::unix::Signal)>,
}

impl Interrupts {
    /// Catches what ends a program.
    pub(super) fn catch() -> anyhow::Result<Self> {
        let mut interrupts = Self { caught: Vec::new() };
        interrupts.also(&PASSED)?;
        Ok(interrupts)
    }

    /// Catches these, too.
    pub(super) fn also(&mut self, signals: &[Signal]) -> anyhow::Result<()> {
        let ignored = ignored();
        for signal in signals {
            if ignored & (1 << (signal.as_raw() - 1)) == 0 {
                let kind = SignalKind::from_raw(signal.as_raw());
                self.caught.push((*signal, tokio::signal::unix::signal(kind)?));
            }
        }
        Ok(())
    }

    /// The next one. May be dropped at any time.
    pub(super) async fn next(&mut self) -> Signal {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Signal> {
        for (signal, stream) in &mut self.caught {
            if Pin::new(stream).poll_recv(context).is_ready() {
                return Poll::Ready(*signal);
            }
        }
        Poll::Pending
    }
}

/// The signals that this process ignores, a bit each, from the lowest for signal 1.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
