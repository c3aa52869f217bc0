//! Any bytes as request headers under any terms: what is accepted lies within the export.
#![no_main]

use csnap_nbd_export::core::request::{Header, Terms, Verdict, judge};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((&flags, data)) = data.split_first() else { return };
    let bit = |n: u8| flags & (1 << n) != 0;
    let terms = Terms {
        size_bytes: if bit(4) { u64::MAX >> 1 } else { 1 << 20 },
        read_only: bit(0),
        structured: bit(1),
        base_allocation: bit(2),
        fast_zero: bit(3),
    };
    for bytes in data.chunks_exact(28) {
        let Some(header) = Header::decode(bytes.try_into().expect("28 bytes")) else { continue };
        assert_eq!(header.encode(), *bytes);
        if let Verdict::Accept(request) = judge(&header, &terms) {
            let end = request.offset.checked_add(u64::from(request.len)).expect("no overflow");
            assert!(end <= terms.size_bytes || request.len == 0);
        }
    }
});
