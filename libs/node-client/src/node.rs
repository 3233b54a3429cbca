use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use cid::Cid;
use futures::stream::BoxStream;
use lotus_types::{Address, Epoch, EpochDelta, SectorNumber, TokenAmount};

use crate::api::{
    Actor, Allocation, BeaconEntry, BigInt, BitField, BlockMessages, BlockMsg, BlockTemplate,
    Deadline, DeadlineInfo, DealCollateralBounds, HeadChange, InvocResult, MarketBalance,
    MarketDeal, Message, MessageSendSpec, MinerInfo, MinerPower, MiningBaseInfo, MsgLookup,
    NetworkParams, Partition, SectorExpiration, SectorLocation, SectorOnChainInfo,
    SectorPreCommitInfo, SectorPreCommitOnChainInfo, Signature, SignedMessage, TipSet, TipSetKey,
    VerifiedClaim, Version,
};
use crate::{Client, NodeError};

/// A full node, shared.
pub type Node = Arc<dyn FullNode>;

/// Changes of the head as they come. The first item holds one change of kind `Current`. The
/// stream ends after an error; subscribe again, and close the gap with `chain_get_path`.
pub type HeadChanges = BoxStream<'static, Result<Vec<HeadChange>, NodeError>>;

/// Declares each call once: its name, parameters, result, and the name on the wire; after `by` the
/// method of [`Client`] that makes it, where it is not simply a call of the node.
macro_rules! full_node {
    (@call $self:ident $rpc:literal [$($arg:ident)*]) => {
        $self.call($rpc, vec![$($self.param($rpc, &$arg)?),*]).await
    };
    (@call $self:ident $rpc:literal [$($arg:ident)*] $own:ident) => {
        $self.$own($($arg),*).await
    };
    ($(
        $(#[$doc:meta])*
        $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty = $rpc:literal $(by $own:ident)?;
    )*) => {
        /// The calls of a full node that this product uses, after Lotus' API version 1. An empty
        /// [`TipSetKey`] means the head. Every method has a default that says "no such method",
        /// so that a fake in a test implements only what it needs.
        #[async_trait]
        pub trait FullNode: Send + Sync {
            /// Follows the head.
            async fn chain_notify(&self) -> Result<HeadChanges, NodeError> {
                Err(NodeError::no_method("ChainNotify"))
            }

            $(
                $(#[$doc])*
                async fn $name(&self, $($arg: $ty),*) -> Result<$ret, NodeError> {
                    $(let _ = $arg;)*
                    Err(NodeError::no_method($rpc))
                }
            )*
        }

        #[async_trait]
        impl FullNode for Client {
            async fn chain_notify(&self) -> Result<HeadChanges, NodeError> {
                self.subscribe_heads().await
            }

            $(
                async fn $name(&self, $($arg: $ty),*) -> Result<$ret, NodeError> {
                    full_node!(@call self $rpc [$($arg)*] $($own)?)
                }
            )*
        }
    };
}

full_node! {
    /// Who the node is.
    version() -> Version = "Version";
    /// Permissions of a token.
    auth_verify(token: &str) -> Vec<String> = "AuthVerify";

    /// The head.
    chain_head() -> TipSet = "ChainHead";
    /// The genesis tipset.
    chain_get_genesis() -> TipSet = "ChainGetGenesis";
    /// A tipset by its key.
    chain_get_tipset(key: &TipSetKey) -> TipSet = "ChainGetTipSet";
    /// The tipset at a height on the chain of `key`; before a null round, the one below it.
    chain_get_tipset_by_height(at: Epoch, key: &TipSetKey) -> TipSet = "ChainGetTipSetByHeight";
    /// The first tipset at or after a height on the chain of `key`.
    chain_get_tipset_after_height(at: Epoch, key: &TipSetKey) -> TipSet
        = "ChainGetTipSetAfterHeight";
    /// The reverts, then the applies, that lead from one head to another.
    chain_get_path(from: &TipSetKey, to: &TipSetKey) -> Vec<HeadChange> = "ChainGetPath";
    /// The messages of a block.
    chain_get_block_messages(block: Cid) -> BlockMessages = "ChainGetBlockMessages";
    /// A message by its CID.
    chain_get_message(cid: Cid) -> Message = "ChainGetMessage";
    /// A raw block of chain data.
    chain_read_obj(cid: Cid) -> Vec<u8> = "ChainReadObj";
    /// Whether the node has a block of chain data.
    chain_has_obj(cid: Cid) -> bool = "ChainHasObj";

    /// Beacon randomness for an epoch: domain separation tag, epoch, entropy.
    state_get_randomness_from_beacon(dst: i64, at: Epoch, entropy: &[u8], key: &TipSetKey)
        -> [u8; 32] = "StateGetRandomnessFromBeacon";
    /// Ticket-chain randomness for an epoch: domain separation tag, epoch, entropy.
    state_get_randomness_from_tickets(dst: i64, at: Epoch, entropy: &[u8], key: &TipSetKey)
        -> [u8; 32] = "StateGetRandomnessFromTickets";
    /// The beacon entry of an epoch; waits for one that is about to come.
    state_get_beacon_entry(at: Epoch) -> BeaconEntry = "StateGetBeaconEntry";

    /// A miner's standing data.
    state_miner_info(miner: Address, key: &TipSetKey) -> MinerInfo = "StateMinerInfo";
    /// The miner's current deadline and the network's PoSt timing.
    state_miner_proving_deadline(miner: Address, key: &TipSetKey) -> DeadlineInfo
        = "StateMinerProvingDeadline";
    /// Every deadline of a proving period, in order.
    state_miner_deadlines(miner: Address, key: &TipSetKey) -> Vec<Deadline>
        = "StateMinerDeadlines";
    /// The partitions of a deadline, in order.
    state_miner_partitions(miner: Address, deadline: u64, key: &TipSetKey) -> Vec<Partition>
        = "StateMinerPartitions";
    /// Sectors by number; `None` for all.
    state_miner_sectors(miner: Address, numbers: Option<&BitField>, key: &TipSetKey)
        -> Vec<SectorOnChainInfo> = "StateMinerSectors";
    /// Sectors with power.
    state_miner_active_sectors(miner: Address, key: &TipSetKey) -> Vec<SectorOnChainInfo>
        = "StateMinerActiveSectors";
    /// The miner's power and the network's.
    state_miner_power(miner: Address, key: &TipSetKey) -> MinerPower = "StateMinerPower";
    /// Numbers of the faulty sectors.
    state_miner_faults(miner: Address, key: &TipSetKey) -> BitField = "StateMinerFaults";
    /// Numbers of the sectors declared as recovered.
    state_miner_recoveries(miner: Address, key: &TipSetKey) -> BitField = "StateMinerRecoveries";
    /// What the miner actor may spend, attoFIL.
    state_miner_available_balance(miner: Address, key: &TipSetKey) -> TokenAmount
        = "StateMinerAvailableBalance";
    /// Sector numbers that were ever used.
    state_miner_allocated(miner: Address, key: &TipSetKey) -> BitField = "StateMinerAllocated";
    /// Whether a sector number was ever used.
    state_miner_sector_allocated(miner: Address, sector: SectorNumber, key: &TipSetKey) -> bool
        = "StateMinerSectorAllocated";
    /// A proven sector.
    state_sector_get_info(miner: Address, sector: SectorNumber, key: &TipSetKey)
        -> Option<SectorOnChainInfo> = "StateSectorGetInfo";
    /// A pre-committed sector.
    state_sector_precommit_info(miner: Address, sector: SectorNumber, key: &TipSetKey)
        -> Option<SectorPreCommitOnChainInfo> = "StateSectorPreCommitInfo";
    /// Where a sector is proven.
    state_sector_partition(miner: Address, sector: SectorNumber, key: &TipSetKey)
        -> SectorLocation = "StateSectorPartition";
    /// When a sector leaves.
    state_sector_expiration(miner: Address, sector: SectorNumber, key: &TipSetKey)
        -> SectorExpiration = "StateSectorExpiration";
    /// Deposit that a pre-commit needs, attoFIL.
    state_miner_pre_commit_deposit_for_power(
        miner: Address, info: &SectorPreCommitInfo, key: &TipSetKey,
    ) -> TokenAmount = "StateMinerPreCommitDepositForPower";
    /// Pledge that a sector needs, attoFIL: its duration, its size and its verified bytes.
    state_miner_initial_pledge_for_sector(
        duration: EpochDelta, size: u64, verified: u64, key: &TipSetKey,
    ) -> TokenAmount = "StateMinerInitialPledgeForSector";
    /// Every miner actor.
    state_list_miners(key: &TipSetKey) -> Vec<Address> = "StateListMiners";

    /// The network version at a tipset.
    state_network_version(key: &TipSetKey) -> u32 = "StateNetworkVersion";
    /// The network's name.
    state_network_name() -> String = "StateNetworkName";
    /// The network's constants.
    state_get_network_params() -> NetworkParams = "StateGetNetworkParams";
    /// An actor's entry in the state tree.
    state_get_actor(addr: Address, key: &TipSetKey) -> Option<Actor> = "StateGetActor";
    /// The ID address of an address.
    state_lookup_id(addr: Address, key: &TipSetKey) -> Address = "StateLookupID";
    /// The key address of an account.
    state_account_key(addr: Address, key: &TipSetKey) -> Address = "StateAccountKey";
    /// Executes a message on top of a tipset without putting it on chain.
    state_call(msg: &Message, key: &TipSetKey) -> InvocResult = "StateCall";

    /// Next nonce of a sender, its pending messages counted.
    mpool_get_nonce(addr: Address) -> u64 = "MpoolGetNonce";
    /// Publishes a signed message. Pushing the same message again is harmless.
    mpool_push(msg: &SignedMessage) -> Cid = "MpoolPush";
    /// Messages that wait for a block on top of a tipset.
    mpool_pending(key: &TipSetKey) -> Vec<SignedMessage> = "MpoolPending";
    /// Messages that a block on top of a tipset should hold; the quality is that of the ticket,
    /// from 0 to 1.
    mpool_select(key: &TipSetKey, quality: f64) -> Vec<SignedMessage> = "MpoolSelect";

    /// Addresses whose keys the node holds, or the remote wallet if there is one.
    wallet_list() -> Vec<Address> = "WalletList" by keys;
    /// The node's own default sender.
    wallet_default_address() -> Address = "WalletDefaultAddress";
    /// Whether the node holds an address' key, or the remote wallet if there is one.
    wallet_has(addr: Address) -> bool = "WalletHas" by has_key;
    /// Balance of any account, attoFIL.
    wallet_balance(addr: Address) -> TokenAmount = "WalletBalance";
    /// Signs bytes as they are, in the node or in the remote wallet.
    wallet_sign(addr: Address, data: &[u8]) -> Signature = "WalletSign" by sign;
    /// Signs a message, in the node or in the remote wallet.
    wallet_sign_message(addr: Address, msg: &Message) -> SignedMessage
        = "WalletSignMessage" by sign_message;

    /// Waits until a message has landed and has `confidence` epochs on top, for as long as
    /// `[node] wait_secs` allows. `lookback` is how far to search first, -1 without limit.
    state_wait_msg(cid: Cid, confidence: u64, lookback: EpochDelta, allow_replaced: bool)
        -> MsgLookup = "StateWaitMsg";
    /// Searches for a landed message.
    state_search_msg(key: &TipSetKey, cid: Cid, lookback: EpochDelta, allow_replaced: bool)
        -> Option<MsgLookup> = "StateSearchMsg";
    /// Fills in gas limit, premium and fee cap where they are zero.
    gas_estimate_message_gas(msg: &Message, spec: Option<&MessageSendSpec>, key: &TipSetKey)
        -> Message = "GasEstimateMessageGas";
    /// Fee cap with which a message lands within so many blocks.
    gas_estimate_fee_cap(msg: &Message, max_queue_blocks: i64, key: &TipSetKey) -> TokenAmount
        = "GasEstimateFeeCap";
    /// Premium with which a message lands within so many blocks.
    gas_estimate_gas_premium(blocks: u64, sender: Address, gas_limit: i64, key: &TipSetKey)
        -> TokenAmount = "GasEstimateGasPremium";

    /// What a miner needs for the election of an epoch on top of a tipset; `None` if it may not
    /// take part.
    miner_get_base_info(miner: Address, at: Epoch, key: &TipSetKey) -> Option<MiningBaseInfo>
        = "MinerGetBaseInfo";
    /// Assembles and signs a block.
    miner_create_block(template: &BlockTemplate) -> BlockMsg = "MinerCreateBlock";
    /// Publishes a block. Submitting the same block again is harmless.
    sync_submit_block(block: &BlockMsg) -> () = "SyncSubmitBlock";

    /// Funds of an address in the market actor.
    state_market_balance(addr: Address, key: &TipSetKey) -> MarketBalance = "StateMarketBalance";
    /// A deal of the built-in market.
    state_market_storage_deal(deal: u64, key: &TipSetKey) -> MarketDeal
        = "StateMarketStorageDeal";
    /// What a provider may put at stake in a deal of so many padded bytes.
    state_deal_provider_collateral_bounds(size: u64, verified: bool, key: &TipSetKey)
        -> DealCollateralBounds = "StateDealProviderCollateralBounds";
    /// An allocation of a client.
    state_get_allocation(client: Address, allocation: u64, key: &TipSetKey)
        -> Option<Allocation> = "StateGetAllocation";
    /// Every allocation of a client, by id.
    state_get_allocations(client: Address, key: &TipSetKey) -> BTreeMap<u64, Allocation>
        = "StateGetAllocations";
    /// Every claim of a provider, by id.
    state_get_claims(provider: Address, key: &TipSetKey) -> BTreeMap<u64, VerifiedClaim>
        = "StateGetClaims";
    /// DataCap of a client, bytes.
    state_verified_client_status(client: Address, key: &TipSetKey) -> Option<BigInt>
        = "StateVerifiedClientStatus";
}
