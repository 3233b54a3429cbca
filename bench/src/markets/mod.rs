//! What the spokes can do, each beside a peer or a limit in the same run.

mod index;

use clap::ValueEnum;
use comfy_table::{Table, presets};
use serde::Serialize;

use crate::Error;

/// Options of `bench markets`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Measure only these
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
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
}

/// What was measured; what was not asked for is left out.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Every measurement that was asked for was made. Whether a target is met is a field of its
    /// own.
    ok: bool,
    #[serde(flatten)]
    index: Option<index::Report>,
}

pub(crate) async fn run(options: Options) -> Result<Report, Error> {
    let asked = |part| options.only.is_empty() || options.only.contains(&part);
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    let mut report = Report {
        ok: false,
        index: None,
    };
    if asked(Part::Index) {
        let index = options.index.clone();
        let measured = tokio::task::spawn_blocking(move || index::run(&index)).await??;
        measured.rows(&mut table);
        report.index = Some(measured);
    }
    eprintln!("{table}");
    report.ok = true;
    Ok(report)
}
