//! The demo: a storage provider from nothing, on an embedded devnet, and a client that stores a
//! CAR with it and gets it back. `cargo xtask demo` builds everything and runs this.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use comfy_table::{Table, presets};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use lotus_e2e::demo::{self, Report, Show};
use lotus_e2e::{Failed, Net, NetConfig};

/// From a client's CAR file to a proven sector and back, with every process in its own place.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask demo")]
struct Args {
    /// CAR to store, at most 7 MB, with complete DAGs; may be given several times. Default: a CAR
    /// that the client packs from this repository's documents and sources.
    #[arg(long)]
    car: Vec<PathBuf>,
    /// Stop everything at the end, instead of leaving it up to play with.
    #[arg(long)]
    once: bool,
    /// Print one JSON object as the last line of standard output.
    #[arg(long)]
    json: bool,
    /// The repository, for the default CAR.
    #[arg(long, hide = true, default_value = ".")]
    source: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("demo: {e}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(&args)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("demo: {e}");
            if args.json {
                let why = e.to_string();
                let first = why.lines().next().unwrap_or_default();
                println!("{}", serde_json::json!({ "ok": false, "error": first }));
            }
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<bool, Failed> {
    let mut show = Progress::new();
    let net = Net::start(&NetConfig::default()).await?;
    show.done(&format!("supervisor runs in {}", net.root().display()));
    let cars = if args.car.is_empty() {
        vec![pack(&net, &args.source).await?]
    } else {
        args.car.clone()
    };
    let report = demo::run(&net, &cars, &mut show).await?;
    eprintln!("{}", summary(&report));
    if !args.once {
        stay(&net, &report).await?;
    }
    net.stop().await?;
    if args.json {
        let line = serde_json::to_string(&report).map_err(|e| Failed::at("report", e))?;
        println!("{line}");
    }
    Ok(report.ok)
}

/// Packs the repository's documents and sources with the client's own command.
async fn pack(net: &Net, source: &Path) -> Result<PathBuf, Failed> {
    let data = net.root().join("data");
    for part in ["docs", "README.md"] {
        copy(&source.join(part), &data.join(part), &|_| true)?;
    }
    for part in [
        "hub-proto",
        "miner",
        "markets",
        "supervisor",
        "devnet",
        "services",
        "libs",
    ] {
        let wanted = |p: &Path| p.extension().is_some_and(|x| x == "rs" || x == "proto");
        copy(&source.join(part), &data.join(part), &wanted)?;
    }
    let car = net.root().join("data.car");
    let (from, to) = (data.display().to_string(), car.display().to_string());
    net.run("lotus-markets", &["client", "pack", &from, "-o", &to])
        .await?;
    Ok(car)
}

fn copy(from: &Path, to: &Path, wanted: &dyn Fn(&Path) -> bool) -> Result<(), Failed> {
    if from.is_file() {
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::copy(from, to)?;
    } else if from.is_dir() {
        std::fs::create_dir_all(to)?;
        for entry in std::fs::read_dir(from)? {
            let path = entry?.path();
            let target = path.file_name().map(|name| to.join(name));
            if let Some(target) = target
                && (path.is_dir() || wanted(&path))
            {
                copy(&path, &target, wanted)?;
            }
        }
    }
    Ok(())
}

fn summary(report: &Report) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    let yes = |b: bool| if b { "yes" } else { "NO" }.to_owned();
    let deals = if report.deals.is_empty() {
        std::slice::from_ref(&report.first)
    } else {
        &report.deals
    };
    for d in deals {
        for (name, value) in [
            ("piece", d.piece_cid.clone()),
            ("deal", d.deal_id.clone()),
            ("sector", format!("{} {}", d.sector, d.state)),
            ("WindowPoSts accepted", d.window_posts_accepted.to_string()),
            ("piece came back equal", yes(d.piece_bytes_equal)),
            ("DAG came back equal", yes(d.dag_bytes_equal)),
            ("index knows its blocks", yes(d.index_lookup_ok)),
        ] {
            table.add_row([name.to_owned(), value]);
        }
    }
    table.add_row(["blocks won".to_owned(), report.blocks_won.to_string()]);
    for (step, seconds) in &report.steps {
        table.add_row([step.replace('_', " "), format!("{seconds:.1} s")]);
    }
    table.add_row(["all in all".to_owned(), format!("{:.1} s", report.seconds)]);
    table
}

async fn stay(net: &Net, report: &Report) -> Result<(), Failed> {
    let root = net.root().display().to_string();
    let bin = net.exe("").display().to_string();
    eprintln!(
        "Everything stays up until Ctrl-C. Try:
  {bin}lotus-supervisor status --repo {root}
  {bin}lotus-miner info --repo {root}/miner
  {bin}lotus-miner sectors status {sector} --log --repo {root}/miner
  {bin}lotus-miner proving deadlines --repo {root}/miner
  curl -s {retrieval}/piece/{piece} | sha256sum
  kill -9 a process and watch it come back in `status`",
        sector = report.first.sector,
        piece = report.first.piece_cid,
        retrieval = net.spoke_url("retrieval")?,
    );
    tokio::signal::ctrl_c().await?;
    Ok(())
}

/// Bars on a terminal, a line for each change elsewhere.
struct Progress {
    start: Instant,
    bars: Option<MultiProgress>,
    deals: HashMap<usize, (ProgressBar, String)>,
}

impl Progress {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            bars: std::io::stderr().is_terminal().then(MultiProgress::new),
            deals: HashMap::new(),
        }
    }

    fn say(&self, line: &str) {
        let line = format!("[{:6.1} s] {line}", self.start.elapsed().as_secs_f64());
        match &self.bars {
            Some(bars) => drop(bars.println(line)),
            None => eprintln!("{line}"),
        }
    }
}

impl Show for Progress {
    fn progress(&mut self, deal: usize, step: usize, steps: usize, line: &str) {
        let (bar, last) = self.deals.entry(deal).or_insert_with(|| {
            let bar = match &self.bars {
                Some(bars) => bars.add(ProgressBar::new(steps as u64)),
                None => ProgressBar::hidden(),
            };
            let style = ProgressStyle::with_template("deal {prefix} [{bar:34}] {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            (
                bar.with_style(style).with_prefix((deal + 1).to_string()),
                String::new(),
            )
        });
        bar.set_position(step as u64);
        bar.set_message(line.to_owned());
        // The epoch changes all the time; a new line is worth printing when something else does.
        let state = line
            .split_whitespace()
            .skip(2)
            .collect::<Vec<_>>()
            .join(" ");
        if *last != state {
            last.clone_from(&state);
            if self.bars.is_none() {
                let line = format!("deal {}: {line}", deal + 1);
                self.say(&line);
            }
        }
    }

    fn done(&mut self, line: &str) {
        self.say(line);
    }
}
