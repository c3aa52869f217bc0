//! A small blocking NBD client of our own: it can do what proper clients cannot (leave requests unanswered, send
//! nonsense), and it measures the time between completions. Fixed newstyle, EXPORT_NAME or GO, simple replies.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;

/// Refused by policy: somebody else has it.
pub(crate) const ERR_POLICY: u32 = (1 << 31) + 2;

/// An answer that has not come by then never will: longer than any pause.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const FLUSH: u16 = 3;

/// A connection in transmission.
pub(crate) struct Nbd {
    stream: UnixStream,
    pub(crate) size_bytes: u64,
    last: u64,
}

/// A refused option: its code and message.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) code: u32,
    pub(crate) message: String,
}

impl Nbd {
    /// Connects and asks for an export with GO.
    pub(crate) fn open(socket: &Path, export: &str) -> Result<Self, Refused> {
        Self::try_open(socket, export).expect("the exporter listens, and answers")
    }

    /// As [`Nbd::open`], while the exporter may go.
    pub(crate) fn try_open(socket: &Path, export: &str) -> std::io::Result<Result<Self, Refused>> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(be64(&greeting[..8]), NBDMAGIC);
        assert_eq!(be64(&greeting[8..16]), IHAVEOPT);
        stream.write_all(&3u32.to_be_bytes())?;
        let mut data = Vec::new();
        data.extend_from_slice(&u32::try_from(export.len()).expect("short").to_be_bytes());
        data.extend_from_slice(export.as_bytes());
        data.extend_from_slice(&0u16.to_be_bytes());
        let mut option = Vec::new();
        option.extend_from_slice(&IHAVEOPT.to_be_bytes());
        option.extend_from_slice(&OPT_GO.to_be_bytes());
        option.extend_from_slice(&u32::try_from(data.len()).expect("short").to_be_bytes());
        option.extend_from_slice(&data);
        stream.write_all(&option)?;
        let mut size_bytes = 0;
        loop {
            let mut header = [0; 20];
            stream.read_exact(&mut header)?;
            assert_eq!(be64(&header[..8]), OPTION_REPLY);
            let mut data = vec![0; be32(&header[16..20]) as usize];
            stream.read_exact(&mut data)?;
            match be32(&header[12..16]) {
                REP_ACK => return Ok(Ok(Self { stream, size_bytes, last: 0 })),
                REP_INFO if data[..2] == [0, 0] => size_bytes = be64(&data[2..10]),
                REP_INFO => {}
                code => {
                    let message = String::from_utf8_lossy(&data).into_owned();
                    return Ok(Err(Refused { code, message }));
                }
            }
        }
    }

    /// Opens what must be there to be had.
    pub(crate) fn must_open(socket: &Path, export: &str) -> Self {
        Self::open(socket, export).unwrap_or_else(|refused| panic!("{export} is refused: {refused:?}"))
    }

    /// Sends a request without waiting; its cookie.
    pub(crate) fn send(&mut self, command: u16, offset: u64, length: u32, payload: &[u8]) -> u64 {
        self.try_send(command, offset, length, payload).expect("the connection holds")
    }

    /// Waits for the next simple reply without payload: cookie and error.
    pub(crate) fn reply(&mut self) -> (u64, u32) {
        self.try_reply().expect("the connection holds")
    }

    /// Whether an answer has come that was not read yet.
    pub(crate) fn has_answer(&mut self) -> bool {
        self.stream.set_nonblocking(true).expect("a socket");
        let peeked = rustix::net::recv(&self.stream, &mut [0u8; 1][..], rustix::net::RecvFlags::PEEK);
        self.stream.set_nonblocking(false).expect("a socket");
        peeked.is_ok()
    }

    /// Writes and waits; the error.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.send(WRITE, offset, u32::try_from(data.len()).expect("below 4 GiB"), data);
        self.reply().1
    }

    /// Flushes and waits; the error.
    pub(crate) fn flush(&mut self) -> u32 {
        self.send(FLUSH, 0, 0, &[]);
        self.reply().1
    }

    /// Reads and waits.
    pub(crate) fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, u32> {
        self.send(READ, offset, u32::try_from(length).expect("below 4 GiB"), &[]);
        match self.reply().1 {
            0 => Ok(self.data(length)),
            error => Err(error),
        }
    }

    /// The data behind the reply to a read.
    pub(crate) fn data(&mut self, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data).expect("the connection holds");
        data
    }

    /// As [`Nbd::send`], while the exporter may go.
    pub(crate) fn try_send(
        &mut self,
        command: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> std::io::Result<u64> {
        self.last += 1;
        let mut request = Vec::with_capacity(28 + payload.len());
        request.extend_from_slice(&REQUEST.to_be_bytes());
        request.extend_from_slice(&0u16.to_be_bytes());
        request.extend_from_slice(&command.to_be_bytes());
        request.extend_from_slice(&self.last.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&length.to_be_bytes());
        request.extend_from_slice(payload);
        self.stream.write_all(&request)?;
        Ok(self.last)
    }

    /// As [`Nbd::reply`], while the exporter may go.
    pub(crate) fn try_reply(&mut self) -> std::io::Result<(u64, u32)> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        assert_eq!(be32(&reply[..4]), SIMPLE_REPLY);
        Ok((be64(&reply[8..16]), be32(&reply[4..8])))
    }
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().expect("eight bytes"))
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().expect("four bytes"))
}
