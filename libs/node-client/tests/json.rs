//! The JSON and CBOR forms against what Lotus writes.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use fvm_ipld_bitfield::BitField;
use lotus_node_client::api::{
    Allocation, BlockMsg, DeadlineInfo, HeadChange, InvocResult, Message, MinerInfo, MinerPower,
    MiningBaseInfo, MsgLookup, NetworkParams, Partition, SectorOnChainInfo,
    SectorPreCommitOnChainInfo, SignedMessage, TipSet, TipSetKey, Version,
};
use lotus_types::{Address, Epoch, EpochDelta, TokenAmount};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// A tipset of a test network (the file comes from the first blocks of a public snapshot).
fn tipset() -> Value {
    serde_json::from_str(include_str!("data/tipset.json")).unwrap()
}

/// Reads the form and writes the same again.
fn same<T: DeserializeOwned + Serialize>(v: Value) -> T {
    let t: T = serde_json::from_value(v.clone()).unwrap();
    assert_eq!(serde_json::to_value(&t).unwrap(), v);
    t
}

fn cid(c: &str) -> Value {
    json!({ "/": c })
}

const SEALED: &str = "bagboea4b5abcbkmrc4wn6p4t5bd7lyfyhkzdsttbm5dnkeoka6yjcuz7vczjlzmo";
const BLOCK: &str = "bafy2bzacedjrqan2fwfvhfopi64yickki7miiksecglpeiavf7xueytnzevlu";

#[test]
fn a_real_header_keeps_its_cid() {
    let t: TipSet = same(tipset());
    assert_eq!(t.height, Epoch(3));
    assert_eq!(t.blocks[0].cid(), t.cids[0]);
    assert_eq!(t.cids[0].to_string(), BLOCK);
    assert_eq!(TipSet::new(t.blocks.clone()).unwrap(), t);
    assert_ne!(t.blocks[0].signing_bytes(), t.blocks[0].to_cbor());
    let change: HeadChange = same(json!({ "Type": "apply", "Val": tipset() }));
    assert_eq!(change.val.key(), TipSetKey(t.cids.clone()));
    let _: BlockMsg = same(json!({
        "Header": tipset()["Blocks"][0], "BlsMessages": [cid(BLOCK)], "SecpkMessages": []
    }));
}

#[test]
fn a_tipset_that_is_none_is_refused() {
    for change in [
        |t: &mut Value| t["Cids"] = json!([]),
        |t: &mut Value| t["Blocks"] = json!([]),
        |t: &mut Value| t["Height"] = json!(4),
        |t: &mut Value| t["Blocks"][0]["Miner"] = json!("t1nonsense"),
    ] {
        let mut t = tipset();
        change(&mut t);
        assert!(serde_json::from_value::<TipSet>(t).is_err());
    }
}

#[test]
fn messages() {
    // Gas limits above 2^53 show that no float is on the way.
    let msg = json!({
        "Version": 0, "To": "t01000", "From": "t0100", "Nonce": 7, "Value": "1000",
        "GasLimit": 9007199254740993u64, "GasFeeCap": "101", "GasPremium": "99",
        "Method": 5, "Params": "gUA="
    });
    let m: Message = serde_json::from_value(msg.clone()).unwrap();
    assert_eq!(m.gas_limit, 9_007_199_254_740_993);
    let mut with_cid = msg;
    with_cid["CID"] = cid(&m.cid().to_string());
    assert_eq!(serde_json::to_value(&m).unwrap(), with_cid);
    assert_eq!(Message::from_cbor(&m.to_cbor()).unwrap(), m);
    assert_eq!(
        m.max_fee(),
        TokenAmount::from_atto(101u64) * 9_007_199_254_740_993u64
    );
    // As Lotus' tools may send it: absent fields are zero.
    let short: Message = serde_json::from_value(json!({"To": "f01", "From": "f02"})).unwrap();
    assert_eq!(short.value, TokenAmount::default());
    assert!(short.params.is_empty());

    for (kind, by_message) in [(1, false), (2, true)] {
        let s: SignedMessage = serde_json::from_value(
            json!({"Message": with_cid, "Signature": {"Type": kind, "Data": "AQID"}}),
        )
        .unwrap();
        assert_eq!(s.cid() == m.cid(), by_message);
        assert_eq!(SignedMessage::from_cbor(&s.to_cbor()).unwrap(), s);
        let json = serde_json::to_value(&s).unwrap();
        assert_eq!(json["CID"], cid(&s.cid().to_string()));
    }
    // The network's tuple: version, to, from, nonce, value, limit, cap, premium, method, params.
    let bytes = short.to_cbor();
    assert_eq!(hex(&bytes), "8a0042000142000200400040400040");
}

fn hex(b: &[u8]) -> String {
    b.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn lookups_and_calls() {
    let l: MsgLookup = same(json!({
        "Message": cid(BLOCK),
        "Receipt": {"ExitCode": 16, "Return": "", "GasUsed": 1234, "EventsRoot": null},
        "ReturnDec": null, "TipSet": [cid(BLOCK)], "Height": 12
    }));
    assert_eq!(l.receipt.exit_code, 16);
    // Lotus writes a nil return value as null.
    let r: MsgLookup = serde_json::from_value(json!({
        "Message": cid(BLOCK), "Receipt": {"ExitCode": 0, "Return": null, "GasUsed": 1},
        "ReturnDec": {"any": "thing"}, "TipSet": [cid(BLOCK)], "Height": 12
    }))
    .unwrap();
    assert!(r.receipt.r#return.is_empty());
    let i: InvocResult = serde_json::from_value(json!({
        "MsgCid": cid(BLOCK), "Msg": {"To": "t01", "From": "t02"}, "MsgRct": null,
        "GasCost": {"Message": null, "GasUsed": "0"}, "ExecutionTrace": {"Subcalls": []},
        "Error": "message application failed", "Duration": 7
    }))
    .unwrap();
    assert!(i.msg_rct.is_none() && i.duration == 7);
}

#[test]
fn miner_state() {
    let d: DeadlineInfo = same(json!({
        "CurrentEpoch": 70, "PeriodStart": 0, "Index": 1, "Open": 60, "Close": 120,
        "Challenge": 40, "FaultCutoff": -10, "WPoStPeriodDeadlines": 48,
        "WPoStProvingPeriod": 2880, "WPoStChallengeWindow": 60, "WPoStChallengeLookback": 20,
        "FaultDeclarationCutoff": 70
    }));
    assert!(d.is_open() && d.last() == Epoch(119) && d.next_period_start() == Epoch(2880));
    assert_eq!(d.fault_declaration_cutoff, EpochDelta(70));

    let info = json!({
        "Owner": "t0100", "Worker": "t0101", "NewWorker": "<empty>", "ControlAddresses": null,
        "WorkerChangeEpoch": -1, "PeerId": null, "Multiaddrs": ["BH8AAAE="],
        "WindowPoStProofType": 5, "SectorSize": 2048, "WindowPoStPartitionSectors": 2,
        "ConsensusFaultElapsed": -1, "PendingOwnerAddress": null, "Beneficiary": "t0100",
        "BeneficiaryTerm": {"Quota": "0", "UsedQuota": "0", "Expiration": 0},
        "PendingBeneficiaryTerm": null
    });
    let info: MinerInfo = serde_json::from_value(info).unwrap();
    assert_eq!(info.new_worker, None);
    assert_eq!(info.beneficiary, Some(Address::new_id(100)));
    assert_eq!(info.multiaddrs, [[4, 127, 0, 0, 1]]);
    same::<MinerInfo>(serde_json::to_value(&info).unwrap());

    let p: Partition = same(json!({
        "AllSectors": [0, 3], "FaultySectors": [1, 1], "RecoveringSectors": [0],
        "LiveSectors": [0, 3], "ActiveSectors": [0, 1, 1, 1]
    }));
    assert_eq!(p.active_sectors, BitField::try_from_bits([0, 2]).unwrap());

    let s: SectorOnChainInfo = same(json!({
        "SectorNumber": 3, "SealProof": 6, "SealedCID": cid(SEALED), "Activation": 10,
        "Expiration": 20, "DealWeight": "0", "VerifiedDealWeight": "1", "InitialPledge": "7",
        "ExpectedDayReward": null, "ExpectedStoragePledge": null, "PowerBaseEpoch": 10,
        "ReplacedDayReward": null, "SectorKeyCID": null, "Flags": 1, "DailyFee": "0"
    }));
    assert_eq!(s.sector_number.0, 3);
    let _: SectorPreCommitOnChainInfo = same(json!({
        "Info": {
            "SealProof": 6, "SectorNumber": 3, "SealedCID": cid(SEALED), "SealRandEpoch": -800,
            "DealIDs": [], "Expiration": 20, "UnsealedCid": null
        },
        "PreCommitDeposit": "5", "PreCommitEpoch": 9
    }));
    let _: MinerPower = same(json!({
        "MinerPower": {"RawBytePower": "2048", "QualityAdjPower": "2048"},
        "TotalPower": {"RawBytePower": "4096", "QualityAdjPower": "4096"}, "HasMinPower": true
    }));
    let _: MiningBaseInfo = same(json!({
        "MinerPower": "1", "NetworkPower": "2",
        "Sectors": [{"SealProof": 6, "SectorNumber": 1, "SectorKey": null,
                     "SealedCID": cid(SEALED)}],
        "WorkerKey": "t0101", "SectorSize": 2048,
        "PrevBeaconEntry": {"Round": 1, "Data": "AQ=="},
        "BeaconEntries": [{"Round": 2, "Data": "Ag=="}], "EligibleForMining": true
    }));
}

#[test]
fn the_node_itself() {
    let p: NetworkParams = serde_json::from_value(json!({
        "NetworkName": "2k", "BlockDelaySecs": 4, "ConsensusMinerMinPower": "2048",
        "SupportedProofTypes": [5], "PreCommitChallengeDelay": 10,
        "ForkUpgradeParams": {"UpgradeSmokeHeight": -1}, "Eip155ChainID": 31415926,
        "GenesisTimestamp": 1
    }))
    .unwrap();
    assert_eq!(p.block_delay().as_millis(), 4000);
    let fast = NetworkParams {
        block_delay_secs: 1,
        block_delay_millis: Some(50),
        ..p
    };
    let back: NetworkParams = same(serde_json::to_value(&fast).unwrap());
    assert_eq!(back.block_delay().as_millis(), 50);
    let _: Version = same(json!({
        "Version": "lotus-1.34.1", "APIVersion": 131840, "BlockDelay": 4, "Agent": "lotus"
    }));
    let _: Allocation = same(json!({
        "Client": 1002, "Provider": 1000,
        "Data": cid("baga6ea4seaqdomn3tgwgrh3g532zopskstnbrd2n3sxfqbze7rxt7vqn7veigmy"),
        "Size": 128, "TermMin": 518400, "TermMax": 5256000, "Expiration": 90000
    }));
}
