//! The storage market actor: methods and parameters.

pub use fil_actor_market_state::v18::{
    AddBalanceParams, ClientDealProposal, DealProposal, DealState, GetBalanceReturn, Label,
    PublishStorageDealsParams, PublishStorageDealsReturn, WithdrawBalanceParams,
    WithdrawBalanceReturn, is_piece_cid,
};

/// Adds the message's value to someone's escrow.
pub const ADD_BALANCE: u64 = 2;
/// Takes unlocked escrow out.
pub const WITHDRAW_BALANCE: u64 = 3;
/// Puts signed deals on chain.
pub const PUBLISH_STORAGE_DEALS: u64 = 4;
/// Called by a miner whose sector now holds a deal's piece.
pub const SECTOR_CONTENT_CHANGED: u64 = crate::miner::SECTOR_CONTENT_CHANGED;
