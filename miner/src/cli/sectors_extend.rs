//! `sectors extend`: which sectors, until when, with which claims, and at what cost.

use std::collections::{BTreeMap, BTreeSet};

use lotus_actors::encode;
use lotus_actors::miner::{
    EXTEND_SECTOR_EXPIRATION2, ExpirationExtension2, ExtendSectorExpiration2Params, SectorClaim,
    seal_proof_sector_maximum_lifetime,
};
use lotus_node_client::api::{BitField, SectorOnChainInfo, TipSetKey, VerifiedClaim};
use lotus_runtime::Fault;
use lotus_types::{Epoch, EpochDelta, Kind, SectorNumber, TokenAmount};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::order::{Spend, fil, repeated, spend};
use super::{Cx, print, print_json, table};
use crate::run::from_node;

const HEAD: &TipSetKey = &TipSetKey::HEAD;
/// Names the order.
const NAME: &str = "extend";
/// Epochs of a day. Source: builtin-actors, runtime/src/builtin/network.rs, EPOCHS_IN_DAY.
const DAY: i64 = 2_880;
/// How far ahead of now a sector may expire. Source: builtin-actors, runtime/src/runtime/policy.rs,
/// MAX_SECTOR_EXPIRATION_EXTENSION.
const MAX_AHEAD: EpochDelta = EpochDelta(1_278 * DAY);
/// Epochs before its end in which a sector's claims may be dropped. Source: the same,
/// END_OF_LIFE_CLAIM_DROP_PERIOD.
const DROP_PERIOD: EpochDelta = EpochDelta(30 * DAY);

/// Choose sectors by number, or by when they expire. Without --really-do-it nothing is sent: the
/// command shows each sector's new end, its claims and the cost.
#[derive(Debug, clap::Args)]
pub(super) struct ExtendArgs {
    /// Sector numbers; all active sectors by default
    sectors: Vec<u64>,
    /// Only sectors that expire at this epoch or later
    #[arg(long, value_name = "EPOCH")]
    from: Option<i64>,
    /// Only sectors that expire at this epoch or earlier
    #[arg(long, value_name = "EPOCH")]
    to: Option<i64>,
    /// Epochs to add; 540 days by default
    #[arg(long, value_name = "EPOCHS", default_value_t = 540 * DAY, conflicts_with = "new_expiration")]
    extension: i64,
    /// The same new end for all
    #[arg(long, value_name = "EPOCH")]
    new_expiration: Option<i64>,
    /// Leave sectors alone whose end would move by fewer epochs than this; 7 days by default
    #[arg(long, value_name = "EPOCHS", default_value_t = 7 * DAY)]
    tolerance: i64,
    /// Only sectors without verified data
    #[arg(long)]
    only_cc: bool,
    /// Drop claims whose term ends too early, where the sector is in its last 30 days: its power
    /// falls
    #[arg(long)]
    drop_claims: bool,
    /// Most sectors of the message
    #[arg(long, default_value_t = 500)]
    max_sectors: usize,
    /// Limit of the fee, FIL
    #[arg(long, value_parser = fil, value_name = "FIL")]
    max_fee: Option<TokenAmount>,
    /// Do it; without this it is a dry run
    #[arg(long)]
    really_do_it: bool,
}

/// A sector and where it is proven.
struct Candidate<'a> {
    info: &'a SectorOnChainInfo,
    deadline: u64,
    partition: u64,
    claims: Vec<(u64, &'a VerifiedClaim)>,
}

/// What is to happen with a sector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Extension {
    sector: u64,
    deadline: u64,
    partition: u64,
    expiration: i64,
    new_expiration: i64,
    keep_claims: Vec<u64>,
    drop_claims: Vec<u64>,
}

/// Extends or skips a sector; the error says why it is skipped.
fn judge(c: &Candidate<'_>, args: &ExtendArgs, now: Epoch) -> Result<Extension, String> {
    let old = c.info.expiration;
    let wanted = match args.new_expiration {
        Some(at) => Epoch(at),
        None => old + EpochDelta(args.extension),
    };
    let lifetime = seal_proof_sector_maximum_lifetime(c.info.seal_proof.into());
    let last = lifetime.map_or(wanted, |l| c.info.activation + EpochDelta(l));
    let mut new = wanted.min(now + MAX_AHEAD).min(last);
    let mut dropped = Vec::new();
    let mut kept = Vec::new();
    let may_drop = args.drop_claims && (old - now).0 <= DROP_PERIOD.0;
    for (id, claim) in &c.claims {
        let ends = claim.term_start + claim.term_max;
        if ends >= new {
            kept.push(*id);
        } else if may_drop {
            dropped.push(*id);
        } else {
            // All of a sector's claims must be kept: the first to end is the limit.
            new = ends;
            kept.push(*id);
        }
    }
    if args.only_cc && !c.claims.is_empty() {
        return Err("it has verified data".into());
    }
    let moved = (new - old).0;
    if moved < args.tolerance.max(1) {
        return Err(format!(
            "its end would move by {moved} epochs: {}",
            if new < wanted {
                "its lifetime or a claim's term allows no more"
            } else {
                "less than the tolerance"
            }
        ));
    }
    Ok(Extension {
        sector: c.info.sector_number.0,
        deadline: c.deadline,
        partition: c.partition,
        expiration: old.0,
        new_expiration: new.0,
        keep_claims: kept,
        drop_claims: dropped,
    })
}

/// One declaration for each place and new end.
fn params(extensions: &[Extension]) -> ExtendSectorExpiration2Params {
    let mut groups: BTreeMap<(u64, u64, i64), Vec<&Extension>> = BTreeMap::new();
    for e in extensions {
        let group = groups.entry((e.deadline, e.partition, e.new_expiration));
        group.or_default().push(e);
    }
    let declaration = |((deadline, partition, new_expiration), group): (_, Vec<&Extension>)| {
        let (plain, claimed): (Vec<_>, Vec<_>) = group
            .into_iter()
            .partition(|e| e.keep_claims.is_empty() && e.drop_claims.is_empty());
        let mut sectors = BitField::new();
        for e in plain {
            sectors.set(e.sector);
        }
        let claim = |e: &Extension| SectorClaim {
            sector_number: e.sector,
            maintain_claims: e.keep_claims.clone(),
            drop_claims: e.drop_claims.clone(),
        };
        ExpirationExtension2 {
            deadline,
            partition,
            sectors,
            sectors_with_claims: claimed.into_iter().map(claim).collect(),
            new_expiration,
        }
    };
    ExtendSectorExpiration2Params {
        extensions: groups.into_iter().map(declaration).collect(),
    }
}

pub(super) async fn extend(cx: &Cx, args: ExtendArgs) -> Result<(), Fault> {
    // The ends move with the first message: what was asked for makes the order.
    let asked = format!("{args:?}");
    if repeated(cx, NAME, asked.as_bytes(), args.really_do_it).await? {
        return Ok(());
    }
    let (node, cfg) = cx.node()?;
    let actor = cfg.actor()?.address();
    let failed = |e| from_node(&e);
    let now = node.chain_head().await.map_err(failed)?.height;
    let active = node.state_miner_active_sectors(actor, HEAD).await;
    let active = active.map_err(failed)?;
    let claims = node.state_get_claims(actor, HEAD).await.map_err(failed)?;
    let mut places: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    let deadlines = node.state_miner_deadlines(actor, HEAD).await;
    for (deadline, _) in (0u64..).zip(deadlines.map_err(failed)?) {
        let partitions = node.state_miner_partitions(actor, deadline, HEAD).await;
        for (index, p) in (0u64..).zip(partitions.map_err(failed)?) {
            places.extend(p.active_sectors.iter().map(|n| (n, (deadline, index))));
        }
    }
    let named: BTreeSet<u64> = args.sectors.iter().copied().collect();
    let mut skipped: Vec<(u64, String)> = named
        .iter()
        .filter(|n| !places.contains_key(n))
        .map(|n| (*n, "it is not active".into()))
        .collect();
    let mut extensions = Vec::new();
    for info in &active {
        let n = info.sector_number.0;
        let chosen = (named.is_empty() || named.contains(&n))
            && args.from.is_none_or(|from| info.expiration.0 >= from)
            && args.to.is_none_or(|to| info.expiration.0 <= to);
        let Some((deadline, partition)) = places.get(&n).copied().filter(|_| chosen) else {
            continue;
        };
        let of_sector = claims
            .iter()
            .filter(|(_, c)| c.sector == SectorNumber(n))
            .map(|(id, c)| (*id, c));
        let candidate = Candidate {
            info,
            deadline,
            partition,
            claims: of_sector.collect(),
        };
        match judge(&candidate, &args, now) {
            Ok(e) if extensions.len() < args.max_sectors => extensions.push(e),
            Ok(_) => skipped.push((n, "the message is full: repeat the command".into())),
            Err(why) => skipped.push((n, why)),
        }
    }
    let mut details = details(&extensions, &skipped);
    if !cx.json {
        show(&extensions, &skipped)?;
    } else if extensions.is_empty() {
        print_json(&details)?;
    }
    if extensions.is_empty() {
        return Err(Fault::new(
            Kind::Data,
            format!("no sector can be extended ({} skipped)", skipped.len()),
            "choose others with --from and --to, or a later --new-expiration",
        ));
    }
    let daily: TokenAmount = extensions
        .iter()
        .filter_map(|e| {
            let info = active.iter().find(|i| i.sector_number.0 == e.sector)?;
            let epochs = u64::try_from(e.new_expiration - e.expiration).ok()?;
            Some((&info.daily_fee * epochs).div_floor(DAY.unsigned_abs()))
        })
        .sum();
    details.insert("daily_fees_fil".into(), daily.to_string().into());
    let list: Vec<String> = extensions.iter().map(|e| e.sector.to_string()).collect();
    let claims = |f: fn(&Extension) -> usize| extensions.iter().map(f).sum::<usize>().to_string();
    let action = vec![
        ("Sectors".into(), list.join(" ")),
        ("Claims kept".into(), claims(|e| e.keep_claims.len())),
        ("Claims dropped".into(), claims(|e| e.drop_claims.len())),
        (
            "Daily fees until the new ends".into(),
            format!("{daily} FIL, over the added time"),
        ),
        (
            "Pledge".into(),
            "stays locked until the new ends".to_owned(),
        ),
    ];
    let message = Spend {
        name: NAME,
        action,
        details,
        asked: Some(asked),
        from: None,
        miner: actor,
        method: EXTEND_SECTOR_EXPIRATION2,
        params: encode(&params(&extensions)),
        max_fee: args.max_fee,
    };
    spend(cx, message, args.really_do_it).await
}

/// What `--json` has of each sector.
fn details(extensions: &[Extension], skipped: &[(u64, String)]) -> Map<String, Value> {
    let skip = |(sector, why): &(u64, String)| json!({ "sector": sector, "why": why });
    let skipped: Vec<Value> = skipped.iter().map(skip).collect();
    let mut all = Map::new();
    all.insert("sectors".into(), json!(extensions));
    all.insert("skipped".into(), skipped.into());
    all
}

fn show(extensions: &[Extension], skipped: &[(u64, String)]) -> Result<(), Fault> {
    let mut text = String::new();
    if !extensions.is_empty() {
        let mut out = table(&["Sector", "Expires", "New end", "Days added", "Claims"]);
        for e in extensions {
            let claims = match (e.keep_claims.len(), e.drop_claims.len()) {
                (0, 0) => "none".into(),
                (kept, 0) => format!("{kept} kept"),
                (kept, dropped) => format!("{kept} kept, {dropped} dropped"),
            };
            out.add_row([
                e.sector.to_string(),
                e.expiration.to_string(),
                e.new_expiration.to_string(),
                ((e.new_expiration - e.expiration) / DAY).to_string(),
                claims,
            ]);
        }
        text = format!("{out}\n");
    }
    for (n, why) in skipped {
        text = format!("{text}sector {n} stays as it is: {why}\n");
    }
    if text.is_empty() {
        return Ok(());
    }
    print(&text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: ExtendArgs,
    }

    fn args(line: &str) -> ExtendArgs {
        let words = std::iter::once("extend").chain(line.split_whitespace());
        Cli::parse_from(words).args
    }

    fn sector(activation: i64, expiration: i64) -> SectorOnChainInfo {
        SectorOnChainInfo {
            sector_number: SectorNumber(7),
            // StackedDRG2KiBV1P1: five years at most.
            seal_proof: 5,
            sealed_cid: cid::Cid::default(),
            activation: Epoch(activation),
            expiration: Epoch(expiration),
            deal_weight: Default::default(),
            verified_deal_weight: Default::default(),
            initial_pledge: TokenAmount::default(),
            expected_day_reward: None,
            expected_storage_pledge: None,
            power_base_epoch: Epoch(0),
            replaced_day_reward: None,
            sector_key_cid: None,
            flags: 0,
            daily_fee: TokenAmount::default(),
        }
    }

    fn claim(ends: i64) -> VerifiedClaim {
        VerifiedClaim {
            provider: 1000,
            client: 100,
            data: cid::Cid::default(),
            size: 1024,
            term_min: EpochDelta(0),
            term_max: EpochDelta(ends),
            term_start: Epoch(0),
            sector: SectorNumber(7),
        }
    }

    #[test]
    fn ends_move_as_far_as_rules_and_claims_allow() {
        let (day, year) = (DAY, 365 * DAY);
        for (line, now, expiration, claims, want) in [
            ("", 0, year, &[][..], Ok((905 * day, 0))),
            ("--extension 28800", 0, year, &[], Ok((375 * day, 0))),
            (
                "--new-expiration 2880000",
                0,
                year,
                &[],
                Ok((1_000 * day, 0)),
            ),
            // No further than 1,278 days ahead, nor than five years of life.
            (
                "--new-expiration 9999999",
                0,
                year,
                &[],
                Ok((1_278 * day, 0)),
            ),
            (
                "--new-expiration 9999999",
                4 * year,
                4 * year + day,
                &[],
                Ok((5 * 1_051_897, 0)),
            ),
            // Too little to be worth a message.
            ("--extension 2880", 0, year, &[], Err("tolerance")),
            (
                "--extension 2880 --tolerance 0",
                0,
                year,
                &[],
                Ok((366 * day, 0)),
            ),
            ("--new-expiration 100", 0, year, &[], Err("tolerance")),
            // A claim ends first: it is the limit, or is dropped in the last 30 days.
            ("", 0, year, &[400 * day, 2_000 * day], Ok((400 * day, 0))),
            ("--drop-claims", 0, year, &[400 * day], Ok((400 * day, 0))),
            (
                "--drop-claims",
                year - day,
                year,
                &[366 * day],
                Ok((905 * day, 1)),
            ),
            ("", year - day, year, &[366 * day], Err("a claim's term")),
            ("--only-cc", 0, year, &[2_000 * day], Err("verified data")),
        ] {
            let info = sector(0, expiration);
            let claims: Vec<_> = claims.iter().copied().map(claim).collect();
            let c = Candidate {
                info: &info,
                deadline: 1,
                partition: 2,
                claims: (0u64..).zip(&claims).collect(),
            };
            match (judge(&c, &args(line), Epoch(now)), want) {
                (Ok(e), Ok((new, dropped))) => {
                    assert_eq!(
                        (e.new_expiration, e.drop_claims.len()),
                        (new, dropped),
                        "{line}"
                    );
                    assert_eq!(e.keep_claims.len() + dropped, claims.len());
                }
                (Err(why), Err(part)) => assert!(why.contains(part), "{line}: {why}"),
                (got, want) => panic!("{line}: {got:?}, not {want:?}"),
            }
        }
    }

    #[test]
    fn json_has_each_end_claim_and_skip() {
        let one = Extension {
            sector: 7,
            deadline: 1,
            partition: 2,
            expiration: 100,
            new_expiration: 900,
            keep_claims: vec![5],
            drop_claims: vec![],
        };
        let all = details(&[one], &[(8, "it is not active".into())]);
        assert_eq!(all["sectors"][0]["new_expiration"], 900);
        assert_eq!(all["sectors"][0]["keep_claims"], json!([5]));
        assert_eq!(all["skipped"][0]["why"], "it is not active");
    }

    #[test]
    fn sectors_of_one_place_share_a_declaration() {
        let e = |sector, partition, new_expiration, keep: &[u64]| Extension {
            sector,
            deadline: 3,
            partition,
            expiration: 1,
            new_expiration,
            keep_claims: keep.to_vec(),
            drop_claims: vec![],
        };
        let p = params(&[
            e(1, 0, 9, &[]),
            e(2, 0, 9, &[5]),
            e(3, 0, 9, &[]),
            e(4, 1, 9, &[]),
            e(5, 0, 8, &[]),
        ]);
        let got: Vec<_> = p
            .extensions
            .iter()
            .map(|d| {
                let plain: Vec<u64> = d.sectors.iter().collect();
                let claimed: Vec<u64> = d
                    .sectors_with_claims
                    .iter()
                    .map(|s| s.sector_number)
                    .collect();
                (d.partition, d.new_expiration, plain, claimed)
            })
            .collect();
        let want = [
            (0, 8, vec![5], vec![]),
            (0, 9, vec![1, 3], vec![2]),
            (1, 9, vec![4], vec![]),
        ];
        assert_eq!(got, want);
    }
}
