//! What a step would overwrite or delete is compared with the chain first. After a restored backup
//! the chain knows more than the journal: then the chain is followed, and files that it knows are
//! kept.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lotus_node_client::api::{SectorOnChainInfo, SectorPreCommitOnChainInfo, TipSet};
use lotus_proofs::{SealedCommitments, comm_d, replica_commitment, zero_commitment};
use lotus_types::{Commitment, Epoch, Kind, PaddedSize, SectorNumber};

use crate::SealingError;
use crate::machine::{Effect, Event, Found, FoundAt, SealTicket, Sector};
use crate::shared::Shared;

/// What the chain has under a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// A pre-commit of this replica.
    PreCommit {
        comm_r: Commitment,
        /// It has the journal's pieces.
        same_data: bool,
        /// And its ticket, so that making the sector again gives the same replica.
        remade: bool,
    },
    /// A sector with this replica, made from the first one if it was upgraded.
    Sector {
        comm_r: Commitment,
        key: Option<Commitment>,
    },
}

/// What a replica on disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Record {
    /// It is not there, or not made to its end.
    Nothing,
    Of(Commitment),
    /// Its record can not be read.
    Unreadable,
}

/// The replicas of a sector on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Disk {
    sealed: Record,
    update: Record,
}

/// What is done with a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It harms nothing that the chain knows.
    GoOn,
    /// The files are the chain's: the sector is what the chain says.
    Follow,
    /// The files are not the chain's, or it can not be told.
    Stop,
}

/// Whether a step overwrites or deletes files, or takes pieces into what the chain may have.
const fn replaces(effect: Effect) -> bool {
    matches!(
        effect,
        Effect::WaitForPieces
            | Effect::WritePieces
            | Effect::PreCommit1
            | Effect::PreCommit2
            | Effect::UpdateReplica
            | Effect::AbortUpgrade
            | Effect::Remove
    )
}

/// What is done with a step, by what the chain and the disk have.
fn verdict(effect: Effect, s: &Sector, known: &Known, disk: &Disk) -> Verdict {
    let own = s.commitments.map(|c| c.comm_r);
    let here = |c: Commitment| disk.sealed == Record::Of(c) || disk.update == Record::Of(c);
    let told = disk.sealed != Record::Unreadable && disk.update != Record::Unreadable;
    let keep_unless = |harmless| {
        if harmless {
            Verdict::GoOn
        } else {
            Verdict::Stop
        }
    };
    match *known {
        // The operator may give a pre-commit up; an upgrade is of a sector on chain.
        Known::PreCommit { .. } if effect == Effect::Remove || s.state.is_upgrading() => {
            Verdict::GoOn
        }
        // It is made again, as before: the journal knows all of it.
        Known::PreCommit { comm_r, .. } if own == Some(comm_r) => Verdict::GoOn,
        Known::PreCommit {
            comm_r,
            same_data: true,
            ..
        } if disk.sealed == Record::Of(comm_r) => Verdict::Follow,
        Known::PreCommit { comm_r, remade, .. } => {
            keep_unless(remade && told && disk.sealed != Record::Of(comm_r))
        }
        Known::Sector { comm_r, .. } if effect == Effect::Remove => {
            if here(comm_r) {
                Verdict::Follow
            } else {
                keep_unless(told)
            }
        }
        // As long as the chain has the first replica, what the upgrade has made is ours alone.
        Known::Sector { comm_r, .. } if s.state.is_upgrading() && own == Some(comm_r) => {
            Verdict::GoOn
        }
        Known::Sector {
            comm_r,
            key: Some(_),
        } if disk.update == Record::Of(comm_r) => Verdict::Follow,
        Known::Sector { comm_r, .. } if effect == Effect::AbortUpgrade => {
            keep_unless(![Record::Unreadable, Record::Of(comm_r)].contains(&disk.update))
        }
        Known::Sector { .. } if s.state.is_upgrading() => Verdict::Stop,
        Known::Sector { comm_r, key: None } if disk.sealed == Record::Of(comm_r) => Verdict::Follow,
        // Its files are lost, and making it gives the same one.
        Known::Sector { comm_r, key: None } => keep_unless(own == Some(comm_r) && told),
        Known::Sector { key: Some(_), .. } => Verdict::Stop,
    }
}

/// The padded bytes of the pieces that a sector has held since it has its present power. Source:
/// builtin-actors, `ActivatedPiece` weights: bytes times epochs.
fn data_bytes(info: &SectorOnChainInfo) -> Option<u128> {
    let weight = u128::try_from(&info.deal_weight + &info.verified_deal_weight).ok()?;
    let epochs = u128::try_from((info.expiration - info.power_base_epoch).0).ok()?;
    (epochs > 0 && weight % epochs == 0).then(|| weight / epochs)
}

impl Shared {
    /// The event by which a sector follows the chain, or stops, instead of a step that would
    /// harm what the chain knows.
    pub(crate) async fn ahead(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
        effect: Effect,
    ) -> Result<Option<Event>, SealingError> {
        if !replaces(effect) {
            return Ok(None);
        }
        self.follow(n, s, effect).await
    }

    /// [`Shared::ahead`], whatever the step is.
    pub(crate) async fn follow(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
        effect: Effect,
    ) -> Result<Option<Event>, SealingError> {
        let head = self.chain_head()?;
        let info = match effect {
            Effect::Remove => self.needed_info(n, &head).await?,
            _ => self.info(n, &head).await?,
        };
        if let Some(info) = info {
            return self.follow_sector(n, s, effect, &info, &head).await;
        }
        let pre_commit = self
            .node
            .state_sector_precommit_info(self.actor(), n, &head.key())
            .await?;
        let Some(pre_commit) = pre_commit else {
            return Ok(None);
        };
        let comm_r = sealed(&pre_commit.info.sealed_cid)?;
        let disk = self.disk(n).await?;
        let same_data = self.data(s) == Some(self.data_of(&pre_commit)?);
        let same_ticket = s.ticket.map(|t| t.epoch) == Some(pre_commit.info.seal_rand_epoch);
        let known = Known::PreCommit {
            comm_r,
            same_data,
            remade: same_data && same_ticket,
        };
        match verdict(effect, s, &known, &disk) {
            Verdict::GoOn => Ok(None),
            Verdict::Stop => Ok(Some(conflict(n, "pre-commit", &comm_r, &disk))),
            Verdict::Follow => Ok(Some(Event::FoundOnChain(Box::new(Found {
                commitments: SealedCommitments {
                    comm_r,
                    comm_d: self.data_of(&pre_commit)?,
                },
                ticket: Some(self.ticket_of(&pre_commit, &head).await?),
                at: FoundAt::PreCommitted {
                    epoch: pre_commit.pre_commit_epoch,
                },
                same_pieces: true,
                has_data: pre_commit.info.unsealed_cid.is_some(),
            })))),
        }
    }

    async fn follow_sector(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
        effect: Effect,
        info: &SectorOnChainInfo,
        head: &TipSet,
    ) -> Result<Option<Event>, SealingError> {
        let comm_r = sealed(&info.sealed_cid)?;
        self.live(n, |l| l.on_chain = Some(comm_r));
        let key = info.sector_key_cid.as_ref().map(sealed).transpose()?;
        let known = Known::Sector { comm_r, key };
        let disk = self.disk(n).await?;
        match verdict(effect, s, &known, &disk) {
            Verdict::GoOn => Ok(None),
            Verdict::Stop => Ok(Some(
                match (effect, conflict(n, "sector", &comm_r, &disk)) {
                    (Effect::Remove, Event::Conflict(why)) => Event::Failed(why),
                    (_, stopped) => stopped,
                },
            )),
            Verdict::Follow => {
                self.deep_enough(n, info.activation, head)?;
                let found = self.found(n, s, info, comm_r, key, head).await?;
                Ok(Some(Event::FoundOnChain(Box::new(found))))
            }
        }
    }

    /// A sector on chain whose files are here, as far as the chain still tells.
    async fn found(
        &self,
        n: SectorNumber,
        s: &Sector,
        info: &SectorOnChainInfo,
        comm_r: Commitment,
        key: Option<Commitment>,
        head: &TipSet,
    ) -> Result<Found, SealingError> {
        let (activation, expiration) = (info.activation, info.expiration);
        let first = key.unwrap_or(comm_r);
        let own = s.commitments.filter(|c| c.comm_r == first);
        let pre_commit = self.past_pre_commit(n, activation, head).await?;
        let ticket = match (&pre_commit, own) {
            (Some(pre_commit), _) => Some(self.ticket_of(pre_commit, head).await?),
            (None, Some(_)) => s.ticket,
            (None, None) => None,
        };
        let held = data_bytes(info);
        let ours: u128 = s
            .pieces
            .iter()
            .map(|p| u128::from(p.piece.size.get()))
            .sum();
        let zeros = zero_commitment(self.padded()?);
        if key.is_some() {
            // What an upgrade holds, the chain tells by its size alone.
            let same_pieces = s.state.is_upgrading() && ours > 0 && held == Some(ours);
            let data = if same_pieces { self.data(s) } else { None };
            return Ok(Found {
                commitments: own.unwrap_or(SealedCommitments {
                    comm_r: first,
                    comm_d: zeros,
                }),
                ticket,
                at: FoundAt::Updated {
                    activation,
                    expiration,
                    commitments: SealedCommitments {
                        comm_r,
                        comm_d: data.unwrap_or(UNKNOWN),
                    },
                    seen: head.height,
                },
                same_pieces: same_pieces && data.is_some(),
                has_data: true,
            });
        }
        let data = match (&pre_commit, own) {
            (Some(pre_commit), _) => Some(self.data_of(pre_commit)?),
            (None, Some(own)) => Some(own.comm_d),
            (None, None) => (held == Some(0)).then_some(zeros),
        };
        let ours = if s.state.is_upgrading() {
            None
        } else {
            self.data(s)
        };
        Ok(Found {
            commitments: SealedCommitments {
                comm_r,
                comm_d: data.unwrap_or(UNKNOWN),
            },
            ticket,
            at: FoundAt::Active {
                activation,
                expiration,
            },
            same_pieces: data.is_some() && ours == data,
            has_data: data != Some(zeros),
        })
    }

    /// The sector on chain, also one that has ended.
    pub(crate) async fn info(
        &self,
        n: SectorNumber,
        head: &TipSet,
    ) -> Result<Option<SectorOnChainInfo>, SealingError> {
        let at = head.key();
        let info = self.node.state_sector_get_info(self.actor(), n, &at);
        Ok(info.await?)
    }

    /// The sector on chain while its files may be asked for.
    async fn needed_info(
        &self,
        n: SectorNumber,
        head: &TipSet,
    ) -> Result<Option<SectorOnChainInfo>, SealingError> {
        match self.live_info(n, &head.key()).await? {
            Some(info) => Ok(Some(info)),
            None => self.final_info(n, head).await,
        }
    }

    /// The pre-commit that a sector was made from. Nodes do not keep old states: then there is
    /// none.
    async fn past_pre_commit(
        &self,
        n: SectorNumber,
        activation: Epoch,
        head: &TipSet,
    ) -> Result<Option<SectorPreCommitOnChainInfo>, SealingError> {
        let at = Epoch((activation.0 - 1).max(0));
        let look = async {
            let past = self
                .node
                .chain_get_tipset_by_height(at, &head.key())
                .await?;
            self.node
                .state_sector_precommit_info(self.actor(), n, &past.key())
                .await
        };
        match look.await {
            Ok(found) => Ok(found),
            Err(e) if e.kind() == Kind::Transport => Err(e.into()),
            Err(e) => {
                tracing::warn!(sector = %n, epoch = %at, error = %e,
                    "the node does not have the state with the sector's pre-commit any more");
                Ok(None)
            }
        }
    }

    /// comm_d of the journal's pieces. `None`: they fit into no sector.
    fn data(&self, s: &Sector) -> Option<Commitment> {
        comm_d(self.size, &self.layout(s).ok()?).ok()
    }

    fn data_of(&self, p: &SectorPreCommitOnChainInfo) -> Result<Commitment, SealingError> {
        match &p.info.unsealed_cid {
            Some(cid) => {
                Commitment::from_unsealed_cid(cid).map_err(|e| SealingError::Chain(e.to_string()))
            }
            None => Ok(zero_commitment(self.padded()?)),
        }
    }

    fn padded(&self) -> Result<PaddedSize, SealingError> {
        PaddedSize::new(self.size.bytes()).map_err(|e| SealingError::Chain(e.to_string()))
    }

    async fn ticket_of(
        &self,
        p: &SectorPreCommitOnChainInfo,
        head: &TipSet,
    ) -> Result<SealTicket, SealingError> {
        let epoch = p.info.seal_rand_epoch;
        let value = self.randomness(epoch, head).await?;
        Ok(SealTicket { value, epoch })
    }

    /// What the replicas on disk commit to. A path that is not there is waited for.
    async fn disk(self: &Arc<Self>, n: SectorNumber) -> Result<Disk, SealingError> {
        let id = self.id(n);
        self.storage.check(id)?;
        let shared = self.clone();
        self.blocking(move || {
            let s = &shared.storage;
            Ok(Disk {
                sealed: record(&s.sealed(id), s.cache(id)),
                update: record(&s.updated(id), s.updated_cache(id)),
            })
        })
        .await
    }
}

/// comm_d of data that nobody here knows.
const UNKNOWN: Commitment = Commitment([0; 32]);

fn record(replica: &Path, cache: PathBuf) -> Record {
    if !replica.is_file() {
        return Record::Nothing;
    }
    match replica_commitment(&cache) {
        Ok(Some(comm_r)) => Record::Of(comm_r),
        Ok(None) => Record::Nothing,
        Err(e) => {
            tracing::warn!(cache = %cache.display(), error = %e,
                "what the replica commits to can not be read");
            Record::Unreadable
        }
    }
}

fn sealed(cid: &cid::Cid) -> Result<Commitment, SealingError> {
    Commitment::from_sealed_cid(cid).map_err(|e| SealingError::Chain(e.to_string()))
}

fn conflict(n: SectorNumber, what: &str, comm_r: &Commitment, disk: &Disk) -> Event {
    let cid = comm_r.sealed_cid();
    let here = if [disk.sealed, disk.update].contains(&Record::Unreadable) {
        "what the files here are can not be read"
    } else if [disk.sealed, disk.update].contains(&Record::Of(*comm_r)) {
        "the files here are those, but its data is not that of this journal's pieces"
    } else {
        "the files here are others"
    };
    Event::Conflict(format!(
        "the chain has a {what} of number {n} with replica {cid}, which this journal does not know; \
         {here}. Nothing is overwritten. After a restored backup bring the sector's files back to \
         a storage path (`lotus-miner storage redeclare`): it is looked at again and goes on by \
         itself. If another program uses this miner, stop one of the two. \
         `lotus-miner sectors remove {n}`, or `abort-upgrade {n}` for an upgrade, gives up what \
         is here"
    ))
}

#[cfg(test)]
mod tests;
