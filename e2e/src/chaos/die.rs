//! How a process of the supervisor's dies, and comes back.

use std::process::Stdio;
use std::time::{Duration, SystemTime};

use lotus_e2e::{Failed, Net, secs};
use tokio::process::Command;

/// A process that writes nothing for so long waits for something.
const QUIET: Duration = secs(4);

/// Whether the tool is there by which a process dies just as it writes.
pub(crate) async fn strace() -> Result<(), Failed> {
    let there = Command::new("strace").arg("--version").output().await;
    if there.is_ok_and(|out| out.status.success()) {
        return Ok(());
    }
    Err(Failed::new(
        "strace is needed to kill a process at a write: apt-get install strace",
    ))
}

pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Starts a process, however often it died, and waits until it runs, with `ready` until it is
/// ready. Returns its pid. `before` is the pid of the one that died, which the supervisor may not
/// have noticed yet.
pub(crate) async fn started(
    net: &Net,
    name: &str,
    before: u32,
    ready: bool,
) -> Result<u32, Failed> {
    let root = net.root().display().to_string();
    let ask = ["start", name, "--repo", &root];
    net.wait(&format!("{name} to be ready"), secs(60), async |n| {
        let process = n.process(name).await.ok()?;
        if let Some(pid) = process
            .pid
            .filter(|pid| *pid != before && (process.ready || !ready))
        {
            return Some(pid);
        }
        // After so many deaths the supervisor gives it up.
        if ["backoff", "failed"].contains(&&*process.state) {
            // It may have been started in between, which is an error of the command.
            drop(n.run("lotus-supervisor", &ask).await);
        }
        None
    })
    .await
}

/// Lets a process die as it enters its `which`-th `fdatasync` from now on: the write itself is in
/// the file, nothing after it was done. `false` when it wrote too little for a while.
pub(crate) async fn at_write(pid: u32, which: u32) -> Result<bool, Failed> {
    let strace = Command::new("strace")
        .args([
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "trace=fsync,fdatasync",
        ])
        .args([
            "-e",
            &format!("inject=fsync,fdatasync:signal=SIGKILL:when={which}"),
        ])
        .args(["-p", &pid.to_string()])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let Ok(out) = tokio::time::timeout(QUIET, strace).await else {
        return Ok(false);
    };
    let out = out.map_err(|e| Failed::at("strace", e))?;
    if !out.status.success() {
        let why = String::from_utf8_lossy(&out.stderr);
        return Err(Failed(format!("strace: {}: {why}", out.status)));
    }
    Ok(true)
}
