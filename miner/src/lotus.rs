//! The hub as Lotus' JSON-RPC asks about it.

use std::sync::Arc;
use std::time::Duration;

use lotus_api::{Hub, Senders, StoragePath};
use lotus_messages::AddressConfig;
use lotus_node_client::Node;
use lotus_node_client::api::TipSet;
use lotus_node_client::json::parse_address;
use lotus_sealing::{PathView, SealingError, SectorRecord, SectorState};
use lotus_types::{ActorId, SectorNumber, SectorSize};
use lotus_workers::{JobInfo, WorkerInfo};

use crate::sealer::Sealer;

/// Answers from the parts of the hub.
pub struct LotusHub {
    /// Sectors, workers and storage.
    pub sealer: Arc<Sealer>,
    /// The full node.
    pub node: Node,
    /// Who pays for messages.
    pub addresses: AddressConfig,
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
}
