use std::io;
use std::time::Duration;

use lotus_types::Kind;

/// Why bytes could not be had.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The token opens nothing, or nothing any more: a lease ended, or a staged file is gone.
    #[error("the data token opens nothing at {at}, or nothing any more")]
    UnknownToken {
        /// The socket or URL asked.
        at: String,
    },
    /// Nobody answers there, or the connection broke.
    #[error("no data from {at}: {why}")]
    Unreachable {
        /// The socket or URL.
        at: String,
        /// What the system said.
        why: String,
    },
    /// The answer did not come in time.
    #[error("no data from {at} within {after:?}")]
    Silent {
        /// The socket or URL.
        at: String,
        /// How long was waited.
        after: Duration,
    },
    /// The other side cannot serve this now or ever; its kind says which.
    #[error("{at} refused: {message}")]
    Refused {
        /// The socket or URL.
        at: String,
        /// Kind that the other side gave, or that its HTTP status means.
        kind: Kind,
        /// What it said.
        message: String,
    },
    /// The other side breaks the protocol.
    #[error("{at} answered something unexpected: {what}")]
    Protocol {
        /// The socket or URL.
        at: String,
        /// What was wrong.
        what: String,
    },
    /// The content changed between two parts of one transfer.
    #[error("the bytes at {at} changed during the transfer")]
    Changed {
        /// The URL.
        at: String,
    },
    /// More bytes than announced.
    #[error("{at} has more than the {limit} bytes announced")]
    TooLong {
        /// The URL.
        at: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// A read past the end of a piece.
    #[error("bytes {offset}..{end} are outside of {len} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// End of the range asked for.
        end: u64,
        /// Bytes there are.
        len: u64,
    },
    /// A socket path that the system cannot bind.
    #[error("cannot listen on {path}: {why}")]
    Bind {
        /// The path.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// The receiving side of a transfer went away.
    #[error("the transfer was stopped")]
    Stopped,
    /// A local file operation failed.
    #[error("{doing}: {source}")]
    Io {
        /// What was tried, with the path.
        doing: String,
        /// The system's error.
        source: io::Error,
    },
}

impl DataError {
    /// Wraps a local file error with what was tried.
    pub fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }

    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Unreachable { .. } | Self::Silent { .. } | Self::Stopped => Kind::Transport,
            Self::UnknownToken { .. }
            | Self::Protocol { .. }
            | Self::Changed { .. }
            | Self::TooLong { .. }
            | Self::OutOfRange { .. } => Kind::Data,
            Self::Refused { kind, .. } => *kind,
            Self::Bind { .. } => Kind::Config,
            Self::Io { source, .. } => io_kind(source),
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::UnknownToken { .. } => {
                "ask the hub for a new lease, or offer the bytes again".into()
            }
            Self::Unreachable { at, .. } | Self::Silent { at, .. } => {
                format!("check that the process behind {at} runs; the transfer is tried again")
            }
            Self::Refused { at, .. } => format!("see the log of the process behind {at}"),
            Self::Protocol { .. } => "use hub and spokes of one release".into(),
            Self::Changed { .. } => "publish the bytes under a new URL and offer them again".into(),
            Self::TooLong { .. } => "offer the piece with its true size".into(),
            Self::OutOfRange { .. } => "read within the piece".into(),
            Self::Bind { .. } => "choose a shorter or another repository path".into(),
            Self::Stopped => "none: it goes on after the restart".into(),
            Self::Io { source, .. } if io_kind(source) == Kind::Capacity => {
                "free space on that disk; the work goes on by itself".into()
            }
            Self::Io { .. } => "check the disk, the path and its permissions".into(),
        }
    }
}

/// A full disk passes once space is free; other local errors need a look.
fn io_kind(e: &io::Error) -> Kind {
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::Capacity,
        _ => Kind::Fatal,
    }
}
