//! Durable journal commits against the limit of the disk: an appended and synced record of the
//! same bytes, in turns.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::time::Instant;

use comfy_table::Table;
use lotus_e2e::Failed;
use lotus_journal::{EffectId, Journal, Machine as _, Machines, Map};
use lotus_sealing::LogEntry;
use lotus_sealing::machine::{Event, Sectors};
use lotus_types::SectorNumber;
use serde::Serialize;

use crate::{median, ratio, records};

const ROUNDS: u64 = 5;
/// Sectors that walk from their first piece to `Proving` in a round, an event after the other.
const SECTORS: u64 = 16;
/// What sealing writes with each step beside the state and its effect: a line of the sector's log.
const LOG: Map<(SectorNumber, u64), LogEntry> = Map::new("bench.log");

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Events of sectors that are applied one after the other, each on disk before the next.
    journal_commits_per_second: f64,
    /// Records of the same bytes, appended to a file and synced one after the other.
    synced_appends_per_second: f64,
    /// The first by the second.
    journal_commit_ratio: f64,
}

impl Report {
    pub(crate) fn rows(&self, table: &mut Table) {
        table.add_row([
            "journal commits".to_owned(),
            format!("{:.0} per second", self.journal_commits_per_second),
            format!(
                "{:.2} of {:.0} synced appends per second",
                self.journal_commit_ratio, self.synced_appends_per_second
            ),
        ]);
    }
}

pub(crate) fn run() -> Result<Report, Failed> {
    let dir = tempfile::tempdir()?;
    let journal = Journal::open(&dir.path().join("journal"));
    let machines = Machines::<Sectors>::new(journal.map_err(|e| Failed::at("journal", e))?);
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.path().join("appended"))?;
    let (mut commits, mut appends, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let numbers = round * SECTORS..(round + 1) * SECTORS;
        let steps = steps(numbers)?;
        eprintln!("round {round}: {} journal commits and appends", steps.len());
        let (commit, append) = if round % 2 == 0 {
            let commit = commit_all(&machines, &steps)?;
            (commit, append_all(&mut file, &steps)?)
        } else {
            let append = append_all(&mut file, &steps)?;
            (commit_all(&machines, &steps)?, append)
        };
        ratios.push(ratio("journal commits", commit, append)?);
        commits.push(commit);
        appends.push(append);
    }
    Ok(Report {
        journal_commits_per_second: median(&commits),
        synced_appends_per_second: median(&appends),
        journal_commit_ratio: median(&ratios),
    })
}

/// One event of a sector, and what the journal has to keep of it.
struct Step {
    number: SectorNumber,
    event: Event,
    entry: LogEntry,
    bytes: Vec<u8>,
}

fn steps(numbers: std::ops::Range<u64>) -> Result<Vec<Step>, Failed> {
    let mut steps = Vec::new();
    for number in numbers {
        let mut before = None;
        for event in records::way(number)? {
            let (after, effects) = Sectors::step(before.as_ref(), &event)
                .ok_or_else(|| Failed(format!("{} does not apply", event.name())))?;
            let entry = LogEntry {
                unix_ms: after.opened_unix_ms,
                event: event.name().into(),
                from: before.map_or(String::new(), |s| s.state.to_string()),
                to: after.state.to_string(),
                message: event.message(),
            };
            let bytes = serde_ipld_dagcbor::to_vec(&(&after, effects, &entry));
            steps.push(Step {
                number: SectorNumber(number),
                event,
                entry,
                bytes: bytes.map_err(|e| Failed::at("record", e))?,
            });
            before = Some(after);
        }
    }
    Ok(steps)
}

/// Commits per second.
fn commit_all(machines: &Machines<Sectors>, steps: &[Step]) -> Result<f64, Failed> {
    let began = Instant::now();
    // The effect that each event settles: the last one of its sector.
    let mut running: Option<(SectorNumber, EffectId)> = None;
    for s in steps {
        // A batch is joined while the effect that sends it goes on.
        let joins = matches!(s.event, Event::Batched { .. });
        let settles = running.filter(|(number, _)| *number == s.number && !joins);
        let done = machines
            .apply(
                &s.number,
                &s.event,
                settles.map(|(_, id)| id),
                |tx, _, after| tx.put(&LOG, &(s.number, after.events), &s.entry),
            )
            .map_err(|e| Failed::at("journal", e))?
            .ok_or_else(|| Failed(format!("{} does not apply", s.event.name())))?;
        if !joins {
            running = done.effects.first().map(|p| (s.number, p.id));
        }
    }
    Ok(per_second(steps.len(), began))
}

/// Appends per second.
fn append_all(file: &mut File, steps: &[Step]) -> Result<f64, Failed> {
    let began = Instant::now();
    for s in steps {
        file.write_all(&s.bytes)?;
        file.sync_data()?;
    }
    Ok(per_second(steps.len(), began))
}

#[expect(clippy::cast_precision_loss, reason = "a few hundred steps")]
fn per_second(steps: usize, began: Instant) -> f64 {
    steps as f64 / began.elapsed().as_secs_f64()
}
