//! A command's conversation with the server, through any agent under the directory.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use csnap_client::{Operator, OperatorError, ServerSource};
use csnap_proto::message::operate::{OperatorReply, OperatorRequest, VolumeInfo};
use csnap_proto::{InstanceId, Name};

use crate::agents;

/// A failover is a pause; one that lasts this long needs somebody to look at it.
const PATIENCE: Duration = Duration::from_secs(60);

/// After this long a person is told what is waited for.
const TELL_AFTER: Duration = Duration::from_secs(3);

/// An operator's session with whichever server serves.
pub(crate) struct Session {
    operator: Operator,
    /// Socket of the agent that is asked for servers.
    pub(crate) agent: PathBuf,
    /// Its node.
    pub(crate) node: Name,
    /// This run of this process.
    pub(crate) instance: InstanceId,
}

/// Sixteen random bytes.
pub(crate) fn draw() -> anyhow::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
    Ok(bytes)
}

impl Session {
    /// Through the first agent under `dir` that answers.
    pub(crate) async fn open(dir: &Path) -> anyhow::Result<Self> {
        let (agent, status) = agents::any(dir).await?;
        Self::through(agent, status.node)
    }

    /// Through this agent.
    pub(crate) fn through(agent: PathBuf, node: Name) -> anyhow::Result<Self> {
        let instance = InstanceId(draw()?);
        let source = ServerSource::Agents(vec![agent.clone()]);
        let operator = Operator::new(source, node.clone(), instance)?;
        Ok(Self { operator, agent, node, instance })
    }

    /// One request; waits over failovers, and says what for.
    pub(crate) async fn request(&mut self, request: OperatorRequest) -> anyhow::Result<OperatorReply> {
        let agent = self.agent.clone();
        let telling = async {
            tokio::time::sleep(TELL_AFTER).await;
            if std::io::stderr().is_terminal()
                && let Some(why) = vacancy(&agent).await
            {
                eprintln!("csnap: waiting for a server: {why}");
            }
            std::future::pending::<std::convert::Infallible>().await
        };
        let asking = tokio::time::timeout(PATIENCE, self.operator.request(request));
        let answer = tokio::select! {
            answer = asking => answer,
            never = telling => match never {},
        };
        match answer {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(OperatorError::Refused(refusal))) => bail!("{}", refusal.reason),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => {
                let why = vacancy(&self.agent).await.unwrap_or_else(|| "it does not answer".to_owned());
                bail!("no server in {} s: {why}; see csnap status and the logs", PATIENCE.as_secs())
            }
        }
    }

    /// A request that answers nothing but that it is done.
    pub(crate) async fn done(&mut self, request: OperatorRequest) -> anyhow::Result<()> {
        match self.request(request).await? {
            OperatorReply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Every volume, by name.
    pub(crate) async fn volumes(&mut self) -> anyhow::Result<Vec<VolumeInfo>> {
        let mut all: Vec<VolumeInfo> = Vec::new();
        loop {
            let after = all.last().map(|last| last.name.clone());
            let reply = self.request(OperatorRequest::VolumeList { after }).await?;
            let OperatorReply::Volumes { rows, more } = reply else { return Err(unexpected(&reply)) };
            let over = !more || rows.is_empty();
            all.extend(rows);
            if over {
                return Ok(all);
            }
        }
    }

    /// Gives the session back.
    pub(crate) async fn close(self) {
        self.operator.close().await;
    }
}

/// The server answered another question than the one that was asked.
pub(crate) fn unexpected(reply: &OperatorReply) -> anyhow::Error {
    anyhow::anyhow!("the server answered another question: {reply:?}")
}

async fn vacancy(agent: &Path) -> Option<String> {
    match agents::status(agent).await.context("the agent is gone too") {
        Ok(status) => status.vacancy,
        Err(error) => Some(format!("{error:#}")),
    }
}
