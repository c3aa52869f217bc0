//! Any bytes as lockd's log and snapshot.
#![no_main]

use csnap_lockd::store::record::{LogPlace, decode_batch, decode_snapshot, has_batch_after};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let place = LogPlace::start([0; 16], 1, 1);
    let _ = decode_batch(data, place);
    let _ = has_batch_after(data, place);
    let _ = decode_snapshot(data);
});
