use cid::Cid;
use lotus_journal::JournalError;
use lotus_node_client::api::TipSetKey;
use lotus_types::{Address, Kind};

/// Why the chain did not do or answer something. The text is Lotus' where Lotus has one, because
/// clients print it.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The store failed, or another process has it open.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The file system failed.
    #[error("{what}: {error}")]
    Io {
        /// What was being done.
        what: String,
        /// The system's words.
        error: std::io::Error,
    },
    /// The repo holds a chain that was made with other constants.
    #[error("the chain in this repo was made with another {what}: {stored} there, {given} now")]
    Mismatch {
        /// What differs.
        what: &'static str,
        /// In the repo.
        stored: String,
        /// In the settings.
        given: String,
    },
    /// A constant that can not be.
    #[error("impossible setting: {0}")]
    Policy(String),
    /// A stored record does not decode.
    #[error("the stored chain is damaged: {0}")]
    Damaged(String),
    /// No such tipset.
    #[error("loading tipset {0}: block not found")]
    NoTipSet(TipSetKey),
    /// No such object.
    #[error("blockstore: block not found: {0}")]
    NoObject(Cid),
    /// The state of that tipset was dropped.
    #[error("state of the tipset at height {0} is pruned")]
    Pruned(i64),
    /// The messages of that block were dropped.
    #[error("messages of the block at height {0} are pruned")]
    PrunedMessages(i64),
    /// No such actor.
    #[error("actor not found: {0}")]
    NoActor(Address),
    /// Not in the state.
    #[error("{0} not found")]
    NotFound(String),
    /// The mempool's refusal.
    #[error("{0}")]
    Mempool(String),
    /// A block that is not valid.
    #[error("block refused: {0}")]
    Block(String),
    /// Randomness that does not exist.
    #[error("{0}")]
    Randomness(String),
    /// The wallet has no such key.
    #[error("key not found: no key for {0} in the wallet")]
    NoKey(Address),
    /// A fault command took effect.
    #[error("{0}")]
    Fault(String),
    /// A wrong argument.
    #[error("{0}")]
    Invalid(String),
    /// The chain is being stopped.
    #[error("the devnet is stopping")]
    Stopping,
}

impl ChainError {
    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Journal(e) => e.kind(),
            Self::Io { .. } | Self::Damaged(_) => Kind::Fatal,
            Self::Mismatch { .. } | Self::Policy(_) | Self::NoKey(_) => Kind::Config,
            Self::Fault(_) | Self::Stopping => Kind::Transport,
            Self::NoTipSet(_)
            | Self::NoObject(_)
            | Self::Pruned(_)
            | Self::PrunedMessages(_)
            | Self::NoActor(_)
            | Self::NotFound(_)
            | Self::Mempool(_)
            | Self::Block(_)
            | Self::Randomness(_) => Kind::Chain,
            Self::Invalid(_) => Kind::Data,
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Journal(e) => e.fix(),
            Self::Io { .. } => "check the disk and the repo's permissions".into(),
            Self::Mismatch { .. } => {
                "start with the settings the chain was made with, or give another --repo".into()
            }
            Self::Policy(_) => "correct the setting".into(),
            Self::Damaged(_) => "remove the repo and start a new chain".into(),
            Self::NoKey(_) => "import the key, or sign with another address".into(),
            Self::Pruned(_) | Self::PrunedMessages(_) => {
                "ask about a tipset within finality of the head".into()
            }
            Self::Fault(_) | Self::Stopping => "try again later".into(),
            Self::Mempool(_) | Self::Block(_) => {
                "correct the message or block; see the text".into()
            }
            Self::NoTipSet(_)
            | Self::NoObject(_)
            | Self::NoActor(_)
            | Self::NotFound(_)
            | Self::Randomness(_)
            | Self::Invalid(_) => "correct the request".into(),
        }
    }
}
