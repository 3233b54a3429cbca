//! A CAR of a whole DAG from the gateway beside frisbii with the same CAR: bytes for a second of
//! the server's processor time, in turns. Ours verifies each block that it sends; frisbii trusts
//! its file.

use std::net::SocketAddr;
use std::time::Duration;

use comfy_table::Table;
use lotus_e2e::{Failed, secs};
use serde::Serialize;

use super::served::Served;
use super::{float, target};
use crate::{median, ratio};

/// Issue: bytes for a second, ours by theirs.
const TARGET: f64 = 2.0;
/// What installs frisbii. `go install` refuses a module that excludes others, as it does.
const NO_FRISBII: &str = "frisbii is not on the PATH: git clone --branch v0.10.1 \
     https://github.com/ipld/frisbii && cd frisbii && go build -o /usr/local/bin/ ./cmd/frisbii";

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Bytes of the CAR.
    car_bytes: u64,
    /// Bytes for a second of processor time: median of all rounds.
    car_bytes_per_cpu_s: f64,
    frisbii_bytes_per_cpu_s: Option<f64>,
    /// Ours by theirs, median of the pairs.
    car_vs_frisbii: Option<f64>,
    /// Whether that is at least 2.
    car_target_met: Option<bool>,
}

impl Report {
    pub(crate) fn rows(&self, table: &mut Table) {
        let beside = match (self.car_vs_frisbii, self.frisbii_bytes_per_cpu_s) {
            (Some(vs), Some(theirs)) => format!("{vs:.2} times frisbii, {:.0} MB", theirs / 1e6),
            _ => "frisbii: not measured".to_owned(),
        };
        table.add_row([
            "CAR of a whole DAG".to_owned(),
            format!(
                "{:.0} MB per second of processor time",
                self.car_bytes_per_cpu_s / 1e6
            ),
            beside + &target(&format!("at least {TARGET}"), self.car_target_met),
        ]);
    }
}

pub(super) async fn run(
    served: &Served,
    rounds: u32,
    skipped: &mut super::Skipped,
) -> Result<Report, Failed> {
    let frisbii = served.frisbii()?;
    if frisbii.is_none() {
        skipped.insert("frisbii", NO_FRISBII.to_owned());
    }
    let http = lotus_runtime::http_client()
        .timeout(secs(300))
        .build()
        .map_err(|e| Failed::at("HTTP client", e))?;
    let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    // In the first round both fill their caches.
    for round in 0..=rounds {
        let own = || served.processor_time();
        let us = per_second(&http, served, served.addr(), own).await?;
        let them = match &frisbii {
            Some(f) => Some(per_second(&http, served, f.addr, || f.processor_time()).await?),
            None => None,
        };
        let shown = them.map(|t| t / 1e6);
        eprintln!(
            "CAR, round {round}: {:.0} MB, frisbii {shown:.0?}",
            us / 1e6
        );
        if round == 0 {
            continue;
        }
        ours.push(us);
        if let Some(them) = them {
            theirs.push(them);
            ratios.push(ratio("CAR", us, them)?);
        }
    }
    let some = |all: &[f64]| (!all.is_empty()).then(|| median(all));
    let vs = some(&ratios);
    Ok(Report {
        car_bytes: served.car_len,
        car_bytes_per_cpu_s: median(&ours),
        frisbii_bytes_per_cpu_s: some(&theirs),
        car_vs_frisbii: vs,
        car_target_met: vs.map(|r| r >= TARGET),
    })
}

/// Bytes of the whole DAG's CAR for a second of the server's processor time.
async fn per_second(
    http: &reqwest::Client,
    served: &Served,
    to: SocketAddr,
    processor: impl Fn() -> Result<Duration, Failed>,
) -> Result<f64, Failed> {
    let url = format!("http://{to}/ipfs/{}?format=car&dag-scope=all", served.root);
    let failed = |e| Failed::at(&url, e);
    let before = processor()?;
    let mut answer = http
        .get(&url)
        .header("accept", "application/vnd.ipld.car")
        .send()
        .await
        .and_then(reqwest::Response::error_for_status)
        .map_err(failed)?;
    let mut bytes = 0;
    while let Some(chunk) = answer.chunk().await.map_err(failed)? {
        bytes += chunk.len() as u64;
    }
    let took = processor()?.saturating_sub(before);
    // The same blocks, and a header of the same root.
    if bytes != served.car_len {
        return Err(Failed(format!(
            "{url}: {bytes} bytes, not the {} of the CAR",
            served.car_len
        )));
    }
    ratio("CAR", float(bytes), took.as_secs_f64())
}
