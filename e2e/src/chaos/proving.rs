//! Proving days: hundreds of sectors, proving periods in which hub and prove workers die at
//! random, and replicas that are overwritten throughout and later repaired. What is counted is
//! read from the chain.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lotus_actors::miner::{
    DECLARE_FAULTS, DECLARE_FAULTS_RECOVERED, DISPUTE_WINDOWED_POST, DeclareFaultsParams,
    DeclareFaultsRecoveredParams, SUBMIT_WINDOWED_POST, SubmitWindowedPoStParams,
};
use lotus_e2e::history::{History, Landed};
use lotus_e2e::sectors::{HEAD, MINER, Worker, replica};
use lotus_e2e::{Failed, Net, NetConfig, secs};
use lotus_node_client::Node;
use lotus_node_client::api::{DeadlineInfo, Partition};
use lotus_types::{Address, Epoch, SectorSize};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde::Serialize;

use crate::kills::Kills;

/// Replicas that are overwritten.
const BAD: usize = 10;
/// Milliseconds between two kills of the hub. Mostly above the minute after which the supervisor
/// forgets a crash: its back-off of up to half a minute is one epoch of a real network, but
/// several deadlines here.
const HUB_KILLS_MS: std::ops::Range<u64> = 45_000..110_000;
/// Epochs between two readings of the chain's messages, which the devnet keeps for 900.
const HISTORY: i64 = 300;
/// How often the chain is looked at for faults: they last at least a proving period.
const LOOK: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Sectors of 2 KiB to prove
    #[arg(long, default_value_t = 500)]
    sectors: u64,
    /// Proving periods
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i64).range(3..=100))]
    periods: i64,
    /// Deadlines of a proving period
    #[arg(long, default_value_t = 48)]
    deadlines: u64,
    /// Epochs of a deadline
    #[arg(long, default_value_t = 12)]
    deadline_epochs: i64,
    /// Milliseconds of an epoch
    #[arg(long, default_value_t = 500)]
    block_time_ms: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) ok: bool,
    seed: u64,
    sectors: u64,
    periods: i64,
    /// Deadlines with sectors that opened and closed meanwhile.
    deadlines: usize,
    /// Of these, the ones with a partition that no accepted message proved.
    missed_deadlines: usize,
    /// Overwritten replicas.
    overwritten: usize,
    /// Of these, declared faulty before the cut-off, or skipped in a proof.
    faults_declared: usize,
    /// Of these, declared as recovered and active at the end.
    recovered: usize,
    /// Sectors that were faulty on chain although nothing was wrong with them.
    unexpected_faults: BTreeSet<u64>,
    /// Wrong proofs that the chain found.
    disputes: usize,
    /// Messages of the hub that landed with an exit code other than 0.
    failed_messages: usize,
    /// WindowPoSt messages that were accepted.
    post_messages: usize,
    kills: BTreeMap<String, u64>,
    seconds: f64,
}

/// Every partition with sectors, by deadline.
type Plan = BTreeMap<u64, Vec<Partition>>;

pub(crate) async fn run(options: &Options, seed: u64) -> Result<Report, Failed> {
    let start = Instant::now();
    let mut cfg = NetConfig {
        devnet_args: format!(
            "--listen 127.0.0.1:0 --sector-size 2KiB --block-time-ms {} --deadlines {} \
             --deadline-epochs {} --winning-lookback 10 --seed-delay 3",
            options.block_time_ms, options.deadlines, options.deadline_epochs
        )
        .split_whitespace()
        .map(str::to_owned)
        .collect(),
        services: Vec::new(),
        ..NetConfig::default()
    };
    for (key, value) in [
        ("LOTUS_MINER__WORKERS__SEAL_WORKERS", "0"),
        ("LOTUS_MINER__WORKERS__PROVE_WORKERS", "3"),
        ("LOTUS_MINER__PROVING__CHECK_BEFORE_DEADLINE", "proof"),
    ] {
        cfg.hub_env.insert(key.into(), value.into());
    }
    let net = Net::start(&cfg).await?;
    net.ready(secs(120)).await?;
    let node = net.node()?;
    let worker = Worker::start(&net, SectorSize::S2KiB).await?;
    worker.set_control(control(&net).await?).await?;
    worker.onboard(options.sectors).await?;
    worker.end().await;

    let plan = plan(&node).await?;
    let di = proving_deadline(&node).await?;
    // Whole windows only: the one that is open may have been open before its sectors were there.
    let (from, period) = (di.close, di.w_post_proving_period.0);
    let to = Epoch(from.0 + options.periods * period);
    eprintln!(
        "{} sectors in {} deadlines, epochs {from} to {to}",
        options.sectors,
        plan.len()
    );
    let mut random = StdRng::seed_from_u64(seed);
    let bad = choose(&plan, &mut random);
    let kills = Kills::new(seed);
    let watched = {
        let hub = kills.strike(&net, "hub", HUB_KILLS_MS);
        let prove = kills.strike(&net, "prove", 3_000..12_000);
        let days = days(&net, &node, &bad, from, to, period, &mut random);
        tokio::select! {
            done = days => done?,
            () = hub => return Err(Failed::new("no more kills")),
            () = prove => return Err(Failed::new("no more kills")),
        }
    };
    let (watched, messages) = watched;
    let seen = Seen::of(&messages, from, to)?;
    let missed = seen.missed(&plan, &di, from, to);
    let active = active(&node).await?;
    let disputes = seen.disputes + wrong_proofs(&net)?;
    let covered = |set: &BTreeSet<u64>| bad.iter().filter(|n| set.contains(n)).count();
    let recovered = bad
        .iter()
        .filter(|n| seen.recovered.contains(n) && active.contains(n))
        .count();
    let report = Report {
        ok: missed.is_empty()
            && watched.is_empty()
            && disputes == 0
            && covered(&seen.declared) == bad.len()
            && recovered == bad.len(),
        seed,
        sectors: options.sectors,
        periods: options.periods,
        deadlines: windows(&plan, &di, from, to).len(),
        missed_deadlines: missed.len(),
        overwritten: bad.len(),
        faults_declared: covered(&seen.declared),
        recovered,
        unexpected_faults: watched,
        disputes,
        failed_messages: seen.failed,
        post_messages: seen.posts,
        kills: kills.count(),
        seconds: start.elapsed().as_secs_f64(),
    };
    if report.ok {
        net.stop().await?;
    } else {
        eprintln!("missed: {missed:?}; overwritten: {bad:?}\n{}", net.logs());
        net.keep();
    }
    Ok(report)
}

/// A funded key for the hub's WindowPoSts.
async fn control(net: &Net) -> Result<Address, Failed> {
    let repo = net.root().join("devnet").display().to_string();
    let wallet = async |words: &[&str]| {
        let mut args = vec!["--repo", &repo, "wallet"];
        args.extend(words);
        net.run("lotus-devnet", &args).await
    };
    let text = wallet(&["new", "bls"]).await?;
    let text = text.trim();
    wallet(&["fund", text, "1000"]).await?;
    let address = lotus_node_client::json::parse_address(text);
    let address = address.map_err(|e| Failed::at("wallet new", e))?;
    let node = net.node()?;
    net.wait("the control address", secs(60), async |_| {
        let balance = node.wallet_balance(address).await.ok()?;
        balance.is_positive().then_some(())
    })
    .await?;
    Ok(address)
}

async fn proving_deadline(node: &Node) -> Result<DeadlineInfo, Failed> {
    let di = node
        .state_miner_proving_deadline(MINER.address(), HEAD)
        .await;
    di.map_err(|e| Failed::at("StateMinerProvingDeadline", e))
}

async fn plan(node: &Node) -> Result<Plan, Failed> {
    let n = proving_deadline(node).await?.w_post_period_deadlines;
    let mut plan = Plan::new();
    for deadline in 0..n {
        let all = node
            .state_miner_partitions(MINER.address(), deadline, HEAD)
            .await
            .map_err(|e| Failed::at("StateMinerPartitions", e))?;
        if !all.is_empty() {
            plan.insert(deadline, all);
        }
    }
    Ok(plan)
}

/// Sectors to overwrite, each from a full partition of its own: what is left of the partition
/// must still be proven.
fn choose(plan: &Plan, random: &mut StdRng) -> BTreeSet<u64> {
    let partitions = plan.values().flatten();
    let full = partitions.filter(|p| p.live_sectors.len() > 1);
    let mut numbers: Vec<u64> = full.filter_map(|p| p.live_sectors.first()).collect();
    numbers.shuffle(random);
    numbers.into_iter().take(BAD).collect()
}

/// Lets the periods pass, damages replicas in the first and repairs them in the second to last.
/// Returns sectors that were faulty without cause, and the messages on the chain.
async fn days(
    net: &Net,
    node: &Node,
    bad: &BTreeSet<u64>,
    from: Epoch,
    to: Epoch,
    period: i64,
    random: &mut StdRng,
) -> Result<(BTreeSet<u64>, Vec<Landed>), Failed> {
    let repo = net.root().join("miner");
    let path = |n: &u64| -> PathBuf { replica(&repo, *n) };
    let mut good = BTreeMap::new();
    for n in bad {
        good.insert(*n, std::fs::read(path(n))?);
    }
    let mut at = |share: std::ops::Range<f64>| {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_precision_loss,
            reason = "epochs"
        )]
        let epochs = (random.random_range(share) * period as f64) as i64;
        from.0 + epochs
    };
    // Over a period before its repair, so that a deadline of it comes in between.
    let mut damage: Vec<(i64, u64)> = bad.iter().map(|n| (at(0.05..0.4), *n)).collect();
    // A whole period is left for the check, the cut-off and the next proof.
    #[expect(clippy::cast_precision_loss, reason = "a few periods")]
    let last = (to.0 - from.0) as f64 / period as f64 - 1.2;
    let mut repair: Vec<(i64, u64)> = bad.iter().map(|n| (at(last - 0.3..last), *n)).collect();
    let mut unexpected = BTreeSet::new();
    let mut history = History::default();
    let mut read = from.0;
    loop {
        let (height, faults) = tokio::join!(node.chain_head(), async {
            node.state_miner_faults(MINER.address(), HEAD).await
        });
        let height = height.map_err(|e| Failed::at("ChainHead", e))?.height.0;
        let faults = faults.map_err(|e| Failed::at("StateMinerFaults", e))?;
        for n in faults.iter().filter(|n| !bad.contains(n)) {
            if unexpected.insert(n) {
                eprintln!("epoch {height}: sector {n} is faulty without cause");
            }
        }
        for n in due(&mut damage, height) {
            std::fs::write(path(&n), vec![0x5a; good.get(&n).map_or(0, Vec::len)])?;
            eprintln!("epoch {height}: sector {n} is overwritten");
        }
        for n in due(&mut repair, height) {
            std::fs::write(path(&n), good.get(&n).cloned().unwrap_or_default())?;
            eprintln!("epoch {height}: sector {n} is repaired");
        }
        if height > read + HISTORY || height > to.0 + 3 {
            history.read(node).await?;
            read = height;
        }
        if height > to.0 + 3 {
            return Ok((unexpected, history.messages()));
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn due(list: &mut Vec<(i64, u64)>, height: i64) -> Vec<u64> {
    let now = list.iter().filter(|(at, _)| *at <= height);
    let now = now.map(|(_, n)| *n).collect();
    list.retain(|(at, _)| *at > height);
    now
}

/// What the messages on chain say.
#[derive(Default)]
struct Seen {
    /// Height, deadline and partition of each accepted proof.
    proven: Vec<(Epoch, u64, u64)>,
    /// Sectors that were declared faulty or skipped.
    declared: BTreeSet<u64>,
    /// Sectors that were declared as recovered.
    recovered: BTreeSet<u64>,
    disputes: usize,
    failed: usize,
    posts: usize,
}

impl Seen {
    fn of(messages: &[Landed], from: Epoch, to: Epoch) -> Result<Self, Failed> {
        let bad = |e| Failed::at("a message on the chain", e);
        let mut seen = Self::default();
        for m in messages {
            let (method, params) = (m.message.method, &m.message.params);
            let ours = m.message.to == MINER.address();
            let within = m.height >= from && m.height <= to;
            let Some(receipt) = m.receipt.as_ref().filter(|_| ours && within) else {
                continue;
            };
            if receipt.exit_code != 0 {
                eprintln!("failed: {m:?}");
                seen.failed += 1;
                continue;
            }
            match method {
                SUBMIT_WINDOWED_POST => {
                    seen.posts += 1;
                    let p: SubmitWindowedPoStParams = lotus_actors::decode(params).map_err(bad)?;
                    for post in &p.partitions {
                        seen.proven.push((m.height, p.deadline, post.index));
                        seen.declared.extend(post.skipped.iter());
                    }
                }
                DECLARE_FAULTS => {
                    let p: DeclareFaultsParams = lotus_actors::decode(params).map_err(bad)?;
                    seen.declared
                        .extend(p.faults.iter().flat_map(|f| f.sectors.iter()));
                }
                DECLARE_FAULTS_RECOVERED => {
                    let p: DeclareFaultsRecoveredParams =
                        lotus_actors::decode(params).map_err(bad)?;
                    seen.recovered
                        .extend(p.recoveries.iter().flat_map(|r| r.sectors.iter()));
                }
                DISPUTE_WINDOWED_POST => seen.disputes += 1,
                _ => {}
            }
        }
        Ok(seen)
    }

    /// The windows in which a partition was not proven.
    fn missed(&self, plan: &Plan, di: &DeadlineInfo, from: Epoch, to: Epoch) -> Vec<(Epoch, u64)> {
        let mut missed = Vec::new();
        for (open, close, deadline) in windows(plan, di, from, to) {
            let partitions = plan.get(&deadline).map_or(0, Vec::len) as u64;
            let proven = |index: u64| {
                self.proven
                    .iter()
                    .any(|(at, d, p)| (*d, *p) == (deadline, index) && *at >= open && *at < close)
            };
            if !(0..partitions).all(proven) {
                missed.push((open, deadline));
            }
        }
        missed
    }
}

/// Open, close and index of every window with sectors that lies between two epochs.
fn windows(plan: &Plan, di: &DeadlineInfo, from: Epoch, to: Epoch) -> Vec<(Epoch, Epoch, u64)> {
    let (window, period) = (di.w_post_challenge_window.0, di.w_post_proving_period.0);
    let mut all = Vec::new();
    let mut start = di.period_start.0;
    while start < to.0 {
        for deadline in plan.keys() {
            let open = start + window * i64::try_from(*deadline).unwrap_or(0);
            if open >= from.0 && open + window <= to.0 {
                all.push((Epoch(open), Epoch(open + window), *deadline));
            }
        }
        start += period;
    }
    all
}

async fn active(node: &Node) -> Result<BTreeSet<u64>, Failed> {
    let all = node.state_miner_active_sectors(MINER.address(), HEAD).await;
    let all = all.map_err(|e| Failed::at("StateMinerActiveSectors", e))?;
    Ok(all.iter().map(|s| s.sector_number.0).collect())
}

/// Proofs that the devnet accepted and then found wrong, by its own log.
fn wrong_proofs(net: &Net) -> Result<usize, Failed> {
    let mut found = 0;
    for file in net.log_files() {
        if file
            .file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with("devnet"))
        {
            let text = std::fs::read(&file)?;
            let text = String::from_utf8_lossy(&text);
            found += text.matches("a wrong PoSt was accepted").count();
            found += text.matches("disputing a wrong PoSt").count();
        }
    }
    Ok(found)
}
