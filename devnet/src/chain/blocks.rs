//! Elections and the blocks of providers.

use std::sync::Arc;

use lotus_actors::{BigInt, Dst, address_entropy, draw_randomness, win_count};
use lotus_node_client::api::{
    BeaconEntry, BlockHeader, BlockMsg, BlockTemplate, MinerSector, MiningBaseInfo, TipSetKey,
};
use lotus_proofs::Verifier as _;
use lotus_types::{ActorId, Address, Commitment, Epoch, SectorNumber};

use super::store::{Block, Entry, Executed};
use super::{Chain, lock, message_root};
use crate::error::ChainError;
use crate::keys;
use crate::state::Miner;

/// What an election at some epoch on top of some tipset is about.
struct Election {
    miner: Miner,
    worker: Address,
    power: BigInt,
    total: BigInt,
    prev: BeaconEntry,
    entries: Vec<BeaconEntry>,
    eligible: bool,
    /// The sectors that a WinningPoSt must open.
    sectors: Vec<MinerSector>,
    post_randomness: [u8; 32],
}

impl Election {
    /// The beacon entry that randomness is drawn from.
    fn base(&self) -> &[u8] {
        self.entries.last().map_or(&self.prev.data, |e| &e.data)
    }
}

fn refused<T>(why: impl Into<String>) -> Result<T, ChainError> {
    Err(ChainError::Block(why.into()))
}

impl Chain {
    /// The state in which power, sectors and worker of an election are looked up.
    fn lookback(&self, parent: &Arc<Entry>, round: i64) -> Result<Arc<Executed>, ChainError> {
        let height = (round - self.0.policy.winning_lookback).max(0);
        if height >= parent.height() {
            return self.execute(parent);
        }
        let e = self.read().at_or_before(parent, height)?;
        self.execute(&e)
    }

    /// Source: lotus, chain/stmgr/actors.go, MinerGetBaseInfo.
    fn election(
        &self,
        id: u64,
        round: i64,
        parent: &Arc<Entry>,
    ) -> Result<Option<Election>, ChainError> {
        if round <= parent.height() {
            return Err(ChainError::Invalid(format!(
                "epoch {round} is not above its parent"
            )));
        }
        if round > self.epoch().0 + 1 {
            return Err(ChainError::Randomness(format!(
                "the beacon entry of epoch {round} is to come"
            )));
        }
        let back = self.lookback(parent, round)?;
        let Some(miner) = back.state.miners.get(&id).map(|m| Miner::clone(m)) else {
            return Ok(None);
        };
        let active = miner
            .deadlines
            .iter()
            .flat_map(|d| &d.partitions)
            .fold(fvm_ipld_bitfield::BitField::new(), |all, p| {
                &all | &p.active()
            });
        if active.is_empty() {
            return Ok(None);
        }
        let worker = back.state.account(miner.worker).and_then(|a| a.address);
        let Some(worker) = worker else {
            return Ok(None);
        };
        let prev = {
            let store = self.read();
            store.beacon_entry(parent, parent.height())?
        };
        let entries = self.beacon_entries(parent.height(), round);
        let base = entries.last().map_or(&prev.data, |e| &e.data);
        let entropy = address_entropy(&Address::new_id(id));
        let post_randomness =
            draw_randomness(base, Dst::WinningPoStChallengeSeed, Epoch(round), &entropy);
        let chosen = lotus_proofs::winning_challenge(
            ActorId(id),
            miner.size,
            &post_randomness,
            active.len(),
        )
        .map_err(|e| ChainError::Block(format!("choosing sectors: {e}")))?;
        let numbers: Vec<u64> = active.iter().collect();
        let sectors = chosen
            .iter()
            .filter_map(|i| numbers.get(usize::try_from(*i).ok()?))
            .filter_map(|n| miner.sectors.get(n))
            .map(|s| MinerSector {
                seal_proof: s.seal_proof.into(),
                sector_number: SectorNumber(s.sector_number),
                sector_key: s.sector_key_cid,
                sealed_cid: s.sealed_cid,
            })
            .collect();
        let now = self.execute(parent)?;
        let least = BigInt::from(self.0.policy.min_power);
        let eligible = miner.power.qa >= least
            && now.state.qa_power(id) > BigInt::default()
            && now
                .state
                .miners
                .get(&id)
                .is_some_and(|m| !m.fee_debt.is_positive());
        Ok(Some(Election {
            power: miner.power.qa.clone(),
            total: back.state.total_power().qa,
            miner,
            worker,
            prev,
            entries,
            eligible,
            sectors,
            post_randomness,
        }))
    }

    /// What a miner needs for the election of an epoch on top of a tipset; `None` if it has no
    /// power at the look-back.
    pub fn miner_get_base_info(
        &self,
        miner: &Address,
        at: Epoch,
        key: &TipSetKey,
    ) -> Result<Option<MiningBaseInfo>, ChainError> {
        let parent = self.read().get(key)?;
        let state = self.execute(&parent)?;
        let id = state
            .state
            .lookup(miner)
            .ok_or(ChainError::NoActor(*miner))?;
        let Some(e) = self.election(id, at.0, &parent)? else {
            return Ok(None);
        };
        Ok(Some(MiningBaseInfo {
            miner_power: e.power,
            network_power: e.total,
            sectors: e.sectors,
            worker_key: e.worker,
            sector_size: e.miner.size.bytes(),
            prev_beacon_entry: e.prev,
            beacon_entries: e.entries,
            eligible_for_mining: e.eligible,
        }))
    }

    /// Assembles and signs a block.
    pub fn miner_create_block(&self, t: &BlockTemplate) -> Result<BlockMsg, ChainError> {
        let parent = self.read().get(&t.parents)?;
        let x = self.execute(&parent)?;
        let Ok(id) = t.miner.id() else {
            return refused("the miner's address is no ID address");
        };
        let Some(election) = self.election(id, t.epoch.0, &parent)? else {
            return refused(format!("{} has no power", t.miner));
        };
        let messages = t.messages.iter().cloned().map(Arc::new).collect();
        let mut block = self.draft(&parent, &x, t.epoch.0, messages)?;
        let h = &mut block.header;
        h.miner = t.miner;
        h.ticket = Some(t.ticket.clone());
        h.election_proof = Some(t.eproof.clone());
        h.beacon_entries.clone_from(&t.beacon_values);
        h.win_post_proof.clone_from(&t.winning_post_proof);
        h.timestamp = t.timestamp;
        h.block_sig = Some(self.wallet_sign(&election.worker, &h.signing_bytes())?);
        {
            let mut store = self.write();
            for m in block.messages.iter() {
                store.note_message(m);
            }
        }
        let (bls, secp) = split(&block);
        Ok(BlockMsg {
            header: block.header,
            bls_messages: bls,
            secpk_messages: secp,
        })
    }

    /// Publishes a block. Submitting the same block again is harmless.
    pub fn sync_submit_block(&self, b: &BlockMsg) -> Result<(), ChainError> {
        let cid = b.header.cid();
        let mut w = lock(&self.0.writer);
        if self.read().blocks.contains_key(&cid) {
            return Ok(());
        }
        let now = w.admits(b.header.height.0, self.epoch().0)?;
        let parents = TipSetKey(b.header.parents.clone());
        if parents.is_head() {
            return refused("a block needs parents");
        }
        let parent = self.read().get(&parents)?;
        let messages = {
            let store = self.read();
            let all = b.bls_messages.iter().chain(&b.secpk_messages);
            let found: Option<Vec<_>> = all.map(|c| store.messages.get(c).cloned()).collect();
            found
        };
        let Some(messages) = messages else {
            return refused("the node does not have all of the block's messages");
        };
        let block = Block {
            cid,
            header: b.header.clone(),
            messages: Arc::new(messages),
        };
        self.validate(&block, &parent)?;
        w.provider_mined();
        if now {
            self.adopt(&block)?;
        } else {
            // Known at once, so that a second block for the same epoch is an equivocation.
            self.write().put_block(&block);
            w.hold(block);
        }
        Ok(())
    }

    /// Every check that a node makes on a block. Source: lotus,
    /// chain/consensus/filcns/filecoin.go, ValidateBlock.
    fn validate(&self, b: &Block, parent: &Arc<Entry>) -> Result<(), ChainError> {
        let h = &b.header;
        let (Some(ticket), Some(proof)) = (&h.ticket, &h.election_proof) else {
            return refused("block had nil ticket or election proof");
        };
        let round = h.height.0;
        let Ok(id) = h.miner.id() else {
            return refused("the miner's address is no ID address");
        };
        if parent.height() < self.read().head.height() - self.0.policy.finality {
            return refused("the block forks below finality");
        }
        self.no_equivocation(h, parent)?;
        let Some(e) = self.election(id, round, parent)? else {
            return refused(format!("{} has no power at the look-back", h.miner));
        };
        if !e.eligible {
            return refused("block's miner is ineligible to mine");
        }
        self.check_parent(h, parent)?;
        if h.beacon_entries != e.entries {
            return refused("beacon entries are not those of the epoch");
        }
        let entropy = address_entropy(&h.miner);
        let drawn = draw_randomness(e.base(), Dst::ElectionProofProduction, h.height, &entropy);
        if !keys::verify_bls(&proof.vrf_proof, &drawn, &e.worker) {
            return refused("validating block election proof failed: VRF");
        }
        let wins = win_count(&proof.vrf_proof, &e.power, &e.total);
        if wins < 1 {
            return refused("block is not claiming to be a winner");
        }
        if proof.win_count != wins {
            return refused(format!("wins: {} claimed, {wins} won", proof.win_count));
        }
        let base_ticket = parent.ts.min_ticket_block().ticket.as_ref();
        let base_ticket = base_ticket.map_or(&[][..], |t| &t.vrf_proof);
        let entropy = [entropy.as_slice(), base_ticket].concat();
        let at = Epoch(round - 1);
        let drawn = draw_randomness(e.base(), Dst::TicketProduction, at, &entropy);
        if !keys::verify_bls(&ticket.vrf_proof, &drawn, &e.worker) {
            return refused("validating block tickets failed: VRF");
        }
        let signed = h.block_sig.as_ref();
        if !signed.is_some_and(|s| keys::verify(s, &h.signing_bytes(), &e.worker)) {
            return refused("block signature is not the worker's");
        }
        self.check_messages(b)?;
        self.check_winning_post(h, &e)
    }

    fn check_parent(&self, h: &BlockHeader, parent: &Arc<Entry>) -> Result<(), ChainError> {
        let x = self.execute(parent)?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let drift = self.block_time_ms() / 1000 + 1;
        let latest = now.unwrap_or_default().as_secs() + drift;
        let least = parent.ts.min_timestamp();
        let checks = [
            (
                h.parent_weight == parent.weight,
                "parent weight does not match",
            ),
            (
                h.parent_state_root == x.root,
                "parent state root did not match computed state",
            ),
            (
                h.parent_message_receipts == x.receipts_root,
                "parent receipts root did not match computed value",
            ),
            (h.parent_base_fee == x.base_fee, "base fee doesn't match"),
            (h.timestamp >= least, "block was generated too soon"),
            // Hand-stepped chains run ahead of the wall clock.
            (
                h.timestamp <= latest.max(self.timestamp(parent, h.height.0)),
                "block was from the future",
            ),
        ];
        match checks.iter().find(|(ok, _)| !ok) {
            Some((_, why)) => refused(*why),
            None => Ok(()),
        }
    }

    fn check_messages(&self, b: &Block) -> Result<(), ChainError> {
        let (bls, secp) = split(b);
        if bls.len() + secp.len() != b.messages.len()
            || message_root(&bls, &secp) != b.header.messages
        {
            return refused("messages did not match the root in the header");
        }
        let sigs = b
            .messages
            .iter()
            .take(bls.len())
            .map(|m| m.signature.bytes.as_slice());
        if keys::aggregate(sigs) != b.header.bls_aggregate {
            return refused("BLS aggregate is not that of the messages");
        }
        let gas: u64 = b
            .messages
            .iter()
            .map(|m| m.message.gas_limit)
            .fold(0, u64::saturating_add);
        if gas > self.0.policy.block_gas_limit {
            return refused("block gas limit exceeded");
        }
        let head = self.read().head.clone();
        let state = self.execute(&head)?;
        for m in b.messages.iter() {
            let from = state.state.lookup(&m.message.from);
            let key = from.and_then(|id| state.state.account(id)?.address);
            let data = m.message.cid().to_bytes();
            if !key.is_some_and(|k| keys::verify(&m.signature, &data, &k)) {
                return refused(format!("signature of message {} is wrong", m.cid()));
            }
        }
        Ok(())
    }

    fn check_winning_post(&self, h: &BlockHeader, e: &Election) -> Result<(), ChainError> {
        let [proof] = h.win_post_proof.as_slice() else {
            return refused("expected exactly one winning post");
        };
        if proof.post_proof != lotus_proofs::winning_post_proof_type(e.miner.size) {
            return refused("winning post has the wrong proof type");
        }
        let sectors: Result<Vec<_>, _> = e
            .sectors
            .iter()
            .map(|s| Ok((s.sector_number, Commitment::from_sealed_cid(&s.sealed_cid)?)))
            .collect();
        let sectors =
            sectors.map_err(|e: lotus_types::BadPieceCid| ChainError::Block(e.to_string()))?;
        self.0
            .verifier
            .verify_winning_post(
                ActorId(e.miner.id),
                e.miner.size,
                &e.post_randomness,
                &sectors,
                &proof.proof_bytes,
            )
            .or_else(|why| refused(format!("winning post was invalid: {why}")))
    }

    /// Two blocks of one miner at one height, or on the same parents, are a consensus fault.
    /// Source: lotus, chain/gen/slashfilter.
    fn no_equivocation(&self, h: &BlockHeader, parent: &Entry) -> Result<(), ChainError> {
        let store = self.read();
        let others = store
            .blocks_above(parent.height())
            .filter(|o| o.header.miner == h.miner);
        for o in others {
            let kind = if o.header.height == h.height {
                "double-fork mining faults"
            } else if o.header.parents == h.parents {
                "time-offset mining faults"
            } else {
                continue;
            };
            return refused(format!(
                "produced block would trigger '{kind}' consensus fault; miner: {}, bh: {}, other: {}",
                h.miner,
                h.cid(),
                o.cid
            ));
        }
        Ok(())
    }
}

fn split(b: &Block) -> (Vec<cid::Cid>, Vec<cid::Cid>) {
    use fvm_shared::crypto::signature::SignatureType;
    let (bls, secp): (Vec<_>, Vec<_>) = b
        .messages
        .iter()
        .partition(|m| m.signature.sig_type == SignatureType::BLS);
    let cids = |l: Vec<&Arc<lotus_node_client::api::SignedMessage>>| {
        l.into_iter().map(|m| m.cid()).collect()
    };
    (cids(bls), cids(secp))
}
