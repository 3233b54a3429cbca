use std::time::Duration;

use lotus_types::Kind;

/// Why a call to the node failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// The node could not be reached, or the connection broke.
    #[error("node {endpoint}: {method}: {why}")]
    Transport {
        /// Where the node should be.
        endpoint: String,
        /// The call.
        method: String,
        /// What happened.
        why: String,
    },
    /// The node did not answer in time.
    #[error("node {endpoint}: {method}: no answer within {waited:?}")]
    Timeout {
        /// Where the node is.
        endpoint: String,
        /// The call.
        method: String,
        /// How long the call waited.
        waited: Duration,
    },
    /// The node answered with an error.
    #[error("{method}: {message} (code {code})")]
    Rpc {
        /// The call.
        method: String,
        /// JSON-RPC code: 1 is Lotus' code for an error of the call itself.
        code: i64,
        /// The node's words.
        message: String,
    },
    /// The answer does not have the form that Lotus gives it.
    #[error("{method}: unexpected answer: {why}")]
    Decode {
        /// The call.
        method: String,
        /// What is wrong with it.
        why: String,
    },
    /// The token is missing, wrong, or lacks a permission.
    #[error("node {endpoint} refuses the token: {why}")]
    Auth {
        /// Where the node is.
        endpoint: String,
        /// The node's words.
        why: String,
    },
    /// The configured endpoint can not be read.
    #[error("no usable node endpoint: {why}")]
    BadEndpoint {
        /// What is wrong with it. Never contains the token.
        why: String,
    },
    /// The remote wallet did not answer.
    #[error("remote wallet {endpoint}: {method}: {why}")]
    WalletSilent {
        /// Where the wallet should be.
        endpoint: String,
        /// The call.
        method: String,
        /// What happened.
        why: String,
    },
    /// The remote wallet refused a call, or what it answered is of no use.
    #[error("remote wallet {endpoint} refuses {method}: {why}")]
    WalletRefused {
        /// Where the wallet is.
        endpoint: String,
        /// The call.
        method: String,
        /// The wallet's words.
        why: String,
    },
    /// The remote wallet can not sign for an address of this kind.
    #[error("a remote wallet can not sign for {address}: f4 addresses sign in another form")]
    WalletAddress {
        /// The address.
        address: String,
    },
    /// `[node] wallet` can not be read.
    #[error("no usable remote wallet: {why}")]
    BadWallet {
        /// What is wrong with it. Never contains the token.
        why: String,
    },
}

/// JSON-RPC code of a call that the node does not know.
const METHOD_NOT_FOUND: i64 = -32601;

impl NodeError {
    /// Whether the chain has no such address. Lotus words it as an error of the call, in whose
    /// middle its `ErrActorNotFound` stands.
    #[must_use]
    pub fn is_unknown_actor(&self) -> bool {
        matches!(self, Self::Rpc { message, .. } if message.contains("actor not found"))
    }

    /// Whether the node refuses a message because its nonce is on chain already. Source: lotus,
    /// chain/messagepool, `ErrNonceTooLow`.
    #[must_use]
    pub fn is_nonce_taken(&self) -> bool {
        matches!(self, Self::Rpc { message, .. } if message.contains("nonce too low"))
    }

    /// Who must act.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Transport { .. } | Self::Timeout { .. } | Self::WalletSilent { .. } => {
                Kind::Transport
            }
            Self::Rpc { code, .. } if *code == METHOD_NOT_FOUND => Kind::Config,
            Self::Rpc { .. } => Kind::Chain,
            Self::Decode { .. } => Kind::Data,
            Self::Auth { .. }
            | Self::BadEndpoint { .. }
            | Self::WalletRefused { .. }
            | Self::WalletAddress { .. }
            | Self::BadWallet { .. } => Kind::Config,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Transport { endpoint, .. } => {
                format!("start the full node, or correct [node] api (now {endpoint})")
            }
            Self::Timeout { .. } => {
                "see whether the node is in sync and not overloaded; raise [node] call_secs".into()
            }
            Self::Rpc { code, .. } if *code == METHOD_NOT_FOUND => {
                "upgrade the full node: it lacks a call of the Lotus API version 1".into()
            }
            Self::Rpc { .. } => "act on the node's message".into(),
            Self::Decode { .. } => {
                "use a full node that serves the Lotus API version 1 at /rpc/v1".into()
            }
            Self::Auth { .. } => {
                "make a token with `lotus auth create-token --perm admin`, or take the one in the \
                 node's repo (file `token`), and put TOKEN:MULTIADDR into [node] api or \
                 FULLNODE_API_INFO"
                    .into()
            }
            Self::BadEndpoint { .. } => {
                "set [node] api or FULLNODE_API_INFO to TOKEN:MULTIADDR, such as \
                 eyJhb…:/ip4/127.0.0.1/tcp/1234/http, or [node] repo to the node's repo"
                    .into()
            }
            Self::WalletSilent { endpoint, .. } => format!(
                "start the remote wallet (`lotus-wallet run`), or correct [node] wallet (now \
                 {endpoint})"
            ),
            Self::WalletRefused { .. } => {
                "act on the wallet's words: import the key that it lacks, or put a token from \
                 `lotus-wallet get-api-key` into [node] wallet"
                    .into()
            }
            Self::WalletAddress { .. } => "send from an f1 or f3 address".into(),
            Self::BadWallet { .. } => "set [node] wallet to TOKEN:MULTIADDR or TOKEN:URL, such as \
                 eyJhb…:http://127.0.0.1:1777, or leave it empty for the node's own wallet"
                .into(),
        }
    }

    /// The error of a call that the node does not have.
    #[must_use]
    pub fn no_method(name: &str) -> Self {
        Self::Rpc {
            method: name.into(),
            code: METHOD_NOT_FOUND,
            message: format!("method 'Filecoin.{name}' not found"),
        }
    }
}
