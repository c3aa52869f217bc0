//! What a client can make the server hold, measured: a binary of its own, and one test at a time, because it is the memory
//! of the process that is looked at.

mod support;

use std::io::{Read, Write};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use csnap_nbd_export::core::request::Header;
use csnap_nbd_export::core::wire::command as cmd;
use support::client::Client;
use support::{MemoryExports, Server, resident_bytes};

const MIB: usize = 1 << 20;

/// Held by the test that measures.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn a_hundred_thousand_requests_without_reading_a_reply_stay_bounded() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let exports = MemoryExports::new(4 * MIB);
    let server = Server::start(Arc::clone(&exports));
    for slow in [false, true] {
        exports.memory.slow.store(slow, SeqCst);
        let client = Client::attach(&server.socket, "mem", true);
        let before = resident_bytes();
        let header = Header { flags: 0, command: cmd::READ, cookie: 1, offset: 0, len: 1 << 20 };
        let flood = header.encode().repeat(100_000);
        let mut sender = client.stream.try_clone().expect("clones");
        sender.set_write_timeout(Some(Duration::from_millis(300))).expect("settable");
        let sent = sender.write_all(&flood);
        assert!(sent.is_err(), "the server stops reading");
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 64 * MIB, "{grown} bytes more, slow {slow}");
        drop((client, sender));
        exports.wait_released();
    }
}

#[test]
fn large_simple_reads_that_nobody_takes_stay_bounded() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let exports = MemoryExports::new(64 * MIB);
    let server = Server::start(Arc::clone(&exports));
    let mut client = Client::attach(&server.socket, "mem", false);
    let before = resident_bytes();
    for cookie in 0..100 {
        client.request(cmd::READ, 0, cookie, 0, 64 << 20, b"");
    }
    let mut first = [0; 16];
    client.stream.read_exact(&mut first).expect("the first reply begins");
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 200 * MIB, "{grown} bytes more");
}
