use std::fmt;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

/// Who must act on an error, and so what a caller does with it. Every error enum of the
/// workspace maps its variants to a kind with `kind()` and tells the operator what to do with
/// `fix()`. The hub API carries the kind in its gRPC details; nobody matches strings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A peer did not answer, or not in time. Retry with back-off; no state may change for it.
    Transport,
    /// A limit or quota is reached. Retry after the time that the error names.
    Capacity,
    /// The chain says no: evidence on which a state machine may act.
    Chain,
    /// The input is wrong: bad bytes, a wrong commitment, an invalid field.
    Data,
    /// A configuration or installation mistake. A restart does not help until someone fixes it.
    Config,
    /// A local fault, such as a full disk or a broken invariant.
    Fatal,
}

impl Kind {
    /// Process exit code, after sysexits.h: 75 (temporary, restart me), 78 (configuration, do
    /// not restart), 65 (bad input), 69 (the chain refused), 70 (internal).
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Transport | Self::Capacity => 75,
            Self::Config => 78,
            Self::Data => 65,
            Self::Chain => 69,
            Self::Fatal => 70,
        }
    }

    /// [`Kind::code`] as what `main` returns.
    #[must_use]
    pub fn exit_code(self) -> ExitCode {
        ExitCode::from(self.code())
    }

    /// Whether trying the same thing again, later, can succeed without anybody's help.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::Transport | Self::Capacity)
    }

    /// The lower-case name used on the wire, in logs and in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Transport => "transport",
            Self::Capacity => "capacity",
            Self::Chain => "chain",
            Self::Data => "data",
            Self::Config => "config",
            Self::Fatal => "fatal",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
