//! Runs services side by side, each behind its own panic boundary.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lotus_runtime::admin::Admin;
use lotus_runtime::{Backoff, CancellationToken, Cx, Fault, Health, notify};
use lotus_types::Kind;
use tokio::task::{JoinError, JoinSet};

use crate::registry::Entry;
use crate::{MarketsConfig, Repo};

const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// A service that ran this long starts its back-off anew.
const SETTLED: Duration = Duration::from_secs(120);

/// Runs the services until stopped. Ends early only when one of them can not start for a reason
/// that a restart does not mend.
pub(crate) async fn run(
    services: Vec<Entry>,
    cfg: MarketsConfig,
    repo: Repo,
    stop: CancellationToken,
) -> Result<(), Fault> {
    let health = Health::default();
    // Listed before anything runs, so that the process is not ready while one is missing.
    for entry in &services {
        health.set(entry.name, Err("starting".into()));
    }
    // Processes of one service each may share a repo, so each publishes its own endpoint.
    let name = match services.as_slice() {
        [one] => format!("{}-admin", one.name),
        _ => "admin".into(),
    };
    let admin = Admin::bind(&cfg.admin, health.clone(), &repo.run_dir(), &name).await?;
    let (cfg, repo) = (Arc::new(cfg), Arc::new(repo));
    let end = CancellationToken::new();
    let mut tasks: JoinSet<Result<(), Fault>> = JoinSet::new();
    tasks.spawn(admin.serve(end.clone()));
    let mut hosted = JoinSet::new();
    for entry in services {
        hosted.spawn(keep(
            entry,
            cfg.clone(),
            repo.clone(),
            health.clone(),
            end.child_token(),
        ));
    }
    let told = health.clone();
    let ended = end.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = told.ready() => notify::ready(),
            () = ended.cancelled() => {}
        }
        Ok(())
    });

    let mut outcome = tokio::select! {
        () = stop.cancelled() => Ok(()),
        Some(done) = hosted.join_next() => flatten(done),
    };
    notify::stopping();
    end.cancel();
    // Services limit their own drain; this is the net below.
    while let Some(done) = hosted.join_next().await {
        outcome = outcome.and(flatten(done));
    }
    while let Some(done) = tasks.join_next().await {
        outcome = outcome.and(flatten(done));
    }
    outcome
}

fn flatten(done: Result<Result<(), Fault>, JoinError>) -> Result<(), Fault> {
    done.unwrap_or_else(|e| Err(Fault::new(Kind::Fatal, panicked(e), "see the log")))
}

fn panicked(e: JoinError) -> String {
    match e.try_into_panic() {
        Ok(payload) => {
            let text = payload
                .downcast_ref::<&str>()
                .map(|s| (*s).to_owned())
                .or_else(|| payload.downcast_ref::<String>().cloned());
            format!(
                "panicked: {}",
                text.as_deref().unwrap_or("without a message")
            )
        }
        Err(e) => format!("was broken off: {e}"),
    }
}

/// Runs one service for as long as the process runs.
async fn keep(
    entry: Entry,
    cfg: Arc<MarketsConfig>,
    repo: Arc<Repo>,
    health: Health,
    stop: CancellationToken,
) -> Result<(), Fault> {
    let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    let mut first = true;
    loop {
        let started = Instant::now();
        let cx = Cx::new(entry.name, health.clone(), stop.child_token());
        let mut boundary = JoinSet::new();
        let (cfg, repo) = (cfg.clone(), repo.clone());
        boundary.spawn(async move { (entry.start)(&cfg, &repo, cx).await });
        let ended = boundary.join_next().await;
        let fault = match ended {
            Some(Ok(Ok(()))) | None if stop.is_cancelled() => {
                health.set(entry.name, Err("stopped".into()));
                return Ok(());
            }
            Some(Ok(Ok(()))) | None => Fault::new(Kind::Fatal, "ended by itself", "see the log"),
            Some(Ok(Err(fault))) => fault,
            Some(Err(e)) => Fault::new(Kind::Fatal, panicked(e), "see the log, and report it"),
        };
        if stop.is_cancelled() {
            return Err(fault);
        }
        if fault.kind == Kind::Config && first {
            // Starting again does not mend it; someone must. Later on the others are worth more
            // than the message.
            health.set(entry.name, Err(fault.to_string()));
            return Err(Fault {
                message: format!("{}: {fault}", entry.name),
                ..fault
            });
        }
        first = false;
        if started.elapsed() >= SETTLED {
            backoff.reset();
        }
        let wait = backoff.next();
        tracing::error!(service = entry.name, %fault, fix = fault.fix, ?wait, "a service failed and is started again");
        metrics::counter!("lotus_markets_service_restarts_total", "service" => entry.name)
            .increment(1);
        health.set(
            entry.name,
            Err(format!("starts again after {fault}; fix: {}", fault.fix)),
        );
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(wait) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lotus_runtime::Needs;
    use std::sync::atomic::{AtomicU32, Ordering};

    static PANICS: AtomicU32 = AtomicU32::new(0);

    const STEADY: Entry = Entry {
        name: "steady",
        about: "",
        needs: |_| Needs::default(),
        start: |_, _, cx| {
            Box::pin(async move {
                cx.ready.release("here");
                cx.stop.cancelled().await;
                Ok(())
            })
        },
    };

    fn setup() -> (tempfile::TempDir, Repo, Health, CancellationToken) {
        let dir = tempfile::tempdir().unwrap();
        let repo = Repo::at(Some(dir.path().to_owned())).unwrap();
        (dir, repo, Health::default(), CancellationToken::new())
    }

    async fn wait(health: &Health, what: impl Fn(&Health) -> bool) {
        let mut changes = health.watch();
        let waited = tokio::time::timeout(Duration::from_secs(20), async {
            while !what(health) {
                changes.changed().await.unwrap();
            }
        });
        assert!(waited.await.is_ok(), "{:?}", health.components());
    }

    #[tokio::test]
    async fn a_panic_restarts_one_service_and_shows_in_health() {
        let (_dir, repo, health, stop) = setup();
        let shaky = Entry {
            name: "shaky",
            about: "",
            needs: |_| Needs::default(),
            start: |_, _, cx| {
                Box::pin(async move {
                    assert!(
                        PANICS.fetch_add(1, Ordering::SeqCst) > 0,
                        "the first start fails"
                    );
                    cx.ready.release("at last");
                    cx.stop.cancelled().await;
                    Ok(())
                })
            },
        };
        let cfg = Arc::new(MarketsConfig::default());
        let repo = Arc::new(repo);
        let mut tasks = JoinSet::new();
        for entry in [STEADY, shaky] {
            tasks.spawn(keep(
                entry,
                cfg.clone(),
                repo.clone(),
                health.clone(),
                stop.clone(),
            ));
        }
        wait(&health, |h| {
            h.components()
                .get("shaky")
                .is_some_and(|c| c.detail.contains("the first start fails"))
        })
        .await;
        assert!(health.components()["steady"].ready, "the other goes on");
        wait(&health, |h| {
            h.components().get("shaky").is_some_and(|c| c.ready)
        })
        .await;
        stop.cancel();
        while let Some(done) = tasks.join_next().await {
            done.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_wrong_configuration_ends_the_process_and_the_other_services() {
        let (_dir, repo, _, stop) = setup();
        let wrong = Entry {
            name: "wrong",
            about: "",
            needs: |_| Needs::default(),
            start: |_, _, _| {
                Box::pin(async { Err(Fault::new(Kind::Config, "bad port", "another")) })
            },
        };
        let e = run(vec![STEADY, wrong], MarketsConfig::default(), repo, stop)
            .await
            .unwrap_err();
        assert_eq!(
            (e.kind, e.message.as_str()),
            (Kind::Config, "wrong: bad port")
        );
    }

    #[tokio::test]
    async fn a_stop_is_clean() {
        let (_dir, repo, _, stop) = setup();
        let running = run(vec![STEADY], MarketsConfig::default(), repo, stop.clone());
        stop.cancel();
        assert_eq!(
            tokio::time::timeout(Duration::from_secs(10), running).await,
            Ok(Ok(()))
        );
    }
}
