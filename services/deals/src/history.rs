//! What happened to a deal, and when: for the operator.

use lotus_journal::{JournalError, Map, Tx};
use lotus_types::DealKey;
use serde::{Deserialize, Serialize};

use crate::machine::Record;

/// The steps of each deal, oldest first.
pub(crate) const HISTORY: Map<DealKey, Vec<Step>> = Map::new("deals.history");
/// Steps that are kept of a deal: the first of them, and the last.
const MOST: usize = 64;

/// One step of a deal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// When, in Unix milliseconds.
    pub unix_ms: u64,
    /// The checkpoint that it came to.
    pub checkpoint: String,
    /// State of its sector then, or empty.
    pub sealing_state: String,
    /// What went wrong, or empty.
    pub reason: String,
}

/// Writes a step down, when it is one.
pub(crate) fn note(
    tx: &mut Tx,
    key: &DealKey,
    before: Option<&Record>,
    after: &Record,
    unix_ms: u64,
) -> Result<(), JournalError> {
    let seen = |r: &Record| (r.checkpoint, r.sealing_state.clone(), r.reason.clone());
    if before.map(seen) == Some(seen(after)) {
        return Ok(());
    }
    let mut steps = tx.get(&HISTORY, key)?.unwrap_or_default();
    if steps.len() >= MOST {
        steps.remove(1);
    }
    steps.push(Step {
        unix_ms,
        checkpoint: after.checkpoint.name().into(),
        sealing_state: after.sealing_state.clone(),
        reason: after.reason.clone(),
    });
    tx.put(&HISTORY, key, &steps)
}
