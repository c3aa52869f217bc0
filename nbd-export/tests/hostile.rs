//! Clients that break the rules: the connection is closed or the request refused, nothing panics, and a good client does
//! not notice. (What they can make the server hold: `bounded.rs`.)

mod support;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use csnap_nbd_export::core::limits::{HANDSHAKE_TIME_MAX, OPTIONS_MAX};
use csnap_nbd_export::core::request::Header;
use csnap_nbd_export::core::wire::{self, command as cmd, option_reply};
use csnap_nbd_export::shell::serve::serve_one;
use support::client::{Client, go_bytes, option_bytes};
use support::{MemoryExports, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::Instant;

const MIB: usize = 1 << 20;

fn start() -> (Arc<MemoryExports>, Server) {
    let exports = MemoryExports::new(4 * MIB);
    let server = Server::start(Arc::clone(&exports));
    (exports, server)
}

/// A good client still gets its answer.
fn check_alive(server: &Server) {
    let mut client = Client::attach(&server.socket, "mem", true);
    client.request(cmd::READ, 0, 1, 0, 4096, b"");
    assert_eq!(client.reply().expect("an answer").errno, 0);
}

#[test]
fn what_is_not_nbd_is_closed() {
    let (_exports, server) = start();
    let mut endless = option_bytes(7, b"");
    endless[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    let flags = 3u32.to_be_bytes();
    let openings: [Vec<u8>; 6] = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        0xffff_ffffu32.to_be_bytes().to_vec(),
        [&flags[..], &[0x55; 64]].concat(),
        [&flags[..], &endless].concat(),
        [&0u32.to_be_bytes()[..], &go_bytes("mem")].concat(),
        [&flags[..], &option_bytes(1, &[0xff, 0xfe])].concat(),
    ];
    for opening in openings {
        let mut client = Client::connect(&server.socket);
        client.send(&opening);
        assert!(client.is_closed(), "{opening:?}");
    }
    check_alive(&server);
}

#[test]
fn a_busy_export_names_its_holder_and_the_negotiation_goes_on() {
    let (exports, server) = start();
    let mut client = Client::connect(&server.socket);
    client.send(&[&3u32.to_be_bytes()[..], &go_bytes("busy"), &go_bytes("none"), &go_bytes("mem")].concat());
    let (_, kind, text) = client.option_reply();
    assert_eq!(kind, option_reply::ERR_POLICY);
    assert!(String::from_utf8_lossy(&text).contains("node n2"));
    assert_eq!(client.option_reply().1, option_reply::ERR_UNKNOWN);
    assert_eq!(client.option_reply().1, option_reply::INFO);
    assert_eq!(client.option_reply().1, option_reply::ACK);
    drop(client);
    exports.wait_released();
    assert_eq!(exports.opened.load(SeqCst), 1);
}

#[test]
fn thousands_of_options_end_in_a_close() {
    let (_exports, server) = start();
    let mut client = Client::connect(&server.socket);
    client.send(&3u32.to_be_bytes());
    let flood = option_bytes(wire::option::LIST, b"").repeat(OPTIONS_MAX as usize + 10);
    let mut sender = client.stream.try_clone().expect("clones");
    // The server may close before it has read everything.
    let sending = std::thread::spawn(move || drop(sender.write_all(&flood)));
    assert!(client.is_closed());
    sending.join().expect("no panic");
    check_alive(&server);
}

#[test]
fn a_request_without_its_magic_closes_the_connection() {
    let (exports, server) = start();
    for structured in [false, true] {
        let mut client = Client::attach(&server.socket, "mem", structured);
        client.send(&[0x42; 28]);
        assert!(client.is_closed());
    }
    exports.wait_released();
    check_alive(&server);
}

#[test]
fn refused_writes_are_skipped_whatever_their_length() {
    let (_exports, server) = start();
    let mut client = Client::attach(&server.socket, "ro", true);
    let payload = vec![1; 80 * MIB];
    for len in [1, 4096, 300_000, 80 * MIB] {
        client.request(cmd::WRITE, 0, 1, 0, u32::try_from(len).expect("fits"), &payload[..len]);
        assert_eq!(client.reply().expect("an answer").errno, 1);
    }
    let mut client = Client::attach(&server.socket, "mem", false);
    client.request(cmd::WRITE, 0, 1, u64::MAX - 5, 100_000, &payload[..100_000]);
    assert_eq!(client.reply().expect("an answer").errno, 28);
    client.request(cmd::WRITE, 0x8000, 2, 0, 4096, &payload[..4096]);
    assert_eq!(client.reply().expect("an answer").errno, 22);
    client.request(cmd::READ, 0, 3, 0, 4096, b"");
    assert_eq!(client.reply().expect("an answer").errno, 0, "still in step");
}

#[test]
fn equal_cookies_are_the_clients_own_affair() {
    let (_exports, server) = start();
    let mut client = Client::attach(&server.socket, "mem", true);
    for _ in 0..100 {
        client.request(cmd::READ, 0, 7, 0, 512, b"");
    }
    for _ in 0..100 {
        assert_eq!(client.reply().expect("an answer").cookie, 7);
    }
}

#[test]
fn leaving_in_the_middle_of_a_write_writes_no_more_than_was_sent() {
    let (exports, server) = start();
    for sent in [0, 100, 4096, 300_000] {
        let mut client = Client::attach(&server.socket, "mem", true);
        client.request(cmd::WRITE, 0, 1, 0, 1 << 20, &vec![3; sent]);
        drop(client);
        exports.wait_released();
        assert_eq!(exports.memory.content(sent, MIB - sent), vec![0; MIB - sent]);
        exports.memory.bytes.lock().expect("no panic").fill(0);
    }
    check_alive(&server);
}

#[test]
fn leaving_drops_what_waits() {
    let (exports, server) = start();
    exports.memory.slow.store(true, SeqCst);
    exports.memory.held.store(true, SeqCst);
    let mut client = Client::attach(&server.socket, "mem", true);
    for cookie in 0..50 {
        client.request(cmd::READ, 0, cookie, 0, 4096, b"");
    }
    drop(client);
    exports.wait_released();
    exports.memory.held.store(false, SeqCst);
    check_alive(&server);
}

#[test]
fn a_client_that_leaves_while_its_export_is_being_opened_is_forgotten() {
    let (exports, server) = start();
    exports.stuck.store(true, SeqCst);
    let mut client = Client::connect(&server.socket);
    client.send(&[&3u32.to_be_bytes()[..], &go_bytes("mem")].concat());
    client.stream.shutdown(std::net::Shutdown::Write).expect("half closes");
    assert!(client.is_closed());
    exports.stuck.store(false, SeqCst);
    check_alive(&server);
}

#[test]
fn idle_connections_keep_nobody_out() {
    let (_exports, server) = start();
    let idle: Vec<_> = (0..400).map(|_| Client::connect(&server.socket)).collect();
    check_alive(&server);
    drop(idle);
}

/// Runs the server for one connection in virtual time; gives the client's end.
fn in_virtual_time(exports: Arc<MemoryExports>) -> (tokio::io::DuplexStream, watch::Sender<bool>) {
    with_socket_buffer(exports, 1 << 16)
}

/// The same, with room for so many bytes that the client leaves unread.
fn with_socket_buffer(
    exports: Arc<MemoryExports>,
    buffer_bytes: usize,
) -> (tokio::io::DuplexStream, watch::Sender<bool>) {
    let (client, server) = tokio::io::duplex(buffer_bytes);
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move { serve_one(server, &*exports, stopped).await });
    (client, stop)
}

#[tokio::test(start_paused = true)]
async fn a_slow_handshake_is_cut_off_in_time() {
    for pause in [Duration::from_secs(60), Duration::from_secs(1)] {
        let (mut client, _stop) = in_virtual_time(MemoryExports::new(MIB));
        let begun = Instant::now();
        let mut greeting = [0; 18];
        client.read_exact(&mut greeting).await.expect("a greeting");
        client.write_all(&3u32.to_be_bytes()).await.expect("sends");
        // A byte at a time, each well before any idle limit would strike.
        let mut bytes = option_bytes(77, &[0; 4096]).into_iter();
        let mut closed = [0];
        loop {
            tokio::select! {
                read = client.read(&mut closed) => break assert_eq!(read.expect("no error"), 0),
                () = tokio::time::sleep(pause) => drop(client.write_all(&[bytes.next().expect("long enough")]).await),
            }
        }
        let took = begun.elapsed();
        assert!(
            took >= HANDSHAKE_TIME_MAX && took <= HANDSHAKE_TIME_MAX + Duration::from_secs(1),
            "{took:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn the_time_that_the_export_takes_is_not_the_clients() {
    let exports = MemoryExports::new(MIB);
    exports.stuck.store(true, SeqCst);
    let (mut client, _stop) = in_virtual_time(Arc::clone(&exports));
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).await.expect("a greeting");
    client.write_all(&[&3u32.to_be_bytes()[..], &go_bytes("mem")].concat()).await.expect("sends");
    let nothing = tokio::time::timeout(10 * HANDSHAKE_TIME_MAX, client.read_u8()).await;
    assert!(nothing.is_err(), "it waits with the client");
}

#[tokio::test(start_paused = true)]
async fn an_attached_client_may_be_silent_for_ever() {
    let (mut client, _stop) = in_virtual_time(MemoryExports::new(MIB));
    let mut bytes = vec![0; 18];
    client.read_exact(&mut bytes).await.expect("a greeting");
    client.write_all(&[&3u32.to_be_bytes()[..], &option_bytes(1, b"mem")].concat()).await.expect("sends");
    bytes.resize(10, 0);
    client.read_exact(&mut bytes).await.expect("attached");
    tokio::time::sleep(Duration::from_secs(86_400)).await;
    let flush = Header { flags: 0, command: cmd::FLUSH, cookie: 1, offset: 0, len: 0 };
    client.write_all(&flush.encode()).await.expect("sends");
    bytes.resize(16, 0);
    client.read_exact(&mut bytes).await.expect("still there");
}

#[tokio::test(start_paused = true)]
async fn a_drain_that_cannot_end_is_left_behind() {
    let exports = MemoryExports::new(MIB);
    exports.memory.held.store(true, SeqCst);
    let (mut client, _stop) = in_virtual_time(Arc::clone(&exports));
    let mut bytes = vec![0; 18];
    client.read_exact(&mut bytes).await.expect("a greeting");
    client.write_all(&[&3u32.to_be_bytes()[..], &option_bytes(1, b"mem")].concat()).await.expect("sends");
    for command in [cmd::FLUSH, cmd::DISC] {
        let request = Header { flags: 0, command, cookie: 1, offset: 0, len: 0 };
        client.write_all(&request.encode()).await.expect("sends");
    }
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.expect("closed");
    assert_eq!(rest.len(), 10, "attached, and no answer to the flush");
    assert_eq!(exports.released.load(SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn an_export_is_given_back_when_its_client_never_learns_of_it() {
    let exports = MemoryExports::new(MIB);
    let (mut client, _stop) = with_socket_buffer(Arc::clone(&exports), 64);
    // The answer to GO does not fit beside the greeting, and nobody reads either.
    client.write_all(&[&3u32.to_be_bytes()[..], &go_bytes("mem")].concat()).await.expect("sends");
    tokio::time::sleep(2 * HANDSHAKE_TIME_MAX).await;
    assert_eq!((exports.opened.load(SeqCst), exports.released.load(SeqCst)), (1, 1));
}
