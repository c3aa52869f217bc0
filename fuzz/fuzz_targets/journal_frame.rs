//! Any bytes as a frame of the journal, at a place that they may or may not claim.
#![no_main]

use bytes::Bytes;
use csnap_proto::{PoolId, Term};
use csnap_server::term::frame::{File, Place, decode, peek};
use csnap_server::term::seal::Seal;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let place = Place { pool: PoolId([0; 16]), term: Term(1), file: File::Journal, number: 0, offset: 0 };
    let _ = peek(data);
    let bytes = Bytes::copy_from_slice(data);
    let _ = decode(&place, &bytes);
    let _ = Seal::decode(Term(1), &bytes);
});
