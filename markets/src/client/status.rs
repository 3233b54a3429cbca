use std::time::Duration;

use comfy_table::{Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use lotus_deals::mk20::StatusResponse;
use ulid::Ulid;

use super::market::Market;
use super::{ClientError, Who};

/// `client status`.
#[derive(Debug, clap::Args)]
pub(crate) struct Status {
    #[command(flatten)]
    who: Who,
    /// ULID of the deal.
    deal_id: String,
    /// Follow the deal until its sector is proven or the deal is over.
    #[arg(long)]
    watch: bool,
    /// Milliseconds between two looks.
    #[arg(long, default_value_t = 1000)]
    interval_ms: u64,
    /// As JSON: one object, or with --watch one line for each change.
    #[arg(long)]
    json: bool,
}

/// Steps of a deal as a bar shows them: checkpoints, then the states of sealing.
const STEPS: [&str; 16] = [
    "Accepted",
    "Transferred",
    "Offered",
    "AddedPiece",
    "Packing",
    "GetTicket",
    "PreCommit1",
    "PreCommit2",
    "SubmitPreCommitBatch",
    "PreCommitBatchWait",
    "WaitSeed",
    "Committing",
    "SubmitCommitAggregate",
    "CommitAggregateWait",
    "FinalizeSector",
    "Proving",
];

impl Status {
    pub(crate) async fn run(self) -> Result<(), ClientError> {
        let id = Ulid::from_string(&self.deal_id).map_err(|_| ClientError::Argument {
            given: self.deal_id.clone(),
            wanted: "a ULID such as 01ARZ3NDEKTSV4RRFFQ69G5FAV",
        })?;
        let market = Market::new(&self.who)?;
        let mut last: Option<StatusResponse> = None;
        let style = ProgressStyle::with_template("{prefix:>12} [{bar:32}] {msg} {elapsed}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(STEPS.len() as u64 - 1)
            .with_style(style)
            .with_prefix("deal");
        loop {
            let now = market.status(id).await?;
            if last.as_ref() != Some(&now) {
                if self.json {
                    println!("{}", serde_json::json!(now));
                } else if self.watch {
                    show(&bar, &now);
                } else {
                    println!("{}", table(&now));
                }
                last = Some(now.clone());
            }
            let state = now.ddo_v1.status.as_str();
            if state == "failed" {
                bar.abandon();
                return Err(ClientError::DealOver {
                    state: now.deal.checkpoint,
                    reason: now.ddo_v1.error_msg,
                });
            }
            if !self.watch || state == "complete" {
                bar.finish();
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(self.interval_ms.max(50))).await;
        }
    }
}

/// How far along the steps a deal is; a state that is none of them (a failure state of sealing)
/// counts as the checkpoint.
fn step(s: &StatusResponse) -> usize {
    let find = |name: &str| STEPS.iter().position(|n| *n == name);
    find(&s.deal.sealing_state)
        .or_else(|| find(&s.deal.checkpoint))
        .unwrap_or(if s.deal.checkpoint == "Active" {
            STEPS.len() - 1
        } else {
            0
        })
}

fn show(bar: &ProgressBar, s: &StatusResponse) {
    let d = &s.deal;
    let text = match d.sealing_state.as_str() {
        "" => d.checkpoint.clone(),
        state => format!(
            "sector {} {state}",
            d.sector.map_or_else(|| "?".into(), |n| n.to_string())
        ),
    };
    bar.set_position(step(s) as u64);
    bar.set_message(text.clone());
    if bar.is_hidden() {
        println!(
            "{text}{}{}",
            if d.message.is_empty() { "" } else { ": " },
            d.message
        );
    }
}

fn table(s: &StatusResponse) -> Table {
    let d = &s.deal;
    let mut t = Table::new();
    t.load_preset(presets::NOTHING);
    let number = |n: Option<u64>| n.map_or_else(|| "-".into(), |n| n.to_string());
    for (name, value) in [
        ("deal", d.id.clone()),
        ("client", d.client.clone()),
        ("status", s.ddo_v1.status.clone()),
        ("checkpoint", d.checkpoint.clone()),
        ("sealing state", d.sealing_state.clone()),
        ("sector", number(d.sector)),
        ("offset", number(d.offset)),
        ("piece", d.piece_cid.clone()),
        ("piece size", d.piece_size.to_string()),
        (
            "received",
            format!("{} of {} bytes", d.received_bytes, d.raw_size),
        ),
        (
            "handed over",
            format!("{} of {} bytes", d.handed_over_bytes, d.raw_size),
        ),
        ("epochs", format!("{} to {}", d.start_epoch, d.end_epoch)),
        ("message", d.message.clone()),
    ] {
        t.add_row([name, &value]);
    }
    t
}
