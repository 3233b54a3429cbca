//! What a command is going to cost that begins something: estimates, because the chain sets the
//! prices when the messages are made.

use comfy_table::Table;
use lotus_messages::{FeesConfig, MessageKind};
use lotus_node_client::api::{SectorPreCommitInfo, TipSetKey};
use lotus_proofs::seal_proof_type;
use lotus_runtime::Fault;
use lotus_types::{EpochDelta, SectorNumber, TokenAmount};
use serde::{Serialize, Serializer};

use super::{Cx, print, print_json, table};
use crate::run::from_node;

const HEAD: &TipSetKey = &TipSetKey::HEAD;
/// Days of block reward that a day of faults costs, and that a pledge holds at least, in
/// hundredths. Source: builtin-actors, miner, monies.rs, `CONTINUED_FAULT_FACTOR_NUM` and
/// `INITIAL_PLEDGE_FACTOR`.
const FAULT_DAYS: u64 = 351;
const PLEDGE_DAYS: u64 = 2_000;

/// Amounts in FIL, each with its name in JSON and in words.
#[derive(Debug, Default)]
pub(super) struct Estimate(Vec<(&'static str, &'static str, TokenAmount)>);

impl Serialize for Estimate {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_map(self.0.iter().map(|(key, _, fil)| (key, fil.to_string())))
    }
}

impl Estimate {
    pub(super) fn with(mut self, key: &'static str, name: &'static str, fil: TokenAmount) -> Self {
        self.0.push((key, name, fil));
        self
    }

    fn table(&self, what: &str) -> Table {
        let mut out = table(&[what, "Estimate"]);
        for (_, name, fil) in &self.0 {
            out.add_row([(*name).to_owned(), format!("{fil} FIL")]);
        }
        out
    }
}

/// What a command printed as JSON: its estimate, whether it was done, and what came of it.
#[derive(Serialize)]
pub(super) struct Report<'a, T: Serialize> {
    pub(super) estimate: &'a Estimate,
    pub(super) done: bool,
    #[serde(flatten)]
    pub(super) what: T,
}

/// Shows what a command would cost. `false`: it is not to go on, and has said how.
pub(super) fn agreed(
    cx: &Cx,
    what: &str,
    estimate: &Estimate,
    really: bool,
) -> Result<bool, Fault> {
    if !cx.json {
        print(&estimate.table(what).to_string())?;
    }
    if !really && cx.json {
        print_json(&Report {
            estimate,
            done: false,
            what: serde_json::Map::new(),
        })?;
    } else if !really {
        print("nothing was done: repeat the command with --really-do-it")?;
    }
    Ok(really)
}

/// What the chain and the settings ask for one sector.
#[derive(Clone, Debug)]
pub(super) struct Prices {
    /// The deposit of its pre-commit: it becomes part of the pledge.
    deposit: TokenAmount,
    /// Its pledge without verified data.
    pledge: TokenAmount,
    /// Its pledge with nothing else.
    verified: TokenAmount,
    fees: FeesConfig,
}

impl Prices {
    /// Asks the full node.
    pub(super) async fn of(cx: &Cx) -> Result<Self, Fault> {
        let (node, cfg) = cx.node()?;
        let (miner, size) = (cfg.actor()?.address(), cfg.sector_size()?);
        let failed = |e| from_node(&e);
        let head = node.chain_head().await.map_err(failed)?.height;
        let life = EpochDelta(cfg.sealing.expected_sector_duration_epochs);
        let info = SectorPreCommitInfo {
            seal_proof: seal_proof_type(size),
            sector_number: SectorNumber(0),
            sealed_cid: cid::Cid::default(),
            seal_rand_epoch: head,
            deal_ids: Vec::new(),
            expiration: head + life,
            unsealed_cid: None,
        };
        let deposit = node.state_miner_pre_commit_deposit_for_power(miner, &info, HEAD);
        let bytes = size.bytes();
        let pledge = node.state_miner_initial_pledge_for_sector(life, bytes, 0, HEAD);
        let verified = node.state_miner_initial_pledge_for_sector(life, bytes, bytes, HEAD);
        Ok(Self {
            deposit: deposit.await.map_err(failed)?,
            pledge: pledge.await.map_err(failed)?,
            verified: verified.await.map_err(failed)?,
            fees: cfg.messages.fees,
        })
    }

    fn fee(&self, kinds: &[MessageKind], sectors: u64) -> TokenAmount {
        kinds.iter().map(|k| self.fees.max_fee(*k, sectors)).sum()
    }

    /// Sectors without data, each with messages of its own.
    pub(super) fn pledged(&self, sectors: u64) -> Estimate {
        use MessageKind::{Commit, PreCommit};
        Estimate::default()
            .with(
                "deposits_fil",
                "Deposits of their pre-commits",
                &self.deposit * sectors,
            )
            .with(
                "pledge_fil",
                "Pledge until they end, deposits included",
                self.pledge.clone().max(self.deposit.clone()) * sectors,
            )
            .with(
                "max_fees_fil",
                "Network fees, at most",
                self.fee(&[PreCommit, Commit], 1) * sectors,
            )
    }

    /// A sector with data, of which nothing or all may be verified.
    pub(super) fn sealed(&self) -> Estimate {
        self.pledged(1).with(
            "verified_pledge_fil",
            "Pledge if all of its data is verified",
            self.verified.clone(),
        )
    }

    /// The pre-commit message of so many sectors.
    pub(super) fn pre_commit(&self, sectors: u64) -> Estimate {
        Estimate::default()
            .with("deposits_fil", "Deposits", &self.deposit * sectors)
            .with(
                "max_fees_fil",
                "Network fee, at most",
                self.fee(&[MessageKind::PreCommit], sectors),
            )
    }

    /// The prove-commit message of so many sectors, whose deposits are paid.
    pub(super) fn commit(&self, sectors: u64) -> Estimate {
        let more = |all: &TokenAmount| (all - &self.deposit).max(TokenAmount::default()) * sectors;
        Estimate::default()
            .with(
                "pledge_fil",
                "Pledge beyond the deposits",
                more(&self.pledge),
            )
            .with(
                "verified_pledge_fil",
                "The same if all data is verified",
                more(&self.verified),
            )
            .with(
                "max_fees_fil",
                "Network fee, at most",
                self.fee(&[MessageKind::Commit], sectors),
            )
    }

    /// The upgrade of a sector that has this pledge.
    pub(super) fn upgrade(&self, pledged: &TokenAmount) -> Estimate {
        let more = |all: &TokenAmount| (all - pledged).max(TokenAmount::default());
        Estimate::default()
            .with(
                "pledge_fil",
                "More pledge with its next deals",
                more(&self.pledge),
            )
            .with(
                "verified_pledge_fil",
                "The same if all data is verified",
                more(&self.verified),
            )
            .with(
                "max_fees_fil",
                "Network fee of the upgrade, at most",
                self.fee(&[MessageKind::Commit], 1),
            )
    }
}

/// What is at stake with sectors whose files are gone; `pledged` is the pledge of those that were
/// looked at.
pub(super) fn lost(sectors: u64, looked_at: u64, pledged: &TokenAmount) -> Estimate {
    let pledge = (pledged * sectors).div_floor(looked_at.max(1));
    let daily = (&pledge * FAULT_DAYS).div_floor(PLEDGE_DAYS);
    Estimate::default()
        .with("pledge_fil", "Pledge of sectors that turn faulty", pledge)
        .with(
            "fault_fees_per_day_fil",
            "Fault fees of each day, at most",
            daily,
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nano(n: u64) -> TokenAmount {
        TokenAmount::from_nano(n)
    }

    fn figures(e: &Estimate) -> Vec<(&'static str, TokenAmount)> {
        e.0.iter()
            .map(|(key, _, fil)| (*key, fil.clone()))
            .collect()
    }

    #[test]
    fn estimates_add_up() {
        let prices = Prices {
            deposit: nano(100),
            pledge: nano(300),
            verified: nano(3_000),
            fees: FeesConfig {
                max_pre_commit_nanofil: 7,
                max_pre_commit_batch_per_sector_nanofil: 5,
                max_commit_nanofil: 9,
                max_commit_batch_per_sector_nanofil: 6,
                ..FeesConfig::default()
            },
        };
        for (estimate, want) in [
            (
                prices.pledged(1_000),
                &[
                    ("deposits_fil", 100_000u64),
                    ("pledge_fil", 300_000),
                    ("max_fees_fil", 16_000),
                ][..],
            ),
            (
                prices.sealed(),
                &[
                    ("deposits_fil", 100),
                    ("pledge_fil", 300),
                    ("max_fees_fil", 16),
                    ("verified_pledge_fil", 3_000),
                ],
            ),
            (
                prices.pre_commit(4),
                &[("deposits_fil", 400), ("max_fees_fil", 20)],
            ),
            (
                prices.commit(4),
                &[
                    ("pledge_fil", 800),
                    ("verified_pledge_fil", 11_600),
                    ("max_fees_fil", 24),
                ],
            ),
            (
                prices.upgrade(&nano(400)),
                &[
                    ("pledge_fil", 0),
                    ("verified_pledge_fil", 2_600),
                    ("max_fees_fil", 9),
                ],
            ),
            // Half of them were looked at.
            (
                lost(4, 2, &nano(2_000)),
                &[("pledge_fil", 4_000), ("fault_fees_per_day_fil", 702)],
            ),
            (
                lost(0, 0, &nano(0)),
                &[("pledge_fil", 0), ("fault_fees_per_day_fil", 0)],
            ),
        ] {
            let want: Vec<_> = want.iter().map(|(key, n)| (*key, nano(*n))).collect();
            assert_eq!(figures(&estimate), want);
        }
    }

    #[test]
    fn json_has_the_same_figures() {
        let estimate = Estimate::default().with("a_fil", "A", nano(1_500_000_000));
        let report = Report {
            estimate: &estimate,
            done: true,
            what: serde_json::json!({ "sectors": [7] }),
        };
        let want = serde_json::json!({
            "estimate": { "a_fil": "1.5" }, "done": true, "sectors": [7]
        });
        assert_eq!(serde_json::to_value(&report).unwrap(), want);
        assert!(estimate.table("x").to_string().contains("1.5 FIL"));
    }
}
