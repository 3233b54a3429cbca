//! The hub as Lotus' JSON-RPC asks about it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lotus_api::{Hub, Senders, StoragePath, file_type};
use lotus_messages::AddressConfig;
use lotus_node_client::Node;
use lotus_node_client::api::TipSet;
use lotus_node_client::json::parse_address;
use lotus_sealing::{SealingError, SectorRecord, SectorState};
use lotus_types::{ActorId, SectorId, SectorNumber, SectorSize};
use lotus_workers::{JobInfo, WorkerInfo};

use crate::sealer::Sealer;

/// Folders of a storage path, and what lies in each.
const FOLDERS: [(&str, u32); 4] = [
    ("sealed", file_type::SEALED),
    ("cache", file_type::CACHE),
    ("update", file_type::UPDATE),
    ("update-cache", file_type::UPDATE_CACHE),
];

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

    fn storage(&self) -> io::Result<Vec<StoragePath>> {
        let root = self.sealer.storage.root();
        let mut found: BTreeMap<SectorId, u32> = BTreeMap::new();
        for (folder, file) in FOLDERS {
            for id in sectors_in(&root.join(folder), self.sealer.miner)? {
                *found.entry(id).or_default() |= file;
            }
        }
        Ok(vec![StoragePath {
            name: format!("{}/storage", self.sealer.miner),
            path: root.to_owned(),
            sectors: found.into_iter().collect(),
        }])
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

/// The sectors of a miner whose files or folders lie in `dir`.
fn sectors_in(dir: &Path, miner: ActorId) -> io::Result<Vec<SectorId>> {
    let prefix = format!("s-{miner}-");
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|n| n.strip_prefix(&prefix));
        if let Some(number) = number.and_then(|n| n.parse().ok()) {
            let number = SectorNumber(number);
            found.push(SectorId { miner, number });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_miners_sectors_are_found() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "s-t01000-7",
            "s-t01001-8",
            "s-t01000-x",
            "attempt",
            "s-t01000-10",
        ] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let mut found = sectors_in(dir.path(), ActorId(1000)).unwrap();
        found.sort_unstable();
        let numbers: Vec<u64> = found.iter().map(|id| id.number.0).collect();
        assert_eq!(numbers, [7, 10]);
        let none = sectors_in(&dir.path().join("update"), ActorId(1000)).unwrap();
        assert!(none.is_empty());
    }
}
