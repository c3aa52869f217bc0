//! A client without an agent, written on the bare protocol: when it renewed its lease, it knows exactly.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::BytesMut;
use csnap_lockd::client::{GREETING_BYTES, Identity, greeting};
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::message::lock::{Flags, FromLockd, LockOp, LockReply, Mode, ToLockd};
use csnap_proto::{EventNumber, Frame, Name, RequestId, Sequence, Term};

use super::{Renewed, now_us, say};

/// A lockd that follows closes what is asked of it; one that is dead answers nothing.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// Attempts over all addresses before it gives up.
const ROUNDS_MAX: usize = 100;

/// Takes the lock in EX, renews once, says when, and waits to be killed.
pub(crate) fn live(addresses: &[SocketAddr], resource: &str, lease_ms: u64) -> anyhow::Result<()> {
    let mut leader = Leader::find(addresses, lease_ms)?;
    let op = LockOp::lock(resource, Mode::Ex, Flags::NONE);
    let first = Sequence(1);
    match leader.ask(ToLockd::Operate { sequence: first, lowest_unanswered: first, op })? {
        FromLockd::Answer { reply: LockReply::Granted { .. }, .. } => {}
        other => bail!("lock: {other:?}"),
    }
    let renewed_us = now_us();
    match leader.ask(ToLockd::Renew { last_event: EventNumber(0) })? {
        FromLockd::Renewed => say(&Renewed { renewed_us, lease_ms })?,
        other => bail!("renew: {other:?}"),
    }
    loop {
        std::thread::park();
    }
}

/// A connection to whoever leads, with a session.
struct Leader {
    stream: TcpStream,
    decoder: FrameDecoder,
}

impl Leader {
    fn find(addresses: &[SocketAddr], lease_ms: u64) -> anyhow::Result<Self> {
        let Identity { session, secret } = super::lockd::identity()?;
        let node = Name::new("mortal")?;
        let open = ToLockd::Open { session, secret, node, lease_ms, info: Vec::new() };
        for address in addresses.iter().cycle().take(ROUNDS_MAX * addresses.len()) {
            let asked =
                Self::connect(*address).and_then(|mut leader| Ok((leader.ask(open.clone())?, leader)));
            if let Ok((FromLockd::Opened { .. }, leader)) = asked {
                return Ok(leader);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("no lockd leads")
    }

    fn connect(address: SocketAddr) -> anyhow::Result<Self> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        stream.write_all(&greeting(None))?;
        stream.read_exact(&mut [0; GREETING_BYTES])?;
        Ok(Self { stream, decoder: FrameDecoder::default() })
    }

    fn ask(&mut self, message: ToLockd) -> anyhow::Result<FromLockd> {
        let mut bytes = BytesMut::new();
        encode(&Frame { id: RequestId(1), term: Term(0), message }, &mut bytes);
        self.stream.write_all(&bytes)?;
        let mut piece = [0; 4096];
        loop {
            if let Some(frame) = self.decoder.next::<FromLockd>()? {
                let frame: Frame<FromLockd> = frame;
                if !matches!(frame.message, FromLockd::Event { .. }) {
                    return Ok(frame.message);
                }
                continue;
            }
            let read = self.stream.read(&mut piece).context("no answer")?;
            if read == 0 {
                bail!("it closed the connection");
            }
            self.decoder.buffer().extend_from_slice(&piece[..read]);
        }
    }
}
