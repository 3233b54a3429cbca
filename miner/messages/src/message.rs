use cid::Cid;
use lotus_journal::Map;
use lotus_node_client::api::{SignedMessage, TipSetKey};
use lotus_types::{Address, Epoch, TokenAmount};
use serde::{Deserialize, Serialize};

use crate::SendError;

/// What a message is for. Sets its place in the queue of its address and its fee limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MessageKind {
    /// WindowPoSt: goes before everything else.
    Post,
    /// Declarations of faults and recoveries: they have a cut-off.
    Declare,
    /// Prove-commit: a late one loses the pre-commit deposit.
    Commit,
    /// Pre-commit.
    PreCommit,
    /// Everything else.
    Other,
}

impl MessageKind {
    /// Name in logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Post => "post",
            Self::Declare => "declare",
            Self::Commit => "commit",
            Self::PreCommit => "pre_commit",
            Self::Other => "other",
        }
    }
}

/// A message to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SendRequest {
    /// Idempotency key: the first request with a key makes the message; a later one, after a
    /// crash too, gets that same message back and its other fields are ignored.
    pub key: String,
    /// Paying address, in ID or key form. The node's wallet must hold its key.
    pub from: Address,
    /// Receiving actor.
    pub to: Address,
    /// Method number.
    pub method: u64,
    /// CBOR parameters.
    pub params: Vec<u8>,
    /// Tokens that go with it.
    pub value: TokenAmount,
    /// What it is for.
    pub kind: MessageKind,
    /// Limit of gas limit times fee cap; without it the kind's limit from the settings holds.
    pub max_fee: Option<TokenAmount>,
}

/// A receipt at the confidence that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Landed {
    /// The message on chain.
    pub cid: Cid,
    /// Height of the tipset that carries the receipt.
    pub height: Epoch,
    /// That tipset.
    pub tipset: TipSetKey,
    /// Exit code of the actor: 0 is success.
    pub exit_code: i64,
    /// CBOR return value.
    pub return_data: Vec<u8>,
    /// Gas used.
    pub gas_used: i64,
}

/// Where a message stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MessageStatus {
    /// Its key.
    pub key: String,
    /// The message.
    pub cid: Cid,
    /// What it is for.
    pub kind: MessageKind,
    /// Sending address in key form.
    pub from: Address,
    /// Its nonce.
    pub nonce: u64,
    /// When it was journaled, Unix milliseconds.
    pub created_unix_ms: u64,
    /// Height of its receipt, if it had one at the confidence of the settings when last looked.
    pub landed: Option<Epoch>,
    /// Another message took its nonce: it will never be on chain.
    pub replaced: bool,
    /// Why the node did not take it at the last push.
    pub last_error: Option<String>,
}

/// The journaled message.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) cid: Cid,
    pub(crate) kind: MessageKind,
    /// Sending address in key form, as text.
    pub(crate) from: String,
    pub(crate) nonce: u64,
    /// CBOR of the signed message: the same bytes for ever. Emptied once no push can be needed.
    #[serde(with = "serde_bytes")]
    signed: Vec<u8>,
    /// Head when it was signed: the search for its receipt goes back to here.
    pub(crate) sent_at: Epoch,
    pub(crate) created_unix_ms: u64,
    /// Height of the receipt, once it had the confidence of the settings.
    pub(crate) landed: Option<Epoch>,
    pub(crate) replaced: bool,
}

impl Record {
    pub(crate) fn new(
        kind: MessageKind,
        signed: &SignedMessage,
        sent_at: Epoch,
        created_unix_ms: u64,
    ) -> Self {
        Self {
            cid: signed.cid(),
            kind,
            from: signed.message.from.to_string(),
            nonce: signed.message.nonce,
            signed: signed.to_cbor(),
            sent_at,
            created_unix_ms,
            landed: None,
            replaced: false,
        }
    }

    /// The message is final: it is remembered, its bytes are not.
    pub(crate) fn finish(&mut self) {
        self.signed = Vec::new();
    }

    pub(crate) fn signed(&self, key: &str) -> Result<SignedMessage, SendError> {
        SignedMessage::from_cbor(&self.signed).map_err(|e| SendError::Broken {
            key: key.into(),
            why: format!("the journaled message does not decode: {e}"),
        })
    }
}

/// Every message ever sent, by key.
pub(crate) const MESSAGES: Map<String, Record> = Map::new("messages.sent");
/// Keys of the messages that are not final yet, ordered by sending address and nonce.
pub(crate) const OPEN: Map<(String, u64), String> = Map::new("messages.open");
/// The nonce after the highest that was journaled, by sending address.
pub(crate) const NEXT_NONCE: Map<String, u64> = Map::new("messages.next_nonce");
