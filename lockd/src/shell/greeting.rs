//! What lockd and a client say first: which version, which cluster. Both speak at once; then frames go both ways.
//!
//! ```text
//! offset  size  field (little endian)
//!      0     4  magic "CSNL"
//!      4     4  version of the frames that follow
//!      8    16  the cluster's id: lockd's own; the client's, as far as it knows one; else zeros
//!     24     4  CRC-32C of the above
//! ```
//!
//! Before it, TLS or the machine itself said who is there. A client that knows its cluster never opens a session with
//! another's lockd: whatever address it was given, whoever has that address now.

use csnap_proto::ClusterId;
use csnap_proto::frame::VERSION;
use csnap_transport::{Stream, Unreached, is_tls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Its length, bytes.
pub const GREETING_BYTES: usize = 28;

const MAGIC: [u8; 4] = *b"CSNL";

/// What a client says that knows this cluster, or none; it hears as much before the first frame.
#[must_use]
pub fn encode(cluster: Option<ClusterId>) -> [u8; GREETING_BYTES] {
    let mut bytes = [0; GREETING_BYTES];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..8].copy_from_slice(&u32::from(VERSION).to_le_bytes());
    bytes[8..24].copy_from_slice(&cluster.map_or([0; 16], |cluster| cluster.0));
    let crc = crc32c::crc32c(&bytes[..24]);
    bytes[24..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8; GREETING_BYTES]) -> Result<Option<ClusterId>, String> {
    check_magic(bytes)?;
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    if number(24) != crc32c::crc32c(&bytes[..24]) {
        return Err("its greeting is damaged".into());
    }
    if number(4) != u32::from(VERSION) {
        return Err(format!("it speaks version {} and we speak {VERSION}", number(4)));
    }
    let cluster = ClusterId(bytes[8..24].try_into().expect("sixteen bytes"));
    Ok(Some(cluster).filter(|cluster| cluster.0 != [0; 16]))
}

/// Whether it can become a greeting. As few bytes as there are tell: one that speaks something else need not say more.
fn check_magic(bytes: &[u8]) -> Result<(), String> {
    let seen = bytes.len().min(MAGIC.len());
    if bytes[..seen] == MAGIC[..seen] {
        return Ok(());
    }
    Err(if is_tls(bytes) || bytes == [0x16] {
        "it speaks TLS, and there is none here: give both sides a [tls], or neither".into()
    } else {
        "it does not speak as lockd and its clients do".into()
    })
}

/// What a client may talk to, from what both said.
fn check_cluster(heard: Option<ClusterId>, known: Option<ClusterId>) -> Result<ClusterId, Unreached> {
    match (heard, known) {
        (None, _) => Err(Unreached::Away("it belongs to no cluster yet".into())),
        (Some(theirs), Some(ours)) if theirs != ours => {
            Err(Unreached::Refused(format!("it belongs to cluster {theirs}, and we to cluster {ours}")))
        }
        (Some(theirs), _) => Ok(theirs),
    }
}

/// Greets a client.
pub(super) async fn greet_client(stream: &mut Stream, own: Option<ClusterId>) -> Result<(), String> {
    match (exchange(stream, own).await?, own) {
        (Some(theirs), Some(ours)) if theirs != ours => {
            Err(format!("it belongs to cluster {theirs}, and this lockd to cluster {ours}"))
        }
        _ => Ok(()),
    }
}

/// Greets a lockd, and learns its cluster; `known` is ours, if we know it.
pub(crate) async fn greet_lockd(
    stream: &mut Stream,
    known: Option<ClusterId>,
) -> Result<ClusterId, Unreached> {
    check_cluster(exchange(stream, known).await?, known)
}

/// Greets a lockd that may belong to no cluster yet.
pub(crate) async fn greet_any_lockd(stream: &mut Stream, known: Option<ClusterId>) -> Result<(), Unreached> {
    let heard = exchange(stream, known).await?;
    heard.map_or(Ok(()), |_| check_cluster(heard, known).map(drop))
}

async fn exchange(stream: &mut Stream, own: Option<ClusterId>) -> Result<Option<ClusterId>, Unreached> {
    stream.write_all(&encode(own)).await?;
    stream.flush().await?;
    let mut bytes = [0; GREETING_BYTES];
    let mut filled = 0;
    while filled < GREETING_BYTES {
        match stream.read(&mut bytes[filled..]).await? {
            0 => return Err(Unreached::Away("it closed the connection before it greeted".into())),
            read => filled += read,
        }
        check_magic(&bytes[..filled]).map_err(Unreached::Refused)?;
    }
    decode(&bytes).map_err(Unreached::Refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: ClusterId = ClusterId([7; 16]);

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        for cluster in [None, Some(OURS)] {
            assert_eq!(decode(&encode(cluster)), Ok(cluster));
        }
        for at in 0..GREETING_BYTES {
            let mut bytes = encode(Some(OURS));
            bytes[at] ^= 1;
            assert!(decode(&bytes).is_err(), "byte {at}");
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = encode(None);
        bytes[4] = 99;
        let crc = crc32c::crc32c(&bytes[..24]).to_le_bytes();
        bytes[24..].copy_from_slice(&crc);
        assert!(decode(&bytes).expect_err("refused").contains("version 99"));
    }

    #[test]
    fn a_client_talks_only_to_its_cluster() {
        assert_eq!(check_cluster(Some(OURS), None), Ok(OURS));
        assert_eq!(check_cluster(Some(OURS), Some(OURS)), Ok(OURS));
        for known in [None, Some(OURS)] {
            assert!(check_cluster(None, known).is_err());
        }
        let error = check_cluster(Some(ClusterId([8; 16])), Some(OURS)).expect_err("another's");
        let Unreached::Refused(error) = error else { panic!("{error}") };
        assert!(error.contains("0808") && error.contains("0707"), "{error}");
    }

    #[test]
    fn tls_is_told_from_nonsense_by_its_first_byte() {
        for bytes in [&[0x16][..], &[0x16, 3, 1], &[0x15, 3, 3]] {
            assert!(check_magic(bytes).expect_err("no magic").contains("TLS"));
        }
        assert!(!check_magic(b"GET /").expect_err("no magic").contains("TLS"));
        assert_eq!(check_magic(b"CS"), Ok(()));
    }
}
