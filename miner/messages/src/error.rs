use lotus_journal::JournalError;
use lotus_node_client::NodeError;
use lotus_types::{Kind, TokenAmount};

use crate::{MessageKind, OverCap, Stop};

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
    #[error(
        "{from} has {available} FIL to spend, {key} needs {needed} FIL: {} FIL are missing",
        missing(needed, available)
    )]
    Funds {
        /// Key of the request.
        key: String,
        /// Sending address.
        from: String,
        /// What it has, less what messages under way may take.
        available: TokenAmount,
        /// Value and highest fee.
        needed: TokenAmount,
    },
    /// Executed on the present state, the message fails for want of funds: those of the sender,
    /// with messages that this hub does not know of, or those of the receiver.
    #[error("{who} lacks the funds for {key}: {why}")]
    Unfunded {
        /// Key of the request.
        key: String,
        /// Whose funds are short.
        who: String,
        /// The node's words: they have the amounts.
        why: String,
    },
    /// The sending address would go below what it keeps for WindowPoSt.
    #[error(
        "{from} has {above} FIL above what it keeps for WindowPoSt, {key} needs {needed} FIL: {} \
         FIL are missing",
        missing(needed, above)
    )]
    Floor {
        /// Key of the request.
        key: String,
        /// Sending address.
        from: String,
        /// What it has above its floor, less what messages under way may take.
        above: TokenAmount,
        /// Value and highest fee.
        needed: TokenAmount,
    },
    /// The day's fees would go over their limit.
    #[error(
        "the fees of a day are limited to {} FIL: {} FIL are spent, messages under way may cost \
         {} FIL, {key} up to {needed} FIL",
        over.cap, over.spent, over.reserved
    )]
    DailyCap {
        /// Key of the request.
        key: String,
        /// The limit, and what is used of it.
        over: Box<OverCap>,
        /// Highest fee of this message.
        needed: TokenAmount,
    },
    /// Messages of this kind are stopped.
    #[error("{} messages are stopped until epoch {}: {}", kind.as_str(), stop.next_try, stop.why)]
    Halted {
        /// The kind.
        kind: MessageKind,
        /// Why, and until when.
        stop: Box<Stop>,
    },
    /// No address that may pay has its key in the node's wallet, or the remote one.
    #[error("no address that may pay for {key} has its key in the wallet that signs")]
    NoPayer {
        /// Key of the request.
        key: String,
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

/// What is missing to an amount, never less than nothing.
fn missing(needed: &TokenAmount, there: &TokenAmount) -> TokenAmount {
    (needed - there).max(TokenAmount::default())
}

impl SendError {
    /// The request waits for money, and nothing else is wrong with it.
    #[must_use]
    pub const fn is_short(&self) -> bool {
        matches!(
            self,
            Self::Funds { .. } | Self::Unfunded { .. } | Self::Floor { .. }
        )
    }

    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Node(e) => e.kind(),
            Self::Journal(e) => e.kind(),
            Self::Refused { .. } | Self::Replaced { .. } => Kind::Chain,
            Self::FeeLimit { .. }
            | Self::Funds { .. }
            | Self::Unfunded { .. }
            | Self::Floor { .. }
            | Self::DailyCap { .. }
            | Self::Halted { .. }
            | Self::QueueFull(_) => Kind::Capacity,
            Self::NoPayer { .. } => Kind::Config,
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
                "it is tried again while the base fee falls; or raise the limit in [messages.fees]"
                    .into()
            }
            Self::Funds { from: who, .. } | Self::Unfunded { who, .. } => {
                format!("send FIL to {who}; it is tried again")
            }
            Self::Floor { from, .. } => format!(
                "send FIL to {from}, or lower messages.fees.floor_nanofil; it is tried again"
            ),
            Self::DailyCap { .. } => {
                "it is tried again when messages have landed for less, or the \
                 next day; or raise messages.fees.max_per_day_nanofil"
                    .into()
            }
            Self::Halted { kind, .. } => format!(
                "it is tried again then; `lotus-miner messages resume {}` tries at once",
                kind.as_str()
            ),
            Self::NoPayer { .. } => "import the key of the worker or of a control address into \
                 the node's wallet, or the one of [node] wallet; `lotus-miner actor control list` \
                 shows them"
                .into(),
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
