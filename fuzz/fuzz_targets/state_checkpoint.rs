//! Any bytes as the pieces of a checkpoint.
#![no_main]

use csnap_server::state::Loader;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut loader = Loader::new();
    if data.chunks(4096).all(|piece| loader.push(piece).is_ok()) {
        let _ = loader.finish();
    }
});
