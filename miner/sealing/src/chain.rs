//! Effects that talk to the chain. Each looks first at what is there.

use std::sync::Arc;

use lotus_actors::miner::{
    CompactCommD, PRE_COMMIT_SECTOR_BATCH2, PROVE_COMMIT_SECTORS3, PreCommitSectorBatchParams2,
    ProveCommitSectors3Params, ProveCommitSectors3Return, SectorActivationManifest,
};
use lotus_actors::{Dst, ExitCode, RawBytes, address_entropy, encode, exit_name};
use lotus_messages::{Landed, MessageKind, SendError, SendRequest};
use lotus_node_client::api::{SectorPreCommitInfo, SectorPreCommitOnChainInfo, TipSet, TipSetKey};
use lotus_proofs::{SealedCommitments, layout, seal_proof_type};
use lotus_types::{Address, DealKey, Epoch, EpochDelta, SectorNumber, TokenAmount};

use crate::SealingError;
use crate::machine::{Claim, Event, SealSeed, SealTicket, Sector, SectorPiece};
use crate::params::{data_cid, expiration, manifest};
use crate::sealing::{Shared, Stored};

/// What the chain knows of a sector.
enum OnChain {
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
    fn actor(&self) -> Address {
        self.miner.address()
    }

    fn chain_head(&self) -> Result<Arc<TipSet>, SealingError> {
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
    async fn on_chain(
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
            let depth = (head.height - info.activation).0;
            if depth < i64::try_from(self.cfg.message_confidence_epochs).unwrap_or(i64::MAX) {
                return Err(SealingError::Chain(format!(
                    "sector {n} is active since epoch {}, {depth} epochs ago: waiting for more",
                    info.activation
                )));
            }
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

    /// Looks the allocations of the pieces up: those that the chain would let this sector claim.
    async fn claims(
        &self,
        pieces: &[SectorPiece],
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
        let claims = self.claims(&s.pieces, &*self.chain_head()?).await?;
        Ok(Event::Packed { claims })
    }

    pub(crate) async fn take_ticket(&self, s: &Sector) -> Result<Event, SealingError> {
        if let (Some(_), Some(ticket)) = (s.pre_commit_epoch, s.ticket) {
            return Ok(Event::Ticket(ticket));
        }
        let head = self.chain_head()?;
        let epoch = Epoch((head.height.0 - self.cfg.ticket_lookback_epochs).max(0));
        let value = self
            .node
            .state_get_randomness_from_tickets(
                Dst::SealRandomness as i64,
                epoch,
                &address_entropy(&self.actor()),
                &head.key(),
            )
            .await?;
        Ok(Event::Ticket(SealTicket { value, epoch }))
    }

    pub(crate) async fn send_pre_commit(
        &self,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let (Some(ticket), Some(commitments)) = (s.ticket, s.commitments) else {
            return Ok(Event::TicketExpired);
        };
        let head = self.chain_head()?;
        let at = head.key();
        let key = pre_commit_key(n, s);
        let sent = self.sender.status(&key).await?;
        match self.on_chain(n, &commitments, &head).await? {
            OnChain::Active {
                activation,
                expiration,
            } => {
                return Ok(Event::CommitLanded {
                    activation,
                    expiration,
                });
            }
            OnChain::PreCommitted(info) => {
                return Ok(Event::PreCommitLanded {
                    epoch: info.pre_commit_epoch,
                });
            }
            OnChain::Other(what) => return Ok(other_replica(n, what)),
            OnChain::Nothing => {}
        }
        let landed = sent.as_ref().is_some_and(|m| m.landed.is_some());
        if (sent.is_none() || landed)
            && self
                .node
                .state_miner_sector_allocated(self.actor(), n, &at)
                .await?
        {
            return Ok(Event::Abandoned(format!(
                "sector number {n} was pre-committed before and its pre-commit has expired; \
                 the chain never takes a number twice"
            )));
        }
        if sent.is_none() && self.is_stale(&ticket)? {
            return Ok(Event::TicketExpired);
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
        let params = PreCommitSectorBatchParams2 {
            sectors: vec![lotus_actors::miner::SectorPreCommitInfo {
                seal_proof: info.seal_proof.into(),
                sector_number: n.0,
                sealed_cid: info.sealed_cid,
                seal_rand_epoch: info.seal_rand_epoch.0,
                deal_ids: Vec::new(),
                expiration: info.expiration.0,
                unsealed_cid: CompactCommD(info.unsealed_cid),
            }],
        };
        let request = SendRequest {
            key,
            from: self.worker().await?,
            to: self.actor(),
            method: PRE_COMMIT_SECTOR_BATCH2,
            params: encode(&params),
            value: deposit,
            kind: MessageKind::PreCommit,
            max_fee: None,
        };
        match self.sender.send(request).await {
            Ok(cid) => Ok(Event::PreCommitSent(cid)),
            Err(e) => refused(e),
        }
    }

    pub(crate) async fn await_pre_commit(
        &self,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let landed = match self.landed(&pre_commit_key(n, s)).await? {
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
        &self,
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
                OnChain::Other(what) => return Ok(other_replica(n, what)),
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

    pub(crate) async fn send_commit(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let Some(commitments) = s.commitments else {
            return Ok(Event::PreCommitLost);
        };
        let head = self.chain_head()?;
        let at = head.key();
        let pre_commit = match self.on_chain(n, &commitments, &head).await? {
            OnChain::Active {
                activation,
                expiration,
            } => {
                return Ok(Event::CommitLanded {
                    activation,
                    expiration,
                });
            }
            OnChain::PreCommitted(info) => info,
            OnChain::Nothing => return Ok(Event::PreCommitLost),
            OnChain::Other(what) => return Ok(other_replica(n, what)),
        };
        let Some(proof) = self.stored(n, Stored::Proof).await? else {
            return Ok(Event::Refused {
                why: "the seal proof is not stored".into(),
                spent: false,
                bad_proof: true,
            });
        };
        // An allocation can have expired since it was checked; with it the whole sector would
        // be refused.
        let claims = self.claims(&s.pieces, &head).await?;
        let claimed =
            |p: &SectorPiece| p.claim.is_some() && claims.iter().any(|(k, _)| *k == p.key);
        let verified: u64 = s
            .pieces
            .iter()
            .filter(|p| claimed(p))
            .map(|p| p.piece.size.get())
            .sum();
        let pledge = self
            .node
            .state_miner_initial_pledge_for_sector(
                pre_commit.info.expiration - head.height,
                self.size.bytes(),
                verified,
                &at,
            )
            .await?;
        let value = (pledge - pre_commit.pre_commit_deposit).max(TokenAmount::default());
        let params = ProveCommitSectors3Params {
            sector_activations: vec![SectorActivationManifest {
                sector_number: n.0,
                pieces: s.pieces.iter().map(|p| manifest(p, claimed(p))).collect(),
            }],
            sector_proofs: vec![RawBytes::new(proof)],
            aggregate_proof: RawBytes::default(),
            aggregate_proof_type: None,
            require_activation_success: true,
            require_notification_success: false,
        };
        let request = SendRequest {
            key: commit_key(n, s),
            from: self.worker().await?,
            to: self.actor(),
            method: PROVE_COMMIT_SECTORS3,
            params: encode(&params),
            value,
            kind: MessageKind::Commit,
            max_fee: None,
        };
        match self.sender.send(request).await {
            Ok(cid) => Ok(Event::CommitSent(cid)),
            Err(e) => refused(e),
        }
    }

    pub(crate) async fn await_commit(
        &self,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let landed = match self.landed(&commit_key(n, s)).await? {
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
            bad_proof: false,
        })
    }

    /// The receipt of a successful message; the inner error is the chain's refusal.
    async fn landed(&self, key: &str) -> Result<Result<Landed, Event>, SealingError> {
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
                    bad_proof: false,
                }));
            }
            Err(e) => return Err(e.into()),
        };
        let code = u32::try_from(landed.exit_code).unwrap_or(u32::MAX);
        if code == 0 {
            return Ok(Ok(landed));
        }
        let code = ExitCode::new(code);
        Ok(Err(Event::Refused {
            why: format!("message {}: {}", landed.cid, exit_name(code)),
            spent: true,
            bad_proof: code == ExitCode::USR_ILLEGAL_ARGUMENT,
        }))
    }

    /// The address that pays for sealing messages.
    async fn worker(&self) -> Result<Address, SealingError> {
        let info = self
            .node
            .state_miner_info(self.actor(), &TipSetKey::HEAD)
            .await?;
        Ok(info.worker)
    }

    async fn params(&self) -> Result<&lotus_node_client::api::NetworkParams, SealingError> {
        Ok(self
            .params
            .get_or_try_init(|| self.node.state_get_network_params())
            .await?)
    }
}

fn pre_commit_key(n: SectorNumber, s: &Sector) -> String {
    format!("precommit/{n}/{}", s.pre_commit_tries)
}

fn commit_key(n: SectorNumber, s: &Sector) -> String {
    format!("commit/{n}/{}", s.commit_tries)
}

/// A refusal is an event; anything else is tried again.
fn refused(e: SendError) -> Result<Event, SealingError> {
    match e {
        SendError::Refused { exit_code, .. } => Ok(Event::Refused {
            why: e.to_string(),
            spent: false,
            bad_proof: exit_code == i64::from(ExitCode::USR_ILLEGAL_ARGUMENT.value()),
        }),
        e => Err(e.into()),
    }
}

fn not_there(why: String) -> Event {
    Event::Refused {
        why,
        spent: false,
        bad_proof: false,
    }
}

fn other_replica(n: SectorNumber, what: &str) -> Event {
    Event::Abandoned(format!(
        "the chain has a {what} of number {n} with another replica: another program uses this miner"
    ))
}
