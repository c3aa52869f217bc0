//! Bytes that are encoded in one go rather than one by one: `#[serde(with = "crate::blob")]`. The encoding is the same; a
//! state of megabytes is read and written a hundred times as fast.

use std::fmt;

use serde::de::{Error, Visitor};
use serde::{Deserializer, Serializer};

/// Writes them.
pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

/// Reads them.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    struct Bytes;
    impl Visitor<'_> for Bytes {
        type Value = Vec<u8>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("bytes")
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }
    }
    deserializer.deserialize_bytes(Bytes)
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct InOneGo(#[serde(with = "crate::blob")] Vec<u8>);

    #[test]
    fn the_encoding_is_that_of_a_list_of_bytes() {
        for len in [0, 1, 127, 128, 100_000] {
            let bytes = vec![0x5a; len];
            let encoded = postcard::to_stdvec(&InOneGo(bytes.clone())).expect("encodes");
            assert_eq!(encoded, postcard::to_stdvec(&bytes).expect("encodes"));
            assert_eq!(postcard::from_bytes::<InOneGo>(&encoded), Ok(InOneGo(bytes)));
            assert!(postcard::from_bytes::<InOneGo>(&encoded[..encoded.len() - 1]).is_err());
        }
    }
}
