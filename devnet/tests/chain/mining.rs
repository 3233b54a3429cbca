//! Blocks, restarts, reorgs, the mempool, pruning.

use std::sync::Arc;

use lotus_actors::{Dst, address_entropy, draw_randomness, win_count};
use lotus_devnet::{Chain, ChainConfig};
use lotus_node_client::api::{
    BlockMsg, BlockTemplate, ElectionProof, HeadChangeKind, Message, PoStProof, Ticket, TipSetKey,
};
use lotus_proofs::{Prover, Vanilla};
use lotus_types::{ActorId, Epoch, SectorSize, TokenAmount};

use crate::sp::*;

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
    let on = sp
        .chain
        .chain_get_tipset_by_height(block.header.height, HEAD)
        .unwrap();
    assert!(
        on.cids.contains(&block.header.cid()),
        "the provider's block is on the chain"
    );
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
        mode,
    } = sp;
    drop(chain);
    let sp = Sp {
        mode,
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
    assert_eq!(
        sp.chain.mpool_get_nonce(&sp.worker).unwrap(),
        nonce,
        "pending again"
    );
    let mut at = old.key();
    while let Ok(path) = steps.try_recv() {
        for step in path.iter() {
            match step.kind {
                HeadChangeKind::Revert => {
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
    assert_eq!(
        at,
        sp.chain.head().key(),
        "the steps lead to the head without a gap"
    );
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
        let info = sp
            .chain
            .miner_get_base_info(&sp.miner, round, &base.key())
            .unwrap();
        let Some(info) = info.filter(|i| i.eligible_for_mining) else {
            sp.advance(1);
            continue;
        };
        let beacon = info
            .beacon_entries
            .last()
            .unwrap_or(&info.prev_beacon_entry);
        let vrf = |dst, at, entropy: &[u8]| {
            let drawn = draw_randomness(&beacon.data, dst, at, entropy);
            sp.chain
                .wallet_sign(&info.worker_key, &drawn)
                .unwrap()
                .bytes
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
            winning_post_proof: vec![PoStProof {
                post_proof: lotus_proofs::winning_post_proof_type(SIZE),
                proof_bytes: proof,
            }],
        };
        return (sp.chain.miner_create_block(&template).unwrap(), base.key());
    }
    panic!("no election won");
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
        (
            &(|m: &mut Message| m.nonce += 5) as &dyn Fn(&mut Message),
            "unfulfilled nonce gap",
        ),
        (
            &|m| m.value = TokenAmount::from_whole(1_000_000_000),
            "not enough funds",
        ),
        (&|m| m.gas_fee_cap = TokenAmount::from_atto(1_000), "OK"),
        (
            &|m| m.gas_premium = TokenAmount::from_whole(1),
            "'GasFeeCap' less than",
        ),
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
    let below = sp
        .chain
        .chain_get_tipset_by_height(Epoch(h + 2), HEAD)
        .unwrap();
    let above = sp
        .chain
        .chain_get_tipset_after_height(Epoch(h + 2), HEAD)
        .unwrap();
    assert_eq!((below.height.0, above.height.0), (h, h + 4));
    assert_eq!(
        above.min_ticket_block().beacon_entries.len(),
        4,
        "one entry for each epoch"
    );
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
    let Sp {
        dir: _dir, chain, ..
    } = sp;
    drop(chain);
    let other = Chain::open(&repo, cfg(SectorSize::S8MiB), Arc::new(Vanilla)).unwrap_err();
    assert!(other.to_string().contains("sector size"), "{other}");
}

#[test]
fn a_long_chain_is_pruned_and_reopens() {
    let sp = Sp::new();
    sp.advance(400);
    let head = sp.chain.head();
    let old = sp
        .chain
        .chain_get_tipset_by_height(Epoch(10), HEAD)
        .unwrap();
    assert!(
        sp.chain.state_miner_info(&sp.miner, &old.key()).is_err(),
        "old state is gone"
    );
    let repo = sp.dir.path().join("repo");
    let Sp {
        dir: _dir,
        chain,
        miner,
        ..
    } = sp;
    let info = chain.state_miner_info(&miner, HEAD).unwrap();
    drop(chain);
    let chain = open(&repo);
    assert_eq!(chain.head().cids, head.cids);
    assert_eq!(chain.state_miner_info(&miner, HEAD).unwrap(), info);
    let same = chain.chain_get_tipset_by_height(Epoch(10), HEAD).unwrap();
    assert_eq!(same.cids, old.cids, "headers stay");
    assert_eq!(chain.advance().unwrap().height.0, head.height.0 + 1);
}
