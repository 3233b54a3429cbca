use std::net::SocketAddr;

use lotus_node_client::api::TipSetKey;
use lotus_proofs::ProofMode;
use lotus_proofs::params::{self, Circuit};
use lotus_runtime::Fault;
use lotus_types::Kind;
use serde::Serialize;
use tokio::net::TcpListener;

use super::init::look_up;
use super::parts::{checks as checks_of, parts};
use super::{Cx, bytes, print, print_json, table};
use crate::config::MinerConfig;
use crate::network::from_proofs;
use crate::repo::Repo;
use crate::run::from_node;

#[derive(Serialize)]
struct Check {
    name: String,
    ok: bool,
    detail: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    fix: String,
}

/// Checks what a start needs, and how a hub is that runs. Fails with the first problem's kind.
pub(super) async fn doctor(cx: &Cx) -> Result<(), Fault> {
    let repo = cx.repo()?;
    let mut checks: Vec<(Check, Kind)> = Vec::new();
    let mut add = |name: &str, result: Result<String, Fault>| {
        let name = name.to_owned();
        checks.push(match result {
            Ok(detail) => (
                Check {
                    name,
                    ok: true,
                    detail,
                    fix: String::new(),
                },
                Kind::Config,
            ),
            Err(f) => (
                Check {
                    name,
                    ok: false,
                    detail: f.message,
                    fix: f.fix,
                },
                f.kind,
            ),
        });
    };
    let cfg = if repo.is_initialised() {
        MinerConfig::load(&repo.config())
    } else {
        Err(Fault::new(
            Kind::Config,
            format!("{} is no hub repo", repo.root().display()),
            "run `lotus-miner init --actor <your actor>`",
        ))
    };
    match &cfg {
        Ok(_) => add("configuration", Ok(repo.config().display().to_string())),
        Err(f) => add("configuration", Err(f.clone())),
    }
    if let Ok(cfg) = &cfg {
        add("disk", disk(&repo, cfg));
        let running = cx.hub().await.is_ok();
        add(
            "hub",
            Ok(if running { "running" } else { "not running" }.into()),
        );
        if running {
            match parts(cx).await {
                Ok(told) => {
                    for (name, check) in checks_of(told) {
                        add(&name, check);
                    }
                }
                Err(e) => add("hub: parts", Err(e)),
            }
        } else {
            add("api.listen", port("api.listen", cfg.api.listen).await);
            if let Some(listen) = cfg.lotus_api.address()? {
                add("lotus_api.listen", port("lotus_api.listen", listen).await);
            }
        }
        let by = cfg.node.named_by();
        let named = if cfg.node.is_overridden() {
            format!("{by}, which overrides config.toml")
        } else {
            by.to_string()
        };
        add("node named by", Ok(named));
        let parameters = parameters(cfg)?;
        add("parameters", parameters);
        let found = look_up(&cfg.node, cfg.actor()?).await;
        if let Ok(found) = &found {
            add("proofs", proofs(cfg.proofs.mode, found.proofs));
        }
        if found.is_ok() {
            add("faulty sectors", faults(cx).await);
        }
        add(
            "full node",
            found.map(|f| format!("{}, worker {} can sign", f.network, f.worker)),
        );
    }
    let bad = checks
        .iter()
        .find(|(c, _)| !c.ok)
        .map(|(c, kind)| Fault::new(*kind, format!("{}: {}", c.name, c.detail), c.fix.clone()));
    let checks: Vec<Check> = checks.into_iter().map(|(c, _)| c).collect();
    if cx.json {
        print_json(&checks)?;
    } else {
        let mut out = table(&["Check", "", "Detail"]);
        for c in &checks {
            let detail = if c.ok {
                c.detail.clone()
            } else {
                format!("{}\nfix: {}", c.detail, c.fix)
            };
            out.add_row([
                c.name.as_str(),
                if c.ok { "ok" } else { "bad" },
                detail.as_str(),
            ]);
        }
        print(&out.to_string())?;
    }
    bad.map_or(Ok(()), Err)
}

/// What the chain has of faults.
async fn faults(cx: &Cx) -> Result<String, Fault> {
    let (node, cfg) = cx.node()?;
    let (miner, head) = (cfg.actor()?.address(), TipSetKey::HEAD);
    let faulty = node.state_miner_faults(miner, &head).await;
    let faulty = faulty.map_err(|e| from_node(&e))?;
    let recovering = node.state_miner_recoveries(miner, &head).await;
    let recovering = recovering.map_err(|e| from_node(&e))?;
    let left = &faulty - &recovering;
    if left.is_empty() {
        return Ok(match faulty.len() {
            0 => "none".into(),
            n => format!("{n}, all declared as recovered"),
        });
    }
    Err(Fault::new(
        Kind::Data,
        format!(
            "{} of {} faulty sectors are not declared as recovered",
            left.len(),
            faulty.len()
        ),
        "see `lotus-miner proving faults`, repair or attach what holds them, and \
         `lotus-miner proving check`",
    ))
}

fn disk(repo: &Repo, cfg: &MinerConfig) -> Result<String, Fault> {
    let s = rustix::fs::statvfs(repo.root()).map_err(|e| Fault::from(std::io::Error::from(e)))?;
    let free = s.f_bavail * s.f_frsize;
    let text = format!(
        "{} free, {} are kept free",
        bytes(free),
        bytes(cfg.pieces.keep_free_bytes)
    );
    if free > cfg.pieces.keep_free_bytes {
        Ok(text)
    } else {
        Err(Fault::new(
            Kind::Capacity,
            text,
            "free space, or lower pieces.keep_free_bytes",
        ))
    }
}

/// Whether the files of the proofs are there.
fn parameters(cfg: &MinerConfig) -> Result<Result<String, Fault>, Fault> {
    let (size, circuits) = (cfg.sector_size()?, Circuit::of(cfg.proofs.mode));
    Ok(match params::require(circuits, size) {
        Ok(()) if circuits.is_empty() => Ok("none are needed".into()),
        Ok(()) => Ok(format!("in {}", params::folder().display())),
        Err(e) => Err(from_proofs(&e)),
    })
}

fn proofs(ours: ProofMode, wanted: ProofMode) -> Result<String, Fault> {
    if ours == wanted {
        return Ok(ours.to_string());
    }
    Err(Fault::new(
        Kind::Config,
        format!("the network takes {wanted} proofs, proofs.mode is {ours}"),
        format!("set proofs.mode to \"{wanted}\""),
    ))
}

async fn port(key: &str, listen: SocketAddr) -> Result<String, Fault> {
    TcpListener::bind(listen)
        .await
        .map(|_| format!("{listen} is free"))
        .map_err(|e| Fault::bind(&listen, key, &e))
}
