//! `lotus-supervisor upgrade`: asks for it, and shows how it goes.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lotus_runtime::Fault;
use lotus_types::Kind;

use crate::cli::{LOOK, print, refused, say};
use crate::control;
use crate::proto::{StatusRequest, StatusResponse, UpgradeRequest, UpgradeStatus};

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Upgrade {
    /// Folder of the release to move to: all binaries, of one version.
    #[arg(long, conflicts_with = "rollback")]
    from: Option<PathBuf>,
    /// Go back to the release before this one, or from an upgrade that is under way.
    #[arg(long)]
    rollback: bool,
    /// Do not wait until it is safe to restart the hub. What that costs is written to the logs.
    #[arg(long)]
    force: bool,
    /// Do not wait until it is done.
    #[arg(long)]
    no_wait: bool,
    /// Print each change as a line of JSON.
    #[arg(long)]
    json: bool,
}

/// How long the supervisor may be silent while it is replaced.
const SILENT: Duration = Duration::from_secs(60);

/// Asks for an upgrade and waits for its end. It fails if the upgrade does.
pub(crate) async fn upgrade(root: &Path, how: Upgrade) -> Result<(), Fault> {
    let dir = match &how.from {
        Some(dir) => std::path::absolute(dir)?.display().to_string(),
        None => String::new(),
    };
    let mut client = control::client(root).await?;
    let request = UpgradeRequest {
        dir,
        force: how.force,
        back: how.rollback,
    };
    let asked = client.upgrade(request).await.map_err(|s| match s.code() {
        tonic::Code::InvalidArgument => Fault::new(
            Kind::Config,
            s.message(),
            "`lotus-supervisor upgrade --help` says what a release must have",
        ),
        _ => refused(s),
    })?;
    drop(client);
    let asked = asked.into_inner();
    let Some(id) = asked.upgrade.as_ref().map(|u| u.id) else {
        return Err(Fault::new(
            Kind::Fatal,
            "the supervisor does not say what became of the upgrade",
            "`lotus-supervisor status` and `events supervisor` show it",
        ));
    };
    if how.no_wait {
        return Ok(());
    }
    let (all, ended) = ended(root, id, how.json).await?;
    if how.json {
        println!("{}", json(&ended));
    } else {
        print(&all, false);
    }
    verdict(&ended)
}

/// Follows an upgrade to its end.
async fn ended(
    root: &Path,
    id: u64,
    as_json: bool,
) -> Result<(StatusResponse, UpgradeStatus), Fault> {
    let mut said = String::new();
    let mut heard = Instant::now();
    loop {
        // Another image may answer each time.
        let asked = async {
            let mut client = control::client(root).await?;
            let answer = client.status(StatusRequest {}).await.map_err(refused)?;
            Ok::<_, Fault>(answer.into_inner())
        };
        match asked.await {
            Err(e) if heard.elapsed() >= SILENT => return Err(e),
            Err(_) => {}
            Ok(all) => {
                heard = Instant::now();
                let upgrade = all.upgrade.clone().filter(|u| u.id == id);
                let Some(now) = upgrade else {
                    return Err(Fault::new(
                        Kind::Fatal,
                        "the supervisor knows nothing of the upgrade any more",
                        "`lotus-supervisor events supervisor` shows what happened",
                    ));
                };
                if !now.running {
                    return Ok((all, now));
                }
                if as_json {
                    let line = json(&now).to_string();
                    if said != line {
                        println!("{line}");
                        said = line;
                    }
                } else {
                    say(&mut said, words(&now, &all));
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What is done now, and what that waits for.
fn words(now: &UpgradeStatus, all: &StatusResponse) -> String {
    let mut text = format!("[{}/{}] {}", now.done + 1, now.steps, now.step);
    // "moves hub", "moves hub back"
    let name = now.step.split_whitespace().nth(1);
    let moved = all.processes.iter().find(|p| Some(p.name.as_str()) == name);
    if let Some(p) = moved {
        text = format!("{text}: {} {}", p.state, p.reason);
    }
    if !now.reason.is_empty() {
        text = format!("{text} (because {})", now.reason);
    }
    text
}

fn verdict(u: &UpgradeStatus) -> Result<(), Fault> {
    if u.ok {
        return Ok(());
    }
    Err(if u.moved {
        Fault::new(
            Kind::Fatal,
            format!("the release before runs again, as {}", u.reason),
            "`lotus-supervisor events` and `logs NAME` show why; nothing is lost",
        )
    } else {
        Fault::new(
            Kind::Config,
            format!("nothing was moved, as {}", u.reason),
            "mend the release or the configuration, and try again",
        )
    })
}

/// For `status`: an upgrade that is under way, or that went wrong.
pub(crate) fn line(u: &UpgradeStatus) -> Option<String> {
    match (u.running, u.ok) {
        (true, _) if u.reason.is_empty() => Some(format!("upgrade to {}: {}", u.to, u.step)),
        (true, _) => Some(format!(
            "upgrade to {}: {}, because {}",
            u.to, u.step, u.reason
        )),
        (false, true) => None,
        (false, false) => Some(format!("the upgrade to {} failed: {}", u.to, u.reason)),
    }
}

/// As JSON.
pub(crate) fn json(u: &UpgradeStatus) -> serde_json::Value {
    serde_json::json!({
        "id": u.id, "to": u.to, "running": u.running, "ok": u.ok, "step": u.step,
        "done": u.done, "steps": u.steps, "reason": u.reason, "moved": u.moved,
    })
}
