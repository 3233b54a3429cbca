//! The table of methods: permission, name, arguments, and what each asks of the chain.
//! Permissions are those of lotus, api/api_full.go.

use std::time::Duration;

use cid::Cid;
use lotus_node_client::api::{
    BitField, BlockMsg, BlockTemplate, Message, MessageSendSpec, SectorPreCommitInfo,
    SignatureType, SignedMessage, TipSetKey,
};
use lotus_node_client::json::Lotus;
use lotus_tokens::Perm;
use lotus_types::{Address, Epoch, EpochDelta, SectorNumber, TokenAmount};
use serde_json::{Value, json};

use super::Context;
use super::call::{Args, RpcError, to_json};
use crate::AllocationOrder;

macro_rules! methods {
    ($cx:ident: $($perm:ident $name:literal ($($arg:ident: $ty:ty),* $(,)?) => $body:expr;)*) => {
        /// The permission that a method needs; `None` if there is no such method.
        pub(super) fn permission(name: &str) -> Option<Perm> {
            match name {
                $($name => Some(Perm::$perm),)*
                "ChainNotify" | "StateWaitMsg" => Some(Perm::Read),
                _ => None,
            }
        }

        /// Calls any method but those that wait.
        pub(super) fn call(
            $cx: &Context,
            name: &str,
            params: Vec<Value>,
        ) -> Result<Value, RpcError> {
            match name {
                $($name => {
                    const WANT: usize = <[&str]>::len(&[$(stringify!($arg)),*]);
                    let mut args = Args::new(name, params, WANT)?;
                    $(let $arg: $ty = args.next()?;)*
                    // A method without arguments takes none.
                    let _ = &mut args;
                    to_json(&$body)
                })*
                _ => Err(RpcError::no_method(name)),
            }
        }
    };
}

methods! { cx:
    Read "Version"() => cx.chain.version();
    Read "AuthVerify"(token: String) => {
        let perms = cx.tokens.verify(&token);
        let perms = perms.ok_or_else(|| RpcError::failed("JWT Verification failed"))?;
        perms.iter().map(|p| p.name().to_owned()).collect::<Vec<_>>()
    };
    Admin "AuthNew"(perms: Vec<String>) => {
        let perms: Result<Vec<Perm>, _> = perms.iter().map(|p| perm(p)).collect();
        cx.tokens.issue(&perms?).into_bytes()
    };

    Read "ChainHead"() => (*cx.chain.head()).clone();
    Read "ChainGetGenesis"() => (*cx.chain.genesis()).clone();
    Read "ChainGetTipSet"(key: TipSetKey) => (*cx.chain.chain_get_tipset(&key)?).clone();
    Read "ChainGetTipSetByHeight"(at: Epoch, key: TipSetKey) =>
        (*cx.chain.chain_get_tipset_by_height(at, &key)?).clone();
    Read "ChainGetTipSetAfterHeight"(at: Epoch, key: TipSetKey) =>
        (*cx.chain.chain_get_tipset_after_height(at, &key)?).clone();
    Read "ChainGetPath"(from: TipSetKey, to: TipSetKey) => cx.chain.chain_get_path(&from, &to)?;
    Read "ChainGetBlock"(block: Cid) => cx.chain.chain_get_block(&block)?;
    Read "ChainGetBlockMessages"(block: Cid) => {
        let (bls, secp, cids) = cx.chain.chain_get_block_messages(&block)?;
        json!({
            "BlsMessages": bls, "SecpkMessages": secp, "Cids": to_json(&cids)?
        })
    };
    Read "ChainGetMessage"(msg: Cid) => cx.chain.chain_get_message(&msg)?;
    Read "ChainReadObj"(obj: Cid) => cx.chain.chain_read_obj(&obj)?;
    Read "ChainHasObj"(obj: Cid) => cx.chain.chain_has_obj(&obj);

    Read "StateGetRandomnessFromTickets"(
        dst: i64, at: Epoch, entropy: Vec<u8>, key: TipSetKey
    ) => cx.chain.state_get_randomness_from_tickets(dst, at, &entropy, &key)?;
    Read "StateGetRandomnessFromBeacon"(
        dst: i64, at: Epoch, entropy: Vec<u8>, key: TipSetKey
    ) => cx.chain.state_get_randomness_from_beacon(dst, at, &entropy, &key)?;
    Read "StateGetRandomnessDigestFromTickets"(at: Epoch, key: TipSetKey) =>
        cx.chain.state_get_randomness_digest_from_tickets(at, &key)?;
    Read "StateGetRandomnessDigestFromBeacon"(at: Epoch, key: TipSetKey) =>
        cx.chain.state_get_randomness_digest_from_beacon(at, &key)?;
    Read "StateGetBeaconEntry"(at: Epoch) => cx.chain.state_get_beacon_entry(at)?;

    Read "StateMinerInfo"(m: Address, key: TipSetKey) => cx.chain.state_miner_info(&m, &key)?;
    Read "StateMinerProvingDeadline"(m: Address, key: TipSetKey) =>
        cx.chain.state_miner_proving_deadline(&m, &key)?;
    Read "StateMinerDeadlines"(m: Address, key: TipSetKey) =>
        cx.chain.state_miner_deadlines(&m, &key)?;
    Read "StateMinerPartitions"(m: Address, deadline: u64, key: TipSetKey) =>
        cx.chain.state_miner_partitions(&m, deadline, &key)?;
    Read "StateMinerSectors"(m: Address, numbers: Option<BitField>, key: TipSetKey) =>
        cx.chain.state_miner_sectors(&m, numbers.as_ref(), &key)?;
    Read "StateMinerActiveSectors"(m: Address, key: TipSetKey) =>
        cx.chain.state_miner_active_sectors(&m, &key)?;
    Read "StateMinerPower"(m: Address, key: TipSetKey) => cx.chain.state_miner_power(&m, &key)?;
    Read "StateMinerFaults"(m: Address, key: TipSetKey) => cx.chain.state_miner_faults(&m, &key)?;
    Read "StateMinerRecoveries"(m: Address, key: TipSetKey) =>
        cx.chain.state_miner_recoveries(&m, &key)?;
    Read "StateMinerAvailableBalance"(m: Address, key: TipSetKey) =>
        cx.chain.state_miner_available_balance(&m, &key)?;
    Read "StateMinerAllocated"(m: Address, key: TipSetKey) =>
        cx.chain.state_miner_allocated(&m, &key)?;
    Read "StateMinerSectorAllocated"(m: Address, sector: SectorNumber, key: TipSetKey) =>
        cx.chain.state_miner_sector_allocated(&m, sector, &key)?;
    Read "StateSectorGetInfo"(m: Address, sector: SectorNumber, key: TipSetKey) =>
        cx.chain.state_sector_get_info(&m, sector, &key)?;
    Read "StateSectorPreCommitInfo"(m: Address, sector: SectorNumber, key: TipSetKey) =>
        cx.chain.state_sector_precommit_info(&m, sector, &key)?;
    Read "StateSectorPartition"(m: Address, sector: SectorNumber, key: TipSetKey) =>
        cx.chain.state_sector_partition(&m, sector, &key)?;
    Read "StateSectorExpiration"(m: Address, sector: SectorNumber, key: TipSetKey) =>
        cx.chain.state_sector_expiration(&m, sector, &key)?;
    Read "StateMinerPreCommitDepositForPower"(
        m: Address, info: SectorPreCommitInfo, key: TipSetKey
    ) => cx.chain.state_miner_pre_commit_deposit_for_power(&m, &info, &key)?;
    Read "StateMinerInitialPledgeForSector"(
        duration: EpochDelta, size: u64, verified: u64, key: TipSetKey
    ) => cx.chain.state_miner_initial_pledge_for_sector(duration, size, verified, &key)?;
    Read "StateListMiners"(key: TipSetKey) => cx.chain.state_list_miners(&key)?;

    Read "StateNetworkVersion"(key: TipSetKey) => cx.chain.state_network_version(&key);
    Read "StateNetworkName"() => cx.chain.state_network_name();
    Read "StateGetNetworkParams"() => cx.chain.state_get_network_params();
    Read "StateGetActor"(a: Address, key: TipSetKey) => cx.chain.state_get_actor(&a, &key)?;
    Read "StateLookupID"(a: Address, key: TipSetKey) => cx.chain.state_lookup_id(&a, &key)?;
    Read "StateAccountKey"(a: Address, key: TipSetKey) => cx.chain.state_account_key(&a, &key)?;
    Read "StateCall"(msg: Message, key: TipSetKey) => cx.chain.state_call(&msg, &key)?;
    Read "StateSearchMsg"(key: TipSetKey, msg: Cid, limit: i64, replaced: bool) =>
        cx.chain.state_search_msg(&key, &msg, limit, replaced)?;
    Read "StateMarketBalance"(a: Address, key: TipSetKey) =>
        cx.chain.state_market_balance(&a, &key)?;
    Read "StateMarketStorageDeal"(deal: u64, key: TipSetKey) =>
        cx.chain.state_market_storage_deal(deal, &key)?;
    Read "StateDealProviderCollateralBounds"(size: u64, verified: bool, key: TipSetKey) =>
        cx.chain.state_deal_provider_collateral_bounds(size, verified, &key);
    Read "StateGetAllocation"(client: Address, id: u64, key: TipSetKey) =>
        cx.chain.state_get_allocation(&client, id, &key)?;
    Read "StateGetAllocations"(client: Address, key: TipSetKey) =>
        cx.chain.state_get_allocations(&client, &key)?;
    Read "StateGetClaims"(provider: Address, key: TipSetKey) =>
        cx.chain.state_get_claims(&provider, &key)?;
    Read "StateVerifiedClientStatus"(client: Address, key: TipSetKey) =>
        cx.chain.state_verified_client_status(&client, &key)?;

    Read "MpoolGetNonce"(a: Address) => cx.chain.mpool_get_nonce(&a)?;
    Read "MpoolPending"(key: TipSetKey) => cx.chain.mpool_pending(&key)?;
    Read "MpoolSelect"(key: TipSetKey, quality: f64) => cx.chain.mpool_select(&key, quality)?;
    Write "MpoolPush"(msg: SignedMessage) => cx.chain.mpool_push(msg)?;
    Sign "MpoolPushMessage"(msg: Message, spec: Option<MessageSendSpec>) =>
        cx.chain.mpool_push_message(msg, spec.as_ref())?;
    Read "GasEstimateMessageGas"(msg: Message, spec: Option<MessageSendSpec>, key: TipSetKey) =>
        cx.chain.gas_estimate_message_gas(msg, spec.as_ref(), &key)?;
    Read "GasEstimateFeeCap"(msg: Message, blocks: i64, key: TipSetKey) =>
        cx.chain.gas_estimate_fee_cap(&msg, blocks, &key)?;
    Read "GasEstimateGasPremium"(blocks: u64, from: Address, limit: i64, key: TipSetKey) =>
        cx.chain.gas_estimate_gas_premium(blocks, &from, limit, &key);
    Read "GasEstimateGasLimit"(msg: Message, key: TipSetKey) =>
        cx.chain.gas_estimate_gas_limit(&msg, &key)?;

    Write "WalletNew"(kind: Value) => cx.chain.wallet_new(key_type(&kind)?)?;
    Write "WalletList"() => cx.chain.wallet_list();
    Write "WalletHas"(a: Address) => cx.chain.wallet_has(&a);
    Write "WalletDefaultAddress"() => cx.chain.wallet_default_address();
    Read "WalletBalance"(a: Address) => cx.chain.wallet_balance(&a);
    Sign "WalletSign"(a: Address, data: Vec<u8>) => cx.chain.wallet_sign(&a, &data)?;
    Sign "WalletSignMessage"(a: Address, msg: Message) => cx.chain.wallet_sign_message(&a, msg)?;
    Admin "WalletExport"(a: Address) => {
        let (kind, secret) = cx.chain.wallet_export(&a)?;
        export(kind, &secret)?
    };
    Admin "WalletImport"(key: Value) => {
        let (kind, secret) = exported(&key)?;
        cx.chain.wallet_import(kind, &secret)?
    };

    Read "MinerGetBaseInfo"(m: Address, at: Epoch, key: TipSetKey) =>
        cx.chain.miner_get_base_info(&m, at, &key)?;
    Write "MinerCreateBlock"(template: BlockTemplate) => cx.chain.miner_create_block(&template)?;
    Write "SyncSubmitBlock"(block: BlockMsg) => cx.chain.sync_submit_block(&block)?;

    // What a real node does not have: faults on command and a source of funds.
    Read "Devnet.Miner"() => cx.chain.miner();
    Read "Devnet.Policy"() => serde_json::to_value(cx.chain.policy())
        .map_err(|e| RpcError::failed(e.to_string()))?;
    Admin "Devnet.Reorg"(depth: u64) => (*cx.chain.reorg(depth)?).clone();
    Admin "Devnet.NullRounds"(n: u64) => cx.chain.null_rounds(n);
    Admin "Devnet.RefuseMessages"(n: u64, why: String) =>
        cx.chain.refuse_messages(n, why);
    Admin "Devnet.RaiseBaseFee"(floor: TokenAmount, epochs: u64) =>
        cx.chain.raise_base_fee(floor, epochs);
    Admin "Devnet.StopBlocks"() => cx.chain.stop_blocks();
    Admin "Devnet.ResumeBlocks"() => cx.chain.resume_blocks();
    Admin "Devnet.SetBlockTime"(ms: u64) => cx.chain.set_block_time_ms(ms);
    Admin "Devnet.DropConnections"(down_ms: u64) =>
        cx.gate.drop_connections(Duration::from_millis(down_ms.min(MAX_FAULT_MS)));
    Admin "Devnet.FailCalls"(n: u64) => cx.gate.fail_calls(n);
    Admin "Devnet.Delay"(ms: u64) =>
        cx.gate.set_delay(Duration::from_millis(ms.min(MAX_FAULT_MS)));
    Admin "Devnet.Fund"(to: Address, amount: TokenAmount) => cx.chain.fund(&to, amount)?.cid();
    Admin "Devnet.Allocate"(
        client: Address, provider: Address, piece: Cid, size: u64,
        term_min: i64, term_max: i64, claim_within: i64
    ) => {
        let order = AllocationOrder {
            provider, piece, size, term_min, term_max, claim_within,
        };
        cx.chain.order_allocation(&client, &order)?.cid()
    };
}

/// Longest outage or delay that a command may ask for: an hour.
const MAX_FAULT_MS: u64 = 3_600_000;

/// `StateWaitMsg`, the one method that waits.
pub(super) async fn wait_msg(cx: &Context, params: Vec<Value>) -> Result<Value, RpcError> {
    let mut args = Args::new("StateWaitMsg", params, 4)?;
    let (msg, confidence): (Cid, u64) = (args.next()?, args.next()?);
    let (limit, replaced): (i64, bool) = (args.next()?, args.next()?);
    let found = cx
        .chain
        .state_wait_msg(&msg, confidence, limit, replaced)
        .await?;
    to_json(&found)
}

fn perm(name: &str) -> Result<Perm, RpcError> {
    name.parse()
        .map_err(|e| RpcError::failed(format!("{name:?} is no permission: {e}")))
}

/// A key as Lotus exports it.
pub(super) fn export(kind: SignatureType, secret: &[u8]) -> Result<Value, RpcError> {
    let name = match kind {
        SignatureType::BLS => "bls",
        SignatureType::Secp256k1 => "secp256k1",
    };
    Ok(json!({"Type": name, "PrivateKey": to_json(&secret)?}))
}

/// Reads what [`export`] wrote.
pub(super) fn exported(key: &Value) -> Result<(SignatureType, Vec<u8>), RpcError> {
    let secret: Lotus<Vec<u8>> = serde_json::from_value(key["PrivateKey"].clone())
        .map_err(|e| RpcError::failed(format!("PrivateKey: {e}")))?;
    Ok((key_type(&key["Type"])?, secret.0))
}

/// Lotus takes names (`bls`, `secp256k1`) and numbers.
pub(super) fn key_type(v: &Value) -> Result<SignatureType, RpcError> {
    match (v.as_str(), v.as_u64()) {
        (Some("bls"), _) | (_, Some(2)) => Ok(SignatureType::BLS),
        (Some("secp256k1"), _) | (_, Some(1)) => Ok(SignatureType::Secp256k1),
        _ => Err(RpcError::failed(format!(
            "unknown key type {v}: use bls or secp256k1"
        ))),
    }
}
