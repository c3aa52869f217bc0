//! The one binary of csnap: the daemons, the operator's commands, and `up`, which runs everything on one machine.
//!
//! It holds no state. Exit status: 0 done, 1 refused or failed (one line on stderr: what, why, what to do), 2 usage.

mod agents;
mod args;
mod commands;
mod daemon;
mod group;
mod lock;
mod lockds;
mod operator;
mod output;
mod pool;
mod size;
mod supervisor;
mod up;

use std::process::ExitCode;

use args::{Command, LockdUse, ServerUse};

fn main() -> ExitCode {
    let cli = match args::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let result = match cli.command {
        Command::Up(up) => up::run(&cli.dir, up),
        Command::Lockd(lockd) => match lockd.usage() {
            Ok(LockdUse::Daemon(daemon)) => daemon::lockd(&daemon),
            Ok(LockdUse::Action(_)) | Err(_) => commands::run(&cli.dir, cli.json, Command::Lockd(lockd)),
        },
        Command::Agent(daemon) => daemon::agent(&daemon),
        Command::Export(daemon) => daemon::export(&daemon),
        Command::Server(server) => match server.usage() {
            Ok(ServerUse::Daemon(daemon)) => daemon::server(&daemon),
            Ok(ServerUse::Action(_)) | Err(_) => commands::run(&cli.dir, cli.json, Command::Server(server)),
        },
        Command::Lock(lock) => return lock::run(&cli.dir, cli.json, lock),
        Command::Kv(kv) => return lock::run_kv(&cli.dir, cli.json, kv),
        command => commands::run(&cli.dir, cli.json, command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::error(&error);
            ExitCode::from(1)
        }
    }
}
