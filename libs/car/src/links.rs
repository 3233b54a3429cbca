use bytes::Bytes;
use serde_json::Value;

use crate::unixfs::Node;
use crate::{DAG_CBOR, DAG_JSON, DAG_PB, Link};

/// Multicodec `dag-jose`: dag-cbor with a fixed shape.
const DAG_JOSE: u64 = 0x85;
/// Multicodec `fil-commitment-unsealed`: names a piece, not a block.
const FIL_COMMITMENT_UNSEALED: u64 = 0xf101;
/// Multicodec `fil-commitment-sealed`: names a replica, not a block.
const FIL_COMMITMENT_SEALED: u64 = 0xf102;
/// Nesting that is followed in one block.
const MAX_DEPTH: usize = 1024;

/// A block that is not what its codec says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no valid node of codec 0x{codec:x}: {why}")]
pub struct BadNode {
    /// Multicodec of the block.
    pub codec: u64,
    /// What is wrong.
    pub why: String,
}

/// The links in a block, in the order of its encoding. Blocks of a codec without links, or of
/// one that is not known here, have none. Commitments of pieces and sectors, which the Filecoin
/// state holds in the form of CIDs, are no links.
pub fn links(codec: u64, data: &Bytes) -> Result<Vec<Link>, BadNode> {
    let mut found = match codec {
        DAG_PB => Node::decode(data)?
            .links
            .into_iter()
            .map(|n| n.link)
            .collect(),
        DAG_CBOR | DAG_JOSE => cbor(codec, data)?,
        DAG_JSON => {
            let mut out = Vec::new();
            let value = serde_json::from_slice(data).map_err(|e| BadNode {
                codec,
                why: e.to_string(),
            })?;
            json(&value, &mut out)?;
            out
        }
        _ => Vec::new(),
    };
    found.retain(|l| !matches!(l.codec(), FIL_COMMITMENT_UNSEALED | FIL_COMMITMENT_SEALED));
    Ok(found)
}

/// Collects tag 42 without building the value, so that a hostile block costs no more memory than
/// its links.
fn cbor(codec: u64, data: &[u8]) -> Result<Vec<Link>, BadNode> {
    let bad = |why: String| BadNode { codec, why };
    let short = || bad("it ends too early".into());
    let mut links = Vec::new();
    let mut rest = data;
    // Items still to come, for each open array and map.
    let mut open: Vec<u64> = vec![1];
    let mut tagged = false;
    while let Some(left) = open.last_mut() {
        if *left == 0 {
            open.pop();
            continue;
        }
        *left -= 1;
        let (&head, tail) = rest.split_first().ok_or_else(short)?;
        rest = tail;
        let width = match head & 0x1f {
            24 => 1,
            25 => 2,
            26 => 4,
            27 => 8,
            0..=23 => 0,
            _ => return Err(bad("an indefinite or reserved length".into())),
        };
        let bytes = rest.split_at_checked(width).ok_or_else(short)?;
        rest = bytes.1;
        let value = match width {
            0 => u64::from(head & 0x1f),
            _ => bytes.0.iter().fold(0, |v, b| (v << 8) | u64::from(*b)),
        };
        let was_tagged = std::mem::take(&mut tagged);
        match head >> 5 {
            2 | 3 => {
                let len = usize::try_from(value).map_err(|_| short())?;
                let (text, tail) = rest.split_at_checked(len).ok_or_else(short)?;
                rest = tail;
                if was_tagged && head >> 5 == 2 {
                    // dag-cbor: the bytes are the multibase prefix 0 and the binary CID.
                    let Some((0, cid)) = text.split_first() else {
                        return Err(bad("a link without the 0 prefix".into()));
                    };
                    let (link, used) = Link::read(cid).map_err(|e| bad(e.to_string()))?;
                    if used != cid.len() {
                        return Err(bad("bytes after the CID of a link".into()));
                    }
                    links.push(link);
                }
            }
            4 | 5 => {
                let per = u64::from(head >> 5) - 3;
                let items = value.checked_mul(per).ok_or_else(short)?;
                if open.len() >= MAX_DEPTH {
                    return Err(bad(format!("nested deeper than {MAX_DEPTH}")));
                }
                open.push(items);
            }
            6 => {
                tagged = value == 42;
                // The tagged item follows in the tag's place.
                if let Some(left) = open.last_mut() {
                    *left += 1;
                }
            }
            _ => {}
        }
    }
    Ok(links)
}

/// dag-json: `{"/": "cid"}`. serde_json bounds the depth.
fn json(value: &Value, out: &mut Vec<Link>) -> Result<(), BadNode> {
    match value {
        Value::Array(items) => items.iter().try_for_each(|v| json(v, out)),
        Value::Object(map) => {
            if let (1, Some(Value::String(cid))) = (map.len(), map.get("/")) {
                out.push(Link::parse(cid).map_err(|e| BadNode {
                    codec: DAG_JSON,
                    why: e.to_string(),
                })?);
                return Ok(());
            }
            map.values().try_for_each(|v| json(v, out))
        }
        _ => Ok(()),
    }
}
