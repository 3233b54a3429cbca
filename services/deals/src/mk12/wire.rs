//! What MK1.2 peers send: one bare CBOR object each way, without a length before it. The types are
//! those of Boost's `storagemarket/types` (maps, keys sorted by length and then by bytes) and of
//! the market actor (tuples).

use std::fmt;
use std::io;

use cid::Cid;
use futures::{AsyncRead, AsyncReadExt as _};
use fvm_shared::crypto::signature::Signature;
use lotus_actors::market::{ClientDealProposal, DealProposal, StorageAsk};
use lotus_types::Address;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use ulid::Ulid;

/// Deal proposals. Both names have one handler.
pub const DEAL_PROTOCOLS: [&str; 2] = ["/fil/storage/mk/1.2.1", "/fil/storage/mk/1.2.0"];
/// Status of a deal.
pub const STATUS_PROTOCOL: &str = "/fil/storage/status/1.2.0";
/// The provider's terms.
pub const ASK_PROTOCOL: &str = "/fil/storage/ask/1.1.0";
/// Where deals are retrieved from.
pub const TRANSPORTS_PROTOCOL: &str = "/fil/retrieval/transports/1.0.0";

/// Largest message, in bytes. Source: Curio, market/mk12/http.
pub const MAX_MESSAGE: usize = 4 << 20;
/// Deepest nesting of an object: a status with its proposal has 4 levels.
const MAX_DEPTH: usize = 16;

/// Bytes that are no message of the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadMessage {
    /// Not CBOR as these protocols use it.
    #[error("the message is no CBOR of this protocol: {0}")]
    Cbor(String),
    /// Too long.
    #[error("the message has more than {MAX_MESSAGE} bytes")]
    TooLong,
    /// It ended too early, or something follows.
    #[error("the message is not exactly one CBOR object")]
    Length,
}

impl BadMessage {
    /// What to do.
    #[must_use]
    pub const fn fix(&self) -> &'static str {
        match self {
            Self::Cbor(_) | Self::Length => {
                "send one object as Boost's storagemarket/types encodes it"
            }
            Self::TooLong => "send less: a proposal has a few hundred bytes",
        }
    }
}

/// A deal's UUID: 16 bytes on the wire. Inside it is the same 128 bits as a ULID.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DealUuid(pub [u8; 16]);

impl DealUuid {
    /// The same bits as a ULID, the form of ids inside.
    #[must_use]
    pub const fn ulid(self) -> Ulid {
        Ulid(u128::from_be_bytes(self.0))
    }
}

impl From<Ulid> for DealUuid {
    fn from(id: Ulid) -> Self {
        Self(id.0.to_be_bytes())
    }
}

impl fmt::Display for DealUuid {
    /// `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for DealUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for DealUuid {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for DealUuid {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        serde_bytes::ByteArray::<16>::deserialize(d).map(|a| Self(a.into_array()))
    }
}

/// How the bytes come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Transfer {
    /// Bytes of the file.
    pub size: u64,
    /// `http` or `libp2p`; empty for an offline deal.
    #[serde(rename = "Type")]
    pub kind: String,
    /// JSON of [`HttpParams`].
    #[serde(with = "serde_bytes")]
    pub params: Vec<u8>,
    /// The client's own name for the transfer.
    #[serde(rename = "ClientID")]
    pub client_id: String,
}

/// [`Transfer::params`] of an HTTP transfer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct HttpParams {
    /// Where the file is.
    #[serde(rename = "URL")]
    pub url: String,
    /// Sent with each request. Go writes an empty map as null.
    #[serde(default)]
    pub headers: Option<std::collections::BTreeMap<String, String>>,
}

/// A deal proposal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DealParams {
    /// The client's name for the deal.
    #[serde(rename = "DealUUID")]
    pub deal_uuid: DealUuid,
    /// How the bytes come.
    #[serde(default)]
    pub transfer: Transfer,
    /// The bytes come by other means than a transfer.
    #[serde(default)]
    pub is_offline: bool,
    /// Root of the DAG in the piece.
    pub deal_data_root: Cid,
    /// Do not tell the network indexers. New in 1.2.1.
    #[serde(rename = "SkipIPNIAnnounce", default)]
    pub skip_ipni_announce: bool,
    /// What goes on chain, with the client's signature.
    pub client_deal_proposal: ClientDealProposal,
    /// Keep no copy that can be served without unsealing. New in 1.2.1.
    #[serde(default)]
    pub remove_unsealed_copy: bool,
}

/// The answer to a proposal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DealResponse {
    /// Why not; empty when accepted.
    pub message: String,
    /// Whether the deal is made.
    pub accepted: bool,
}

/// A question about a deal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DealStatusRequest {
    /// Which one.
    #[serde(rename = "DealUUID")]
    pub deal_uuid: DealUuid,
    /// The client's signature over the 16 bytes of the UUID.
    pub signature: Signature,
}

/// The answer to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DealStatusResponse {
    /// Why the question is not answered; empty when it is.
    pub error: String,
    /// Which deal.
    #[serde(rename = "DealUUID")]
    pub deal_uuid: DealUuid,
    /// The bytes come by other means than a transfer.
    pub is_offline: bool,
    /// The state; null when the question is not answered.
    pub deal_status: Option<DealStatus>,
    /// Bytes of the file.
    pub transfer_size: u64,
    /// Bytes that are here.
    #[serde(rename = "NBytesReceived")]
    pub n_bytes_received: u64,
}

/// The state of a deal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DealStatus {
    /// Why the deal failed; empty while it has not.
    pub error: String,
    /// Boost's name of the last checkpoint.
    pub status: String,
    /// What was proposed.
    pub proposal: DealProposal,
    /// The message that published the deal.
    pub publish_cid: Option<Cid>,
    /// The deal's id on chain; 0 while it has none.
    #[serde(rename = "ChainDealID")]
    pub chain_deal_id: u64,
    /// State of the sector, such as `PreCommit1`.
    pub sealing_status: String,
    /// CID of the signed proposal.
    pub signed_proposal_cid: Cid,
}

/// A question for the ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct AskRequest {
    /// Whose.
    pub miner: Address,
}

/// The answer to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct AskResponse {
    /// Null when another provider was meant.
    pub ask: Option<SignedStorageAsk>,
}

/// An ask that a worker's key has signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SignedStorageAsk {
    /// The ask.
    pub ask: StorageAsk,
    /// Over its CBOR.
    pub signature: Signature,
}

/// Where deals are retrieved from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TransportsResponse {
    /// One entry for each kind of transport.
    pub protocols: Vec<Transport>,
}

/// A kind of transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Transport {
    /// `http`, `libp2p` or `bitswap`.
    pub name: String,
    /// Multiaddresses, as bytes.
    pub addresses: Vec<serde_bytes::ByteBuf>,
}

/// Reads one object that is all of `bytes`.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, BadMessage> {
    if bytes.len() > MAX_MESSAGE {
        return Err(BadMessage::TooLong);
    }
    if Scanner::default().feed(bytes)? != Some(bytes.len()) {
        return Err(BadMessage::Length);
    }
    lotus_actors::decode(bytes).map_err(|e| BadMessage::Cbor(e.why))
}

/// The CBOR of a message.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    lotus_actors::encode(message)
}

/// Reads one object from a stream, to its last byte: the sender may leave the stream open.
pub async fn read<T: DeserializeOwned>(from: &mut (impl AsyncRead + Unpin)) -> io::Result<T> {
    let bad = |e: BadMessage| io::Error::new(io::ErrorKind::InvalidData, e);
    let mut scanner = Scanner::default();
    let mut all = Vec::new();
    let mut buf = [0; 8 << 10];
    loop {
        let n = from.read(&mut buf).await?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if all.len() + n > MAX_MESSAGE {
            return Err(bad(BadMessage::TooLong));
        }
        all.extend_from_slice(&buf[..n]);
        if let Some(used) = scanner.feed(&buf[..n]).map_err(bad)? {
            all.truncate(all.len() - n + used);
            return decode(&all).map_err(bad);
        }
    }
}

/// Finds the end of an object in bytes that come piece by piece, and refuses what no message of
/// these protocols has: deep nesting, indefinite lengths, lengths beyond any message. So whoever
/// decodes afterwards can not be made to recurse or to allocate.
#[derive(Debug, Default)]
struct Scanner {
    /// Objects that are missing at each level.
    open: Vec<u64>,
    /// Bytes of a string that are still to come.
    skip: u64,
    /// First byte of an object whose length is being read.
    first: u8,
    /// Bytes of that length still to come, and what it is so far.
    length: (u8, u64),
}

impl Scanner {
    /// Takes the next bytes. `Some(n)`: the object ends after `n` of them.
    fn feed(&mut self, bytes: &[u8]) -> Result<Option<usize>, BadMessage> {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            let done = if self.skip > 0 {
                let take = self.skip.min((bytes.len() - at) as u64);
                self.skip -= take;
                // At most what is left of the slice.
                at += usize::try_from(take).unwrap_or(usize::MAX);
                self.skip == 0
            } else {
                at += 1;
                self.head(byte)?
            };
            if done && self.complete() {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    /// A byte of an object's head. Whether the object has ended with it.
    fn head(&mut self, byte: u8) -> Result<bool, BadMessage> {
        let (missing, value) = self.length;
        if missing > 0 {
            let value = value << 8 | u64::from(byte);
            self.length = (missing - 1, value);
            return if missing == 1 {
                self.begin(value)
            } else {
                Ok(false)
            };
        }
        self.first = byte;
        match byte & 31 {
            info @ 0..=23 => self.begin(u64::from(info)),
            info @ 24..=27 => {
                self.length = (1 << (info - 24), 0);
                Ok(false)
            }
            _ => Err(BadMessage::Cbor(
                "a length is indefinite or reserved".into(),
            )),
        }
    }

    /// The head is complete.
    fn begin(&mut self, value: u64) -> Result<bool, BadMessage> {
        let children = match self.first >> 5 {
            0 | 1 | 7 => return Ok(true),
            2 | 3 => {
                if value > MAX_MESSAGE as u64 {
                    return Err(BadMessage::TooLong);
                }
                self.skip = value;
                return Ok(value == 0);
            }
            4 => value,
            5 => value.saturating_mul(2),
            _ => 1,
        };
        if children > MAX_MESSAGE as u64 {
            return Err(BadMessage::TooLong);
        }
        if children == 0 {
            return Ok(true);
        }
        if self.open.len() >= MAX_DEPTH {
            return Err(BadMessage::Cbor("it is nested too deeply".into()));
        }
        self.open.push(children);
        Ok(false)
    }

    /// An object has ended. Whether all have.
    fn complete(&mut self) -> bool {
        while let Some(missing) = self.open.last_mut() {
            *missing -= 1;
            if *missing > 0 {
                return false;
            }
            self.open.pop();
        }
        true
    }
}

#[cfg(test)]
pub(super) mod tests;
