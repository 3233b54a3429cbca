//! Pieces that come with `SectorAddPieceToAny`, and their data.

use std::io::{self, Write as _};

use cid::Cid;
use lotus_node_client::api::{DealProposal, TipSetKey};
use lotus_node_client::json::{Lotus, address_text};
use lotus_proofs::CommpWriter;
use lotus_types::{
    ActorId, Address, DealKey, Epoch, PaddedSize, PieceCid, PieceInfo, UnpaddedSize,
};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use ulid::Ulid;

use crate::error::RpcError;
use crate::methods::Context;
use crate::streams::Data;

/// The built-in market. Source: builtin-actors, `STORAGE_MARKET_ACTOR_ID`.
const MARKET: u64 = 5;

/// A piece that is handed over, with what the chain is told about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewPiece {
    /// Always the same for the same deal, so that a repeated call finds the place of the first.
    pub key: DealKey,
    /// The piece. Its raw size is all that it can hold: the caller sends zeros, too.
    pub piece: PieceInfo,
    /// Epoch by which its sector must be proven.
    pub start_epoch: Epoch,
    /// Epoch at which the deal ends.
    pub end_epoch: Epoch,
    /// Allocation of verified data: client, number.
    pub allocation: Option<(ActorId, u64)>,
    /// Actor that is told when its sector is proven, and with what.
    pub notify: Option<(Address, Vec<u8>)>,
    /// Whether the raw piece is wanted beside the sealed sector.
    pub keep_unsealed: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Schedule {
    start_epoch: Epoch,
    end_epoch: Epoch,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AllocationKey {
    client: u64,
    #[serde(rename = "ID")]
    id: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Notification {
    address: Lotus<Address>,
    payload: Lotus<Vec<u8>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Manifest {
    #[serde(rename = "CID")]
    cid: Lotus<Cid>,
    size: u64,
    #[serde(default)]
    verified_allocation_key: Option<AllocationKey>,
    #[serde(default)]
    notify: Option<Vec<Notification>>,
}

/// Lotus' `piece.PieceDealInfo`. Source: lotus storage/pipeline/piece/piece_info.go.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PieceDealInfo {
    #[serde(rename = "DealID", default)]
    deal_id: u64,
    #[serde(default)]
    deal_proposal: Option<DealProposal>,
    deal_schedule: Schedule,
    #[serde(default)]
    piece_activation_manifest: Option<Manifest>,
    #[serde(default)]
    keep_unsealed: bool,
}

/// Reads what is handed over. A verified deal of the built-in market is without its allocation:
/// see [`find_allocation`].
pub(crate) fn read(miner: ActorId, size: u64, info: &Value) -> Result<Handed, RpcError> {
    let no = |why: String| Err(RpcError::failed(why));
    let size = padded(size)?;
    let info: PieceDealInfo = serde_json::from_value(info.clone())
        .map_err(|e| RpcError::failed(format!("the deal can not be read: {e}")))?;
    let (start, end) = (info.deal_schedule.start_epoch, info.deal_schedule.end_epoch);
    if start.0 < 0 || end <= start {
        return no(format!("the deal is from epoch {start} to {end}"));
    }
    let (cid, client, name, allocation, notify, verified) =
        match (info.piece_activation_manifest, info.deal_proposal) {
            (Some(m), _) => {
                if m.size != size.get() {
                    return no(format!(
                        "the deal has {} padded bytes, the call {size}",
                        m.size
                    ));
                }
                let mut notify = m.notify.unwrap_or_default();
                if notify.len() > 1 {
                    return no(format!(
                        "{} actors are to be notified, and this hub notifies one",
                        notify.len()
                    ));
                }
                let notify = notify.pop().map(|n| (n.address.0, n.payload.0));
                let allocation = m.verified_allocation_key.map(|a| (ActorId(a.client), a.id));
                let name = match (&allocation, &notify) {
                    (Some((client, id)), _) => format!("allocation/{client}/{id}"),
                    (None, Some((to, payload))) => {
                        format!(
                            "notify/{}/{payload:?}/{}/{start}/{end}",
                            address_text(to),
                            m.cid.0
                        )
                    }
                    (None, None) => format!("piece/{}/{start}/{end}", m.cid.0),
                };
                let client = allocation.map_or(miner, |a| a.0).to_string();
                (m.cid.0, client, name, allocation, notify, None)
            }
            (None, Some(p)) => {
                if p.piece_size != size.get() {
                    let theirs = p.piece_size;
                    return no(format!(
                        "the deal has {theirs} padded bytes, the call {size}"
                    ));
                }
                if p.provider != miner.address() {
                    return no(format!("the deal is with {}", address_text(&p.provider)));
                }
                if info.deal_id == 0 {
                    return no("the deal is not published: it has no DealID".into());
                }
                let name = format!("market/{}", info.deal_id);
                let notify = (ActorId(MARKET).address(), cbor_u64(info.deal_id));
                let verified = p.verified_deal.then_some(p.client);
                let client = address_text(&p.client);
                (p.piece_cid, client, name, None, Some(notify), verified)
            }
            (None, None) => {
                return no(
                    "neither PieceActivationManifest nor DealProposal says the piece".into(),
                );
            }
        };
    let cid = PieceCid::from_cid(&cid).map_err(|e| RpcError::failed(e.to_string()))?;
    let mut id = [0; 16];
    id.copy_from_slice(&Sha256::digest(format!("lotus-api/{name}"))[..16]);
    let piece = NewPiece {
        key: DealKey {
            client,
            id: Ulid::from(u128::from_be_bytes(id)),
        },
        piece: PieceInfo {
            cid,
            size,
            raw_size: size.unpadded().get(),
        },
        start_epoch: start,
        end_epoch: end,
        allocation,
        notify,
        keep_unsealed: info.keep_unsealed,
    };
    Ok(Handed { piece, verified })
}

/// What a call hands over.
#[derive(Debug)]
pub(crate) struct Handed {
    pub(crate) piece: NewPiece,
    /// Client of a verified deal of the built-in market, whose allocation must be looked for.
    pub(crate) verified: Option<Address>,
}

/// Looks for the allocation of a verified deal of the built-in market: the one of its client for
/// the same piece with this provider.
pub(crate) async fn find_allocation(cx: &Context, handed: Handed) -> Result<NewPiece, RpcError> {
    let Handed {
        mut piece,
        verified,
    } = handed;
    let Some(client) = verified else {
        return Ok(piece);
    };
    let all = cx
        .hub
        .node()
        .state_get_allocations(client, &TipSetKey::HEAD)
        .await?;
    let mut fitting = all.iter().filter(|(_, a)| {
        a.provider == cx.hub.miner().0
            && a.data == piece.piece.cid.cid()
            && a.size == piece.piece.size.get()
    });
    match (fitting.next(), fitting.next()) {
        (Some((id, a)), None) => {
            piece.allocation = Some((ActorId(a.client), *id));
            Ok(piece)
        }
        (None, _) => Err(RpcError::failed(
            "the verified deal has no allocation on chain",
        )),
        (Some(_), Some(_)) => Err(RpcError::failed(
            "several allocations fit the verified deal: hand it over with its \
             PieceActivationManifest, which names one",
        )),
    }
}

/// The padded size of an `UnpaddedPieceSize`.
pub(crate) fn padded(size: u64) -> Result<PaddedSize, RpcError> {
    let size = UnpaddedSize::new(size).map_err(|e| RpcError::failed(e.to_string()))?;
    Ok(size.padded())
}

/// The piece that a stream is, extended with zeros to `size`.
pub(crate) async fn data_cid(size: PaddedSize, mut data: Data) -> Result<PieceInfo, RpcError> {
    let hashed = tokio::task::spawn_blocking(move || {
        let mut commp = CommpWriter::new();
        let mut any = false;
        while let Some(chunk) = data.blocking_recv() {
            let chunk = chunk?;
            any |= !chunk.is_empty();
            commp.write_all(&chunk)?;
        }
        if !any {
            return Err(io::Error::other("the stream is empty"));
        }
        commp.extend_to(size)?;
        Ok::<_, io::Error>(commp.finish())
    });
    let hashed = hashed.await.map_err(|e| RpcError::failed(e.to_string()))?;
    Ok(hashed?)
}

/// CBOR of an unsigned number, which a notification of the market has. Source: RFC 8949, 3.1.
fn cbor_u64(n: u64) -> Vec<u8> {
    let bytes = n.to_be_bytes();
    let short = bytes.iter().position(|b| *b != 0).unwrap_or(7);
    match (n, short) {
        (0..=23, _) => vec![bytes[7]],
        (_, 7) => [&[0x18], &bytes[7..]].concat(),
        (_, 6) => [&[0x19], &bytes[6..]].concat(),
        (_, 4 | 5) => [&[0x1a], &bytes[4..]].concat(),
        _ => [&[0x1b], &bytes[..]].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CID: &str = "baga6ea4seaqao7s73y24kcutaosvacpdjgfe5pw76ooefnyqw4ynr3d2y6x2mpq";
    const MINER: ActorId = ActorId(1000);

    fn manifest(allocation: Value) -> Value {
        json!({
            "PublishCid": null, "DealID": 0, "DealProposal": null,
            "DealSchedule": {"StartEpoch": 10, "EndEpoch": 900},
            "PieceActivationManifest": {"CID": {"/": CID}, "Size": 256,
                "VerifiedAllocationKey": allocation, "Notify": null},
            "KeepUnsealed": true,
        })
    }

    fn proposal(id: u64, verified: bool) -> Value {
        json!({
            "PublishCid": null, "DealID": id,
            "DealProposal": {"PieceCID": {"/": CID}, "PieceSize": 256, "VerifiedDeal": verified,
                "Client": "t01004", "Provider": "t01000", "Label": "", "StartEpoch": 10,
                "EndEpoch": 900, "StoragePricePerEpoch": "0", "ProviderCollateral": "0",
                "ClientCollateral": "0"},
            "DealSchedule": {"StartEpoch": 10, "EndEpoch": 900},
            "PieceActivationManifest": null, "KeepUnsealed": false,
        })
    }

    #[test]
    fn a_deal_has_one_key_however_often_it_is_handed_over() {
        let key = |info: &Value| read(MINER, 254, info).unwrap().piece.key;
        let first = manifest(json!({"Client": 1004, "ID": 7}));
        let got = read(MINER, 254, &first).unwrap();
        assert_eq!(got.piece.allocation, Some((ActorId(1004), 7)));
        assert_eq!(
            (got.piece.key.client.as_str(), got.piece.piece.raw_size),
            ("t01004", 254)
        );
        assert!(got.piece.keep_unsealed && got.verified.is_none());
        let all = [
            first,
            manifest(json!({"Client": 1004, "ID": 8})),
            manifest(Value::Null),
            proposal(3, false),
            proposal(4, true),
        ];
        for (i, a) in all.iter().enumerate() {
            for (j, b) in all.iter().enumerate() {
                assert_eq!(key(a) == key(b), i == j, "{a} {b}");
            }
        }
        let market = read(MINER, 254, &all[4]).unwrap();
        assert_eq!(market.verified, Some(ActorId(1004).address()));
        assert_eq!(market.piece.notify, Some((ActorId(5).address(), vec![4])));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut late = manifest(Value::Null);
        late["DealSchedule"]["EndEpoch"] = 10.into();
        let mut nothing = manifest(Value::Null);
        nothing["PieceActivationManifest"] = Value::Null;
        let mut other = proposal(3, false);
        other["DealProposal"]["Provider"] = "t01001".into();
        let two = json!([{"Address": "t05", "Payload": ""}, {"Address": "t06", "Payload": ""}]);
        let mut many = manifest(Value::Null);
        many["PieceActivationManifest"]["Notify"] = two;
        for (size, info) in [
            (127, manifest(Value::Null)),
            (255, manifest(Value::Null)),
            (254, late),
            (254, nothing),
            (254, other),
            (254, many),
            (254, proposal(0, false)),
            (254, Value::Null),
        ] {
            assert!(read(MINER, size, &info).is_err(), "{size} {info}");
        }
    }

    #[test]
    fn cbor_is_the_shortest() {
        for (n, want) in [
            (0, "00"),
            (23, "17"),
            (24, "1818"),
            (256, "190100"),
            (65_536, "1a00010000"),
            (1 << 32, "1b0000000100000000"),
        ] {
            let hex: String = cbor_u64(n).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hex, want);
        }
    }
}
