//! dag-pb nodes and the UnixFS data in them.

use bytes::Bytes;
use cid::Cid;
use prost::Message;

use crate::{BadNode, DAG_PB, Link};

/// UnixFS `Data.Type`. Source: ipfs/specs, unixfs.md.
pub(crate) mod kind {
    pub(crate) const RAW: i32 = 0;
    pub(crate) const DIRECTORY: i32 = 1;
    pub(crate) const FILE: i32 = 2;
    pub(crate) const SYMLINK: i32 = 4;
    pub(crate) const HAMT_SHARD: i32 = 5;
}

/// Links of one node: a folder of 2 MiB, the largest block that is safe to exchange, has fewer.
const MAX_LINKS: usize = 1 << 17;

/// `unixfs.pb.Data`; permissions and times are left out.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Data {
    #[prost(int32, required, tag = "1")]
    pub(crate) kind: i32,
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub(crate) data: Option<Bytes>,
    #[prost(uint64, optional, tag = "3")]
    pub(crate) filesize: Option<u64>,
    #[prost(uint64, repeated, packed = "false", tag = "4")]
    pub(crate) blocksizes: Vec<u64>,
    #[prost(uint64, optional, tag = "5")]
    pub(crate) hash_type: Option<u64>,
    #[prost(uint64, optional, tag = "6")]
    pub(crate) fanout: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct PbLink {
    #[prost(bytes = "bytes", optional, tag = "1")]
    hash: Option<Bytes>,
    #[prost(string, optional, tag = "2")]
    name: Option<String>,
    #[prost(uint64, optional, tag = "3")]
    size: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct PbNode {
    #[prost(bytes = "bytes", optional, tag = "1")]
    data: Option<Bytes>,
    #[prost(message, repeated, tag = "2")]
    links: Vec<PbLink>,
}

/// A decoded dag-pb node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) links: Vec<Named>,
    /// The UnixFS data; `None` when the node's data is not UnixFS.
    pub(crate) unixfs: Option<Data>,
}

#[derive(Debug)]
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) link: Link,
}

/// How many links a node has, found without building any: a hostile one could have millions.
pub(crate) fn count_links(bytes: &[u8]) -> Result<usize, BadNode> {
    let bad = || BadNode {
        codec: DAG_PB,
        why: "no protobuf message of links and data".into(),
    };
    let number = |bytes| unsigned_varint::decode::u64(bytes).map_err(|_| bad());
    let mut links = 0;
    let mut rest = bytes;
    while !rest.is_empty() {
        let (key, tail) = number(rest)?;
        let (len, tail) = number(tail)?;
        // Both fields are messages or bytes: wire type 2.
        let len = usize::try_from(len).ok().filter(|_| key & 7 == 2);
        rest = tail.get(len.ok_or_else(bad)?..).ok_or_else(bad)?;
        links += usize::from(key >> 3 == 2);
    }
    if links > MAX_LINKS {
        return Err(BadNode {
            codec: DAG_PB,
            why: format!("{links} links; no honest node has more than {MAX_LINKS}"),
        });
    }
    Ok(links)
}

impl Node {
    pub(crate) fn decode(bytes: &Bytes) -> Result<Self, BadNode> {
        count_links(bytes)?;
        let bad = |why: String| BadNode { codec: DAG_PB, why };
        let node = PbNode::decode(bytes.clone()).map_err(|e| bad(e.to_string()))?;
        let mut links = Vec::with_capacity(node.links.len());
        for l in node.links {
            let hash = l.hash.ok_or_else(|| bad("a link without a hash".into()))?;
            let (link, len) = Link::read(&hash).map_err(|e| bad(e.to_string()))?;
            if len != hash.len() {
                return Err(bad("bytes after the CID of a link".into()));
            }
            links.push(Named {
                name: l.name.unwrap_or_default(),
                link,
            });
        }
        let unixfs = node.data.and_then(|d| Data::decode(d).ok());
        Ok(Self { links, unixfs })
    }

    pub(crate) fn kind(&self) -> Option<i32> {
        self.unixfs.as_ref().map(|d| d.kind)
    }

    /// Length of the file, if this is one.
    pub(crate) fn file_size(&self) -> Option<u64> {
        let data = self.unixfs.as_ref()?;
        if !matches!(data.kind, kind::RAW | kind::FILE) {
            return None;
        }
        let own = data.data.as_ref().map_or(0, |d| d.len() as u64);
        let sum = data
            .blocksizes
            .iter()
            .fold(own, |a, b| a.saturating_add(*b));
        Some(data.filesize.unwrap_or(sum))
    }
}

/// A link as it is written.
pub(crate) struct NewLink {
    pub(crate) name: String,
    pub(crate) cid: Cid,
    /// Bytes of the linked DAG, `Tsize`.
    pub(crate) size: u64,
}

/// Encodes a node in the canonical form: links before data, each field of a link present.
pub(crate) fn encode(links: &[NewLink], data: &Data) -> Vec<u8> {
    let mut out = PbNode {
        data: None,
        links: links
            .iter()
            .map(|l| PbLink {
                hash: Some(l.cid.to_bytes().into()),
                name: Some(l.name.clone()),
                size: Some(l.size),
            })
            .collect(),
    }
    .encode_to_vec();
    out.extend(
        PbNode {
            data: Some(data.encode_to_vec().into()),
            links: Vec::new(),
        }
        .encode_to_vec(),
    );
    out
}
