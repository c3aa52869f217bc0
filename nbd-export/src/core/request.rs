//! Requests: the header's codec, and the judgement whether a request may be carried out.

use super::errno::Problem;
use super::limits::PAYLOAD_BYTES_MAX;
use super::wire::{REQUEST_BYTES, REQUEST_MAGIC, command, command_flag};

/// A request's header as sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// See [`command_flag`].
    pub flags: u16,
    /// See [`command`].
    pub command: u16,
    /// Chosen by the client, repeated in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

impl Header {
    /// `None` if the magic is wrong: the stream is out of step and must be closed.
    #[must_use]
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let u16_at = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        (u32_at(0) == REQUEST_MAGIC).then(|| Self {
            flags: u16_at(4),
            command: u16_at(6),
            cookie: u64_at(8),
            offset: u64_at(16),
            len: u32_at(24),
        })
    }

    /// The bytes of it, as a client sends them.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }
}

/// What was negotiated, as far as it decides about requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Size of the export, bytes.
    pub size_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Replies are structured.
    pub structured: bool,
    /// BLOCK_STATUS is answered for `base:allocation`.
    pub base_allocation: bool,
    /// FAST_ZERO was offered.
    pub fast_zero: bool,
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Data; in one chunk if `whole` (DF, or a simple reply, which has no chunks).
    Read {
        /// One chunk.
        whole: bool,
    },
    /// `len` bytes of payload follow the header.
    Write,
    /// Make durable.
    Flush,
    /// Forget.
    Trim,
    /// Zero.
    WriteZeroes {
        /// Keep the space.
        no_hole: bool,
        /// Only if cheap.
        fast_only: bool,
    },
    /// Will read soon.
    Cache,
    /// Allocation state.
    BlockStatus {
        /// One extent.
        one: bool,
    },
}

/// A request that may be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// To be repeated in the reply.
    pub cookie: u64,
    /// What to do.
    pub command: Command,
    /// First byte; the range lies within the export.
    pub offset: u64,
    /// Bytes; may be 0.
    pub len: u32,
    /// Durable before the reply.
    pub fua: bool,
}

/// What to do with a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Carry it out.
    Accept(Request),
    /// Skip `payload_bytes` of the stream, then answer with the problem.
    Refuse {
        /// Of the request.
        cookie: u64,
        /// Why.
        problem: Problem,
        /// What follows the header and must be skipped before the answer.
        payload_bytes: u32,
    },
    /// DISC: finish what is in flight, then close; no reply.
    Disconnect,
}

/// Judges a header under the negotiated terms.
#[must_use]
pub fn judge(header: &Header, terms: &Terms) -> Verdict {
    if header.command == command::DISC {
        return Verdict::Disconnect;
    }
    match check(header, terms) {
        Ok(command) => Verdict::Accept(Request {
            cookie: header.cookie,
            command,
            offset: header.offset,
            len: header.len,
            fua: header.flags & command_flag::FUA != 0,
        }),
        Err(problem) => Verdict::Refuse {
            cookie: header.cookie,
            problem,
            payload_bytes: if header.command == command::WRITE { header.len } else { 0 },
        },
    }
}

fn check(header: &Header, terms: &Terms) -> Result<Command, Problem> {
    let (command, own_flags) = decode_command(header, terms)?;
    if header.flags & !(own_flags | command_flag::FUA) != 0 {
        return Err(Problem::Flags);
    }
    let changes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes { .. });
    if changes && terms.read_only {
        return Err(Problem::ReadOnly);
    }
    if matches!(command, Command::Flush) {
        return if header.offset == 0 && header.len == 0 { Ok(command) } else { Err(Problem::FlushRange) };
    }
    if matches!(command, Command::Read { .. } | Command::Write) && header.len > PAYLOAD_BYTES_MAX {
        return Err(Problem::TooLong);
    }
    let end = header.offset.checked_add(u64::from(header.len));
    if end.is_none_or(|end| end > terms.size_bytes) {
        let writes = matches!(command, Command::Write | Command::WriteZeroes { .. });
        return Err(if writes { Problem::WritePastEnd } else { Problem::PastEnd });
    }
    if matches!(command, Command::BlockStatus { .. }) {
        if !terms.base_allocation {
            return Err(Problem::NoContext);
        }
        if header.len == 0 {
            return Err(Problem::EmptyStatus);
        }
    }
    Ok(command)
}

/// The command, and the flags that belong to it beside FUA.
fn decode_command(header: &Header, terms: &Terms) -> Result<(Command, u16), Problem> {
    let has = |flag: u16| header.flags & flag != 0;
    Ok(match header.command {
        command::READ => {
            let own = if terms.structured { command_flag::DF } else { 0 };
            (Command::Read { whole: !terms.structured || has(command_flag::DF) }, own)
        }
        command::WRITE => (Command::Write, 0),
        command::FLUSH => (Command::Flush, 0),
        command::TRIM => (Command::Trim, 0),
        command::CACHE => (Command::Cache, 0),
        command::WRITE_ZEROES => {
            let (no_hole, fast_only) = (has(command_flag::NO_HOLE), has(command_flag::FAST_ZERO));
            let own = command_flag::NO_HOLE | if terms.fast_zero { command_flag::FAST_ZERO } else { 0 };
            (Command::WriteZeroes { no_hole, fast_only }, own)
        }
        command::BLOCK_STATUS => {
            (Command::BlockStatus { one: has(command_flag::REQ_ONE) }, command_flag::REQ_ONE)
        }
        _ => return Err(Problem::UnknownCommand),
    })
}

#[cfg(test)]
mod tests {
    use super::super::errno::{Errno, errno};
    use super::*;

    const SIZE: u64 = 1 << 20;
    const TERMS: Terms = Terms {
        size_bytes: SIZE,
        read_only: false,
        structured: true,
        base_allocation: true,
        fast_zero: true,
    };

    fn header(command: u16, flags: u16, offset: u64, len: u32) -> Header {
        Header { flags, command, cookie: 7, offset, len }
    }

    fn refusal(header: &Header, terms: &Terms) -> Option<(Errno, u32)> {
        match judge(header, terms) {
            Verdict::Refuse { cookie, problem, payload_bytes } => {
                assert_eq!(cookie, header.cookie);
                Some((errno(problem), payload_bytes))
            }
            _ => None,
        }
    }

    #[test]
    fn headers_survive_the_wire() {
        let sent = header(command::WRITE, command_flag::FUA, 0x0102_0304_0506_0708, 0x0a0b_0c0d);
        assert_eq!(Header::decode(&sent.encode()), Some(sent));
        let mut damaged = sent.encode();
        damaged[0] ^= 1;
        assert_eq!(Header::decode(&damaged), None);
    }

    #[test]
    fn ranges_are_checked_without_overflow() {
        let writes = [command::WRITE, command::WRITE_ZEROES];
        let others = [command::READ, command::TRIM, command::CACHE, command::BLOCK_STATUS];
        for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 3, 4), (1 << 63, 4096)] {
            for command in writes {
                let payload = if command == command::WRITE { len } else { 0 };
                assert_eq!(refusal(&header(command, 0, offset, len), &TERMS), Some((Errno::ENOSPC, payload)));
            }
            for command in others {
                assert_eq!(refusal(&header(command, 0, offset, len), &TERMS), Some((Errno::EINVAL, 0)));
            }
        }
        for command in writes.into_iter().chain(others) {
            assert_eq!(refusal(&header(command, 0, SIZE - 1, 1), &TERMS), None, "command {command}");
        }
    }

    #[test]
    fn flags_must_belong_to_the_command() {
        let all = [
            (command::READ, command_flag::DF),
            (command::WRITE, 0),
            (command::FLUSH, 0),
            (command::TRIM, 0),
            (command::CACHE, 0),
            (command::WRITE_ZEROES, command_flag::NO_HOLE | command_flag::FAST_ZERO),
            (command::BLOCK_STATUS, command_flag::REQ_ONE),
        ];
        for (command, own) in all {
            let len = if command == command::FLUSH { 0 } else { 1 };
            for bit in 0..16 {
                let flag = 1 << bit;
                let allowed = flag == command_flag::FUA || own & flag != 0;
                let payload = if command == command::WRITE { len } else { 0 };
                let expected = if allowed { None } else { Some((Errno::EINVAL, payload)) };
                assert_eq!(
                    refusal(&header(command, flag, 0, len), &TERMS),
                    expected,
                    "command {command} bit {bit}"
                );
            }
        }
        let plain = Terms { structured: false, fast_zero: false, ..TERMS };
        let einval = Some((Errno::EINVAL, 0));
        assert_eq!(refusal(&header(command::READ, command_flag::DF, 0, 1), &plain), einval);
        assert_eq!(refusal(&header(command::WRITE_ZEROES, command_flag::FAST_ZERO, 0, 1), &plain), einval);
    }

    #[test]
    fn unknown_commands_are_refused_and_carry_no_payload() {
        for command in (8..=u16::MAX).step_by(97) {
            assert_eq!(refusal(&header(command, 0, 0, 4096), &TERMS), Some((Errno::EINVAL, 0)));
        }
    }

    #[test]
    fn a_read_only_export_refuses_every_change_and_nothing_else() {
        let terms = Terms { read_only: true, ..TERMS };
        assert_eq!(refusal(&header(command::WRITE, 0, 0, 512), &terms), Some((Errno::EPERM, 512)));
        for command in [command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(refusal(&header(command, 0, 0, 512), &terms), Some((Errno::EPERM, 0)));
        }
        for command in [command::READ, command::CACHE, command::BLOCK_STATUS] {
            assert_eq!(refusal(&header(command, 0, 0, 512), &terms), None);
        }
        assert_eq!(refusal(&header(command::FLUSH, 0, 0, 0), &terms), None);
    }

    #[test]
    fn only_payloads_have_a_largest_length() {
        let terms = Terms { size_bytes: 1 << 40, ..TERMS };
        let over = PAYLOAD_BYTES_MAX + 1;
        assert_eq!(refusal(&header(command::READ, 0, 0, over), &terms), Some((Errno::EINVAL, 0)));
        assert_eq!(refusal(&header(command::WRITE, 0, 0, over), &terms), Some((Errno::EINVAL, over)));
        assert_eq!(refusal(&header(command::WRITE, 0, 0, PAYLOAD_BYTES_MAX), &terms), None);
        for command in [command::TRIM, command::WRITE_ZEROES, command::CACHE, command::BLOCK_STATUS] {
            assert_eq!(refusal(&header(command, 0, 0, 0xffff_f000), &terms), None, "command {command}");
        }
    }

    #[test]
    fn a_length_of_zero_is_served_where_there_is_an_answer() {
        for command in [command::READ, command::WRITE, command::TRIM, command::WRITE_ZEROES, command::CACHE] {
            assert_eq!(refusal(&header(command, 0, SIZE, 0), &TERMS), None);
        }
        assert_eq!(refusal(&header(command::BLOCK_STATUS, 0, 0, 0), &TERMS), Some((Errno::EINVAL, 0)));
        assert_eq!(refusal(&header(command::FLUSH, 0, 0, 1), &TERMS), Some((Errno::EINVAL, 0)));
        let deaf = Terms { base_allocation: false, ..TERMS };
        assert_eq!(refusal(&header(command::BLOCK_STATUS, 0, 0, 1), &deaf), Some((Errno::EINVAL, 0)));
    }

    #[test]
    fn disc_is_never_refused() {
        assert_eq!(judge(&header(command::DISC, u16::MAX, u64::MAX, u32::MAX), &TERMS), Verdict::Disconnect);
    }

    proptest::proptest! {
        #[test]
        fn whatever_is_accepted_lies_within_the_export(bytes: [u8; REQUEST_BYTES], command in 0u16..9, small: bool) {
            let mut bytes = bytes;
            bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            bytes[6..8].copy_from_slice(&command.to_be_bytes());
            if small {
                bytes[16..21].fill(0);
                bytes[24..26].fill(0);
                bytes[4] = 0;
            }
            let header = Header::decode(&bytes).expect("magic is right");
            if let Verdict::Accept(request) = judge(&header, &TERMS) {
                assert!(u128::from(request.offset) + u128::from(request.len) <= u128::from(SIZE));
            }
        }
    }
}
