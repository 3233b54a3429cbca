//! `lotus-supervisor run`: one image after the other, in the same process.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use lotus_runtime::admin::Admin;
use lotus_runtime::{CancellationToken, Fault, Health, notify, signals, telemetry};
use lotus_types::Kind;
use tokio::sync::{mpsc, oneshot};

use crate::config::Config;
use crate::handover::{self, Handover};
use crate::helper::Helpers;
use crate::image::{self, WayBack};
use crate::needs::Asks;
use crate::proto::StatusRequest;
use crate::runner::{Call, Left, Over, Request, Runner, Setup};
use crate::{control, memory, processes, release};

/// Runs everything until it is to be stopped. `before` is what another image handed over, and
/// `way_back` leads to that one until this one is ready.
pub(crate) fn run(
    root: &Path,
    cfg: &Config,
    bin_dir: Option<&Path>,
    mut before: Option<Handover>,
    way_back: Option<&WayBack>,
) -> Result<(), Fault> {
    // Who exports traces outlives a turn. It has a runtime, and a thread, only if it is asked for.
    let exporter = if telemetry::endpoint(&cfg.telemetry).is_empty() {
        None
    } else {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        Some(builder.worker_threads(1).enable_all().build()?)
    };
    let entered = exporter.as_ref().map(tokio::runtime::Runtime::enter);
    let _telemetry = telemetry::init("lotus-supervisor", &cfg.telemetry)?;
    drop(entered);
    loop {
        // A runtime of its own for each turn: none of its tasks goes on in another one.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let turn = turn(root, cfg, bin_dir, before.take(), way_back);
        let left = runtime.block_on(turn)?;
        drop(runtime);
        let Some((handover, image)) = left else {
            return Ok(());
        };
        let (mut handover, e) = image::replace(handover, &image, root);
        tracing::error!(%e, image = %image.display(), "not replaced");
        handover.words.failed = Some(format!("{}: {e}", image.display()));
        before = Some(handover);
    }
}

/// One turn: until all is stopped, or another image is to go on with what is handed over.
async fn turn(
    root: &Path,
    cfg: &Config,
    bin_dir: Option<&Path>,
    before: Option<Handover>,
    way_back: Option<&WayBack>,
) -> Result<Option<(Handover, PathBuf)>, Fault> {
    let run_dir = root.join("run");
    std::fs::create_dir_all(&run_dir)?;
    let (lock, listener, before) = match before {
        Some(h) => (
            std::fs::File::from(h.lock),
            h.control.into(),
            Some(Left {
                notify: h.notify,
                listeners: h.listeners,
                words: h.words,
            }),
        ),
        None => {
            let lock = lock(root, &run_dir)?;
            (lock, control::bind(root)?, None)
        }
    };
    let kept = (lock, listener.try_clone()?);
    let release = release::read(root)?;
    // The image that ends an upgrade restarts what crashes from the release that already runs.
    let arrives = before.as_ref().is_some_and(|b| b.words.failed.is_none());
    let bin = match (&release.upgrade, &release.current, bin_dir) {
        (Some(journal), _, _) if arrives => journal.to.clone(),
        (_, Some(current), _) => current.clone(),
        (_, None, Some(dir)) => dir.to_owned(),
        (_, None, None) => image::own_dir()?,
    };
    let health = Health::default();
    let processes = processes::of_host(cfg, root, &bin)?;
    let helpers = Helpers::default();
    let asks = Asks::new(&processes, helpers.clone());
    let setup = Setup {
        cfg: cfg.clone(),
        root,
        bin,
        release,
        processes,
        helpers,
        before,
    };
    let runner = Runner::new(setup, health.clone())?;
    let admin = Admin::bind(&cfg.admin, health.clone(), &run_dir, "supervisor").await?;
    let (calls_tx, calls_rx) = mpsc::channel(64);
    let over = Cell::new(None);
    signals::run_until_signal(|stop| async {
        // Status is served until the last process has stopped.
        let done = CancellationToken::new();
        let work = async {
            let ended = runner.run(calls_rx, stop).await;
            done.cancel();
            over.set(Some(ended?));
            Ok::<_, Fault>(())
        };
        let ready = async {
            tokio::select! {
                () = health.ready() => {
                    tracing::info!("every process is ready");
                    notify::ready();
                    if let Err(e) = memory::give_back_code() {
                        tracing::debug!(%e, "the code that the start needed stays in memory");
                    }
                }
                () = done.cancelled() => {}
            }
            Ok(())
        };
        let serves = async {
            // Polled after the signals are listened to.
            handover::unblock();
            if let Some(way_back) = way_back {
                serves(root, &calls_tx, way_back).await;
            }
            Ok(())
        };
        tokio::try_join!(
            work,
            ready,
            serves,
            control::serve(listener, calls_tx.clone(), asks, done.clone()),
            admin.serve(done.clone()),
        )?;
        Ok(())
    })
    .await?;
    Ok(match over.take() {
        None | Some(Over::Stopped) => None,
        Some(Over::Leave(image, left)) => {
            let Left {
                notify,
                listeners,
                words,
            } = left;
            let (lock, control) = kept;
            let handover = Handover {
                lock: lock.into(),
                control: control.into(),
                notify,
                listeners,
                heir: None,
                back: None,
                words,
            };
            Some((handover, image))
        }
    })
}

/// Variable with a fault of a new image: `late` or `panic`.
const FAULT_VAR: &str = "LOTUS_SUPERVISOR_FAULT";

/// Takes the way back away once this image answers on its socket as any client sees it.
async fn serves(root: &Path, calls: &mpsc::Sender<Call>, way_back: &WayBack) {
    // Images that are not ready are made by tests.
    match std::env::var(FAULT_VAR).as_deref() {
        Ok("late") => return std::future::pending().await,
        Ok("panic") => panic!("{FAULT_VAR}"),
        _ => {}
    }
    let asked = async {
        let mut client = control::client(root).await?;
        client
            .status(StatusRequest {})
            .await
            .map_err(|e| Fault::new(Kind::Transport, e.message(), "see the log"))
    };
    match asked.await {
        Ok(_) => {
            way_back.stay();
            let (tx, rx) = oneshot::channel();
            if calls.send((Request::Serves, tx)).await.is_ok() {
                drop(rx.await);
            }
        }
        Err(e) => way_back.go(&e.message),
    }
}

fn lock(root: &Path, run_dir: &Path) -> Result<std::fs::File, Fault> {
    let lock = std::fs::File::create(run_dir.join("supervisor.lock"))?;
    lock.try_lock().map_err(|_| {
        Fault::new(
            Kind::Config,
            format!("another supervisor runs on {}", root.display()),
            "`lotus-supervisor status` shows what it runs; stop it first, or give another --repo",
        )
    })?;
    Ok(lock)
}
