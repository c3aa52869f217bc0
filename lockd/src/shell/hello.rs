//! What two replicas say first: which protocol, which disk, which group, and the same founders.
//!
//! ```text
//! offset  size  field (little endian)
//!      0     4  magic "CSNR"
//!      4     4  version
//!      8     8  the replica's id: its disk
//!     16    16  its group; zeros if it belongs to none
//!     32     4  checksum of the founders' addresses, as both were told
//!     36     4  CRC-32C of the above
//! ```

use std::net::SocketAddr;

use crate::replica::{ClusterId, Heard, ReplicaId};

/// Version of the handshake and of everything after it.
///
/// 1: the first. 2: both say after it who and where they are.
pub(super) const VERSION: u32 = 2;

/// Its length, bytes.
pub(super) const HELLO_BYTES: usize = 40;

const MAGIC: [u8; 4] = *b"CSNR";

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) heard: Heard,
    pub(super) founders: u32,
}

impl Hello {
    pub(super) fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.heard.id.0.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.heard.cluster.map_or([0; 16], |cluster| cluster.0));
        bytes[32..36].copy_from_slice(&self.founders.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..36]);
        bytes[36..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a peer's, and says why the two may not talk.
    pub(super) fn decode(bytes: &[u8; HELLO_BYTES], own: &Self) -> Result<Self, String> {
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        if bytes[..4] != MAGIC {
            return Err("it is no replica of lockd".into());
        }
        if number(4) != VERSION {
            return Err(format!("it speaks version {} and this lockd {VERSION}", number(4)));
        }
        if number(36) != crc32c::crc32c(&bytes[..36]) {
            return Err("its greeting is damaged".into());
        }
        let id = ReplicaId(u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes")));
        let cluster: [u8; 16] = bytes[16..32].try_into().expect("sixteen bytes");
        let cluster = Some(ClusterId(cluster)).filter(|cluster| cluster.0 != [0; 16]);
        let hello = Self { heard: Heard { id, cluster }, founders: number(32) };
        match (cluster, own.heard.cluster) {
            (Some(theirs), Some(ours)) if theirs != ours => Err("it belongs to another group".into()),
            (None, None) if hello.founders != own.founders => {
                Err("it was told of other founders: give both the same `peers`".into())
            }
            _ if id == own.heard.id => Err("it is this replica itself, or has a copy of its disk".into()),
            _ => Ok(hello),
        }
    }
}

/// The same for the same addresses in any order.
pub(super) fn founders_checksum(founders: &[SocketAddr]) -> u32 {
    let mut texts: Vec<String> = founders.iter().map(SocketAddr::to_string).collect();
    texts.sort_unstable();
    crc32c::crc32c(texts.join(" ").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(id: u64, cluster: Option<u8>, founders: u32) -> Hello {
        let cluster = cluster.map(|byte| ClusterId([byte; 16]));
        Hello { heard: Heard { id: ReplicaId(id), cluster }, founders }
    }

    #[test]
    fn only_replicas_of_one_group_and_version_talk() {
        let own = hello(1, Some(7), 5);
        for good in [hello(2, Some(7), 5), hello(2, None, 5), hello(2, Some(7), 6)] {
            assert_eq!(Hello::decode(&good.encode(), &own), Ok(good));
        }
        for (bad, own, says) in [
            (hello(2, Some(8), 5), own, "another group"),
            (hello(1, Some(7), 5), own, "itself"),
            (hello(2, None, 6), hello(1, None, 5), "founders"),
        ] {
            let refused = Hello::decode(&bad.encode(), &own).expect_err("refused");
            assert!(refused.contains(says), "{refused}");
        }
        for at in 0..HELLO_BYTES {
            let mut bytes = hello(2, Some(7), 5).encode();
            bytes[at] ^= 1;
            assert!(Hello::decode(&bytes, &own).is_err(), "byte {at}");
        }
    }

    #[test]
    fn the_order_of_founders_does_not_matter() {
        let a: SocketAddr = ([10, 0, 0, 1], 1).into();
        let b: SocketAddr = ([10, 0, 0, 2], 1).into();
        assert_eq!(founders_checksum(&[a, b]), founders_checksum(&[b, a]));
        assert_ne!(founders_checksum(&[a, b]), founders_checksum(&[a]));
    }
}
