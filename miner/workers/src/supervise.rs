use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lotus_runtime::Backoff;
use lotus_runtime::telemetry::LogFormat;
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use crate::Class;
use crate::pool::{Shared, lock};

/// A worker that has not attached by then is killed. Generous: the machine may be swapping.
const ATTACH_LIMIT: Duration = Duration::from_secs(60);
/// A worker that ran this long starts again at once when it dies.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);
/// A log beyond this is moved to `<name>.1` when its worker starts.
const LOG_LIMIT: u64 = 16 << 20;

/// What an attached stream can do with the process behind it.
#[derive(Clone)]
pub(crate) struct ChildHandle {
    /// Set by the stream: it is there.
    pub(crate) attached: CancellationToken,
    /// Set by the stream: the process must die.
    pub(crate) kill: CancellationToken,
    /// Set here: the process is gone.
    pub(crate) exited: CancellationToken,
}

/// Longest wait before a worker that keeps dying is started again. A deadline does not wait.
const fn longest_wait(class: Class) -> Duration {
    match class {
        Class::Seal => Duration::from_secs(30),
        Class::Prove => Duration::from_secs(2),
    }
}

/// Keeps one worker process alive until the pool stops.
pub(crate) async fn keep_one(shared: Arc<Shared>, class: Class, n: u32) {
    let name = format!("{class}-{n}");
    let mut backoff = Backoff::new(Duration::from_millis(100), longest_wait(class));
    while !shared.stop.is_cancelled() {
        let began = Instant::now();
        match spawn(&shared, class, &name) {
            Ok(child) => {
                let status = attend(&shared, &name, child).await;
                if shared.stop.is_cancelled() {
                    return;
                }
                tracing::warn!(worker = name, status = %show(status), "worker process ended");
                metrics::counter!("lotus_miner_worker_deaths_total", "class" => class.as_str())
                    .increment(1);
            }
            Err(e) => tracing::error!(
                worker = name,
                exe = %shared.config.exe.display(),
                error = %e,
                "worker process did not start"
            ),
        }
        if began.elapsed() > HEALTHY_AFTER {
            backoff.reset();
        }
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(backoff.next()) => {}
        }
    }
}

/// Waits for the end of a process, and brings it about when the pool stops, when its stream asks
/// for it, or when it does not attach.
async fn attend(shared: &Shared, name: &str, mut child: Child) -> io::Result<ExitStatus> {
    let handle = ChildHandle {
        attached: CancellationToken::new(),
        kill: CancellationToken::new(),
        exited: CancellationToken::new(),
    };
    let pid = child.id();
    if let Some(pid) = pid {
        lock(&shared.children).insert(pid, handle.clone());
    }
    let unattached = async {
        tokio::select! {
            () = handle.attached.cancelled() => std::future::pending().await,
            () = tokio::time::sleep(ATTACH_LIMIT) => {}
        }
    };
    let status = tokio::select! {
        status = child.wait() => status,
        () = handle.kill.cancelled() => kill(&mut child).await,
        () = unattached => {
            tracing::warn!(worker = name, "worker did not attach in {ATTACH_LIMIT:?}: killing it");
            kill(&mut child).await
        }
        () = shared.stop.cancelled() => {
            // Its stream tells it to leave; a worker in the middle of a proof leaves at once too.
            let grace = Duration::from_secs(shared.config.settings.stop_secs);
            match tokio::time::timeout(grace, child.wait()).await {
                Ok(status) => status,
                Err(_) => kill(&mut child).await,
            }
        }
    };
    if let Some(pid) = pid {
        lock(&shared.children).remove(&pid);
    }
    handle.exited.cancel();
    status
}

async fn kill(child: &mut Child) -> io::Result<ExitStatus> {
    child.start_kill()?;
    child.wait().await
}

fn spawn(shared: &Shared, class: Class, name: &str) -> io::Result<Child> {
    let config = &shared.config;
    let log = open_log(&config.log_dir.join(format!("worker-{name}.log")))?;
    let mut command = Command::new(&config.exe);
    command
        .arg("worker")
        .args(["--class", class.as_str()])
        .arg("--socket")
        .arg(config.socket())
        .args(["--generation", &config.generation.0.to_string()])
        .args(["--proofs", config.proofs.as_str()])
        .args(["--name", name]);
    if class == Class::Seal {
        command.args(["--nice", &config.settings.seal_nice.to_string()]);
        if config.settings.seal_threads > 0 {
            let threads = config.settings.seal_threads.to_string();
            command.env("RAYON_NUM_THREADS", threads);
        }
    }
    if !config.settings.parent_cache.as_os_str().is_empty() {
        command.env("FIL_PROOFS_PARENT_CACHE", &config.settings.parent_cache);
    }
    let telemetry = &config.telemetry;
    command.args(["--log", &telemetry.log]);
    if telemetry.format == LogFormat::Json {
        command.arg("--log-json");
    }
    if !telemetry.otlp_endpoint.is_empty() {
        command.args(["--otlp-endpoint", &telemetry.otlp_endpoint]);
    }
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // Ctrl-C in the hub's terminal must not reach workers before the hub has decided.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

/// The log is a file, not a pipe, so that a worker can write when the hub is gone.
fn open_log(path: &Path) -> io::Result<File> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    if path.metadata().is_ok_and(|m| m.len() > LOG_LIMIT) {
        std::fs::rename(path, path.with_extension("log.1"))?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

fn show(status: io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(e) => e.to_string(),
    }
}
