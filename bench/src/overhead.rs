//! What the hub adds to the proof library: sectors without data, sealed by calling the library
//! here and by a hub with its journal and its workers, in turns.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use comfy_table::Table;
use lotus_e2e::{Failed, Net, NetConfig, secs};
use lotus_proofs::{Prover as _, SealingSector, Vanilla};
use lotus_types::{ActorId, SectorId, SectorNumber, SectorSize};
use serde::{Deserialize, Serialize};

use crate::{median, ratio};

const SIZE: SectorSize = SectorSize::S8MiB;
/// The hub may take so many times as long as the library.
const TARGET: f64 = 1.03;
/// States in which the hub does what is done here with the library, and nothing waits for the
/// chain.
const STEPS: [&str; 5] = [
    "AddPiece",
    "PreCommit1",
    "PreCommit2",
    "Committing",
    "FinalizeSector",
];
/// Rarely, because asking takes CPU time too.
const POLL: Duration = secs(2);
/// Longest that the hub may take for one sector, the chain's time included.
const LIMIT: Duration = secs(600);

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Seconds that the hub takes to seal, by those of the library: the median of all rounds.
    overhead_ratio: f64,
    overhead_target: f64,
    overhead_target_met: bool,
    /// Each round.
    hub_seconds: Vec<f64>,
    library_seconds: Vec<f64>,
    /// Medians by state: the hub's seconds, the library's.
    step_seconds: BTreeMap<&'static str, (f64, f64)>,
}

impl Report {
    pub(crate) fn rows(&self, table: &mut Table) {
        table.add_row([
            "8 MiB sector, hub by library".to_owned(),
            format!("{:.3}", self.overhead_ratio),
            format!(
                "target {TARGET}: {}",
                if self.overhead_target_met {
                    "met"
                } else {
                    "MISSED"
                }
            ),
        ]);
        for (state, (hub, library)) in &self.step_seconds {
            table.add_row([
                format!("  {state}"),
                format!("{hub:.2} s"),
                format!("library {library:.2} s"),
            ]);
        }
    }
}

pub(crate) async fn run(rounds: u32) -> Result<Report, Failed> {
    let net = Net::start(&config()).await?;
    net.ready(secs(120)).await?;
    let (mut hub, mut library, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    // In the first round both fill their caches.
    for round in 0..=rounds {
        let (h, l) = if round % 2 == 0 {
            let l = with_library(&net, round).await?;
            (with_hub(&net).await?, l)
        } else {
            let h = with_hub(&net).await?;
            (h, with_library(&net, round).await?)
        };
        let (all_h, all_l) = (h.iter().sum::<f64>(), l.iter().sum::<f64>());
        eprintln!("round {round}: hub {all_h:.2} s, library {all_l:.2} s");
        if round > 0 {
            ratios.push(ratio("overhead", all_h, all_l)?);
            hub.push(h);
            library.push(l);
        }
    }
    net.stop().await?;
    let overhead_ratio = ratio("overhead", median(&ratios), 1.0)?;
    let of = |all: &[[f64; 5]], i: usize| median(&all.iter().map(|s| s[i]).collect::<Vec<_>>());
    let each = |all: &[[f64; 5]]| all.iter().map(|s| s.iter().sum()).collect();
    Ok(Report {
        overhead_ratio,
        overhead_target: TARGET,
        overhead_target_met: overhead_ratio <= TARGET,
        step_seconds: STEPS
            .iter()
            .enumerate()
            .map(|(i, state)| (*state, (of(&hub, i), of(&library, i))))
            .collect(),
        hub_seconds: each(&hub),
        library_seconds: each(&library),
    })
}

/// A provider without spokes. Its deadlines are long, so that no WindowPoSt and no election takes
/// CPU time from what is measured; its workers have the priority that this process has.
fn config() -> NetConfig {
    let mut cfg = NetConfig {
        devnet_args: "--listen 127.0.0.1:0 --sector-size 8MiB --block-time-ms 500 \
                      --deadlines 48 --deadline-epochs 600"
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
        services: Vec::new(),
        ..NetConfig::default()
    };
    let nice = "LOTUS_MINER__WORKERS__SEAL_NICE";
    cfg.hub_env.insert(nice.into(), "0".into());
    cfg
}

/// Seals a sector by calling the library. Returns the seconds of each step.
async fn with_library(net: &Net, round: u32) -> Result<[f64; 5], Failed> {
    let dir = net.root().join(format!("library-{round}"));
    let work = move || {
        std::fs::create_dir_all(dir.join("cache"))?;
        // What was written before is not written now.
        nix::unistd::sync();
        let took = call_library(&dir, u64::from(round))?;
        std::fs::remove_dir_all(dir)?;
        Ok::<_, Failed>(took)
    };
    let work = tokio::task::spawn_blocking(work);
    work.await.map_err(|e| Failed::at("sealing", e))?
}

fn call_library(dir: &Path, number: u64) -> Result<[f64; 5], Failed> {
    let (unsealed, sealed, cache) = (dir.join("unsealed"), dir.join("sealed"), dir.join("cache"));
    let (ticket, seed) = ([1; 32], [2; 32]);
    let sector = SealingSector {
        id: SectorId {
            miner: ActorId(1000),
            number: SectorNumber(number),
        },
        size: SIZE,
    };
    let layout = lotus_proofs::layout(SIZE, &[]).map_err(|e| Failed::at("layout", e))?;
    let failed = |e| Failed::at("proof library", e);
    let start = Instant::now();
    lotus_proofs::add_pieces(&unsealed, SIZE, &layout, &mut |_| {
        Err(std::io::Error::other("there are no pieces"))
    })
    .map_err(failed)?;
    let added = Instant::now();
    let labels = Vanilla
        .pre_commit1(&sector, &ticket, &layout, &unsealed, &sealed, &cache)
        .map_err(failed)?;
    let labelled = Instant::now();
    let commitments = Vanilla
        .pre_commit2(&sector, &labels, &sealed, &cache)
        .map_err(failed)?;
    let encoded = Instant::now();
    Vanilla
        .commit(
            &sector,
            &ticket,
            &seed,
            &layout,
            &commitments,
            &sealed,
            &cache,
        )
        .map_err(failed)?;
    let proved = Instant::now();
    Vanilla.finalize(&sector, &cache).map_err(failed)?;
    let ends = [start, added, labelled, encoded, proved, Instant::now()];
    Ok(std::array::from_fn(|i| {
        (ends[i + 1] - ends[i]).as_secs_f64()
    }))
}

#[derive(Deserialize)]
struct Opened {
    sectors: [u64; 1],
}

/// A sector of `lotus-miner sectors status --log --json`.
#[derive(Debug, Deserialize)]
struct Status {
    state: String,
    log: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    unix_ms: u64,
    to: String,
}

/// Has the hub seal a sector. Returns the seconds that it spent in each state.
async fn with_hub(net: &Net) -> Result<[f64; 5], Failed> {
    nix::unistd::sync();
    let repo = net.root().join("miner").display().to_string();
    let pledge = [
        "sectors",
        "pledge",
        "--really-do-it",
        "--json",
        "--repo",
        &repo,
    ];
    let out = net.run("lotus-miner", &pledge).await?;
    let opened: Opened = serde_json::from_str(&out).map_err(|e| Failed::at("pledge", e))?;
    let [number] = opened.sectors.map(|n| n.to_string());
    let ask = [
        "sectors", "status", &number, "--log", "--json", "--repo", &repo,
    ];
    let end = Instant::now() + LIMIT;
    loop {
        tokio::time::sleep(POLL).await;
        let out = net.run("lotus-miner", &ask).await?;
        let now: Status = serde_json::from_str(&out).map_err(|e| Failed::at("status", e))?;
        if ["Proving", "Available"].contains(&now.state.as_str()) {
            return seconds_in(&now.log).map_err(Failed);
        }
        if Instant::now() >= end {
            let logs = net.logs();
            return Err(Failed(format!(
                "after {LIMIT:?} sector {number} is in {}\n{logs}",
                now.state
            )));
        }
    }
}

/// Seconds that a sector was in each of [`STEPS`], which it must have come through once.
fn seconds_in(log: &[Entry]) -> Result<[f64; 5], String> {
    let mut took = [f64::NAN; 5];
    for (slot, state) in took.iter_mut().zip(STEPS) {
        let enters = |i: usize| log[i].to == state && (i == 0 || log[i - 1].to != state);
        let mut entered = (0..log.len()).filter(|i| enters(*i));
        let (Some(from), None) = (entered.next(), entered.next()) else {
            return Err(format!("the sector was not in {state} just once: {log:?}"));
        };
        let left = log[from..].iter().find(|e| e.to != state);
        let left = left.ok_or_else(|| format!("the sector is still in {state}"))?;
        *slot = Duration::from_millis(left.unix_ms.saturating_sub(log[from].unix_ms)).as_secs_f64();
    }
    Ok(took)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_tells_how_long_each_state_took() {
        let log = |states: &[&str]| -> Vec<Entry> {
            (0..)
                .zip(states)
                .map(|(i, to)| Entry {
                    unix_ms: 1_000 * i * i,
                    to: (*to).into(),
                })
                .collect()
        };
        let good = [
            "AddPiece",
            "PreCommit1",
            "PreCommit2",
            "PreCommit2",
            "Committing",
            "FinalizeSector",
            "Proving",
        ];
        let took = seconds_in(&log(&good));
        assert_eq!(took, Ok([1.0, 3.0, 12.0, 9.0, 11.0]));
        assert!(seconds_in(&log(&good[..6])).is_err(), "not finished");
        let mut twice = good.to_vec();
        twice.insert(5, "PreCommit1");
        assert!(seconds_in(&log(&twice)).is_err());
        assert!(seconds_in(&[]).is_err());
    }
}
