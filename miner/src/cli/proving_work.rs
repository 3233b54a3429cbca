//! What the hub's workers do for `lotus-miner proving`.

use std::collections::BTreeSet;
use std::time::Duration;

use lotus_messages::{FeesConfig, MessageKind};
use lotus_proving::{CheckedPartition, Computed, Recovery};
use lotus_runtime::Fault;
use reqwest::Method;

use super::cost::{Estimate, Report};
use super::proving::{Chain, exists, numbers};
use super::{Cx, print, print_json, table};
use crate::control;
use crate::control_proving::{HowToCheck, Recover};

/// Longest that the check or the proof of one deadline may take.
const HEAVY: Duration = Duration::from_secs(3 * 3600);

pub(super) async fn check(cx: &Cx, slow: bool, only: Option<u64>) -> Result<(), Fault> {
    let chain = Chain::of(cx).await?;
    let indices = match only {
        Some(index) => {
            exists(&chain, index)?;
            index..index + 1
        }
        None => chain.indices(),
    };
    let socket = cx.control_socket()?;
    let mut found: Vec<CheckedPartition> = Vec::new();
    for index in indices {
        if chain.partitions(index).await?.is_empty() {
            continue;
        }
        let path = format!("/v1/deadlines/{index}/check");
        let how = HowToCheck { slow };
        let some: Vec<CheckedPartition> =
            control::call_with(&socket, Method::POST, &path, Some(&how), HEAVY).await?;
        found.extend(some);
    }
    if cx.json {
        return print_json(&found);
    }
    let mut out = table(&["Deadline", "Partition", "Sector", "State", "What is wrong"]);
    let mut sectors = 0;
    let mut wrong = 0;
    for p in &found {
        sectors += p.sectors;
        for b in &p.bad {
            wrong += 1;
            out.add_row([
                p.deadline.to_string(),
                p.partition.to_string(),
                b.sector.to_string(),
                if b.faulty { "faulty" } else { "active" }.to_owned(),
                b.why.clone(),
            ]);
        }
        for n in &p.repaired {
            out.add_row([
                p.deadline.to_string(),
                p.partition.to_string(),
                n.to_string(),
                "faulty".to_owned(),
                "nothing: it can be proven again".to_owned(),
            ]);
        }
    }
    let how = if slow { "a proof" } else { "their files" };
    let text = format!("{sectors} sectors checked by {how}, {wrong} are bad");
    print(&if wrong == 0 && out.row_count() == 0 {
        text
    } else {
        format!("{out}\n{text}")
    })
}

pub(super) async fn compute(cx: &Cx, deadline: u64) -> Result<(), Fault> {
    let socket = cx.control_socket()?;
    let path = format!("/v1/deadlines/{deadline}/compute");
    let made: Vec<Computed> =
        control::call_with(&socket, Method::POST, &path, None::<&()>, HEAVY).await?;
    if cx.json {
        return print_json(&made);
    }
    if made.is_empty() {
        return print(&format!("deadline {deadline} has nothing to prove"));
    }
    let mut out = table(&[
        "Partitions",
        "Sectors",
        "Skipped",
        "Proof bytes",
        "Seconds",
        "Challenge",
        "Error",
    ]);
    for c in &made {
        out.add_row([
            numbers(&c.partitions),
            c.sectors.to_string(),
            numbers(&c.skipped),
            c.proof_bytes.to_string(),
            format!("{:.2}", c.seconds),
            c.challenge.to_string(),
            c.error.clone().unwrap_or_default(),
        ]);
    }
    print(&out.to_string())
}

pub(super) async fn recover(cx: &Cx, sectors: BTreeSet<u64>, really: bool) -> Result<(), Fault> {
    let (_, cfg) = cx.node()?;
    let socket = cx.control_socket()?;
    let what = Recover { sectors, really };
    let done: Vec<Recovery> = control::call_with(
        &socket,
        Method::POST,
        "/v1/faults/recover",
        Some(&what),
        HEAVY,
    )
    .await?;
    let estimate = fees(&done, &cfg.messages.fees);
    if cx.json {
        return print_json(&Report {
            estimate: &estimate,
            done: really,
            what: serde_json::json!({ "recoveries": done, "messages": messages(&done) }),
        });
    }
    let mut out = table(&["Sector", "Deadline", "Partition", "Cut-off", "Recovery"]);
    for r in &done {
        let verdict = match (&r.refused, really) {
            (Some(why), _) => format!("refused: {why}"),
            (None, true) => "declared".into(),
            (None, false) => "would be declared".into(),
        };
        out.add_row([
            r.sector.to_string(),
            r.deadline.to_string(),
            r.partition.to_string(),
            r.fault_cutoff.to_string(),
            verdict,
        ]);
    }
    let fee = cfg.messages.fees.max_fee(MessageKind::Declare, 1);
    let last = match (messages(&done), really) {
        (0, _) => "nothing to declare".to_owned(),
        (n, true) => format!("{n} messages are on their way, each for a fee of at most {fee} FIL"),
        (n, false) => format!(
            "this would send {n} messages, each for a fee of at most {fee} FIL; add \
             --really-do-it to send them"
        ),
    };
    print(&format!("{out}\n{last}"))
}

/// Messages that recoveries take: one for each deadline.
fn messages(done: &[Recovery]) -> u64 {
    let declared = done.iter().filter(|r| r.refused.is_none());
    declared.map(|r| r.deadline).collect::<BTreeSet<_>>().len() as u64
}

fn fees(done: &[Recovery], cfg: &FeesConfig) -> Estimate {
    let each = cfg.max_fee(MessageKind::Declare, 1);
    let all = &each * messages(done);
    Estimate::default()
        .with("max_fee_each_fil", "Fee of each message, at most", each)
        .with("max_fees_fil", "Fees, at most", all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_deadline_costs_a_message() {
        let of = |deadline, refused: Option<&str>| Recovery {
            sector: 1,
            deadline,
            partition: 0,
            fault_cutoff: lotus_types::Epoch(9),
            refused: refused.map(Into::into),
        };
        let done = [of(1, None), of(1, None), of(2, None), of(3, Some("no"))];
        assert_eq!(messages(&done), 2);
        let cfg = FeesConfig {
            max_declare_nanofil: 500_000_000,
            ..FeesConfig::default()
        };
        let all = serde_json::to_value(fees(&done, &cfg)).unwrap();
        let want = serde_json::json!({ "max_fee_each_fil": "0.5", "max_fees_fil": "1.0" });
        for (key, fil) in want.as_object().unwrap() {
            let parse = |v: &serde_json::Value| v.as_str().unwrap().parse::<f64>().unwrap();
            assert_eq!(parse(&all[key]), parse(fil), "{key}");
        }
    }
}
