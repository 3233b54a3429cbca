//! The storage market actor: methods and parameters.

use lotus_types::{Address, TokenAmount};
use serde::{Deserialize, Serialize};

pub use fil_actor_market_state::v18::{
    AddBalanceParams, ClientDealProposal, DealProposal, DealState, GetBalanceReturn, Label,
    PublishStorageDealsParams, PublishStorageDealsReturn, WithdrawBalanceParams,
    WithdrawBalanceReturn, is_piece_cid,
};

/// A provider's terms for deals. It is no actor's: clients check the signature of the worker's key
/// over its CBOR, a map with keys sorted by length and then by bytes.
/// Source: Boost, storagemarket/types/legacytypes/types.go, StorageAsk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct StorageAsk {
    /// Whose.
    pub miner: Address,
    /// attoFIL per GiB and epoch.
    pub price: TokenAmount,
    /// Raised with every change.
    pub seq_no: u64,
    /// Epoch until which it holds.
    pub expiry: i64,
    /// Epoch from which it holds.
    pub timestamp: i64,
    /// Padded bytes.
    pub max_piece_size: u64,
    /// Padded bytes.
    pub min_piece_size: u64,
    /// attoFIL per GiB and epoch of verified data.
    pub verified_price: TokenAmount,
}

/// Adds the message's value to someone's escrow.
pub const ADD_BALANCE: u64 = 2;
/// Takes unlocked escrow out.
pub const WITHDRAW_BALANCE: u64 = 3;
/// Puts signed deals on chain.
pub const PUBLISH_STORAGE_DEALS: u64 = 4;
/// Called by a miner whose sector now holds a deal's piece.
pub const SECTOR_CONTENT_CHANGED: u64 = crate::miner::SECTOR_CONTENT_CHANGED;
