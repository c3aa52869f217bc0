//! `csnap status`: everything that the agents and the server know, also when some or all of them are away.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use csnap_proto::Name;
use csnap_proto::message::local::{
    AgentStatus, ClientReport, LockdInfo, NodeInfo, ServerAddress, ServerState,
};
use csnap_proto::message::operate::{OperatorReply, OperatorRequest, ServerStatus, VolumeInfo};
use serde_json::{Value, json};

use super::{lockd, volume};
use crate::operator::Session;
use crate::{agents, group, lockds, output, size};

/// A server that serves answers within this; status does not wait for one that is being replaced.
const SERVER_WITHIN: Duration = Duration::from_secs(2);

/// Between two looks of `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// What everybody said.
pub(crate) struct Gathered {
    /// What an agent knows of lockd.
    lockd: Option<LockdInfo>,
    /// What the lockds that are found say themselves.
    lockds: Option<group::Gathered>,
    /// Every node that is up or has a directory; none: down.
    nodes: BTreeMap<Name, Option<NodeInfo>>,
    server: Option<ServerAddress>,
    vacancy: Option<String>,
    clients: Vec<(Name, ClientReport)>,
    pool: Option<ServerStatus>,
    volumes: Option<Vec<VolumeInfo>>,
}

pub(crate) async fn run(dir: &Path, json: bool, watch: bool) -> anyhow::Result<()> {
    loop {
        let (mut gathered, lockds) = tokio::join!(gather(dir), ask_lockds(dir));
        if let Ok(gathered) = &mut gathered {
            gathered.lockds = lockds;
            gathered.ask_server(dir).await;
        }
        let gathered = gathered?;
        if json {
            output::json(&gathered.json())?;
        } else {
            // A terminal shows the newest look alone, a pipe all of them.
            let clear = if watch && std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
            output::print(&format!("{clear}{}", gathered.text()))?;
        }
        if !watch {
            return Ok(());
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

/// What the lockds say, where any is found and answers.
async fn ask_lockds(dir: &Path) -> Option<group::Gathered> {
    let lockds = lockds::find(dir, &lockds::At::from_environment()).ok()?;
    let gathered = group::gather(&lockds).await;
    Some(gathered).filter(|gathered| !gathered.is_empty())
}

/// Asks every agent under `dir`, all at once. An agent knows itself best; of the others it says what lockd told it.
pub(crate) async fn gather(dir: &Path) -> anyhow::Result<Gathered> {
    let sockets = agents::find(dir)?;
    let mut nodes: BTreeMap<_, _> =
        sockets.iter().filter_map(|socket| Some((socket.node.clone()?, None))).collect();
    let asked: Vec<_> = sockets
        .into_iter()
        .map(|socket| tokio::spawn(async move { agents::status(&socket.path).await }))
        .collect();
    let mut statuses = Vec::new();
    for answer in asked {
        statuses.extend(answer.await?.ok());
    }
    for status in &statuses {
        for other in status.nodes.iter().filter(|other| other.node != status.node) {
            nodes.insert(other.node.clone(), Some(other.info.clone()));
        }
    }
    for status in &statuses {
        let own = status.nodes.iter().find(|node| node.node == status.node);
        nodes.insert(status.node.clone(), own.map(|own| own.info.clone()));
    }
    Ok(Gathered {
        lockd: statuses.iter().find_map(|status| status.lockd.clone()),
        lockds: None,
        nodes,
        server: newest_server(&statuses),
        vacancy: statuses
            .iter()
            .find_map(|status| status.vacancy.clone())
            .or_else(|| statuses.is_empty().then(|| "no agent answers; is csnap up running?".to_owned())),
        clients: statuses
            .into_iter()
            .flat_map(|status| status.clients.into_iter().map(move |client| (status.node.clone(), client)))
            .collect(),
        pool: None,
        volumes: None,
    })
}

/// Of the newest term that anybody knows; one that serves before one that starts.
fn newest_server(statuses: &[AgentStatus]) -> Option<ServerAddress> {
    let servers = statuses.iter().filter_map(|status| status.server.clone());
    let lives = |server: &ServerAddress| matches!(server.state, ServerState::Starting | ServerState::Ready);
    servers.filter(lives).max_by_key(|server| (server.term, server.state == ServerState::Ready))
}

impl Gathered {
    async fn ask_server(&mut self, dir: &Path) {
        if self.server.as_ref().is_none_or(|server| server.state != ServerState::Ready) {
            return;
        }
        let asking = async {
            let mut session = Session::open(dir).await.ok()?;
            let OperatorReply::Status(status) = session.request(OperatorRequest::Status).await.ok()? else {
                return None;
            };
            let volumes = session.volumes().await.ok()?;
            session.close().await;
            Some((*status, volumes))
        };
        let answer = tokio::time::timeout(SERVER_WITHIN, asking).await.ok().flatten();
        (self.pool, self.volumes) = answer.unzip();
    }

    fn json(&self) -> Value {
        let pool = self.pool.as_ref().map(|pool| {
            json!({
                "id": pool.pool.to_string(),
                "used_bytes": pool.used_bytes,
                "free_bytes": pool.free_bytes,
                "held_bytes": pool.held_bytes,
                "held_because": pool.held_because,
            })
        });
        let volumes =
            self.volumes.as_ref().map(|volumes| volumes.iter().map(volume::as_json).collect::<Vec<_>>());
        json!({
            "lockd": self.lockd_json(),
            "nodes": self.nodes_json(),
            "server": self.server_with_times(),
            "pool": pool,
            "volumes": volumes,
            "clients": self.clients.iter().map(client_json).collect::<Vec<_>>(),
        })
    }

    /// From the lockds themselves where they are found; else what the agents know, who see only the one that they talk to.
    fn lockd_json(&self) -> Option<Value> {
        if let Some(lockds) = &self.lockds {
            return Some(lockd::as_json(lockds));
        }
        self.lockd.as_ref().map(|lockd| {
            let members: Vec<_> =
                lockd.members.iter().map(|(node, pid)| json!({ "node": node, "pid": pid })).collect();
            json!({ "leader": lockd.leader, "members": members })
        })
    }

    fn lockd_line(&self) -> String {
        match (&self.lockds, &self.lockd) {
            (Some(lockds), _) => format!("lockd   {}\n", lockd::summary(lockds)),
            (None, Some(lockd)) => format!("lockd   {} leads\n", lockd.leader),
            (None, None) => "lockd   does not answer\n".to_owned(),
        }
    }

    pub(crate) fn nodes_json(&self) -> Value {
        let node = |(id, info): (&Name, &Option<NodeInfo>)| {
            let info = info.as_ref();
            json!({
                "id": id,
                "state": if info.is_some() { "up" } else { "down" },
                "priority": info.map(|info| info.priority),
                "standby_ready": info.map(|info| info.standby_ready),
                "trouble": info.and_then(|info| info.trouble.as_ref()),
                "agent_pid": info.map(|info| info.agent_pid),
                "server_pid": info.and_then(|info| info.server_pid),
                "export_pid": info.and_then(|info| info.export_pid),
                "nbd": info.map(|info| info.nbd.clone()).unwrap_or_default(),
            })
        };
        self.in_order().map(node).collect()
    }

    /// Nodes as people count them: n2 before n10.
    fn in_order(&self) -> impl Iterator<Item = (&Name, &Option<NodeInfo>)> {
        let mut nodes: Vec<_> = self.nodes.iter().collect();
        nodes.sort_by_key(|(node, _)| (node.as_str().len(), node.as_str()));
        nodes.into_iter()
    }

    pub(crate) fn server_json(&self) -> Value {
        let server = self.server.as_ref();
        let pid = server.and_then(|server| self.nodes.get(&server.node)?.as_ref()?.server_pid);
        json!({
            "node": server.map(|server| &server.node),
            "pid": pid,
            "term": server.map(|server| server.term.0),
            "address": server.map(|server| &server.tcp),
            "state": self.server_state(),
            "reason": self.why_vacant(),
        })
    }

    /// Beside who serves, what only that server knows: how long its last snapshot creates took.
    fn server_with_times(&self) -> Value {
        let mut server = self.server_json();
        server["snapshot_creates"] = self.pool.as_ref().map_or(Value::Null, |pool| {
            let creates = &pool.creates;
            json!({
                "count": creates.count,
                "recent": creates.recent,
                "total_p50_us": creates.total_p50_micros,
                "total_max_us": creates.total_max_micros,
                "own_p50_us": creates.own_p50_micros,
                "own_max_us": creates.own_max_micros,
            })
        });
        server
    }

    fn server_state(&self) -> &'static str {
        match self.server.as_ref().map(|server| server.state) {
            Some(ServerState::Ready) => "serving",
            Some(ServerState::Starting) => "starting",
            Some(ServerState::Handover { .. }) | None => "vacant",
        }
    }

    /// An agent that is a moment behind says so although another one knows better.
    fn why_vacant(&self) -> Option<&str> {
        self.vacancy.as_deref().filter(|_| self.server_state() != "serving")
    }

    pub(crate) fn server_line(&self) -> String {
        match (&self.server, self.why_vacant()) {
            (Some(server), None) => {
                format!("{} {} term {} at {}\n", server.node, self.server_state(), server.term, server.tcp)
            }
            (_, why) => format!("{}: {}\n", self.server_state(), why.unwrap_or("no agent says why")),
        }
    }

    pub(crate) fn nodes_table(&self) -> String {
        let row = |(id, info): (&Name, &Option<NodeInfo>)| {
            let pid = |pid: Option<u32>| pid.map_or("-".to_owned(), |pid| pid.to_string());
            let of = |get: fn(&NodeInfo) -> Option<u32>| pid(info.as_ref().and_then(get));
            let serves = self.server.as_ref().is_some_and(|server| server.node == *id);
            let server = match info {
                None => "-",
                Some(_) if serves => self.server_state(),
                Some(info) if info.standby_ready => "standby",
                Some(_) => "not ready",
            };
            vec![
                id.to_string(),
                if info.is_some() { "up" } else { "down" }.to_owned(),
                of(|info| Some(info.priority)),
                server.to_owned(),
                of(|info| Some(info.agent_pid)),
                of(|info| info.server_pid),
                of(|info| info.export_pid),
                info.as_ref().map(|info| info.nbd.join(" ")).unwrap_or_default(),
            ]
        };
        let headings = ["NODE", "STATE", "PRIORITY", "SERVER", "AGENT", "SERVER PID", "EXPORT", "NBD"];
        output::table(&headings, &self.in_order().map(row).collect::<Vec<_>>())
    }

    fn text(&self) -> String {
        let lockd = self.lockd_line();
        let pool = match &self.pool {
            Some(pool) => {
                let held: Vec<_> = pool.held_because.iter().map(|why| format!("        {why}\n")).collect();
                format!(
                    "pool    {} used, {} free, {} held\n{}",
                    size::show(pool.used_bytes),
                    size::show(pool.free_bytes),
                    size::show(pool.held_bytes),
                    held.concat()
                )
            }
            None => "pool    not known without a server\n".to_owned(),
        };
        let server = format!("server  {}", self.server_line());
        format!(
            "{lockd}{server}{pool}\n{}{}\n{}{}",
            self.nodes_table(),
            self.troubles(),
            self.volumes_table(),
            self.waiting()
        )
    }

    /// Nodes whose servers keep failing, and how.
    fn troubles(&self) -> String {
        let line = |(id, info): (&Name, &Option<NodeInfo>)| {
            let trouble = info.as_ref()?.trouble.as_ref()?;
            Some(format!("{id}: {trouble}\n"))
        };
        self.in_order().filter_map(line).collect()
    }

    fn volumes_table(&self) -> String {
        let Some(volumes) = &self.volumes else { return String::new() };
        let row = |v: &VolumeInfo| {
            vec![
                v.name.to_string(),
                size::show(v.size_bytes),
                v.snapshots.to_string(),
                size::show(v.store_bytes),
                volume::attached_to(&v.attached),
                v.blocked.clone().unwrap_or_default(),
            ]
        };
        let headings = ["VOLUME", "SIZE", "SNAPSHOTS", "STORE", "ATTACHED", ""];
        output::table(&headings, &volumes.iter().map(row).collect::<Vec<_>>())
    }

    /// Attachments whose requests wait, and why.
    fn waiting(&self) -> String {
        let line = |(node, client): &(Name, ClientReport)| {
            let why = client.waiting.as_ref()?;
            Some(format!("{} on {node} waits: {why}\n", client.target))
        };
        self.clients.iter().filter_map(line).collect()
    }
}

fn client_json((node, client): &(Name, ClientReport)) -> Value {
    json!({
        "node": node,
        // As its export is called.
        "volume": client.target.to_string(),
        "snapshot": client.target.snapshot,
        "connections": client.connections,
        "messages": client.messages,
        "waiting": client.waiting,
    })
}
