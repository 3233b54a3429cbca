use std::path::Path;
use std::time::Duration;

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use lotus_proofs::params::{self, Circuit, Origin, ParamSet, Progress};
use lotus_runtime::Fault;
use lotus_types::SectorSize;
use serde::Serialize;

use super::{Cx, bytes, print, print_json, table};
use crate::config::MinerConfig;
use crate::network::from_proofs;
use crate::repo::Repo;

#[derive(Debug, Subcommand)]
pub(super) enum ParamsCommand {
    /// List the files that a sector size needs, and which of them are there
    List(Which),
    /// Read the files whole, and tell whether they are the published ones or made here
    ///
    /// Fails when one is missing or is neither. Takes a second per gigabyte and more; those of
    /// 32 GiB sectors have a hundred.
    Verify(Which),
    /// Make the missing files of 2 KiB sectors, for a devnet on this machine
    ///
    /// Measured on two cores: WindowPoSt 6 s, WinningPoSt 25 s, PoRep 11 minutes, 5 GB of memory
    /// and a file of 1.1 GB; aggregates 1 s; the update, with PoRep beside other work, 24 minutes
    /// and a file of 656 MB. With --post-only, half a minute and 59 MB. It may be killed and run
    /// again. Proofs by these parameters hold nowhere else: networks use published ones, which
    /// `lotus fetch-params` fetches.
    Generate(Which),
}

#[derive(Debug, clap::Args)]
pub(super) struct Which {
    /// 2KiB, 8MiB, 512MiB, 32GiB or 64GiB. Without it, that of the repo, else 2KiB
    #[arg(long, value_name = "SIZE")]
    sector_size: Option<SectorSize>,
    /// Only those of WindowPoSt and WinningPoSt: what proofs.mode = "groth16-post" needs
    #[arg(long)]
    post_only: bool,
}

/// A row of the list.
#[derive(Serialize)]
struct Row {
    circuit: Circuit,
    file: String,
    /// Nothing where it is missing.
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    origin: Option<Origin>,
}

#[derive(Serialize)]
struct Report {
    folder: String,
    sector_size: SectorSize,
    files: Vec<Row>,
}

/// Works without a running hub, and without a repo.
pub(super) fn params(cx: &Cx, command: &ParamsCommand) -> Result<(), Fault> {
    let (ParamsCommand::List(which)
    | ParamsCommand::Verify(which)
    | ParamsCommand::Generate(which)) = command;
    let size = match which.sector_size {
        Some(size) => size,
        None => of_repo(&cx.repo()?)?,
    };
    let circuits: &[Circuit] = if which.post_only {
        &Circuit::POST
    } else {
        &Circuit::ALL
    };
    let dir = params::folder();
    if matches!(command, ParamsCommand::Generate(_)) {
        generate(&dir, size, circuits)?;
    }
    let sets = params::sets(&dir, circuits, size).map_err(|e| from_proofs(&e))?;
    let mut files = Vec::new();
    for set in &sets {
        let origin = if matches!(command, ParamsCommand::List(_)) {
            None
        } else {
            Some(verified(set)?)
        };
        for path in set.files() {
            files.push(Row {
                circuit: set.circuit,
                file: path.display().to_string(),
                bytes: path.metadata().ok().map(|m| m.len()),
                origin,
            });
        }
    }
    let report = Report {
        folder: dir.display().to_string(),
        sector_size: size,
        files,
    };
    if cx.json {
        return print_json(&report);
    }
    let mut out = table(&["For", "File", "Size", ""]);
    for row in &report.files {
        let name = Path::new(&row.file).file_name().unwrap_or_default();
        out.add_row([
            row.circuit.as_str().to_owned(),
            name.to_string_lossy().into_owned(),
            row.bytes.map_or_else(|| "missing".into(), bytes),
            match row.origin {
                Some(Origin::Published) => "published".into(),
                Some(Origin::MadeHere) => "made here".into(),
                None => String::new(),
            },
        ]);
    }
    print(&format!(
        "{size} sectors, in {} (FIL_PROOFS_PARAMETER_CACHE)\n{out}",
        report.folder
    ))
}

fn of_repo(repo: &Repo) -> Result<SectorSize, Fault> {
    if repo.is_initialised() {
        MinerConfig::load(&repo.config())?.sector_size()
    } else {
        Ok(SectorSize::S2KiB)
    }
}

fn verified(set: &ParamSet) -> Result<Origin, Fault> {
    params::require(&[set.circuit], set.size).map_err(|e| from_proofs(&e))?;
    let bar = spinner(format!("reading the files of {}", set.circuit.as_str()));
    let origin = set.verify().map_err(|e| from_proofs(&e));
    bar.finish_and_clear();
    origin
}

fn generate(dir: &Path, size: SectorSize, circuits: &[Circuit]) -> Result<(), Fault> {
    let all = circuits.len() as u64;
    let bar = ProgressBar::new(all);
    if let Ok(style) = ProgressStyle::with_template("[{bar:24}] {pos}/{len} {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    let done = params::generate(dir, size, circuits, &mut |step| match step {
        Progress::Making(set) => {
            bar.set_message(format!("making {} ({})", set.circuit.as_str(), cost(set)));
        }
        Progress::Have(_) | Progress::Made(_) => bar.inc(1),
    });
    bar.finish_and_clear();
    done.map_err(|e| from_proofs(&e))
}

/// How long it takes, as measured on two cores.
fn cost(set: &ParamSet) -> &'static str {
    match set.circuit {
        Circuit::WindowPost => "about 6 s",
        Circuit::WinningPost => "about 25 s",
        Circuit::Seal => "about 11 minutes and 5 GB of memory",
        Circuit::Update => "minutes, as PoRep",
        Circuit::Aggregate => "about 1 s",
    }
}

fn spinner(message: String) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(message);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
