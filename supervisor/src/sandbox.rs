//! What a spoke is confined to.

use lotus_runtime::Fault;
use serde::{Deserialize, Serialize};

/// What a process is confined to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Profile {}

/// Confines this process, and so what it becomes.
#[expect(clippy::unnecessary_wraps, reason = "a profile says nothing yet")]
pub(crate) fn apply(_: &Profile) -> Result<(), Fault> {
    Ok(())
}
