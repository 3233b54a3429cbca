//! `/piece` in ranges beside nginx with the same file: processor time of the server for a
//! gigabyte that it sends, in turns.

use std::net::SocketAddr;
use std::time::Duration;

use comfy_table::Table;
use lotus_e2e::Failed;
use serde::Serialize;

use super::client::{Ask, closed_loop};
use super::float;
use super::served::{NO_NGINX, Served};
use super::server::Server;
use crate::{median, ratio};

/// Issue: ours by nginx's.
const TARGET: f64 = 1.1;
/// Bytes that a server sends in a round.
const ROUND: u64 = 4 << 30;
/// Ways to ask, of which the first has the target. What sending costs depends on how many take it
/// and how often they ask.
const WAYS: [Way; 3] = [
    Way {
        clients: 8,
        range: 16 << 20,
    },
    Way {
        clients: 8,
        range: 1 << 20,
    },
    Way {
        clients: 1,
        range: 16 << 20,
    },
];

/// How clients ask.
#[derive(Clone, Copy, Debug, Serialize)]
struct Way {
    clients: usize,
    /// Bytes of each range.
    range: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Ours by nginx's for 8 clients that ask for 16 MiB at a time.
    piece_vs_nginx_cpu: Option<f64>,
    /// Whether that is at most 1.1.
    piece_target_met: Option<bool>,
    /// That and other ways to ask.
    piece: Vec<Measured>,
}

/// What one way was measured at.
#[derive(Debug, Serialize)]
struct Measured {
    #[serde(flatten)]
    way: Way,
    /// Seconds of processor time for 1,000,000,000 bytes: median of all rounds.
    cpu_s_per_gb: f64,
    nginx_cpu_s_per_gb: Option<f64>,
    /// Ours by nginx's, median of the pairs.
    vs_nginx_cpu: Option<f64>,
}

impl Report {
    pub(crate) fn rows(&self, table: &mut Table) {
        let mut met = self.piece_target_met;
        for m in &self.piece {
            let beside = match (m.vs_nginx_cpu, m.nginx_cpu_s_per_gb) {
                (Some(vs), Some(theirs)) => format!("{vs:.2} times nginx, {theirs:.3}"),
                _ => "nginx: not measured".to_owned(),
            };
            let (clients, mib) = (m.way.clients, m.way.range >> 20);
            table.add_row([
                format!("/piece: ranges of {mib} MiB, {clients} at once"),
                format!("{:.3} s of processor time per GB", m.cpu_s_per_gb),
                beside + &super::target(&format!("at most {TARGET}"), met.take()),
            ]);
        }
    }
}

pub(super) async fn run(
    served: &Served,
    rounds: u32,
    skipped: &mut super::Skipped,
) -> Result<Report, Failed> {
    let nginx = served.nginx()?;
    if nginx.is_none() {
        skipped.insert("nginx", NO_NGINX.to_owned());
    }
    let mut piece = Vec::new();
    for way in WAYS {
        piece.push(measure(served, nginx.as_ref(), rounds, way).await?);
    }
    let vs = piece.first().and_then(|m| m.vs_nginx_cpu);
    Ok(Report {
        piece_vs_nginx_cpu: vs,
        piece_target_met: vs.map(|r| r <= TARGET),
        piece,
    })
}

async fn measure(
    served: &Served,
    nginx: Option<&Server>,
    rounds: u32,
    way: Way,
) -> Result<Measured, Failed> {
    let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    // In the first round both fill their caches.
    for round in 0..=rounds {
        let own = || served.processor_time();
        let us = seconds(served, served.addr(), &served.piece, way, own).await?;
        let them = match nginx {
            Some(n) => Some(seconds(served, n.addr, "/piece", way, || n.processor_time()).await?),
            None => None,
        };
        eprintln!("{way:?}, round {round}: {us:.3} s/GB, nginx {them:.3?}");
        if round == 0 {
            continue;
        }
        ours.push(us);
        if let Some(them) = them {
            theirs.push(them);
            ratios.push(ratio("/piece", us, them)?);
        }
    }
    let some = |all: &[f64]| (!all.is_empty()).then(|| median(all));
    Ok(Measured {
        way,
        cpu_s_per_gb: median(&ours),
        nginx_cpu_s_per_gb: some(&theirs),
        vs_nginx_cpu: some(&ratios),
    })
}

/// Seconds of processor time for a gigabyte that a server sends.
async fn seconds(
    served: &Served,
    to: SocketAddr,
    path: &str,
    Way { clients, range }: Way,
    processor: impl Fn() -> Result<Duration, Failed>,
) -> Result<f64, Failed> {
    let count = |bytes: u64| usize::try_from(bytes / range).map_err(|e| Failed::at("ranges", e));
    // Of the whole length, from one end of the piece to the other.
    let all: Vec<_> = (0..count(served.car_len)?)
        .map(|n| Ask::part(path, &served.range(n, range)))
        .collect();
    if all.is_empty() {
        return Err(Failed(format!("the piece is smaller than {range} bytes")));
    }
    let each = count(ROUND)? / clients;
    let before = processor()?;
    closed_loop(to, clients, each, move |n| all[n % all.len()].clone()).await?;
    let took = processor()?.saturating_sub(before);
    let sent = float((each * clients) as u64 * range);
    ratio("/piece", took.as_secs_f64(), sent / 1e9)
}
