//! The time to the first byte for many clients that ask again as soon as they are answered, beside
//! nginx with the same content, in turns.

use std::net::SocketAddr;
use std::time::Duration;

use comfy_table::Table;
use lotus_e2e::Failed;
use serde::Serialize;

use super::client::{Ask, closed_loop};
use super::index::mix;
use super::served::{BLOCK, NO_NGINX, Served, raw};
use super::server::Server;
use crate::median;

/// Issue: clients at once.
const CLIENTS: usize = 256;
/// Requests of each client in a round.
const EACH: usize = 100;

/// Milliseconds, medians of the rounds.
#[derive(Clone, Copy, Debug, Serialize)]
struct Times {
    p50_ms: f64,
    p99_ms: f64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    first_byte_clients: usize,
    /// Bytes of an answer.
    first_byte_answer_bytes: usize,
    /// Blocks by `/ipfs/{cid}?format=raw`.
    first_byte_block: Times,
    /// Files of the same bytes.
    nginx_first_byte_file: Option<Times>,
    /// Ranges of `/piece/{cid}`.
    first_byte_range: Times,
    /// The same ranges of the same file.
    nginx_first_byte_range: Option<Times>,
}

impl Report {
    pub(crate) fn rows(&self, table: &mut Table) {
        for (name, ours, theirs) in [
            ("blocks", self.first_byte_block, self.nginx_first_byte_file),
            ("ranges", self.first_byte_range, self.nginx_first_byte_range),
        ] {
            let theirs = theirs.map_or_else(
                || "nginx: not measured".to_owned(),
                |t| format!("nginx {:.1} ms, {:.1} ms", t.p50_ms, t.p99_ms),
            );
            table.add_row([
                format!("first byte: {name} of 16 KiB, {CLIENTS} clients"),
                format!("p50 {:.1} ms, p99 {:.1} ms", ours.p50_ms, ours.p99_ms),
                theirs,
            ]);
        }
    }
}

/// Both percentiles of each round.
#[derive(Debug, Default)]
struct Rounds {
    p50: Vec<f64>,
    p99: Vec<f64>,
}

impl Rounds {
    /// Measures one round of a server, if it is there.
    async fn add(
        &mut self,
        counts: bool,
        to: Option<SocketAddr>,
        asks: &[Ask],
    ) -> Result<(), Failed> {
        let Some(to) = to else { return Ok(()) };
        let asks = asks.to_vec();
        let ask = move |n: usize| asks[scattered(n, asks.len())].clone();
        let mut firsts = closed_loop(to, CLIENTS, EACH, ask).await?;
        firsts.sort_unstable();
        if counts {
            self.p50.push(percentile(&firsts, 50));
            self.p99.push(percentile(&firsts, 99));
        }
        Ok(())
    }

    fn times(&self) -> Option<Times> {
        (!self.p50.is_empty()).then(|| Times {
            p50_ms: median(&self.p50),
            p99_ms: median(&self.p99),
        })
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
    let len = BLOCK as u64;
    let blocks: Vec<_> = served.blocks.iter().collect();
    let of_gateway: Vec<_> = blocks.iter().map(|b| Ask::whole(raw(b), len)).collect();
    let of_files: Vec<_> = blocks
        .iter()
        .map(|b| Ask::whole(format!("/{b}"), len))
        .collect();
    let ranges = |path: &str| -> Vec<_> {
        let count = usize::try_from(served.car_len / len).unwrap_or(0);
        (0..count)
            .map(|n| Ask::part(path, &served.range(n, len)))
            .collect()
    };
    let (of_piece, of_car) = (ranges(&served.piece), ranges("/piece"));
    let (us, them) = (served.addr(), nginx.as_ref().map(|n: &Server| n.addr));
    let mut all: [Rounds; 4] = Default::default();
    // In the first round all fill their caches.
    for round in 0..=rounds {
        let counts = round > 0;
        all[0].add(counts, Some(us), &of_gateway).await?;
        all[1].add(counts, them, &of_files).await?;
        all[2].add(counts, Some(us), &of_piece).await?;
        all[3].add(counts, them, &of_car).await?;
        eprintln!("first byte: round {round} of {rounds}");
    }
    let [block, file, range, their_range] = all.map(|r| r.times());
    let none = || Failed::new("no round counted");
    Ok(Report {
        first_byte_clients: CLIENTS,
        first_byte_answer_bytes: BLOCK,
        first_byte_block: block.ok_or_else(none)?,
        nginx_first_byte_file: file,
        first_byte_range: range.ok_or_else(none)?,
        nginx_first_byte_range: their_range,
    })
}

/// The `n`th of numbers below this that look like chance.
fn scattered(n: usize, below: usize) -> usize {
    usize::try_from(mix(n as u64)).unwrap_or(n) % below.max(1)
}

/// Milliseconds that so many of a hundred are at most.
fn percentile(sorted: &[Duration], of_hundred: usize) -> f64 {
    let at = (sorted.len() * of_hundred / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).map_or(f64::NAN, |d| d.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_what_was_measured() {
        let sorted: Vec<_> = (1..=200).map(Duration::from_millis).collect();
        assert!((percentile(&sorted, 50) - 101.0).abs() < 1e-9);
        assert!((percentile(&sorted, 99) - 199.0).abs() < 1e-9);
        assert!(percentile(&[], 50).is_nan());
        assert!((0..9).all(|n| scattered(n, 3) < 3));
    }
}
