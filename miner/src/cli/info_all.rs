use std::process::Stdio;
use std::time::Duration;

use lotus_runtime::Fault;
use serde_json::{Map, Value};
use tokio::process::Command;

use super::{Cx, print, print_json};

/// What `info all` asks, in the order of a first look at a hub in trouble.
const PARTS: [&[&str]; 18] = [
    &["info"],
    &["doctor"],
    &["mining", "list"],
    &["mining", "allow"],
    &["proving", "info"],
    &["proving", "faults"],
    &["messages", "list"],
    &["actor", "control", "list"],
    &["sectors", "list"],
    &["storage", "list"],
    &["sealing", "jobs"],
    &["sealing", "workers"],
    &["sealing", "sched-diag"],
    &["sectors", "batching", "precommit"],
    &["sectors", "batching", "commit"],
    &["proving", "deadlines", "--all"],
    &["pieces", "list"],
    &["config", "check"],
];
/// How long one part may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs the commands that look, one after the other. One that fails is told and does not end it.
pub(super) async fn all(cx: &Cx) -> Result<(), Fault> {
    let exe = std::env::current_exe()?;
    let mut found = Map::new();
    for part in PARTS {
        let name = part.join(" ");
        let mut command = Command::new(&exe);
        command.args(part).args(["--repo", &cx.repo]);
        if cx.json {
            command.arg("--json");
        }
        let running = command.stdin(Stdio::null()).kill_on_drop(true).output();
        let (out, trouble) = match tokio::time::timeout(LIMIT, running).await {
            Ok(done) => {
                let done = done?;
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
                (text(&done.stdout), text(&done.stderr))
            }
            Err(_) => (String::new(), format!("no answer within {LIMIT:?}")),
        };
        if cx.json {
            let value = serde_json::from_str(&out).unwrap_or(Value::Null);
            let mut part = Map::from_iter([("output".to_owned(), value)]);
            if !trouble.is_empty() {
                part.insert("trouble".into(), trouble.into());
            }
            found.insert(name, part.into());
        } else {
            let trouble = if trouble.is_empty() || out.is_empty() {
                trouble
            } else {
                format!("\n{trouble}")
            };
            print(&format!("# lotus-miner {name}\n{out}{trouble}\n"))?;
        }
    }
    if cx.json {
        return print_json(&found);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Args;

    #[test]
    fn every_part_is_a_command_that_only_looks() {
        for part in PARTS {
            let words = std::iter::once("lotus-miner").chain(part.iter().copied());
            let parsed = Args::try_parse_from(words);
            assert!(parsed.is_ok(), "{part:?}: {:?}", parsed.err());
            assert!(!part.contains(&"--really-do-it"));
        }
    }
}
