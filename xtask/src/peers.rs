//! Programs of others against a storage provider of ours: `cargo xtask peers`.
//!
//! Each peer is a folder in `e2e/peers` and a test of its name in a file of `e2e/tests`. A peer
//! whose tools are not installed is skipped, loudly.

use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;

use crate::{Failed, sh};

/// A program of others.
struct Peer {
    /// Name of its folder, and with `_` of its test.
    name: &'static str,
    /// What it is.
    what: &'static str,
    /// File of its test in `e2e/tests`.
    tests: &'static str,
    /// Programs that it needs, each with what installs it.
    tools: &'static [(&'static str, &'static str)],
}

/// What runs programs from npm.
const NODE: &[(&str, &str)] = &[
    ("node", "apt-get install nodejs"),
    ("npm", "apt-get install npm"),
];

const PEERS: [Peer; 2] = [
    Peer {
        name: "lotus-client",
        what: "client library for Lotus' API (npm: @filecoin-shipyard/lotus-client-rpc)",
        tests: "peers",
        tools: NODE,
    },
    Peer {
        name: "synapse",
        what: "client library of Filecoin Onchain Cloud (npm: @filoz/synapse-core)",
        tests: "peers_pieces",
        tools: NODE,
    },
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Passed,
    Failed,
    Skipped,
}

#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    what: &'static str,
    outcome: Outcome,
    /// Of a skip: what to install.
    #[serde(skip_serializing_if = "String::is_empty")]
    detail: String,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// No peer failed. One that is skipped is no failure, and is named.
    ok: bool,
    passed: usize,
    failed: usize,
    skipped: usize,
    peers: Vec<Row>,
}

impl Report {
    fn new(peers: Vec<Row>) -> Self {
        let count = |outcome| peers.iter().filter(|r| r.outcome == outcome).count();
        let failed = count(Outcome::Failed);
        Self {
            ok: failed == 0,
            passed: count(Outcome::Passed),
            failed,
            skipped: count(Outcome::Skipped),
            peers,
        }
    }
}

/// Runs every peer. The binaries must be built. With `json` nothing but the report goes to the
/// standard output.
pub(crate) fn peers(root: &Path, target: &Path, json: bool) -> Result<(), Failed> {
    let rows = PEERS.iter().map(|peer| {
        let detail = missing(peer);
        let outcome = if detail.is_empty() {
            run(root, target, peer).map_or_else(
                |Failed(why)| {
                    eprintln!("xtask: {why}");
                    Outcome::Failed
                },
                |()| Outcome::Passed,
            )
        } else {
            eprintln!("SKIPPED {}: {detail}", peer.name);
            Outcome::Skipped
        };
        Row {
            name: peer.name,
            what: peer.what,
            outcome,
            detail,
        }
    });
    let report = Report::new(rows.collect());
    if json {
        let text = serde_json::to_string(&report).map_err(|e| Failed::new(e.to_string()))?;
        println!("{text}");
    } else {
        for r in &report.peers {
            println!("{:?} {}: {}", r.outcome, r.name, r.what);
        }
        let Report {
            passed,
            failed,
            skipped,
            ..
        } = report;
        println!("peers: {passed} passed, {failed} failed, {skipped} skipped");
    }
    if !report.ok {
        return Err(Failed::new("a peer failed"));
    }
    Ok(())
}

/// What must be installed first; empty when nothing.
fn missing(peer: &Peer) -> String {
    let there = |tool: &str| {
        let mut command = Command::new(tool);
        command.arg("--version").stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|s| s.success())
    };
    let missing = peer.tools.iter().filter(|(tool, _)| !there(tool));
    let lines: Vec<String> = missing
        .map(|(tool, install)| format!("{tool} is missing: {install}"))
        .collect();
    lines.join("; ")
}

fn run(root: &Path, target: &Path, peer: &Peer) -> Result<(), Failed> {
    let test = peer.name.replace('-', "_");
    let args = [
        "test",
        "--release",
        "--workspace",
        "--test",
        peer.tests,
        &test,
    ];
    let args = args.into_iter().chain(["--", "--ignored", "--exact"]);
    sh::run_quietly(root, "cargo", args, ("LOTUS_PEERS", &target.join("peers")))
}
