//! The one-command tools of the workspace: `cargo xtask demo|chaos|bench|test|peers|ci|gen`.

mod checks;
mod contract;
mod counted;
mod gen_config;
mod gen_proto;
mod peers;
mod sh;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The one-command tools of the workspace.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build everything and run the main job on the embedded devnet; `--help` shows its options.
    #[command(disable_help_flag = true)]
    Demo {
        /// Options of the demo: --car FILE, --once, --json.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Build everything and kill processes at random; `--help` shows its options.
    #[command(disable_help_flag = true)]
    Chaos {
        /// Options: --crash, --node, --proving, --mining, --seed N, --json and more.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Build everything and measure it; `--help` shows what.
    #[command(disable_help_flag = true)]
    Bench {
        /// What to measure, and its options: sealing --only PARTS, --sectors N,N, --json and more.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Build everything and run every test.
    Test {
        /// Instead, the tests that prove and verify SNARKs. Parameter files that are missing are
        /// made first: half a minute and 59 MB for proofs of spacetime of 2 KiB sectors
        #[arg(long)]
        groth16: bool,
        /// SNARKs of seals and updates too. Their parameters take more than 11 minutes of two
        /// cores, 5 GB of memory and over 1.1 GB of disk; each proof takes about a minute
        #[arg(long, requires = "groth16")]
        porep: bool,
        /// Options of `cargo test`, such as `-p lotus-car`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Run the programs of others against a storage provider of ours: clients, servers and test
    /// suites, which come from their package registries. One whose tools are missing is skipped.
    Peers {
        /// Run only these, by name
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
        /// Print counts and a list as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Everything that must be green before a landing: formatting, lints, crate arrows, licences,
    /// released contracts, generated files, tests.
    Ci {
        /// All but the tests.
        #[arg(long)]
        no_test: bool,
    },
    /// Regenerate the committed generated files.
    Gen {
        /// Instead, keep the hub API as it is now in hub-proto/golden: this version of it is released
        #[arg(long)]
        golden: bool,
    },
}

/// Why a tool stopped.
#[derive(Debug)]
struct Failed(String);

impl Failed {
    fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

impl From<std::io::Error> for Failed {
    fn from(e: std::io::Error) -> Self {
        Self(e.to_string())
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace root")
        .to_path_buf()
}

fn main() -> ExitCode {
    let root = root();
    let done = match Args::parse().command {
        Command::Demo { args } => demo(&root, args),
        Command::Chaos { args } => chaos(&root, args),
        Command::Bench { args } => bench(&root, args),
        Command::Test {
            groth16: true,
            porep,
            args,
        } => test_groth16(&root, porep, args),
        Command::Test { args, .. } => test(&root, args),
        Command::Peers { only, json } => run_peers(&root, &only, json),
        Command::Ci { no_test } => ci(&root, no_test),
        Command::Gen { golden: true } => contract::release(&root),
        Command::Gen { golden: false } => gen_all(&root),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed(why)) => {
            eprintln!("xtask: {why}");
            ExitCode::FAILURE
        }
    }
}

/// The binaries, in the one profile that everything shares.
fn build(root: &Path) -> Result<(), Failed> {
    sh::run(
        root,
        "cargo",
        ["build", "--release", "--workspace", "--bins"],
    )
}

/// Makes every generated file below `out`, relative paths as in the repository. The configuration
/// page asks the built binaries.
fn gen_into(root: &Path, out: &Path) -> Result<(), Failed> {
    gen_proto::generate(root, out)?;
    build(root)?;
    gen_config::generate(root, &target(root)?.join("release"), out)
}

/// Regenerates what is committed. A file that stays the same is not touched, so that nothing is
/// built anew; after a change of the contract the code comes first, because the binaries need it.
fn gen_all(root: &Path) -> Result<(), Failed> {
    let fresh = tempfile::tempdir()?;
    gen_proto::generate(root, fresh.path())?;
    checks::install(fresh.path(), root)?;
    gen_into(root, fresh.path())?;
    checks::install(fresh.path(), root)
}

fn demo(root: &Path, args: Vec<OsString>) -> Result<(), Failed> {
    build(root)?;
    let exe = target(root)?.join("release/lotus-demo");
    let mut all = vec![OsString::from("--source"), root.into()];
    all.extend(args);
    sh::exec(&exe, all)
}

fn chaos(root: &Path, args: Vec<OsString>) -> Result<(), Failed> {
    build(root)?;
    sh::exec(&target(root)?.join("release/lotus-chaos"), args)
}

fn bench(root: &Path, args: Vec<OsString>) -> Result<(), Failed> {
    build(root)?;
    if args.first().is_some_and(|a| a == "guard") {
        // The whole workspace, so that its libraries have the features that they have already.
        let words = "build --release --workspace --features lotus-miner/all-in-one \
                     --bin lotus-miner-all-in-one";
        sh::run(root, "cargo", words.split_whitespace())?;
    }
    sh::exec(&target(root)?.join("release/lotus-bench"), args)
}

fn test(root: &Path, args: Vec<OsString>) -> Result<(), Failed> {
    let mut all: Vec<OsString> = vec!["test".into(), "--release".into()];
    if args.is_empty() {
        // One build of the binaries, which the end-to-end tests run, and the tests: built alone, the
        // binaries have fewer features of their libraries, and half of them is built twice.
        let words = "build --release --workspace --bins --tests";
        sh::run(root, "cargo", words.split_whitespace())?;
        // Looking for doctests takes minutes and finds none: examples in our docs are text.
        let words = "--workspace --lib --bins --tests --no-fail-fast";
        all.extend(words.split(' ').map(OsString::from));
    } else {
        build(root)?;
    }
    all.extend(args);
    run_tests(root, all)
}

fn test_groth16(root: &Path, porep: bool, args: Vec<OsString>) -> Result<(), Failed> {
    build(root)?;
    let miner = target(root)?.join("release/lotus-miner");
    let mut make = vec!["params", "generate", "--sector-size", "2KiB"];
    // One test at a time: each uses every core.
    let words =
        "test --release --workspace --test groth16 --no-fail-fast -- --ignored --test-threads 1";
    let mut all: Vec<OsString> = words.split(' ').map(OsString::from).collect();
    if !porep {
        make.push("--post-only");
        all.extend(["--skip", "porep"].map(OsString::from));
    }
    all.extend(args);
    sh::run(root, &miner.display().to_string(), make)?;
    run_tests(root, all)
}

fn run_tests(root: &Path, args: Vec<OsString>) -> Result<(), Failed> {
    let mut counted = counted::Counted::default();
    let done = sh::lines(root, "cargo", args, |line| counted.line(line));
    println!("{counted}");
    done
}

fn run_peers(root: &Path, only: &[String], json: bool) -> Result<(), Failed> {
    peers::check(only)?;
    build(root)?;
    peers::peers(root, &target(root)?, only, json)
}

fn ci(root: &Path, no_test: bool) -> Result<(), Failed> {
    let step = |what: &str| eprintln!("== {what}");
    step("formatting");
    sh::run(root, "cargo", ["fmt", "--all", "--check"])?;
    step("crate arrows and owners, licences");
    checks::workspace(root)?;
    step("released contracts");
    contract::check(root)?;
    step("generated files");
    checks::generated(root)?;
    step("lints");
    sh::run(
        root,
        "cargo",
        [
            "clippy",
            "--release",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ],
    )?;
    if !no_test {
        step("tests");
        test(root, vec![])?;
    }
    eprintln!("== green");
    Ok(())
}

/// The target folder, wherever it was put.
fn target(root: &Path) -> Result<PathBuf, Failed> {
    let metadata = sh::json(
        root,
        "cargo",
        ["metadata", "--format-version=1", "--no-deps"],
    )?;
    metadata["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .ok_or_else(|| Failed::new("cargo metadata names no target folder"))
}
