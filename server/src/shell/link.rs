//! The connection to the agent: orders come in, news goes out. When it closes, the agent is gone, and so is the server.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context;
use bytes::BytesMut;
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::message::local::{FromAgent, ToAgent};
use csnap_proto::message::volume::NO_TERM;
use csnap_proto::{Frame, RequestId, Term};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

/// What the agent wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Take over and serve.
    Serve(Term),
    /// Finish and go.
    Drain,
}

/// The way back to the agent. Clones share the socket.
#[derive(Clone)]
pub(super) struct Link {
    news: mpsc::UnboundedSender<ToAgent>,
}

impl Link {
    /// Tells the agent; silently nothing once it is gone, for then the process ends anyway.
    pub(super) fn tell(&self, news: ToAgent) {
        let _ = self.news.send(news);
    }
}

/// Says hello. The receiver of orders is closed when the agent goes. Pings are answered here, on the thread that does
/// all the work: a server that is stuck does not answer.
pub(super) async fn connect(
    socket: &Path,
    address: SocketAddr,
) -> anyhow::Result<(Link, mpsc::UnboundedReceiver<Order>)> {
    let stream = UnixStream::connect(socket).await.with_context(|| {
        format!("cannot reach the agent at {}; servers are started by agents", socket.display())
    })?;
    let (read, write) = stream.into_split();
    let (news, news_out) = mpsc::unbounded_channel();
    let (orders, orders_in) = mpsc::unbounded_channel();
    let link = Link { news };
    link.tell(ToAgent::ServerHello { tcp: address.to_string() });
    tokio::task::spawn_local(speak(write, news_out));
    tokio::task::spawn_local(listen(read, link.clone(), orders));
    Ok((link, orders_in))
}

async fn speak(mut socket: OwnedWriteHalf, mut news: mpsc::UnboundedReceiver<ToAgent>) {
    use tokio::io::AsyncWriteExt;
    let mut bytes = BytesMut::new();
    while let Some(message) = news.recv().await {
        encode(&Frame { id: RequestId(0), term: NO_TERM, message }, &mut bytes);
        if socket.write_all_buf(&mut bytes).await.is_err() {
            return;
        }
    }
}

async fn listen(mut socket: OwnedReadHalf, link: Link, orders: mpsc::UnboundedSender<Order>) {
    let mut decoder = FrameDecoder::default();
    loop {
        let message = match decoder.next::<FromAgent>() {
            Ok(Some(frame)) => frame.message,
            Ok(None) => match socket.read_buf(decoder.buffer()).await {
                Ok(0) | Err(_) => return,
                Ok(_) => continue,
            },
            Err(error) => return tracing::error!(%error, "the agent does not speak our protocol"),
        };
        let order = match message {
            FromAgent::Ping => {
                link.tell(ToAgent::Pong);
                continue;
            }
            FromAgent::Serve { term } => Order::Serve(term),
            FromAgent::Drain => Order::Drain,
            other => {
                tracing::warn!(?other, "not for a server");
                continue;
            }
        };
        if orders.send(order).is_err() {
            return;
        }
    }
}
