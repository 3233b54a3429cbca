//! Effects that talk to the chain. Each looks first at what is there.

use std::sync::Arc;

use lotus_actors::miner::ProveCommitSectors3Return;
use lotus_actors::{Dst, ExitCode, address_entropy, exit_name};
use lotus_messages::{Landed, SendError};
use lotus_node_client::api::{
    NetworkParams, Partition, SectorLocation, SectorOnChainInfo, SectorPreCommitOnChainInfo,
    TipSet, TipSetKey,
};
use lotus_proofs::{SealedCommitments, layout};
use lotus_types::{Address, DealKey, Epoch, EpochDelta, SectorNumber};

use crate::SealingError;
use crate::batch::BatchKind;
use crate::machine::{Cause, Claim, Effect, Event, SealSeed, SealTicket, Sector, SectorPiece};
use crate::shared::Shared;

/// What the chain knows of a sector.
pub(crate) enum OnChain {
    Nothing,
    PreCommitted(Box<SectorPreCommitOnChainInfo>),
    Active {
        activation: Epoch,
        expiration: Epoch,
    },
    /// With another replica than ours.
    Other(&'static str),
}

impl Shared {
    pub(crate) fn actor(&self) -> Address {
        self.miner.address()
    }

    pub(crate) fn chain_head(&self) -> Result<Arc<TipSet>, SealingError> {
        self.head
            .borrow()
            .clone()
            .ok_or_else(|| SealingError::Chain("the chain's head is not known yet".into()))
    }

    pub(crate) fn is_stale(&self, ticket: &SealTicket) -> Result<bool, SealingError> {
        let age = (self.chain_head()?.height - ticket.epoch).0;
        Ok(age > self.cfg.ticket_max_age_epochs)
    }

    /// A sector that is active counts only once no reorg is likely to undo it: what comes next
    /// drops the files with which it could be proven again.
    pub(crate) async fn on_chain(
        &self,
        n: SectorNumber,
        commitments: &SealedCommitments,
        head: &TipSet,
    ) -> Result<OnChain, SealingError> {
        let (at, ours) = (head.key(), commitments.comm_r.sealed_cid());
        if let Some(info) = self
            .node
            .state_sector_get_info(self.actor(), n, &at)
            .await?
        {
            if info.sealed_cid != ours {
                return Ok(OnChain::Other("sector"));
            }
            self.deep_enough(n, info.activation, head)?;
            return Ok(OnChain::Active {
                activation: info.activation,
                expiration: info.expiration,
            });
        }
        let info = self
            .node
            .state_sector_precommit_info(self.actor(), n, &at)
            .await?;
        Ok(match info {
            Some(i) if i.info.sealed_cid == ours => OnChain::PreCommitted(Box::new(i)),
            Some(_) => OnChain::Other("pre-commit"),
            None => OnChain::Nothing,
        })
    }

    /// An error until so many epochs lie on top of an event that no reorg is likely to undo it.
    pub(crate) fn deep_enough(
        &self,
        n: SectorNumber,
        since: Epoch,
        head: &TipSet,
    ) -> Result<(), SealingError> {
        let depth = (head.height - since).0;
        if depth < i64::try_from(self.cfg.message_confidence_epochs).unwrap_or(i64::MAX) {
            return Err(SealingError::Chain(format!(
                "the chain has sector {n} since epoch {since}, {depth} epochs ago: waiting for more"
            )));
        }
        Ok(())
    }

    /// A sector that lives. Of one that has ended the chain keeps the information until its
    /// partition is compacted, which may be never. Source: builtin-actors, miner state,
    /// `State::sectors`.
    pub(crate) async fn live_info(
        &self,
        n: SectorNumber,
        at: &TipSetKey,
    ) -> Result<Option<SectorOnChainInfo>, SealingError> {
        let Some(info) = self.node.state_sector_get_info(self.actor(), n, at).await? else {
            return Ok(None);
        };
        let place = self
            .node
            .state_sector_partition(self.actor(), n, at)
            .await?;
        let partition = self.partition(place, at).await?;
        Ok(partition
            .is_some_and(|p| p.live_sectors.get(n.0))
            .then_some(info))
    }

    pub(crate) async fn partition(
        &self,
        place: SectorLocation,
        at: &TipSetKey,
    ) -> Result<Option<Partition>, SealingError> {
        let mut partitions = self
            .node
            .state_miner_partitions(self.actor(), place.deadline, at)
            .await?;
        let index = usize::try_from(place.partition).ok();
        Ok(index
            .filter(|i| *i < partitions.len())
            .map(|i| partitions.swap_remove(i)))
    }

    /// The sector as the chain had it so long ago that no reorg changes it, and no election asks
    /// for what it had before.
    pub(crate) async fn final_info(
        &self,
        n: SectorNumber,
        head: &TipSet,
    ) -> Result<Option<SectorOnChainInfo>, SealingError> {
        let at = Epoch((head.height.0 - self.cfg.finality_epochs).max(0));
        let past = self
            .node
            .chain_get_tipset_by_height(at, &head.key())
            .await?;
        self.live_info(n, &past.key()).await
    }

    /// Whether the sector ended so long ago that neither a reorg nor an election asks
    /// for it.
    pub(crate) async fn is_gone(
        &self,
        n: SectorNumber,
        s: &Sector,
        head: &TipSet,
    ) -> Result<bool, SealingError> {
        let old = |since: Epoch| (head.height - since).0 >= self.cfg.finality_epochs;
        Ok(s.activation.is_none_or(old) && self.final_info(n, head).await?.is_none())
    }

    /// Looks the allocations of the pieces up: those that the chain would let this sector claim,
    /// as far as it is known when the sector ends.
    pub(crate) async fn claims(
        &self,
        pieces: &[SectorPiece],
        expiration: Option<Epoch>,
        head: &TipSet,
    ) -> Result<Vec<(DealKey, Claim)>, SealingError> {
        let mut claims = Vec::new();
        for p in pieces {
            let Some(a) = p.terms.allocation else {
                continue;
            };
            let found = self
                .node
                .state_get_allocation(a.client.address(), a.id, &head.key())
                .await?;
            let Some(found) = found.filter(|f| {
                f.provider == self.miner.0
                    && f.data == p.piece.cid.cid()
                    && f.size == p.piece.size.get()
                    && f.expiration > head.height
                    && expiration
                        .is_none_or(|e| (f.term_min..=f.term_max).contains(&(e - head.height)))
            }) else {
                tracing::warn!(deal = %p.key, client = %a.client, allocation = a.id,
                    "no such allocation for this piece: it is stored as unverified data");
                continue;
            };
            claims.push((
                p.key.clone(),
                Claim {
                    term_min: found.term_min,
                    term_max: found.term_max,
                },
            ));
        }
        Ok(claims)
    }

    pub(crate) async fn check_pieces(&self, s: &Sector) -> Result<Event, SealingError> {
        if let Err(e) = layout(self.size, &s.piece_infos()) {
            return Ok(Event::Failed(e.to_string()));
        }
        let head = self.chain_head()?;
        if (s.pre_commit_epoch.is_none() || s.update.is_some())
            && let Some(why) = expired(&s.pieces, head.height)
        {
            return Ok(Event::DealsExpired(why));
        }
        let claims = self.claims(&s.pieces, s.expiration, &head).await?;
        Ok(Event::Packed { claims })
    }

    pub(crate) async fn take_ticket(&self, s: &Sector) -> Result<Event, SealingError> {
        if let (Some(_), Some(ticket)) = (s.pre_commit_epoch, s.ticket) {
            return Ok(Event::Ticket(ticket));
        }
        let head = self.chain_head()?;
        let epoch = Epoch((head.height.0 - self.cfg.ticket_lookback_epochs).max(0));
        let value = self.randomness(epoch, &head).await?;
        Ok(Event::Ticket(SealTicket { value, epoch }))
    }

    /// Sealing randomness of an epoch.
    pub(crate) async fn randomness(
        &self,
        epoch: Epoch,
        head: &TipSet,
    ) -> Result<[u8; 32], SealingError> {
        let entropy = address_entropy(&self.actor());
        let value = self
            .node
            .state_get_randomness_from_tickets(
                Dst::SealRandomness as i64,
                epoch,
                &entropy,
                &head.key(),
            )
            .await?;
        Ok(value)
    }

    pub(crate) async fn await_pre_commit(
        &self,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let landed = match self.batch_landed(BatchKind::PreCommit, s).await? {
            Ok(landed) => landed,
            Err(refused) => return Ok(refused),
        };
        let Some(commitments) = s.commitments else {
            return Ok(not_there("the replica is not known any more".into()));
        };
        let head = self.chain_head()?;
        Ok(match self.on_chain(n, &commitments, &head).await? {
            OnChain::PreCommitted(info) => Event::PreCommitLanded {
                epoch: info.pre_commit_epoch,
            },
            OnChain::Active {
                activation,
                expiration,
            } => Event::CommitLanded {
                activation,
                expiration,
            },
            OnChain::Other(what) => not_there(format!("the chain has another {what}")),
            OnChain::Nothing => not_there(format!(
                "message {} succeeded, but the pre-commit is not on chain",
                landed.cid
            )),
        })
    }

    pub(crate) async fn await_seed(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let Some(commitments) = s.commitments else {
            return Ok(Event::PreCommitLost);
        };
        let delay = self.params().await?.pre_commit_challenge_delay;
        let mut heads = self.head.clone();
        loop {
            let head = self.chain_head()?;
            let info = match self.on_chain(n, &commitments, &head).await? {
                OnChain::PreCommitted(info) => info,
                OnChain::Active {
                    activation,
                    expiration,
                } => {
                    return Ok(Event::CommitLanded {
                        activation,
                        expiration,
                    });
                }
                OnChain::Nothing => return Ok(Event::PreCommitLost),
                OnChain::Other(what) => return self.other_replica(n, s, what).await,
            };
            let epoch = info.pre_commit_epoch + delay;
            let ready = epoch + EpochDelta(self.cfg.seed_confidence_epochs.max(1));
            if head.height >= ready {
                let value = self
                    .node
                    .state_get_randomness_from_beacon(
                        Dst::InteractiveSealChallengeSeed as i64,
                        epoch,
                        &address_entropy(&self.actor()),
                        &head.key(),
                    )
                    .await?;
                return Ok(Event::SeedReady(SealSeed { value, epoch }));
            }
            // A reorg may move the pre-commit meanwhile: it is looked up again.
            let there = heads.wait_for(|h| h.as_ref().is_some_and(|h| h.height >= ready));
            if there.await.is_err() {
                return Err(SealingError::Stopped);
            }
        }
    }

    /// What becomes of a sector of which the chain has another replica: if that is the one on
    /// disk, the journal was restored, and the chain is followed.
    pub(crate) async fn other_replica(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
        what: &str,
    ) -> Result<Event, SealingError> {
        match self.follow(n, s, Effect::PreCommit2).await? {
            Some(found @ Event::FoundOnChain(_)) => Ok(found),
            _ => Ok(other_replica(n, what)),
        }
    }

    pub(crate) async fn await_commit(
        &self,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let landed = match self.batch_landed(BatchKind::Commit, s).await? {
            Ok(landed) => landed,
            Err(refused) => return Ok(refused),
        };
        let info = self
            .node
            .state_sector_get_info(self.actor(), n, &self.chain_head()?.key())
            .await?;
        if let Some(info) = info {
            return Ok(Event::CommitLanded {
                activation: info.activation,
                expiration: info.expiration,
            });
        }
        let why = match lotus_actors::decode::<ProveCommitSectors3Return>(&landed.return_data) {
            Ok(r) => r.activation_results.fail_codes.first().map_or_else(
                || "the sector is not on chain".into(),
                |f| format!("activation failed: {}", exit_name(f.code)),
            ),
            Err(e) => e.to_string(),
        };
        Ok(Event::Refused {
            why: format!("message {} succeeded, but {why}", landed.cid),
            spent: true,
            cause: Cause::Other,
        })
    }

    /// [`Shared::landed`] for the message of the sector's batch.
    async fn batch_landed(
        &self,
        kind: BatchKind,
        s: &Sector,
    ) -> Result<Result<Landed, Event>, SealingError> {
        let Some(batch) = s.seat.batch else {
            return Ok(Err(not_there(
                "it is not known which message it was".into(),
            )));
        };
        self.landed(&kind.key(batch), s.seat.alone).await
    }

    /// The receipt of a successful message; the inner error is the chain's refusal. `alone`: the
    /// message is about one sector.
    pub(crate) async fn landed(
        &self,
        key: &str,
        alone: bool,
    ) -> Result<Result<Landed, Event>, SealingError> {
        let landed = match self
            .sender
            .wait(key, self.cfg.message_confidence_epochs)
            .await
        {
            Ok(landed) => landed,
            Err(e @ SendError::Replaced { .. }) => {
                return Ok(Err(Event::Refused {
                    why: e.to_string(),
                    spent: true,
                    cause: Cause::Other,
                }));
            }
            Err(e) => return Err(e.into()),
        };
        if landed.exit_code == 0 {
            return Ok(Ok(landed));
        }
        let code = ExitCode::new(u32::try_from(landed.exit_code).unwrap_or(u32::MAX));
        Ok(Err(Event::Refused {
            why: format!("message {}: {}", landed.cid, exit_name(code)),
            spent: true,
            cause: cause(landed.exit_code, alone),
        }))
    }

    /// The address that pays for sealing messages.
    pub(crate) async fn worker(&self) -> Result<Address, SealingError> {
        let info = self
            .node
            .state_miner_info(self.actor(), &TipSetKey::HEAD)
            .await?;
        Ok(info.worker)
    }

    pub(crate) async fn params(&self) -> Result<&NetworkParams, SealingError> {
        Ok(self
            .params
            .get_or_try_init(|| self.node.state_get_network_params())
            .await?)
    }
}

/// What an exit code says about the sector of a message. Of several sectors it does not say which
/// is meant.
pub(crate) fn cause(exit_code: i64, alone: bool) -> Cause {
    match u32::try_from(exit_code).map(ExitCode::new) {
        Ok(ExitCode::SYS_OUT_OF_GAS) => Cause::Gas,
        Ok(ExitCode::SYS_INSUFFICIENT_FUNDS | ExitCode::USR_INSUFFICIENT_FUNDS) => Cause::Money,
        Ok(ExitCode::USR_ILLEGAL_ARGUMENT) if alone => Cause::Proof,
        _ => Cause::Other,
    }
}

/// Why no piece is of use any more; `None` while one is.
pub(crate) fn expired(pieces: &[SectorPiece], head: Epoch) -> Option<String> {
    let late = |p: &SectorPiece| p.terms.start_epoch.0 > 0 && p.terms.start_epoch <= head;
    let last = pieces.iter().map(|p| p.terms.start_epoch).max()?;
    pieces.iter().all(late).then(|| {
        format!(
            "every deal should have begun by epoch {last}, and it is epoch {head}; the sector is \
             not on chain and is given up"
        )
    })
}

/// A refusal is an event; anything else, money that is missing too, is waited for.
pub(crate) fn refused(e: SendError) -> Result<Event, SealingError> {
    match e {
        SendError::Refused { exit_code, .. } => Ok(Event::Refused {
            why: e.to_string(),
            spent: false,
            cause: cause(exit_code, true),
        }),
        e => Err(e.into()),
    }
}

fn not_there(why: String) -> Event {
    Event::Refused {
        why,
        spent: false,
        cause: Cause::Other,
    }
}

fn other_replica(n: SectorNumber, what: &str) -> Event {
    Event::Abandoned(format!(
        "the chain has a {what} of number {n} with another replica, which is not on disk here: \
         another program uses this miner, or this hub was restored from a backup without its files"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::testing;

    #[test]
    fn exit_codes_tell_money_from_proofs() {
        for (code, alone, want) in [
            (7, true, Cause::Gas),
            (6, true, Cause::Money),
            (19, false, Cause::Money),
            (16, true, Cause::Proof),
            (16, false, Cause::Other),
            (18, true, Cause::Other),
            (-1, true, Cause::Other),
        ] {
            assert_eq!(cause(code, alone), want, "{code} {alone}");
        }
    }

    #[test]
    fn deals_expire_together() {
        let piece = |start| {
            let mut p = testing::placed(1, testing::piece(1, 1024), 0);
            p.terms.start_epoch = Epoch(start);
            p
        };
        for (starts, late) in [
            (vec![], false),
            (vec![0], false),
            (vec![100], true),
            (vec![101], false),
            (vec![50, 100], true),
            (vec![50, 101], false),
            (vec![50, 0], false),
        ] {
            let pieces: Vec<_> = starts.iter().map(|s| piece(*s)).collect();
            assert_eq!(expired(&pieces, Epoch(100)).is_some(), late, "{starts:?}");
        }
    }
}
