//! The built-in market, for deals by proposal (MK1.2): what a client has there, the one message
//! that a spoke may have sent, and the ask. The message and the ask are made here, from their
//! parts, so that a spoke can have nothing else signed.

use std::collections::BTreeSet;
use std::time::Duration;

use hub_proto::status;
use hub_proto::v1::{
    MarketClientRequest, MarketClientResponse, PublishOutcome, PublishRequest, PublishState,
    SignAskRequest, SignAskResponse,
};
use lotus_actors::market::{
    ClientDealProposal, PUBLISH_STORAGE_DEALS, PublishStorageDealsParams,
    PublishStorageDealsReturn, StorageAsk,
};
use lotus_actors::{BigInt, ExitCode, actors, decode, encode, exit_name};
use lotus_messages::{Landed, MessageKind, Payer, SendError, SendRequest};
use lotus_node_client::api::{TipSetKey, cbor_cid};
use lotus_types::{Address, Kind, PaddedSize, TokenAmount};
use tonic::{Request, Response, Status};

use super::audit::About;
use super::chain::{address, from_node_or_unknown};
use super::{Answer, Api, from_journal, from_node, invalid, not_yours};
use crate::owner::{self, PublishedError};
use crate::pieces::blocking;

/// Deals in one message. Lotus' default is 8; the market actor takes any number that fits a block.
const MAX_DEALS: usize = 256;
/// Longest wait for the chain in one call.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

impl Api {
    pub(super) async fn market_client_of(
        &self,
        request: Request<MarketClientRequest>,
    ) -> Answer<MarketClientResponse> {
        let request = request.into_inner();
        let client = address(&request.client)?;
        if PaddedSize::new(request.piece_size).is_err() {
            return Err(invalid(
                format!("{} is no piece size", request.piece_size),
                "send a power of two, at least 128",
            ));
        }
        let head = TipSetKey::HEAD;
        let key = self.node.state_account_key(client, &head).await;
        let key = key.map_err(|e| from_node_or_unknown(&e, &request.client))?;
        let balance = self.node.state_market_balance(client, &head).await;
        let balance = balance.map_err(|e| from_node_or_unknown(&e, &request.client))?;
        let bounds = self
            .node
            .state_deal_provider_collateral_bounds(request.piece_size, false, &head)
            .await
            .map_err(|e| from_node(&e))?;
        Ok(Response::new(MarketClientResponse {
            key: lotus_node_client::json::address_text(&key),
            available: (balance.escrow - balance.locked).atto().to_string(),
            collateral_min: bounds.min.atto().to_string(),
        }))
    }

    pub(super) async fn publish_deals(
        &self,
        request: Request<PublishRequest>,
    ) -> Answer<PublishState> {
        let about = About::of(&request);
        let seller = self.access.seller(request.extensions().get());
        let request = request.into_inner();
        let (params, proposals) = self.publish_params(&request)?;
        let key = publish_key(&params, request.attempt);
        about.is(&key);
        let send = SendRequest {
            key: key.clone(),
            from: Payer::Miner(Address::new_id(self.actor.0)),
            to: actors::MARKET.address(),
            method: PUBLISH_STORAGE_DEALS,
            params,
            value: TokenAmount::default(),
            kind: MessageKind::Publish,
            max_fee: None,
        };
        let (published, noted) = (self.published.clone(), seller);
        let fresh = blocking(move || published.claim(&noted, &proposals)).await;
        let fresh = fresh.map_err(|e| from_published(&e))?;
        let sent = self.sender.send(send).await;
        if let Err(SendError::Refused { .. }) = &sent {
            let published = self.published.clone();
            let forgotten = blocking(move || published.forget(&fresh)).await;
            forgotten.map_err(|e| from_journal(&e))?;
        }
        let cid = sent.map_err(|e| from_send(&e))?;
        let mut state = PublishState {
            cid: cid.to_string(),
            ..PublishState::default()
        };
        let wait = Duration::from_millis(request.wait_ms).min(LONGEST_WAIT);
        let landed = self.sender.wait(&key, self.confidence);
        match tokio::time::timeout(wait, landed).await {
            // It is under way.
            Err(_) => {}
            Ok(Ok(landed)) => told(&mut state, &landed, request.deals.len())?,
            Ok(Err(SendError::Replaced { .. })) => state.replaced = true,
            Ok(Err(SendError::TooSlow { .. })) => {}
            Ok(Err(e)) => return Err(from_send(&e)),
        }
        Ok(Response::new(state))
    }

    /// The parameters, from deals that are this provider's, and the CIDs of their proposals.
    fn publish_params(
        &self,
        request: &PublishRequest,
    ) -> Result<(Vec<u8>, BTreeSet<String>), Status> {
        if request.deals.is_empty() || request.deals.len() > MAX_DEALS {
            return Err(invalid(
                format!("{} deals are to be published", request.deals.len()),
                format!("send 1 to {MAX_DEALS}"),
            ));
        }
        let provider = Address::new_id(self.actor.0);
        let mut deals = Vec::with_capacity(request.deals.len());
        let mut proposals = BTreeSet::new();
        for bytes in &request.deals {
            let deal: ClientDealProposal =
                decode(bytes).map_err(|e| invalid(e.to_string(), "send signed deal proposals"))?;
            if deal.proposal.provider != provider {
                return Err(invalid(
                    format!(
                        "a deal is with {}, this is {}",
                        deal.proposal.provider, self.actor
                    ),
                    "publish this provider's own deals",
                ));
            }
            proposals.insert(cbor_cid(&encode(&deal.proposal)).to_string());
            deals.push(deal);
        }
        Ok((encode(&PublishStorageDealsParams { deals }), proposals))
    }

    pub(super) async fn sign_storage_ask(
        &self,
        request: Request<SignAskRequest>,
    ) -> Answer<SignAskResponse> {
        let about = About::of(&request);
        let r = request.into_inner();
        about.is(format!("ask {}", r.seq_no));
        let atto = |text: &str| {
            let parsed = text.parse::<BigInt>().ok();
            let positive = parsed.filter(|n| text.len() <= 40 && *n >= BigInt::from(0));
            positive
                .map(TokenAmount::from_atto)
                .ok_or_else(|| invalid("a price is no amount", "send attoFIL as a whole number"))
        };
        let miner = Address::new_id(self.actor.0);
        let ask = StorageAsk {
            miner,
            price: atto(&r.price)?,
            seq_no: r.seq_no,
            expiry: r.expiry,
            timestamp: r.timestamp,
            max_piece_size: r.max_piece_size,
            min_piece_size: r.min_piece_size,
            verified_price: atto(&r.verified_price)?,
        };
        let head = TipSetKey::HEAD;
        let info = self.node.state_miner_info(miner, &head).await;
        let worker = info.map_err(|e| from_node(&e))?.worker;
        let key = self.node.state_account_key(worker, &head).await;
        let key = key.map_err(|e| from_node(&e))?;
        let signature = self.node.wallet_sign(key, &encode(&ask)).await;
        let signature = signature.map_err(|e| from_node(&e))?;
        Ok(Response::new(SignAskResponse {
            signature: encode(&signature),
        }))
    }
}

/// Names a message by what is in it: the same deals in the same order are the same message, for
/// ever, whoever asks.
fn publish_key(params: &[u8], attempt: u32) -> String {
    format!("publish-{}-{attempt}", cbor_cid(params))
}

/// What the receipt says.
fn told(state: &mut PublishState, landed: &Landed, deals: usize) -> Result<(), Status> {
    state.landed = true;
    state.cid = landed.cid.to_string();
    state.height = landed.height.0;
    state.exit_code = landed.exit_code;
    if landed.exit_code != 0 {
        let code = u32::try_from(landed.exit_code).unwrap_or(u32::MAX);
        state.exit_name = exit_name(ExitCode::new(code)).to_string();
        return Ok(());
    }
    let odd = |why: String| {
        status(
            Kind::Fatal,
            format!("the return value of PublishStorageDeals is odd: {why}"),
            "report this with the message's CID",
            None,
        )
    };
    let returned: PublishStorageDealsReturn =
        decode(&landed.return_data).map_err(|e| odd(e.to_string()))?;
    let mut ids = returned.ids.into_iter();
    for place in 0..deals as u64 {
        let deal_id = if returned.valid_deals.get(place) {
            let id = ids.next();
            Some(id.ok_or_else(|| odd("fewer ids than deals".into()))?)
        } else {
            None
        };
        state.outcomes.push(PublishOutcome { deal_id });
    }
    Ok(())
}

fn from_published(e: &PublishedError) -> Status {
    match e {
        PublishedError::NotYours { owner, .. } => not_yours(e.to_string(), &owner::fix(owner)),
        PublishedError::Journal(e) => from_journal(e),
    }
}

fn from_send(e: &SendError) -> Status {
    // Only the actor's word says something of the deals: what a node answers beside that, and what
    // the hub lacks, passes.
    let kind = match e {
        SendError::Refused { .. } => Kind::Chain,
        _ if e.kind() == Kind::Capacity => Kind::Capacity,
        _ => Kind::Transport,
    };
    status(kind, e.to_string(), e.fix(), None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lotus_actors::BitField;
    use lotus_types::Epoch;

    fn landed(exit_code: i64, ids: &[u64], valid: &[u64]) -> Landed {
        let returned = PublishStorageDealsReturn {
            ids: ids.to_vec(),
            valid_deals: BitField::try_from_bits(valid.iter().copied()).unwrap(),
        };
        Landed {
            cid: cbor_cid(b"message"),
            height: Epoch(7),
            tipset: TipSetKey::HEAD,
            exit_code,
            return_data: encode(&returned),
            gas_used: 1,
        }
    }

    #[test]
    fn ids_find_their_deals() {
        let mut state = PublishState::default();
        told(&mut state, &landed(0, &[40, 41], &[0, 2]), 3).unwrap();
        let ids: Vec<_> = state.outcomes.iter().map(|o| o.deal_id).collect();
        assert_eq!(ids, [Some(40), None, Some(41)]);
        assert!(told(&mut PublishState::default(), &landed(0, &[40], &[0, 2]), 3).is_err());
        let mut failed = PublishState::default();
        told(&mut failed, &landed(16, &[], &[]), 3).unwrap();
        assert!(failed.landed && failed.outcomes.is_empty());
        assert!(!failed.exit_name.is_empty());
    }

    #[test]
    fn a_message_is_named_by_its_deals() {
        assert_eq!(publish_key(b"a", 0), publish_key(b"a", 0));
        assert_ne!(publish_key(b"a", 0), publish_key(b"b", 0));
        assert_ne!(publish_key(b"a", 0), publish_key(b"a", 1));
        assert!(publish_key(&[0; 100_000], u32::MAX).len() <= 256);
    }
}
