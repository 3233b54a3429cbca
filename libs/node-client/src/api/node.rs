use std::collections::BTreeMap;
use std::time::Duration;

use cid::Cid;
use lotus_types::{Address, Epoch, EpochDelta, SectorNumber, TokenAmount};
use serde::{Deserialize, Serialize};

use super::BigInt;
use crate::json::plain;

/// Who a node is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Name and version, such as `lotus-1.34.1+debug`.
    #[serde(rename = "Version")]
    pub version: String,
    /// API version, one byte each for major, minor and patch.
    #[serde(rename = "APIVersion")]
    pub api_version: u32,
    /// Seconds per epoch, rounded; see [`NetworkParams::block_delay`].
    #[serde(rename = "BlockDelay")]
    pub block_delay: u64,
    /// The same as `version` in newer nodes.
    #[serde(rename = "Agent", default)]
    pub agent: String,
}

/// Constants of the network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct NetworkParams {
    /// The network's name; part of no signature.
    pub network_name: String,
    /// Seconds per epoch, rounded up.
    pub block_delay_secs: u64,
    /// Milliseconds per epoch. Only the devnet says it, whose epochs may be below a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_delay_millis: Option<u64>,
    /// Least power that takes part in elections.
    #[serde(with = "crate::json")]
    pub consensus_miner_min_power: BigInt,
    /// Epochs from a pre-commit to its seed.
    pub pre_commit_challenge_delay: EpochDelta,
    /// Upgrade heights by name.
    #[serde(default)]
    pub fork_upgrade_params: serde_json::Value,
    /// EIP-155 chain id.
    #[serde(rename = "Eip155ChainID", default)]
    pub eip155_chain_id: i64,
    /// Unix time of genesis, in seconds.
    #[serde(default)]
    pub genesis_timestamp: u64,
}

impl NetworkParams {
    /// Length of an epoch.
    #[must_use]
    pub fn block_delay(&self) -> Duration {
        let whole = Duration::from_secs(self.block_delay_secs);
        self.block_delay_millis.map_or(whole, Duration::from_millis)
    }
}

/// An actor's entry in the state tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Actor {
    /// What kind of actor it is.
    #[serde(with = "crate::json")]
    pub code: Cid,
    /// Root of its state.
    #[serde(with = "crate::json")]
    pub head: Cid,
    /// Next nonce that the chain accepts, pending messages not counted.
    pub nonce: u64,
    /// attoFIL.
    #[serde(with = "crate::json")]
    pub balance: TokenAmount,
    /// The `f4` or key address, where there is one.
    #[serde(with = "crate::json::maybe_address", default)]
    pub delegated_address: Option<Address>,
}

/// DataCap that a client has set aside for a piece at a provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Allocation {
    /// Actor id of the client.
    pub client: u64,
    /// Actor id of the provider.
    pub provider: u64,
    /// The piece.
    #[serde(with = "crate::json")]
    pub data: Cid,
    /// Padded bytes.
    pub size: u64,
    /// Least epochs that a sector must keep it.
    pub term_min: EpochDelta,
    /// Most epochs for which it counts.
    pub term_max: EpochDelta,
    /// Epoch by which a sector must claim it.
    pub expiration: Epoch,
}

/// Verified data that a sector holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct VerifiedClaim {
    /// Actor id of the provider.
    pub provider: u64,
    /// Actor id of the client.
    pub client: u64,
    /// The piece.
    #[serde(with = "crate::json")]
    pub data: Cid,
    /// Padded bytes.
    pub size: u64,
    /// Least epochs that a sector must keep it.
    pub term_min: EpochDelta,
    /// Most epochs for which it counts.
    pub term_max: EpochDelta,
    /// Since when it counts.
    pub term_start: Epoch,
    /// The sector.
    pub sector: SectorNumber,
}

/// Funds in the market actor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct MarketBalance {
    /// Everything deposited, attoFIL.
    #[serde(with = "crate::json")]
    pub escrow: TokenAmount,
    /// The part bound to deals, attoFIL.
    #[serde(with = "crate::json")]
    pub locked: TokenAmount,
}

/// A deal of the built-in market.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct MarketDeal {
    /// What the parties agreed.
    pub proposal: DealProposal,
    /// What became of it.
    pub state: DealState,
}

/// What the parties of a deal agreed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DealProposal {
    /// The piece.
    #[serde(rename = "PieceCID", with = "crate::json")]
    pub piece_cid: Cid,
    /// Padded bytes.
    pub piece_size: u64,
    /// Whether it uses DataCap.
    pub verified_deal: bool,
    /// Who pays.
    #[serde(with = "crate::json")]
    pub client: Address,
    /// Who stores.
    #[serde(with = "crate::json")]
    pub provider: Address,
    /// Free text.
    pub label: String,
    /// Epoch by which the sector must be proven.
    pub start_epoch: Epoch,
    /// Epoch at which the deal ends.
    pub end_epoch: Epoch,
    /// attoFIL per epoch.
    #[serde(with = "crate::json")]
    pub storage_price_per_epoch: TokenAmount,
    /// attoFIL at stake.
    #[serde(with = "crate::json")]
    pub provider_collateral: TokenAmount,
    /// attoFIL at stake.
    #[serde(with = "crate::json")]
    pub client_collateral: TokenAmount,
}

/// What became of a deal; -1 where something has not happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DealState {
    /// The sector that holds it.
    #[serde(default)]
    pub sector_number: u64,
    /// When the sector was proven.
    pub sector_start_epoch: Epoch,
    /// When payment was last settled.
    pub last_updated_epoch: Epoch,
    /// When it was slashed.
    pub slash_epoch: Epoch,
}

/// What a provider may put at stake in a deal, attoFIL.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DealCollateralBounds {
    /// Least.
    #[serde(with = "crate::json")]
    pub min: TokenAmount,
    /// Most.
    #[serde(with = "crate::json")]
    pub max: TokenAmount,
}

plain!(
    Version,
    NetworkParams,
    Actor,
    Allocation,
    BTreeMap<u64, Allocation>,
    VerifiedClaim,
    BTreeMap<u64, VerifiedClaim>,
    MarketBalance,
    MarketDeal,
    DealProposal,
    DealState,
    DealCollateralBounds,
);
