//! What two replicas tell each other once their greetings fit: [`Presence`], in postcard behind its length (u16, little
//! endian).

use std::cell::{Cell, RefCell};

use anyhow::bail;
use csnap_proto::limits::LOCKD_ADDRESSES_MAX;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::hello::Hello;
use crate::replicated::Presence;

/// Longest one, bytes: a name, and sixteen addresses of at most twenty bytes.
const PRESENCE_BYTES_MAX: u16 = 1024;

/// What this replica says of itself; all of it may change while it runs.
pub(super) struct Introduction {
    pub(super) hello: Cell<Hello>,
    pub(super) presence: RefCell<Presence>,
}

/// Says its own and hears the other's.
pub(super) async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    own: &Introduction,
) -> anyhow::Result<Presence> {
    let said = postcard::to_stdvec(&*own.presence.borrow())?;
    let len = u16::try_from(said.len())?;
    let mut bytes = len.to_le_bytes().to_vec();
    bytes.extend(said);
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    let len = stream.read_u16_le().await?;
    if len > PRESENCE_BYTES_MAX {
        bail!("it says more of itself than {PRESENCE_BYTES_MAX} bytes");
    }
    let mut bytes = vec![0; usize::from(len)];
    stream.read_exact(&mut bytes).await?;
    decode(&bytes)
}

fn decode(bytes: &[u8]) -> anyhow::Result<Presence> {
    let Ok((presence, [])) = postcard::take_from_bytes::<Presence>(bytes) else {
        bail!("what it says of itself does not decode");
    };
    if presence.clients.len() > LOCKD_ADDRESSES_MAX {
        bail!("it says that it listens on more than {LOCKD_ADDRESSES_MAX} addresses");
    }
    Ok(presence)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use csnap_proto::Name;

    use super::*;

    #[test]
    fn the_longest_is_short_enough_and_nothing_longer_is_taken() {
        let address: SocketAddr =
            "[2001:db8:1234:5678:9abc:def0:1234:5678]:65535".parse().expect("an address");
        let presence = |count| Presence {
            node: Name::new("n".repeat(128)).expect("a name"),
            pid: u32::MAX,
            peer: Some(address),
            clients: vec![address; count],
        };
        let longest = presence(LOCKD_ADDRESSES_MAX);
        let bytes = postcard::to_stdvec(&longest).expect("encodes");
        assert!(bytes.len() <= usize::from(PRESENCE_BYTES_MAX));
        assert_eq!(decode(&bytes).expect("decodes"), longest);
        assert!(decode(&postcard::to_stdvec(&presence(LOCKD_ADDRESSES_MAX + 1)).expect("encodes")).is_err());
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut]).is_err(), "{cut}");
        }
        assert!(decode(&[bytes, vec![0]].concat()).is_err());
    }
}
