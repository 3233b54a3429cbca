//! Programs of others against a storage provider of ours: `cargo xtask peers`.
//!
//! Each peer is a test of its name in `e2e/tests/peers*.rs`, which installs what it needs of the
//! peer itself. A peer whose tools are not installed is skipped, loudly.

use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;

use crate::{Failed, sh};

/// A program of others.
struct Peer {
    /// Its name, and with `_` that of its test.
    name: &'static str,
    /// What it is.
    what: &'static str,
    /// The file of `e2e/tests` that its test is in.
    file: &'static str,
    /// Programs that it needs.
    tools: &'static [Tool],
}

/// A program that a peer needs.
struct Tool {
    name: &'static str,
    /// What it is asked for its version with.
    version: &'static str,
    /// What installs it.
    install: &'static str,
}

const NODE: Tool = Tool {
    name: "node",
    version: "--version",
    install: "apt-get install nodejs",
};
const NPM: Tool = Tool {
    name: "npm",
    version: "--version",
    install: "apt-get install npm",
};
const GO: Tool = Tool {
    name: "go",
    version: "version",
    install: "Go 1.26.5 or newer from https://go.dev/dl",
};

const PEERS: [Peer; 9] = [
    Peer {
        name: "lotus-client",
        what: "client library for Lotus' API (npm: @filecoin-shipyard/lotus-client-rpc)",
        file: "peers",
        tools: &[NODE, NPM],
    },
    Peer {
        name: "synapse",
        what: "client library of Filecoin Onchain Cloud (npm: @filoz/synapse-core)",
        file: "peers_pieces",
        tools: &[NODE, NPM],
    },
    Peer {
        name: "boostly",
        what: "client of deals by proposal, MK1.2 (github.com/filecoin-shipyard/boostly), over libp2p",
        file: "peers_deals",
        tools: &[GO],
    },
    Peer {
        name: "go-car",
        what: "CAR library (github.com/ipld/go-car), on our indexes of pieces",
        file: "peers_indexing",
        tools: &[GO],
    },
    Peer {
        name: "storetheindex",
        what: "indexer of IPNI (github.com/ipni/storetheindex v0.12.1), asked by \
               github.com/ipni/ipni-cli v0.5.2",
        file: "peers_indexing",
        tools: &[GO],
    },
    Peer {
        name: "stream-commp",
        what: "library of stream-commp (github.com/filecoin-project/go-fil-commp-hashhash v0.2.0), \
               on our commitments of pieces",
        file: "peers_pieces",
        tools: &[GO],
    },
    Peer {
        name: "gateway-conformance",
        what: "test suite of the trustless gateway (github.com/ipfs/gateway-conformance v0.13.2)",
        file: "peers_gateway",
        tools: &[GO],
    },
    Peer {
        name: "lassie",
        what: "retrieval client (github.com/filecoin-project/lassie v0.25.0), over HTTP",
        file: "peers_gateway",
        tools: &[GO],
    },
    Peer {
        name: "kubo",
        what: "IPFS node (github.com/ipfs/kubo v0.42.0), over TLS and HTTP/2",
        file: "peers_gateway",
        tools: &[GO],
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
    /// Of a skip: what to install, or why it cannot be. Of a failure: the command.
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

/// Fails if a name is that of no peer.
pub(crate) fn check(only: &[String]) -> Result<(), Failed> {
    match only.iter().find(|n| !PEERS.iter().any(|p| p.name == **n)) {
        None => Ok(()),
        Some(name) => {
            let names: Vec<&str> = PEERS.iter().map(|p| p.name).collect();
            let names = names.join(", ");
            Err(Failed::new(format!(
                "no peer is called {name:?}; there are {names}"
            )))
        }
    }
}

/// Runs every peer, or `only` those. The binaries must be built. With `json` nothing but the
/// report goes to the standard output.
pub(crate) fn peers(root: &Path, target: &Path, only: &[String], json: bool) -> Result<(), Failed> {
    let asked = |p: &&Peer| only.is_empty() || only.iter().any(|n| n == p.name);
    let rows = PEERS.iter().filter(asked).map(|peer| {
        let detail = missing(peer);
        let (outcome, detail) = if detail.is_empty() {
            run(root, target, peer)
        } else {
            (Outcome::Skipped, detail)
        };
        match outcome {
            Outcome::Passed => {}
            Outcome::Failed => eprintln!("FAILED {}: {detail}", peer.name),
            Outcome::Skipped => eprintln!("SKIPPED {}: {detail}", peer.name),
        }
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
    let there = |tool: &Tool| {
        let mut command = Command::new(tool.name);
        command.arg(tool.version).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|s| s.success())
    };
    let missing = peer.tools.iter().filter(|tool| !there(tool));
    let lines: Vec<String> = missing
        .map(|tool| format!("{} is missing: {}", tool.name, tool.install))
        .collect();
    lines.join("; ")
}

/// Runs its test, which installs the peer, or notes why that is not possible.
fn run(root: &Path, target: &Path, peer: &Peer) -> (Outcome, String) {
    let folder = target.join("peers");
    let note = folder.join(format!("{}.skipped", peer.name));
    let ran = std::fs::create_dir_all(&folder).and_then(|()| match std::fs::remove_file(&note) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    });
    let test = peer.name.replace('-', "_");
    let args = ["test", "--release", "--workspace", "--test", peer.file];
    let args = args
        .into_iter()
        .chain([&*test, "--", "--ignored", "--exact"]);
    let ran = ran
        .map_err(Failed::from)
        .and_then(|()| sh::run_quietly(root, "cargo", args, ("LOTUS_PEERS", &folder)));
    match (ran, std::fs::read_to_string(note)) {
        (Err(Failed(why)), _) => (Outcome::Failed, why),
        (Ok(()), Ok(why)) => {
            let first = why.lines().next().unwrap_or_default();
            let last = why.lines().last().filter(|l| *l != first);
            let detail = [Some("it cannot be installed"), Some(first), last];
            let detail: Vec<&str> = detail.into_iter().flatten().collect();
            (Outcome::Skipped, detail.join(": "))
        }
        (Ok(()), Err(_)) => (Outcome::Passed, String::new()),
    }
}
