//! Mining under kills, reorgs and null rounds: every won round has one block or a logged reason.
//! Then the ways in which a second block could come about: another hub beside, a restored backup, a
//! fresh repo for an actor that mined a moment ago, and another hub while this one was down.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use lotus_actors::{Dst, address_entropy, draw_randomness, win_count};
use lotus_e2e::sectors::{HEAD, MINER, Worker};
use lotus_e2e::{Failed, Net, NetConfig, secs};
use lotus_node_client::Node;
use lotus_node_client::api::TipSet;
use lotus_types::{Epoch, SectorSize};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};

use crate::kills::Kills;

/// Enough to win nearly every round of a network of its own.
const SECTORS: u64 = 4;
/// Rounds before the end that may still be open.
const TAIL: i64 = 3;
/// Rounds below the head that the reorgs of this run do not reach.
const SETTLED_ROUNDS: i64 = 20;
/// How long a hub may take until it mines, or refuses.
const SETTLED: Duration = secs(120);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Epochs of mining under kills
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(i64).range(20..))]
    epochs: i64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) ok: bool,
    seed: u64,
    epochs: i64,
    /// Rounds that the miner had won, by its own VRF.
    won: usize,
    /// Of these, with a block in the log.
    blocks: usize,
    /// Of these blocks, on the chain at the end.
    blocks_on_chain: usize,
    /// Of these, without a block for a logged reason.
    reasons: usize,
    /// Of these, while no hub took part: logged as a range.
    not_attended: usize,
    /// Of these, with nothing in the log. Must be 0.
    untold: usize,
    /// Own blocks on the chain that the log lacks. Must be 0.
    unlogged_blocks: usize,
    reorgs: u64,
    null_rounds: u64,
    kills: BTreeMap<String, u64>,
    /// What the second hub on this host said.
    second_hub: String,
    /// What the hub said after an old backup was restored.
    restored_backup: String,
    /// What a hub in a fresh repo said, whose actor had mined a moment ago.
    fresh_repo: String,
    /// What the hub said after its actor had mined elsewhere.
    mined_elsewhere: String,
    seconds: f64,
}

/// An entry of `lotus-miner mining list --json`.
#[derive(Debug, Deserialize)]
struct Entry {
    height: i64,
    outcome: Outcome,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Open,
    Mined { cid: String },
    Unsure { cid: String },
    NoBlock { why: String },
    NotAttended { through: i64, why: String },
}

pub(crate) async fn run(options: &Options, seed: u64) -> Result<Report, Failed> {
    let start = Instant::now();
    let mut cfg = NetConfig {
        devnet_args: "--listen 127.0.0.1:0 --sector-size 2KiB --block-time-ms 500 --deadlines 4 \
                      --deadline-epochs 12 --winning-lookback 10 --seed-delay 3"
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
        services: Vec::new(),
        ..NetConfig::default()
    };
    let none = "LOTUS_MINER__WORKERS__SEAL_WORKERS";
    cfg.hub_env.insert(none.into(), "0".into());
    let net = Net::start(&cfg).await?;
    net.ready(secs(120)).await?;
    let node = net.node()?;
    let worker = Worker::start(&net, SectorSize::S2KiB).await?;
    worker.onboard(SECTORS).await?;
    worker.end().await;
    let from = first_own_block(&net, &node).await?;
    let to = Epoch(from.0 + options.epochs);
    eprintln!("mining from epoch {from} to {to}");

    let kills = Kills::new(seed);
    let mut faults = Faults::new(seed);
    let mut elections = Elections::after(from);
    tokio::select! {
        done = faults.until(&net, &node, &mut elections, to) => done?,
        () = kills.strike(&net, "hub", 15_000..90_000) => {}
        () = kills.strike(&net, "prove", 4_000..20_000) => {}
    }
    net.ready(secs(120)).await?;
    mines(&net, &node).await?;
    let entries = log(&net).await?;
    elections.hold(&node, to.0 - TAIL).await?;
    let told = elections.told(&entries);

    let second_hub = second_hub(&net, &cfg).await?;
    let restored_backup = restored_backup(&net, &node).await?;
    let (fresh_repo, mined_elsewhere) = mined_elsewhere(&net, &node, &cfg).await?;
    // After all of that the log is what it was.
    let later = log(&net).await?;
    let kept = entries
        .iter()
        .filter(|e| e.height <= to.0)
        .all(|e| later.iter().any(|l| l.height == e.height));

    let refused = [&second_hub, &restored_backup, &fresh_repo, &mined_elsewhere];
    let report = Report {
        ok: told.untold.is_empty()
            && told.unlogged == 0
            && kept
            && refused.iter().all(|why| why.contains("refused")),
        seed,
        epochs: options.epochs,
        won: told.won,
        blocks: told.blocks,
        blocks_on_chain: told.on_chain,
        reasons: told.reasons.values().sum(),
        not_attended: told.not_attended,
        untold: told.untold.len(),
        unlogged_blocks: told.unlogged,
        reorgs: faults.reorgs,
        null_rounds: faults.null_rounds,
        kills: kills.count(),
        second_hub,
        restored_backup,
        fresh_repo,
        mined_elsewhere,
        seconds: start.elapsed().as_secs_f64(),
    };
    for (why, n) in &told.reasons {
        eprintln!("{n} rounds: {why}");
    }
    if report.ok {
        net.stop().await?;
    } else {
        eprintln!("untold: {:?}, kept {kept}\n{}", told.untold, net.logs());
        net.keep();
    }
    Ok(report)
}

/// What happens to the chain meanwhile.
struct Faults {
    random: StdRng,
    reorgs: u64,
    null_rounds: u64,
}

impl Faults {
    fn new(seed: u64) -> Self {
        Self {
            random: StdRng::seed_from_u64(!seed),
            reorgs: 0,
            null_rounds: 0,
        }
    }

    /// Reorgs and null rounds every now and then, until an epoch.
    async fn until(
        &mut self,
        net: &Net,
        node: &Node,
        elections: &mut Elections,
        to: Epoch,
    ) -> Result<(), Failed> {
        let repo = net.root().join("devnet").display().to_string();
        loop {
            let wait = self.random.random_range(5_000..25_000);
            let end = Instant::now() + Duration::from_millis(wait);
            while Instant::now() < end {
                let head = node.chain_head().await;
                let head = head.map_err(|e| Failed::at("ChainHead", e))?.height;
                if head >= to {
                    return Ok(());
                }
                elections.hold(node, head.0 - SETTLED_ROUNDS).await?;
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            let n = self.random.random_range(1..4u64);
            let what = if self.random.random_bool(0.5) {
                self.reorgs += 1;
                "reorg"
            } else {
                self.null_rounds += n;
                "null-rounds"
            };
            let n = n.to_string();
            net.run("lotus-devnet", &["--repo", &repo, "fault", what, &n])
                .await?;
            eprintln!("{what} {n}");
        }
    }
}

async fn first_own_block(net: &Net, node: &Node) -> Result<Epoch, Failed> {
    net.wait("the first own block", SETTLED, async |_| {
        let head = node.chain_head().await.ok()?;
        let own = head.blocks.iter().any(|b| b.miner == MINER.address());
        own.then_some(head.height)
    })
    .await
}

/// Waits until the hub mines again.
async fn mines(net: &Net, node: &Node) -> Result<(), Failed> {
    let now = node
        .chain_head()
        .await
        .map_err(|e| Failed::at("ChainHead", e))?;
    net.wait("a new own block", SETTLED, async |_| {
        let head = node.chain_head().await.ok()?;
        let own = head.blocks.iter().any(|b| b.miner == MINER.address());
        (own && head.height > now.height).then_some(())
    })
    .await
}

async fn log(net: &Net) -> Result<Vec<Entry>, Failed> {
    let repo = net.root().join("miner").display().to_string();
    let args = [
        "mining", "list", "--limit", "10000", "--json", "--repo", &repo,
    ];
    let text = net.run("lotus-miner", &args).await?;
    serde_json::from_str(&text).map_err(|e| Failed::at("mining list --json", e))
}

#[derive(Default)]
struct Told {
    won: usize,
    blocks: usize,
    on_chain: usize,
    not_attended: usize,
    reasons: BTreeMap<String, usize>,
    untold: Vec<i64>,
    unlogged: usize,
}

/// The elections of the chain, held again. A node keeps the states that they look back to for a
/// while only, so this goes on while the chain does.
struct Elections {
    /// Everything up to here is done.
    done: i64,
    /// Rounds that the miner had won.
    won: Vec<i64>,
    /// Its blocks on the chain: round and CID.
    blocks: Vec<(i64, String)>,
}

impl Elections {
    fn after(from: Epoch) -> Self {
        Self {
            done: from.0,
            won: Vec::new(),
            blocks: Vec::new(),
        }
    }

    /// Goes on to the round `to`, which no reorg reaches any more.
    async fn hold(&mut self, node: &Node, to: i64) -> Result<(), Failed> {
        if to <= self.done {
            return Ok(());
        }
        let fail = |what: &'static str| move |e| Failed::at(what, e);
        let at = node.chain_get_tipset_by_height(Epoch(to), HEAD).await;
        let mut tipset = at.map_err(fail("ChainGetTipSetByHeight"))?;
        let mut end = to + 1;
        loop {
            let height = tipset.height.0;
            // Null rounds on top of it.
            for round in (height + 1).max(self.done + 1)..end {
                if won(node, &tipset, Epoch(round)).await? {
                    self.won.push(round);
                }
            }
            if height <= self.done {
                break;
            }
            let parent = node.chain_get_tipset(&tipset.parents()).await;
            let parent = parent.map_err(fail("ChainGetTipSet"))?;
            if won(node, &parent, tipset.height).await? {
                self.won.push(height);
            }
            let own = own_blocks(&tipset).into_iter();
            self.blocks.extend(own.map(|cid| (height, cid)));
            (tipset, end) = (parent, height);
        }
        self.done = to;
        Ok(())
    }

    /// Compares with the log.
    fn told(&self, entries: &[Entry]) -> Told {
        let mut told = Told {
            won: self.won.len(),
            ..Told::default()
        };
        let entry = |round| {
            entries
                .iter()
                .find(|e| e.height == round)
                .map(|e| &e.outcome)
        };
        for (i, (round, cid)) in self.blocks.iter().enumerate() {
            let logged = matches!(
                entry(*round),
                Some(Outcome::Mined { cid: c } | Outcome::Unsure { cid: c }) if c == cid
            );
            let second = self.blocks[..i].iter().any(|(other, _)| other == round);
            told.unlogged += usize::from(!logged || second);
        }
        for round in &self.won {
            match entry(*round) {
                Some(Outcome::Mined { cid } | Outcome::Unsure { cid }) => {
                    let on_chain = self.blocks.iter().any(|(r, c)| r == round && c == cid);
                    told.blocks += 1;
                    told.on_chain += usize::from(on_chain);
                }
                Some(Outcome::NoBlock { why }) => {
                    let why = why.split(':').next().unwrap_or_default().to_owned();
                    *told.reasons.entry(why).or_default() += 1;
                }
                Some(Outcome::NotAttended { .. }) => told.not_attended += 1,
                None if entries.iter().any(|e| covers(e, *round)) => told.not_attended += 1,
                Some(Outcome::Open) | None => told.untold.push(*round),
            }
        }
        told
    }
}

fn covers(e: &Entry, round: i64) -> bool {
    match &e.outcome {
        Outcome::NotAttended { through, why } => {
            !why.is_empty() && (e.height..=*through).contains(&round)
        }
        Outcome::Open
        | Outcome::Mined { .. }
        | Outcome::Unsure { .. }
        | Outcome::NoBlock { .. } => false,
    }
}

fn own_blocks(t: &TipSet) -> Vec<String> {
    let own = t.cids.iter().zip(&t.blocks);
    own.filter(|(_, b)| b.miner == MINER.address())
        .map(|(c, _)| c.to_string())
        .collect()
}

/// Whether the miner had won a round: the node signs the election's VRF again.
async fn won(node: &Node, base: &TipSet, round: Epoch) -> Result<bool, Failed> {
    let miner = MINER.address();
    let info = node
        .miner_get_base_info(miner, round, &base.key())
        .await
        .map_err(|e| Failed::at("MinerGetBaseInfo", e))?;
    let Some(info) = info.filter(|i| i.eligible_for_mining) else {
        return Ok(false);
    };
    let entry = info
        .beacon_entries
        .last()
        .unwrap_or(&info.prev_beacon_entry);
    let entropy = address_entropy(&miner);
    let seed = draw_randomness(&entry.data, Dst::ElectionProofProduction, round, &entropy);
    let vrf = node.wallet_sign(info.worker_key, &seed).await;
    let vrf = vrf.map_err(|e| Failed::at("WalletSign", e))?;
    Ok(win_count(&vrf.bytes, &info.miner_power, &info.network_power) > 0)
}

/// What a hub's health says of mining.
async fn mining_health(repo: &Path) -> Option<String> {
    let addr = lotus_runtime::addr_file::read(&repo.join("run"), "admin").ok()?;
    let answer = reqwest::get(format!("http://{addr}/readyz")).await.ok()?;
    let value: serde_json::Value = answer.json().await.ok()?;
    let mining = &value["components"]["mining"];
    Some(mining["detail"].as_str()?.to_owned())
}

async fn refusal(net: &Net, repo: &Path) -> Result<String, Failed> {
    net.wait("a refusal to mine", SETTLED, async |_| {
        let said = mining_health(repo).await?;
        said.contains("refused").then_some(said)
    })
    .await
}

/// A hub of the same actor in a repo of its own, beside the supervisor.
struct Beside {
    repo: PathBuf,
    child: Child,
}

impl Beside {
    async fn start(net: &Net, cfg: &NetConfig, name: &str) -> Result<Self, Failed> {
        let repo = net.root().join(name);
        let dir = repo.display().to_string();
        let devnet = net.root().join("devnet").display().to_string();
        let init = [
            "init",
            "--repo",
            &dir,
            "--actor",
            "t01000",
            "--node-repo",
            &devnet,
        ];
        net.run("lotus-miner", &init).await?;
        let log = std::fs::File::create(repo.join("hub.log"))?;
        let child = Command::new(net.exe("lotus-miner"))
            .args(["run", "--repo", &dir])
            .envs(&cfg.hub_env)
            // It has no sectors: a deadline that it attends must not be declared faulty by it.
            .env("LOTUS_MINER__PROVING__ENABLED", "false")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| Failed::at("lotus-miner", e))?;
        Ok(Self { repo, child })
    }

    async fn end(mut self) -> Result<(), Failed> {
        self.child.kill().await?;
        Ok(())
    }
}

/// Two hubs on one actor on one host: the second refuses, the first goes on.
async fn second_hub(net: &Net, cfg: &NetConfig) -> Result<String, Failed> {
    let second = Beside::start(net, cfg, "second").await?;
    let said = refusal(net, &second.repo).await?;
    eprintln!("second hub: {said}");
    second.end().await?;
    mines(net, &net.node()?).await?;
    Ok(said)
}

/// The journal as it was some blocks ago.
async fn restored_backup(net: &Net, node: &Node) -> Result<String, Failed> {
    let repo = net.root().join("miner");
    let (journal, backup) = (repo.join("journal.redb"), repo.join("backup"));
    let newest = repo.join("newest");
    supervisor(net, "stop").await?;
    std::fs::copy(&journal, &backup)?;
    supervisor(net, "start").await?;
    mines(net, node).await?;
    supervisor(net, "stop").await?;
    std::fs::rename(&journal, &newest)?;
    std::fs::copy(&backup, &journal)?;
    supervisor(net, "start").await?;
    let said = refusal(net, &repo).await?;
    eprintln!("restored backup: {said}");
    supervisor(net, "stop").await?;
    std::fs::rename(&newest, &journal)?;
    supervisor(net, "start").await?;
    mines(net, node).await?;
    Ok(said)
}

/// A fresh repo does not mine while the actor's last blocks may be of a hub that lives. Once it is
/// told that there is none, it does, while the hub is down: which then refuses in its turn.
async fn mined_elsewhere(
    net: &Net,
    node: &Node,
    cfg: &NetConfig,
) -> Result<(String, String), Failed> {
    supervisor(net, "stop").await?;
    copy(
        &net.root().join("miner/storage"),
        &net.root().join("elsewhere/storage"),
    )?;
    let other = Beside::start(net, cfg, "elsewhere").await?;
    let fresh = refusal(net, &other.repo).await?;
    eprintln!("fresh repo: {fresh}");
    let dir = other.repo.display().to_string();
    let allow = [
        "mining",
        "allow",
        "--reason",
        "the hub is stopped",
        "--really-do-it",
        "--repo",
        &dir,
    ];
    net.run("lotus-miner", &allow).await?;
    mines(net, node).await?;
    other.end().await?;
    supervisor(net, "start").await?;
    let said = refusal(net, &net.root().join("miner")).await?;
    eprintln!("mined elsewhere: {said}");
    Ok((fresh, said))
}

async fn supervisor(net: &Net, what: &str) -> Result<(), Failed> {
    let root = net.root().display().to_string();
    let (args, wanted) = match what {
        "stop" => (vec!["stop", "hub", "--force", "--repo", &root], "stopped"),
        _ => (vec![what, "hub", "--repo", &root], "ready"),
    };
    net.run("lotus-supervisor", &args).await?;
    net.wait(&format!("the hub to be {wanted}"), SETTLED, async |n| {
        let hub = n.process("hub").await.ok()?;
        (hub.state == wanted).then_some(())
    })
    .await
}

fn copy(from: &Path, to: &Path) -> Result<(), Failed> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
