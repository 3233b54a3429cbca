//! Results in Lotus' JSON. The names of types and fields are those of its Go code.

use cid::Cid;
use lotus_node_client::json::Lotus;
use lotus_proofs::seal_proof_type;
use lotus_sealing::machine::Allocation;
use lotus_sealing::{LogEntry, SectorPiece, SectorRecord};
use lotus_types::{Address, Epoch, PieceCid, SectorId, SectorNumber, SectorSize};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use uuid::{Builder, Uuid};

use crate::{Senders, StoragePath};

/// A UUID for something that has another name here: always the same for the same name.
pub(crate) fn uuid_of(kind: &str, name: &str) -> Uuid {
    let digest = Sha256::digest(format!("lotus-hub/{kind}/{name}"));
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    Builder::from_custom_bytes(bytes).into_uuid()
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct ApiVersion {
    pub(crate) version: String,
    #[serde(rename = "APIVersion")]
    pub(crate) api_version: u32,
    pub(crate) block_delay: u64,
    pub(crate) agent: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct AddressConfig {
    pre_commit_control: Lotus<Vec<Address>>,
    commit_control: Lotus<Vec<Address>>,
    terminate_control: Lotus<Vec<Address>>,
    deal_publish_control: Lotus<Vec<Address>>,
    disable_owner_fallback: bool,
    disable_worker_fallback: bool,
}

impl From<Senders> for AddressConfig {
    fn from(s: Senders) -> Self {
        Self {
            pre_commit_control: Lotus(s.pre_commit),
            commit_control: Lotus(s.commit),
            terminate_control: Lotus(s.terminate),
            deal_publish_control: Lotus(s.publish),
            disable_owner_fallback: !s.owner_falls_in,
            disable_worker_fallback: !s.worker_falls_in,
        }
    }
}

/// `abi.SectorID`.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct SectorRef {
    miner: u64,
    number: u64,
}

impl From<SectorId> for SectorRef {
    fn from(id: SectorId) -> Self {
        Self {
            miner: id.miner.0,
            number: id.number.0,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Randomness {
    value: Lotus<Option<Vec<u8>>>,
    epoch: Epoch,
}

impl Randomness {
    fn new(found: Option<([u8; 32], Epoch)>) -> Self {
        Self {
            epoch: found.map_or(Epoch(0), |f| f.1),
            value: Lotus(found.map(|f| f.0.to_vec())),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct SectorLog {
    kind: String,
    /// Unix seconds.
    timestamp: u64,
    trace: String,
    message: String,
}

impl From<LogEntry> for SectorLog {
    fn from(e: LogEntry) -> Self {
        let moved = if e.from == e.to {
            String::new()
        } else {
            format!("{} -> {}", e.from, e.to)
        };
        let parts = [moved, e.message];
        let said: Vec<&str> = parts
            .iter()
            .map(String::as_str)
            .filter(|p| !p.is_empty())
            .collect();
        Self {
            kind: e.event,
            timestamp: e.unix_ms / 1_000,
            trace: String::new(),
            message: said.join(": "),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct PieceInfo {
    size: u64,
    #[serde(rename = "PieceCID")]
    piece_cid: Lotus<Cid>,
}

impl From<lotus_types::PieceInfo> for PieceInfo {
    fn from(p: lotus_types::PieceInfo) -> Self {
        Self {
            size: p.size.get(),
            piece_cid: Lotus(p.cid.cid()),
        }
    }
}

/// Where a piece is. The offset is padded.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct SectorOffset {
    pub(crate) sector: SectorNumber,
    pub(crate) offset: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct DealSchedule {
    start_epoch: Epoch,
    end_epoch: Epoch,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct AllocationKey {
    client: u64,
    #[serde(rename = "ID")]
    id: u64,
}

impl From<Allocation> for AllocationKey {
    fn from(a: Allocation) -> Self {
        Self {
            client: a.client.0,
            id: a.id,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Notification {
    address: Lotus<Address>,
    payload: Lotus<Vec<u8>>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct PieceActivationManifest {
    #[serde(rename = "CID")]
    cid: Lotus<Cid>,
    size: u64,
    verified_allocation_key: Option<AllocationKey>,
    notify: Vec<Notification>,
}

/// `piece.PieceDealInfo`. Every piece is activated by its manifest (`ProveCommitSectors3`), deals
/// of the built-in market too, so the fields of the old way are empty.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct PieceDealInfo {
    publish_cid: Option<()>,
    #[serde(rename = "DealID")]
    deal_id: u64,
    deal_proposal: Option<()>,
    deal_schedule: DealSchedule,
    piece_activation_manifest: PieceActivationManifest,
    keep_unsealed: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct SectorPieceInfo {
    piece: PieceInfo,
    deal_info: PieceDealInfo,
}

impl From<SectorPiece> for SectorPieceInfo {
    fn from(p: SectorPiece) -> Self {
        let cid = p.piece.cid.cid();
        let size = p.piece.size.get();
        let t = p.terms;
        let notify = t.notify.into_iter().map(|n| Notification {
            address: Lotus(n.address),
            payload: Lotus(n.payload),
        });
        Self {
            piece: PieceInfo::from(p.piece),
            deal_info: PieceDealInfo {
                publish_cid: None,
                deal_id: 0,
                deal_proposal: None,
                deal_schedule: DealSchedule {
                    start_epoch: t.start_epoch,
                    end_epoch: t.end_epoch,
                },
                piece_activation_manifest: PieceActivationManifest {
                    cid: Lotus(cid),
                    size,
                    verified_allocation_key: t.allocation.map(AllocationKey::from),
                    notify: notify.collect(),
                },
                // Said by the caller of this.
                keep_unsealed: false,
            },
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct SectorInfo {
    #[serde(rename = "SectorID")]
    sector_id: u64,
    state: &'static str,
    comm_d: Lotus<Option<Cid>>,
    comm_r: Lotus<Option<Cid>>,
    /// The hub keeps a proof only until it is on chain, and shows none.
    proof: Option<()>,
    deals: Vec<u64>,
    pieces: Vec<SectorPieceInfo>,
    ticket: Randomness,
    seed: Randomness,
    pre_commit_msg: Lotus<Option<Cid>>,
    commit_msg: Lotus<Option<Cid>>,
    retries: u64,
    to_upgrade: bool,
    replica_update_message: Lotus<Option<Cid>>,
    last_err: String,
    log: Vec<SectorLog>,
    seal_proof: i64,
    pub(crate) activation: Epoch,
    pub(crate) expiration: Epoch,
    pub(crate) deal_weight: String,
    pub(crate) verified_deal_weight: String,
    /// attoFIL.
    pub(crate) initial_pledge: String,
    pub(crate) on_time: Epoch,
    pub(crate) early: Epoch,
}

impl SectorInfo {
    /// What the hub knows. What only the chain knows is zero, as with Lotus.
    /// `has_raw`: whether a raw copy of a piece is here.
    pub(crate) fn new(
        record: SectorRecord,
        size: SectorSize,
        has_raw: impl Fn(&PieceCid) -> bool,
    ) -> Self {
        let s = record.sector;
        let zero = || "0".to_owned();
        let deals = vec![0; s.pieces.len()];
        let pieces = s.pieces.into_iter().map(|p| {
            let kept = has_raw(&p.piece.cid);
            let mut told = SectorPieceInfo::from(p);
            told.deal_info.keep_unsealed = kept;
            told
        });
        Self {
            sector_id: record.number.0,
            state: s.state.as_str(),
            comm_d: Lotus(s.commitments.map(|c| c.comm_d.unsealed_cid())),
            comm_r: Lotus(s.commitments.map(|c| c.comm_r.sealed_cid())),
            proof: None,
            deals,
            pieces: pieces.collect(),
            ticket: Randomness::new(s.ticket.map(|t| (t.value, t.epoch))),
            seed: Randomness::new(s.seed.map(|t| (t.value, t.epoch))),
            pre_commit_msg: Lotus(s.pre_commit),
            commit_msg: Lotus(s.commit),
            retries: s.failures.into(),
            to_upgrade: false,
            replica_update_message: Lotus(s.update.and_then(|u| u.message)),
            last_err: record.last_error.or(s.reason).unwrap_or_default(),
            log: record.log.into_iter().map(SectorLog::from).collect(),
            seal_proof: seal_proof_type(size),
            activation: Epoch(0),
            expiration: Epoch(0),
            deal_weight: zero(),
            verified_deal_weight: zero(),
            initial_pledge: zero(),
            on_time: Epoch(0),
            early: Epoch(0),
        }
    }
}

/// `storiface.Decl`: a sector in a storage path.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Decl {
    #[serde(flatten)]
    sector: SectorRef,
    sector_file_type: u32,
}

impl Decl {
    pub(crate) fn new(sector: SectorId, files: u32) -> Self {
        Self {
            sector: sector.into(),
            sector_file_type: files,
        }
    }
}

/// `storiface.StorageInfo`.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct StorageInfo {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "URLs")]
    urls: Vec<String>,
    weight: u64,
    max_storage: u64,
    can_seal: bool,
    can_store: bool,
    groups: Vec<String>,
    allow_to: Vec<String>,
    allow_types: Vec<String>,
    deny_types: Vec<String>,
    allow_miners: Vec<String>,
    deny_miners: Vec<String>,
}

impl StorageInfo {
    pub(crate) fn new(path: StoragePath) -> Self {
        let mut info = Self {
            id: path.id,
            // Other hosts can not fetch sectors from here.
            urls: Vec::new(),
            weight: 0,
            max_storage: 0,
            can_seal: false,
            can_store: false,
            groups: Vec::new(),
            allow_to: Vec::new(),
            allow_types: Vec::new(),
            deny_types: Vec::new(),
            allow_miners: Vec::new(),
            deny_miners: Vec::new(),
        };
        // A path that was not there yet: nothing is sealed or kept in it.
        if let Some(s) = path.settings {
            (info.weight, info.max_storage) = (s.weight, s.max_storage);
            (info.can_seal, info.can_store) = (s.can_seal, s.can_store);
            (info.groups, info.allow_to) = (s.groups, s.allow_to);
            (info.allow_types, info.deny_types) = (s.allow_types, s.deny_types);
            (info.allow_miners, info.deny_miners) = (s.allow_miners, s.deny_miners);
        }
        info
    }
}

/// `fsutil.FsStat`: bytes of the file system below a storage path.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct FsStat {
    capacity: u64,
    available: u64,
    #[serde(rename = "FSAvailable")]
    fs_available: u64,
    reserved: u64,
    max: u64,
    used: u64,
}

impl FsStat {
    pub(crate) fn of(path: &StoragePath) -> Self {
        let max = path.settings.as_ref().map_or(0, |s| s.max_storage);
        Self {
            capacity: path.capacity,
            available: path.room(),
            fs_available: path.available,
            reserved: path.reserved,
            max,
            used: path.used,
        }
    }
}
