//! Any bytes as a batch of the journal's records, applied to an empty state: errors are fine, panics are not.
#![no_main]

use csnap_proto::PoolId;
use csnap_server::state::{Record, State};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(records) = Record::decode_batch(data) else { return };
    let again = records.iter().fold(Vec::new(), |batch, record| record.encode_onto(batch));
    assert_eq!(Record::decode_batch(&again).as_ref(), Ok(&records));
    let mut state = State::new(PoolId([0; 16]));
    if records.iter().all(|record| state.apply(record).is_ok()) {
        assert_eq!(state.check(), Ok(()));
    }
});
