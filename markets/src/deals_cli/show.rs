//! Looking at deals, and the orders that are one word.

use std::time::Duration;

use comfy_table::{Table, presets};
use indicatif::{HumanBytes, HumanDuration, MultiProgress, ProgressBar, ProgressStyle};
use lotus_deals::operator::{CancelRequest, DealDetail, DealRow, ListQuery};
use lotus_runtime::Fault;
use serde_json::json;

use super::Where;
use super::link::Link;

/// `storage-deals list`.
#[derive(Debug, clap::Args)]
pub(crate) struct List {
    #[command(flatten)]
    at: Where,
    /// Of this client alone.
    #[arg(long)]
    client: Option<String>,
    /// With this checkpoint alone, such as `Sealing`.
    #[arg(long)]
    checkpoint: Option<String>,
    /// From this source alone.
    #[arg(long, value_parser = ["put", "http", "offline"])]
    source: Option<String>,
    /// Only those that are not over.
    #[arg(long)]
    open: bool,
    /// Only those that wait for their bytes.
    #[arg(long)]
    waiting: bool,
    /// At most so many.
    #[arg(long)]
    limit: Option<usize>,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl List {
    pub(crate) async fn run(self) -> Result<(), Fault> {
        let query = ListQuery {
            client: self.client,
            checkpoint: self.checkpoint,
            source: self.source,
            open: self.open,
            waiting: self.waiting,
            limit: self.limit,
            ..ListQuery::default()
        };
        let deals = Link::new(&self.at)?.all(query).await?;
        if self.json {
            println!("{}", json!(deals));
        } else {
            println!("{}", table(&deals));
        }
        Ok(())
    }
}

fn short(text: &str) -> String {
    match text.char_indices().rev().nth(7) {
        Some((at, _)) if at > 8 => format!("{}…{}", text.get(..6).unwrap_or_default(), &text[at..]),
        _ => text.to_owned(),
    }
}

/// What an operator wants to read of a deal's state.
fn state(d: &DealRow) -> String {
    match (d.deal.checkpoint.as_str(), d.arriving, d.checking) {
        (_, true, _) => "Accepted: bytes arrive".into(),
        (_, _, true) => "Accepted: bytes are checked".into(),
        ("Accepted", ..) => match d.source.as_str() {
            "put" => "Accepted: waits for the upload".into(),
            "http" => "Accepted: waits for the download".into(),
            _ => "Accepted: waits for import-data".into(),
        },
        (_, _, _) if !d.deal.sealing_state.is_empty() => d.deal.sealing_state.clone(),
        (checkpoint, ..) => checkpoint.into(),
    }
}

fn table(deals: &[DealRow]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "DEAL", "CLIENT", "PIECE", "SIZE", "SOURCE", "STATE", "SECTOR", "MESSAGE",
    ]);
    for d in deals {
        table.add_row([
            d.deal.id.clone(),
            short(&d.deal.client),
            short(&d.deal.piece_cid),
            HumanBytes(d.deal.raw_size).to_string(),
            d.source.clone(),
            state(d),
            d.deal.sector.map_or_else(|| "-".into(), |n| n.to_string()),
            d.deal.message.clone(),
        ]);
    }
    table
}

/// `storage-deals status`.
#[derive(Debug, clap::Args)]
pub(crate) struct Status {
    #[command(flatten)]
    at: Where,
    /// ULID of the deal, or CLIENT/ULID.
    deal: String,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl Status {
    pub(crate) async fn run(self) -> Result<(), Fault> {
        let detail = Link::new(&self.at)?.detail(&self.deal).await?;
        if self.json {
            println!("{}", json!(detail));
        } else {
            println!("{}", page(&detail));
        }
        Ok(())
    }
}

pub(super) fn moment(unix_ms: u64) -> String {
    i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(
            || "-".into(),
            |at| at.strftime("%Y-%m-%d %H:%M:%S").to_string(),
        )
}

fn page(detail: &DealDetail) -> Table {
    let (row, d) = (&detail.row, &detail.row.deal);
    let number = |n: Option<u64>| n.map_or_else(|| "-".into(), |n| n.to_string());
    let mut t = Table::new();
    t.load_preset(presets::NOTHING);
    for (name, value) in [
        ("deal", d.id.clone()),
        ("client", d.client.clone()),
        ("state", state(row)),
        ("message", d.message.clone()),
        ("piece", d.piece_cid.clone()),
        ("piece, version 2", d.piece_cid_v2.clone()),
        ("piece size", d.piece_size.to_string()),
        ("format", row.format.clone()),
        ("source", row.source.clone()),
        ("downloaded from", detail.urls.join("\n")),
        (
            "received",
            format!("{} of {} bytes", d.received_bytes, d.raw_size),
        ),
        (
            "handed over",
            format!("{} of {} bytes", d.handed_over_bytes, d.raw_size),
        ),
        ("sector", number(d.sector)),
        ("offset", number(d.offset)),
        ("epochs", format!("{} to {}", d.start_epoch, d.end_epoch)),
        ("allocation", number(detail.allocation_id)),
    ] {
        t.add_row([name, &value]);
    }
    for step in &detail.history {
        let what = [&step.checkpoint, &step.sealing_state, &step.reason];
        let what: Vec<&str> = what
            .into_iter()
            .map(String::as_str)
            .filter(|w| !w.is_empty())
            .collect();
        t.add_row([moment(step.unix_ms), what.join(" ")]);
    }
    t
}

/// `storage-deals transfers`.
#[derive(Debug, clap::Args)]
pub(crate) struct Transfers {
    #[command(flatten)]
    at: Where,
    /// Follow them until none is left.
    #[arg(long)]
    watch: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl Transfers {
    pub(crate) async fn run(self) -> Result<(), Fault> {
        let link = Link::new(&self.at)?;
        let bars = MultiProgress::new();
        let style = ProgressStyle::with_template(
            "{prefix} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        let mut shown: Vec<(String, ProgressBar)> = Vec::new();
        loop {
            let query = ListQuery {
                open: true,
                checkpoint: Some("Accepted".into()),
                ..ListQuery::default()
            };
            let mut running = link.all(query).await?;
            running.retain(|d| d.arriving || d.checking || d.deal.received_bytes > 0);
            if !self.watch || self.json {
                if self.json {
                    println!("{}", json!(running));
                } else {
                    println!("{}", transfers(&running));
                }
                if !self.watch {
                    return Ok(());
                }
            } else {
                shown.retain(|(id, bar)| {
                    let stays = running.iter().any(|d| d.deal.id == *id);
                    if !stays {
                        bar.finish_and_clear();
                    }
                    stays
                });
                for d in &running {
                    let known = shown.iter().find(|(id, _)| *id == d.deal.id);
                    let bar = known.map(|(_, bar)| bar.clone()).unwrap_or_else(|| {
                        let bar = bars.add(ProgressBar::new(d.deal.raw_size));
                        bar.set_style(style.clone());
                        bar.set_prefix(d.deal.id.clone());
                        shown.push((d.deal.id.clone(), bar.clone()));
                        bar
                    });
                    bar.set_position(d.deal.received_bytes);
                }
            }
            if running.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
}

fn transfers(running: &[DealRow]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "DEAL",
        "SOURCE",
        "RECEIVED",
        "OF",
        "PER SECOND",
        "SINCE",
        "STATE",
    ]);
    for d in running {
        let rate = match d.transfer_ms {
            0 => "-".into(),
            ms => HumanBytes(d.deal.received_bytes.saturating_mul(1000) / ms).to_string(),
        };
        table.add_row([
            d.deal.id.clone(),
            d.source.clone(),
            HumanBytes(d.deal.received_bytes).to_string(),
            HumanBytes(d.deal.raw_size).to_string(),
            rate,
            HumanDuration(Duration::from_millis(d.transfer_ms)).to_string(),
            state(d),
        ]);
    }
    table
}

/// `storage-deals cancel`.
#[derive(Debug, clap::Args)]
pub(crate) struct Cancel {
    #[command(flatten)]
    at: Where,
    /// ULID of the deal, or CLIENT/ULID.
    deal: String,
    /// What the client is told.
    #[arg(long, default_value = "")]
    reason: String,
}

impl Cancel {
    pub(crate) async fn run(self) -> Result<(), Fault> {
        let body = CancelRequest {
            reason: self.reason,
        };
        let link = Link::new(&self.at)?;
        link.order(&self.deal, "cancel", &body).await?;
        println!("{} is given up; `status` shows when it is", self.deal);
        Ok(())
    }
}

/// `storage-deals retry`.
#[derive(Debug, clap::Args)]
pub(crate) struct Retry {
    #[command(flatten)]
    at: Where,
    /// ULID of the deal, or CLIENT/ULID.
    deal: String,
}

impl Retry {
    pub(crate) async fn run(self) -> Result<(), Fault> {
        let link = Link::new(&self.at)?;
        link.order(&self.deal, "retry", &json!({})).await?;
        println!("{} is tried again", self.deal);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lotus_deals::mk20::DealStatus;

    #[test]
    fn a_table_says_what_a_deal_waits_for() {
        let row = |checkpoint: &str, source: &str| DealRow {
            deal: DealStatus {
                checkpoint: checkpoint.into(),
                client: "t1abjxfbp274xpdqcpuaykwkfb43omjotacm2p3za".into(),
                ..DealStatus::default()
            },
            source: source.into(),
            format: "car".into(),
            any_length: false,
            accepted_unix_ms: 1_700_000_000_000,
            arriving: false,
            checking: false,
            transfer_ms: 0,
        };
        assert_eq!(
            state(&row("Accepted", "offline")),
            "Accepted: waits for import-data"
        );
        assert_eq!(state(&row("Offered", "offline")), "Offered");
        let mut sealing = row("Sealing", "put");
        sealing.deal.sealing_state = "PreCommit1".into();
        assert_eq!(state(&sealing), "PreCommit1");
        let mut busy = row("Accepted", "put");
        busy.arriving = true;
        assert_eq!(state(&busy), "Accepted: bytes arrive");
        let shown = table(&[busy]).to_string();
        assert!(shown.contains("t1abjx…acm2p3za"), "{shown}");
        assert_eq!(moment(1_700_000_000_000), "2023-11-14 22:13:20");
        assert_eq!((short("abc").as_str(), short("é").as_str()), ("abc", "é"));
    }
}
