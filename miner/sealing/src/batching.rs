//! Sends the messages that sectors share. A batch is journaled in the seats of its sectors
//! before its message is made, and the batch's number names the message: after a crash the same
//! sectors wait for the same message.

use std::sync::Arc;
use std::time::Duration;

use lotus_actors::miner::{
    CompactCommD, PRE_COMMIT_SECTOR_BATCH2, PROVE_COMMIT_SECTORS3, PreCommitSectorBatchParams2,
    ProveCommitSectors3Params, SectorActivationManifest,
};
use lotus_actors::{RawBytes, RegisteredAggregateProof, encode};
use lotus_messages::{MessageKind, Payer, SendError, SendRequest};
use lotus_node_client::api::{SectorPreCommitInfo, TipSet};
use lotus_proofs::seal_proof_type;
use lotus_types::{EpochDelta, SectorNumber, TokenAmount};

use crate::SealingError;
use crate::aggregate::{AGGREGATES, Proofs, Wanted};
use crate::batch::{
    BatchKind, Composed, Flush, Room, Rules, Share, aggregates, compose, flush, waiting,
};
use crate::chain::{OnChain, cause, expired};
use crate::machine::{Cause, Event, Sector, SectorPiece};
use crate::params::{data_cid, expiration, manifest};
use crate::shared::{Also, Shared, Stored, lock, unix_ms};

/// One sector's part of a message.
enum Part {
    PreCommit(SectorPreCommitInfo),
    Commit(SectorActivationManifest, Vec<u8>),
}

impl Part {
    fn proof(&self) -> Option<&[u8]> {
        match self {
            Self::PreCommit(_) => None,
            Self::Commit(_, proof) => Some(proof),
        }
    }
}

impl Shared {
    /// Waits until the sector's message is journaled, and makes it if this sector is the one of
    /// its batch to do so. `None`: the sector has moved on.
    pub(crate) async fn send_batched(
        self: &Arc<Self>,
        kind: BatchKind,
        n: SectorNumber,
    ) -> Result<Option<Event>, SealingError> {
        let mut changes = self.changes.subscribe();
        let mut heads = self.head.clone();
        let mut looked = false;
        loop {
            changes.mark_unchanged();
            heads.borrow_and_update();
            let turn = self.batching.lock().await;
            let Some(s) = self.busy(n).filter(|s| s.state == kind.state()) else {
                return Ok(None);
            };
            let wait = match s.seat.batch {
                Some(batch) => {
                    let members = self.members(kind, batch);
                    if members.first().is_some_and(|(first, _)| *first == n) {
                        let wanted = self.send_batch(kind, batch, members).await?;
                        drop(turn);
                        if let Some(wanted) = wanted {
                            self.aggregate(wanted).await?;
                        }
                        continue;
                    }
                    Duration::MAX
                }
                None if !looked => {
                    // The chain may know more than this journal.
                    if let Err(event) = self.part(kind, n, &s, &*self.chain_head()?).await? {
                        return Ok(Some(event));
                    }
                    looked = true;
                    continue;
                }
                None => match self.flush(kind)? {
                    Flush::Now(batch) if batch.first() == Some(&n) => {
                        let composed = self.composed(kind, batch).await?;
                        self.seat(composed).await?;
                        continue;
                    }
                    Flush::Now(_) => Duration::MAX,
                    Flush::At(at) => {
                        self.live(n, |l| l.next_retry_unix_ms = Some(at));
                        Duration::from_millis(at.saturating_sub(unix_ms()))
                    }
                },
            };
            drop(turn);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = changes.changed() => {}
                Ok(()) = heads.changed() => {}
            }
        }
    }

    fn flush(&self, kind: BatchKind) -> Result<Flush, SealingError> {
        let head = self.chain_head()?;
        let base_fee = &head.min_ticket_block().parent_base_fee;
        let cheap = *base_fee < TokenAmount::from_atto(self.cfg.batch_above_base_fee_attofil);
        let waiting = waiting(&self.cfg, kind, lock(&self.mirror).busy());
        Ok(flush(
            Rules::of(&self.cfg, kind),
            &waiting,
            head.height,
            cheap,
            &lock(&self.published),
            unix_ms(),
        ))
    }

    pub(crate) fn members(&self, kind: BatchKind, batch: u64) -> Vec<(SectorNumber, Sector)> {
        let mirror = lock(&self.mirror);
        let members = mirror
            .busy()
            .iter()
            .filter(|(_, s)| s.state == kind.state() && s.seat.batch == Some(batch));
        members.map(|(n, s)| (*n, s.clone())).collect()
    }

    /// As many sectors of a batch as one message holds, but at least one.
    async fn composed(
        self: &Arc<Self>,
        kind: BatchKind,
        batch: Vec<SectorNumber>,
    ) -> Result<Composed, SealingError> {
        if kind == BatchKind::PreCommit {
            return Ok(Composed {
                members: batch,
                aggregate: false,
            });
        }
        let mut shares = Vec::with_capacity(batch.len());
        for n in batch {
            let proof = self.stored(n, Stored::Proof).await?.map_or(0, |p| p.len());
            let s = self.busy(n);
            shares.push(Share {
                sector: n,
                proof,
                pieces: s.as_ref().map_or(0, |s| s.pieces.len()),
                plain: s.is_some_and(|s| s.seat.plain),
            });
        }
        let room = Room {
            bytes: self.cfg.commit_batch_max_bytes,
            size: self.size,
            aggregates: aggregates(&self.cfg, self.proofs),
        };
        Ok(compose(&room, &shares))
    }

    /// Sends the message of a batch, or finds that it was sent, or tells which aggregate it needs
    /// first. Sectors that the chain would not take leave the batch before.
    async fn send_batch(
        self: &Arc<Self>,
        kind: BatchKind,
        batch: u64,
        members: Vec<(SectorNumber, Sector)>,
    ) -> Result<Option<Wanted>, SealingError> {
        let key = kind.key(batch);
        if let Some(sent) = self.sender.status(&key).await? {
            self.sent(kind, batch, &members, sent.cid).await?;
            return Ok(None);
        }
        let head = self.chain_head()?;
        let (mut ready, mut parts) = (Vec::new(), Vec::new());
        let mut value = TokenAmount::default();
        for (n, s) in members {
            match self.part(kind, n, &s, &head).await? {
                Ok((part, amount)) => {
                    parts.push(part);
                    value += amount;
                    ready.push((n, s));
                }
                Err(event) => {
                    self.apply(n, event, None, Also::Nothing).await?;
                }
            }
        }
        if ready.is_empty() {
            return Ok(None);
        }
        let proofs = parts.iter().filter_map(Part::proof).collect();
        let aggregate = match self.proofs(batch, &ready, proofs).await? {
            Proofs::Apart => None,
            Proofs::Together(aggregate) => Some(aggregate),
            Proofs::Wanted(wanted) => return Ok(Some(wanted)),
            Proofs::GivenUp(why) => {
                self.give_up_aggregate(batch, why).await?;
                return Ok(None);
            }
        };
        let (method, params, of) = request(parts, aggregate);
        let request = SendRequest {
            key,
            from: Payer::Miner(self.actor()),
            to: self.actor(),
            method,
            params,
            value,
            kind: of,
            max_fee: Some(self.sender.max_fee(of, ready.len() as u64)),
        };
        match self.sender.send(request).await {
            Ok(cid) => self.sent(kind, batch, &ready, cid).await?,
            Err(e @ SendError::Refused { exit_code, .. }) => {
                let event = Event::Refused {
                    why: e.to_string(),
                    spent: false,
                    cause: cause(exit_code, ready.len() == 1),
                };
                let all = ready.into_iter().map(|(n, _)| (n, event.clone()));
                self.apply_all(all.collect(), None, |_| Ok(())).await?;
            }
            Err(e) => {
                // Each of them says what it waits for, such as money, and they stay together.
                let e = SealingError::from(e);
                for (n, _) in &ready {
                    self.live(*n, |l| l.last_error = Some(format!("{e}; {}", e.fix())));
                }
                return Err(e);
            }
        }
        Ok(None)
    }

    async fn sent(
        self: &Arc<Self>,
        kind: BatchKind,
        batch: u64,
        members: &[(SectorNumber, Sector)],
        cid: cid::Cid,
    ) -> Result<(), SealingError> {
        let event = match kind {
            BatchKind::PreCommit => Event::PreCommitSent(cid),
            BatchKind::Commit => Event::CommitSent(cid),
        };
        let all = members.iter().map(|(n, _)| (*n, event.clone()));
        // The message is journaled: it has the aggregate.
        self.apply_all(all.collect(), None, move |tx| {
            tx.remove(&AGGREGATES, &batch).map(drop)
        })
        .await?;
        Ok(())
    }

    /// A sector's part of its message and what it pays, or the event that says why it has none.
    async fn part(
        self: &Arc<Self>,
        kind: BatchKind,
        n: SectorNumber,
        s: &Sector,
        head: &TipSet,
    ) -> Result<Result<(Part, TokenAmount), Event>, SealingError> {
        match kind {
            BatchKind::PreCommit => self.pre_commit_part(n, s, head).await,
            BatchKind::Commit => self.commit_part(n, s, head).await,
        }
    }

    async fn pre_commit_part(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
        head: &TipSet,
    ) -> Result<Result<(Part, TokenAmount), Event>, SealingError> {
        let (Some(ticket), Some(commitments)) = (s.ticket, s.commitments) else {
            return Ok(Err(Event::TicketExpired));
        };
        let at = head.key();
        match self.on_chain(n, &commitments, head).await? {
            OnChain::Active {
                activation,
                expiration,
            } => {
                return Ok(Err(Event::CommitLanded {
                    activation,
                    expiration,
                }));
            }
            OnChain::PreCommitted(info) => {
                return Ok(Err(Event::PreCommitLanded {
                    epoch: info.pre_commit_epoch,
                }));
            }
            OnChain::Other(what) => return Ok(Err(self.other_replica(n, s, what).await?)),
            OnChain::Nothing => {}
        }
        if self
            .node
            .state_miner_sector_allocated(self.actor(), n, &at)
            .await?
        {
            return Ok(Err(Event::NumberSpent(format!(
                "sector number {n} was pre-committed before and its pre-commit has expired; \
                 the chain never takes a number twice"
            ))));
        }
        if let Some(why) = expired(&s.pieces, head.height) {
            return Ok(Err(Event::DealsExpired(why)));
        }
        if self.is_stale(&ticket)? {
            return Ok(Err(Event::TicketExpired));
        }
        let info = SectorPreCommitInfo {
            seal_proof: seal_proof_type(self.size),
            sector_number: n,
            sealed_cid: commitments.comm_r.sealed_cid(),
            seal_rand_epoch: ticket.epoch,
            deal_ids: Vec::new(),
            expiration: expiration(&self.cfg, head.height, &s.pieces),
            unsealed_cid: data_cid(s, &commitments.comm_d),
        };
        let deposit = self
            .node
            .state_miner_pre_commit_deposit_for_power(self.actor(), &info, &at)
            .await?;
        Ok(Ok((Part::PreCommit(info), deposit)))
    }

    async fn commit_part(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
        head: &TipSet,
    ) -> Result<Result<(Part, TokenAmount), Event>, SealingError> {
        let Some(commitments) = s.commitments else {
            return Ok(Err(Event::PreCommitLost));
        };
        let pre_commit = match self.on_chain(n, &commitments, head).await? {
            OnChain::Active {
                activation,
                expiration,
            } => {
                return Ok(Err(Event::CommitLanded {
                    activation,
                    expiration,
                }));
            }
            OnChain::PreCommitted(info) => info,
            OnChain::Nothing => return Ok(Err(Event::PreCommitLost)),
            OnChain::Other(what) => return Ok(Err(self.other_replica(n, s, what).await?)),
        };
        let delay = self.params().await?.pre_commit_challenge_delay;
        if s.seed.map(|seed| seed.epoch) != Some(pre_commit.pre_commit_epoch + delay) {
            return Ok(Err(Event::SeedLost));
        }
        let Some(proof) = self.stored(n, Stored::Proof).await? else {
            return Ok(Err(Event::Refused {
                why: "the seal proof is not stored".into(),
                spent: false,
                cause: Cause::Proof,
            }));
        };
        // An allocation can have expired since it was checked; with it the whole sector would
        // be refused.
        let ends = pre_commit.info.expiration;
        let claims = self.claims(&s.pieces, Some(ends), head).await?;
        let claimed =
            |p: &SectorPiece| p.claim.is_some() && claims.iter().any(|(k, _)| *k == p.key);
        let bytes = s.pieces.iter().filter(|p| claimed(p));
        let verified: u64 = bytes.map(|p| p.piece.size.get()).sum();
        let left: EpochDelta = ends - head.height;
        let pledge = self
            .node
            .state_miner_initial_pledge_for_sector(left, self.size.bytes(), verified, &head.key())
            .await?;
        let value = (pledge - pre_commit.pre_commit_deposit).max(TokenAmount::default());
        let manifest = SectorActivationManifest {
            sector_number: n.0,
            pieces: s.pieces.iter().map(|p| manifest(p, claimed(p))).collect(),
        };
        Ok(Ok((Part::Commit(manifest, proof), value)))
    }
}

/// The message of these parts, which are all of one kind. With an aggregate, the proofs of
/// sectors are left out.
fn request(parts: Vec<Part>, aggregate: Option<Vec<u8>>) -> (u64, Vec<u8>, MessageKind) {
    let (mut sectors, mut activations, mut proofs) = (Vec::new(), Vec::new(), Vec::new());
    for part in parts {
        match part {
            Part::PreCommit(info) => sectors.push(lotus_actors::miner::SectorPreCommitInfo {
                seal_proof: info.seal_proof.into(),
                sector_number: info.sector_number.0,
                sealed_cid: info.sealed_cid,
                seal_rand_epoch: info.seal_rand_epoch.0,
                deal_ids: Vec::new(),
                expiration: info.expiration.0,
                unsealed_cid: CompactCommD(info.unsealed_cid),
            }),
            Part::Commit(manifest, proof) => {
                activations.push(manifest);
                if aggregate.is_none() {
                    proofs.push(RawBytes::new(proof));
                }
            }
        }
    }
    if activations.is_empty() {
        let params = PreCommitSectorBatchParams2 { sectors };
        return (
            PRE_COMMIT_SECTOR_BATCH2,
            encode(&params),
            MessageKind::PreCommit,
        );
    }
    let params = ProveCommitSectors3Params {
        // One bad sector must not stop the others. With an aggregate too: it has to be of every
        // pre-commit of the message, also of those that are not activated, and all must exist.
        require_activation_success: activations.len() == 1,
        sector_activations: activations,
        sector_proofs: proofs,
        aggregate_proof_type: aggregate
            .is_some()
            .then_some(RegisteredAggregateProof::SnarkPackV2),
        aggregate_proof: aggregate.map_or_else(RawBytes::default, RawBytes::new),
        require_notification_success: false,
    };
    (PROVE_COMMIT_SECTORS3, encode(&params), MessageKind::Commit)
}
