//! The segments, where multihashes are looked up: what an entry costs to take in, and a lookup to
//! answer, beside redb and an LSM store (fjall) with the same keys and values. Reading a piece and
//! writing its list of multihashes, which an indexed piece needs as well, is not in them.
//!
//! Seconds are those of the one thread that works, from the kernel's clock of its processor time:
//! hashing, sorting, writing, syncing and merging are in them, making the multihashes is not.

use std::path::Path;
use std::time::{Duration, Instant};

use comfy_table::Table;
use lotus_e2e::Failed;
use lotus_segments::Segments;
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::ratio;

/// Multihashes of a piece: a 32 GiB piece with blocks of 16 KiB.
const PIECE: u64 = 2 << 20;
/// Lookups of each kind.
const LOOKUPS: u64 = 200_000;
/// Rows of a transaction of a peer.
const BATCH: u64 = 1 << 20;
/// Issue: entries a second and core.
const TARGET: f64 = 5e6;

/// How much is measured.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Entries that the segments take in, in pieces of 2,097,152. 64 million need 4 GB of disk
    #[arg(long, default_value_t = 64 << 20,
        value_parser = clap::value_parser!(u64).range(PIECE..=4 << 30))]
    index_entries: u64,
    /// Entries that redb and the LSM store take in: they need much longer for each
    #[arg(long, default_value_t = 4 << 20,
        value_parser = clap::value_parser!(u64).range(BATCH..=1 << 30))]
    peer_entries: u64,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Entries of the segments.
    index_entries: u64,
    /// Entries of the peers.
    index_peer_entries: u64,
    /// Entries a second of processor time.
    index_ingest_per_s_core: f64,
    /// Whether that is five million or more.
    index_ingest_target_met: bool,
    /// Entries a second of the clock, syncs included.
    index_ingest_per_s: f64,
    /// Pages that a lookup of a multihash that is there reads, when the index is at rest.
    index_page_reads_per_lookup: f64,
    /// Whether that is at most one.
    index_page_reads_target_met: bool,
    /// Pages that a lookup of one that is not there reads.
    index_page_reads_per_miss: f64,
    /// The first right after the last entry, with segments that wait for a merge: a filter is wrong
    /// at times.
    index_page_reads_per_lookup_busy: f64,
    /// Lookups of what is there, a second of processor time: its pages in the page cache, and read
    /// from the disk.
    index_lookups_per_s_core: f64,
    index_cold_lookups_per_s_core: f64,
    /// Segments when everything was in.
    index_segments: u64,
    /// Bytes of disk for an entry.
    index_bytes_per_entry: f64,
    /// Bytes of memory for an entry.
    index_memory_per_entry: f64,
    /// The same of redb.
    redb_ingest_per_s_core: f64,
    redb_lookups_per_s_core: f64,
    redb_bytes_per_entry: f64,
    /// The same of fjall.
    lsm_ingest_per_s_core: f64,
    lsm_lookups_per_s_core: f64,
    lsm_bytes_per_entry: f64,
    /// Ours by theirs.
    index_ingest_vs_redb: f64,
    index_ingest_vs_lsm: f64,
}

impl Report {
    pub(crate) fn rows(&self, table: &mut Table) {
        table.add_row([
            "index: entries taken in".to_owned(),
            format!(
                "{:.2} M per second and core",
                self.index_ingest_per_s_core / 1e6
            ),
            format!(
                "{:.1} times redb, {:.1} times fjall",
                self.index_ingest_vs_redb, self.index_ingest_vs_lsm
            ),
        ]);
        table.add_row([
            "index: page reads of a lookup".to_owned(),
            format!("{:.3}", self.index_page_reads_per_lookup),
            format!(
                "{:.3} while {} segments wait for a merge; {:.3} for what is not there",
                self.index_page_reads_per_lookup_busy,
                self.index_segments,
                self.index_page_reads_per_miss
            ),
        ]);
        table.add_row([
            "index: lookups".to_owned(),
            format!(
                "{:.0} k per second and core",
                self.index_lookups_per_s_core / 1e3
            ),
            format!(
                "{:.0} k from the disk; redb {:.0} k, fjall {:.0} k",
                self.index_cold_lookups_per_s_core / 1e3,
                self.redb_lookups_per_s_core / 1e3,
                self.lsm_lookups_per_s_core / 1e3
            ),
        ]);
        table.add_row([
            "index: bytes of an entry".to_owned(),
            format!(
                "{:.1} on disk, {:.2} in memory",
                self.index_bytes_per_entry, self.index_memory_per_entry
            ),
            format!(
                "redb {:.0}, fjall {:.0} on disk",
                self.redb_bytes_per_entry, self.lsm_bytes_per_entry
            ),
        ]);
    }
}

/// What one store was measured at.
struct Measured {
    ingest: f64,
    lookups: f64,
    bytes: f64,
}

pub(crate) fn run(options: &Options) -> Result<Report, Failed> {
    let peers = options.peer_entries / BATCH * BATCH;
    let redb = redb(peers)?;
    let lsm = lsm(peers)?;
    let entries = options.index_entries / PIECE * PIECE;
    let dir = tempfile::tempdir()?;
    let store = Segments::open(dir.path()).map_err(|e| Failed::at("segments", e))?;
    let (mut processor, mut clock) = (Duration::ZERO, Duration::ZERO);
    let mut hashes = Vec::new();
    for piece in 0..entries / PIECE {
        hashes.clear();
        hashes.extend((piece * PIECE..(piece + 1) * PIECE).map(multihash));
        let (began, at) = (processor_time()?, Instant::now());
        let failed = |e| Failed::at("segments", e);
        let number = u32::try_from(piece).map_err(|e| Failed::at("piece", e))?;
        let mut ingest = store.ingest(number);
        for (hash, n) in hashes.iter().zip(0u64..) {
            ingest.push(hash, n << 14, 1 << 14).map_err(failed)?;
        }
        ingest.finish().map_err(failed)?;
        store.maintain().map_err(failed)?;
        processor += processor_time()?.saturating_sub(began);
        clock += at.elapsed();
        eprintln!("segments: {} of {entries} entries", (piece + 1) * PIECE);
    }
    let stats = store.stats();
    let (busy, cold) = lookups(&store, entries, true)?;
    let (misses, _) = lookups(&store, entries, false)?;
    // As the service does when nothing changed for ten minutes.
    let settle = store.settle(Duration::ZERO);
    settle.map_err(|e| Failed::at("merge", e))?;
    let (rest, _) = lookups(&store, entries, true)?;
    // Once more, as the peers have theirs: in the page cache.
    let (_, seconds) = lookups(&store, entries, true)?;
    let ingest = ratio("ingest", float(entries), processor.as_secs_f64())?;
    Ok(Report {
        index_entries: entries,
        index_peer_entries: peers,
        index_ingest_per_s_core: ingest,
        index_ingest_target_met: ingest >= TARGET,
        index_ingest_per_s: ratio("ingest", float(entries), clock.as_secs_f64())?,
        index_page_reads_per_lookup: rest,
        index_page_reads_target_met: rest <= 1.0,
        index_page_reads_per_miss: misses,
        index_page_reads_per_lookup_busy: busy,
        index_lookups_per_s_core: ratio("lookups", float(LOOKUPS), seconds)?,
        index_cold_lookups_per_s_core: ratio("lookups", float(LOOKUPS), cold)?,
        index_segments: stats.segments,
        index_bytes_per_entry: ratio("bytes", float(stats.bytes), float(entries))?,
        index_memory_per_entry: ratio("memory", float(stats.memory), float(entries))?,
        redb_ingest_per_s_core: redb.ingest,
        redb_lookups_per_s_core: redb.lookups,
        redb_bytes_per_entry: redb.bytes,
        lsm_ingest_per_s_core: lsm.ingest,
        lsm_lookups_per_s_core: lsm.lookups,
        lsm_bytes_per_entry: lsm.bytes,
        index_ingest_vs_redb: ratio("redb", ingest, redb.ingest)?,
        index_ingest_vs_lsm: ratio("lsm", ingest, lsm.ingest)?,
    })
}

/// Pages read by a lookup, and seconds of all. What is there must be found, and nothing else.
fn lookups(store: &Segments, entries: u64, there: bool) -> Result<(f64, f64), Failed> {
    let wanted: Vec<_> = (0..LOOKUPS)
        .map(|n| multihash(scattered(n, entries) + if there { 0 } else { entries }))
        .collect();
    let before = store.stats().pages_read;
    let began = processor_time()?;
    for hash in &wanted {
        let found = store.find(hash, 16).map_err(|e| Failed::at("lookup", e))?;
        if found.is_empty() == there {
            return Err(Failed(format!("a lookup found {} places", found.len())));
        }
    }
    let seconds = processor_time()?.saturating_sub(began).as_secs_f64();
    let pages = store.stats().pages_read - before;
    Ok((float(pages) / float(LOOKUPS), seconds))
}

/// Key to piece, offset, length, as the index had it in redb.
const TABLE: redb::TableDefinition<'_, &[u8], (u32, u64, u32)> =
    redb::TableDefinition::new("entries");

fn redb(entries: u64) -> Result<Measured, Failed> {
    let failed = |e: redb::Error| Failed::at("redb", e);
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("index.redb");
    let db = redb::Database::create(&path).map_err(|e| failed(e.into()))?;
    let mut processor = Duration::ZERO;
    for batch in 0..entries / BATCH {
        let hashes: Vec<_> = (batch * BATCH..(batch + 1) * BATCH)
            .map(multihash)
            .collect();
        let began = processor_time()?;
        let tx = db.begin_write().map_err(|e| failed(e.into()))?;
        {
            let mut table = tx.open_table(TABLE).map_err(|e| failed(e.into()))?;
            for (hash, n) in hashes.iter().zip(0u64..) {
                let value = (1, n << 14, 1 << 14);
                table
                    .insert(&hash[..], value)
                    .map_err(|e| failed(e.into()))?;
            }
        }
        tx.commit().map_err(|e| failed(e.into()))?;
        processor += processor_time()?.saturating_sub(began);
        eprintln!("redb: {} of {entries} entries", (batch + 1) * BATCH);
    }
    let tx = redb::ReadableDatabase::begin_read(&db).map_err(|e| failed(e.into()))?;
    let table = tx.open_table(TABLE).map_err(|e| failed(e.into()))?;
    let seconds = peer_lookups(entries, |hash| {
        let found = table.get(hash).map_err(|e| failed(e.into()))?;
        Ok(found.is_some())
    })?;
    Ok(Measured {
        ingest: ratio("redb", float(entries), processor.as_secs_f64())?,
        lookups: ratio("redb", float(LOOKUPS), seconds)?,
        bytes: float(std::fs::metadata(&path)?.len()) / float(entries),
    })
}

/// The LSM store merges on threads of its own, so its seconds are those of the whole process.
fn lsm(entries: u64) -> Result<Measured, Failed> {
    let failed = |e: fjall::Error| Failed::at("fjall", e);
    let dir = tempfile::tempdir()?;
    let db = fjall::Database::builder(dir.path())
        .open()
        .map_err(failed)?;
    let table = db
        .keyspace("entries", fjall::KeyspaceCreateOptions::default)
        .map_err(failed)?;
    let mut processor = Duration::ZERO;
    for batch in 0..entries / BATCH {
        let hashes: Vec<_> = (batch * BATCH..(batch + 1) * BATCH)
            .map(multihash)
            .collect();
        let began = whole_process_time()?;
        for (hash, n) in hashes.iter().zip(0u64..) {
            let mut value = [0; 16];
            value[..8].copy_from_slice(&(n << 14).to_le_bytes());
            table.insert(hash, value).map_err(failed)?;
        }
        db.persist(fjall::PersistMode::SyncAll).map_err(failed)?;
        processor += whole_process_time()?.saturating_sub(began);
        eprintln!("fjall: {} of {entries} entries", (batch + 1) * BATCH);
    }
    let seconds = peer_lookups(entries, |hash| {
        Ok(table.get(hash).map_err(failed)?.is_some())
    })?;
    Ok(Measured {
        ingest: ratio("fjall", float(entries), processor.as_secs_f64())?,
        lookups: ratio("fjall", float(LOOKUPS), seconds)?,
        bytes: float(size(dir.path())?) / float(entries),
    })
}

fn peer_lookups(
    entries: u64,
    mut has: impl FnMut(&[u8]) -> Result<bool, Failed>,
) -> Result<f64, Failed> {
    let wanted: Vec<_> = (0..LOOKUPS)
        .map(|n| multihash(scattered(n, entries)))
        .collect();
    let began = processor_time()?;
    for hash in &wanted {
        if !has(hash)? {
            return Err(Failed::new("a peer lost an entry"));
        }
    }
    Ok(processor_time()?.saturating_sub(began).as_secs_f64())
}

fn size(dir: &Path) -> std::io::Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        sum += if meta.is_dir() {
            size(&entry.path())?
        } else {
            meta.len()
        };
    }
    Ok(sum)
}

/// A number that looks like chance, by the mixer of SplitMix64.
pub(super) fn mix(n: u64) -> u64 {
    let n = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

fn scattered(n: u64, below: u64) -> u64 {
    mix(n ^ 0x5bd1_e995) % below
}

/// The `n`th multihash: SHA-256's code, 32 bytes, and a digest that looks like one.
fn multihash(n: u64) -> [u8; 34] {
    let mut hash = [0; 34];
    (hash[0], hash[1]) = (0x12, 0x20);
    for part in 0..4u64 {
        let at = 2 + usize::try_from(part).unwrap_or(0) * 8;
        hash[at..at + 8].copy_from_slice(&mix(n * 4 + part).to_be_bytes());
    }
    hash
}

/// Processor time of this thread.
pub(super) fn processor_time() -> Result<Duration, Failed> {
    time(ClockId::CLOCK_THREAD_CPUTIME_ID)
}

/// Processor time of the process, with all its threads.
fn whole_process_time() -> Result<Duration, Failed> {
    time(ClockId::CLOCK_PROCESS_CPUTIME_ID)
}

fn time(clock: ClockId) -> Result<Duration, Failed> {
    clock_gettime(clock)
        .map(Duration::from)
        .map_err(|e| Failed::at("clock", e))
}

#[expect(clippy::cast_precision_loss, reason = "figures of a report")]
pub(super) fn float(n: u64) -> f64 {
    n as f64
}
