//! Programs of others: installed into the folder that `cargo xtask peers` names, and run.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;

use crate::{Failed, secs};

/// Variable with the folder for what is installed.
const FOLDER: &str = "LOTUS_PEERS";
/// Time for one installation: a large Go program on two busy cores.
const INSTALL: Duration = secs(2400);
/// Time for one run of a program.
pub const RUN: Duration = secs(180);

/// The folder for what is installed.
fn folder() -> Result<PathBuf, Failed> {
    std::env::var_os(FOLDER)
        .map(PathBuf::from)
        .ok_or_else(|| Failed::new("run this with `cargo xtask peers`"))
}

/// What was installed for a peer; else says that it is skipped and why, and `cargo xtask peers`
/// counts it so: a registry that does not have it, or no network, is not a failure of ours.
pub fn installed(peer: &str, done: Result<PathBuf, Failed>) -> Option<PathBuf> {
    match done {
        Ok(path) => Some(path),
        Err(Failed(why)) => {
            eprintln!("SKIPPED {peer}: it cannot be installed: {why}");
            let note = folder().map(|f| f.join(format!("{peer}.skipped")));
            note.and_then(|n| Ok(std::fs::write(n, why)?))
                .expect("the folder of the peers can be written");
            None
        }
    }
}

/// A copy of the folder of a peer in `e2e/peers`.
fn copied(peer: &str) -> Result<PathBuf, Failed> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("peers")
        .join(peer);
    let dir = folder()?.join(peer);
    std::fs::create_dir_all(&dir)?;
    for entry in std::fs::read_dir(source)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::copy(entry.path(), dir.join(entry.file_name()))?;
        }
    }
    Ok(dir)
}

/// The program in the folder of a peer in `e2e/peers` that is written in Go, built.
pub async fn go_here(peer: &str) -> Result<PathBuf, Failed> {
    let dir = copied(peer)?;
    let exe = dir.join("peer");
    let mut build = Command::new("go");
    build
        .args(["build", "-mod=mod", "-o", "peer", "."])
        .current_dir(&dir);
    run(&mut build, INSTALL).await?;
    Ok(exe)
}

/// The folder of a peer in `e2e/peers` that comes from npm, installed.
pub async fn npm(peer: &str) -> Result<PathBuf, Failed> {
    let dir = copied(peer)?;
    let mut npm = Command::new("npm");
    npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"])
        .current_dir(&dir);
    run(&mut npm, INSTALL).await?;
    Ok(dir)
}

/// A program of a Go module at a version, such as `("github.com/ipfs/kubo", "v0.42.0",
/// "cmd/ipfs")`, built. Without a package it is that of the module itself. It is built where the module lies, with the versions that its own authors
/// settled on; `go install` refuses modules that exclude or replace others.
pub async fn go(module: &str, version: &str, package: &str) -> Result<PathBuf, Failed> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Downloaded {
        dir: PathBuf,
    }
    let path = if package.is_empty() { module } else { package };
    let name = path.rsplit('/').next().unwrap_or(path);
    let dir = folder()?.join(format!("{name}@{version}"));
    let exe = dir.join(name);
    if exe.is_file() {
        return Ok(exe);
    }
    let mut download = Command::new("go");
    download.args(["mod", "download", "-json", &format!("{module}@{version}")]);
    let downloaded = run(&mut download, INSTALL).await?;
    let downloaded: Downloaded =
        serde_json::from_str(&downloaded).map_err(|e| Failed::at("go mod download", e))?;
    std::fs::create_dir_all(&dir)?;
    let mut build = Command::new("go");
    build
        .args(["build", "-o"])
        .arg(&exe)
        .arg(format!("./{package}"));
    build.current_dir(downloaded.dir);
    run(&mut build, INSTALL).await?;
    Ok(exe)
}

/// Runs a program to its end and returns what it printed; an exit status other than zero is an
/// error with all that it said.
pub async fn run(command: &mut Command, limit: Duration) -> Result<String, Failed> {
    let shown = format!("{:?}", command.as_std());
    let running = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let done = tokio::time::timeout(limit, running).await;
    let out = done
        .map_err(|_| Failed(format!("{shown} did not end within {limit:?}")))?
        .map_err(|e| Failed::at(&shown, e))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if !out.status.success() {
        let (printed, said) = (text(&out.stdout), text(&out.stderr));
        return Err(Failed(format!("{shown}: {}\n{printed}{said}", out.status)));
    }
    Ok(text(&out.stdout))
}
