//! Advertisements, entry chunks and heads as bytes: pure.
//! Source: ipni/go-libipni, `ingest/schema`, `dagsync/ipnisync/head`.

use std::collections::BTreeMap;

use cid::Cid;
use ipld_core::ipld::Ipld;
use libp2p_identity::Keypair;
use lotus_runtime::Fault;
use lotus_types::Kind;
use multihash::Multihash;
use multihash_codetable::{Code, MultihashDigest};
use prost::Message;

/// Multihashes of one chunk. Source: index-provider and Curio.
pub(crate) const CHUNK: usize = 16_384;
/// Metadata of content behind a trustless gateway: the varint of `transport-ipfs-gateway-http`
/// (0x0920) and an empty payload.
pub(crate) const GATEWAY: [u8; 3] = [0xa0, 0x12, 0x00];
/// Metadata of pieces over HTTP (0x0930).
pub(crate) const PIECE_HTTP: [u8; 3] = [0xb0, 0x12, 0x00];

const DAG_JSON: u64 = 0x0129;
const DAG_CBOR: u64 = 0x71;
const RAW: u64 = 0x55;

/// A block of the chain.
#[derive(Debug, Clone)]
pub(crate) struct Encoded {
    pub(crate) cid: Cid,
    pub(crate) bytes: Vec<u8>,
}

impl Encoded {
    fn new(codec: u64, bytes: Vec<u8>) -> Self {
        Self {
            cid: Cid::new_v1(codec, Code::Sha2_256.digest(&bytes)),
            bytes,
        }
    }
}

/// What stands for the entries of an advertisement that has none: the raw CID of nothing, its
/// digest cut to 16 bytes.
pub(crate) fn no_entries() -> Cid {
    Cid::new_v1(RAW, Code::Sha2_256.digest(b"").truncate(16))
}

/// An advertisement before it is signed.
#[derive(Debug, Clone)]
pub(crate) struct Ad {
    pub(crate) previous: Option<Cid>,
    pub(crate) provider: String,
    pub(crate) addresses: Vec<String>,
    pub(crate) entries: Cid,
    pub(crate) context: Vec<u8>,
    pub(crate) metadata: Vec<u8>,
    pub(crate) is_rm: bool,
    /// Who else has the content. Of an advertisement without context that is everything that this
    /// provider advertises; the list replaces the one before, and is empty only where there was
    /// none.
    pub(crate) extended: Vec<Extended>,
}

/// A provider beside the one that advertises. It has the metadata of each advertisement.
#[derive(Debug, Clone)]
pub(crate) struct Extended {
    pub(crate) key: Keypair,
    pub(crate) address: String,
}

impl Extended {
    pub(crate) fn id(&self) -> String {
        self.key.public().to_peer_id().to_base58()
    }
}

/// libp2p `record.pb.Envelope`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Envelope {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) public_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) payload_type: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) payload: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    pub(crate) signature: Vec<u8>,
}

const DOMAIN: &str = "indexer";
const PAYLOAD_TYPE: &str = "/indexer/ingest/adSignature";
const EXTENDED_TYPE: &str = "/indexer/ingest/extendedProviderSignature";

impl Ad {
    /// What the signature covers, as a multihash. The context is not in it.
    fn signed_payload(&self) -> Vec<u8> {
        let mut all = self.previous.map(|c| c.to_bytes()).unwrap_or_default();
        all.extend(self.entries.to_bytes());
        all.extend(self.provider.as_bytes());
        for address in &self.addresses {
            all.extend(address.as_bytes());
        }
        all.extend(&self.metadata);
        all.push(self.is_rm.into());
        Code::Sha2_256.digest(&all).to_bytes()
    }

    /// What an extended provider signs: that the provider may speak for it, and what is said.
    fn extended_payload(&self, of: &Extended) -> Vec<u8> {
        let mut all = self.previous.map(|c| c.to_bytes()).unwrap_or_default();
        all.extend(self.entries.to_bytes());
        all.extend(self.provider.as_bytes());
        all.extend(&self.context);
        all.extend(of.id().as_bytes());
        all.extend(of.address.as_bytes());
        // Metadata would be here; the last byte says that nothing of before is overridden.
        all.push(0);
        Code::Sha2_256.digest(&all).to_bytes()
    }

    fn extended_provider(&self) -> Result<Ipld, Fault> {
        let provider = |of: &Extended| {
            let payload = self.extended_payload(of);
            Ok::<_, Fault>(Ipld::Map(BTreeMap::from([
                (
                    "Addresses".to_owned(),
                    Ipld::List(vec![Ipld::String(of.address.clone())]),
                ),
                ("ID".to_owned(), Ipld::String(of.id())),
                ("Metadata".to_owned(), Ipld::Bytes(Vec::new())),
                (
                    "Signature".to_owned(),
                    Ipld::Bytes(seal(&of.key, EXTENDED_TYPE, payload)?),
                ),
            ])))
        };
        let providers = self
            .extended
            .iter()
            .map(provider)
            .collect::<Result<_, _>>()?;
        Ok(Ipld::Map(BTreeMap::from([
            ("Override".to_owned(), Ipld::Bool(false)),
            ("Providers".to_owned(), Ipld::List(providers)),
        ])))
    }

    /// Signs and encodes it.
    pub(crate) fn sign(&self, key: &Keypair) -> Result<Encoded, Fault> {
        let signature = seal(key, PAYLOAD_TYPE, self.signed_payload())?;
        let mut map = BTreeMap::from([
            (
                "Addresses".to_owned(),
                Ipld::List(self.addresses.iter().cloned().map(Ipld::String).collect()),
            ),
            ("ContextID".to_owned(), Ipld::Bytes(self.context.clone())),
            ("Entries".to_owned(), Ipld::Link(self.entries)),
            ("IsRm".to_owned(), Ipld::Bool(self.is_rm)),
            ("Metadata".to_owned(), Ipld::Bytes(self.metadata.clone())),
            ("Provider".to_owned(), Ipld::String(self.provider.clone())),
            ("Signature".to_owned(), Ipld::Bytes(signature)),
        ]);
        if !self.extended.is_empty() {
            map.insert("ExtendedProvider".into(), self.extended_provider()?);
        }
        if let Some(previous) = self.previous {
            map.insert("PreviousID".into(), Ipld::Link(previous));
        }
        json(map)
    }
}

/// A signed envelope.
fn seal(key: &Keypair, payload_type: &str, payload: Vec<u8>) -> Result<Vec<u8>, Fault> {
    let envelope = Envelope {
        public_key: key.public().encode_protobuf(),
        payload_type: payload_type.into(),
        signature: key
            .sign(&unsigned(payload_type, &payload))
            .map_err(|e| broken(&e))?,
        payload,
    };
    Ok(envelope.encode_to_vec())
}

/// The bytes that an envelope's key signs. Source: libp2p/specs, RFC 0002.
fn unsigned(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for part in [DOMAIN.as_bytes(), payload_type.as_bytes(), payload] {
        let mut buf = unsigned_varint::encode::usize_buffer();
        out.extend_from_slice(unsigned_varint::encode::usize(part.len(), &mut buf));
        out.extend_from_slice(part);
    }
    out
}

/// A chunk of multihashes, and the link to the next.
pub(crate) fn chunk(hashes: &[Multihash<64>], next: Option<Cid>) -> Result<Encoded, Fault> {
    let entries = hashes.iter().map(|h| Ipld::Bytes(h.to_bytes())).collect();
    let mut map = BTreeMap::from([("Entries".to_owned(), Ipld::List(entries))]);
    if let Some(next) = next {
        map.insert("Next".into(), Ipld::Link(next));
    }
    let bytes = serde_ipld_dagcbor::to_vec(&Ipld::Map(map)).map_err(|e| broken(&e))?;
    Ok(Encoded::new(DAG_CBOR, bytes))
}

/// The signed answer to "what is your newest advertisement?".
pub(crate) fn head(cid: &Cid, key: &Keypair) -> Result<Vec<u8>, Fault> {
    let sig = key.sign(&cid.to_bytes()).map_err(|e| broken(&e))?;
    let map = BTreeMap::from([
        ("head".to_owned(), Ipld::Link(*cid)),
        (
            "pubkey".to_owned(),
            Ipld::Bytes(key.public().encode_protobuf()),
        ),
        ("sig".to_owned(), Ipld::Bytes(sig)),
    ]);
    Ok(json(map)?.bytes)
}

fn json(map: BTreeMap<String, Ipld>) -> Result<Encoded, Fault> {
    let bytes = serde_ipld_dagjson::to_vec(&Ipld::Map(map)).map_err(|e| broken(&e))?;
    Ok(Encoded::new(DAG_JSON, bytes))
}

fn broken(e: &dyn std::fmt::Display) -> Fault {
    Fault::new(
        Kind::Fatal,
        format!("an advertisement cannot be made: {e}"),
        "report this, with the log",
    )
}

#[cfg(test)]
mod tests;
