//! A provider's life on the chain, in process and stepped by hand: 2 KiB sectors are really
//! sealed and really proven, and every wrong step is refused with the actor's exit code.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lotus_actors::miner::{
    self, CompactCommD, DeclareFaultsRecoveredParams, PoStPartition, PreCommitSectorBatchParams2,
    ProveCommitSectors3Params, RecoveryDeclaration, SectorActivationManifest, SectorPreCommitInfo,
    SubmitWindowedPoStParams, TerminateSectorsParams, TerminationDeclaration,
};
use lotus_actors::{
    BigInt, Dst, PoStProof, Randomness, RawBytes, address_entropy, draw_randomness, encode,
    win_count,
};
use lotus_devnet::{AllocationOrder, Chain, ChainConfig, Policy};
use lotus_node_client::api::{
    BitField, BlockMsg, BlockTemplate, ElectionProof, Message, MessageReceipt, MsgLookup,
    PoStProof as ApiPoStProof, SectorPreCommitOnChainInfo, SignedMessage, Ticket, TipSetKey,
};
use lotus_proofs::{
    PlacedPiece, PostSector, Prover, SealedCommitments, SealingSector, Vanilla, WindowPost,
};
use lotus_types::{
    ActorId, Address, Commitment, Epoch, PaddedSize, SectorId, SectorNumber, SectorSize,
    TokenAmount,
};

const HEAD: &TipSetKey = &TipSetKey::HEAD;
const SIZE: SectorSize = SectorSize::S2KiB;
const OK: i64 = 0;
const ILLEGAL_ARGUMENT: i64 = 16;
const NOT_FOUND: i64 = 17;
const FORBIDDEN: i64 = 18;
const SERIALIZATION: i64 = 21;
const UNHANDLED: i64 = 22;

fn policy() -> Policy {
    Policy {
        finality: 60,
        pre_commit_randomness_lookback: 80,
        ..Policy::fast().with_seed_delay(3)
    }
}

fn open(repo: &Path) -> Chain {
    let cfg = ChainConfig {
        policy: policy(),
        sector_size: SIZE,
        ..ChainConfig::default()
    };
    Chain::open(repo, cfg, Arc::new(Vanilla)).unwrap()
}

struct Sealed {
    number: u64,
    ticket_epoch: i64,
    ticket: [u8; 32],
    layout: Vec<PlacedPiece>,
    comm: SealedCommitments,
    sealed: PathBuf,
    cache: PathBuf,
}

struct Sp {
    dir: tempfile::TempDir,
    chain: Chain,
    worker: Address,
    miner: Address,
}

impl Sp {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let chain = open(&dir.path().join("repo"));
        let worker = chain.wallet_default_address();
        let miner = chain.miner();
        let sp = Self {
            dir,
            chain,
            worker,
            miner,
        };
        sp.advance(5);
        sp
    }

    fn height(&self) -> i64 {
        self.chain.head().height.0
    }

    fn advance(&self, epochs: usize) {
        for _ in 0..epochs {
            self.chain.advance().unwrap();
        }
    }

    fn message(&self, from: Address, method: u64, params: Vec<u8>) -> SignedMessage {
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
    fn land(&self, cid: &cid::Cid) -> MsgLookup {
        for _ in 0..20 {
            self.chain.advance().unwrap();
            if let Some(l) = self.chain.state_search_msg(HEAD, cid, -1, true).unwrap() {
                return l;
            }
        }
        panic!("message {cid} did not land by epoch {}", self.height());
    }

    fn send_from(&self, from: Address, method: u64, params: Vec<u8>) -> MessageReceipt {
        let cid = self.chain.mpool_push(self.message(from, method, params)).unwrap();
        self.land(&cid).receipt
    }

    fn send(&self, method: u64, params: Vec<u8>) -> i64 {
        self.send_from(self.worker, method, params).exit_code
    }

    fn seal(&self, number: u64, fill: u8) -> Sealed {
        let ticket_epoch = self.height() - 2;
        let entropy = address_entropy(&self.miner);
        let dst = Dst::SealRandomness as i64;
        let ticket = self
            .chain
            .state_get_randomness_from_tickets(dst, Epoch(ticket_epoch), &entropy, HEAD)
            .unwrap();
        let base = self.dir.path().join(number.to_string());
        std::fs::create_dir_all(base.join("cache")).unwrap();
        let (unsealed, sealed, cache) =
            (base.join("unsealed"), base.join("sealed"), base.join("cache"));
        let data = vec![fill; 1016];
        let piece = lotus_proofs::commp(data.as_slice()).unwrap();
        let layout = lotus_proofs::layout(SIZE, &[piece]).unwrap();
        lotus_proofs::add_pieces(&unsealed, SIZE, &layout, &mut |_| {
            Ok(Box::new(std::io::Cursor::new(data.clone())))
        })
        .unwrap();
        let s = sector(number);
        let pc1 = Vanilla.pre_commit1(&s, &ticket, &layout, &unsealed, &sealed, &cache).unwrap();
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

    fn pre_commit_params(&self, s: &Sealed, change: impl FnOnce(&mut SectorPreCommitInfo)) -> Vec<u8> {
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

    fn pre_commit(&self, s: &Sealed, change: impl FnOnce(&mut SectorPreCommitInfo)) -> i64 {
        let params = self.pre_commit_params(s, change);
        self.send(miner::PRE_COMMIT_SECTOR_BATCH2, params)
    }

    fn on_chain(&self, s: &Sealed) -> SectorPreCommitOnChainInfo {
        let found = self
            .chain
            .state_sector_precommit_info(&self.miner, SectorNumber(s.number), HEAD);
        found.unwrap().unwrap()
    }

    /// Waits for the seed, and makes the seal proof.
    fn commit(&self, s: &Sealed) -> Vec<u8> {
        let at = self.on_chain(s).pre_commit_epoch.0 + policy().pre_commit_challenge_delay;
        while self.height() < at {
            self.advance(1);
        }
        let entropy = address_entropy(&self.miner);
        let dst = Dst::InteractiveSealChallengeSeed as i64;
        let seed = self.chain.state_get_randomness_from_beacon(dst, Epoch(at), &entropy, HEAD);
        Vanilla
            .commit(
                &sector(s.number),
                &s.ticket,
                &seed.unwrap(),
                &s.layout,
                &s.comm,
                &s.sealed,
                &s.cache,
            )
            .unwrap()
    }

    fn prove_params(&self, s: &Sealed, proof: Vec<u8>, claim: Option<(u64, u64)>) -> Vec<u8> {
        let pieces = s.layout.iter().map(|p| miner::PieceActivationManifest {
            cid: p.piece.cid.cid(),
            size: lotus_actors::PaddedPieceSize(p.piece.size.get()),
            verified_allocation_key: claim
                .filter(|_| !p.filler)
                .map(|(client, id)| miner::VerifiedAllocationKey { client, id }),
            notify: vec![],
        });
        encode(&ProveCommitSectors3Params {
            sector_activations: vec![SectorActivationManifest {
                sector_number: s.number,
                pieces: pieces.collect(),
            }],
            sector_proofs: vec![RawBytes::new(proof)],
            aggregate_proof: RawBytes::default(),
            aggregate_proof_type: None,
            require_activation_success: true,
            require_notification_success: true,
        })
    }

    fn prove(&self, s: &Sealed, proof: Vec<u8>) -> i64 {
        self.send(miner::PROVE_COMMIT_SECTORS3, self.prove_params(s, proof, None))
    }

    /// Seals and proves a sector without mistakes.
    fn onboard(&self, number: u64) -> Sealed {
        let s = self.seal(number, 7);
        assert_eq!(self.pre_commit(&s, |_| ()), OK);
        let proof = self.commit(&s);
        assert_eq!(self.prove(&s, proof), OK);
        s
    }

    /// Steps until the sector's deadline opens, and a little into it.
    fn wait_open(&self, s: &Sealed) -> u64 {
        let at = SectorNumber(s.number);
        let place = self.chain.state_sector_partition(&self.miner, at, HEAD).unwrap();
        for _ in 0..2 * policy().proving_period() {
            let d = self.chain.state_miner_proving_deadline(&self.miner, HEAD).unwrap();
            if d.index == place.deadline && d.current_epoch.0 > d.open.0 {
                return place.deadline;
            }
            self.advance(1);
        }
        panic!("deadline {} never opened", place.deadline);
    }

    /// Steps until the deadline that is open now has closed and a wrong PoSt in it is disputed.
    fn wait_closed(&self) {
        let d = self.chain.state_miner_proving_deadline(&self.miner, HEAD).unwrap();
        while self.height() < d.close.0 + 2 {
            self.advance(1);
        }
    }

    fn post_proof(&self, s: &Sealed) -> Vec<u8> {
        let d = self.chain.state_miner_proving_deadline(&self.miner, HEAD).unwrap();
        let entropy = address_entropy(&self.miner);
        let dst = Dst::WindowedPoStChallengeSeed as i64;
        let rand = self.chain.state_get_randomness_from_beacon(dst, d.challenge, &entropy, HEAD);
        let sectors = [post_sector(s)];
        match Vanilla.window_post(ActorId(1000), SIZE, &rand.unwrap(), &sectors).unwrap() {
            WindowPost::Proved(p) => p,
            WindowPost::Faulty(f) => panic!("faulty: {f:?}"),
        }
    }

    fn post_params(
        &self,
        deadline: u64,
        proof: Vec<u8>,
        change: impl FnOnce(&mut SubmitWindowedPoStParams),
    ) -> Vec<u8> {
        let at = self.height() - 1;
        let dst = Dst::PoStChainCommit as i64;
        let rand = self.chain.state_get_randomness_from_tickets(dst, Epoch(at), &[], HEAD);
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

    fn post(
        &self,
        deadline: u64,
        proof: Vec<u8>,
        change: impl FnOnce(&mut SubmitWindowedPoStParams),
    ) -> i64 {
        let params = self.post_params(deadline, proof, change);
        self.send(miner::SUBMIT_WINDOWED_POST, params)
    }

    fn power(&self) -> BigInt {
        let p = self.chain.state_miner_power(&self.miner, HEAD).unwrap();
        p.miner_power.raw_byte_power
    }

    fn faults(&self) -> Vec<u64> {
        self.chain.state_miner_faults(&self.miner, HEAD).unwrap().iter().collect()
    }

    fn balance(&self) -> TokenAmount {
        self.chain.state_miner_available_balance(&self.miner, HEAD).unwrap()
    }
}

fn sector(number: u64) -> SealingSector {
    SealingSector {
        id: SectorId {
            miner: ActorId(1000),
            number: SectorNumber(number),
        },
        size: SIZE,
    }
}

fn post_sector(s: &Sealed) -> PostSector {
    PostSector {
        number: SectorNumber(s.number),
        comm_r: s.comm.comm_r,
        sealed: s.sealed.clone(),
        cache: s.cache.clone(),
    }
}

fn flipped(mut proof: Vec<u8>) -> Vec<u8> {
    let middle = proof.len() / 2;
    proof[middle] ^= 4;
    proof
}

#[test]
fn onboarding_refuses_every_wrong_step() {
    let sp = Sp::new();
    let s = sp.seal(1, 1);
    let old = sp.height();
    // The rest of the ticket's allowed age.
    while sp.height() - old < 100 {
        sp.advance(1);
    }
    assert_eq!(sp.pre_commit(&s, |_| ()), ILLEGAL_ARGUMENT, "an old ticket");
    let s = sp.seal(1, 2);
    let future = sp.height() + 50;
    for (what, got) in [
        ("a ticket of the future", sp.pre_commit(&s, |i| i.seal_rand_epoch = future)),
        ("a short life", sp.pre_commit(&s, |i| i.expiration = 1_000)),
        ("a long life", sp.pre_commit(&s, |i| i.expiration *= 100)),
        ("another size", sp.pre_commit(&s, |i| i.seal_proof = 8.into())),
        ("commD as commR", sp.pre_commit(&s, |i| i.sealed_cid = s.comm.comm_d.unsealed_cid())),
        ("deal ids", sp.pre_commit(&s, |i| i.deal_ids = vec![1])),
    ] {
        assert_eq!(got, ILLEGAL_ARGUMENT, "{what}");
    }
    let client = *sp.chain.wallet_list().iter().find(|a| **a != sp.worker).unwrap();
    let params = sp.pre_commit_params(&s, |_| ());
    let stranger = sp.send_from(client, miner::PRE_COMMIT_SECTOR_BATCH2, params);
    assert_eq!(stranger.exit_code, FORBIDDEN);
    assert_eq!(sp.send(miner::PRE_COMMIT_SECTOR_BATCH2, vec![0x80]), SERIALIZATION);
    assert_eq!(sp.send(7_777, vec![]), UNHANDLED);

    let before = sp.balance();
    assert_eq!(sp.pre_commit(&s, |_| ()), OK);
    let deposit = sp.on_chain(&s).pre_commit_deposit;
    assert!(deposit.is_positive());
    assert_eq!(sp.balance(), before - &deposit, "the deposit is locked");
    assert_eq!(sp.prove(&s, vec![1; 100]), FORBIDDEN, "before the seed");
    assert_eq!(sp.pre_commit(&s, |_| ()), ILLEGAL_ARGUMENT, "a used sector number");
    let proof = sp.commit(&s);
    let other = sp.seal(2, 3);
    assert_eq!(sp.prove(&other, proof.clone()), NOT_FOUND, "no pre-commit");
    assert_eq!(sp.pre_commit(&other, |_| ()), OK);
    let others_proof = sp.commit(&other);
    assert_eq!(sp.prove(&s, flipped(proof.clone())), ILLEGAL_ARGUMENT, "a flipped bit");
    assert_eq!(sp.prove(&s, others_proof), ILLEGAL_ARGUMENT, "another sector's proof");
    let mut wrong_data = sp.seal(3, 9);
    wrong_data.number = 1;
    assert_eq!(sp.prove(&wrong_data, proof.clone()), ILLEGAL_ARGUMENT, "other pieces");
    assert_eq!(sp.prove(&s, proof.clone()), OK);
    assert_eq!(sp.prove(&s, proof), NOT_FOUND, "proven twice");

    let info = sp.chain.state_sector_get_info(&sp.miner, SectorNumber(1), HEAD).unwrap().unwrap();
    assert_eq!(Commitment::from_sealed_cid(&info.sealed_cid), Ok(s.comm.comm_r));
    assert!(info.initial_pledge.is_positive());
    assert_eq!(sp.power(), BigInt::from(0), "no power before the first PoSt");
}

#[test]
fn window_posts_earn_and_lose_power() {
    let sp = Sp::new();
    let s = sp.onboard(1);
    let deadline = sp.wait_open(&s);
    let proof = sp.post_proof(&s);
    let other = (deadline + 1) % policy().deadlines;
    for (what, code, got) in [
        ("a wrong deadline", ILLEGAL_ARGUMENT, sp.post(other, proof.clone(), |_| ())),
        ("no such deadline", ILLEGAL_ARGUMENT, sp.post(99, proof.clone(), |_| ())),
        (
            "a wrong partition",
            NOT_FOUND,
            sp.post(deadline, proof.clone(), |p| p.partitions[0].index = 5),
        ),
        (
            "another chain",
            ILLEGAL_ARGUMENT,
            sp.post(deadline, proof.clone(), |p| p.chain_commit_rand.0[0] ^= 1),
        ),
        (
            "an old chain",
            ILLEGAL_ARGUMENT,
            sp.post(deadline, proof.clone(), |p| p.chain_commit_epoch -= 50),
        ),
        ("no proof", ILLEGAL_ARGUMENT, sp.post(deadline, proof.clone(), |p| p.proofs.clear())),
        (
            "everything skipped",
            ILLEGAL_ARGUMENT,
            sp.post(deadline, proof.clone(), |p| p.partitions[0].skipped.set(1)),
        ),
    ] {
        assert_eq!(got, code, "{what}");
    }
    assert_eq!(sp.post(deadline, proof.clone(), |_| ()), OK);
    assert_eq!(sp.post(deadline, proof, |_| ()), ILLEGAL_ARGUMENT, "proven twice");
    assert_eq!(sp.power(), BigInt::from(SIZE.bytes()));
    sp.wait_closed();
    assert_eq!(sp.faults(), [0u64; 0]);

    // A missed deadline.
    sp.wait_open(&s);
    sp.wait_closed();
    assert_eq!(sp.faults(), [1]);
    assert_eq!(sp.power(), BigInt::from(0));

    // A recovery is checked when it is submitted.
    let recovery = encode(&DeclareFaultsRecoveredParams {
        recoveries: vec![RecoveryDeclaration {
            deadline,
            partition: 0,
            sectors: Chain::numbers(&[1]),
        }],
    });
    assert_eq!(sp.send(miner::DECLARE_FAULTS_RECOVERED, recovery.clone()), OK);
    sp.wait_open(&s);
    assert_eq!(sp.send(miner::DECLARE_FAULTS_RECOVERED, recovery), ILLEGAL_ARGUMENT, "too late");
    let proof = sp.post_proof(&s);
    assert_eq!(sp.post(deadline, flipped(proof.clone()), |_| ()), ILLEGAL_ARGUMENT);
    assert_eq!(sp.post(deadline, proof, |_| ()), OK);
    assert_eq!(sp.faults(), [0u64; 0]);
    assert_eq!(sp.power(), BigInt::from(SIZE.bytes()));
    sp.wait_closed();

    // A wrong proof is accepted at first, then disputed: fault and penalty.
    sp.wait_open(&s);
    let proof = sp.post_proof(&s);
    let rich = sp.balance();
    assert_eq!(sp.post(deadline, flipped(proof), |_| ()), OK, "optimistic");
    assert_eq!(sp.power(), BigInt::from(SIZE.bytes()), "not punished yet");
    sp.wait_closed();
    assert_eq!(sp.faults(), [1], "disputed");
    assert_eq!(sp.power(), BigInt::from(0));
    assert!(sp.balance() + TokenAmount::from_whole(20) < rich, "penalty");

    // Ending the sector gives the rest of its pledge back.
    let end = encode(&TerminateSectorsParams {
        terminations: vec![TerminationDeclaration {
            deadline,
            partition: 0,
            sectors: Chain::numbers(&[1]),
        }],
    });
    sp.advance(40);
    assert_eq!(sp.send(miner::TERMINATE_SECTORS, end), OK);
    let found = sp.chain.state_sector_get_info(&sp.miner, SectorNumber(1), HEAD);
    assert_eq!(found.unwrap(), None);
}

#[test]
fn a_provider_mines_and_survives_restart_and_reorg() {
    let sp = Sp::new();
    let s = sp.onboard(1);
    let deadline = sp.wait_open(&s);
    assert_eq!(sp.post(deadline, sp.post_proof(&s), |_| ()), OK);
    sp.advance(15);
    let (block, key) = mine(&sp, &s);
    let mut bad = block.clone();
    bad.header.election_proof.as_mut().unwrap().win_count += 1;
    assert!(submit_error(&sp, &resign(&sp, bad)).contains("wins"));
    let mut bad = block.clone();
    bad.header.win_post_proof[0].proof_bytes[500] ^= 1;
    assert!(submit_error(&sp, &resign(&sp, bad)).contains("winning post"));
    let mut bad = block.clone();
    bad.header.ticket.as_mut().unwrap().vrf_proof[5] ^= 1;
    assert!(submit_error(&sp, &resign(&sp, bad)).contains("VRF"));
    let mut bad = block.clone();
    bad.header.fork_signaling = 9;
    assert!(submit_error(&sp, &bad).contains("signature"));
    let before = sp.balance();
    sp.chain.sync_submit_block(&block).unwrap();
    sp.chain.sync_submit_block(&block).unwrap();
    let mut twin = block.clone();
    twin.header.fork_signaling = 1;
    assert!(submit_error(&sp, &resign(&sp, twin)).contains("double-fork mining faults"));
    while sp.height() < block.header.height.0 + 1 {
        sp.advance(1);
    }
    let on = sp.chain.chain_get_tipset_by_height(block.header.height, HEAD).unwrap();
    assert!(on.cids.contains(&block.header.cid()), "the provider's block is on the chain");
    assert_eq!(on.parents(), key);
    assert!(sp.balance() > before, "a reward");

    // A restart of the process changes nothing.
    let repo = sp.dir.path().join("repo");
    let (head, power) = (sp.chain.head(), sp.power());
    let root = head.min_ticket_block().parent_state_root;
    let pending = sp.message(sp.worker, 0, vec![]);
    let pending = sp.chain.mpool_push(pending).unwrap();
    let Sp {
        dir,
        chain,
        worker,
        miner,
    } = sp;
    drop(chain);
    let sp = Sp {
        chain: open(&repo),
        dir,
        worker,
        miner,
    };
    assert_eq!(sp.chain.head().cids, head.cids);
    assert_eq!(sp.power(), power);
    assert_eq!(sp.chain.mpool_pending(HEAD).unwrap()[0].cid(), pending);
    let landed = sp.land(&pending);
    assert_eq!(landed.receipt.exit_code, OK);
    assert_eq!(sp.chain.head().blocks.len(), 1);
    let again = sp.chain.chain_get_tipset(&head.key()).unwrap();
    assert_eq!(again.min_ticket_block().parent_state_root, root);

    // A reorg takes the message off the chain, and it lands again.
    let (old, mut steps) = sp.chain.subscribe_heads();
    let nonce = sp.chain.mpool_get_nonce(&sp.worker).unwrap();
    sp.chain.reorg(4).unwrap();
    assert_ne!(sp.chain.head().cids, old.cids);
    assert_eq!(sp.chain.mpool_get_nonce(&sp.worker).unwrap(), nonce, "pending again");
    let mut at = old.key();
    while let Ok(path) = steps.try_recv() {
        for step in path.iter() {
            match step.kind {
                lotus_node_client::api::HeadChangeKind::Revert => {
                    assert_eq!(step.val.key(), at);
                    at = step.val.parents();
                }
                _ => {
                    assert_eq!(step.val.parents(), at);
                    at = step.val.key();
                }
            }
        }
    }
    assert_eq!(at, sp.chain.head().key(), "the steps lead to the head without a gap");
    assert_eq!(sp.land(&pending).receipt.exit_code, OK);
}

fn submit_error(sp: &Sp, b: &BlockMsg) -> String {
    sp.chain.sync_submit_block(b).unwrap_err().to_string()
}

fn resign(sp: &Sp, mut b: BlockMsg) -> BlockMsg {
    let sig = sp.chain.wallet_sign(&sp.worker, &b.header.signing_bytes());
    b.header.block_sig = Some(sig.unwrap());
    b
}

/// Wins an election on the head, as a hub does it.
fn mine(sp: &Sp, s: &Sealed) -> (BlockMsg, TipSetKey) {
    let entropy = address_entropy(&sp.miner);
    for _ in 0..30 {
        let base = sp.chain.head();
        let round = Epoch(sp.chain.epoch().0 + 1);
        let info = sp.chain.miner_get_base_info(&sp.miner, round, &base.key()).unwrap();
        let Some(info) = info.filter(|i| i.eligible_for_mining) else {
            sp.advance(1);
            continue;
        };
        let beacon = info.beacon_entries.last().unwrap_or(&info.prev_beacon_entry);
        let vrf = |dst, at, entropy: &[u8]| {
            let drawn = draw_randomness(&beacon.data, dst, at, entropy);
            sp.chain.wallet_sign(&info.worker_key, &drawn).unwrap().bytes
        };
        let election = vrf(Dst::ElectionProofProduction, round, &entropy);
        let wins = win_count(&election, &info.miner_power, &info.network_power);
        if wins == 0 {
            sp.advance(1);
            continue;
        }
        let base_ticket = &base.min_ticket_block().ticket.as_ref().unwrap().vrf_proof;
        let with_ticket = [entropy.as_slice(), base_ticket].concat();
        let rand = draw_randomness(&beacon.data, Dst::WinningPoStChallengeSeed, round, &entropy);
        let proof = Vanilla
            .winning_post(ActorId(1000), SIZE, &rand, &[post_sector(s)])
            .unwrap();
        let template = BlockTemplate {
            miner: sp.miner,
            parents: base.key(),
            ticket: Ticket {
                vrf_proof: vrf(Dst::TicketProduction, Epoch(round.0 - 1), &with_ticket),
            },
            eproof: ElectionProof {
                win_count: wins,
                vrf_proof: election,
            },
            beacon_values: info.beacon_entries.clone(),
            messages: sp.chain.mpool_select(&base.key(), 0.5).unwrap(),
            epoch: round,
            timestamp: base.min_timestamp() + 4,
            winning_post_proof: vec![ApiPoStProof {
                post_proof: lotus_proofs::winning_post_proof_type(SIZE),
                proof_bytes: proof,
            }],
        };
        return (sp.chain.miner_create_block(&template).unwrap(), base.key());
    }
    panic!("no election won");
}

#[test]
fn verified_data_is_claimed_once_and_counts_tenfold() {
    let sp = Sp::new();
    let client = *sp.chain.wallet_list().iter().find(|a| **a != sp.worker).unwrap();
    let s = sp.seal(1, 5);
    let piece = s.layout.iter().find(|p| !p.filler).unwrap().piece;
    assert_eq!(piece.size, PaddedSize::new(1024).unwrap());
    let order = AllocationOrder {
        provider: sp.miner,
        piece: piece.cid.cid(),
        size: piece.size.get(),
        term_min: policy().allocation_term_min,
        term_max: policy().allocation_term_max,
        claim_within: 1_000,
    };
    let sent = sp.chain.order_allocation(&client, &order).unwrap();
    assert_eq!(sp.land(&sent.cid()).receipt.exit_code, OK);
    let (id, allocation) =
        sp.chain.state_get_allocations(&client, HEAD).unwrap().pop_first().unwrap();
    assert_eq!(allocation.provider, 1000);
    assert_eq!(sp.pre_commit(&s, |_| ()), OK);
    let proof = sp.commit(&s);
    let wrong = sp.prove_params(&s, proof.clone(), Some((allocation.client, id + 1)));
    assert_eq!(sp.send(miner::PROVE_COMMIT_SECTORS3, wrong), ILLEGAL_ARGUMENT);
    let right = sp.prove_params(&s, proof, Some((allocation.client, id)));
    assert_eq!(sp.send(miner::PROVE_COMMIT_SECTORS3, right), OK);
    assert_eq!(sp.chain.state_get_allocation(&client, id, HEAD).unwrap(), None);
    let claim = sp.chain.state_get_claim(&sp.miner, id, HEAD).unwrap().unwrap();
    assert_eq!(claim.sector, 1);
    let deadline = sp.wait_open(&s);
    assert_eq!(sp.post(deadline, sp.post_proof(&s), |_| ()), OK);
    let power = sp.chain.state_miner_power(&sp.miner, HEAD).unwrap().miner_power;
    assert_eq!(power.raw_byte_power, BigInt::from(2048));
    assert_eq!(power.quality_adj_power, BigInt::from(1024 * 10 + 1024));
}

#[test]
fn the_mempool_speaks_lotus() {
    let sp = Sp::new();
    let good = sp.message(sp.worker, 0, vec![]);
    let push = |change: &dyn Fn(&mut Message)| {
        let mut m = good.message.clone();
        change(&mut m);
        let signed = sp.chain.wallet_sign_message(&sp.worker, m).unwrap();
        sp.chain.mpool_push(signed).map_err(|e| e.to_string())
    };
    for (change, words) in [
        (&(|m: &mut Message| m.nonce += 5) as &dyn Fn(&mut Message), "unfulfilled nonce gap"),
        (&|m| m.value = TokenAmount::from_whole(1_000_000_000), "not enough funds"),
        (&|m| m.gas_fee_cap = TokenAmount::from_atto(1_000), "OK"),
        (&|m| m.gas_premium = TokenAmount::from_whole(1), "'GasFeeCap' less than"),
        (&|m| m.gas_limit = 0, "'GasLimit'"),
    ] {
        match push(change) {
            Ok(_) => assert_eq!(words, "OK"),
            Err(e) => assert!(e.contains(words), "{e}"),
        }
    }
    let mut forged = good.clone();
    forged.message.nonce += 1;
    let e = sp.chain.mpool_push(forged).unwrap_err().to_string();
    assert!(e.contains("signature"), "{e}");
    // The message with the low fee cap is stuck; a replacement needs a higher premium.
    sp.advance(3);
    let e = push(&|_| ()).unwrap_err();
    assert!(e.contains("replace by fee"), "{e}");
    let raise = |m: &mut Message| m.gas_premium = TokenAmount::from_atto(2_000);
    let cid = push(&raise).unwrap();
    assert_eq!(push(&raise).unwrap(), cid, "pushing again is harmless");
    assert_eq!(sp.land(&cid).message, cid);
    let e = push(&|_| ()).unwrap_err();
    assert!(e.contains("nonce too low"), "{e}");
    sp.chain.refuse_messages(1, "refused by command".into());
    let next = sp.message(sp.worker, 0, vec![]);
    assert!(sp.chain.mpool_push(next.clone()).is_err());
    sp.chain.mpool_push(next).unwrap();
}

#[test]
fn null_rounds_stops_and_second_openings() {
    let sp = Sp::new();
    let h = sp.height();
    sp.chain.null_rounds(3);
    sp.advance(3);
    assert_eq!(sp.height(), h);
    sp.advance(1);
    assert_eq!(sp.height(), h + 4);
    let below = sp.chain.chain_get_tipset_by_height(Epoch(h + 2), HEAD).unwrap();
    let above = sp.chain.chain_get_tipset_after_height(Epoch(h + 2), HEAD).unwrap();
    assert_eq!((below.height.0, above.height.0), (h, h + 4));
    assert_eq!(above.min_ticket_block().beacon_entries.len(), 4, "one entry for each epoch");
    sp.chain.stop_blocks();
    sp.advance(2);
    assert_eq!(sp.height(), h + 4);
    sp.chain.resume_blocks();
    sp.advance(1);
    assert_eq!(sp.height(), h + 7);
    let repo = sp.dir.path().join("repo");
    let cfg = |size| ChainConfig {
        policy: policy(),
        sector_size: size,
        ..ChainConfig::default()
    };
    let second = Chain::open(&repo, cfg(SIZE), Arc::new(Vanilla)).unwrap_err();
    assert_eq!(second.kind(), lotus_types::Kind::Config, "{second}");
    let Sp { dir: _dir, chain, .. } = sp;
    drop(chain);
    let other = Chain::open(&repo, cfg(SectorSize::S8MiB), Arc::new(Vanilla)).unwrap_err();
    assert!(other.to_string().contains("sector size"), "{other}");
    std::io::stdout().flush().unwrap();
}

#[test]
fn a_long_chain_is_pruned_and_reopens() {
    let sp = Sp::new();
    sp.advance(400);
    let head = sp.chain.head();
    let old = sp.chain.chain_get_tipset_by_height(Epoch(10), HEAD).unwrap();
    assert!(sp.chain.state_miner_info(&sp.miner, &old.key()).is_err(), "old state is gone");
    let repo = sp.dir.path().join("repo");
    let Sp { dir: _dir, chain, miner, .. } = sp;
    let info = chain.state_miner_info(&miner, HEAD).unwrap();
    drop(chain);
    let chain = open(&repo);
    assert_eq!(chain.head().cids, head.cids);
    assert_eq!(chain.state_miner_info(&miner, HEAD).unwrap(), info);
    let same = chain.chain_get_tipset_by_height(Epoch(10), HEAD).unwrap();
    assert_eq!(same.cids, old.cids, "headers stay");
    assert_eq!(chain.advance().unwrap().height.0, head.height.0 + 1);
}
