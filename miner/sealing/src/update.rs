//! Upgrades of sectors without data (snap deals): the new replica, its proof, its message.

use std::sync::Arc;

use lotus_actors::encode;
use lotus_actors::miner::{
    PROVE_REPLICA_UPDATES3, ProveReplicaUpdates3Params, SectorUpdateManifest,
};
use lotus_messages::{MessageKind, Payer, SendRequest};
use lotus_node_client::api::{SectorLocation, TipSet};
use lotus_proofs::update_proof_type;
use lotus_types::{Epoch, EpochDelta, SectorNumber, TokenAmount};
use lotus_workers::{Output, Task, UpdateFiles};

use crate::SealingError;
use crate::chain::{cause, expired, refused};
use crate::heavy::{Done, unexpected};
use crate::machine::{Cause, Effect, Event, Sector};
use crate::params::manifest;
use crate::shared::{Also, Shared, Stored};
use crate::storage::{FileType, FileTypes, Part};

/// What the chain knows of an upgrade.
enum OnChain {
    /// The sector without it.
    Old,
    /// The sector with it.
    Updated,
}

impl Shared {
    fn update_files(&self, n: SectorNumber) -> UpdateFiles {
        let id = self.id(n);
        UpdateFiles {
            sector: id,
            size: self.size,
            sealed: self.storage.sealed(id),
            cache: self.storage.cache(id),
            updated: self.storage.updated(id),
            updated_cache: self.storage.updated_cache(id),
        }
    }

    pub(crate) async fn update_replica(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let id = self.id(n);
        let layout = match self.layout(s) {
            Ok(layout) => layout,
            Err(why) => return Ok(Event::Failed(why)),
        };
        let shared = self.clone();
        let attempt = self
            .blocking(move || Ok(shared.storage.attempt(id, "update-replica")?))
            .await?;
        let (updated, cache) = (attempt.join("updated"), attempt.join("cache"));
        let task = Task::ReplicaUpdate {
            files: UpdateFiles {
                updated: updated.clone(),
                updated_cache: cache.clone(),
                ..self.update_files(n)
            },
            layout,
            unsealed: self.storage.unsealed(id),
        };
        let commitments = match self.work(n, task).await? {
            Done::Failed(why) => return Ok(Event::Failed(why)),
            Done::Output(Output::Commitments(c)) => c,
            Done::Output(other) => return Ok(unexpected(&other)),
        };
        let places = vec![
            (cache, Part::File(FileType::UpdateCache)),
            (updated, Part::File(FileType::Update)),
        ];
        self.put_in_place(n, s.state, places).await?;
        Ok(Event::ReplicaUpdated(commitments))
    }

    pub(crate) async fn prove_update(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<(Event, Also), SealingError> {
        let failed = |why: String| Ok((Event::Failed(why), Also::Nothing));
        let new = s.update.as_ref().and_then(|u| u.commitments);
        let (Some(old), Some(new)) = (s.commitments, new) else {
            return failed("the replica or its update is not known".into());
        };
        let task = Task::ProveUpdate {
            files: self.update_files(n),
            old_comm_r: old.comm_r,
            commitments: new,
        };
        match self.work(n, task).await? {
            Done::Failed(why) => failed(why),
            Done::Output(Output::Proof(proof)) => {
                Ok((Event::UpdateProved, Also::Store(Stored::UpdateProof, proof)))
            }
            Done::Output(other) => Ok((unexpected(&other), Also::Nothing)),
        }
    }

    /// Drops the data tree of the new replica. Its data is kept until the chain has the update:
    /// it may have to be made again.
    pub(crate) async fn finalize_update(
        self: &Arc<Self>,
        n: SectorNumber,
    ) -> Result<Event, SealingError> {
        let task = Task::Finalize {
            sector: self.id(n),
            size: self.size,
            cache: self.storage.updated_cache(self.id(n)),
        };
        Ok(match self.work(n, task).await? {
            Done::Failed(why) => Event::Failed(why),
            Done::Output(Output::Done) => {
                self.keep(n, FileTypes::UPDATE).await?;
                Event::UpdateFinalized
            }
            Done::Output(other) => unexpected(&other),
        })
    }

    /// What the chain has of the upgrade: an event when it is not the sector that is upgraded.
    async fn update_on_chain(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
        head: &TipSet,
    ) -> Result<Result<OnChain, Event>, SealingError> {
        let Some(info) = self.live_info(n, &head.key()).await? else {
            return Ok(Err(Event::Failed(
                "the sector is not on chain any more".into(),
            )));
        };
        let new = s.update.as_ref().and_then(|u| u.commitments);
        if new.is_some_and(|c| c.comm_r.sealed_cid() == info.sealed_cid) {
            return Ok(Ok(OnChain::Updated));
        }
        if s.commitments
            .is_some_and(|c| c.comm_r.sealed_cid() == info.sealed_cid)
        {
            return Ok(Ok(OnChain::Old));
        }
        let followed = self.follow(n, s, Effect::UpdateReplica).await?;
        Ok(Err(followed.unwrap_or_else(|| {
            Event::Failed("the chain has another replica of the sector".into())
        })))
    }

    /// Whether the deadline takes changes for some epochs more, so that a message can land.
    async fn is_mutable(&self, at: SectorLocation, head: &TipSet) -> Result<bool, SealingError> {
        let d = self
            .node
            .state_miner_proving_deadline(self.actor(), &head.key())
            .await?;
        let window = d.w_post_challenge_window.0;
        let mut opens = d.period_start.0 + i64::try_from(at.deadline).unwrap_or(0) * window;
        if opens + window <= head.height.0 {
            opens += d.w_post_proving_period.0;
        }
        Ok(mutable(head.height.0, opens, window))
    }

    pub(crate) async fn location(
        &self,
        n: SectorNumber,
        head: &TipSet,
    ) -> Result<(SectorLocation, bool), SealingError> {
        let at = self
            .node
            .state_sector_partition(self.actor(), n, &head.key())
            .await?;
        Ok((at, self.is_mutable(at, head).await?))
    }

    pub(crate) async fn is_active(
        &self,
        n: SectorNumber,
        at: SectorLocation,
        head: &TipSet,
    ) -> Result<bool, SealingError> {
        let partition = self.partition(at, &head.key()).await?;
        Ok(partition.is_some_and(|p| p.active_sectors.get(n.0)))
    }

    pub(crate) async fn send_update(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let Some((u, new)) = s.update.as_ref().and_then(|u| Some((u, u.commitments?))) else {
            return Ok(Event::Failed("the update is not known".into()));
        };
        let head = self.chain_head()?;
        match self.update_on_chain(n, s, &head).await? {
            Err(event) => return Ok(event),
            Ok(OnChain::Updated) => {
                return Ok(Event::UpdateLanded { epoch: head.height });
            }
            Ok(OnChain::Old) => {}
        }
        let key = update_key(n, u.tries);
        if let Some(sent) = self.sender.status(&key).await? {
            return Ok(Event::UpdateSent(sent.cid));
        }
        if let Some(why) = expired(&s.pieces, head.height) {
            return Ok(Event::DealsExpired(why));
        }
        let (at, mutable) = self.location(n, &head).await?;
        if !mutable {
            return Ok(Event::DeadlineImmutable);
        }
        let not_now = |why: String| Event::Refused {
            why,
            spent: false,
            cause: Cause::Other,
        };
        if !self.is_active(n, at, &head).await? {
            return Ok(not_now(
                "the sector is faulty or not yet proven, and the chain upgrades only active \
                 sectors"
                    .into(),
            ));
        }
        let Some(proof) = self.stored(n, Stored::UpdateProof).await? else {
            return Ok(Event::Refused {
                why: "the update proof is not stored".into(),
                spent: false,
                cause: Cause::Proof,
            });
        };
        let claims = self.claims(&s.pieces, s.expiration, &head).await?;
        let claimed = |key| claims.iter().any(|(k, _)| k == key);
        let verified: u64 = s
            .pieces
            .iter()
            .filter(|p| claimed(&p.key))
            .map(|p| p.piece.size.get())
            .sum();
        let value = self.more_pledge(n, verified, &head).await?;
        let params = ProveReplicaUpdates3Params {
            sector_updates: vec![SectorUpdateManifest {
                sector: n.0,
                deadline: at.deadline,
                partition: at.partition,
                new_sealed_cid: new.comm_r.sealed_cid(),
                pieces: s
                    .pieces
                    .iter()
                    .map(|p| manifest(p, claimed(&p.key)))
                    .collect(),
            }],
            sector_proofs: vec![proof.into()],
            aggregate_proof: lotus_actors::RawBytes::default(),
            update_proofs_type: update_proof_type(self.size).into(),
            aggregate_proof_type: None,
            require_activation_success: true,
            require_notification_success: false,
        };
        let request = SendRequest {
            key,
            from: Payer::Miner(self.actor()),
            to: self.actor(),
            method: PROVE_REPLICA_UPDATES3,
            params: encode(&params),
            value,
            kind: MessageKind::Commit,
            max_fee: None,
        };
        match self.sender.send(request).await {
            Ok(cid) => Ok(Event::UpdateSent(cid)),
            Err(e) => refused(e),
        }
    }

    /// What the sector's pledge grows by.
    async fn more_pledge(
        &self,
        n: SectorNumber,
        verified: u64,
        head: &TipSet,
    ) -> Result<TokenAmount, SealingError> {
        let at = head.key();
        let info = self
            .node
            .state_sector_get_info(self.actor(), n, &at)
            .await?;
        let Some(info) = info else {
            return Ok(TokenAmount::default());
        };
        let left: EpochDelta = info.expiration - head.height;
        let pledge = self
            .node
            .state_miner_initial_pledge_for_sector(left, self.size.bytes(), verified, &at)
            .await?;
        Ok((pledge - info.initial_pledge).max(TokenAmount::default()))
    }

    pub(crate) async fn await_mutable(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let mut heads = self.head.clone();
        loop {
            heads.borrow_and_update();
            let head = self.chain_head()?;
            let there = matches!(self.update_on_chain(n, s, &head).await?, Ok(OnChain::Old));
            // If the sector is not what it was, the next state finds out what it is.
            if !there || self.location(n, &head).await?.1 {
                return Ok(Event::DeadlineMutable);
            }
            if heads.changed().await.is_err() {
                return Err(SealingError::Stopped);
            }
        }
    }

    pub(crate) async fn await_update(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let tries = s.update.as_ref().map_or(0, |u| u.tries);
        let landed = match self.landed(&update_key(n, tries), true).await? {
            Ok(landed) => landed,
            // Its deadline may have closed while the message was on its way.
            Err(event) => return Ok(event),
        };
        let head = self.chain_head()?;
        Ok(match self.update_on_chain(n, s, &head).await? {
            Ok(OnChain::Updated) => Event::UpdateLanded {
                epoch: landed.height,
            },
            Ok(OnChain::Old) => Event::Refused {
                why: format!(
                    "message {} succeeded, but the sector is not upgraded",
                    landed.cid
                ),
                spent: true,
                cause: Cause::Other,
            },
            Err(_) => Event::Refused {
                why: format!("message {} succeeded, but the sector is gone", landed.cid),
                spent: true,
                cause: cause(landed.exit_code, true),
            },
        })
    }

    /// Waits until neither a reorg nor an election can ask for the first replica.
    pub(crate) async fn await_update_finality(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let new = s.update.as_ref().and_then(|u| u.commitments);
        let Some(new) = new.map(|c| c.comm_r.sealed_cid()) else {
            return Ok(Event::UpdateLost);
        };
        let landed = s.update.as_ref().and_then(|u| u.landed);
        let ripe = landed.unwrap_or(Epoch(0)) + EpochDelta(self.cfg.finality_epochs);
        let mut heads = self.head.clone();
        loop {
            heads.borrow_and_update();
            let head = self.chain_head()?;
            let young = s
                .activation
                .is_some_and(|a| (head.height - a).0 < self.cfg.finality_epochs);
            match self.update_on_chain(n, s, &head).await? {
                Ok(OnChain::Old) => return Ok(Event::UpdateLost),
                Ok(OnChain::Updated) => {}
                // The sector itself is gone, and not because it has ended.
                Err(_) if !young => {}
                Err(_) => {
                    if self.info(n, &head).await?.is_none() {
                        return Ok(Event::CommitLost);
                    }
                }
            }
            if head.height >= ripe {
                let past = self.final_info(n, &head).await?;
                // Or the sector has ended meanwhile: then nobody asks for either.
                if past.is_none_or(|i| i.sealed_cid == new) {
                    return Ok(Event::Final);
                }
            }
            if heads.changed().await.is_err() {
                return Err(SealingError::Stopped);
            }
        }
    }

    pub(crate) async fn release_key(
        self: &Arc<Self>,
        n: SectorNumber,
    ) -> Result<(Event, Also), SealingError> {
        let id = self.id(n);
        self.delete(move |storage| {
            storage.release_key(id)?;
            storage.clean(id)
        })
        .await?;
        Ok((Event::KeyReleased, Also::Drop(Stored::ALL)))
    }

    pub(crate) async fn abort_upgrade(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<(Event, Also), SealingError> {
        let head = self.chain_head()?;
        if let Ok(OnChain::Updated) = self.update_on_chain(n, s, &head).await? {
            let landed = Event::UpdateLanded { epoch: head.height };
            return Ok((landed, Also::Nothing));
        }
        let id = self.id(n);
        self.delete(move |storage| storage.abort_update(id)).await?;
        Ok((Event::UpgradeAborted, Also::Drop(&[Stored::UpdateProof])))
    }
}

fn update_key(n: SectorNumber, tries: u32) -> String {
    format!("update/{n}/{tries}")
}

/// Whether a deadline that opens next at `opens` takes changes, with room for a message to land:
/// it does until one window before it opens. Source: builtin-actors, `deadline_is_mutable`.
const fn mutable(head: i64, opens: i64, window: i64) -> bool {
    let room = if window / 6 < LANDING {
        window / 6
    } else {
        LANDING
    };
    head + room < opens - window
}

/// Epochs that a message may take to land.
const LANDING: i64 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_mutable_until_one_window_before_it_opens() {
        // (head, opens, window, mutable); of 60 epochs, five are left for the message.
        for (head, opens, window, want) in [
            (0, 120, 60, true),
            (54, 120, 60, true),
            (55, 120, 60, false),
            (119, 120, 60, false),
            (150, 120, 60, false),
            (9, 24, 12, true),
            (10, 24, 12, false),
        ] {
            assert_eq!(mutable(head, opens, window), want, "{head} {opens}");
        }
    }
}
