//! Requests and replies of attached clients: what is answered, in what order, and what never waits for what.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use csnap_nbd_export::core::wire::{command as cmd, command_flag as flag};
use support::client::Client;
use support::{MemoryExports, Server, wait_until};

const MIB: usize = 1 << 20;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;

fn start() -> (Arc<MemoryExports>, Server) {
    let exports = MemoryExports::new(64 * MIB);
    let server = Server::start(Arc::clone(&exports));
    (exports, server)
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let byte = |at: usize| u8::try_from((at / 512 + at * 31) % 251).expect("below 251") ^ seed;
    (0..len).map(byte).collect()
}

fn len_of(data: &[u8]) -> u32 {
    u32::try_from(data.len()).expect("short")
}

#[test]
fn data_comes_back_at_every_size_speed_and_kind_of_reply() {
    let (exports, server) = start();
    for structured in [false, true] {
        for slow in [false, true] {
            exports.memory.slow.store(slow, SeqCst);
            let mut client = Client::attach(&server.socket, "mem", structured);
            for (cookie, (offset, len)) in [
                (0, 1),
                (1, 511),
                (513, 4096),
                (4095, 262_144),
                (70_001, 262_145),
                (3, MIB + 1),
                (777, 5 * MIB + 13),
            ]
            .into_iter()
            .enumerate()
            {
                let (data, cookie) = (pattern(len, u8::from(slow)), cookie as u64);
                client.request(cmd::WRITE, 0, cookie, offset, len_of(&data), &data);
                let reply = client.reply().expect("an answer");
                assert_eq!((reply.cookie, reply.errno), (cookie, 0), "write of {len}");
                let start = usize::try_from(offset).expect("small");
                assert!(exports.memory.content(start, len) == data, "write of {len}, slow {slow}");
                client.request(cmd::READ, 0, cookie + 100, offset, len_of(&data), b"");
                let reply = client.reply().expect("an answer");
                assert_eq!((reply.cookie, reply.errno), (cookie + 100, 0), "read of {len}");
                assert!(reply.bytes() == data, "read of {len}, structured {structured}, slow {slow}");
            }
        }
    }
    exports.wait_released();
}

#[test]
fn do_not_fragment_gives_one_chunk() {
    let (exports, server) = start();
    let mut client = Client::attach(&server.socket, "mem", true);
    for slow in [false, true] {
        exports.memory.slow.store(slow, SeqCst);
        for len in [4096, 2 << 20] {
            client.request(cmd::READ, flag::DF, 1, 0, len, b"");
            let reply = client.reply().expect("an answer");
            assert_eq!(reply.data.len(), 1);
            assert_eq!(reply.bytes().len(), len as usize);
        }
    }
}

#[test]
fn a_request_that_waits_holds_up_no_other() {
    let (exports, server) = start();
    let memory = &exports.memory;
    let mut client = Client::attach(&server.socket, "mem", true);
    memory.slow.store(true, SeqCst);
    memory.held.store(true, SeqCst);
    client.request(cmd::READ, 0, 1, 0, 4096, b"");
    client.request(cmd::WRITE, 0, 2, 8192, 4096, &[7; 4096]);
    client.request(cmd::FLUSH, 0, 3, 0, 0, b"");
    wait_until("all three have begun", || memory.begun.load(SeqCst) == 3);
    memory.slow.store(false, SeqCst);
    for cookie in 10..200 {
        client.request(cmd::READ, 0, cookie, 0, 4096, b"");
        assert_eq!(client.reply().expect("an answer").cookie, cookie);
    }
    memory.permits.add_permits(3);
    let mut late: Vec<u64> = (0..3).map(|_| client.reply().expect("an answer").cookie).collect();
    late.sort_unstable();
    assert_eq!(late, [1, 2, 3]);
    assert_eq!(memory.content(8192, 4096), [7; 4096]);
}

#[test]
fn a_reply_larger_than_the_buffer_is_not_mixed_with_others() {
    let (exports, server) = start();
    let data = pattern(20 * MIB, 1);
    exports.memory.bytes.lock().expect("no panic")[..data.len()].copy_from_slice(&data);
    let mut client = Client::attach(&server.socket, "mem", false);
    exports.memory.slow.store(true, SeqCst);
    let lens = [20 << 20, 1, 4096, 5 << 20, 3, 2 << 20, 4096];
    for (cookie, len) in (0..).zip(lens) {
        client.request(cmd::READ, 0, cookie, 0, len, b"");
    }
    wait_until("the first has begun", || exports.memory.begun.load(SeqCst) > 0);
    exports.memory.slow.store(false, SeqCst);
    for _ in lens {
        let reply = client.reply().expect("an answer");
        let len = lens[usize::try_from(reply.cookie).expect("small")] as usize;
        assert!(reply.bytes() == data[..len], "{len} bytes");
    }
}

#[test]
fn the_parts_of_a_large_write_are_one_reply() {
    let (exports, server) = start();
    let memory = &exports.memory;
    let mut client = Client::attach(&server.socket, "mem", false);
    let data = pattern(4 * MIB, 3);
    memory.slow.store(true, SeqCst);
    memory.held.store(true, SeqCst);
    client.request(cmd::WRITE, 0, 1, 5, len_of(&data), &data);
    wait_until("parts wait", || memory.begun.load(SeqCst) >= 4);
    memory.slow.store(false, SeqCst);
    client.request(cmd::READ, 0, 2, 0, 1, b"");
    assert_eq!(client.reply().expect("an answer").cookie, 2, "the write is not answered while a part waits");
    memory.permits.add_permits(1000);
    assert_eq!(client.reply().expect("an answer").cookie, 1);
    assert!(memory.content(5, data.len()) == data);
}

#[test]
fn a_failing_part_fails_the_write_and_the_stream_stays_in_step() {
    let (exports, server) = start();
    for structured in [false, true] {
        for slow in [false, true] {
            exports.memory.slow.store(slow, SeqCst);
            exports.memory.full.store(true, SeqCst);
            let mut client = Client::attach(&server.socket, "mem", structured);
            let data = pattern(3 * MIB, 9);
            for (cookie, len) in [(1, 4096), (2, 3 * MIB)] {
                client.request(
                    cmd::WRITE,
                    flag::FUA,
                    cookie,
                    0,
                    u32::try_from(len).expect("small"),
                    &data[..len],
                );
                let reply = client.reply().expect("an answer");
                assert_eq!((reply.cookie, reply.errno), (cookie, ENOSPC));
                assert_eq!(reply.message, if structured { "the pool is full" } else { "" });
            }
            exports.memory.full.store(false, SeqCst);
            client.request(cmd::WRITE, 0, 3, 0, 4096, &data[..4096]);
            assert_eq!(client.reply().expect("an answer").errno, 0);
        }
    }
    assert_eq!(exports.memory.flushes.load(SeqCst), 0, "nothing to make durable");
}

#[test]
fn failures_of_the_export_reach_the_client() {
    let (exports, server) = start();
    for structured in [false, true] {
        let mut client = Client::attach(&server.socket, "mem", structured);
        exports.memory.broken.store(true, SeqCst);
        for slow in [false, true] {
            exports.memory.slow.store(slow, SeqCst);
            for (command, len) in
                [(cmd::READ, 4096), (cmd::READ, 3 << 20), (cmd::FLUSH, 0), (cmd::TRIM, 4096)]
            {
                client.request(command, 0, 1, 0, len, b"");
                let reply = client.reply().expect("an answer");
                assert_eq!((reply.errno, reply.bytes().len()), (EIO, 0), "command {command}");
            }
        }
        exports.memory.broken.store(false, SeqCst);
    }
}

#[test]
fn fua_flushes_before_the_reply() {
    let (exports, server) = start();
    let flushes = || exports.memory.flushes.load(SeqCst);
    let mut client = Client::attach(&server.socket, "mem", true);
    for slow in [false, true] {
        exports.memory.slow.store(slow, SeqCst);
        for (command, len) in [
            (cmd::WRITE, 512),
            (cmd::WRITE, MIB),
            (cmd::TRIM, 512),
            (cmd::WRITE_ZEROES, 512),
            (cmd::CACHE, 512),
        ] {
            let before = flushes();
            let payload = if command == cmd::WRITE { vec![1; len] } else { Vec::new() };
            client.request(command, flag::FUA, 1, 0, u32::try_from(len).expect("small"), &payload);
            assert_eq!(client.reply().expect("an answer").errno, 0);
            assert_eq!(flushes(), before + 1, "command {command}, {len} bytes, slow {slow}");
        }
        let before = flushes();
        client.request(cmd::READ, flag::FUA, 1, 0, 512, b"");
        assert_eq!(
            (client.reply().expect("an answer").errno, flushes()),
            (0, before),
            "nothing to make durable"
        );
    }
}

#[test]
fn trims_and_zeroes_of_any_length_are_passed_on_whole() {
    let (exports, server) = start();
    let mut client = Client::attach(&server.socket, "huge", true);
    for (command, flags) in [
        (cmd::TRIM, 0),
        (cmd::WRITE_ZEROES, 0),
        (cmd::WRITE_ZEROES, flag::NO_HOLE),
        (cmd::WRITE_ZEROES, flag::FAST_ZERO),
        (cmd::CACHE, 0),
    ] {
        client.request(command, flags, 1, 512, 0xffff_f000, b"");
        let expected = if flags == flag::FAST_ZERO { ENOTSUP } else { 0 };
        assert_eq!(client.reply().expect("an answer").errno, expected);
    }
    let changes = exports.memory.changes.lock().expect("no panic").clone();
    let how: Vec<_> =
        changes.iter().map(|(_, _, how)| how.map(|how| (how.may_punch, how.fast_only))).collect();
    assert_eq!(how, [None, Some((true, false)), Some((false, false)), Some((true, true))]);
    assert!(changes.iter().all(|&(offset, len, _)| (offset, len) == (512, 0xffff_f000)));
}

#[test]
fn block_status_is_bounded_and_obeys_req_one() {
    let (_exports, server) = start();
    let mut client = Client::attach(&server.socket, "huge", true);
    client.request(cmd::BLOCK_STATUS, flag::REQ_ONE, 1, 0, 1 << 30, b"");
    assert_eq!(client.reply().expect("an answer").extents, [(4096, 0)]);
    client.request(cmd::BLOCK_STATUS, 0, 1, 0, 10000, b"");
    assert_eq!(client.reply().expect("an answer").extents, [(4096, 0), (4096, 3), (1808, 0)]);
    client.request(cmd::BLOCK_STATUS, 0, 1, 0, u32::MAX, b"");
    assert_eq!(client.reply().expect("an answer").extents.len(), 4096);
    let mut deaf = Client::attach(&server.socket, "mem", false);
    deaf.request(cmd::BLOCK_STATUS, 0, 1, 0, 4096, b"");
    assert_eq!(deaf.reply().expect("an answer").errno, EINVAL);
}

#[test]
fn empty_requests_are_answered() {
    let (_exports, server) = start();
    for structured in [false, true] {
        let mut client = Client::attach(&server.socket, "mem", structured);
        for command in [cmd::READ, cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES, cmd::CACHE, cmd::FLUSH] {
            client.request(command, 0, 1, 0, 0, b"");
            let reply = client.reply().expect("an answer");
            assert_eq!((reply.errno, reply.bytes().len()), (0, 0), "command {command}");
        }
    }
}

#[test]
fn disc_finishes_what_is_in_flight() {
    let (exports, server) = start();
    let memory = &exports.memory;
    let mut client = Client::attach(&server.socket, "mem", true);
    memory.slow.store(true, SeqCst);
    memory.held.store(true, SeqCst);
    for cookie in 0..20 {
        client.request(cmd::WRITE, 0, cookie, cookie * 4096, 4096, &[9; 4096]);
    }
    client.request(cmd::DISC, 0, 99, 0, 0, b"");
    wait_until("all have begun", || memory.begun.load(SeqCst) == 20);
    memory.permits.add_permits(20);
    let mut cookies: Vec<u64> = (0..20).map(|_| client.reply().expect("an answer").cookie).collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..20).collect::<Vec<_>>());
    assert!(client.is_closed());
    assert_eq!(memory.content(0, 20 * 4096), vec![9; 20 * 4096]);
    exports.wait_released();
}

#[test]
fn a_shutdown_answers_what_was_accepted() {
    let (exports, mut server) = start();
    let memory = &exports.memory;
    let mut client = Client::attach(&server.socket, "mem", true);
    let mut idle = Client::attach(&server.socket, "mem", true);
    let mut greeted = Client::connect(&server.socket);
    memory.slow.store(true, SeqCst);
    memory.held.store(true, SeqCst);
    client.request(cmd::WRITE, 0, 1, 0, 4096, &[5; 4096]);
    wait_until("it has begun", || memory.begun.load(SeqCst) == 1);
    server.stop();
    assert!(idle.is_closed() && greeted.is_closed());
    memory.permits.add_permits(1);
    assert_eq!(client.reply().expect("an answer").errno, 0);
    assert!(client.is_closed());
    drop(server);
    exports.wait_released();
}

#[test]
fn a_flush_on_one_connection_covers_another() {
    let (exports, server) = start();
    let mut a = Client::attach(&server.socket, "mem", true);
    let mut b = Client::attach(&server.socket, "mem", false);
    a.request(cmd::WRITE, 0, 1, 0, 4096, &[8; 4096]);
    assert_eq!(a.reply().expect("an answer").errno, 0);
    b.request(cmd::READ, 0, 1, 0, 4096, b"");
    assert_eq!(b.reply().expect("an answer").bytes(), [8; 4096]);
    b.request(cmd::FLUSH, 0, 2, 0, 0, b"");
    assert_eq!(b.reply().expect("an answer").errno, 0);
    assert_eq!(exports.memory.flushes.load(SeqCst), 1);
    drop(a);
    b.request(cmd::READ, 0, 3, 0, 4096, b"");
    assert_eq!(b.reply().expect("losing one connection does not disturb the other").errno, 0);
}

#[test]
fn tcp_serves_the_same() {
    use std::io::{Read, Write};
    let (_exports, server) = start();
    let mut stream = std::net::TcpStream::connect(server.tcp).expect("connects");
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).expect("a greeting");
    stream.write_all(&[0, 0, 0, 3]).expect("sends");
    stream.write_all(&support::client::option_bytes(1, b"mem")).expect("sends");
    let mut answer = [0; 10];
    stream.read_exact(&mut answer).expect("size and flags");
    assert_eq!(u64::from_be_bytes(answer[..8].try_into().expect("eight bytes")), 64 * MIB as u64);
}
