//! A raw client: blocking, and free to break every rule.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use csnap_nbd_export::core::request::Header;
use csnap_nbd_export::core::wire::{self, chunk, option, option_reply};

/// A reply to a request, put together from its chunks.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    pub errno: u32,
    pub message: String,
    /// Data by offset; simple replies have no offset.
    pub data: Vec<(u64, Vec<u8>)>,
    /// Length and flags.
    pub extents: Vec<(u32, u32)>,
}

impl Reply {
    /// All data, which must be contiguous.
    pub fn bytes(&self) -> Vec<u8> {
        let mut data = self.data.clone();
        data.sort_by_key(|(offset, _)| *offset);
        data.into_iter().flat_map(|(_, data)| data).collect()
    }
}

pub struct Client {
    pub stream: UnixStream,
    pub structured: bool,
    /// Length of the simple reads in flight, by cookie.
    reads: std::collections::BTreeMap<u64, usize>,
    partial: std::collections::BTreeMap<u64, Reply>,
}

pub fn option_bytes(number: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = wire::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(payload.len()).expect("short").to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn text(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).expect("short").to_be_bytes()[..], text.as_bytes()].concat()
}

pub fn go_bytes(name: &str) -> Vec<u8> {
    option_bytes(option::GO, &[&text(name)[..], &[0, 0]].concat())
}

impl Client {
    /// Connects and reads the greeting.
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("connects");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("settable");
        let mut client =
            Self { stream, structured: false, reads: Default::default(), partial: Default::default() };
        let greeting: [u8; 18] = client.take().expect("a greeting");
        assert_eq!(&greeting[..8], b"NBDMAGIC");
        client
    }

    /// Attaches `name`, with structured replies and `base:allocation` or neither.
    pub fn attach(socket: &Path, name: &str, structured: bool) -> Self {
        let mut client = Self::connect(socket);
        client.send(&3u32.to_be_bytes());
        if structured {
            client.send(&option_bytes(option::STRUCTURED_REPLY, b""));
            assert_eq!(client.option_reply().1, option_reply::ACK);
            let query = [&text(name)[..], &1u32.to_be_bytes(), &text("base:allocation")].concat();
            client.send(&option_bytes(option::SET_META_CONTEXT, &query));
            assert_eq!(client.option_reply().1, option_reply::META_CONTEXT);
            assert_eq!(client.option_reply().1, option_reply::ACK);
            client.structured = true;
        }
        client.send(&go_bytes(name));
        while client.option_reply().1 != option_reply::ACK {}
        client
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the server reads");
    }

    pub fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn take_vec(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Option, kind and data of the next reply to an option.
    pub fn option_reply(&mut self) -> (u32, u32, Vec<u8>) {
        let header: [u8; 20] = self.take().expect("a reply to an option");
        assert_eq!(header[..8], wire::OPTION_REPLY_MAGIC.to_be_bytes());
        let field = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let data = self.take_vec(field(16) as usize).expect("its data");
        (field(8), field(12), data)
    }

    /// Sends a request with its payload.
    pub fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, len: u32, payload: &[u8]) {
        if command == wire::command::READ {
            self.reads.insert(cookie, len as usize);
        }
        let header = Header { flags, command, cookie, offset, len };
        self.send(&[&header.encode()[..], payload].concat());
    }

    /// The next complete reply.
    pub fn reply(&mut self) -> io::Result<Reply> {
        loop {
            let magic = u32::from_be_bytes(self.take()?);
            if magic == wire::SIMPLE_REPLY_MAGIC {
                return self.simple();
            }
            assert_eq!(magic, wire::CHUNK_MAGIC);
            assert!(self.structured, "only simple replies unless negotiated otherwise");
            if let Some(reply) = self.chunk()? {
                return Ok(reply);
            }
        }
    }

    fn simple(&mut self) -> io::Result<Reply> {
        let errno = u32::from_be_bytes(self.take()?);
        let cookie = u64::from_be_bytes(self.take()?);
        let read = self.reads.remove(&cookie);
        let tells_nothing = read.is_none() && errno == 0;
        assert!(tells_nothing || !self.structured, "data and errors are structured once that is negotiated");
        let len = read.filter(|_| errno == 0);
        let data = len.map(|len| self.take_vec(len)).transpose()?.map(|data| (0, data));
        Ok(Reply { cookie, errno, data: data.into_iter().collect(), ..Reply::default() })
    }

    fn chunk(&mut self) -> io::Result<Option<Reply>> {
        let flags = u16::from_be_bytes(self.take()?);
        let kind = u16::from_be_bytes(self.take()?);
        let cookie = u64::from_be_bytes(self.take()?);
        let len = u32::from_be_bytes(self.take()?) as usize;
        let body = self.take_vec(len)?;
        let reply = self.partial.entry(cookie).or_insert_with(|| Reply { cookie, ..Reply::default() });
        let u32_at = |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().expect("four bytes"));
        match kind {
            chunk::NONE => {
                assert!(body.is_empty() && flags == chunk::DONE && self.reads.contains_key(&cookie));
            }
            chunk::OFFSET_DATA => {
                assert!(len > 8, "a data chunk has data");
                let offset = u64::from_be_bytes(body[..8].try_into().expect("eight bytes"));
                reply.data.push((offset, body[8..].to_vec()));
            }
            chunk::BLOCK_STATUS => {
                assert!(len > 4 && (len - 4).is_multiple_of(8));
                reply.extents = (4..len).step_by(8).map(|at| (u32_at(at), u32_at(at + 4))).collect();
            }
            chunk::ERROR => {
                reply.errno = u32_at(0);
                assert_eq!(usize::from(u16::from_be_bytes([body[4], body[5]])), len - 6);
                reply.message = String::from_utf8(body[6..].to_vec()).expect("UTF-8");
            }
            other => panic!("unknown chunk {other}"),
        }
        if flags & chunk::DONE == 0 {
            return Ok(None);
        }
        self.reads.remove(&cookie);
        Ok(self.partial.remove(&cookie))
    }

    /// Whether the server has closed the connection (it may have sent things before).
    pub fn is_closed(&mut self) -> bool {
        match self.stream.read_to_end(&mut Vec::new()) {
            Ok(_) => true,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}
