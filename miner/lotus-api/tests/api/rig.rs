//! The API of a hub that is a few fixed answers, and a caller of it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use lotus_api::{Data, Hub, LotusApi, LotusApiConfig, NewPiece, Senders, StoragePath, Work};
use lotus_node_client::api::{SectorExpiration, SectorOnChainInfo, TipSet, TipSetKey};
use lotus_node_client::{FullNode, Node, NodeError};
use lotus_proofs::SealedCommitments;
use lotus_runtime::CancellationToken;
use lotus_sealing::machine::{Event, SealSeed, SealTicket, step};
use lotus_sealing::{
    FileType, LogEntry, SealingError, SectorPiece, SectorRecord, SectorState, Terms,
};
use lotus_tokens::{Perm, Tokens};
use lotus_types::{
    ActorId, Address, Commitment, DealKey, Epoch, PaddedSize, PieceCid, PieceInfo, SectorId,
    SectorNumber, SectorSize,
};
use lotus_workers::{Class, JobInfo, WorkerInfo};
use serde_json::{Value, json};
use tokio::task::JoinSet;

const SIZE: SectorSize = SectorSize::S2KiB;
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// A chain that has sector 7.
struct Chain;

#[async_trait]
impl FullNode for Chain {
    async fn state_sector_get_info(
        &self,
        _: Address,
        sector: SectorNumber,
        _: &TipSetKey,
    ) -> Result<Option<SectorOnChainInfo>, NodeError> {
        let info = json!({
            "SectorNumber": sector, "SealProof": 5,
            "SealedCID": {"/": Commitment([3; 32]).sealed_cid().to_string()},
            "Activation": 40, "Expiration": 900, "DealWeight": "12345", "VerifiedDealWeight": "678",
            "InitialPledge": "1000000000000000001",
        });
        Ok(Some(serde_json::from_value(info).unwrap()))
    }

    async fn state_sector_expiration(
        &self,
        _: Address,
        _: SectorNumber,
        _: &TipSetKey,
    ) -> Result<SectorExpiration, NodeError> {
        Ok(SectorExpiration {
            on_time: Epoch(900),
            early: Epoch(77),
        })
    }
}

/// A hub with one proven sector, one that is sealed now, and one that waits.
pub(crate) struct Fake {
    /// Raw pieces.
    raw: PathBuf,
    /// What was handed over, with its data.
    pub(crate) taken: Mutex<Vec<(NewPiece, Vec<u8>)>>,
}

/// The raw data of the piece that each sector has.
pub(crate) fn raw() -> Vec<u8> {
    (0..2000u32).map(|i| (i % 251) as u8).collect()
}

fn id(number: u64) -> SectorId {
    SectorId {
        miner: ActorId(1000),
        number: SectorNumber(number),
    }
}

fn record(number: u64, state: SectorState) -> SectorRecord {
    let piece = PieceInfo {
        cid: PieceCid::new(Commitment([1; 32])),
        size: PaddedSize::new(2048).unwrap(),
        raw_size: 2000,
    };
    let added = Event::PieceAdded {
        piece: SectorPiece {
            key: "t1abc/01ARZ3NDEKTSV4RRFFQ69G5FAV"
                .parse::<DealKey>()
                .unwrap(),
            piece,
            offset: 0,
            terms: Terms {
                start_epoch: Epoch(10),
                end_epoch: Epoch(800),
                allocation: None,
                notify: None,
            },
            claim: None,
            trace: String::new(),
        },
        unix_ms: 1,
    };
    let (mut sector, _) = step(None, &added).unwrap();
    sector.state = state;
    sector.ticket = Some(SealTicket {
        value: [9; 32],
        epoch: Epoch(20),
    });
    sector.seed = Some(SealSeed {
        value: [8; 32],
        epoch: Epoch(30),
    });
    sector.commitments = Some(SealedCommitments {
        comm_r: Commitment([3; 32]),
        comm_d: Commitment([1; 32]),
    });
    let cid = TipSet::clone(&head()).cids[0];
    sector.pre_commit = Some(cid);
    sector.commit = Some(cid);
    SectorRecord {
        number: SectorNumber(number),
        sector,
        progress: None,
        last_error: Some("disk full".into()),
        next_retry_unix_ms: None,
        log: vec![LogEntry {
            unix_ms: 1_700_000_000_123,
            event: "Proved".into(),
            from: "Committing".into(),
            to: "SubmitCommitAggregate".into(),
            message: "in 3 s".into(),
        }],
    }
}

fn head() -> Arc<TipSet> {
    let text = include_str!("../../../../libs/node-client/tests/data/tipset.json");
    Arc::new(serde_json::from_str(text).unwrap())
}

fn job(id_: &str, step: &str, worker: Option<u64>, sector: Option<u64>) -> JobInfo {
    JobInfo {
        id: id_.into(),
        step: step.into(),
        class: Class::Seal,
        sector: sector.map(id),
        worker,
        since_unix_ms: 1_700_000_000_000,
        progress: Some(0.5),
        blocked: None,
    }
}

impl Hub for Fake {
    fn miner(&self) -> ActorId {
        ActorId(1000)
    }
    fn sector_size(&self) -> SectorSize {
        SIZE
    }
    fn senders(&self) -> Senders {
        Senders {
            commit: vec![Address::new_id(1005)],
            worker_falls_in: true,
            ..Senders::default()
        }
    }
    fn sectors(&self) -> Vec<(SectorNumber, SectorState)> {
        vec![
            (SectorNumber(7), SectorState::Proving),
            (SectorNumber(8), SectorState::PreCommit1),
            (SectorNumber(9), SectorState::WaitDeals),
        ]
    }
    fn sector(&self, number: SectorNumber) -> Result<Option<SectorRecord>, SealingError> {
        let all = self.sectors();
        let found = all.into_iter().find(|(n, _)| *n == number);
        Ok(found.map(|(n, state)| record(n.0, state)))
    }
    fn storage(&self) -> Vec<StoragePath> {
        let settings = json!({
            "ID": "hdd", "Weight": 3, "CanStore": true, "MaxStorage": 1_000, "Groups": ["cold"],
        });
        vec![
            StoragePath {
                id: "hdd".into(),
                path: PathBuf::from("/mnt/hdd"),
                settings: Some(serde_json::from_value(settings).unwrap()),
                capacity: 10_000,
                available: 900,
                reserved: 100,
                used: 300,
                takes_new: true,
                sectors: vec![(id(7), FileType::Sealed.bit() | FileType::Cache.bit())],
            },
            StoragePath {
                id: "not-mounted".into(),
                path: PathBuf::from("/mnt/lost"),
                settings: None,
                capacity: 0,
                available: 0,
                reserved: 0,
                used: 0,
                takes_new: false,
                sectors: vec![(id(8), FileType::Sealed.bit())],
            },
        ]
    }
    fn jobs(&self) -> Vec<JobInfo> {
        vec![
            job("3-pre_commit1", "pre_commit1", Some(1), Some(8)),
            job("4-add_pieces", "add_pieces", Some(1), None),
            job("5-unseal", "unseal", None, Some(7)),
        ]
    }
    fn workers(&self) -> Vec<WorkerInfo> {
        let worker = |id, class| WorkerInfo {
            id,
            class,
            slots: 1,
            pid: Some(std::process::id()),
            host: None,
            declared: None,
            since_unix_ms: 0,
        };
        vec![worker(1, Class::Seal), worker(2, Class::Prove)]
    }
    fn head(&self) -> Option<Arc<TipSet>> {
        Some(head())
    }
    fn block_delay(&self) -> Option<Duration> {
        Some(Duration::from_secs(30))
    }
    fn node(&self) -> Node {
        Arc::new(Chain)
    }
    fn raw_file(&self, piece: &PieceCid) -> Option<PathBuf> {
        let path = self.raw.join(piece.to_string());
        path.exists().then_some(path)
    }
    fn unseal(&self, piece: PieceCid) -> Work<'_, ()> {
        Box::pin(async move {
            std::fs::write(self.raw.join(piece.to_string()), raw())?;
            Ok(())
        })
    }
    fn redeclare(&self, _: Option<String>) -> Work<'_, ()> {
        Box::pin(async { Ok(()) })
    }
    fn add_piece(&self, piece: NewPiece, mut data: Data) -> Work<'_, (SectorNumber, u64)> {
        Box::pin(async move {
            let known = |taken: &[(NewPiece, Vec<u8>)]| {
                let at = taken.iter().position(|(p, _)| p.key == piece.key)?;
                Some((SectorNumber(9), at as u64 * 2048))
            };
            if let Some(place) = known(&self.taken.lock().unwrap()) {
                return Ok(place);
            }
            let mut all = Vec::new();
            while let Some(chunk) = data.recv().await {
                all.extend_from_slice(&chunk?);
            }
            let mut taken = self.taken.lock().unwrap();
            taken.push((piece.clone(), all));
            Ok(known(&taken).unwrap())
        })
    }
}

pub(crate) struct Rig {
    pub(crate) repo: tempfile::TempDir,
    pub(crate) addr: std::net::SocketAddr,
    pub(crate) url: String,
    stop: CancellationToken,
    tasks: JoinSet<()>,
    pub(crate) http: reqwest::Client,
    pub(crate) hub: Arc<Fake>,
}

impl Rig {
    pub(crate) async fn start(change: impl FnOnce(&mut LotusApiConfig)) -> Self {
        let repo = tempfile::tempdir().unwrap();
        let mut cfg = LotusApiConfig {
            listen: "127.0.0.1:0".into(),
            ..LotusApiConfig::default()
        };
        change(&mut cfg);
        let run = repo.path().join("run");
        let api = LotusApi::bind(&cfg, repo.path(), &run)
            .await
            .unwrap()
            .unwrap();
        let (addr, stop) = (api.addr(), CancellationToken::new());
        let mut tasks = JoinSet::new();
        let end = stop.clone();
        let raw = repo.path().join("pieces");
        std::fs::create_dir(&raw).unwrap();
        let hub = Arc::new(Fake {
            raw,
            taken: Mutex::default(),
        });
        let served = hub.clone();
        tasks.spawn(async move { api.serve(served, end).await.unwrap() });
        // Of certificates it has only such as it makes itself.
        let http = lotus_runtime::http_client().danger_accept_invalid_certs(true);
        let http = http.build().unwrap();
        let scheme = if cfg.is_https() { "https" } else { "http" };
        Self {
            repo,
            addr,
            url: format!("{scheme}://{addr}"),
            stop,
            tasks,
            http,
            hub,
        }
    }

    pub(crate) fn token(&self, perm: Perm) -> String {
        let tokens = Tokens::open(self.repo.path()).unwrap();
        tokens.issue(&perm.up_to())
    }

    /// A call as curl makes it. The answer, error or not.
    pub(crate) async fn call(&self, token: Option<&str>, method: &str, params: Value) -> Value {
        let body = json!({"jsonrpc": "2.0", "id": 0, "method": method, "params": params});
        let mut request = self
            .http
            .post(format!("{}/rpc/v0", self.url))
            .header("content-type", "text/plain;charset=UTF-8")
            .body(body.to_string());
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 200);
        answer.json().await.unwrap()
    }

    pub(crate) async fn result(&self, method: &str, params: Value) -> Value {
        let token = self.token(Perm::Admin);
        let name = format!("Filecoin.{method}");
        let mut answer = self.call(Some(&token), &name, params).await;
        assert_eq!(answer["id"], 0, "{answer}");
        assert!(answer.get("error").is_none(), "{method}: {answer}");
        answer["result"].take()
    }

    pub(crate) async fn end(mut self) {
        self.stop.cancel();
        let ended = tokio::time::timeout(LIMIT, self.tasks.join_next()).await;
        ended.unwrap().unwrap().unwrap();
    }
}
