//! Any bytes as an NBD client's negotiation, cut anywhere: ends or waits, and writes no more than it was asked for.
#![no_main]

use csnap_nbd_export::core::handshake::{Answer, Ask, Handshake, Progress};
use csnap_nbd_export::{ExportInfo, Listed, OpenError};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // Past the client's flags, where everything interesting begins.
    let mut client = 3u32.to_be_bytes().to_vec();
    client.extend_from_slice(data);
    let mut out = Vec::new();
    let mut handshake = Handshake::new(&mut out);
    let mut input = client.as_slice();
    loop {
        let Progress::Ask(ask) = handshake.advance(&mut input, &mut out) else { return };
        let export = |name: String| match name.as_str() {
            "" | "demo" => Ok(demo()),
            _ => Err(OpenError::Refused("not given".to_owned())),
        };
        let answer = match ask {
            Ask::List => Answer::List(Ok(vec![Listed { name: "demo".to_owned(), description: String::new() }])),
            Ask::Info(name) | Ask::Open(name) => Answer::Export(export(name)),
        };
        if handshake.answer(answer, &mut out) != Progress::NeedInput {
            return;
        }
    }
});

fn demo() -> ExportInfo {
    ExportInfo {
        name: "demo".to_owned(),
        description: String::new(),
        size_bytes: 1 << 30,
        read_only: false,
        block_preferred: 4096,
        multi_conn: true,
        fast_zero: false,
    }
}
