//! Error numbers, chosen in one function.

use crate::export::ErrorKind;

/// An error number as the protocol carries it. The protocol allows only these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub u32);

impl Errno {
    /// Not allowed.
    pub const EPERM: Self = Self(1);
    /// Input or output error.
    pub const EIO: Self = Self(5);
    /// Makes no sense.
    pub const EINVAL: Self = Self(22);
    /// No space left.
    pub const ENOSPC: Self = Self(28);
    /// Not supported.
    pub const ENOTSUP: Self = Self(95);
    /// The server ends.
    pub const ESHUTDOWN: Self = Self(108);
}

/// Why a request is not carried out, or was not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// A command that this server does not know.
    UnknownCommand,
    /// A flag that is unknown, or does not belong to the command, or was not offered.
    Flags,
    /// A change to a read-only export.
    ReadOnly,
    /// A WRITE or WRITE_ZEROES that ends beyond the export.
    WritePastEnd,
    /// Any other range that ends beyond the export.
    PastEnd,
    /// A payload above [`super::limits::PAYLOAD_BYTES_MAX`].
    TooLong,
    /// BLOCK_STATUS of nothing.
    EmptyStatus,
    /// BLOCK_STATUS without a negotiated context.
    NoContext,
    /// FLUSH with a range.
    FlushRange,
    /// The export failed.
    Export(ErrorKind),
}

/// The one place where an error number is chosen.
#[must_use]
pub fn errno(problem: Problem) -> Errno {
    match problem {
        Problem::ReadOnly | Problem::Export(ErrorKind::ReadOnly) => Errno::EPERM,
        Problem::WritePastEnd | Problem::Export(ErrorKind::NoSpace) => Errno::ENOSPC,
        Problem::UnknownCommand
        | Problem::Flags
        | Problem::PastEnd
        | Problem::TooLong
        | Problem::EmptyStatus
        | Problem::NoContext
        | Problem::FlushRange
        | Problem::Export(ErrorKind::Invalid) => Errno::EINVAL,
        Problem::Export(ErrorKind::Io) => Errno::EIO,
        Problem::Export(ErrorKind::NotSupported) => Errno::ENOTSUP,
        Problem::Export(ErrorKind::ShuttingDown) => Errno::ESHUTDOWN,
    }
}

impl Problem {
    /// The line for people; an export's failure brings its own.
    #[must_use]
    pub fn message(self) -> &'static str {
        match self {
            Self::UnknownCommand => "unknown command",
            Self::Flags => "a flag that is unknown or does not belong to this command",
            Self::ReadOnly => "the export is read-only",
            Self::WritePastEnd => "write beyond the end of the export",
            Self::PastEnd => "range beyond the end of the export",
            Self::TooLong => "request longer than 64 MiB",
            Self::EmptyStatus => "block status of an empty range",
            Self::NoContext => "no metadata context was negotiated",
            Self::FlushRange => "a flush has no range",
            Self::Export(_) => "the export failed",
        }
    }
}
