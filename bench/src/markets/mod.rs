//! What the spokes can do, each beside a peer or a limit in the same run.

mod car;
mod client;
mod commp;
mod first_byte;
mod index;
mod piece;
mod served;
mod server;

use std::collections::BTreeMap;

use clap::ValueEnum;
use comfy_table::{Table, presets};
use serde::Serialize;

use crate::Error;
use index::float;
use served::Served;
pub(crate) use server::processor_time;

/// Options of `bench markets`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Measure only these
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Rounds of everything but the index, after one that does not count
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Megabytes of the DAG that is served. Disk is needed for three times as much
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(32..=10_000))]
    served_megabytes: u32,
    #[command(flatten)]
    index: index::Options,
    /// Print one JSON object as the last line of standard output
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The index of multihashes against redb and an LSM store
    Index,
    /// Ranges of a piece against nginx
    Piece,
    /// A CAR of a whole DAG against frisbii
    Car,
    /// commP against plain SHA-256 and stream-commp
    Commp,
    /// The first byte for 256 clients against nginx
    FirstByte,
}

/// What was not measured, and why.
type Skipped = BTreeMap<&'static str, String>;

/// What was measured; what was not asked for is left out.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    /// Every measurement that was asked for was made, but for peers that are not installed.
    /// Whether a target is met is a field of its own.
    ok: bool,
    #[serde(flatten)]
    index: Option<index::Report>,
    #[serde(flatten)]
    piece: Option<piece::Report>,
    #[serde(flatten)]
    car: Option<car::Report>,
    #[serde(flatten)]
    commp: Option<commp::Report>,
    #[serde(flatten)]
    first_byte: Option<first_byte::Report>,
    /// Peers that are not installed; their figures are null.
    skipped: Skipped,
}

pub(crate) async fn run(options: Options) -> Result<Report, Error> {
    let asked = |part| options.only.is_empty() || options.only.contains(&part);
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    let mut report = Report::default();
    let (rounds, skipped) = (options.rounds, &mut report.skipped);
    if asked(Part::Index) {
        let index = options.index.clone();
        let measured = tokio::task::spawn_blocking(move || index::run(&index)).await??;
        measured.rows(&mut table);
        report.index = Some(measured);
    }
    if asked(Part::Commp) {
        let measured = tokio::task::block_in_place(|| commp::run(rounds, skipped))?;
        measured.rows(&mut table);
        report.commp = Some(measured);
    }
    if [Part::Piece, Part::Car, Part::FirstByte]
        .into_iter()
        .any(asked)
    {
        let served = Served::start(options.served_megabytes).await?;
        if asked(Part::Piece) {
            let measured = piece::run(&served, rounds, skipped).await?;
            measured.rows(&mut table);
            report.piece = Some(measured);
        }
        if asked(Part::Car) {
            let measured = car::run(&served, rounds, skipped).await?;
            measured.rows(&mut table);
            report.car = Some(measured);
        }
        if asked(Part::FirstByte) {
            let measured = first_byte::run(&served, rounds, skipped).await?;
            measured.rows(&mut table);
            report.first_byte = Some(measured);
        }
        served.stop().await?;
    }
    eprintln!("{table}");
    for (what, why) in &report.skipped {
        eprintln!("SKIPPED: {what}: {why}");
    }
    report.ok = true;
    Ok(report)
}

/// The end of a row whose figure has a target.
fn target(target: &str, met: Option<bool>) -> String {
    match met {
        Some(true) => format!("; target {target}: met"),
        Some(false) => format!("; target {target}: MISSED"),
        None => String::new(),
    }
}
