//! A hub without chain and sealing, and a spoke that stages bytes.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hub_proto::v1::{
    DealKey, DealTerms, OfferRequest, PiecePhase, PieceState, PieceStatusRequest, ProvingState,
    SafeToRestartResponse, SectorInfo, Source, UnixSource, Use, WithdrawRequest, source,
};
use hub_proto::{HubClient, HubConfig, HubError};
use lotus_audit::{Audit, AuditConfig};
use lotus_chain::Follower;
use lotus_dataplane::{DataError, FdServer, OpenToken};
use lotus_identity::Authority;
use lotus_journal::{Journal, JournalError};
use lotus_messages::{MessagesConfig, Sender};
use lotus_miner::api::{Access, Api, Listeners, Recorder, Safety, SectorBook};
use lotus_miner::capacity::Capacity;
use lotus_miner::config::{ApiConfig, PiecesConfig};
use lotus_miner::events::EventLog;
use lotus_miner::handover::Handover;
use lotus_miner::owner::Published;
use lotus_miner::pieces::machine::{self, Place};
use lotus_miner::pieces::{NoPlace, PieceRunner, Pieces, Placer, SectorFate};
use lotus_miner::repo::Repo;
use lotus_miner::unsealed::{Unsealed, Unsealer};
use lotus_node_client::{FullNode, Node};
use lotus_runtime::trace;
use lotus_types::{ActorId, Kind, PieceInfo, SectorSize};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
pub(crate) const CLIENT: &str = "t1abjxfbp274xpdqcpuaykwkfb43omjotacm2p3za";

/// A chain that answers nothing.
struct NoNode;
impl FullNode for NoNode {}

/// Sealing that survives restarts of the hub, as the journal does.
#[derive(Default)]
pub(crate) struct Sectors {
    pub(crate) placed: Mutex<HashMap<String, Place>>,
    pub(crate) calls: Mutex<Vec<String>>,
    pub(crate) busy: AtomicBool,
    pub(crate) proven: AtomicBool,
    pub(crate) is_final: AtomicBool,
    /// Whether the hub may be restarted.
    pub(crate) safe: watch::Sender<bool>,
    /// Where the fake unsealing finds bytes.
    pub(crate) sealed: Mutex<Option<PathBuf>>,
}

#[async_trait::async_trait]
impl Placer for Sectors {
    async fn place(
        &self,
        key: &lotus_types::DealKey,
        piece: PieceInfo,
        _: &machine::DealTerms,
    ) -> Result<Place, NoPlace> {
        self.calls.lock().unwrap().push(key.to_string());
        if self.busy.load(Ordering::SeqCst) {
            return Err(NoPlace {
                kind: Kind::Capacity,
                message: "all sectors are busy".into(),
            });
        }
        let mut placed = self.placed.lock().unwrap();
        let next = placed.len() as u64;
        Ok(*placed.entry(key.to_string()).or_insert(Place {
            sector: 7,
            offset: next * piece.size.get(),
        }))
    }

    async fn placement(&self, key: &lotus_types::DealKey) -> Result<Option<Place>, NoPlace> {
        Ok(self.placed.lock().unwrap().get(&key.to_string()).copied())
    }

    fn sector(&self, _: u64) -> SectorFate {
        if self.proven.load(Ordering::SeqCst) {
            SectorFate::Proven
        } else {
            SectorFate::Sealing("PreCommit1".into())
        }
    }

    fn is_final(&self, _: u64) -> bool {
        self.is_final.load(Ordering::SeqCst)
    }
}

#[async_trait::async_trait]
impl Unsealer for Sectors {
    async fn unseal(&self, _: Place, _: PieceInfo, out: &Path) -> Result<(), NoPlace> {
        let from = self.sealed.lock().unwrap().clone().unwrap();
        std::fs::copy(from, out).unwrap();
        Ok(())
    }
}

impl SectorBook for Sectors {
    fn list(&self, _: Option<u64>, _: usize) -> Result<Vec<SectorInfo>, JournalError> {
        Ok(Vec::new())
    }
    fn get(&self, _: u64, _: bool) -> Result<Option<SectorInfo>, JournalError> {
        Ok(None)
    }
}

impl Safety for Sectors {
    fn safe_to_restart(&self) -> SafeToRestartResponse {
        SafeToRestartResponse {
            safe: *self.safe.borrow(),
            ..SafeToRestartResponse::default()
        }
    }
    fn changed(&self) -> futures::future::BoxFuture<'static, ()> {
        let mut safe = self.safe.subscribe();
        Box::pin(async move { safe.changed().await.unwrap() })
    }
    fn proving(&self) -> futures::stream::BoxStream<'static, ProvingState> {
        Box::pin(futures::stream::pending())
    }
}

/// A running hub. Dropping its tasks is a crash: what is not journaled is lost.
pub(crate) struct Hub {
    pub(crate) client: HubClient,
    pub(crate) pieces: Arc<Pieces>,
    pub(crate) handover: Handover,
    pub(crate) unsealed: Arc<Unsealed>,
    pub(crate) journal: Journal,
    pub(crate) events: EventLog,
    pub(crate) dir: PathBuf,
    stop: CancellationToken,
    tasks: JoinSet<()>,
    _repo: lotus_miner::repo::OpenRepo,
}

pub(crate) fn fast() -> PiecesConfig {
    PiecesConfig {
        retry_first_ms: 5,
        retry_max_ms: 50,
        keep_free_bytes: 0,
        idle_secs: 5,
        ..PiecesConfig::default()
    }
}

impl Hub {
    pub(crate) async fn start(dir: &Path, sectors: &Arc<Sectors>, cfg: PiecesConfig) -> Self {
        let repo = Repo::at(dir.join("hub").to_str().unwrap()).unwrap();
        repo.create().unwrap();
        repo.write_config("").unwrap();
        let open = repo.open().unwrap();
        let repo = open.repo.clone();
        let (journal, generation) = (open.journal.clone(), open.generation);
        let events = EventLog::open(journal.clone(), generation, 100_000).unwrap();
        let pieces =
            Pieces::open(journal.clone(), events.clone(), repo.pieces(), cfg.clone()).unwrap();
        let size = SectorSize::S8MiB;
        let (unsealed, unseal) = Unsealed::new(pieces.clone(), generation, sectors.clone());
        let runner =
            PieceRunner::new(pieces.clone(), sectors.clone(), watch::channel(0).1).unwrap();
        let stop = CancellationToken::new();
        let capacity = Capacity::new(pieces.clone(), repo.pieces(), &cfg, size, generation);
        let capacity = Arc::new(capacity);
        let handover = Handover::new(pieces.clone(), capacity.clone());
        let raw = unsealed.clone();
        let node: Node = Arc::new(NoNode);
        let (follower, _) = Follower::new(node.clone());
        let settings = MessagesConfig::default();
        let (sender, _) = Sender::new(journal.clone(), node.clone(), &follower, settings);
        let api = Api {
            actor: ActorId(1000),
            sector_size: size,
            generation,
            data_socket: repo.data_socket(),
            pieces: pieces.clone(),
            placer: sectors.clone(),
            capacity,
            unsealed: unsealed.clone(),
            events: events.clone(),
            sectors: sectors.clone(),
            safety: sectors.clone(),
            node,
            sender,
            confidence: 1,
            published: Published::new(journal.clone()),
            access: Access::new(
                Arc::new(Authority::open(&repo.authority()).unwrap()),
                generation,
                1_000,
            ),
            recorder: Recorder::new(
                Audit::open(&repo.audit(), &AuditConfig::default()).unwrap(),
                generation,
                ApiConfig::default().call(),
            ),
            stop: stop.clone(),
        };
        let api_cfg = ApiConfig {
            listen: ([127, 0, 0, 1], 0).into(),
            ..ApiConfig::default()
        };
        let listeners = Listeners::bind(&api_cfg, &repo.hub_socket(), &repo.run())
            .await
            .unwrap();
        let data = FdServer::bind(&repo.data_socket(), unsealed).unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(data.run(stop.clone()));
        tasks.spawn(events.clone().run(stop.clone()));
        tasks.spawn(unseal.run(stop.clone()));
        let end = stop.clone();
        tasks.spawn(async move { runner.run(end).await.unwrap() });
        let end = stop.clone();
        tasks.spawn(async move { listeners.serve(&api, &api_cfg, end).await.unwrap() });
        let at = HubConfig {
            addr: format!("unix:{}", repo.hub_socket().display()),
            ..HubConfig::default()
        };
        let client = HubClient::connect(&at, "deals", "test", trace::client_interceptor);
        Self {
            client: client.await.unwrap(),
            pieces,
            handover,
            unsealed: raw,
            journal,
            events,
            dir: repo.root().into(),
            stop,
            tasks,
            _repo: open,
        }
    }

    pub(crate) async fn offer(&self, request: OfferRequest) -> Result<PieceState, HubError> {
        let answer = self
            .client
            .pieces()
            .offer(self.client.request(request))
            .await;
        Ok(answer.map_err(HubError::from)?.into_inner())
    }

    pub(crate) async fn status(&self, key: DealKey) -> PieceState {
        let request = self.client.request(PieceStatusRequest { key: Some(key) });
        self.client
            .pieces()
            .status(request)
            .await
            .unwrap()
            .into_inner()
    }

    pub(crate) async fn withdraw(&self, key: DealKey) -> Result<PieceState, HubError> {
        let request = self.client.request(WithdrawRequest { key: Some(key) });
        let answer = self.client.pieces().withdraw(request).await;
        Ok(answer.map_err(HubError::from)?.into_inner())
    }

    /// Polls the state until `done`, which names what is waited for.
    pub(crate) async fn until(
        &self,
        key: DealKey,
        what: &str,
        done: impl Fn(&PieceState) -> bool,
    ) -> PieceState {
        let end = tokio::time::Instant::now() + DEADLINE;
        loop {
            let state = self.status(key.clone()).await;
            if done(&state) {
                return state;
            }
            assert!(tokio::time::Instant::now() < end, "no {what}: {state:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn phase(&self, key: DealKey, phase: PiecePhase) -> PieceState {
        self.until(key, phase.as_str_name(), |s| s.phase() == phase)
            .await
    }

    /// Waits until the piece of a deal is in a proven sector.
    pub(crate) async fn phase_of(&self, key: &lotus_types::DealKey) {
        let mut changed = self.pieces.watch();
        loop {
            let now = self.pieces.get(key).unwrap().unwrap();
            if matches!(now.phase, machine::Phase::Active(_)) {
                return;
            }
            changed.changed().await.unwrap();
        }
    }

    pub(crate) fn piece_file(&self, piece: &PieceInfo) -> PathBuf {
        self.dir.join("pieces").join(piece.cid.to_string())
    }

    pub(crate) fn parts(&self) -> usize {
        std::fs::read_dir(self.dir.join("pieces/tmp"))
            .unwrap()
            .count()
    }

    /// Ends when nothing of this hub is left: a killed process leaves no thread behind that still
    /// holds the journal, as the blocking threads and connections of an aborted task do.
    pub(crate) async fn crash(mut self) {
        self.stop.cancel();
        self.tasks.shutdown().await;
        let journal = self.dir.join("journal.redb");
        drop(self);
        let end = tokio::time::Instant::now() + DEADLINE;
        while let Err(JournalError::Locked { .. }) = Journal::open(&journal) {
            assert!(tokio::time::Instant::now() < end, "the journal stays open");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Bytes that a spoke staged, by token.
pub(crate) struct Staged(PathBuf);

#[async_trait::async_trait]
impl OpenToken for Staged {
    async fn open(&self, token: &str, _: Option<&str>) -> Result<(File, u64), DataError> {
        let file = File::open(self.0.join(token))
            .map_err(|_| DataError::UnknownToken { at: "spoke".into() })?;
        let len = file.metadata().unwrap().len();
        Ok((file, len))
    }
}

pub(crate) struct Spoke {
    pub(crate) dir: PathBuf,
    socket: PathBuf,
    tasks: JoinSet<()>,
}

impl Spoke {
    pub(crate) fn new(dir: &Path) -> Self {
        let staged = dir.join("staged");
        std::fs::create_dir_all(&staged).unwrap();
        Self {
            socket: dir.join("spoke.sock"),
            dir: staged,
            tasks: JoinSet::new(),
        }
    }

    pub(crate) fn serve(&mut self) {
        let server = FdServer::bind(&self.socket, Arc::new(Staged(self.dir.clone()))).unwrap();
        self.tasks.spawn(server.run(CancellationToken::new()));
    }

    /// Stages bytes and offers them.
    pub(crate) fn stage(&self, name: &str, bytes: &[u8]) -> (PieceInfo, OfferRequest) {
        std::fs::write(self.dir.join(name), bytes).unwrap();
        let piece = lotus_proofs::commp(bytes).unwrap();
        let request = OfferRequest {
            key: Some(key(1)),
            piece_cid: piece.cid.to_string(),
            piece_size: piece.size.get(),
            raw_size: piece.raw_size,
            source: Some(Source {
                at: Some(source::At::Unix(UnixSource {
                    socket: self.socket.display().to_string(),
                    token: name.into(),
                })),
            }),
            terms: Some(DealTerms {
                start_epoch: 100,
                end_epoch: 600_000,
                ..DealTerms::default()
            }),
            r#use: Some(Use {
                index: true,
                format: "car".into(),
                ..Use::default()
            }),
            credit: String::new(),
        };
        (piece, request)
    }
}

pub(crate) fn key(n: u8) -> DealKey {
    DealKey {
        client: CLIENT.into(),
        id: format!("01ARZ3NDEKTSV4RRFFQ69G5F{n:02}"),
    }
}

pub(crate) fn bytes(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from(i * 7 % 253).unwrap())
        .collect()
}
