use std::io;
use std::path::PathBuf;
use std::time::Duration;

use lotus_car::{CarError, ExportError, PackError};
use lotus_deals::mk20::Refusal;
use lotus_runtime::Fault;
use lotus_types::Kind;

/// Why a client command fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("key file {}: {why}", path.display())]
    Key { path: PathBuf, why: String },
    #[error("{given:?} is not {wanted}")]
    Argument { given: String, wanted: &'static str },
    #[error("no answer from {url}: {why}")]
    Unreachable { url: String, why: String },
    #[error("the provider refuses ({}): {}{}", .0.code, .0.error, at(.0))]
    Refused(Refusal),
    #[error("{url} answers with status {status}: {text}")]
    Http {
        url: String,
        status: u16,
        text: String,
    },
    #[error("the answer of {url} is not understood: {why}")]
    Answer { url: String, why: String },
    #[error("what came is {got}, not {wanted}")]
    Wrong { got: String, wanted: String },
    #[error("the deal is over ({state}): {reason}")]
    DealOver { state: String, reason: String },
    #[error(transparent)]
    Pack(Box<PackError>),
    #[error(transparent)]
    Car(Box<CarError>),
    #[error(transparent)]
    Export(Box<ExportError>),
}

fn at(r: &Refusal) -> String {
    if r.field.is_empty() {
        String::new()
    } else {
        format!(" (field {})", r.field)
    }
}

impl ClientError {
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }

    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::File { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull => Kind::Capacity,
                io::ErrorKind::NotFound => Kind::Data,
                _ => Kind::Fatal,
            },
            Self::Key { .. } | Self::Argument { .. } => Kind::Config,
            Self::Unreachable { .. } => Kind::Transport,
            Self::Refused(r) => match r.code {
                429 | 507 => Kind::Capacity,
                500..=599 => Kind::Transport,
                401 => Kind::Config,
                _ => Kind::Data,
            },
            Self::Http { status, .. } => match status {
                408 | 429 | 500..=599 => Kind::Transport,
                _ => Kind::Data,
            },
            Self::Answer { .. } | Self::Wrong { .. } | Self::DealOver { .. } => Kind::Data,
            Self::Pack(e) => e.kind(),
            Self::Car(e) => e.kind(),
            Self::Export(e) => e.kind(),
        }
    }

    pub(crate) fn fix(&self) -> String {
        match self {
            Self::File { .. } => "check the path, its permissions and the space on the disk".into(),
            Self::Key { .. } => "give a secp256k1 key as `lotus wallet export` writes it, or let one be made at a new path".into(),
            Self::Argument { .. } => "see --help".into(),
            Self::Unreachable { .. } => "check the URL, and that the provider's service runs".into(),
            Self::Refused(r) => r.fix.clone(),
            Self::Http { .. } | Self::Answer { .. } => "check that the URL is that of the right service".into(),
            Self::Wrong { .. } => "fetch it from another provider".into(),
            Self::DealOver { .. } => "propose a new deal".into(),
            Self::Pack(e) => e.fix(),
            Self::Car(e) => e.fix(),
            Self::Export(e) => e.fix(),
        }
    }

    /// When to try again, if the other side says so.
    pub(crate) const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused(r) if r.retry_after_secs > 0 => {
                Some(Duration::from_secs(r.retry_after_secs))
            }
            _ => None,
        }
    }
}

impl From<ClientError> for Fault {
    fn from(e: ClientError) -> Self {
        Self::new(e.kind(), e.to_string(), e.fix())
    }
}

macro_rules! boxed {
    ($($variant:ident($error:ty)),*) => {$(
        impl From<$error> for ClientError {
            fn from(e: $error) -> Self {
                Self::$variant(Box::new(e))
            }
        }
    )*};
}

boxed!(Pack(PackError), Car(CarError), Export(ExportError));
