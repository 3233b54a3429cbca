//! The MK20 wire form: a deal proposal as JSON, and the answers. Field names and codes are those
//! of Curio's market 2.0, so that its clients work here.

use std::collections::BTreeMap;
use std::fmt;

use cid::Cid;
use lotus_types::Address;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// Path below which everything is served.
pub const BASE: &str = "/market/mk20";

/// A deal proposal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Deal {
    /// The client's name for the deal: a ULID.
    pub identifier: String,
    /// The client's address.
    pub client: String,
    /// The piece and where it comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataSource>,
    /// What the provider is to do with it.
    #[serde(default)]
    pub products: Products,
}

/// The piece and where it comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DataSource {
    /// Piece CID, version 2.
    #[schemars(with = "CidForms")]
    pub piece_cid: CidText,
    /// What the bytes are.
    #[serde(default)]
    pub format: PieceFormat,
    /// The provider downloads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_http: Option<SourceHttp>,
    /// The client uploads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_http_put: Option<Value>,
    /// The client brings the bytes to the provider, who imports them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_offline: Option<Value>,
    /// Not taken here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_aggregate: Option<Value>,
}

/// Exactly one of them is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PieceFormat {
    /// A CAR, version 1 or 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub car: Option<Value>,
    /// Any bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw: Option<Value>,
    /// Not taken here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aggregate: Option<Value>,
}

/// Where the provider downloads from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SourceHttp {
    /// Tried in order of priority.
    pub urls: Vec<HttpUrl>,
}

/// One place to download from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HttpUrl {
    /// `http` or `https`.
    pub url: String,
    /// Sent with each request.
    #[serde(default, deserialize_with = "null_as_default")]
    pub headers: BTreeMap<String, Vec<String>>,
    /// Lower values first.
    #[serde(default)]
    pub priority: i64,
    /// Used only when the others fail.
    #[serde(default)]
    pub fallback: bool,
}

/// What the provider is to do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Products {
    /// Seal and prove the piece (direct data onboarding).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ddo_v1: Option<DdoV1>,
    /// Serve it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retrieval_v1: Option<RetrievalV1>,
    /// Not taken here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pdp_v1: Option<Value>,
}

/// Direct data onboarding.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DdoV1 {
    /// The storage provider.
    pub provider: String,
    /// First epoch at which the piece must be proven; the provider chooses when it is absent.
    #[serde(default)]
    pub start_epoch: Option<i64>,
    /// Epochs of the commitment.
    pub duration: i64,
    /// Allocation of verified data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation_id: Option<u64>,
    /// Market contract.
    #[serde(default)]
    pub market_address: String,
    /// Deal id in that contract.
    #[serde(default)]
    pub market_deal_id: Option<u64>,
    /// Actor to notify when the sector is proven.
    #[serde(default, deserialize_with = "null_as_default")]
    pub notification_address: String,
    /// What to tell it: base64.
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub notification_payload: String,
}

/// How the piece is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RetrievalV1 {
    /// Index its blocks, so that they can be fetched by CID.
    #[serde(default)]
    pub indexing: bool,
    /// Advertise the blocks to IPNI.
    #[serde(default)]
    pub announce_payload: bool,
    /// Advertise the piece CID to IPNI.
    #[serde(default)]
    pub announce_piece: bool,
}

fn null_as_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    d: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

/// A CID in text, written `{"/": "…"}` as Go does; a bare string is read too. Whether it is a CID
/// is found out by validation, which can say so better than a parser.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CidText(pub String);

impl From<Cid> for CidText {
    fn from(c: Cid) -> Self {
        Self(c.to_string())
    }
}

impl Serialize for CidText {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        Link { cid: &self.0 }.serialize(s)
    }
}

#[derive(Serialize, Deserialize, JsonSchema)]
struct Link<T> {
    #[serde(rename = "/")]
    cid: T,
}

/// A CID in text.
#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(rename = "Cid")]
enum CidForms {
    /// As Go writes it.
    Link(Link<String>),
    /// Bare.
    Text(String),
}

impl<'de> Deserialize<'de> for CidText {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Ok(match CidForms::deserialize(d)? {
            CidForms::Link(Link { cid: s }) | CidForms::Text(s) => Self(s),
        })
    }
}

/// Why a proposal or a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Code {
    /// The proposal is wrong in itself.
    BadProposal = 400,
    /// Who asks is not who may.
    Unauthorized = 401,
    /// No such deal of this client.
    NotFound = 404,
    /// Another deal has this id, or the deal is not in a state for this.
    Conflict = 409,
    /// The body is too large.
    TooLarge = 413,
    /// The body has another content type.
    UnsupportedMedia = 415,
    /// This data source is not taken here.
    UnsupportedSource = 422,
    /// The provider does not know this product.
    UnsupportedProduct = 423,
    /// A field of a product is wrong. For an upload in chunks: it has not begun.
    InvalidProduct = 425,
    /// The provider's rules, or its own filter, refuse the deal.
    Rejected = 426,
    /// No room or too many requests: come back later.
    Overloaded = 429,
    /// The data source contradicts itself, or the format is not taken.
    MalformedSource = 430,
    /// The provider takes no deals now.
    MarketDisabled = 440,
    /// The commitment is too short.
    DurationTooShort = 441,
    /// A fault on this side.
    Internal = 500,
    /// The hub does not answer.
    Unavailable = 503,
    /// The disk is full.
    InsufficientStorage = 507,
}

impl Code {
    /// MK20 has one number for both. Source: Curio, market/mk20/types.go,
    /// UploadStatusCodeUploadNotStarted.
    pub const NOT_STARTED: Self = Self::InvalidProduct;

    /// Each, with what it means.
    pub const ALL: [(Self, &'static str); 17] = [
        (Self::BadProposal, "The request is wrong in itself"),
        (Self::Unauthorized, "Who asks is not who may"),
        (Self::NotFound, "No such thing"),
        (
            Self::Conflict,
            "It is not in a state for this, or the name is taken",
        ),
        (Self::TooLarge, "The body is too large"),
        (Self::UnsupportedMedia, "The body has another content type"),
        (Self::UnsupportedSource, "This data source is not taken"),
        (
            Self::UnsupportedProduct,
            "The provider does not know this product",
        ),
        (
            Self::InvalidProduct,
            "A field of a product is wrong; an upload has not begun",
        ),
        (
            Self::Rejected,
            "The provider's rules or filter refuse the deal",
        ),
        (
            Self::Overloaded,
            "No room or too many requests: come back later",
        ),
        (
            Self::MalformedSource,
            "The data source contradicts itself, or the format is not taken",
        ),
        (Self::MarketDisabled, "The provider takes no deals now"),
        (Self::DurationTooShort, "The commitment is too short"),
        (Self::Internal, "A fault on the provider's side"),
        (Self::Unavailable, "The hub or the filter does not answer"),
        (Self::InsufficientStorage, "The disk is full"),
    ];
}

/// A refusal, as the client gets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
#[error("{error}")]
pub struct Refusal {
    /// HTTP status and MK20 code in one.
    pub code: u16,
    /// What is wrong.
    pub error: String,
    /// What to do.
    pub fix: String,
    /// The field that is wrong; empty when it is none in particular.
    #[serde(default)]
    pub field: String,
    /// Come back after this many seconds; 0: no use, or at any time.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retry_after_secs: u64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Refusal {
    /// A refusal that blames no field.
    pub fn new(code: Code, error: impl fmt::Display, fix: impl fmt::Display) -> Self {
        Self {
            code: code as u16,
            error: error.to_string(),
            fix: fix.to_string(),
            field: String::new(),
            retry_after_secs: 0,
        }
    }

    /// Names the field.
    #[must_use]
    pub fn at(mut self, field: &str) -> Self {
        field.clone_into(&mut self.field);
        self
    }

    /// Says when to come back.
    #[must_use]
    pub const fn retry_after(mut self, secs: u64) -> Self {
        self.retry_after_secs = secs;
        self
    }
}

/// Answer of `GET /status/{id}`: `ddo_v1` as MK20 has it, and `deal` with what an operator and a
/// client want to see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StatusResponse {
    /// MK20's own status.
    pub ddo_v1: ProductStatus,
    /// Everything else.
    pub deal: DealStatus,
}

/// MK20's status of one product.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProductStatus {
    /// `accepted`, `uploading`, `processing`, `sealing`, `failed` or `complete`.
    pub status: String,
    /// Why it failed.
    #[serde(rename = "errorMsg")]
    pub error_msg: String,
}

/// The state of a deal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DealStatus {
    /// ULID.
    pub id: String,
    /// Address of the client.
    pub client: String,
    /// The last checkpoint: `Accepted`, `Transferred`, `Published` and `PublishConfirmed` (deals by
    /// proposal alone), `Offered`, `AddedPiece`, `Sealing`, `Active`, `Failed` or `Expired`.
    pub checkpoint: String,
    /// Piece CID, version 1.
    pub piece_cid: String,
    /// Piece CID, version 2.
    pub piece_cid_v2: String,
    /// Padded bytes.
    pub piece_size: u64,
    /// Payload bytes.
    pub raw_size: u64,
    /// Payload bytes that are here so far.
    pub received_bytes: u64,
    /// Payload bytes that the hub has taken over so far.
    pub handed_over_bytes: u64,
    /// Sealing state of the sector, such as `PreCommit1`; empty before there is one.
    pub sealing_state: String,
    /// The sector, once there is one.
    pub sector: Option<u64>,
    /// Offset in the sector, padded bytes.
    pub offset: Option<u64>,
    /// First epoch at which the piece must be proven.
    pub start_epoch: i64,
    /// Last epoch of the commitment.
    pub end_epoch: i64,
    /// What is wrong, or what it waits for; empty when all is well.
    pub message: String,
}

/// Answer of `POST /deal`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Accepted {
    /// 200.
    pub code: u16,
    /// The deal's ULID.
    pub identifier: String,
    /// Address of the client.
    pub client: String,
}

/// Answer of a request that has nothing to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Done {
    /// 200.
    pub code: u16,
}

impl Done {
    /// All went well.
    pub const OK: Self = Self { code: 200 };
}

/// Body of `POST /uploads/{id}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StartUpload {
    /// Bytes of the whole piece.
    pub raw_size: u64,
    /// Bytes of each chunk but the last: a power of two.
    pub chunk_size: u64,
}

/// Answer of `GET /uploads/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UploadStatus {
    /// Chunks in all.
    pub total_chunks: u32,
    /// Chunks that are here.
    pub uploaded: u32,
    /// Chunks that are not.
    pub missing: u32,
    /// Which are here; the first is 1.
    pub uploaded_chunks: Vec<u32>,
    /// Which are not.
    pub missing_chunks: Vec<u32>,
}

/// Answer of `GET /products`: MK20's list, and what a client needs to make a proposal here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SupportedProducts {
    /// Names.
    pub products: Vec<String>,
    /// Actor id of the provider.
    pub provider: String,
    /// Bytes of a sector.
    pub sector_size: u64,
    /// Chain height.
    pub height: i64,
}

/// Answer of `GET /sources`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SupportedSources {
    /// Names.
    pub sources: Vec<String>,
}

/// Answer of `GET /contracts`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SupportedContracts {
    /// Addresses of market contracts.
    pub contracts: Vec<String>,
}

/// Reads an address of either network prefix.
#[must_use]
pub fn parse_address(text: &str) -> Option<Address> {
    use fvm_shared::address::Network;
    Network::Testnet
        .parse_address(text)
        .or_else(|_| Network::Mainnet.parse_address(text))
        .ok()
}

/// An address with the prefix `t`, whatever the process-wide setting: the form in keys and files.
#[must_use]
pub fn address_text(a: &Address) -> String {
    let text = a.to_string();
    format!("t{}", text.get(1..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proposal_as_go_writes_it_is_read() {
        let json = r#"{
            "identifier": "01ARZ3NDEKTSV4RRFFQ69G5FAV",
            "client": "f1abjxfbp274xpdqcpuaykwkfb43omjotacm2p3za",
            "data": {
                "piece_cid": {"/": "bafkzcibcaabdomn3tgwgrh3g532zopskstnbrd2n3sxfqbze7rxt7vqn7veigmy"},
                "format": {"car": {}},
                "source_http": {"urls": [{"url": "https://x/y", "headers": null, "priority": 0, "fallback": true}]}
            },
            "products": {
                "ddo_v1": {"provider": "f01000", "start_epoch": null, "duration": 518400,
                    "market_address": "", "market_deal_id": null, "notification_address": "<empty>"},
                "retrieval_v1": {"indexing": true, "announce_payload": true, "announce_piece": false}
            }
        }"#;
        let deal: Deal = serde_json::from_str(json).unwrap();
        let data = deal.data.clone().unwrap();
        assert!(data.piece_cid.0.starts_with("bafkzci"));
        assert_eq!(data.source_http.unwrap().urls[0].headers.len(), 0);
        assert_eq!(deal.products.ddo_v1.as_ref().unwrap().start_epoch, None);
        let again: Deal = serde_json::from_slice(&serde_json::to_vec(&deal).unwrap()).unwrap();
        assert_eq!(again, deal);
    }

    #[test]
    fn addresses_have_one_text_form() {
        let a = parse_address("f1abjxfbp274xpdqcpuaykwkfb43omjotacm2p3za").unwrap();
        assert_eq!(
            address_text(&a),
            "t1abjxfbp274xpdqcpuaykwkfb43omjotacm2p3za"
        );
        assert_eq!(parse_address(&address_text(&a)), Some(a));
        for bad in ["", "t", "x1abc", "t1abc", "t9abc", "é1"] {
            assert_eq!(parse_address(bad), None, "{bad}");
        }
    }
}
