//! A provider without a hub: seals, proves and sends by hand.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lotus_actors::miner::{
    self, CompactCommD, PoStPartition, PreCommitSectorBatchParams2, ProveCommitSectors3Params,
    SectorActivationManifest, SectorPreCommitInfo, SubmitWindowedPoStParams,
};
use lotus_actors::{
    BigInt, Dst, PoStProof, Randomness, RawBytes, RegisteredAggregateProof, address_entropy, encode,
};
use lotus_devnet::{Chain, ChainConfig, Policy};
use lotus_node_client::api::{
    BitField, Message, MessageReceipt, MsgLookup, SectorPreCommitOnChainInfo, SignedMessage,
    TipSetKey,
};
use lotus_proofs::{
    PlacedPiece, PostSector, ProofMode, Prover, SealedCommitments, SealingSector, Vanilla,
    Verifier, WindowPost,
};
use lotus_types::{ActorId, Address, Epoch, SectorId, SectorNumber, SectorSize, TokenAmount};

pub(crate) const HEAD: &TipSetKey = &TipSetKey::HEAD;
pub(crate) const SIZE: SectorSize = SectorSize::S2KiB;
pub(crate) const OK: i64 = 0;
pub(crate) const ILLEGAL_ARGUMENT: i64 = 16;
pub(crate) const NOT_FOUND: i64 = 17;
pub(crate) const FORBIDDEN: i64 = 18;
pub(crate) const SERIALIZATION: i64 = 21;
pub(crate) const UNHANDLED: i64 = 22;

pub(crate) fn policy() -> Policy {
    Policy {
        finality: 60,
        pre_commit_randomness_lookback: 80,
        ..Policy::fast().with_seed_delay(3)
    }
}

pub(crate) fn open(repo: &Path) -> Chain {
    open_with(repo, Arc::new(Vanilla))
}

fn open_with(repo: &Path, verifier: Arc<dyn Verifier>) -> Chain {
    let cfg = ChainConfig {
        policy: policy(),
        sector_size: SIZE,
        ..ChainConfig::default()
    };
    Chain::open(repo, cfg, verifier).unwrap()
}

pub(crate) struct Sealed {
    pub(crate) number: u64,
    pub(crate) ticket_epoch: i64,
    pub(crate) ticket: [u8; 32],
    pub(crate) layout: Vec<PlacedPiece>,
    pub(crate) comm: SealedCommitments,
    pub(crate) sealed: PathBuf,
    pub(crate) cache: PathBuf,
}

pub(crate) struct Sp {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) chain: Chain,
    pub(crate) worker: Address,
    pub(crate) miner: Address,
    pub(crate) mode: ProofMode,
}

impl Sp {
    pub(crate) fn new() -> Self {
        Self::with(Vanilla, Arc::new(Vanilla))
    }

    /// A provider who proves seals in a mode, on a chain with this verifier.
    pub(crate) fn with(mode: ProofMode, verifier: Arc<dyn Verifier>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let chain = open_with(&dir.path().join("repo"), verifier);
        let worker = chain.wallet_default_address();
        let miner = chain.miner();
        let sp = Self {
            dir,
            chain,
            worker,
            miner,
            mode,
        };
        sp.advance(5);
        sp
    }

    pub(crate) fn height(&self) -> i64 {
        self.chain.head().height.0
    }

    pub(crate) fn advance(&self, epochs: usize) {
        for _ in 0..epochs {
            self.chain.advance().unwrap();
        }
    }

    pub(crate) fn message(&self, from: Address, method: u64, params: Vec<u8>) -> SignedMessage {
        let msg = Message {
            version: 0,
            to: self.miner,
            from,
            nonce: self.chain.mpool_get_nonce(&from).unwrap(),
            value: TokenAmount::default(),
            gas_limit: 500_000_000,
            gas_fee_cap: TokenAmount::from_nano(1),
            gas_premium: TokenAmount::from_atto(1_000),
            method,
            params,
        };
        self.chain.wallet_sign_message(&from, msg).unwrap()
    }

    /// Steps until a message has landed.
    pub(crate) fn land(&self, cid: &cid::Cid) -> MsgLookup {
        for _ in 0..20 {
            self.chain.advance().unwrap();
            if let Some(l) = self.chain.state_search_msg(HEAD, cid, -1, true).unwrap() {
                return l;
            }
        }
        panic!("message {cid} did not land by epoch {}", self.height());
    }

    pub(crate) fn send_from(&self, from: Address, method: u64, params: Vec<u8>) -> MessageReceipt {
        let cid = self
            .chain
            .mpool_push(self.message(from, method, params))
            .unwrap();
        self.land(&cid).receipt
    }

    pub(crate) fn send(&self, method: u64, params: Vec<u8>) -> i64 {
        self.send_from(self.worker, method, params).exit_code
    }

    pub(crate) fn client(&self) -> Address {
        *self
            .chain
            .wallet_list()
            .iter()
            .find(|a| **a != self.worker)
            .unwrap()
    }

    pub(crate) fn seal(&self, number: u64, fill: u8) -> Sealed {
        self.seal_pieces(number, &[vec![fill; 1016]])
    }

    pub(crate) fn seal_pieces(&self, number: u64, data: &[Vec<u8>]) -> Sealed {
        let ticket_epoch = self.height() - 2;
        let entropy = address_entropy(&self.miner);
        let dst = Dst::SealRandomness as i64;
        let ticket = self
            .chain
            .state_get_randomness_from_tickets(dst, Epoch(ticket_epoch), &entropy, HEAD)
            .unwrap();
        let base = self.dir.path().join(number.to_string());
        std::fs::create_dir_all(base.join("cache")).unwrap();
        let (unsealed, sealed, cache) = (
            base.join("unsealed"),
            base.join("sealed"),
            base.join("cache"),
        );
        let pieces: Vec<_> = data
            .iter()
            .map(|d| lotus_proofs::commp(d.as_slice()).unwrap())
            .collect();
        let layout = lotus_proofs::layout(SIZE, &pieces).unwrap();
        lotus_proofs::add_pieces(&unsealed, SIZE, &layout, &mut |p| {
            let at = pieces.iter().position(|x| x.cid == p.cid).unwrap();
            Ok(Box::new(std::io::Cursor::new(data[at].clone())))
        })
        .unwrap();
        let s = sector(number);
        let pc1 = Vanilla
            .pre_commit1(&s, &ticket, &layout, &unsealed, &sealed, &cache)
            .unwrap();
        let comm = Vanilla.pre_commit2(&s, &pc1, &sealed, &cache).unwrap();
        Sealed {
            number,
            ticket_epoch,
            ticket,
            layout,
            comm,
            sealed,
            cache,
        }
    }

    pub(crate) fn pre_commit_params(
        &self,
        s: &Sealed,
        change: impl FnOnce(&mut SectorPreCommitInfo),
    ) -> Vec<u8> {
        let limit = policy().prove_commit_limit() + policy().sector_lifetime_min;
        let mut info = SectorPreCommitInfo {
            seal_proof: lotus_proofs::seal_proof_type(SIZE).into(),
            sector_number: s.number,
            sealed_cid: s.comm.comm_r.sealed_cid(),
            seal_rand_epoch: s.ticket_epoch,
            deal_ids: vec![],
            expiration: self.height() + limit + 1_000,
            unsealed_cid: CompactCommD::of(s.comm.comm_d.unsealed_cid()),
        };
        change(&mut info);
        encode(&PreCommitSectorBatchParams2 {
            sectors: vec![info],
        })
    }

    pub(crate) fn pre_commit(
        &self,
        s: &Sealed,
        change: impl FnOnce(&mut SectorPreCommitInfo),
    ) -> i64 {
        let params = self.pre_commit_params(s, change);
        self.send(miner::PRE_COMMIT_SECTOR_BATCH2, params)
    }

    pub(crate) fn on_chain(&self, s: &Sealed) -> SectorPreCommitOnChainInfo {
        let found =
            self.chain
                .state_sector_precommit_info(&self.miner, SectorNumber(s.number), HEAD);
        found.unwrap().unwrap()
    }

    /// Waits for the seed, and makes the seal proof.
    pub(crate) fn commit(&self, s: &Sealed) -> Vec<u8> {
        let seed = self.seed(s);
        let size = sector(s.number);
        let (layout, comm) = (&s.layout, &s.comm);
        let made = self
            .mode
            .commit(&size, &s.ticket, &seed, layout, comm, &s.sealed, &s.cache);
        made.unwrap()
    }

    /// Waits for the seed.
    pub(crate) fn seed(&self, s: &Sealed) -> [u8; 32] {
        let at = self.on_chain(s).pre_commit_epoch.0 + policy().pre_commit_challenge_delay;
        while self.height() < at {
            self.advance(1);
        }
        let entropy = address_entropy(&self.miner);
        let dst = Dst::InteractiveSealChallengeSeed as i64;
        let seed = self
            .chain
            .state_get_randomness_from_beacon(dst, Epoch(at), &entropy, HEAD);
        seed.unwrap()
    }

    pub(crate) fn prove(&self, s: &Sealed, proof: Vec<u8>) -> i64 {
        self.send(
            miner::PROVE_COMMIT_SECTORS3,
            prove_params(s, proof, manifests(&s.layout, None, &[])),
        )
    }

    /// Seals and proves a sector without mistakes.
    pub(crate) fn onboard(&self, number: u64) -> Sealed {
        let s = self.seal(number, 7);
        assert_eq!(self.pre_commit(&s, |_| ()), OK);
        let proof = self.commit(&s);
        assert_eq!(self.prove(&s, proof), OK);
        s
    }

    /// Steps until the sector's deadline opens, and a little into it.
    pub(crate) fn wait_open(&self, s: &Sealed) -> u64 {
        let at = SectorNumber(s.number);
        let place = self
            .chain
            .state_sector_partition(&self.miner, at, HEAD)
            .unwrap();
        for _ in 0..2 * policy().proving_period() {
            let d = self
                .chain
                .state_miner_proving_deadline(&self.miner, HEAD)
                .unwrap();
            if d.index == place.deadline && d.current_epoch.0 > d.open.0 {
                return place.deadline;
            }
            self.advance(1);
        }
        panic!("deadline {} never opened", place.deadline);
    }

    /// Steps until the deadline that is open now has closed and a wrong PoSt in it is disputed.
    pub(crate) fn wait_closed(&self) {
        let d = self
            .chain
            .state_miner_proving_deadline(&self.miner, HEAD)
            .unwrap();
        while self.height() < d.close.0 + 2 {
            self.advance(1);
        }
    }

    pub(crate) fn post_proof(&self, s: &Sealed) -> Vec<u8> {
        let d = self
            .chain
            .state_miner_proving_deadline(&self.miner, HEAD)
            .unwrap();
        let entropy = address_entropy(&self.miner);
        let dst = Dst::WindowedPoStChallengeSeed as i64;
        let rand = self
            .chain
            .state_get_randomness_from_beacon(dst, d.challenge, &entropy, HEAD);
        let sectors = [post_sector(s)];
        match Vanilla
            .window_post(ActorId(1000), SIZE, &rand.unwrap(), &sectors)
            .unwrap()
        {
            WindowPost::Proved(p) => p,
            WindowPost::Faulty(f) => panic!("faulty: {f:?}"),
        }
    }

    pub(crate) fn post_params(
        &self,
        deadline: u64,
        proof: Vec<u8>,
        change: impl FnOnce(&mut SubmitWindowedPoStParams),
    ) -> Vec<u8> {
        let at = self.height() - 1;
        let dst = Dst::PoStChainCommit as i64;
        let rand = self
            .chain
            .state_get_randomness_from_tickets(dst, Epoch(at), &[], HEAD);
        let mut p = SubmitWindowedPoStParams {
            deadline,
            partitions: vec![PoStPartition {
                index: 0,
                skipped: BitField::new(),
            }],
            proofs: vec![PoStProof {
                post_proof: lotus_proofs::window_post_proof_type(SIZE).into(),
                proof_bytes: proof,
            }],
            chain_commit_epoch: at,
            chain_commit_rand: Randomness(rand.unwrap().to_vec()),
        };
        change(&mut p);
        encode(&p)
    }

    pub(crate) fn post(
        &self,
        deadline: u64,
        proof: Vec<u8>,
        change: impl FnOnce(&mut SubmitWindowedPoStParams),
    ) -> i64 {
        let params = self.post_params(deadline, proof, change);
        self.send(miner::SUBMIT_WINDOWED_POST, params)
    }

    pub(crate) fn power(&self) -> BigInt {
        let p = self.chain.state_miner_power(&self.miner, HEAD).unwrap();
        p.miner_power.raw_byte_power
    }

    pub(crate) fn faults(&self) -> Vec<u64> {
        self.chain
            .state_miner_faults(&self.miner, HEAD)
            .unwrap()
            .iter()
            .collect()
    }

    pub(crate) fn balance(&self) -> TokenAmount {
        self.chain
            .state_miner_available_balance(&self.miner, HEAD)
            .unwrap()
    }
}

pub(crate) fn sector(number: u64) -> SealingSector {
    SealingSector {
        id: SectorId {
            miner: ActorId(1000),
            number: SectorNumber(number),
        },
        size: SIZE,
    }
}

pub(crate) fn post_sector(s: &Sealed) -> PostSector {
    PostSector {
        number: SectorNumber(s.number),
        comm_r: s.comm.comm_r,
        sealed: s.sealed.clone(),
        cache: s.cache.clone(),
    }
}

pub(crate) fn flipped(mut proof: Vec<u8>) -> Vec<u8> {
    let middle = proof.len() / 2;
    proof[middle] ^= 4;
    proof
}

/// What a sector holds; a sector without data is said to hold nothing.
pub(crate) fn manifests(
    layout: &[PlacedPiece],
    claim: Option<(u64, u64)>,
    notify: &[miner::DataActivationNotification],
) -> Vec<miner::PieceActivationManifest> {
    if layout.iter().all(|p| p.filler) {
        return Vec::new();
    }
    let one = |p: &PlacedPiece| miner::PieceActivationManifest {
        cid: p.piece.cid.cid(),
        size: lotus_actors::PaddedPieceSize(p.piece.size.get()),
        verified_allocation_key: claim
            .filter(|_| !p.filler)
            .map(|(client, id)| miner::VerifiedAllocationKey { client, id }),
        notify: if p.filler { vec![] } else { notify.to_vec() },
    };
    layout.iter().map(one).collect()
}

/// A message with one proof of several sectors.
pub(crate) fn aggregate_params(
    sectors: &[&Sealed],
    aggregate: Vec<u8>,
) -> ProveCommitSectors3Params {
    let activation = |s: &&Sealed| SectorActivationManifest {
        sector_number: s.number,
        pieces: manifests(&s.layout, None, &[]),
    };
    ProveCommitSectors3Params {
        sector_activations: sectors.iter().map(activation).collect(),
        sector_proofs: vec![],
        aggregate_proof: RawBytes::new(aggregate),
        aggregate_proof_type: Some(RegisteredAggregateProof::SnarkPackV2),
        require_activation_success: false,
        require_notification_success: false,
    }
}

pub(crate) fn prove_params(
    s: &Sealed,
    proof: Vec<u8>,
    pieces: Vec<miner::PieceActivationManifest>,
) -> Vec<u8> {
    encode(&ProveCommitSectors3Params {
        sector_activations: vec![SectorActivationManifest {
            sector_number: s.number,
            pieces,
        }],
        sector_proofs: vec![RawBytes::new(proof)],
        aggregate_proof: RawBytes::default(),
        aggregate_proof_type: None,
        require_activation_success: true,
        require_notification_success: true,
    })
}
