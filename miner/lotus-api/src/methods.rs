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
use lotus_types::{Address, SectorNumber};
use lotus_workers::WorkerInfo;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use crate::error::RpcError;
use crate::machine::Machine;
use crate::types::{
    AddressConfig, ApiVersion, Decl, FsStat, SchedDiag, SectorInfo, StorageInfo, WorkerJob,
    WorkerStats, worker_id,
};
use crate::{Hub, StoragePath};

/// Version of the StorageMiner API that is answered: 1.5.0, major to patch a byte each. Source:
/// lotus api/version.go, `MinerAPIVersion0`.
const API_VERSION: u32 = 0x01_05_00;

/// What the methods answer from.
pub(crate) struct Context {
    pub(crate) hub: Arc<dyn Hub>,
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) session: Uuid,
    pub(crate) started: jiff::Timestamp,
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

impl fmt::Debug for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.name, self.params.join(", "))
    }
}

impl Method {
    /// Checks the caller and the number of parameters, and answers.
    pub(crate) async fn answer(
        &self,
        cx: Arc<Context>,
        perms: &[Perm],
        params: &Params<'_>,
    ) -> Result<Value, RpcError> {
        if !perms.contains(&self.perm) {
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
            values: self.params.iter().copied().zip(values).collect(),
        };
        (self.call)(cx, args).await
    }
}

/// The parameters of a call, by name.
pub(crate) struct Args {
    method: &'static str,
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
    ($cx:ident: $($perm:ident $name:ident($($arg:ident: $ty:ty),*) $body:block)*) => {
        /// Every method, by name.
        pub const METHODS: &[Method] = &[$(Method {
            name: stringify!($name),
            full_name: concat!("Filecoin.", stringify!($name)),
            perm: Perm::$perm,
            params: &[$(stringify!($arg)),*],
            call: |$cx, args| async move {
                $(let $arg: $ty = args.get(stringify!($arg))?;)*
                // Where there are no parameters.
                drop(args);
                to_json($body)
            }.boxed(),
        }),*];
    };
}

methods! { cx:
    Read ActorAddress() { Lotus(cx.hub.miner().address()) }
    Read ActorAddressConfig() { AddressConfig::from(cx.hub.senders()) }
    Read ActorSectorSize(miner: Address) { sector_size(&cx, miner).await? }
    Admin AuthNew(perms: Vec<String>) { Lotus(new_token(&cx, &perms)?) }
    Read AuthVerify(token: String) {
        let perms = cx.tokens.verify(&token);
        perms.ok_or_else(|| RpcError::failed("JWT Verification failed"))?
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
    Read Session() { cx.session }
    Read StartTime() { cx.started.to_string() }
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
    Admin StorageStat(id: String) { FsStat::of(&storage_path(&cx, &id)?) }
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
    let mut info = SectorInfo::new(record, cx.hub.sector_size());
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
