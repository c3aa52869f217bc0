//! What clients ask during negotiation: the payloads of options, decoded and checked. Lengths are checked against the
//! payload before anything is copied; a payload has to end where its last field does.

use super::limits::STRING_BYTES_MAX;
use super::wire::{info, option};

/// What INFO and GO shall tell beside size and flags. Requests for anything else are ignored, as the protocol wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Wanted {
    /// Canonical name.
    pub name: bool,
    /// Text for people.
    pub description: bool,
    /// Block sizes.
    pub block_size: bool,
}

/// The metadata contexts that queries select.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contexts {
    /// `base:allocation` is among them.
    pub base_allocation: bool,
}

/// An option that makes sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientOption {
    /// Attach this export or close.
    ExportName(String),
    /// Good bye.
    Abort,
    /// All exports.
    List,
    /// Describe.
    Info(String, Wanted),
    /// Describe and attach.
    Go(String, Wanted),
    /// Chunked replies.
    StructuredReply,
    /// Contexts of an export that match.
    ListMetaContext(String, Contexts),
    /// Select contexts.
    SetMetaContext(String, Contexts),
}

/// Why an option is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadOption {
    /// Not known here.
    Unsupported(&'static str),
    /// Known and malformed.
    Malformed(&'static str),
}

/// Decodes option number `number` with its whole payload.
pub fn decode(number: u32, payload: &[u8]) -> Result<ClientOption, BadOption> {
    let mut fields = Fields(payload);
    let decoded = match number {
        option::EXPORT_NAME => ClientOption::ExportName(fields.text(payload.len())?),
        // The protocol wants whatever comes with ABORT ignored.
        option::ABORT => return Ok(ClientOption::Abort),
        option::LIST => ClientOption::List,
        option::INFO => ClientOption::Info(fields.name()?, fields.wanted()?),
        option::GO => ClientOption::Go(fields.name()?, fields.wanted()?),
        option::STRUCTURED_REPLY => ClientOption::StructuredReply,
        option::LIST_META_CONTEXT => ClientOption::ListMetaContext(fields.name()?, fields.contexts(true)?),
        option::SET_META_CONTEXT => ClientOption::SetMetaContext(fields.name()?, fields.contexts(false)?),
        option::STARTTLS => return Err(BadOption::Unsupported("TLS is not offered")),
        _ => return Err(BadOption::Unsupported("unknown option")),
    };
    if fields.0.is_empty() { Ok(decoded) } else { Err(BadOption::Malformed("bytes after the last field")) }
}

/// What is left of a payload.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], BadOption> {
        let (taken, rest) =
            self.0.split_at_checked(len).ok_or(BadOption::Malformed("a length beyond the option"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, BadOption> {
        self.take(2).map(|bytes| u16::from_be_bytes(bytes.try_into().expect("two bytes")))
    }

    fn u32(&mut self) -> Result<u32, BadOption> {
        self.take(4).map(|bytes| u32::from_be_bytes(bytes.try_into().expect("four bytes")))
    }

    fn str(&mut self, len: usize) -> Result<&'a str, BadOption> {
        if len > STRING_BYTES_MAX {
            return Err(BadOption::Malformed("a text longer than 4096 bytes"));
        }
        let text = std::str::from_utf8(self.take(len)?)
            .map_err(|_| BadOption::Malformed("a text that is not UTF-8"))?;
        if text.contains('\0') { Err(BadOption::Malformed("a text with a zero byte")) } else { Ok(text) }
    }

    fn text(&mut self, len: usize) -> Result<String, BadOption> {
        self.str(len).map(str::to_owned)
    }

    fn name(&mut self) -> Result<String, BadOption> {
        let len = self.u32()?;
        self.text(len as usize)
    }

    fn wanted(&mut self) -> Result<Wanted, BadOption> {
        let mut wanted = Wanted::default();
        for _ in 0..self.u16()? {
            match self.u16()? {
                info::NAME => wanted.name = true,
                info::DESCRIPTION => wanted.description = true,
                info::BLOCK_SIZE => wanted.block_size = true,
                _ => {}
            }
        }
        Ok(wanted)
    }

    /// The queries of a context option. In a list, none means all and `base:` means all of that namespace; in a
    /// selection both mean nothing.
    fn contexts(&mut self, list: bool) -> Result<Contexts, BadOption> {
        let count = self.u32()?;
        let mut base_allocation = list && count == 0;
        for _ in 0..count {
            let len = self.u32()?;
            let query = self.str(len as usize)?;
            if !query.contains(':') {
                return Err(BadOption::Malformed("a context without a namespace"));
            }
            base_allocation |= query == "base:allocation" || list && query == "base:";
        }
        Ok(Contexts { base_allocation })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Vec<u8> {
        let mut bytes = u32::try_from(text.len()).expect("short").to_be_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes
    }

    fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut bytes = text(name);
        bytes.extend_from_slice(&u32::try_from(queries.len()).expect("few").to_be_bytes());
        queries.iter().for_each(|query| bytes.extend_from_slice(&text(query)));
        bytes
    }

    fn go(name: &str, infos: &[u16]) -> Vec<u8> {
        let mut bytes = text(name);
        bytes.extend_from_slice(&u16::try_from(infos.len()).expect("few").to_be_bytes());
        infos.iter().for_each(|info| bytes.extend_from_slice(&info.to_be_bytes()));
        bytes
    }

    #[test]
    fn options_decode() {
        let all = Wanted { name: true, description: true, block_size: true };
        let cases = [
            (1, b"demo".to_vec(), ClientOption::ExportName("demo".into())),
            (1, Vec::new(), ClientOption::ExportName(String::new())),
            (2, b"ignored".to_vec(), ClientOption::Abort),
            (3, Vec::new(), ClientOption::List),
            (6, go("a", &[]), ClientOption::Info("a".into(), Wanted::default())),
            (7, go("", &[0, 1, 2, 3, 77]), ClientOption::Go(String::new(), all)),
            (8, Vec::new(), ClientOption::StructuredReply),
        ];
        for (number, payload, expected) in cases {
            assert_eq!(decode(number, &payload), Ok(expected));
        }
    }

    #[test]
    fn only_a_list_has_wildcards() {
        let selects = |number, queries: &[&str]| match decode(number, &meta("a", queries)) {
            Ok(ClientOption::ListMetaContext(_, c) | ClientOption::SetMetaContext(_, c)) => {
                Some(c.base_allocation)
            }
            _ => None,
        };
        for (queries, listed, set) in [
            (&[][..], Some(true), Some(false)),
            (&["base:"], Some(true), Some(false)),
            (&["base:allocation"], Some(true), Some(true)),
            (&["x:y", "base:allocation", "base:allocation"], Some(true), Some(true)),
            (&["qemu:", "qemu:dirty-bitmap:b"], Some(false), Some(false)),
            (&["allocation"], None, None),
        ] {
            assert_eq!(selects(option::LIST_META_CONTEXT, queries), listed, "{queries:?}");
            assert_eq!(selects(option::SET_META_CONTEXT, queries), set, "{queries:?}");
        }
    }

    #[test]
    fn malformed_options_are_told_from_unknown_ones() {
        let mut many = meta("a", &[]);
        many[5..9].copy_from_slice(&u32::MAX.to_be_bytes());
        let mut long = go("abc", &[]);
        long[..4].copy_from_slice(&u32::MAX.to_be_bytes());
        let malformed = [
            (3, b"x".to_vec()),
            (8, b"x".to_vec()),
            (7, Vec::new()),
            (7, long),
            (7, go("abc", &[1])[..8].to_vec()),
            (6, [go("abc", &[]), vec![0]].concat()),
            (9, many),
            (1, vec![0xff]),
            (7, go("a\0b", &[])),
            (7, go(&"n".repeat(4097), &[])),
        ];
        for (number, payload) in malformed {
            assert!(matches!(decode(number, &payload), Err(BadOption::Malformed(_))), "{number} {payload:?}");
        }
        for number in [0, 4, 5, 11, 12, u32::MAX] {
            assert!(matches!(decode(number, b"x"), Err(BadOption::Unsupported(_))), "{number}");
        }
    }
}
