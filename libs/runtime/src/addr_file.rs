//! Where a process listens, for others on the host: `run/NAME.addr`.

use std::io;
use std::path::Path;

/// Writes `run_dir/NAME.addr` in one step, so that a reader sees the old or the new address.
pub fn write(run_dir: &Path, name: &str, addr: &str) -> io::Result<()> {
    std::fs::create_dir_all(run_dir)?;
    let tmp = run_dir.join(format!(".{name}.addr.tmp"));
    std::fs::write(&tmp, format!("{addr}\n"))?;
    std::fs::rename(tmp, run_dir.join(format!("{name}.addr")))
}

/// Reads what [`write`] wrote.
pub fn read(run_dir: &Path, name: &str) -> io::Result<String> {
    let text = std::fs::read_to_string(run_dir.join(format!("{name}.addr")))?;
    Ok(text.trim().to_owned())
}
