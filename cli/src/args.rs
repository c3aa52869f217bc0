//! The command line, as clap reads it. Names are fixed: users and scripts rely on them.

pub(crate) mod kv;
pub(crate) mod lock;
mod lockd;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand, ValueEnum};
use csnap_proto::{ChunkSize, Name, Target};

pub(crate) use self::lockd::{Lockd, LockdAction, LockdUse, Whom};

/// Most nodes that `csnap up` runs on one machine.
const NODES_MAX: i64 = 16;

/// Where `csnap up` listens for NBD if nothing else is said: the port that is registered for it.
const NBD_DEFAULT: &str = "127.0.0.1:10809";

/// Block volumes over NBD with instant snapshots, on storage that nodes share.
#[derive(Debug, Parser)]
#[command(name = "csnap", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    /// Directory of `csnap up`, with the agents' sockets.
    #[arg(long, global = true, env = "CSNAP_DIR", default_value = "./csnap-data")]
    pub(crate) dir: PathBuf,
    /// Print JSON.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run everything on this machine, in the foreground until ^C.
    Up(Up),
    /// Show or change the group of lockds; with --config, be one of them.
    Lockd(Lockd),
    /// Run a node's agent.
    Agent(Daemon),
    /// Show or move the server; with --config, be a node's server (agents do that).
    Server(Server),
    /// Run a node's NBD exporter; agents do.
    Export(Daemon),
    /// Volumes.
    #[command(subcommand)]
    Volume(Volume),
    /// Snapshots.
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Make a volume from a snapshot.
    Clone {
        /// The snapshot.
        source: SnapshotName,
        /// The new volume.
        name: Name,
    },
    /// Show what changed between two snapshots, or since one.
    Diff {
        /// The older snapshot.
        from: SnapshotName,
        /// The younger snapshot, or the volume.
        to: Target,
    },
    /// Print the URI of a volume or snapshot, or connect a device to it.
    Attach {
        /// The volume or snapshot.
        target: Target,
        /// Kernel device, such as /dev/nbd0.
        device: Option<PathBuf>,
    },
    /// Disconnect a device.
    Detach {
        /// Kernel device.
        device: PathBuf,
    },
    /// Nodes.
    #[command(subcommand)]
    Node(Node),
    /// Lockspaces of lockd: list, make, and move them between groups of lockds.
    Lockspace(crate::commands::lockspace::Lockspaces),
    /// Pools.
    #[command(subcommand)]
    Pool(Pool),
    /// Make certificates, for daemons that speak to other machines.
    #[command(subcommand)]
    Cert(crate::commands::cert::Cert),
    /// Locks of lockd, for people and scripts.
    Lock(lock::Lock),
    /// Keys of lockd, for people and scripts.
    Kv(kv::Kv),
    /// Show what is there and how it does.
    Status {
        /// Again every second, until ^C.
        #[arg(long)]
        watch: bool,
    },
    /// Verify a pool that nobody uses.
    Check {
        /// The pool's directory.
        #[arg(long)]
        pool: PathBuf,
        /// Repair what can be repaired.
        #[arg(long)]
        repair: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Nodes, each with its agent, server and exporter.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=NODES_MAX))]
    pub(crate) nodes: u32,
    /// TCP address of the first node's exporter; port 0 takes a free one.
    #[arg(long, default_value = NBD_DEFAULT)]
    pub(crate) nbd: SocketAddr,
}

#[derive(Debug, Args)]
pub(crate) struct Daemon {
    /// Configuration file.
    #[arg(long)]
    pub(crate) config: PathBuf,
    /// End at once when this process does.
    #[arg(long, hide = true)]
    pub(crate) supervisor_pid: Option<u32>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Volume {
    /// Make a volume.
    Create(VolumeCreate),
    /// List volumes.
    List,
    /// Show one volume.
    Show { name: Name },
    /// Change a volume's size.
    Resize {
        name: Name,
        #[arg(long, value_parser = parse_size)]
        size: u64,
    },
    /// Give a volume another name.
    Rename { from: Name, to: Name },
    /// Delete a volume that has no snapshots and is not attached.
    Delete { name: Name },
    /// Make a clone independent of its parent.
    Flatten { name: Name },
}

#[derive(Debug, Args)]
pub(crate) struct VolumeCreate {
    /// Name of the volume.
    pub(crate) name: Name,
    /// Size: bytes, or with K, M, G or T.
    #[arg(long, value_parser = parse_size, required_unless_present_any = ["origin", "from"])]
    pub(crate) size: Option<u64>,
    /// Where snapshots' content goes: old content aside (in-place), or new content to new places (thin).
    #[arg(long, value_enum, default_value_t = Layout::InPlace)]
    pub(crate) layout: Layout,
    /// Unit of sharing: a power of two from 4K to 4M; unless given, the pool's (4K).
    #[arg(long, value_parser = parse_chunk)]
    pub(crate) chunk: Option<ChunkSize>,
    /// Use this existing device or raw image where it lies.
    #[arg(long, conflicts_with = "from")]
    pub(crate) origin: Option<PathBuf>,
    /// Fill it with the content of this raw image.
    #[arg(long)]
    pub(crate) from: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Layout {
    InPlace,
    Thin,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Snapshot {
    /// Make snapshots, VOL@SNAP each.
    Create {
        #[arg(required = true)]
        targets: Vec<SnapshotName>,
    },
    /// List snapshots, of one volume or of all.
    List { volume: Option<Name> },
    /// Show one snapshot.
    Show { target: SnapshotName },
    /// Delete snapshots; their space comes back in the background.
    Delete {
        #[arg(required = true)]
        targets: Vec<SnapshotName>,
        /// Also while it is read: its readers get I/O errors.
        #[arg(long)]
        force: bool,
    },
    /// Set a volume back to a snapshot.
    Rollback { target: SnapshotName },
    /// Give a snapshot another name.
    Rename { target: SnapshotName, to: Name },
    /// Say which snapshots go first when space runs out.
    Priority {
        target: SnapshotName,
        #[arg(allow_negative_numbers = true)]
        priority: i8,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Pool {
    /// Make a pool in an empty directory; csnap up does it by itself.
    Create {
        /// The directory, which every node of the pool will see.
        path: PathBuf,
        /// Several hosts will use it: all I/O goes past their page caches.
        #[arg(long)]
        shared: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Node {
    /// List nodes.
    List,
    /// Set how readily a node's server is chosen: the higher, the rather; 0 never.
    Priority {
        node: Name,
        /// A number, or auto.
        #[arg(value_parser = parse_priority)]
        priority: Priority,
    },
    /// Take from a lost node what it has attached, once it cannot write any more.
    Fence {
        node: Name,
        /// You made sure: it is without power, or its storage refuses it.
        #[arg(long)]
        fenced: bool,
    },
}

/// Two things under one name: a daemon with `--config`, an operator's command without.
#[derive(Debug, Args)]
pub(crate) struct Server {
    /// Configuration file.
    #[arg(long)]
    config: Option<PathBuf>,
    /// End at once when this process does.
    #[arg(long, hide = true, requires = "config")]
    supervisor_pid: Option<u32>,
    #[command(subcommand)]
    action: Option<ServerAction>,
}

/// What is meant by `csnap server`.
#[derive(Debug)]
pub(crate) enum ServerUse {
    Daemon(Daemon),
    Action(ServerAction),
}

impl Server {
    /// The use, if the arguments are of one.
    pub(crate) fn usage(&self) -> Result<ServerUse, &'static str> {
        match (&self.config, &self.action) {
            (Some(config), None) => {
                let (config, supervisor_pid) = (config.clone(), self.supervisor_pid);
                Ok(ServerUse::Daemon(Daemon { config, supervisor_pid }))
            }
            (None, Some(action)) => Ok(ServerUse::Action(action.clone())),
            (Some(_), Some(_)) => Err("csnap server takes --config or a command, not both"),
            (None, None) => Err("csnap server needs a command (show, move NODE) or --config FILE"),
        }
    }
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum ServerAction {
    /// Show which node's server serves.
    Show,
    /// Move the server to another node.
    Move { node: Name },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    Auto,
    Fixed(u32),
}

/// `VOL@SNAP`, with both parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotName(pub(crate) Target);

impl std::str::FromStr for SnapshotName {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let target: Target = text.parse().map_err(|error: csnap_proto::NameError| error.to_string())?;
        if target.snapshot.is_some() {
            Ok(Self(target))
        } else {
            Err("a snapshot is written VOL@SNAP".to_owned())
        }
    }
}

/// Of a volume.
fn parse_size(text: &str) -> Result<u64, String> {
    let bytes = crate::size::parse(text)?;
    if bytes == 0 { Err("a volume of size 0 holds nothing".to_owned()) } else { Ok(bytes) }
}

fn parse_chunk(text: &str) -> Result<ChunkSize, String> {
    let bytes = crate::size::parse(text)?;
    ChunkSize::from_bytes(bytes).ok_or_else(|| "a chunk is a power of two from 4K to 4M".to_owned())
}

fn parse_priority(text: &str) -> Result<Priority, String> {
    if text == "auto" {
        return Ok(Priority::Auto);
    }
    let max = csnap_agent::config::PRIORITY_MAX;
    let number = text.parse().ok().filter(|number| *number <= max);
    number.map(Priority::Fixed).ok_or_else(|| format!("a priority is a number from 0 to {max}, or auto"))
}

/// Reads the command line. Help goes to stdout with status 0; anything wrong is one line on stderr with status 2.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, ExitCode> {
    let cli = Cli::try_parse_from(arguments).and_then(check);
    cli.map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // In colours where there is a terminal. Nobody may be reading any more: nothing is left to be told.
            let _ = error.print();
            ExitCode::from(if error.use_stderr() { 2 } else { 0 })
        }
        _ => {
            eprintln!("{}", one_line(&error));
            ExitCode::from(2)
        }
    })
}

/// What clap's own rules cannot say.
fn check(cli: Cli) -> Result<Cli, clap::Error> {
    if let Command::Server(server) = &cli.command
        && let Err(what) = server.usage()
    {
        return Err(clap::Error::raw(ErrorKind::ArgumentConflict, what));
    }
    if let Command::Lockd(lockd) = &cli.command
        && let Err(what) = lockd.usage()
    {
        return Err(clap::Error::raw(ErrorKind::ArgumentConflict, what));
    }
    Ok(cli)
}

/// Clap's text up to its first blank line, on one line, without its colours.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let words: Vec<_> =
        text.lines().take_while(|line| !line.is_empty()).flat_map(str::split_whitespace).collect();
    format!("csnap: {}; csnap --help shows how", words.join(" ").trim_start_matches("error: "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cli(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' ')).and_then(check)
    }

    #[test]
    fn every_command_of_the_reference_parses() {
        for line in [
            "csnap up",
            "csnap up --nodes 3 --nbd 127.0.0.1:0",
            "csnap lockd --config f",
            "csnap lockd show",
            "csnap lockd show --lockd 127.0.0.1:7000,127.0.0.1:7001",
            "csnap lockd add 10.0.0.4:7000",
            "csnap lockd add n2",
            "csnap lockd add unix:/run/csnap/lockd.sock",
            "csnap lockd remove n2",
            "csnap lockd remove 00000000deadbeef",
            "csnap lockd move n2",
            "csnap agent --config f",
            "csnap server --config f",
            "csnap export --config f",
            "csnap volume create v --size 10G",
            "csnap volume create v --size 10G --layout thin --chunk 64K",
            "csnap volume create v --origin /dev/sdb",
            "csnap volume create v --from image.raw",
            "csnap volume list",
            "csnap volume show v",
            "csnap volume resize v --size 2T",
            "csnap volume rename v w",
            "csnap volume delete v",
            "csnap volume flatten v",
            "csnap snapshot create v@a w@a",
            "csnap snapshot list",
            "csnap snapshot list v",
            "csnap snapshot show v@a",
            "csnap snapshot delete v@a --force",
            "csnap snapshot delete v@a v@b",
            "csnap snapshot rollback v@a",
            "csnap snapshot rename v@a b",
            "csnap snapshot priority v@a -5",
            "csnap clone v@a w",
            "csnap diff v@a v@b",
            "csnap diff v@a v",
            "csnap attach v",
            "csnap attach v@a /dev/nbd0",
            "csnap detach /dev/nbd0",
            "csnap lockspace list",
            "csnap lockspace create s --lockd 127.0.0.1:1,unix:/run/csnap/lockd.sock",
            "csnap lockspace list --at 127.0.0.1:1",
            "csnap lockspace migrate s --to 127.0.0.1:1,127.0.0.1:2",
            "csnap lockspace abort s",
            "csnap lockspace activate s --source-is-lost",
            "csnap lockspace discard s --source-serves",
            "csnap pool create p --shared",
            "csnap cert ca d --cluster prod",
            "csnap cert node n1 --dir d --host n1.example --host 10.0.0.1",
            "csnap cert lockd n1 --dir d --days 30",
            "csnap cert operator ann --dir d --renew",
            "csnap cert client app",
            "csnap node list",
            "csnap node priority n1 50",
            "csnap node priority n1 auto",
            "csnap node fence n1 --fenced",
            "csnap server show",
            "csnap server move n2",
            "csnap status --watch",
            "csnap check --pool p --repair",
        ] {
            if let Err(error) = cli(line) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn global_options_stand_before_or_after_the_command() {
        for line in ["csnap --json --dir d volume list", "csnap volume list --dir d --json"] {
            let cli = cli(line).expect(line);
            assert!(cli.json && cli.dir == std::path::Path::new("d"), "{line}");
        }
    }

    #[test]
    fn a_wrong_command_line_is_told_in_one_line() {
        for line in [
            "csnap up --nodes 0",
            "csnap up --frobnicate",
            "csnap volume create v",
            "csnap volume create v --size 10X",
            "csnap volume create v --size 0",
            "csnap volume create v --size 10G --chunk 5K",
            "csnap volume create a/b --size 1G",
            "csnap volume create v --origin a --from b",
            "csnap snapshot create v",
            "csnap snapshot create",
            "csnap snapshot delete",
            "csnap node priority n1 often",
            "csnap lockspace migrate s",
            "csnap lockspace create a/b",
            "csnap check",
            "csnap server",
            "csnap server --config f show",
            "csnap lockd",
            "csnap lockd --config f show",
            "csnap lockd move",
            "csnap lockd move a/b",
            "csnap lockd show --lockd nowhere",
            "csnap frobnicate",
        ] {
            let text = one_line(&cli(line).expect_err(line));
            assert!(text.starts_with("csnap: ") && text.lines().count() == 1, "{text}");
        }
    }
}
