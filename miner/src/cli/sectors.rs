use clap::Subcommand;
use hub_proto::HubClient;
use hub_proto::v1::{GetSectorRequest, ListSectorsRequest, SectorInfo};
use lotus_runtime::Fault;
use serde::Serialize;

use super::cost::{Estimate, Prices, Report, agreed};
use super::on_chain::OnChain;
use super::sectors_act::{ActCommand, run};
use super::{
    Cx, bytes, from_status, print, print_json, sectors_compact, sectors_expired, sectors_extend,
    table, time,
};
use crate::api::MAX_PAGE;
use crate::control::{self, Opened};

#[derive(Debug, Subcommand)]
pub(super) enum SectorsCommand {
    /// List all sectors
    List,
    /// Show one sector
    Status {
        /// Its number
        number: u64,
        /// With its history
        #[arg(long)]
        log: bool,
        /// With what the chain has of it: weights, pledge, ends, its deadline
        #[arg(long)]
        on_chain_info: bool,
    },
    /// Begin to seal a sector that waits for more pieces
    ///
    /// Without --really-do-it: show what it costs.
    Seal {
        /// Its number
        number: u64,
        /// Seal it
        #[arg(long)]
        really_do_it: bool,
    },
    /// Seal sectors without pieces: committed capacity
    ///
    /// Each takes a deposit, and a pledge until it ends. It can take deals later, as an upgrade
    /// (snap deal), which is faster than a new sector. Without --really-do-it: show what they cost.
    Pledge {
        /// How many
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
        count: u16,
        /// Seal them
        #[arg(long)]
        really_do_it: bool,
    },
    /// Let sectors live longer: shows which, until when, and the cost
    Extend(sectors_extend::ExtendArgs),
    Expired(sectors_expired::ExpiredArgs),
    /// Drop what the chain knows of ended sectors, and move the rest of their partitions together
    CompactPartitions(sectors_compact::CompactArgs),
    #[command(flatten)]
    Act(ActCommand),
}

/// A sector as `--json` prints it.
#[derive(Serialize)]
struct Sector {
    number: u64,
    state: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<f64>,
    pieces: Vec<Piece>,
    pre_commit_cid: String,
    commit_cid: String,
    comm_d: String,
    comm_r: String,
    activation: i64,
    expiration: i64,
    last_error: String,
    next_retry_unix_ms: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    log: Vec<Entry>,
}

#[derive(Serialize)]
struct WithChain {
    #[serde(flatten)]
    sector: Sector,
    /// `null`: not on chain.
    on_chain: Option<OnChain>,
}

#[derive(Serialize)]
struct Piece {
    piece_cid: String,
    piece_size: u64,
    offset: u64,
    deal: String,
}

#[derive(Serialize)]
struct Entry {
    unix_ms: u64,
    event: String,
    from: String,
    to: String,
    message: String,
}

impl From<SectorInfo> for Sector {
    fn from(s: SectorInfo) -> Self {
        Self {
            number: s.number,
            state: s.state,
            progress: s.progress,
            pieces: s
                .pieces
                .into_iter()
                .map(|p| Piece {
                    piece_cid: p.piece_cid,
                    piece_size: p.piece_size,
                    offset: p.offset,
                    deal: p
                        .key
                        .map(|k| format!("{}/{}", k.client, k.id))
                        .unwrap_or_default(),
                })
                .collect(),
            pre_commit_cid: s.pre_commit_cid,
            commit_cid: s.commit_cid,
            comm_d: s.comm_d,
            comm_r: s.comm_r,
            activation: s.activation,
            expiration: s.expiration,
            last_error: s.last_error,
            next_retry_unix_ms: s.next_retry_unix_ms,
            log: s
                .log
                .into_iter()
                .map(|e| Entry {
                    unix_ms: e.unix_ms,
                    event: e.event,
                    from: e.from,
                    to: e.to,
                    message: e.message,
                })
                .collect(),
        }
    }
}

pub(super) async fn sectors(cx: &Cx, command: SectorsCommand) -> Result<(), Fault> {
    match command {
        SectorsCommand::List => list(cx).await,
        SectorsCommand::Extend(args) => sectors_extend::extend(cx, args).await,
        SectorsCommand::CompactPartitions(args) => sectors_compact::compact(cx, args).await,
        SectorsCommand::Expired(args) => sectors_expired::expired(cx, args).await,
        SectorsCommand::Status {
            number,
            log,
            on_chain_info,
        } => status(cx, number, log, on_chain_info).await,
        SectorsCommand::Seal {
            number,
            really_do_it,
        } => {
            let estimate = Prices::of(cx).await?.sealed();
            let path = format!("/v1/sectors/{number}/seal");
            spend_on(cx, &estimate, &path, "is being sealed", really_do_it).await
        }
        SectorsCommand::Pledge {
            count,
            really_do_it,
        } => pledge(cx, count, really_do_it).await,
        SectorsCommand::Act(command) => run(cx, command).await,
    }
}

/// Seals sectors without pieces, after showing what they cost.
async fn pledge(cx: &Cx, count: u16, really: bool) -> Result<(), Fault> {
    let estimate = Prices::of(cx).await?.pledged(count.into());
    let what = format!("{count} sectors without data");
    if !agreed(cx, &what, &estimate, really)? {
        return Ok(());
    }
    let socket = cx.control_socket()?;
    let mut sectors = Vec::new();
    let mut end = Ok(());
    while end.is_ok() && sectors.len() < usize::from(count) {
        let path = "/v1/sectors/pledge";
        match control::call::<Opened>(&socket, reqwest::Method::POST, path).await {
            Ok(opened) => {
                sectors.push(opened.sector);
                if !cx.json {
                    being(opened.sector, "is being sealed")?;
                }
            }
            Err(e) => {
                let (message, fix) = (e.message, e.fix);
                end = Err(Fault::new(
                    e.kind,
                    format!("{} of {count} sectors are begun: {message}", sectors.len()),
                    format!("{fix}; see `lotus-miner sectors list` before you pledge the rest"),
                ));
            }
        }
    }
    if cx.json {
        print_json(&Report {
            estimate: &estimate,
            done: end.is_ok(),
            what: serde_json::json!({ "sectors": sectors }),
        })?;
    }
    end
}

/// Does what is asked of a sector, after showing what it costs.
pub(super) async fn spend_on(
    cx: &Cx,
    estimate: &Estimate,
    path: &str,
    what: &str,
    really: bool,
) -> Result<(), Fault> {
    if !agreed(cx, "Cost", estimate, really)? {
        return Ok(());
    }
    let socket = cx.control_socket()?;
    let opened: Opened = control::call(&socket, reqwest::Method::POST, path).await?;
    if cx.json {
        return print_json(&Report {
            estimate,
            done: true,
            what: opened,
        });
    }
    being(opened.sector, what)
}

pub(super) fn being(sector: u64, what: &str) -> Result<(), Fault> {
    print(&format!(
        "sector {sector} {what}; watch it with `lotus-miner sectors status {sector}`"
    ))
}

pub(super) async fn act(cx: &Cx, path: &str, what: &str) -> Result<(), Fault> {
    let socket = cx.control_socket()?;
    let opened: Opened = control::call(&socket, reqwest::Method::POST, path).await?;
    if cx.json {
        return print_json(&opened);
    }
    being(opened.sector, what)
}

/// Every sector of the hub.
pub(super) async fn all(hub: &HubClient) -> Result<Vec<SectorInfo>, Fault> {
    let mut sectors: Vec<SectorInfo> = Vec::new();
    loop {
        let request = hub.request(ListSectorsRequest {
            after: sectors.last().map(|s| s.number),
            limit: MAX_PAGE,
        });
        let page = hub
            .sectors()
            .list(request)
            .await
            .map_err(from_status)?
            .into_inner()
            .sectors;
        if page.is_empty() {
            return Ok(sectors);
        }
        sectors.extend(page);
    }
}

async fn list(cx: &Cx) -> Result<(), Fault> {
    let sectors = all(&cx.hub().await?).await?;
    if cx.json {
        return print_json(&sectors.into_iter().map(Sector::from).collect::<Vec<_>>());
    }
    if sectors.is_empty() {
        return print("no sectors yet: make a deal, or run `lotus-miner sectors pledge`");
    }
    let mut table = table(&[
        "Sector",
        "State",
        "Pieces",
        "Data",
        "Activation",
        "Expiration",
        "Trouble",
    ]);
    for s in sectors {
        let data: u64 = s.pieces.iter().map(|p| p.piece_size).sum();
        table.add_row([
            s.number.to_string(),
            state(&s),
            s.pieces.len().to_string(),
            bytes(data),
            epoch(s.activation),
            epoch(s.expiration),
            s.last_error,
        ]);
    }
    print(&table.to_string())
}

async fn status(cx: &Cx, number: u64, log: bool, chain: bool) -> Result<(), Fault> {
    let hub = cx.hub().await?;
    let request = hub.request(GetSectorRequest { number, log });
    let s = hub
        .sectors()
        .get(request)
        .await
        .map_err(from_status)?
        .into_inner();
    let chain = match chain {
        true => Some(OnChain::of(cx, number).await?),
        false => None,
    };
    if cx.json {
        let sector = Sector::from(s);
        return match chain {
            Some(on_chain) => print_json(&WithChain { sector, on_chain }),
            None => print_json(&sector),
        };
    }
    let mut out = table(&["Sector", &s.number.to_string()]);
    let retry = match s.next_retry_unix_ms {
        0 => String::new(),
        at => time(at),
    };
    for (name, value) in [
        ("State", state(&s)),
        ("Pre-commit message", s.pre_commit_cid.clone()),
        ("Prove-commit message", s.commit_cid.clone()),
        ("CommD", s.comm_d.clone()),
        ("CommR", s.comm_r.clone()),
        ("Activation", epoch(s.activation)),
        ("Expiration", epoch(s.expiration)),
        ("Trouble", s.last_error.clone()),
        ("Next try", retry),
    ] {
        if !value.is_empty() {
            out.add_row([name, value.as_str()]);
        }
    }
    match chain {
        Some(Some(on_chain)) => {
            for (name, value) in on_chain.rows() {
                out.add_row([format!("On chain: {name}"), value]);
            }
        }
        Some(None) => {
            out.add_row(["On chain", "no"]);
        }
        None => {}
    }
    let mut text = out.to_string();
    if !s.pieces.is_empty() {
        let mut pieces = table(&["Piece", "Size", "Offset", "Deal"]);
        for p in &s.pieces {
            pieces.add_row([
                p.piece_cid.clone(),
                bytes(p.piece_size),
                p.offset.to_string(),
                p.key.as_ref().map(|k| k.id.clone()).unwrap_or_default(),
            ]);
        }
        text = format!("{text}\n{pieces}");
    }
    if log {
        let mut entries = table(&["Time (UTC)", "Event", "From", "To", "Note"]);
        for e in &s.log {
            entries.add_row([
                time(e.unix_ms),
                e.event.clone(),
                e.from.clone(),
                e.to.clone(),
                e.message.clone(),
            ]);
        }
        text = format!("{text}\n{entries}");
    }
    print(&text)
}

fn state(s: &SectorInfo) -> String {
    match s.progress {
        Some(p) => format!("{} {:.0} %", s.state, p * 100.0),
        None => s.state.clone(),
    }
}

fn epoch(e: i64) -> String {
    if e == 0 { String::new() } else { e.to_string() }
}
