//! Fixed newstyle negotiation as a state machine: bytes in, replies and questions out.
//!
//! ```text
//! Flags ──► Header ──► Payload ──► (Asked) ──► Header … ──► Over
//!              └─────► Skip ───────────────────┘
//! ```
//!
//! Callers give every byte they have to [`Handshake::advance`], send what it wrote, and do what [`Progress`] says. A
//! question is answered with [`Handshake::answer`] before the next `advance`. INFO, LIST and the contexts never attach an
//! export: only [`Ask::Open`] does.
//!
//! Invariants: an option that is not understood is skipped, never guessed at; what a client may send in all is bounded
//! ([`HANDSHAKE_BYTES_MAX`], [`OPTIONS_MAX`]); nothing of an option longer than [`OPTION_BYTES_MAX`] is looked at.

use super::limits::{HANDSHAKE_BYTES_MAX, OPTION_BYTES_MAX, OPTIONS_MAX};
use super::option::{self, BadOption, ClientOption, Contexts, Wanted};
use super::option_reply as reply;
use super::reply::BASE_ALLOCATION_ID;
use super::request::Terms;
use super::wire::{self, OPTION_HEADER_BYTES, handshake_flag, option_reply};
use crate::export::{ExportInfo, Listed, OpenError};

/// What the machine must know to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// All exports. → [`Answer::List`].
    List,
    /// What this export is, attaching nothing. → [`Answer::Export`].
    Info(String),
    /// Attach this export. → [`Answer::Export`].
    Open(String),
}

/// The answer to an [`Ask`].
#[derive(Clone, Debug)]
pub enum Answer {
    /// To [`Ask::List`].
    List(Result<Vec<Listed>, OpenError>),
    /// To [`Ask::Info`] and [`Ask::Open`].
    Export(Result<ExportInfo, OpenError>),
}

/// Why a negotiation ends without an export.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Close {
    /// The client said ABORT.
    #[error("the client aborted")]
    Aborted,
    /// EXPORT_NAME of an export that is not given: the protocol has no other answer.
    #[error("export not given: {0}")]
    NotGiven(OpenError),
    /// The client broke the protocol or a limit.
    #[error("protocol violation in the handshake: {0}")]
    Violation(&'static str),
}

/// What to do next, after sending what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Give more bytes.
    NeedInput,
    /// Answer this.
    Ask(Ask),
    /// The export of the last [`Ask::Open`] is attached on these terms; what follows are requests.
    Attached(Terms),
    /// Close the connection.
    Close(Close),
}

#[derive(Debug)]
enum State {
    /// The client's flags are next.
    Flags,
    /// An option is next.
    Header,
    /// The payload of an option is next.
    Payload { number: u32, len: usize },
    /// This many bytes of an overlong option are skipped before it is refused.
    Skip { number: u32, left: u64 },
    /// A question is open.
    Asked(Asked),
    /// Attached or closed.
    Over,
}

#[derive(Debug)]
enum Asked {
    List,
    Info(Wanted),
    Go(String, Wanted),
    ExportName(String),
    ListContexts(Contexts),
    SetContexts(String, Contexts),
}

/// The machine. See the module.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
    /// The export for which `base:allocation` was selected.
    selected: Option<String>,
    bytes_left: u64,
    options_left: u32,
}

impl Handshake {
    /// A new negotiation; writes the greeting.
    #[must_use]
    pub fn new(out: &mut Vec<u8>) -> Self {
        reply::greeting(out);
        Self {
            state: State::Flags,
            fixed: false,
            no_zeroes: false,
            structured: false,
            selected: None,
            bytes_left: HANDSHAKE_BYTES_MAX,
            options_left: OPTIONS_MAX,
        }
    }

    /// Takes bytes off the front of `input`, as far as it can. Not to be called while a question is open.
    pub fn advance(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Progress {
        loop {
            let step = match self.state {
                State::Flags => self.on_flags(input),
                State::Header => self.on_header(input),
                State::Payload { number, len } => self.on_payload(number, len, input, out),
                State::Skip { number, left } => self.on_skip(number, left, input, out),
                State::Asked(_) => unreachable!("advanced with an open question"),
                State::Over => unreachable!("advanced after the end"),
            };
            match step {
                Step::Again => {}
                Step::Wait => return Progress::NeedInput,
                Step::Ask(ask) => return Progress::Ask(ask),
                Step::Close(why) => {
                    self.state = State::Over;
                    return Progress::Close(why);
                }
            }
        }
    }

    /// Answers the open question.
    pub fn answer(&mut self, answer: Answer, out: &mut Vec<u8>) -> Progress {
        let State::Asked(asked) = std::mem::replace(&mut self.state, State::Header) else {
            unreachable!("an answer without a question");
        };
        match (asked, answer) {
            (Asked::List, Answer::List(Ok(exports))) => reply::list(out, wire::option::LIST, &exports),
            (Asked::List, Answer::List(Err(why))) => reply::refusal(out, wire::option::LIST, &why),
            (asked, Answer::Export(result)) => return self.on_export(asked, result, out),
            (asked, Answer::List(_)) => unreachable!("a list answers {asked:?}"),
        }
        Progress::NeedInput
    }

    fn on_flags(&mut self, input: &mut &[u8]) -> Step {
        let Some(bytes) = take(input, 4) else { return Step::Wait };
        let flags = u32::from_be_bytes(bytes.try_into().expect("four bytes"));
        let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        if flags & !known != 0 {
            return Step::Close(Close::Violation("unknown client flags"));
        }
        self.fixed = flags & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        self.state = State::Header;
        Step::Again
    }

    fn on_header(&mut self, input: &mut &[u8]) -> Step {
        let Some(bytes) = take(input, OPTION_HEADER_BYTES) else { return Step::Wait };
        if bytes[..8] != wire::OPTION_MAGIC.to_be_bytes() {
            return Step::Close(Close::Violation("an option without its magic"));
        }
        let number = u32::from_be_bytes(bytes[8..12].try_into().expect("four bytes"));
        let len = u32::from_be_bytes(bytes[12..].try_into().expect("four bytes"));
        if !self.fixed && number != wire::option::EXPORT_NAME {
            return Step::Close(Close::Violation("an option that needs fixed newstyle"));
        }
        let Some(options_left) = self.options_left.checked_sub(1) else {
            return Step::Close(Close::Violation("too many options"));
        };
        let Some(bytes_left) = self.bytes_left.checked_sub(OPTION_HEADER_BYTES as u64 + u64::from(len))
        else {
            return Step::Close(Close::Violation("too many bytes"));
        };
        (self.options_left, self.bytes_left) = (options_left, bytes_left);
        self.state = if len > OPTION_BYTES_MAX {
            State::Skip { number, left: u64::from(len) }
        } else {
            State::Payload { number, len: len as usize }
        };
        Step::Again
    }

    fn on_skip(&mut self, number: u32, left: u64, input: &mut &[u8], out: &mut Vec<u8>) -> Step {
        let skipped = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
        *input = &input[skipped..];
        let left = left - skipped as u64;
        if left > 0 {
            self.state = State::Skip { number, left };
            return Step::Wait;
        }
        self.state = State::Header;
        match option::decode(number, &[]) {
            Err(BadOption::Unsupported(why)) => reply::error(out, number, option_reply::ERR_UNSUP, why),
            _ if number == wire::option::EXPORT_NAME => {
                return Step::Close(Close::Violation("an overlong export name"));
            }
            _ if number == wire::option::ABORT => return self.on_option(ClientOption::Abort, out),
            _ => reply::error(out, number, option_reply::ERR_TOO_BIG, "an option has at most 8 KiB"),
        }
        Step::Again
    }

    fn on_payload(&mut self, number: u32, len: usize, input: &mut &[u8], out: &mut Vec<u8>) -> Step {
        let Some(payload) = take(input, len) else { return Step::Wait };
        self.state = State::Header;
        match option::decode(number, payload) {
            Ok(option) => return self.on_option(option, out),
            Err(BadOption::Unsupported(why)) => reply::error(out, number, option_reply::ERR_UNSUP, why),
            Err(BadOption::Malformed(why)) => {
                if number == wire::option::EXPORT_NAME {
                    return Step::Close(Close::Violation(why));
                }
                if number == wire::option::SET_META_CONTEXT {
                    self.selected = None;
                }
                reply::error(out, number, option_reply::ERR_INVALID, why);
            }
        }
        Step::Again
    }

    fn on_option(&mut self, option: ClientOption, out: &mut Vec<u8>) -> Step {
        let (asked, ask) = match option {
            ClientOption::Abort => {
                reply::ack(out, wire::option::ABORT);
                return Step::Close(Close::Aborted);
            }
            ClientOption::StructuredReply => {
                self.structured = true;
                reply::ack(out, wire::option::STRUCTURED_REPLY);
                return Step::Again;
            }
            ClientOption::SetMetaContext(..) if !self.structured => {
                let why = "contexts need structured replies: negotiate them first";
                reply::error(out, wire::option::SET_META_CONTEXT, option_reply::ERR_INVALID, why);
                return Step::Again;
            }
            ClientOption::List => (Asked::List, Ask::List),
            ClientOption::Info(name, wanted) => (Asked::Info(wanted), Ask::Info(name)),
            ClientOption::Go(name, wanted) => (Asked::Go(name.clone(), wanted), Ask::Open(name)),
            ClientOption::ExportName(name) => (Asked::ExportName(name.clone()), Ask::Open(name)),
            ClientOption::ListMetaContext(name, contexts) => (Asked::ListContexts(contexts), Ask::Info(name)),
            ClientOption::SetMetaContext(name, contexts) => {
                self.selected = None;
                (Asked::SetContexts(name.clone(), contexts), Ask::Info(name))
            }
        };
        self.state = State::Asked(asked);
        Step::Ask(ask)
    }

    fn on_export(
        &mut self,
        asked: Asked,
        result: Result<ExportInfo, OpenError>,
        out: &mut Vec<u8>,
    ) -> Progress {
        let number = asked.number();
        let export = match result {
            Ok(export) => export,
            Err(why) if matches!(asked, Asked::ExportName(_)) => {
                self.state = State::Over;
                return Progress::Close(Close::NotGiven(why));
            }
            Err(why) => {
                reply::refusal(out, number, &why);
                return Progress::NeedInput;
            }
        };
        match asked {
            Asked::Info(wanted) => reply::describe(out, number, &export, wanted, self.structured),
            Asked::Go(name, wanted) => {
                reply::describe(out, number, &export, wanted, self.structured);
                return self.attached(&name, &export);
            }
            Asked::ExportName(name) => {
                reply::export_name(out, &export, self.structured, self.no_zeroes);
                return self.attached(&name, &export);
            }
            Asked::ListContexts(contexts) | Asked::SetContexts(_, contexts) if !contexts.base_allocation => {
                reply::ack(out, number);
            }
            Asked::ListContexts(_) => {
                reply::context(out, number, 0);
                reply::ack(out, number);
            }
            Asked::SetContexts(name, _) => {
                self.selected = Some(name);
                reply::context(out, number, BASE_ALLOCATION_ID);
                reply::ack(out, number);
            }
            Asked::List => unreachable!("a list is answered with a list"),
        }
        Progress::NeedInput
    }

    fn attached(&mut self, name: &str, export: &ExportInfo) -> Progress {
        self.state = State::Over;
        Progress::Attached(Terms {
            size_bytes: export.size_bytes,
            read_only: export.read_only,
            structured: self.structured,
            base_allocation: self.selected.as_deref() == Some(name),
            fast_zero: export.fast_zero && !export.read_only,
        })
    }
}

impl Asked {
    fn number(&self) -> u32 {
        match self {
            Self::List => wire::option::LIST,
            Self::Info(_) => wire::option::INFO,
            Self::Go(..) => wire::option::GO,
            Self::ExportName(_) => wire::option::EXPORT_NAME,
            Self::ListContexts(_) => wire::option::LIST_META_CONTEXT,
            Self::SetContexts(..) => wire::option::SET_META_CONTEXT,
        }
    }
}

/// The first `len` bytes, once they are there.
fn take<'a>(input: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (taken, rest) = input.split_at_checked(len)?;
    *input = rest;
    Some(taken)
}

/// What one state made of the input.
enum Step {
    Again,
    Wait,
    Ask(Ask),
    Close(Close),
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
