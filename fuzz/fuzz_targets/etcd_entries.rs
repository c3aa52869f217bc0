//! Any bytes as what stands below csnap's prefix in etcd: read on a new connection, and then told by its watch.
#![no_main]

use csnap_agent::etcd::{Answer, Entry, Input, Key, MemberRecord, News, Session};
use csnap_proto::message::lock::ToLockd;
use csnap_proto::{EventNumber, Frame, Name, RequestId, Secret, SessionId, Term, Time};

const OWN: SessionId = SessionId([1; 16]);

/// Keys by turns, or names that are none: a byte that chooses, a byte that says how long the content is, the content.
fn entries(mut data: &[u8]) -> Vec<Entry> {
    let keys = [Key::Lock, Key::Term, Key::Value, Key::Member(SessionId([2; 16]))];
    let mut entries = Vec::new();
    while let [which, length, rest @ ..] = data {
        let (content, rest) = rest.split_at(rest.len().min(usize::from(*length)));
        data = rest;
        let key = keys.get(usize::from(which % 8)).map_or(content.to_vec(), |key| key.name().into_bytes());
        let written = 2 + entries.len() as i64;
        let value = (which & 0x80 == 0).then(|| content.to_vec());
        entries.push(Entry { key, value, created: written, written });
    }
    entries
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let (read, told) = data.split_at(data.len() / 2);
    let member = MemberRecord { node: Name::new("n1").expect("a name"), info: Vec::new() };
    let content = [&[1], postcard::to_stdvec(&member).expect("it encodes").as_slice()].concat();
    let own = Entry { key: Key::Member(OWN).name().into_bytes(), value: Some(content), created: 1, written: 1 };
    let resume = ToLockd::Resume { session: OWN, secret: Secret([1; 16]), last_event: EventNumber(0) };
    let frame = Frame { id: RequestId(1), term: Term(0), message: resume };
    let mut session = Session::new("the lock");
    let mut told = entries(told);
    told.iter_mut().for_each(|entry| entry.written += 1 << 20);
    for input in [
        Input::Connected,
        Input::Frame(frame),
        Input::Answer(Answer::Entries(1 << 20, [vec![own], entries(read)].concat())),
        Input::News(News::Changes(told)),
    ] {
        session.step(Time(1), input, &mut Vec::new());
    }
});
