//! Results in Lotus' JSON. The names of types and fields are those of its Go code.

use std::collections::BTreeMap;

use cid::Cid;
use lotus_node_client::json::Lotus;
use lotus_proofs::seal_proof_type;
use lotus_sealing::machine::Allocation;
use lotus_sealing::{LogEntry, SectorPiece, SectorRecord};
use lotus_types::{Address, Epoch, SectorId, SectorSize};
use lotus_workers::{Class, JobInfo, WorkerInfo};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use uuid::{Builder, Uuid};

use crate::machine::{Machine, resident};
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
struct PieceInfo {
    size: u64,
    #[serde(rename = "PieceCID")]
    piece_cid: Lotus<Cid>,
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
            piece: PieceInfo {
                size,
                piece_cid: Lotus(cid),
            },
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
                // The raw piece stays a file of its own.
                keep_unsealed: true,
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
    pub(crate) fn new(record: SectorRecord, size: SectorSize) -> Self {
        let s = record.sector;
        let zero = || "0".to_owned();
        Self {
            sector_id: record.number.0,
            state: s.state.as_str(),
            comm_d: Lotus(s.commitments.map(|c| c.comm_d.unsealed_cid())),
            comm_r: Lotus(s.commitments.map(|c| c.comm_r.sealed_cid())),
            proof: None,
            deals: vec![0; s.pieces.len()],
            pieces: s.pieces.into_iter().map(SectorPieceInfo::from).collect(),
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
        let free = path.available.saturating_sub(path.reserved);
        let left = match max {
            0 => u64::MAX,
            max => max.saturating_sub(path.used).saturating_sub(path.reserved),
        };
        Self {
            capacity: path.capacity,
            available: free.min(left),
            fs_available: path.available,
            reserved: path.reserved,
            max,
            used: path.used,
        }
    }
}

/// The name of a step as Lotus writes it; source: lotus storage/sealer/sealtasks/task.go.
fn task_type(step: &str) -> String {
    match step {
        "add_pieces" => "seal/v0/addpiece",
        "pre_commit1" => "seal/v0/precommit/1",
        "pre_commit2" => "seal/v0/precommit/2",
        "commit" => "seal/v0/commit/2",
        "finalize" => "seal/v0/finalize",
        "unseal" => "seal/v0/unseal",
        "window_post" => "post/v0/windowproof",
        "winning_post" => "post/v0/winningproof",
        other => return format!("hub/v0/{other}"),
    }
    .into()
}

/// Everything that a worker of a class does, by the names of Lotus.
fn tasks_of(class: Class) -> Vec<String> {
    let steps: &[&str] = match class {
        Class::Seal => &[
            "add_pieces",
            "pre_commit1",
            "pre_commit2",
            "commit",
            "finalize",
            "unseal",
        ],
        Class::Prove => &["window_post", "winning_post"],
    };
    steps.iter().map(|s| task_type(s)).collect()
}

pub(crate) fn worker_id(worker: u64) -> Uuid {
    uuid_of("worker", &worker.to_string())
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct CallId {
    sector: SectorRef,
    #[serde(rename = "ID")]
    id: Uuid,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct WorkerJob {
    #[serde(rename = "ID")]
    id: CallId,
    sector: SectorRef,
    task: String,
    /// 0: it runs.
    run_wait: i32,
    start: String,
    hostname: String,
}

impl WorkerJob {
    /// A job that runs; `None` for one that is about no single sector.
    pub(crate) fn new(job: &JobInfo, hostname: &str) -> Option<(Uuid, Self)> {
        let sector = SectorRef::from(job.sector?);
        let start = i64::try_from(job.since_unix_ms).unwrap_or(0);
        let start = jiff::Timestamp::from_millisecond(start).unwrap_or_default();
        let made = Self {
            id: CallId {
                sector,
                id: uuid_of("task", &job.id),
            },
            sector,
            task: task_type(&job.step),
            run_wait: 0,
            start: start.to_string(),
            hostname: hostname.into(),
        };
        Some((worker_id(job.worker?), made))
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct WorkerResources {
    mem_physical: u64,
    mem_used: u64,
    mem_swap: u64,
    mem_swap_used: u64,
    #[serde(rename = "CPUs")]
    cpus: u64,
    #[serde(rename = "GPUs")]
    gpus: Vec<String>,
    resources: Option<()>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct WorkerMachine {
    hostname: String,
    ignore_resources: bool,
    resources: WorkerResources,
}

/// `storiface.WorkerStats`. Memory is measured; Lotus estimates it.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct WorkerStats {
    info: WorkerMachine,
    tasks: Vec<String>,
    enabled: bool,
    mem_used_min: u64,
    mem_used_max: u64,
    gpu_used: f64,
    cpu_use: u64,
    task_counts: BTreeMap<String, u64>,
}

impl WorkerStats {
    /// Of a worker on another host is shown what it says that it has; the others are on `here`.
    pub(crate) fn new(worker: &WorkerInfo, jobs: &[JobInfo], here: &Machine, proof: i64) -> Self {
        let mut task_counts = BTreeMap::new();
        for job in jobs.iter().filter(|j| j.worker == Some(worker.id)) {
            let key = format!("{proof}:{}", task_type(&job.step));
            *task_counts.entry(key).or_default() += 1;
        }
        let memory = worker.pid.map_or(0, resident);
        let resources = match &worker.declared {
            Some(there) => WorkerResources {
                mem_physical: there.memory,
                mem_used: 0,
                mem_swap: 0,
                mem_swap_used: 0,
                cpus: there.cores.into(),
                gpus: Vec::new(),
                resources: None,
            },
            None => WorkerResources {
                mem_physical: here.memory,
                mem_used: here.memory_used,
                mem_swap: here.swap,
                mem_swap_used: here.swap_used,
                cpus: here.cpus,
                gpus: Vec::new(),
                resources: None,
            },
        };
        let cpus = resources.cpus;
        Self {
            info: WorkerMachine {
                hostname: worker.host.as_ref().unwrap_or(&here.hostname).clone(),
                ignore_resources: false,
                resources,
            },
            tasks: tasks_of(worker.class),
            enabled: true,
            mem_used_min: memory,
            mem_used_max: memory,
            gpu_used: 0.0,
            // A worker computes on all processors, or not at all.
            cpu_use: if task_counts.is_empty() { 0 } else { cpus },
            task_counts,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct SchedRequest {
    sector: Option<SectorRef>,
    task_type: String,
    priority: i32,
    sched_id: Uuid,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct SchedInfo {
    requests: Vec<SchedRequest>,
    open_windows: Vec<String>,
}

/// What waits for a worker, and which task each busy worker has.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct SchedDiag {
    sched_info: SchedInfo,
    returned_work: Vec<String>,
    waiting: Vec<String>,
    call_to_work: BTreeMap<String, String>,
    early_ret: Vec<String>,
}

impl SchedDiag {
    pub(crate) fn new(jobs: &[JobInfo], workers: &[WorkerInfo]) -> Self {
        let (running, waiting): (Vec<_>, Vec<_>) = jobs.iter().partition(|j| j.worker.is_some());
        let requests = waiting.into_iter().map(|job| SchedRequest {
            sector: job.sector.map(SectorRef::from),
            task_type: task_type(&job.step),
            priority: 0,
            sched_id: uuid_of("task", &job.id),
        });
        let busy = |w: &WorkerInfo| running.iter().any(|j| j.worker == Some(w.id));
        let idle = workers.iter().filter(|w| !busy(w));
        Self {
            sched_info: SchedInfo {
                requests: requests.collect(),
                open_windows: idle.map(|w| worker_id(w.id).to_string()).collect(),
            },
            returned_work: Vec::new(),
            waiting: Vec::new(),
            call_to_work: running
                .iter()
                .map(|j| (uuid_of("task", &j.id).to_string(), task_type(&j.step)))
                .collect(),
            early_ret: Vec::new(),
        }
    }
}
