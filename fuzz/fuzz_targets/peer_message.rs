//! Any bytes as a message of one lockd replica to another. What decodes and is accepted comes back the same.
#![no_main]

use csnap_lockd::replica::PeerMessage;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(message) = PeerMessage::decode(data) {
        assert_eq!(PeerMessage::decode(&message.encode()), Ok(message));
    }
});
