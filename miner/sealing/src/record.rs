use lotus_journal::Map;
use lotus_types::SectorNumber;
use serde::{Deserialize, Serialize};

use crate::machine::{Sector, SectorPiece, SectorState};

/// A line of a sector's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// When, Unix milliseconds.
    pub unix_ms: u64,
    /// What happened, as [`Event::name`](crate::machine::Event::name).
    pub event: String,
    /// State before; empty when the event opened the sector.
    pub from: String,
    /// State after.
    pub to: String,
    /// One line more.
    pub message: String,
}

/// Entries kept of each sector's log.
pub(crate) const LOG_LIMIT: u64 = 1_000;

/// The logs, by sector and number of the event.
pub(crate) const LOG: Map<(SectorNumber, u64), LogEntry> = Map::new("sealing.log");

/// A sector as the operator sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct SectorRecord {
    /// Its number.
    pub number: SectorNumber,
    /// What is journaled of it.
    pub sector: Sector,
    /// Progress of the heavy work of this state, 0 to 1.
    pub progress: Option<f64>,
    /// Why the last try of this state's work did not succeed.
    pub last_error: Option<String>,
    /// When it is tried again, Unix milliseconds.
    pub next_retry_unix_ms: Option<u64>,
    /// The last events, oldest first. Empty in lists.
    pub log: Vec<LogEntry>,
}

/// A change of one sector, told in the transaction that makes it.
#[derive(Clone, Copy, Debug)]
pub struct SectorChange<'a> {
    /// The sector.
    pub number: SectorNumber,
    /// Its state before; `None` when it was opened. The same as after when a piece was added to
    /// a waiting sector.
    pub from: Option<SectorState>,
    /// Its state now.
    pub to: SectorState,
    /// All that is journaled of it.
    pub sector: &'a Sector,
    /// Pieces that it held and gives back: they need another sector.
    pub returned: &'a [SectorPiece],
}
