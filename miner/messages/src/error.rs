use lotus_journal::JournalError;
use lotus_node_client::NodeError;
use lotus_types::{Kind, TokenAmount};

/// Why a message was not sent, or its receipt not seen.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The node did not answer or refused a call that decides nothing about the message.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The journal can not be written. Nothing was pushed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Executed on the present state, the message fails: it was not signed.
    #[error("the chain would refuse {key}: {why}")]
    Refused {
        /// Key of the request.
        key: String,
        /// Exit code of the actor.
        exit_code: i64,
        /// The node's words.
        why: String,
    },
    /// The base fee is above what the limit allows.
    #[error("{key} would cost up to {needed} FIL in fees, the limit is {limit} FIL")]
    FeeLimit {
        /// Key of the request.
        key: String,
        /// Base fee times gas limit.
        needed: TokenAmount,
        /// The limit.
        limit: TokenAmount,
    },
    /// The sending address can not pay value and fee.
    #[error("{from} has {balance} FIL, {key} needs {needed} FIL")]
    Funds {
        /// Key of the request.
        key: String,
        /// Sending address.
        from: String,
        /// What it has.
        balance: TokenAmount,
        /// Value and highest fee.
        needed: TokenAmount,
    },
    /// Too many requests wait.
    #[error("{0} messages are waiting to be sent")]
    QueueFull(u64),
    /// The request or wait took longer than the settings allow.
    #[error("{what} {key} took longer than {secs} s")]
    TooSlow {
        /// What was done.
        what: &'static str,
        /// Key of the request.
        key: String,
        /// The limit.
        secs: u64,
    },
    /// The hub stops.
    #[error("stopping")]
    Stopped,
    /// Nothing was ever sent under this key.
    #[error("no message has the key {0}")]
    Unknown(String),
    /// Another message with the same nonce is on chain, so this one never will be.
    #[error("another message of {from} took nonce {nonce}, so {key} can not land")]
    Replaced {
        /// Key of the request.
        key: String,
        /// Sending address.
        from: String,
        /// The nonce.
        nonce: u64,
    },
    /// The key holds a zero byte, is empty, or is longer than 256 bytes.
    #[error("{0:?} can not be a message key")]
    BadKey(String),
    /// A value that does not encode, or a wallet that signed something else.
    #[error("{key}: {why}")]
    Broken {
        /// Key of the request.
        key: String,
        /// What is wrong.
        why: String,
    },
}

impl SendError {
    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Node(e) => e.kind(),
            Self::Journal(e) => e.kind(),
            Self::Refused { .. } | Self::Replaced { .. } => Kind::Chain,
            Self::FeeLimit { .. } | Self::Funds { .. } | Self::QueueFull(_) => Kind::Capacity,
            Self::TooSlow { .. } | Self::Stopped => Kind::Transport,
            Self::Unknown(_) | Self::BadKey(_) | Self::Broken { .. } => Kind::Fatal,
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Node(e) => e.fix(),
            Self::Journal(e) => e.fix(),
            Self::Refused { .. } => {
                "the reason is the actor's; the step that sent it looks at the chain again".into()
            }
            Self::FeeLimit { .. } => {
                "it is tried again while the base fee falls; or raise the limit in [messages]"
                    .into()
            }
            Self::Funds { from, .. } => format!("send FIL to {from}; it is tried again"),
            Self::QueueFull(_) => "it is tried again; see whether the node answers".into(),
            Self::TooSlow { .. } => "it is tried again; see whether the chain advances".into(),
            Self::Stopped => "start the hub again: the message is journaled".into(),
            Self::Replaced { from, .. } => format!(
                "use {from} in this hub alone: another program sends from it; the step is sent anew"
            ),
            Self::Unknown(_) | Self::BadKey(_) | Self::Broken { .. } => {
                "report this with the log: it is a defect of the hub or of the node".into()
            }
        }
    }
}
