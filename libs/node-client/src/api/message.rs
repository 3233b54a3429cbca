use cid::Cid;
use fvm_ipld_encoding::RawBytes;
use lotus_types::{Address, Epoch, TokenAmount};
use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};

use super::{Signature, SignatureType, TipSetKey, cbor_cid};
use crate::json::{Lotus, plain};

/// An unsigned message.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Message {
    /// Always 0.
    #[serde(default)]
    pub version: u64,
    /// Receiver.
    #[serde(with = "crate::json")]
    pub to: Address,
    /// Sender.
    #[serde(with = "crate::json")]
    pub from: Address,
    /// Position among the sender's messages.
    #[serde(default)]
    pub nonce: u64,
    /// attoFIL to move.
    #[serde(with = "crate::json", default)]
    pub value: TokenAmount,
    /// Most gas that the message may use.
    #[serde(default)]
    pub gas_limit: u64,
    /// Most attoFIL per unit of gas, base fee and premium together.
    #[serde(with = "crate::json", default)]
    pub gas_fee_cap: TokenAmount,
    /// attoFIL per unit of gas for the block's miner.
    #[serde(with = "crate::json", default)]
    pub gas_premium: TokenAmount,
    /// Method number of the receiver; 0 is a plain transfer.
    #[serde(default)]
    pub method: u64,
    /// CBOR parameters.
    #[serde(with = "crate::json", default)]
    pub params: Vec<u8>,
}

impl Message {
    /// The message's CBOR, as named by its CID.
    #[must_use]
    pub fn to_cbor(&self) -> Vec<u8> {
        fvm_ipld_encoding::to_vec(&self.to_fvm()).expect("a message encodes")
    }

    /// Reads the network's CBOR form.
    pub fn from_cbor(bytes: &[u8]) -> Result<Self, fvm_ipld_encoding::Error> {
        fvm_ipld_encoding::from_slice::<fvm_shared::message::Message>(bytes).map(Self::from)
    }

    /// CID of the unsigned message. It is what every key signs: the signature covers the CID's
    /// bytes. Source: lotus, `chain/messagesigner`.
    #[must_use]
    pub fn cid(&self) -> Cid {
        cbor_cid(&self.to_cbor())
    }

    /// Most attoFIL that the message can cost its sender besides `value`.
    #[must_use]
    pub fn max_fee(&self) -> TokenAmount {
        &self.gas_fee_cap * self.gas_limit
    }

    /// The form that the network's Rust crates use.
    #[must_use]
    pub fn to_fvm(&self) -> fvm_shared::message::Message {
        fvm_shared::message::Message {
            version: self.version,
            from: self.from,
            to: self.to,
            sequence: self.nonce,
            value: self.value.clone(),
            method_num: self.method,
            params: RawBytes::new(self.params.clone()),
            gas_limit: self.gas_limit,
            gas_fee_cap: self.gas_fee_cap.clone(),
            gas_premium: self.gas_premium.clone(),
        }
    }
}

/// Lotus adds the CID, which is not read back.
impl Serialize for Message {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut out = s.serialize_struct("Message", 11)?;
        out.serialize_field("Version", &self.version)?;
        out.serialize_field("To", &Lotus(&self.to))?;
        out.serialize_field("From", &Lotus(&self.from))?;
        out.serialize_field("Nonce", &self.nonce)?;
        out.serialize_field("Value", &Lotus(&self.value))?;
        out.serialize_field("GasLimit", &self.gas_limit)?;
        out.serialize_field("GasFeeCap", &Lotus(&self.gas_fee_cap))?;
        out.serialize_field("GasPremium", &Lotus(&self.gas_premium))?;
        out.serialize_field("Method", &self.method)?;
        out.serialize_field("Params", &Lotus(&self.params))?;
        out.serialize_field("CID", &Lotus(self.cid()))?;
        out.end()
    }
}

impl From<fvm_shared::message::Message> for Message {
    fn from(m: fvm_shared::message::Message) -> Self {
        Self {
            version: m.version,
            to: m.to,
            from: m.from,
            nonce: m.sequence,
            value: m.value,
            gas_limit: m.gas_limit,
            gas_fee_cap: m.gas_fee_cap,
            gas_premium: m.gas_premium,
            method: m.method_num,
            params: m.params.to_vec(),
        }
    }
}

/// A message with its sender's signature over [`Message::cid`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SignedMessage {
    /// The message.
    pub message: Message,
    /// The signature.
    #[serde(with = "crate::json")]
    pub signature: Signature,
}

impl SignedMessage {
    /// CBOR of message and signature.
    #[must_use]
    pub fn to_cbor(&self) -> Vec<u8> {
        fvm_ipld_encoding::to_vec(&(self.message.to_fvm(), &self.signature))
            .expect("a signed message encodes")
    }

    /// Reads the network's CBOR form.
    pub fn from_cbor(bytes: &[u8]) -> Result<Self, fvm_ipld_encoding::Error> {
        let (message, signature): (fvm_shared::message::Message, Signature) =
            fvm_ipld_encoding::from_slice(bytes)?;
        Ok(Self {
            message: message.into(),
            signature,
        })
    }

    /// The CID by which the chain knows the message: that of the unsigned message under a BLS
    /// signature, because blocks aggregate those, else that of the whole.
    #[must_use]
    pub fn cid(&self) -> Cid {
        match self.signature.sig_type {
            SignatureType::BLS => self.message.cid(),
            SignatureType::Secp256k1 => cbor_cid(&self.to_cbor()),
        }
    }
}

/// Lotus adds the CID, which is not read back.
impl Serialize for SignedMessage {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut out = s.serialize_struct("SignedMessage", 3)?;
        out.serialize_field("Message", &self.message)?;
        out.serialize_field("Signature", &Lotus(&self.signature))?;
        out.serialize_field("CID", &Lotus(self.cid()))?;
        out.end()
    }
}

/// What executing a message gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct MessageReceipt {
    /// 0 is success; below 16 the system's codes, from 16 the actor's (`lotus_actors::exit_name`).
    pub exit_code: i64,
    /// CBOR return value.
    #[serde(with = "crate::json")]
    pub r#return: Vec<u8>,
    /// Gas used.
    pub gas_used: i64,
    /// Root of the events that the message emitted.
    #[serde(with = "crate::json", default)]
    pub events_root: Option<Cid>,
}

/// Where a message landed and what it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct MsgLookup {
    /// The message that landed: another one than asked for if that was replaced by fee.
    #[serde(with = "crate::json")]
    pub message: Cid,
    /// The receipt.
    pub receipt: MessageReceipt,
    /// Decoded return value; only some nodes fill it.
    #[serde(default)]
    pub return_dec: serde_json::Value,
    /// The tipset whose parent state holds the effect: one after the tipset with the message.
    pub tip_set: TipSetKey,
    /// Height of `tip_set`.
    pub height: Epoch,
}

/// Limits that the node keeps to when it fills in gas.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct MessageSendSpec {
    /// Most attoFIL for gas; 0 means the node's default.
    #[serde(with = "crate::json", default)]
    pub max_fee: TokenAmount,
    /// A UUID by which the node recognises a repeated send.
    #[serde(default = "nil_uuid")]
    pub msg_uuid: String,
    /// Raise the fee cap to what `max_fee` allows.
    #[serde(default)]
    pub maximize_fee_cap: bool,
}

fn nil_uuid() -> String {
    "00000000-0000-0000-0000-000000000000".into()
}

impl Default for MessageSendSpec {
    fn default() -> Self {
        Self {
            max_fee: TokenAmount::default(),
            msg_uuid: nil_uuid(),
            maximize_fee_cap: false,
        }
    }
}

/// Who paid what for a message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct MsgGasCost {
    /// The message.
    #[serde(with = "crate::json")]
    pub message: Option<Cid>,
    /// Units of gas.
    #[serde(with = "crate::json")]
    pub gas_used: TokenAmount,
    /// Burned as base fee.
    #[serde(with = "crate::json")]
    pub base_fee_burn: TokenAmount,
    /// Burned because the limit was far above the use.
    #[serde(with = "crate::json")]
    pub over_estimation_burn: TokenAmount,
    /// Charged to the block's miner.
    #[serde(with = "crate::json")]
    pub miner_penalty: TokenAmount,
    /// Paid to the block's miner.
    #[serde(with = "crate::json")]
    pub miner_tip: TokenAmount,
    /// Returned to the sender.
    #[serde(with = "crate::json")]
    pub refund: TokenAmount,
    /// Paid by the sender in all.
    #[serde(with = "crate::json")]
    pub total_cost: TokenAmount,
}

/// Result of executing a message without putting it on chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct InvocResult {
    /// The message's CID.
    #[serde(with = "crate::json")]
    pub msg_cid: Cid,
    /// The message.
    pub msg: Message,
    /// The receipt; absent if the message could not be applied at all.
    #[serde(default)]
    pub msg_rct: Option<MessageReceipt>,
    /// What it would cost.
    #[serde(default)]
    pub gas_cost: MsgGasCost,
    /// Why it failed; empty on success.
    #[serde(default)]
    pub error: String,
    /// Nanoseconds of execution.
    #[serde(default)]
    pub duration: i64,
}

plain!(
    Message,
    SignedMessage,
    MessageReceipt,
    MsgLookup,
    MessageSendSpec,
    MsgGasCost,
    InvocResult,
);
