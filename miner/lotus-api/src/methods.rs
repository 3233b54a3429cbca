//! The methods: one table, from which calls are dispatched and the tests read.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use jsonrpsee::types::Params;
use lotus_node_client::api::TipSetKey;
use lotus_node_client::json::{FromLotus, Lotus};
use lotus_proofs::seal_proof_type;
use lotus_tokens::{Perm, Tokens};
use lotus_types::{ActorId, Address, PieceCid, SectorNumber};
use lotus_workers::WorkerInfo;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use crate::auth::Caller;
use crate::deal::{data_cid, find_allocation, padded, read};
use crate::error::RpcError;
use crate::machine::Machine;
use crate::paths::{self, Purpose, may_lock, sector_id};
use crate::streams::Streams;
use crate::types::{
    AddressConfig, ApiVersion, Decl, FsStat, PieceInfo, SectorInfo, SectorOffset, StorageInfo,
};
use crate::work::{SchedDiag, WorkerJob, WorkerStats, worker_id};
use crate::{Hub, StoragePath};

/// Version of the StorageMiner API that is answered: 1.5.0, major to patch a byte each. Source:
/// lotus api/version.go, `MinerAPIVersion0`.
const API_VERSION: u32 = 0x01_05_00;

/// Letters of a report that are logged.
const MAX_REPORT: usize = 400;

/// What the methods answer from.
pub(crate) struct Context {
    pub(crate) hub: Arc<dyn Hub>,
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) session: Uuid,
    pub(crate) started: jiff::Timestamp,
    pub(crate) streams: Arc<Streams>,
}

/// A method of the API.
pub struct Method {
    /// Its name without `Filecoin.`.
    pub name: &'static str,
    /// Its name on the wire.
    pub full_name: &'static str,
    /// The permission that it needs.
    pub perm: Perm,
    /// Its parameters, in order.
    pub params: &'static [&'static str],
    call: fn(Arc<Context>, Args) -> BoxFuture<'static, Result<Value, RpcError>>,
}

/// Methods that move data, unseal, or wait for a sector.
const LONG: [&str; 3] = [
    "ComputeDataCid",
    "SectorAddPieceToAny",
    "SectorsUnsealPiece",
];

impl fmt::Debug for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.name, self.params.join(", "))
    }
}

impl Method {
    /// Whether it may take long.
    pub(crate) fn is_long(&self) -> bool {
        LONG.contains(&self.name)
    }

    /// Whether a request may be a call of a method that takes long.
    pub(crate) fn may_be_long(request: &[u8]) -> bool {
        let named = |name: &str| request.windows(name.len()).any(|w| w == name.as_bytes());
        LONG.iter().any(|name| named(name))
    }

    /// Checks the caller and the number of parameters, and answers.
    pub(crate) async fn answer(
        &self,
        cx: Arc<Context>,
        caller: &Caller,
        params: &Params<'_>,
    ) -> Result<Value, RpcError> {
        if !caller.perms.contains(&self.perm) {
            return Err(RpcError::denied(self.name, self.perm));
        }
        let values: Option<Vec<Value>> = serde_json::from_str(params.as_str().unwrap_or("null"))
            .map_err(|e| RpcError::param(self.name, "all", &e))?;
        let values = values.unwrap_or_default();
        if values.len() != self.params.len() {
            let (given, wanted) = (values.len(), self.params.len());
            return Err(RpcError::param_count(self.name, given, wanted));
        }
        let args = Args {
            method: self.name,
            base: caller.base.clone(),
            values: self.params.iter().copied().zip(values).collect(),
        };
        (self.call)(cx, args).await
    }
}

/// The parameters of a call, by name.
pub(crate) struct Args {
    method: &'static str,
    /// URL by which the caller reaches this API.
    base: String,
    values: BTreeMap<&'static str, Value>,
}

impl Args {
    fn get<T: FromLotus>(&self, name: &str) -> Result<T, RpcError> {
        let value = self.values.get(name).cloned().unwrap_or_default();
        let read = serde_json::from_value::<Lotus<T>>(value);
        read.map(|v| v.0)
            .map_err(|e| RpcError::param(self.method, name, &e))
    }
}

fn to_json(value: impl Serialize) -> Result<Value, RpcError> {
    serde_json::to_value(value).map_err(|e| RpcError::failed(e.to_string()))
}

macro_rules! methods {
    ($cx:ident, $base:ident: $($perm:ident $name:ident($($arg:ident: $ty:ty),*) $body:block)*) => {
        /// Every method, by name.
        pub const METHODS: &[Method] = &[$(Method {
            name: stringify!($name),
            full_name: concat!("Filecoin.", stringify!($name)),
            perm: Perm::$perm,
            params: &[$(stringify!($arg)),*],
            call: |$cx, args| async move {
                $(let $arg: $ty = args.get(stringify!($arg))?;)*
                let $base = args.base;
                // Most do not tell where they are.
                let _unused = &$base;
                to_json($body)
            }.boxed(),
        }),*];
    };
}

methods! { cx, base:
    Read ActorAddress() { Lotus(cx.hub.miner().address()) }
    Read ActorAddressConfig() { AddressConfig::from(cx.hub.senders()) }
    Read ActorSectorSize(miner: Address) { sector_size(&cx, miner).await? }
    Admin AuthNew(perms: Vec<String>) { Lotus(new_token(&cx, &perms)?) }
    Read AuthVerify(token: String) {
        let perms = cx.tokens.verify(&token);
        perms.ok_or_else(|| RpcError::failed("JWT Verification failed"))?
    }
    Admin ComputeDataCid(size: u64, data: Value) {
        let size = padded(size)?;
        if size.get() > cx.hub.sector_size().bytes() {
            return Err(RpcError::failed(format!("a sector does not hold {size} padded bytes")));
        }
        let data = cx.streams.open(&data, size.unpadded().get())?;
        PieceInfo::from(data_cid(size, data).await?)
    }
    Read MiningBase() {
        let head = cx.hub.head();
        let head = head.ok_or_else(|| RpcError::failed("the full node was not reached yet"))?;
        (*head).clone()
    }
    Admin SealingSchedDiag(do_sched: bool) {
        // The scheduler never waits to be told.
        let _asked = do_sched;
        SchedDiag::new(&cx.hub.jobs(), &cx.hub.workers())
    }
    Admin SectorAddPieceToAny(size: u64, data: Value, info: Value) {
        let handed = read(cx.hub.miner(), size, &info)?;
        let piece = find_allocation(&cx, handed).await?;
        if !piece.piece.fits(cx.hub.sector_size()) {
            let size = piece.piece.size;
            return Err(RpcError::failed(format!("a sector does not hold {size} padded bytes")));
        }
        let data = cx.streams.open(&data, size)?;
        let (sector, offset) = cx.hub.add_piece(piece, data).await?;
        SectorOffset { sector, offset }
    }
    Read SectorsList() {
        let all = cx.hub.sectors();
        all.into_iter().map(|(number, _)| number).collect::<Vec<_>>()
    }
    Read SectorsListInStates(states: Vec<String>) {
        let all = cx.hub.sectors().into_iter();
        let wanted = all.filter(|(_, state)| states.iter().any(|s| s == state.as_str()));
        wanted.map(|(number, _)| number).collect::<Vec<_>>()
    }
    Read SectorsStatus(number: SectorNumber, on_chain: bool) {
        sector(&cx, number, on_chain).await?
    }
    Read SectorsSummary() {
        let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
        for (_, state) in cx.hub.sectors() {
            *sums.entry(state.as_str()).or_default() += 1;
        }
        sums
    }
    Admin SectorsUnsealPiece(
        sector: Value, offset: u64, size: u64, randomness: Value, comm_d: Value
    ) {
        // Both are those of the sector, and the hub knows them.
        let _told = (randomness, comm_d);
        unseal(&cx, &sector["ID"], offset, size).await?;
        Value::Null
    }
    Read Session() { cx.session }
    Read StartTime() { cx.started.to_string() }
    Admin StorageBestAlloc(files: u32, size: u64, purpose: String, miner: u64) {
        let kinds = u64::from(files.count_ones());
        let bytes = size.saturating_mul(kinds);
        paths::best(cx.hub.storage(), bytes, Purpose::read(&purpose)?, ActorId(miner))?
    }
    Admin StorageDeclareSector(path: String, sector: Value, files: u32, primary: bool) {
        let _each_is_primary_here = primary;
        let sector = sector_id(&*cx.hub, &sector)?;
        if !paths::has(&cx, &path, sector, files).await? {
            return Err(RpcError::failed(format!("storage path {path} has no files of {sector}")));
        }
        Value::Null
    }
    Admin StorageDropSector(path: String, sector: Value, files: u32) {
        let sector = sector_id(&*cx.hub, &sector)?;
        if paths::has(&cx, &path, sector, files).await? {
            return Err(RpcError::failed(format!(
                "storage path {path} has files of {sector}: the hub drops what is gone from the disk"
            )));
        }
        Value::Null
    }
    Admin StorageFindSector(sector: Value, files: u32, size: u64, fetch: bool) {
        // Paths say themselves how large sectors are, and nothing is fetched.
        let _told = (size, fetch);
        paths::find(&cx, sector_id(&*cx.hub, &sector)?, files, &base)?
    }
    Admin StorageInfo(id: String) { StorageInfo::new(storage_path(&cx, &id)?) }
    Admin StorageList() {
        let decls = |path: &StoragePath| {
            let all = path.sectors.iter();
            all.map(|(id, files)| Decl::new(*id, *files)).collect::<Vec<_>>()
        };
        let paths = cx.hub.storage();
        paths.iter().map(|p| (p.id.clone(), decls(p))).collect::<BTreeMap<_, _>>()
    }
    Admin StorageLocal() {
        let paths = cx.hub.storage().into_iter();
        paths.map(|p| (p.id, p.path)).collect::<BTreeMap<_, _>>()
    }
    Admin StorageLock(sector: Value, read: u32, write: u32) {
        let _needs_no_lock = read;
        if !may_lock(&*cx.hub, sector_id(&*cx.hub, &sector)?, write)? {
            return Err(RpcError::failed("files of a sector are written by its hub alone"));
        }
        Value::Null
    }
    Admin StorageRedeclareLocal(id: Option<String>, drop_missing: bool) {
        // What is gone from a disk that is there is always dropped.
        let _told = drop_missing;
        cx.hub.redeclare(id).await?;
        Value::Null
    }
    Admin StorageReportHealth(id: String, report: Value) {
        let path = storage_path(&cx, &id)?.id;
        // The hub looks at its paths itself.
        match report["Err"].as_str().unwrap_or_default() {
            "" => tracing::debug!(path, "a caller says that a storage path is healthy"),
            why => {
                let why: String = why.chars().take(MAX_REPORT).collect();
                tracing::warn!(path, "a caller says of a storage path: {why}");
            }
        }
        Value::Null
    }
    Admin StorageStat(id: String) { FsStat::of(&storage_path(&cx, &id)?) }
    Admin StorageTryLock(sector: Value, read: u32, write: u32) {
        let _needs_no_lock = read;
        may_lock(&*cx.hub, sector_id(&*cx.hub, &sector)?, write)?
    }
    Read Version() {
        ApiVersion {
            version: concat!(env!("CARGO_PKG_VERSION"), "+lotus-hub").into(),
            api_version: API_VERSION,
            block_delay: cx.hub.block_delay().map_or(0, |d| d.as_secs()),
            agent: "lotus-hub".into(),
        }
    }
    Admin WorkerJobs() {
        let mut jobs: BTreeMap<Uuid, Vec<WorkerJob>> = BTreeMap::new();
        let here = Machine::here();
        let found = cx.hub.jobs();
        let found = found.iter().filter_map(|j| WorkerJob::new(j, &here.hostname));
        for (worker, job) in found {
            jobs.entry(worker).or_default().push(job);
        }
        jobs
    }
    Admin WorkerStats() {
        let (jobs, here) = (cx.hub.jobs(), Machine::here());
        let proof = seal_proof_type(cx.hub.sector_size());
        let workers = cx.hub.workers();
        let stats = |w: &WorkerInfo| (worker_id(w.id), WorkerStats::new(w, &jobs, &here, proof));
        workers.iter().map(stats).collect::<BTreeMap<_, _>>()
    }
}

async fn sector_size(cx: &Context, miner: Address) -> Result<u64, RpcError> {
    if miner == cx.hub.miner().address() {
        return Ok(cx.hub.sector_size().bytes());
    }
    let info = cx
        .hub
        .node()
        .state_miner_info(miner, &TipSetKey::HEAD)
        .await?;
    Ok(info.sector_size)
}

fn new_token(cx: &Context, perms: &[String]) -> Result<Vec<u8>, RpcError> {
    let perms: Result<Vec<Perm>, String> = perms.iter().map(|p| p.parse()).collect();
    let perms = perms.map_err(|e| RpcError::failed(format!("a permission is {e}")))?;
    tracing::info!(?perms, "a token was made over the Lotus API");
    Ok(cx.tokens.issue(&perms).into_bytes())
}

async fn sector(
    cx: &Context,
    number: SectorNumber,
    on_chain: bool,
) -> Result<SectorInfo, RpcError> {
    let record = cx.hub.sector(number)?;
    let record = record.ok_or_else(|| RpcError::failed(format!("sector {number} not found")))?;
    let has_raw = |piece: &PieceCid| cx.hub.raw_file(piece).is_some();
    let mut info = SectorInfo::new(record, cx.hub.sector_size(), has_raw);
    if !on_chain {
        return Ok(info);
    }
    let (node, miner, head) = (cx.hub.node(), cx.hub.miner().address(), TipSetKey::HEAD);
    if let Some(chain) = node.state_sector_get_info(miner, number, &head).await? {
        info.activation = chain.activation;
        info.expiration = chain.expiration;
        info.deal_weight = chain.deal_weight.to_string();
        info.verified_deal_weight = chain.verified_deal_weight.to_string();
        info.initial_pledge = chain.initial_pledge.atto().to_string();
        let ends = node.state_sector_expiration(miner, number, &head).await?;
        info.on_time = ends.on_time;
        info.early = ends.early;
    }
    Ok(info)
}

fn storage_path(cx: &Context, id: &str) -> Result<StoragePath, RpcError> {
    let mut paths = cx.hub.storage().into_iter();
    paths
        .find(|p| p.id == id)
        .ok_or_else(|| RpcError::failed(format!("no storage path {id}")))
}

/// Unseals the pieces that lie in a part of a sector, without padding.
async fn unseal(cx: &Context, sector: &Value, offset: u64, size: u64) -> Result<(), RpcError> {
    let number = sector_id(&*cx.hub, sector)?.number;
    let record = cx.hub.sector(number)?;
    let record = record.ok_or_else(|| RpcError::failed(format!("sector {number} not found")))?;
    let end = offset.saturating_add(size);
    let touched = record.sector.pieces.iter().filter(|p| {
        // Source: Fr32 stores 127 bytes in every 128.
        let at = p.offset / 128 * 127;
        at < end && at.saturating_add(p.piece.size.unpadded().get()) > offset
    });
    let touched: Vec<_> = touched.map(|p| p.piece.cid).collect();
    if touched.is_empty() {
        return Err(RpcError::failed(format!(
            "sector {number} has no piece there"
        )));
    }
    for piece in touched {
        if cx.hub.raw_file(&piece).is_none() {
            cx.hub.unseal(piece).await?;
        }
    }
    Ok(())
}
