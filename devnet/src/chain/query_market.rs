//! What a node says about the market and the verified registry, and a client's orders to them.

use std::collections::BTreeMap;

use cid::Cid;
use lotus_actors::datacap::{TRANSFER, TransferParams, UNITS_PER_BYTE};
use lotus_actors::market::Label;
use lotus_actors::verifreg::{AllocationRequest, AllocationRequests};
use lotus_actors::{BigInt, METHOD_SEND, PaddedPieceSize, RawBytes, actors, encode};
use lotus_node_client::api::{
    Allocation, DealCollateralBounds, DealProposal, DealState, MarketBalance, MarketDeal, Message,
    SignedMessage, TipSetKey, VerifiedClaim,
};
use lotus_types::{Address, Epoch, EpochDelta, SectorNumber, TokenAmount};

use super::Chain;
use crate::error::ChainError;

/// What a client asks of the verified registry.
#[derive(Clone, Debug)]
pub struct AllocationOrder {
    /// Who shall store.
    pub provider: Address,
    /// The piece.
    pub piece: Cid,
    /// Padded bytes.
    pub size: u64,
    /// Least epochs that a sector must keep it.
    pub term_min: i64,
    /// Most epochs for which it counts.
    pub term_max: i64,
    /// Epochs from now by which a sector must claim it.
    pub claim_within: i64,
}

impl Chain {
    /// Funds of an address in the market.
    pub fn state_market_balance(
        &self,
        addr: &Address,
        key: &TipSetKey,
    ) -> Result<MarketBalance, ChainError> {
        let (_, x) = self.state_at(key)?;
        let id = x.state.lookup(addr).ok_or(ChainError::NoActor(*addr))?;
        let e = x.state.market.escrow.get(&id).cloned().unwrap_or_default();
        Ok(MarketBalance {
            escrow: e.total,
            locked: e.locked,
        })
    }

    /// A deal of the built-in market.
    pub fn state_market_storage_deal(
        &self,
        id: u64,
        key: &TipSetKey,
    ) -> Result<MarketDeal, ChainError> {
        let (_, x) = self.state_at(key)?;
        let d = x.state.market.deals.get(&id);
        let d = d.ok_or_else(|| ChainError::NotFound(format!("deal {id}")))?;
        let p = &d.proposal;
        let label = match &p.label {
            Label::String(s) => s.clone(),
            Label::Bytes(b) => hex::encode(b),
        };
        Ok(MarketDeal {
            proposal: DealProposal {
                piece_cid: p.piece_cid,
                piece_size: p.piece_size.0,
                verified_deal: p.verified_deal,
                client: p.client,
                provider: p.provider,
                label,
                start_epoch: Epoch(p.start_epoch),
                end_epoch: Epoch(p.end_epoch),
                storage_price_per_epoch: p.storage_price_per_epoch.clone(),
                provider_collateral: p.provider_collateral.clone(),
                client_collateral: p.client_collateral.clone(),
            },
            state: DealState {
                sector_number: d.state.map_or(0, |s| s.sector_number),
                sector_start_epoch: Epoch(d.state.map_or(-1, |s| s.sector_start_epoch)),
                last_updated_epoch: Epoch(d.state.map_or(-1, |s| s.last_updated_epoch)),
                slash_epoch: Epoch(d.state.map_or(-1, |s| s.slash_epoch)),
            },
        })
    }

    /// What a provider may put at stake in a deal: the devnet asks for nothing.
    #[must_use]
    pub fn state_deal_provider_collateral_bounds(
        &self,
        _size: u64,
        _verified: bool,
        _key: &TipSetKey,
    ) -> DealCollateralBounds {
        DealCollateralBounds {
            min: TokenAmount::default(),
            max: TokenAmount::from_whole(2_000_000_000),
        }
    }

    /// An allocation of a client.
    pub fn state_get_allocation(
        &self,
        client: &Address,
        id: u64,
        key: &TipSetKey,
    ) -> Result<Option<Allocation>, ChainError> {
        Ok(self.state_get_allocations(client, key)?.remove(&id))
    }

    /// Every allocation of a client, by id.
    pub fn state_get_allocations(
        &self,
        client: &Address,
        key: &TipSetKey,
    ) -> Result<BTreeMap<u64, Allocation>, ChainError> {
        let (_, x) = self.state_at(key)?;
        let id = x.state.lookup(client).ok_or(ChainError::NoActor(*client))?;
        let all = x.state.registry.allocations.range((id, 0)..=(id, u64::MAX));
        let dto = all.map(|((_, n), a)| {
            let dto = Allocation {
                client: a.client,
                provider: a.provider,
                data: a.data,
                size: a.size.0,
                term_min: EpochDelta(a.term_min),
                term_max: EpochDelta(a.term_max),
                expiration: Epoch(a.expiration),
            };
            (*n, dto)
        });
        Ok(dto.collect())
    }

    /// Every claim of a provider, by id.
    pub fn state_get_claims(
        &self,
        provider: &Address,
        key: &TipSetKey,
    ) -> Result<BTreeMap<u64, VerifiedClaim>, ChainError> {
        let (_, x) = self.state_at(key)?;
        let id = x.state.lookup(provider);
        let id = id.ok_or(ChainError::NoActor(*provider))?;
        let all = x.state.registry.claims.range((id, 0)..=(id, u64::MAX));
        let dto = all.map(|((_, n), c)| {
            let dto = VerifiedClaim {
                provider: c.provider,
                client: c.client,
                data: c.data,
                size: c.size.0,
                term_min: EpochDelta(c.term_min),
                term_max: EpochDelta(c.term_max),
                term_start: Epoch(c.term_start),
                sector: SectorNumber(c.sector),
            };
            (*n, dto)
        });
        Ok(dto.collect())
    }

    /// A claim of a provider.
    pub fn state_get_claim(
        &self,
        provider: &Address,
        id: u64,
        key: &TipSetKey,
    ) -> Result<Option<lotus_actors::verifreg::Claim>, ChainError> {
        let (_, x) = self.state_at(key)?;
        let provider = x
            .state
            .lookup(provider)
            .ok_or(ChainError::NoActor(*provider))?;
        Ok(x.state.registry.claims.get(&(provider, id)).cloned())
    }

    /// DataCap of a client, bytes; `None` for one that never had any.
    pub fn state_verified_client_status(
        &self,
        client: &Address,
        key: &TipSetKey,
    ) -> Result<Option<BigInt>, ChainError> {
        let (_, x) = self.state_at(key)?;
        let id = x.state.lookup(client).ok_or(ChainError::NoActor(*client))?;
        Ok(x.state.registry.datacap.get(&id).copied().map(BigInt::from))
    }

    fn plain_message(from: Address, to: Address, value: TokenAmount) -> Message {
        Message {
            version: 0,
            to,
            from,
            nonce: 0,
            value,
            gas_limit: 0,
            gas_fee_cap: TokenAmount::default(),
            gas_premium: TokenAmount::default(),
            method: METHOD_SEND,
            params: Vec::new(),
        }
    }

    /// Sends FIL from the wallet's default address.
    pub fn fund(&self, to: &Address, amount: TokenAmount) -> Result<SignedMessage, ChainError> {
        let msg = Self::plain_message(self.wallet_default_address(), *to, amount);
        self.mpool_push_message(msg, None)
    }

    /// Pushes the message by which a client of the wallet turns DataCap into an allocation. Its
    /// receipt's return value names the allocation.
    pub fn order_allocation(
        &self,
        client: &Address,
        order: &AllocationOrder,
    ) -> Result<SignedMessage, ChainError> {
        let provider = self.state_lookup_id(&order.provider, &TipSetKey::HEAD)?;
        let provider = provider
            .id()
            .map_err(|_| ChainError::NoActor(order.provider))?;
        let requests = AllocationRequests {
            allocations: vec![AllocationRequest {
                provider,
                data: order.piece,
                size: PaddedPieceSize(order.size),
                term_min: order.term_min,
                term_max: order.term_max,
                expiration: self.next_epoch().0 + order.claim_within,
            }],
            extensions: Vec::new(),
        };
        let params = TransferParams {
            to: actors::VERIFREG.address(),
            amount: TokenAmount::from_atto(BigInt::from(order.size) * UNITS_PER_BYTE),
            operator_data: RawBytes::new(encode(&requests)),
        };
        let mut msg =
            Self::plain_message(*client, actors::DATACAP.address(), TokenAmount::default());
        msg.method = TRANSFER;
        msg.params = encode(&params);
        self.mpool_push_message(msg, None)
    }
}
