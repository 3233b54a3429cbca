//! Logs that die, fail and are tampered with.

mod append;
mod crash;
mod tamper;

use std::fs;
use std::path::Path;

use crate::disk::Faults;
use crate::log::{Entry, Log};
use crate::{
    AuditConfig, AuditError, Call, Filter, Head, Opened, Order, Record, Verified, read, scan,
    verify,
};
use std::time::Duration;

const NOW: u64 = 1_767_225_600_000;

fn call(n: u64) -> Call {
    Call {
        who: format!("deals/d{}", n % 3),
        from: "10.0.0.7:4711".into(),
        method: format!("/lotus.hub.v1.Pieces/Add{n}"),
        key: format!("key-{n}"),
        outcome: "ok".into(),
        generation: n,
    }
}

fn entry(n: u64) -> Entry {
    Entry::new(NOW + n, &call(n))
}

fn config(max_file_bytes: u64, keep_files: u64) -> AuditConfig {
    AuditConfig {
        max_file_bytes,
        keep_files,
        ..AuditConfig::default()
    }
}

fn open(dir: &Path, config: &AuditConfig, faults: &Faults) -> Result<(Log, Opened), AuditError> {
    Log::open(dir, config, faults.clone(), NOW, Duration::ZERO)
}

/// Opens a log with nothing at its end, and appends one record for each number.
fn grow(dir: &Path, config: &AuditConfig, numbers: std::ops::Range<u64>) -> Vec<Head> {
    let (mut log, opened) = open(dir, config, &Faults::default()).unwrap();
    assert_eq!(opened, Opened::default());
    let mut heads = Vec::new();
    for n in numbers {
        log.append(&[entry(n)], &mut heads).unwrap();
    }
    heads
}

fn records(dir: &Path) -> Vec<Record> {
    let filter = Filter {
        order: Order::OldestFirst,
        ..Filter::default()
    };
    let forwards: Vec<_> = read(dir, filter).unwrap().map(Result::unwrap).collect();
    let backwards = read(dir, Filter::default()).unwrap().map(Result::unwrap);
    let mut backwards: Vec<_> = backwards.collect();
    backwards.reverse();
    assert_eq!(forwards, backwards);
    forwards
}

fn numbers(dir: &Path) -> Vec<u64> {
    records(dir).iter().map(|r| r.seq).collect()
}

/// Nothing is wrong, and nothing is torn.
fn sound(dir: &Path, head: Option<Head>) -> Verified {
    let found = verify(dir, head).unwrap();
    assert_eq!((&found.problems, found.torn_bytes), (&vec![], 0));
    found
}

/// What is wrong, in words.
fn problems(dir: &Path, head: Option<Head>) -> Vec<String> {
    let found = verify(dir, head).unwrap();
    found.problems.iter().map(ToString::to_string).collect()
}

fn copy(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for number in scan::list(from).unwrap() {
        let name = scan::name(number);
        fs::copy(from.join(&name), to.path().join(&name)).unwrap();
    }
    to
}

/// The lines of a file, each with its line feed.
fn lines(path: &Path) -> Vec<Vec<u8>> {
    let bytes = fs::read(path).unwrap();
    bytes
        .split_inclusive(|b| *b == b'\n')
        .map(<[u8]>::to_vec)
        .collect()
}
