//! Any bytes as messages of one family: raw, and as the body of a frame whose header and checksum are right. What
//! decodes comes back the same from encoding and decoding.
#![no_main]

#[path = "../family.rs"]
mod family;

libfuzzer_sys::fuzz_target!(|data: &[u8]| family::check::<csnap_proto::message::local::ToAgent>(data));
