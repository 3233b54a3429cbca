//! The hub as Lotus' JSON-RPC asks about it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lotus_api::{Data, Hub, NewPiece, Senders, StoragePath, Work};
use lotus_messages::AddressConfig;
use lotus_node_client::Node;
use lotus_node_client::api::TipSet;
use lotus_node_client::json::parse_address;
use lotus_runtime::Fault;
use lotus_sealing::{PathView, SealingError, SectorRecord, SectorState};
use lotus_types::{ActorId, Kind, PieceCid, SectorNumber, SectorSize};
use lotus_workers::{JobInfo, WorkerInfo};

use crate::handover::Handover;
use crate::pieces::blocking;
use crate::sealer::Sealer;
use crate::unsealed::Unsealed;

/// Answers from the parts of the hub.
pub struct LotusHub {
    /// Sectors, workers and storage.
    pub sealer: Arc<Sealer>,
    /// The full node.
    pub node: Node,
    /// Who pays for messages.
    pub addresses: AddressConfig,
    /// Raw pieces.
    pub unsealed: Arc<Unsealed>,
    /// Takes pieces over.
    pub handover: Handover,
}

impl Hub for LotusHub {
    fn miner(&self) -> ActorId {
        self.sealer.miner
    }

    fn sector_size(&self) -> SectorSize {
        self.sealer.size
    }

    fn senders(&self) -> Senders {
        let a = &self.addresses;
        // A text that is no address stopped the hub at its start.
        let parsed = |list: &[String]| {
            let all = list.iter().filter_map(|text| parse_address(text).ok());
            all.collect()
        };
        Senders {
            pre_commit: parsed(&a.pre_commit_control),
            commit: parsed(&a.commit_control),
            terminate: parsed(&a.terminate_control),
            publish: parsed(&a.deal_publish_control),
            owner_falls_in: !a.disable_owner_fallback,
            worker_falls_in: !a.disable_worker_fallback,
        }
    }

    fn sectors(&self) -> Vec<(SectorNumber, SectorState)> {
        self.sealer.sealing.states()
    }

    fn sector(&self, number: SectorNumber) -> Result<Option<SectorRecord>, SealingError> {
        self.sealer.sealing.sector(number)
    }

    fn storage(&self) -> Vec<StoragePath> {
        let miner = self.sealer.miner;
        let path = |p: PathView| StoragePath {
            id: p.id.to_string(),
            path: p.dir,
            settings: p.settings,
            capacity: p.capacity,
            available: p.available,
            reserved: p.reserved,
            used: p.used,
            takes_new: p.reachable && p.trouble.is_none() && !p.read_only,
            sectors: p
                .sectors
                .into_iter()
                .filter(|(id, files)| id.miner == miner && files.lotus() != 0)
                .map(|(id, files)| (id, files.lotus()))
                .collect(),
        };
        self.sealer.storage.paths().into_iter().map(path).collect()
    }

    fn jobs(&self) -> Vec<JobInfo> {
        self.sealer.pool.jobs()
    }

    fn workers(&self) -> Vec<WorkerInfo> {
        self.sealer.pool.workers()
    }

    fn head(&self) -> Option<Arc<TipSet>> {
        self.sealer.follower.head().borrow().clone()
    }

    fn block_delay(&self) -> Option<Duration> {
        self.sealer.block_delay.get().copied()
    }

    fn node(&self) -> Node {
        self.node.clone()
    }

    fn raw_file(&self, piece: &PieceCid) -> Option<PathBuf> {
        self.unsealed.raw_file(piece)
    }

    fn unseal(&self, piece: PieceCid) -> Work<'_, ()> {
        Box::pin(async move {
            let made = self.unsealed.make(&piece).await;
            made.map_err(|e| Fault::new(e.kind(), e.to_string(), "see the hub's log"))
        })
    }

    fn redeclare(&self, path: Option<String>) -> Work<'_, ()> {
        let storage = self.sealer.storage.clone();
        Box::pin(async move {
            let id = path.map(|p| p.parse()).transpose();
            let id = id.map_err(|e: String| Fault::new(Kind::Data, e, "see StorageLocal"))?;
            blocking(move || storage.redeclare(id.as_ref()))
                .await
                .map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))
        })
    }

    fn add_piece(&self, piece: NewPiece, data: Data) -> Work<'_, (SectorNumber, u64)> {
        Box::pin(self.handover.take(piece, data))
    }
}
