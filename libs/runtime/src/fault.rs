use lotus_types::Kind;

/// Why a service or a process stopped: what happened, who must act, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// Who must act; sets the exit code.
    pub kind: Kind,
    /// What happened, in one line.
    pub message: String,
    /// What the operator can do.
    pub fix: String,
}

impl Fault {
    /// A fault of this kind.
    pub fn new(kind: Kind, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            fix: fix.into(),
        }
    }

    /// A listener that can not be bound to the configured address.
    #[must_use]
    pub fn bind(addr: &impl std::fmt::Display, key: &str, e: &std::io::Error) -> Self {
        Self::new(
            Kind::Config,
            format!("can not listen on {addr}: {e}"),
            format!(
                "free the port (`ss -ltnp` shows who has it), or set another {key}; port 0 picks a free one"
            ),
        )
    }
}

impl From<std::io::Error> for Fault {
    fn from(e: std::io::Error) -> Self {
        let (kind, fix) = match e.kind() {
            std::io::ErrorKind::StorageFull => (Kind::Capacity, "free disk space"),
            std::io::ErrorKind::PermissionDenied => (
                Kind::Config,
                "give this user access, or run as the user that has it",
            ),
            _ => (Kind::Fatal, "see the log for what was being done"),
        };
        Self::new(kind, e.to_string(), fix)
    }
}

impl From<lotus_settings::SettingsError> for Fault {
    fn from(e: lotus_settings::SettingsError) -> Self {
        Self::new(e.kind(), e.to_string(), e.fix())
    }
}
