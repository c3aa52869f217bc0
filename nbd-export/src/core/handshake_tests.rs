//! Every option, every refusal, cut at every byte.

use super::*;
use crate::core::option_reply::transmission_flags;
use crate::core::wire::{option as opt, option_reply as rep};

fn demo() -> ExportInfo {
    ExportInfo {
        name: "demo".into(),
        description: "a volume".into(),
        size_bytes: 1 << 30,
        read_only: false,
        block_preferred: 4096,
        multi_conn: true,
        fast_zero: true,
    }
}

/// The exports of these tests: `demo` (also as the default), `busy`, nothing else.
fn answer(ask: &Ask) -> Answer {
    match ask {
        Ask::List => Answer::List(Ok(vec![Listed { name: "demo".into(), description: "a volume".into() }])),
        Ask::Info(name) | Ask::Open(name) if name.is_empty() || name == "demo" => Answer::Export(Ok(demo())),
        Ask::Open(name) if name == "busy" => Answer::Export(Err(OpenError::Busy("held by n2".into()))),
        Ask::Info(name) if name == "busy" => Answer::Export(Ok(demo())),
        Ask::Info(_) | Ask::Open(_) => Answer::Export(Err(OpenError::NotFound("no such volume".into()))),
    }
}

fn flags(bits: u32) -> Vec<u8> {
    bits.to_be_bytes().to_vec()
}

fn opt(number: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = wire::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(payload.len()).expect("short").to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn text(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).expect("short").to_be_bytes()[..], text.as_bytes()].concat()
}

fn go(number: u32, name: &str, infos: &[u16]) -> Vec<u8> {
    let infos: Vec<u8> = infos.iter().flat_map(|info| info.to_be_bytes()).collect();
    let count = u16::try_from(infos.len() / 2).expect("few").to_be_bytes();
    opt(number, &[&text(name)[..], &count, &infos].concat())
}

fn meta(number: u32, name: &str, query: &str) -> Vec<u8> {
    opt(number, &[&text(name)[..], &1u32.to_be_bytes(), &text(query)].concat())
}

/// Runs a whole conversation; gives what the server sent after its greeting and how it ended, the opened names.
fn run(input: &[u8], piece_bytes: usize) -> (Vec<u8>, Progress, Vec<String>) {
    let mut out = Vec::new();
    let mut machine = Handshake::new(&mut out);
    assert_eq!(out.len(), 18);
    out.clear();
    let (mut arrived, mut opened) = (Vec::new(), Vec::new());
    for piece in input.chunks(piece_bytes) {
        arrived.extend_from_slice(piece);
        let mut rest = &arrived[..];
        let mut progress = machine.advance(&mut rest, &mut out);
        while let Progress::Ask(ask) = &progress {
            if let Ask::Open(name) = ask {
                opened.push(name.clone());
            }
            progress = machine.answer(answer(ask), &mut out);
            if progress == Progress::NeedInput {
                progress = machine.advance(&mut rest, &mut out);
            }
        }
        if progress != Progress::NeedInput {
            return (out, progress, opened);
        }
        arrived = rest.to_vec();
    }
    (out, Progress::NeedInput, opened)
}

/// The option replies in `out`, up to the answer to EXPORT_NAME, which is none: option, kind, data.
fn replies(mut out: &[u8]) -> Vec<(u32, u32, &[u8])> {
    let mut replies = Vec::new();
    while out.starts_with(&wire::OPTION_REPLY_MAGIC.to_be_bytes()) {
        let field = |at: usize| u32::from_be_bytes(out[at..at + 4].try_into().expect("four bytes"));
        let (reply, rest) = out.split_at(20 + field(16) as usize);
        replies.push((field(8), field(12), &reply[20..]));
        out = rest;
    }
    assert!(matches!(out.len(), 0 | 10 | 134), "left over: {out:?}");
    replies
}

fn kinds(out: &[u8]) -> Vec<(u32, u32)> {
    replies(out).into_iter().map(|(option, kind, _)| (option, kind)).collect()
}

fn conversation(parts: &[Vec<u8>]) -> (Vec<(u32, u32)>, Progress, Vec<String>) {
    let input = [flags(3), parts.concat()].concat();
    let whole = run(&input, input.len());
    for piece_bytes in [1, 3, 17] {
        assert_eq!(run(&input, piece_bytes), whole, "cut into pieces of {piece_bytes}");
    }
    (kinds(&whole.0), whole.1, whole.2)
}

fn terms(end: &Progress) -> Terms {
    match end {
        Progress::Attached(terms) => *terms,
        other => panic!("not attached: {other:?}"),
    }
}

#[test]
fn go_describes_and_attaches() {
    let (kinds, end, opened) = conversation(&[go(opt::GO, "demo", &[1, 2, 3])]);
    assert_eq!(kinds, [(7, rep::INFO), (7, rep::INFO), (7, rep::INFO), (7, rep::INFO), (7, rep::ACK)]);
    let expected = Terms {
        size_bytes: 1 << 30,
        read_only: false,
        structured: false,
        base_allocation: false,
        fast_zero: true,
    };
    assert_eq!(terms(&end), expected);
    assert_eq!(opened, ["demo"]);
}

#[test]
fn info_tells_the_same_and_attaches_nothing() {
    let (info, end, opened) = conversation(&[go(opt::INFO, "demo", &[3]), go(opt::INFO, "busy", &[])]);
    assert_eq!(info, [(6, rep::INFO), (6, rep::INFO), (6, rep::ACK), (6, rep::INFO), (6, rep::ACK)]);
    assert_eq!(end, Progress::NeedInput);
    assert!(opened.is_empty());
    let said = |number| {
        let (out, ..) = run(&[flags(3), go(number, "", &[1, 2, 3])].concat(), 4096);
        replies(&out).into_iter().map(|(_, kind, data)| (kind, data.to_vec())).collect::<Vec<_>>()
    };
    assert_eq!(said(opt::INFO), said(opt::GO));
}

#[test]
fn refusals_leave_the_negotiation_open() {
    let parts = [
        go(opt::GO, "busy", &[]),
        go(opt::GO, "none", &[]),
        go(opt::INFO, "none", &[]),
        go(opt::GO, "", &[]),
    ];
    let (kinds, end, opened) = conversation(&parts);
    assert_eq!(kinds[..3], [(7, rep::ERR_POLICY), (7, rep::ERR_UNKNOWN), (6, rep::ERR_UNKNOWN)]);
    assert_eq!(kinds.last(), Some(&(7, rep::ACK)));
    terms(&end);
    assert_eq!(opened, ["busy", "none", ""]);
    let (out, ..) = run(&[flags(3), go(opt::GO, "busy", &[])].concat(), 4096);
    assert!(out.ends_with(b"held by n2"), "the holder is named");
}

#[test]
fn export_name_attaches_or_closes() {
    let (out, end, _) = run(&[flags(3), opt(opt::EXPORT_NAME, b"demo")].concat(), 4096);
    assert_eq!((out.len(), terms(&end).structured), (10, false));
    let (out, ..) = run(&[flags(1), opt(opt::EXPORT_NAME, b"demo")].concat(), 4096);
    assert_eq!(out.len(), 134);
    assert!(out[10..].iter().all(|&byte| byte == 0), "124 zeros unless the client said NO_ZEROES");
    let (out, end, _) = run(&[flags(3), opt(opt::EXPORT_NAME, b"none")].concat(), 4096);
    assert!(out.is_empty() && matches!(end, Progress::Close(Close::NotGiven(_))));
}

#[test]
fn a_client_without_fixed_newstyle_may_only_name_an_export() {
    assert!(matches!(run(&[flags(0), opt(opt::EXPORT_NAME, b"")].concat(), 99).1, Progress::Attached(_)));
    for number in [2, 3, 6, 7, 8, 9, 10, 77] {
        let end = run(&[flags(0), opt(number, b"")].concat(), 99).1;
        assert!(matches!(end, Progress::Close(Close::Violation(_))), "option {number}");
    }
}

#[test]
fn abort_is_acknowledged_whatever_comes_with_it() {
    let (kinds, end, _) = conversation(&[opt(opt::ABORT, b"junk")]);
    assert_eq!(kinds, [(2, rep::ACK)]);
    assert_eq!(end, Progress::Close(Close::Aborted));
}

#[test]
fn list_shows_names_with_descriptions() {
    let (out, ..) = run(&[flags(3), opt(opt::LIST, b"")].concat(), 4096);
    assert_eq!(kinds(&out), [(3, rep::SERVER), (3, rep::ACK)]);
    assert_eq!(&out[20..36], b"\0\0\0\x04demoa volume");
    assert_eq!(conversation(&[opt(opt::LIST, b"x")]).0, [(3, rep::ERR_INVALID)]);
}

#[test]
fn contexts_need_structured_replies_and_the_same_name() {
    let set = |name: &str| meta(opt::SET_META_CONTEXT, name, "base:allocation");
    let structured = || opt(opt::STRUCTURED_REPLY, b"");
    let bound = |parts: &[Vec<u8>]| terms(&conversation(parts).1).base_allocation;
    assert!(bound(&[structured(), set("demo"), go(opt::GO, "demo", &[])]));
    assert!(bound(&[structured(), set(""), opt(opt::EXPORT_NAME, b"")]));
    assert!(!bound(&[structured(), set("demo"), go(opt::GO, "", &[])]), "bound to the name");
    assert!(
        !bound(&[set("demo"), structured(), go(opt::GO, "demo", &[])]),
        "refused before structured replies"
    );
    assert!(
        !bound(&[structured(), set("demo"), set("none"), go(opt::GO, "demo", &[])]),
        "replaced, also by a failure"
    );
    let malformed = meta(opt::SET_META_CONTEXT, "demo", "no namespace");
    assert!(!bound(&[structured(), set("demo"), malformed, go(opt::GO, "demo", &[])]));
    let nothing = meta(opt::SET_META_CONTEXT, "demo", "x:y");
    assert!(!bound(&[structured(), set("demo"), nothing, go(opt::GO, "demo", &[])]));
}

#[test]
fn contexts_are_listed_and_set_with_replies() {
    let list = meta(opt::LIST_META_CONTEXT, "demo", "base:");
    let parts = [
        opt(opt::STRUCTURED_REPLY, b""),
        list,
        meta(opt::LIST_META_CONTEXT, "demo", "qemu:"),
        meta(opt::SET_META_CONTEXT, "demo", "base:allocation"),
        meta(opt::SET_META_CONTEXT, "none", "base:allocation"),
    ];
    let expected = [
        (8, rep::ACK),
        (9, rep::META_CONTEXT),
        (9, rep::ACK),
        (9, rep::ACK),
        (10, rep::META_CONTEXT),
        (10, rep::ACK),
        (10, rep::ERR_UNKNOWN),
    ];
    assert_eq!(conversation(&parts).0, expected);
}

#[test]
fn unknown_options_are_skipped_with_their_payload() {
    let junk = [0xffu8; 5000];
    let parts = [opt(4, &junk), opt(5, b""), opt(11, &junk), opt(u32::MAX, &junk), go(opt::GO, "demo", &[])];
    let (kinds, end, _) = conversation(&parts);
    assert_eq!(
        kinds[..4],
        [(4, rep::ERR_UNSUP), (5, rep::ERR_UNSUP), (11, rep::ERR_UNSUP), (u32::MAX, rep::ERR_UNSUP)]
    );
    terms(&end);
}

#[test]
fn overlong_options_are_skipped_or_close() {
    let long = vec![b'a'; 9000];
    let (kinds, end, _) = conversation(&[opt(opt::GO, &long), opt(99, &long), go(opt::GO, "demo", &[])]);
    assert_eq!(kinds[..2], [(7, rep::ERR_TOO_BIG), (99, rep::ERR_UNSUP)]);
    terms(&end);
    for number in [opt::EXPORT_NAME, opt::GO, 77] {
        let mut endless = opt(number, b"");
        endless[12..].copy_from_slice(&u32::MAX.to_be_bytes());
        let end = conversation(&[endless]).1;
        assert_eq!(end, Progress::Close(Close::Violation("too many bytes")));
    }
    assert!(matches!(conversation(&[opt(opt::EXPORT_NAME, &long)]).1, Progress::Close(Close::Violation(_))));
}

#[test]
fn the_number_of_options_is_bounded() {
    let many: Vec<_> = (0..=OPTIONS_MAX).map(|_| opt(77, b"")).collect();
    let (out, end, _) = run(&[flags(3), many.concat()].concat(), 1 << 20);
    assert_eq!(end, Progress::Close(Close::Violation("too many options")));
    assert_eq!(kinds(&out).len(), OPTIONS_MAX as usize);
}

#[test]
fn what_is_not_negotiation_closes() {
    for bad in [4, 1 << 16, u32::MAX] {
        assert_eq!(run(&flags(bad), 4).1, Progress::Close(Close::Violation("unknown client flags")));
    }
    let http = [flags(3), b"GET / HTTP/1.0\r\n\r\n".to_vec()].concat();
    assert_eq!(run(&http, 99).1, Progress::Close(Close::Violation("an option without its magic")));
}

#[test]
fn flags_tell_what_is_true() {
    use wire::transmission_flag as flag;
    let plain = transmission_flags(&ExportInfo { multi_conn: false, fast_zero: false, ..demo() }, false);
    assert_eq!(plain & (flag::CAN_MULTI_CONN | flag::SEND_FAST_ZERO | flag::SEND_DF | flag::READ_ONLY), 0);
    let frozen = transmission_flags(&ExportInfo { read_only: true, ..demo() }, true);
    assert_eq!(frozen & (flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO), 0);
    assert_eq!(frozen & (flag::READ_ONLY | flag::SEND_DF | flag::CAN_MULTI_CONN), 0x182);
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes: Vec<u8>, number in 0u32..13, payload: Vec<u8>, fixed: bool) {
        run(&bytes, 7);
        run(&[flags(u32::from(fixed)), opt(number, &payload), bytes].concat(), 64);
    }
}
