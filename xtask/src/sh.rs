//! Running other programs.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use crate::Failed;

/// Runs a program in `dir`; an exit status other than zero is an error that names the command.
pub(crate) fn run<I, S>(dir: &Path, program: &str, args: I) -> Result<(), Failed>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = Command::new(program);
    command.current_dir(dir).args(args);
    let shown = format!("{command:?}");
    let status = command
        .status()
        .map_err(|e| Failed::new(format!("{program} does not start: {e}")))?;
    if status.success() {
        Ok(())
    } else {
        Err(Failed::new(format!("{status}: {shown}")))
    }
}
