//! Hundreds of real sectors in a minute: sealed with the proof library, committed by messages of
//! the miner's worker, and put where the hub looks for them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use lotus_actors::miner::{
    self, ChangeWorkerAddressParams, CompactCommD, PreCommitSectorBatchParams2,
    ProveCommitSectors3Params, SectorActivationManifest, SectorPreCommitInfo,
};
use lotus_actors::{Dst, RawBytes, address_entropy, encode};
use lotus_chain::Follower;
use lotus_journal::Journal;
use lotus_messages::{FeesConfig, MessageKind, MessagesConfig, Payer, SendRequest, Sender};
use lotus_node_client::Node;
use lotus_node_client::api::TipSetKey;
use lotus_proofs::{
    PlacedPiece, Prover as _, SealedCommitments, SealingSector, Seed, Ticket, Vanilla,
};
use lotus_runtime::CancellationToken;
use lotus_types::{ActorId, Address, Epoch, SectorId, SectorNumber, SectorSize, TokenAmount};
use tokio::task::JoinSet;

use crate::{Failed, Net, secs};

/// The devnet's genesis miner.
pub const MINER: ActorId = ActorId(1000);
/// The chain's head.
pub const HEAD: &TipSetKey = &TipSetKey::HEAD;
/// Sectors of one message.
const BATCH: usize = 50;
/// Sectors that are sealed at a time.
const PARALLEL: usize = 4;
/// Longest that a message may take until it has landed.
const LANDED: Duration = secs(120);

/// Where a hub keeps a sector.
#[must_use]
pub fn replica(repo: &Path, number: u64) -> PathBuf {
    let name = SectorId {
        miner: MINER,
        number: SectorNumber(number),
    };
    repo.join("storage/sealed").join(name.to_string())
}

/// Where a hub keeps a sector's trees.
#[must_use]
pub fn cache(repo: &Path, number: u64) -> PathBuf {
    let name = SectorId {
        miner: MINER,
        number: SectorNumber(number),
    };
    repo.join("storage/cache").join(name.to_string())
}

/// A worker that seals and sends.
pub struct Worker {
    size: SectorSize,
    node: Node,
    follower: Follower,
    sender: Sender,
    address: Address,
    repo: PathBuf,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

struct Sealed {
    number: u64,
    layout: Vec<PlacedPiece>,
    comm: SealedCommitments,
    ticket: Ticket,
    ticket_epoch: Epoch,
}

impl Worker {
    /// The worker of the net's miner, which has sectors of this size.
    pub async fn start(net: &Net, size: SectorSize) -> Result<Self, Failed> {
        let node = net.node()?;
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let (follower, runner) = Follower::new(node.clone());
        tasks.spawn(runner.run(stop.clone()));
        let cfg = MessagesConfig {
            confidence_epochs: 1,
            fees: FeesConfig {
                max_commit_nanofil: 10_000_000_000,
                max_pre_commit_nanofil: 10_000_000_000,
                max_per_day_nanofil: 10_000_000_000_000,
                ..FeesConfig::default()
            },
            ..MessagesConfig::default()
        };
        let journal = Journal::open(&net.root().join("worker.redb"));
        let journal = journal.map_err(|e| Failed::at("journal", e))?;
        let (sender, runner) = Sender::new(journal, node.clone(), &follower, cfg);
        tasks.spawn(runner.run(stop.clone()));
        let info = node.state_miner_info(MINER.address(), HEAD).await;
        let info = info.map_err(|e| Failed::at("StateMinerInfo", e))?;
        Ok(Self {
            size,
            node,
            follower,
            sender,
            address: info.worker,
            repo: net.root().join("miner"),
            stop,
            tasks,
        })
    }

    /// Ends it; its messages have landed.
    pub async fn end(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }

    async fn send(
        &self,
        key: String,
        method: u64,
        params: Vec<u8>,
        kind: MessageKind,
    ) -> Result<(), Failed> {
        let request = SendRequest {
            key: key.clone(),
            from: Payer::Address(self.address),
            to: MINER.address(),
            method,
            params,
            value: TokenAmount::default(),
            kind,
            max_fee: None,
        };
        let sent = async {
            self.sender.send(request).await?;
            self.sender.wait(&key, 1).await
        };
        let landed = tokio::time::timeout(LANDED, sent).await;
        let landed = landed.map_err(|_| Failed(format!("{key} has not landed in {LANDED:?}")))?;
        match landed.map_err(|e| Failed::at(&key, e))?.exit_code {
            0 => Ok(()),
            code => Err(Failed(format!("{key} landed with exit code {code}"))),
        }
    }

    /// Gives the hub an address of its own for WindowPoSt, so that nobody else takes its nonces.
    pub async fn set_control(&self, control: Address) -> Result<(), Failed> {
        let params = encode(&ChangeWorkerAddressParams {
            new_worker: self.address,
            new_control_addresses: vec![control],
        });
        let method = miner::CHANGE_WORKER_ADDRESS;
        self.send("control".into(), method, params, MessageKind::Other)
            .await
    }

    /// Seals and commits sectors 0 to `count` - 1, each with a small piece.
    pub async fn onboard(&self, count: u64) -> Result<(), Failed> {
        let entropy = address_entropy(&MINER.address());
        let head = self.follower.wait_height(Epoch(5)).await;
        let head = head.map_err(|e| Failed::at("head", e))?;
        let ticket_epoch = Epoch(head.height.0 - 2);
        let dst = Dst::SealRandomness as i64;
        let ticket = self
            .node
            .state_get_randomness_from_tickets(dst, ticket_epoch, &entropy, HEAD)
            .await
            .map_err(|e| Failed::at("ticket", e))?;
        let sealed: Vec<Sealed> = stream::iter(0..count)
            .map(|number| {
                let (repo, sector) = (self.repo.clone(), sector(number, self.size));
                async move {
                    let work = tokio::task::spawn_blocking(move || {
                        seal(&repo, &sector, ticket, ticket_epoch)
                    });
                    work.await.map_err(|e| Failed::at("sealing", e))?
                }
            })
            .buffered(PARALLEL)
            .try_collect()
            .await?;
        eprintln!("{count} sectors are sealed");
        for (i, some) in sealed.chunks(BATCH).enumerate() {
            self.pre_commit(i, some).await?;
        }
        for (i, some) in sealed.chunks(BATCH).enumerate() {
            self.prove_commit(i, some, &entropy).await?;
        }
        eprintln!("{count} sectors are committed");
        Ok(())
    }

    async fn pre_commit(&self, batch: usize, some: &[Sealed]) -> Result<(), Failed> {
        let head = self.node.chain_head().await;
        let head = head.map_err(|e| Failed::at("ChainHead", e))?;
        let info = |s: &Sealed| SectorPreCommitInfo {
            seal_proof: lotus_proofs::seal_proof_type(self.size).into(),
            sector_number: s.number,
            sealed_cid: s.comm.comm_r.sealed_cid(),
            seal_rand_epoch: s.ticket_epoch.0,
            deal_ids: vec![],
            expiration: head.height.0 + 280 * 2880,
            unsealed_cid: CompactCommD::of(s.comm.comm_d.unsealed_cid()),
        };
        let params = encode(&PreCommitSectorBatchParams2 {
            sectors: some.iter().map(info).collect(),
        });
        let method = miner::PRE_COMMIT_SECTOR_BATCH2;
        let key = format!("pre-commit/{batch}");
        self.send(key, method, params, MessageKind::PreCommit).await
    }

    async fn prove_commit(
        &self,
        batch: usize,
        some: &[Sealed],
        entropy: &[u8],
    ) -> Result<(), Failed> {
        let fail = |e| Failed::at("pre-commit", e);
        let first = SectorNumber(some.first().map_or(0, |s| s.number));
        let info = self
            .node
            .state_sector_precommit_info(MINER.address(), first, HEAD)
            .await
            .map_err(fail)?
            .ok_or_else(|| Failed(format!("sector {first} is not pre-committed")))?;
        let params = self.node.state_get_network_params().await.map_err(fail)?;
        let delay = params.pre_commit_challenge_delay;
        let seed_epoch = info.pre_commit_epoch + delay;
        let waited = self.follower.wait_height(seed_epoch).await;
        waited.map_err(|e| Failed::at("head", e))?;
        let dst = Dst::InteractiveSealChallengeSeed as i64;
        let seed = self
            .node
            .state_get_randomness_from_beacon(dst, seed_epoch, entropy, HEAD)
            .await
            .map_err(fail)?;
        let (mut activations, mut proofs) = (Vec::new(), Vec::new());
        for s in some {
            activations.push(SectorActivationManifest {
                sector_number: s.number,
                pieces: s
                    .layout
                    .iter()
                    .map(|p| miner::PieceActivationManifest {
                        cid: p.piece.cid.cid(),
                        size: lotus_actors::PaddedPieceSize(p.piece.size.get()),
                        verified_allocation_key: None,
                        notify: vec![],
                    })
                    .collect(),
            });
            proofs.push(RawBytes::new(prove(&self.repo, s, self.size, &seed)?));
        }
        let params = encode(&ProveCommitSectors3Params {
            sector_activations: activations,
            sector_proofs: proofs,
            aggregate_proof: RawBytes::default(),
            aggregate_proof_type: None,
            require_activation_success: true,
            require_notification_success: true,
        });
        let method = miner::PROVE_COMMIT_SECTORS3;
        let key = format!("prove-commit/{batch}");
        self.send(key, method, params, MessageKind::Commit).await
    }
}

const fn sector(number: u64, size: SectorSize) -> SealingSector {
    SealingSector {
        id: SectorId {
            miner: MINER,
            number: SectorNumber(number),
        },
        size,
    }
}

fn seal(repo: &Path, sector: &SealingSector, ticket: Ticket, at: Epoch) -> Result<Sealed, Failed> {
    let (number, size) = (sector.id.number.0, sector.size);
    let fail = |what: &'static str| move |e| Failed::at(what, e);
    let (sealed, cache) = (replica(repo, number), cache(repo, number));
    std::fs::create_dir_all(&cache)?;
    let unsealed = cache.join("unsealed");
    let mut data = number.to_be_bytes().repeat(127);
    data.truncate(1016);
    let piece = lotus_proofs::commp(data.as_slice()).map_err(|e| Failed::at("commP", e))?;
    let layout = lotus_proofs::layout(size, &[piece]).map_err(fail("layout"))?;
    lotus_proofs::add_pieces(&unsealed, size, &layout, &mut |_| {
        Ok(Box::new(std::io::Cursor::new(data.clone())))
    })
    .map_err(fail("AddPiece"))?;
    let pc1 = Vanilla
        .pre_commit1(sector, &ticket, &layout, &unsealed, &sealed, &cache)
        .map_err(fail("PreCommit1"))?;
    let comm = Vanilla
        .pre_commit2(sector, &pc1, &sealed, &cache)
        .map_err(fail("PreCommit2"))?;
    std::fs::remove_file(unsealed)?;
    Ok(Sealed {
        number,
        layout,
        comm,
        ticket,
        ticket_epoch: at,
    })
}

fn prove(repo: &Path, s: &Sealed, size: SectorSize, seed: &Seed) -> Result<Vec<u8>, Failed> {
    let (sealed, cache) = (replica(repo, s.number), cache(repo, s.number));
    let sector = sector(s.number, size);
    let proof = Vanilla
        .commit(
            &sector, &s.ticket, seed, &s.layout, &s.comm, &sealed, &cache,
        )
        .map_err(|e| Failed::at("Commit", e))?;
    Vanilla
        .finalize(&sector, &cache)
        .map_err(|e| Failed::at("FinalizeSector", e))?;
    Ok(proof)
}
