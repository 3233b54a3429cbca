//! Everything in one process, as it was before there were spokes: to be measured against, and only
//! in a build with the feature `all-in-one`.
//!
//! In the hub's process are the services of the spokes, on the hub's own runtime, and the prove
//! workers, each a thread; the threads of the proof library are the process's as well. What is
//! not: seal workers stay processes, and prove workers and services still speak to the hub over
//! its Unix sockets, so the figures are a little better than those of a build without them.

use std::path::PathBuf;

use lotus_markets::Repo;
use lotus_runtime::{Backoff, Fault};
use lotus_types::Kind;
use lotus_workers::{Class, PoolConfig, WorkerArgs};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// What is to be in the hub's process.
#[derive(Clone, Debug)]
pub struct AllInOne {
    /// The repo of the services.
    pub markets: PathBuf,
    /// Which; all when none is named.
    pub services: Option<Vec<String>>,
}

/// Prove workers that are threads. The pool starts none itself then.
pub(crate) fn threads_for_processes(config: &mut PoolConfig) -> Vec<WorkerArgs> {
    let n = std::mem::take(&mut config.settings.prove_workers);
    let worker = |n| WorkerArgs {
        class: Class::Prove,
        socket: config.socket(),
        generation: config.generation.0,
        proofs: config.proofs,
        name: format!("prove-thread-{n}"),
        nice: 0,
        log: String::new(),
        log_json: false,
        otlp_endpoint: String::new(),
    };
    (0..n).map(worker).collect()
}

/// Runs the services and the workers until `stop`.
pub(crate) async fn run(
    all: AllInOne,
    workers: Vec<WorkerArgs>,
    stop: CancellationToken,
) -> Result<(), Fault> {
    let mut parts: JoinSet<Result<(), Fault>> = JoinSet::new();
    let repo = Repo::at(Some(all.markets))?;
    let services = lotus_markets::host(repo, all.services.as_deref(), stop.clone())?;
    parts.spawn(services);
    for worker in workers {
        let stop = stop.clone();
        parts.spawn_blocking(move || work(&worker, &stop));
    }
    while let Some(ended) = parts.join_next().await {
        ended.map_err(|e| Fault::new(Kind::Fatal, e.to_string(), "see the log"))??;
    }
    Ok(())
}

/// One prove worker, on this thread and on those of the proof library.
fn work(args: &WorkerArgs, stop: &CancellationToken) -> Result<(), Fault> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let done = runtime.block_on(async {
        let mut backoff = Backoff::new(
            std::time::Duration::from_millis(50),
            std::time::Duration::from_secs(2),
        );
        while !stop.is_cancelled() {
            // At first the socket may not be there yet.
            if let Err(e) = lotus_workers::attach(args).await {
                tracing::debug!(worker = args.name, %e, "not attached");
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(backoff.next()) => {}
            }
        }
        Ok(())
    });
    runtime.shutdown_background();
    done
}
