//! Upgrades: what runs does not notice, and whatever goes wrong goes back.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use lotus_e2e::download::{Downloads, store};
use lotus_e2e::{Net, NetConfig, secs};
use tempfile::TempDir;

const BINARIES: [&str; 5] = [
    "lotus-devnet",
    "lotus-miner",
    "lotus-worker",
    "lotus-markets",
    "lotus-supervisor",
];
const UNITS: [&str; 5] = ["devnet", "hub", "deals", "retrieval", "indexing"];
/// How often supervisor or release are replaced while clients download.
const REPLACED: usize = 20;
const SIZE: usize = 6 << 20;

/// A release in a folder of its own, of the binaries that were built.
fn release(net: &Net) -> TempDir {
    // Beside the folder of the others: large files are not copied on one file system.
    let beside = net.exe("x").parent().unwrap().parent().unwrap().to_owned();
    let mut dir = tempfile::Builder::new();
    let dir = dir.prefix("rel-").tempdir_in(beside).unwrap();
    for name in BINARIES {
        let (have, want) = (net.exe(name), dir.path().join(name));
        // Two names of one supervisor would be one release.
        if name == "lotus-supervisor" || std::fs::hard_link(&have, &want).is_err() {
            std::fs::copy(&have, &want).unwrap();
        }
    }
    dir
}

/// Puts a script in the place of one of its binaries. It may call the binary itself as `$REAL`.
fn script(net: &Net, dir: &TempDir, name: &str, text: &str) {
    let path = dir.path().join(name);
    std::fs::remove_file(&path).unwrap();
    let real = net.exe(name).display().to_string();
    std::fs::write(&path, format!("#!/bin/sh\nREAL={real}\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// Runs `lotus-supervisor upgrade`, which may take long on a busy machine.
async fn upgrade(net: &Net, args: &[&str]) -> Result<String, String> {
    let command = tokio::process::Command::new(net.exe("lotus-supervisor"))
        .arg("upgrade")
        .args(args)
        .arg("--repo")
        .arg(net.root())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let out = tokio::time::timeout(secs(900), command)
        .await
        .unwrap()
        .unwrap();
    let err = String::from_utf8_lossy(&out.stderr).into_owned();
    if out.status.success() {
        Ok(err)
    } else {
        Err(format!("{}: {err}", out.status))
    }
}

fn from(dir: &TempDir) -> [&str; 2] {
    ["--from", dir.path().to_str().unwrap()]
}

async fn status(net: &Net) -> Option<serde_json::Value> {
    let root = net.root().display().to_string();
    let args = ["status", "--json", "--repo", &root];
    let text = net.run("lotus-supervisor", &args).await.ok()?;
    serde_json::from_str(&text).ok()
}

/// Folder of the binary that a process runs.
fn dir_of(pid: u32) -> PathBuf {
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    exe.parent().unwrap().to_owned()
}

/// Whether every process runs the binaries of a folder, and is ready.
async fn all_run(net: &Net, dir: &Path) -> Option<()> {
    let all = net.status().await.ok()?;
    for name in UNITS {
        let p = all.iter().find(|p| p.name == name)?;
        if !p.ready || dir_of(p.pid?) != dir {
            return None;
        }
    }
    Some(())
}

async fn pids(net: &Net) -> Vec<Option<u32>> {
    let all = net.status().await.unwrap();
    all.iter().map(|p| p.pid).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_supervisor_replaces_itself_and_what_it_runs_does_not_notice() {
    let net = Net::start(&NetConfig::default()).await.unwrap();
    net.ready(secs(180)).await.unwrap();
    let stored = store(&net, SIZE).await.unwrap();
    let url = net.spoke_url("retrieval").unwrap();
    let downloads = Downloads::start(&url, &stored).unwrap();
    downloads.go_on(&net, 1).await.unwrap();
    let (before, supervisor) = (pids(&net).await, net.supervisor_pid().unwrap());
    for n in 1..=REPLACED {
        upgrade(&net, &[]).await.unwrap();
        assert_eq!(pids(&net).await, before, "{n}");
        assert_eq!(net.supervisor_pid().unwrap(), supervisor, "{n}");
    }
    downloads.go_on(&net, 1).await.unwrap();
    let seen = downloads.end().await;
    assert!(seen.failures.is_empty(), "{seen:?}\n{}", net.logs());
    for p in net.status().await.unwrap() {
        assert_eq!((p.ready, p.restarts), (true, 0), "{p:?}");
    }

    // It is still their parent: it knows how they end.
    let old = net.kill9("indexing").await.unwrap();
    net.wait("a new indexing", secs(60), async |n| {
        let p = n.process("indexing").await.ok()?;
        (p.ready && p.pid != Some(old)).then_some(())
    })
    .await
    .unwrap();
    let all = status(&net).await.unwrap();
    let is = |p: &&serde_json::Value| p["name"] == "indexing";
    let indexing = all["processes"]
        .as_array()
        .unwrap()
        .iter()
        .find(is)
        .unwrap();
    assert_eq!(indexing["last_exit"], "SIGKILL", "{indexing}");

    // A drain of it ends in a stop, and a start takes it back.
    let root = net.root().display().to_string();
    let ask = async |words: &[&str]| {
        let args = [words, &["--repo", &root]].concat();
        net.run("lotus-supervisor", &args).await.unwrap()
    };
    ask(&["drain", "indexing", "--limit", "90s"]).await;
    assert_eq!(net.process("indexing").await.unwrap().state, "stopped");
    ask(&["start", "indexing"]).await;
    net.ready(secs(60)).await.unwrap();
    ask(&["doctor"]).await;
    assert!(ask(&["top"]).await.contains("retrieval"));
    net.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_moves_everything_and_a_way_back_too() {
    let net = Net::start(&NetConfig::default()).await.unwrap();
    net.ready(secs(180)).await.unwrap();
    let old = net.exe("lotus-miner").parent().unwrap().to_owned();
    let new = release(&net);
    let supervisor = net.supervisor_pid().unwrap();
    upgrade(&net, &[&from(&new)[..], &["--force"]].concat())
        .await
        .unwrap();
    // The command shows what it happens to see; what happened stands in the events.
    let root = net.root().display().to_string();
    let events = ["events", "-n", "1000", "--repo", &root];
    let said = net.run("lotus-supervisor", &events).await.unwrap();
    for name in UNITS {
        assert!(said.contains(&format!("moves {name}")), "{said}");
    }
    all_run(&net, new.path()).await.unwrap();
    assert_eq!(net.supervisor_pid().unwrap(), supervisor);
    assert_eq!(dir_of(supervisor), new.path());

    // What crashes is started again from there, and not from where it was before.
    for name in ["hub", "indexing"] {
        let old = net.kill9(name).await.unwrap();
        net.wait("its next run", secs(120), async |n| {
            let p = n.process(name).await.ok()?;
            (p.ready && p.pid != Some(old)).then_some(())
        })
        .await
        .unwrap();
    }
    net.wait("all of the new release", secs(120), async |n| {
        all_run(n, new.path()).await
    })
    .await
    .unwrap();

    // The same once more is refused: the way back needs the folder.
    let again = upgrade(&net, &from(&new)).await.unwrap_err();
    assert!(again.contains("is what runs"), "{again}");

    // The next supervisor is started from where the old release is, and runs the new one.
    net.replace_supervisor().unwrap();
    net.wait("the next supervisor", secs(60), async |n| {
        all_run(n, new.path()).await
    })
    .await
    .unwrap();
    assert_eq!(dir_of(net.supervisor_pid().unwrap()), new.path());

    upgrade(&net, &["--rollback", "--force"]).await.unwrap();
    all_run(&net, &old).await.unwrap();
    assert_eq!(dir_of(net.supervisor_pid().unwrap()), old);
    net.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn downloads_go_on_while_the_release_changes_again_and_again() {
    let cfg = NetConfig {
        services: vec!["deals".into(), "retrieval".into()],
        ..NetConfig::default()
    };
    let net = Net::start(&cfg).await.unwrap();
    net.ready(secs(180)).await.unwrap();
    let stored = store(&net, SIZE).await.unwrap();
    let downloads = Downloads::start(&net.spoke_url("retrieval").unwrap(), &stored).unwrap();
    downloads.go_on(&net, 1).await.unwrap();
    let new = release(&net);
    let pid = async || net.process("retrieval").await.unwrap().pid;
    let mut before = pid().await;
    for n in 1..=REPLACED {
        // Each way back goes to the release before, which is the other one.
        let way = if n == 1 {
            from(&new).to_vec()
        } else {
            vec!["--rollback"]
        };
        upgrade(&net, &[&way[..], &["--force"]].concat())
            .await
            .unwrap();
        let after = pid().await;
        assert_ne!(after, before, "{n}");
        before = after;
        downloads.go_on(&net, 1).await.unwrap();
    }
    let seen = downloads.end().await;
    eprintln!("{REPLACED} upgrades: {:?}", seen.good);
    assert!(seen.failures.is_empty(), "{seen:?}\n{}", net.logs());
    net.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_goes_back() {
    let net = Net::start(&NetConfig::default()).await.unwrap();
    net.ready(secs(180)).await.unwrap();
    let old = net.exe("lotus-miner").parent().unwrap().to_owned();
    let (before, supervisor) = (pids(&net).await, net.supervisor_pid().unwrap());

    // One that does not run is found before anything is touched.
    let new = release(&net);
    script(&net, &new, "lotus-markets", "echo broken >&2; exit 78");
    let e = upgrade(&net, &from(&new)).await.unwrap_err();
    assert!(
        e.contains("nothing was moved") && e.contains("broken"),
        "{e}"
    );
    assert_eq!(pids(&net).await, before);

    // A spoke that ends when it is to work.
    script(
        &net,
        &new,
        "lotus-markets",
        "[ \"$1\" = run ] && exit 1\nexec $REAL \"$@\"",
    );
    let e = upgrade(&net, &[&from(&new)[..], &["--force"]].concat())
        .await
        .unwrap_err();
    assert!(e.contains("the release before runs again"), "{e}");
    assert!(e.contains("deals ended by itself"), "{e}");
    all_run(&net, &old).await.unwrap();

    // A supervisor that is not ready, or panics: the old image is back, in the same process.
    for (fault, words) in [("late", "not ready within"), ("panic", "ended before")] {
        let new = release(&net);
        script(
            &net,
            &new,
            "lotus-supervisor",
            &format!("export LOTUS_SUPERVISOR_FAULT={fault}\nexec $REAL \"$@\""),
        );
        let e = upgrade(&net, &[&from(&new)[..], &["--force"]].concat())
            .await
            .unwrap_err();
        assert!(e.contains(words), "{fault}: {e}");
        all_run(&net, &old).await.unwrap();
        assert_eq!(net.supervisor_pid().unwrap(), supervisor);
        assert_eq!(dir_of(supervisor), old);
    }

    // One that is no supervisor at all: the process is gone, and its heir starts the old one.
    let new = release(&net);
    script(
        &net,
        &new,
        "lotus-supervisor",
        "[ \"$1\" = run ] && exit 1\nexec $REAL \"$@\"",
    );
    let e = upgrade(&net, &[&from(&new)[..], &["--force"]].concat())
        .await
        .unwrap_err();
    assert!(e.contains("the release before runs again"), "{e}");
    all_run(&net, &old).await.unwrap();
    let heirs = net.copies("lotus-supervisor", &["run"]);
    assert_eq!(heirs.len(), 1, "one supervisor");
    assert_ne!(heirs[0], supervisor);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_that_was_killed_goes_back() {
    let mut cfg = NetConfig::default();
    // A script is nothing that a sandbox lets run.
    cfg.sandbox.insert("enabled".into(), false.into());
    let net = Net::start(&cfg).await.unwrap();
    net.ready(secs(180)).await.unwrap();
    let old = net.exe("lotus-miner").parent().unwrap().to_owned();
    let new = release(&net);
    // It runs, and is never ready.
    script(
        &net,
        &new,
        "lotus-markets",
        "[ \"$1\" = run ] && exec sleep 1000\nexec $REAL \"$@\"",
    );
    upgrade(&net, &[&from(&new)[..], &["--force", "--no-wait"]].concat())
        .await
        .unwrap();
    net.wait("the first spoke to be moved", secs(300), async |n| {
        let all = status(n).await?;
        (all["upgrade"]["step"] == "moves deals").then_some(())?;
        let deals = n.process("deals").await.ok()?;
        (deals.state == "starting").then_some(())
    })
    .await
    .unwrap();
    let hub = net.process("hub").await.unwrap().pid.unwrap();
    assert_eq!(dir_of(hub), new.path(), "the hub was moved");
    net.replace_supervisor().unwrap();
    net.wait("everything to be back", secs(300), async |n| {
        all_run(n, &old).await
    })
    .await
    .unwrap();
    let ended = net
        .wait("the upgrade to be over", secs(60), async |n| {
            let all = status(n).await?;
            (all["upgrade"]["running"] == false).then_some(all)
        })
        .await
        .unwrap();
    assert_eq!(ended["upgrade"]["ok"], false, "{ended}");
    let why = ended["upgrade"]["reason"].as_str().unwrap();
    assert!(why.contains("killed"), "{why}");
    net.stop().await.unwrap();
}
