//! What a MK1.2 question is answered with, whichever way it came.

use cid::Cid;
use hub_proto::HubError;
use hub_proto::v1::MarketClientRequest;
use lotus_actors::decode as decode_actor;
use lotus_actors::market::ClientDealProposal;
use lotus_journal::{JournalError, Tx};
use lotus_runtime::trace;
use lotus_types::{Address, DealKey, Kind, TokenAmount};
use sha2::{Digest as _, Sha256};

use super::check::{Facts, check, digest};
use super::wire::{
    DealParams, DealResponse, DealStatus, DealStatusRequest, DealStatusResponse, DealUuid,
    TransportsResponse, encode,
};
use super::{BY_PROPOSAL, BY_UUID};
use crate::engine::{Engine, unix_ms};
use crate::machine::{Checkpoint, Event, Record};
use crate::validate::{Proposal, Rules};
use crate::{auth, mk20};

/// Multihash code of SHA-256.
const SHA2_256: u64 = 0x12;
/// Multicodec of DAG-CBOR.
const DAG_CBOR: u64 = 0x71;

/// The client behind a proposal, as the chain has it.
struct Client {
    key: Address,
    available: TokenAmount,
    collateral_min: TokenAmount,
}

impl Engine {
    /// Checks a proposal and journals it. The same proposal again is accepted again.
    pub(crate) async fn mk12_deal(&self, params: DealParams) -> DealResponse {
        let uuid = params.deal_uuid;
        match self.mk12_accept(&params).await {
            Ok(key) => {
                tracing::info!(deal = %key, %uuid, "proposal accepted");
                DealResponse {
                    message: String::new(),
                    accepted: true,
                }
            }
            Err(message) => {
                tracing::info!(%uuid, message, "proposal refused");
                DealResponse {
                    message,
                    accepted: false,
                }
            }
        }
    }

    async fn mk12_accept(&self, params: &DealParams) -> Result<DealKey, String> {
        // Without the signature: the market takes a proposal once, and who has seen one can make
        // another signature of its client that holds.
        let proposal_cid = cid_of(&encode(&params.client_deal_proposal.proposal));
        if let Some((key, record)) = self.mk12_known(params.deal_uuid, &proposal_cid)? {
            let same = record.proposal.digest == digest(params);
            return repeated(key, params.deal_uuid, same);
        }
        let p = &params.client_deal_proposal.proposal;
        let provider = self.provider().await.map_err(|e| hub_reason(&e))?;
        let client = self.mk12_client(&p.client, p.piece_size.0).await?;
        let terms = self.mk12.terms(provider.sector_size);
        self.lists.admit(&client.key).map_err(|r| r.error)?;
        let mut proposal = check(
            params,
            &Facts {
                provider: provider.actor,
                sector_size: provider.sector_size,
                height: provider.height,
                client: client.key,
                client_available: client.available,
                collateral_min: client.collateral_min,
                terms: &terms,
                cfg: &self.cfg,
            },
        )
        .map_err(|why| format!("failed validation: {why}"))?;
        let rules = Rules {
            provider: provider.actor,
            sector_size: provider.sector_size,
            height: provider.height,
            cfg: &self.cfg,
        };
        self.admit(&mut proposal, &rules)
            .await
            .map_err(|r| r.error)?;
        self.mk12_journal(proposal, params, proposal_cid).await
    }

    /// A deal of this UUID or with this proposal.
    fn mk12_known(
        &self,
        uuid: DealUuid,
        proposal_cid: &Cid,
    ) -> Result<Option<(DealKey, Record)>, String> {
        let (uuid, cid) = (uuid.to_string(), proposal_cid.to_string());
        let key = self
            .deals
            .journal()
            .read(|v| {
                Ok::<_, JournalError>(match v.get(&BY_UUID, &uuid)? {
                    Some(key) => Some(key),
                    None => v.get(&BY_PROPOSAL, &cid)?,
                })
            })
            .map_err(|e| journal_reason(&e))?;
        let Some(key) = key else { return Ok(None) };
        let record = self.deals.get(&key).map_err(|e| journal_reason(&e))?;
        Ok(record.map(|r| (key, r)))
    }

    async fn mk12_client(&self, client: &Address, piece_size: u64) -> Result<Client, String> {
        let text = mk20::address_text(client);
        let request = MarketClientRequest {
            client: text.clone(),
            piece_size,
        };
        let answer = self
            .hub
            .chain()
            .market_client(self.hub.request(request))
            .await
            .map_err(HubError::from);
        let a = match answer {
            Ok(a) => a.into_inner(),
            Err(e) if e.is_not_found() => {
                return Err(format!(
                    "failed validation: the chain has no account {text}"
                ));
            }
            Err(e) => return Err(hub_reason(&e)),
        };
        let odd = || "server error: getting market balance".to_owned();
        let atto = |text: &str| {
            let parsed = text.parse::<lotus_actors::BigInt>();
            parsed.map(TokenAmount::from_atto).map_err(|_| odd())
        };
        Ok(Client {
            key: mk20::parse_address(&a.key).ok_or_else(odd)?,
            available: atto(&a.available)?,
            collateral_min: atto(&a.collateral_min)?,
        })
    }

    async fn mk12_journal(
        &self,
        proposal: Proposal,
        params: &DealParams,
        proposal_cid: Cid,
    ) -> Result<DealKey, String> {
        let key = proposal.key.clone();
        let credit = self
            .acquire(&key, proposal.piece.size.get())
            .await
            .map_err(|e| hub_reason(&e))?;
        let event = Event::Accept {
            proposal: Box::new(proposal),
            unix_ms: unix_ms(),
            credit: credit.clone(),
            trace: trace::current(),
        };
        let (uuid, cid, named) = (
            params.deal_uuid.to_string(),
            proposal_cid.to_string(),
            key.clone(),
        );
        // Who has one of the names; nobody, and the deal has them now.
        let taken = async {
            // Both are looked up and taken without another proposal between.
            let _turn = self.mk12.accepting.lock().await;
            if let Some(known) = self.mk12_known(params.deal_uuid, &proposal_cid)? {
                return Ok(Some(known));
            }
            let also = move |tx: &mut Tx| {
                tx.put(&BY_UUID, &uuid, &named)?;
                tx.put(&BY_PROPOSAL, &cid, &named)
            };
            match self.apply_with(&key, event, None, also).await {
                Ok(Some(_)) => Ok(None),
                // A deal of another protocol has the id.
                Ok(None) => match self.deals.get(&key) {
                    Ok(Some(record)) => Ok(Some((key.clone(), record))),
                    Ok(None) => Err("server error: the deal is gone".into()),
                    Err(e) => Err(journal_reason(&e)),
                },
                Err(e) => Err(journal_reason(&e)),
            }
        };
        match taken.await {
            Ok(None) => Ok(key),
            Ok(Some((known, record))) => {
                // The credit is the deal's, if it has the same key.
                if known != key {
                    self.release(&credit).await;
                }
                let same = record.proposal.digest == digest(params);
                repeated(known, params.deal_uuid, same)
            }
            Err(why) => {
                self.release(&credit).await;
                Err(why)
            }
        }
    }

    /// The state of a deal, for its client.
    pub(crate) async fn mk12_status(&self, request: DealStatusRequest) -> DealStatusResponse {
        let uuid = request.deal_uuid;
        match self.mk12_state(&request).await {
            Ok(answer) => answer,
            Err(error) => DealStatusResponse {
                error,
                deal_uuid: uuid,
                is_offline: false,
                deal_status: None,
                transfer_size: 0,
                n_bytes_received: 0,
            },
        }
    }

    async fn mk12_state(&self, request: &DealStatusRequest) -> Result<DealStatusResponse, String> {
        let uuid = request.deal_uuid;
        let unknown = || format!("no storage deal found with deal UUID {uuid}");
        let failed = |e: &JournalError| {
            tracing::error!(%e, "the deal journal fails");
            "failed to fetch deal status".to_owned()
        };
        let name = uuid.to_string();
        let key = self.deals.journal().read(|v| v.get(&BY_UUID, &name));
        let key = key.map_err(|e| failed(&e))?.ok_or_else(unknown)?;
        let record = self.deals.get(&key).map_err(|e| failed(&e))?;
        let record = record.ok_or_else(unknown)?;
        let p = &record.proposal;
        let signed = p.signed.as_ref().ok_or_else(unknown)?;
        let client = mk20::parse_address(&key.client).ok_or_else(unknown)?;
        if !auth::signed_by(&client, &request.signature, &uuid.0) {
            return Err("signature verification failed".into());
        }
        let deal: ClientDealProposal =
            decode_actor(&signed.deal).map_err(|_| "getting signed proposal cid".to_owned())?;
        let view = self.status(&record).await.deal;
        Ok(DealStatusResponse {
            error: String::new(),
            deal_uuid: uuid,
            is_offline: signed.offline,
            deal_status: Some(DealStatus {
                error: if matches!(record.checkpoint, Checkpoint::Failed | Checkpoint::Expired) {
                    record.reason.clone()
                } else {
                    String::new()
                },
                status: boost_name(record.checkpoint).into(),
                proposal: deal.proposal,
                publish_cid: record.published.as_ref().and_then(|p| p.cid.parse().ok()),
                chain_deal_id: record
                    .published
                    .as_ref()
                    .and_then(|p| p.deal_id)
                    .unwrap_or_default(),
                sealing_status: view.sealing_state,
                signed_proposal_cid: cid_of(&signed.deal),
            }),
            transfer_size: signed.transfer_size,
            n_bytes_received: view.received_bytes,
        })
    }

    /// Where deals are retrieved from.
    pub(crate) fn mk12_transports(&self) -> TransportsResponse {
        self.mk12.transports.clone()
    }
}

fn repeated(key: DealKey, uuid: DealUuid, same: bool) -> Result<DealKey, String> {
    let known = DealUuid::from(key.id);
    if same {
        Ok(key)
    } else if known == uuid {
        Err(format!("deal has the same uuid as deal {known}"))
    } else {
        Err(format!("deal proposal is identical to deal {known}"))
    }
}

/// Boost's name for how far a deal is. One that has failed is `Complete`, with an error.
const fn boost_name(checkpoint: Checkpoint) -> &'static str {
    match checkpoint {
        Checkpoint::Accepted => "Accepted",
        Checkpoint::Transferred => "Transferred",
        Checkpoint::Published => "Published",
        Checkpoint::PublishConfirmed | Checkpoint::Offered => "PublishConfirmed",
        Checkpoint::AddedPiece => "AddedPiece",
        // The spokes index a piece while its sector is sealed.
        Checkpoint::Sealing => "IndexedAndAnnounced",
        Checkpoint::Active | Checkpoint::Failed | Checkpoint::Expired => "Complete",
    }
}

/// CID of a proposal, or of a signed one: DAG-CBOR with SHA-256. Source: go-cbor-util, AsIpld.
pub(super) fn cid_of(cbor: &[u8]) -> Cid {
    let digest = Sha256::digest(cbor);
    let hash = cid::multihash::Multihash::wrap(SHA2_256, &digest).expect("32 bytes fit 64");
    Cid::new_v1(DAG_CBOR, hash)
}

fn journal_reason(e: &JournalError) -> String {
    tracing::error!(%e, "the deal journal fails");
    "server error: save to db".into()
}

fn hub_reason(e: &HubError) -> String {
    match e.kind() {
        Kind::Capacity => {
            format!("server error: provider has no space left for storage deals: {e}")
        }
        Kind::Data => format!("failed validation: {e}"),
        Kind::Transport | Kind::Chain | Kind::Config | Kind::Fatal => {
            tracing::warn!(%e, "the hub did not help");
            "server error: the provider's hub does not answer; try again later".into()
        }
    }
}
