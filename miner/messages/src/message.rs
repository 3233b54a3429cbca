use cid::Cid;
use lotus_journal::{JournalError, Map, Tx};
use lotus_node_client::api::{SignedMessage, TipSetKey};
use lotus_types::{Address, Epoch, TokenAmount};
use serde::{Deserialize, Serialize};

use crate::SendError;
use crate::fees::{Fees, Gas, Purse};

/// What a message is for. Sets its place in the queue of its address, who pays, and its limits.
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
    /// Publishing of deals.
    Publish,
    /// Termination of sectors.
    Terminate,
    /// What an operator ordered after seeing its cost: neither the day's limit nor a floor holds
    /// it back, and no stop.
    Operator,
    /// Everything else.
    Other,
}

impl MessageKind {
    /// Every kind, the most urgent first.
    pub const ALL: [Self; 8] = [
        Self::Post,
        Self::Declare,
        Self::Commit,
        Self::PreCommit,
        Self::Publish,
        Self::Terminate,
        Self::Operator,
        Self::Other,
    ];

    /// Name in commands, logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Post => "post",
            Self::Declare => "declare",
            Self::Commit => "commit",
            Self::PreCommit => "pre_commit",
            Self::Publish => "publish",
            Self::Terminate => "terminate",
            Self::Operator => "operator",
            Self::Other => "other",
        }
    }

    /// The kind of this name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.as_str() == name)
    }
}

/// Who pays for a message and signs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payer {
    /// One of the addresses that may act for this miner: chosen by the kind of the message, the
    /// settings, the balances and the keys in the node's wallet.
    Miner(Address),
    /// This address, in ID or key form. The node's wallet must hold its key.
    Address(Address),
}

/// A message to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SendRequest {
    /// Idempotency key: the first request with a key makes the message; a later one, after a
    /// crash too, gets that same message back and its other fields are ignored.
    pub key: String,
    /// Who pays.
    pub from: Payer,
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
    /// Limit of gas limit times fee cap; without it the limit of a message of its kind about one
    /// sector holds ([`crate::Sender::max_fee`] has those of batches).
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
    /// The message; its newest version, if it was replaced by fee.
    pub cid: Cid,
    /// What it is for.
    pub kind: MessageKind,
    /// Sending address in key form.
    pub from: Address,
    /// Its nonce.
    pub nonce: u64,
    /// Tokens that go with it.
    pub value: TokenAmount,
    /// The most that it can cost in fees.
    pub max_fee: TokenAmount,
    /// What it cost, once it has landed.
    pub fee: Option<TokenAmount>,
    /// Times that it was replaced by fee.
    pub replacements: u64,
    /// When it was journaled, Unix milliseconds.
    pub created_unix_ms: u64,
    /// Height of its receipt, if it had one at the confidence of the settings when last looked.
    pub landed: Option<Epoch>,
    /// Exit code of its receipt.
    pub exit_code: Option<i64>,
    /// Another message took its nonce: it will never be on chain.
    pub replaced: bool,
    /// Why the node did not take it at the last push.
    pub last_error: Option<String>,
}

/// A signed version of a message: all have the same nonce, so that one lands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Version {
    pub(crate) cid: Cid,
    pub(crate) gas: Gas,
}

/// The journaled message.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The versions that may have been pushed, the newest last; never empty.
    pub(crate) versions: Vec<Version>,
    pub(crate) kind: MessageKind,
    pub(crate) purse: Purse,
    /// Sending address in key form, as text.
    pub(crate) from: String,
    pub(crate) nonce: u64,
    pub(crate) value: TokenAmount,
    /// Limit on the fee of any version.
    pub(crate) limit: TokenAmount,
    /// CBOR of the newest version. Emptied once no push can be needed.
    #[serde(with = "serde_bytes")]
    signed: Vec<u8>,
    /// Head when it was first signed: the search for its receipt goes back to here.
    pub(crate) sent_at: Epoch,
    /// Head when the newest version was signed.
    pub(crate) signed_at: Epoch,
    pub(crate) created_unix_ms: u64,
    /// Height of the receipt, once it had the confidence of the settings.
    pub(crate) landed: Option<Epoch>,
    pub(crate) exit_code: Option<i64>,
    /// What it cost. Stays when a reorg removes the receipt: it is counted once.
    pub(crate) fee: Option<TokenAmount>,
    pub(crate) replaced: bool,
}

impl Record {
    pub(crate) fn new(
        kind: MessageKind,
        signed: &SignedMessage,
        limit: TokenAmount,
        sent_at: Epoch,
        created_unix_ms: u64,
    ) -> Self {
        Self {
            versions: vec![version(signed)],
            kind,
            purse: Purse::of(kind),
            from: signed.message.from.to_string(),
            nonce: signed.message.nonce,
            value: signed.message.value.clone(),
            limit,
            signed: signed.to_cbor(),
            sent_at,
            signed_at: sent_at,
            created_unix_ms,
            landed: None,
            exit_code: None,
            fee: None,
            replaced: false,
        }
    }

    /// A newer version of the same message.
    pub(crate) fn replace(&mut self, signed: &SignedMessage, at: Epoch) {
        self.versions.push(version(signed));
        self.signed = signed.to_cbor();
        self.signed_at = at;
    }

    /// The newest version.
    pub(crate) fn cid(&self) -> Cid {
        self.versions.last().map(|v| v.cid).unwrap_or_default()
    }

    /// The most that it can cost: later versions cost more.
    pub(crate) fn max_fee(&self) -> TokenAmount {
        self.versions
            .last()
            .map(|v| v.gas.max_fee())
            .unwrap_or_default()
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

    /// Writes the record and what [`OPEN`] says of it.
    pub(crate) fn put(&self, tx: &mut Tx, key: &str) -> Result<(), JournalError> {
        let slot = (self.from.clone(), self.nonce);
        if self.signed.is_empty() {
            tx.remove(&OPEN, &slot)?;
        } else {
            let open = Open {
                key: key.into(),
                purse: self.purse,
                kind: self.kind,
                value: self.value.clone(),
                max_fee: self.max_fee(),
                sent_at: self.sent_at,
                landed: self.landed.is_some(),
                charged: self.fee.is_some(),
            };
            tx.put(&OPEN, &slot, &open)?;
        }
        tx.put(&MESSAGES, &key.to_owned(), self)
    }
}

fn version(signed: &SignedMessage) -> Version {
    Version {
        cid: signed.cid(),
        gas: Gas {
            limit: signed.message.gas_limit,
            fee_cap: signed.message.gas_fee_cap.clone(),
            premium: signed.message.gas_premium.clone(),
        },
    }
}

/// What must be known of every message under way, without reading the messages themselves.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Open {
    pub(crate) key: String,
    pub(crate) purse: Purse,
    pub(crate) kind: MessageKind,
    pub(crate) value: TokenAmount,
    pub(crate) max_fee: TokenAmount,
    pub(crate) sent_at: Epoch,
    pub(crate) landed: bool,
    /// Its fee is among those of a day.
    pub(crate) charged: bool,
}

/// The messages under way, by address and nonce.
pub(crate) type InFlight = Vec<((String, u64), Open)>;

/// The most that messages under way may still cost.
pub(crate) fn reserved(open: &InFlight) -> Fees {
    let mut sum = Fees::default();
    for (_, o) in open.iter().filter(|(_, o)| !o.charged) {
        sum.add(o.purse, &o.max_fee);
    }
    sum
}

/// Entries of [`OPEN`] that are ever read at once.
pub(crate) const MAX_OPEN: usize = 100_000;

/// Every message ever sent, by key.
pub(crate) const MESSAGES: Map<String, Record> = Map::new("messages.sent");
/// The messages that are not final yet, ordered by sending address and nonce.
pub(crate) const OPEN: Map<(String, u64), Open> = Map::new("messages.open");
/// The nonce after the highest that was journaled, by sending address.
pub(crate) const NEXT_NONCE: Map<String, u64> = Map::new("messages.next_nonce");
/// Fees paid, by day.
pub(crate) const FEES: Map<u64, Fees> = Map::new("messages.fees");
/// Days of which the fees are kept.
pub(crate) const FEES_KEPT_DAYS: u64 = 31;
