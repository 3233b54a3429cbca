use std::time::Duration;

use lotus_types::Kind;
use prost::Message as _;
use tonic::{Code, Status};

use crate::v1::ErrorDetail;

/// Why a call to the hub failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HubError {
    /// The address in the configuration is of no form we know.
    #[error(
        "hub address {addr:?} is none of unix:/path/hub.sock, https://host:port, listen:ip:port"
    )]
    BadAddress {
        /// What was configured.
        addr: String,
    },
    /// The port that the hub is to dial is not to be had.
    #[error("can not listen on {port} for the hub: {why}")]
    Port {
        /// What was configured.
        port: String,
        /// The system's words.
        why: String,
    },
    /// Nobody answers at the address, or not in time.
    #[error("hub {addr} gave no answer: {why}")]
    Silent {
        /// The configured address.
        addr: String,
        /// The transport's words.
        why: String,
    },
    /// This spoke has no identity that it could show, or cannot keep one.
    #[error("{message}")]
    Identity {
        /// What is wrong.
        message: String,
        /// What to do.
        fix: String,
    },
    /// The hub speaks another version.
    #[error("hub speaks API {hub}, this binary speaks {ours}")]
    ApiMismatch {
        /// The hub's version.
        hub: String,
        /// Our version.
        ours: String,
    },
    /// The hub refused the call.
    #[error("hub: {message}")]
    Refused {
        /// Who must act.
        kind: Kind,
        /// The gRPC code, for the few callers that tell "not found" from the rest.
        code: i32,
        /// What it said.
        message: String,
        /// What to do.
        fix: String,
        /// When to try again, if the hub says so.
        retry_after: Option<Duration>,
    },
}

impl HubError {
    /// Who must act.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::BadAddress { .. }
            | Self::Port { .. }
            | Self::ApiMismatch { .. }
            | Self::Identity { .. } => Kind::Config,
            Self::Silent { .. } => Kind::Transport,
            Self::Refused { kind, .. } => *kind,
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::BadAddress { .. } => {
                "set hub.addr to the hub's run/hub.sock as unix:/path, or to https://host:port"
                    .into()
            }
            Self::Port { .. } => {
                "name a free port of this host in hub.addr: each service has its own, and each \
                 process one service"
                    .into()
            }
            Self::Silent { addr, .. } if addr.starts_with("listen:") => {
                format!("name this host's address with the port of {addr} in the hub's api.dial")
            }
            Self::Silent { addr, .. } => {
                format!("start `lotus-miner run`, or correct hub.addr (now {addr})")
            }
            Self::ApiMismatch { hub, .. } => {
                format!("install a release built for hub API {hub}")
            }
            Self::Refused { fix, .. } | Self::Identity { fix, .. } => fix.clone(),
        }
    }

    /// Whether the hub does not know what was asked for.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if *code == Code::NotFound as i32)
    }

    /// When to try again, if the hub says so.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// A status that carries its kind, for servers.
#[must_use]
pub fn status(
    kind: Kind,
    message: impl Into<String>,
    fix: impl Into<String>,
    retry_after: Option<Duration>,
) -> Status {
    let code = match kind {
        Kind::Transport => Code::Unavailable,
        Kind::Capacity => Code::ResourceExhausted,
        Kind::Chain => Code::FailedPrecondition,
        Kind::Data => Code::InvalidArgument,
        Kind::Config => Code::PermissionDenied,
        Kind::Fatal => Code::Internal,
    };
    with_code(code, kind, message, fix, retry_after)
}

/// [`status`] with a gRPC code of its own, such as `NOT_FOUND`.
pub fn with_code(
    code: Code,
    kind: Kind,
    message: impl Into<String>,
    fix: impl Into<String>,
    retry_after: Option<Duration>,
) -> Status {
    let detail = ErrorDetail {
        kind: kind.as_str().into(),
        retry_after_ms: retry_after.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
        fix: fix.into(),
    };
    Status::with_details(code, message, detail.encode_to_vec().into())
}

impl From<Status> for HubError {
    fn from(s: Status) -> Self {
        let detail = ErrorDetail::decode(s.details()).unwrap_or_default();
        let named = [
            Kind::Transport,
            Kind::Capacity,
            Kind::Chain,
            Kind::Data,
            Kind::Config,
            Kind::Fatal,
        ]
        .into_iter()
        .find(|k| k.as_str() == detail.kind);
        // A status without our detail comes from the transport or from the library, not the hub.
        let kind = named.unwrap_or(match s.code() {
            Code::InvalidArgument | Code::NotFound | Code::OutOfRange => Kind::Data,
            Code::ResourceExhausted => Kind::Capacity,
            Code::PermissionDenied | Code::Unauthenticated | Code::Unimplemented => Kind::Config,
            _ => Kind::Transport,
        });
        let fix = match s.code() {
            // The library's own, which has no detail.
            Code::Unimplemented if detail.fix.is_empty() => {
                "upgrade the hub: it does not have this method".into()
            }
            _ => detail.fix,
        };
        Self::Refused {
            kind,
            code: s.code() as i32,
            message: s.message().into(),
            fix,
            retry_after: (detail.retry_after_ms > 0)
                .then(|| Duration::from_millis(detail.retry_after_ms)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_survives_the_wire() {
        for kind in [
            Kind::Transport,
            Kind::Capacity,
            Kind::Chain,
            Kind::Data,
            Kind::Config,
            Kind::Fatal,
        ] {
            let after = Some(Duration::from_millis(1500));
            let e = HubError::from(status(kind, "what", "do this", after));
            assert_eq!((e.kind(), e.fix().as_str()), (kind, "do this"));
            assert_eq!(e.retry_after(), after);
        }
        assert_eq!(
            HubError::from(Status::unavailable("x")).kind(),
            Kind::Transport
        );
        let gone = with_code(Code::NotFound, Kind::Data, "no such", "", None);
        assert!(HubError::from(gone).is_not_found());
        let old = HubError::from(Status::unimplemented(""));
        assert_eq!(old.kind(), Kind::Config);
        assert!(old.fix().contains("upgrade the hub"), "{}", old.fix());
    }
}
