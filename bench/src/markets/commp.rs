//! commP of bytes in memory, on one core and on all, beside what a core could do at best if it
//! only hashed as it comes, and beside `stream-commp`.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use comfy_table::Table;
use lotus_e2e::Failed;
use lotus_proofs::{CommpWriter, commp};
use lotus_types::PieceCid;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::Pid;
use rand::RngCore as _;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::index::processor_time;
use super::server::on_path;
use super::{float, target};
use crate::{median, ratio};

/// Issue: ours by the naive ceiling.
const TARGET: f64 = 1.8;
/// Compressions of SHA-256 that a naive tree makes for each that hashing its input makes: a tree
/// hashes twice its leaves, and each node takes a second block that is only padding.
const NAIVE: f64 = 4.0;
/// Bytes that are hashed: those of a piece of 512 MiB.
const LEN: usize = (512 << 20) / 128 * 127;
/// Bytes that a writer gets at once.
const WRITE: usize = 1 << 20;
/// What installs it.
const NO_STREAM_COMMP: &str = "stream-commp is not on the PATH: go install \
     github.com/filecoin-project/go-fil-commp-hashhash/cmd/stream-commp@latest";

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Bytes that were hashed each time.
    commp_bytes: usize,
    /// Bytes for a second of a core: median of all rounds.
    commp_bytes_per_cpu_s: f64,
    /// The same of plain SHA-256.
    sha256_bytes_per_cpu_s: f64,
    /// Ours by a quarter of that, median of the rounds.
    commp_vs_naive_ceiling: f64,
    /// Whether that is at least 1.8.
    commp_target_met: bool,
    /// Cores that there are.
    commp_cores: usize,
    /// Bytes for a second of the clock, on one core and on two.
    commp_bytes_per_s_one_core: f64,
    commp_bytes_per_s_two_cores: Option<f64>,
    /// Two by one, median of the rounds; nothing where there is one core.
    commp_two_cores_scaling: Option<f64>,
    /// Bytes for a second of the processor time of stream-commp.
    stream_commp_bytes_per_cpu_s: Option<f64>,
    /// Ours by that, median of the rounds.
    commp_vs_stream_commp: Option<f64>,
}

impl Report {
    pub(crate) fn rows(&self, table: &mut Table) {
        let met = Some(self.commp_target_met);
        table.add_row([
            "commP".to_owned(),
            format!(
                "{:.2} GB per second of a core",
                self.commp_bytes_per_cpu_s / 1e9
            ),
            format!(
                "{:.2} times the naive ceiling{}",
                self.commp_vs_naive_ceiling,
                target(&format!("at least {TARGET}"), met)
            ),
        ]);
        table.add_row([
            "commP on two cores".to_owned(),
            self.commp_bytes_per_s_two_cores
                .map_or_else(|| "-".to_owned(), |n| format!("{:.2} GB/s", n / 1e9)),
            self.commp_two_cores_scaling
                .map_or_else(String::new, |n| format!("{n:.2} times one")),
        ]);
        table.add_row([
            "  stream-commp".to_owned(),
            self.stream_commp_bytes_per_cpu_s.map_or_else(
                || "not measured".to_owned(),
                |n| format!("{:.2} GB per second of a core", n / 1e9),
            ),
            self.commp_vs_stream_commp
                .map_or_else(String::new, |n| format!("ours is {n:.2} times that")),
        ]);
    }
}

pub(super) fn run(rounds: u32, skipped: &mut super::Skipped) -> Result<Report, Failed> {
    let mut data = vec![0; LEN];
    rand::rng().fill_bytes(&mut data);
    let cores = cores()?;
    let stream = on_path("stream-commp");
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("data");
    match &stream {
        Some(_) => File::create(&file)?.write_all(&data)?,
        None => drop(skipped.insert("stream-commp", NO_STREAM_COMMP.to_owned())),
    }
    let bytes = float(LEN as u64);
    let [mut ours, mut plain, mut ceiling]: [Vec<f64>; 3] = Default::default();
    let [mut one, mut two, mut scaling]: [Vec<f64>; 3] = Default::default();
    let [mut theirs, mut ratios]: [Vec<f64>; 2] = Default::default();
    // In the first round the cores get going.
    for round in 0..=rounds {
        let sha = on_cores(&cores[..1], || sha256(&data))?;
        let single = on_cores(&cores[..1], || whole(&data))?;
        let both = match cores.get(..2) {
            Some(two) => Some(on_cores(two, || parallel(&data))?),
            None => None,
        };
        let peer = match &stream {
            Some(exe) => Some(stream_commp(exe, &file, &single.made)?),
            None => None,
        };
        if let Some(both) = both.as_ref().filter(|b| b.made != single.made) {
            let (a, b) = (&single.made, &both.made);
            return Err(Failed(format!("commP is {a} on one core and {b} on two")));
        }
        let rate = |took: Duration| ratio("commP", bytes, took.as_secs_f64());
        let (core, hash) = (rate(single.processor)?, rate(sha.processor)?);
        eprintln!(
            "commP, round {round}: {:.2} GB/s of a core, SHA-256 {:.2}",
            core / 1e9,
            hash / 1e9
        );
        if round == 0 {
            continue;
        }
        ours.push(core);
        plain.push(hash);
        ceiling.push(ratio("commP", core * NAIVE, hash)?);
        let alone = rate(single.clock)?;
        one.push(alone);
        if let Some(both) = both {
            let both = rate(both.clock)?;
            two.push(both);
            scaling.push(ratio("commP", both, alone)?);
        }
        if let Some(peer) = peer {
            let peer = rate(peer)?;
            theirs.push(peer);
            ratios.push(ratio("commP", core, peer)?);
        }
    }
    let some = |all: &[f64]| (!all.is_empty()).then(|| median(all));
    let vs = median(&ceiling);
    Ok(Report {
        commp_bytes: LEN,
        commp_bytes_per_cpu_s: median(&ours),
        sha256_bytes_per_cpu_s: median(&plain),
        commp_vs_naive_ceiling: vs,
        commp_target_met: vs >= TARGET,
        commp_cores: cores.len(),
        commp_bytes_per_s_one_core: median(&one),
        commp_bytes_per_s_two_cores: some(&two),
        commp_two_cores_scaling: some(&scaling),
        stream_commp_bytes_per_cpu_s: some(&theirs),
        commp_vs_stream_commp: some(&ratios),
    })
}

/// What a computation made, and what it took.
struct Done<T> {
    made: T,
    /// Of the one thread that was asked.
    processor: Duration,
    clock: Duration,
}

/// Computes on a thread that may only use these cores, and so may those that it starts.
fn on_cores<T: Send>(
    cores: &[usize],
    compute: impl FnOnce() -> Result<T, Failed> + Send,
) -> Result<Done<T>, Failed> {
    let work = || {
        let failed = |e| Failed::at("affinity", e);
        let mut set = CpuSet::new();
        for core in cores {
            set.set(*core).map_err(failed)?;
        }
        sched_setaffinity(Pid::from_raw(0), &set).map_err(failed)?;
        let (began, at) = (processor_time()?, Instant::now());
        let made = compute()?;
        Ok(Done {
            made,
            processor: processor_time()?.saturating_sub(began),
            clock: at.elapsed(),
        })
    };
    let joined = thread::scope(|s| s.spawn(work).join());
    joined.map_err(|_| Failed::new("a computation panicked"))?
}

/// The cores that this process may use.
fn cores() -> Result<Vec<usize>, Failed> {
    let set = sched_getaffinity(Pid::from_raw(0)).map_err(|e| Failed::at("affinity", e))?;
    let has = |core: &usize| set.is_set(*core).unwrap_or(false);
    Ok((0..CpuSet::count()).filter(has).collect())
}

fn sha256(data: &[u8]) -> Result<[u8; 32], Failed> {
    Ok(Sha256::digest(data).into())
}

/// On the one thread that writes.
fn whole(data: &[u8]) -> Result<PieceCid, Failed> {
    let mut writer = CommpWriter::new();
    for part in data.chunks(WRITE) {
        writer.write_all(part)?;
    }
    Ok(writer.finish().cid)
}

/// On as many threads as there are cores.
fn parallel(data: &[u8]) -> Result<PieceCid, Failed> {
    Ok(commp(data)?.cid)
}

/// Processor time of stream-commp for a file in memory. It must find the same.
fn stream_commp(exe: &Path, file: &Path, wanted: &PieceCid) -> Result<Duration, Failed> {
    let before = children()?;
    let out = Command::new(exe)
        .arg("--disable-stream-scan")
        .stdin(File::open(file)?)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|e| Failed::at("stream-commp", e))?;
    let took = children()?.saturating_sub(before);
    let said = String::from_utf8_lossy(&out.stderr);
    if !out.status.success() || !said.contains(&wanted.to_string()) {
        return Err(Failed(format!("stream-commp: not {wanted}: {said}")));
    }
    Ok(took)
}

/// Processor time of the children that ended.
fn children() -> Result<Duration, Failed> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).map_err(|e| Failed::at("rusage", e))?;
    let part = |t: nix::sys::time::TimeVal| {
        let micros = t.tv_sec() * 1_000_000 + t.tv_usec();
        Duration::from_micros(u64::try_from(micros).unwrap_or(0))
    };
    Ok(part(usage.user_time()) + part(usage.system_time()))
}
