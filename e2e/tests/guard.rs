//! The proving guard with real processes: spokes are squeezed while the hub proves, by what the
//! kernel says, and let go of, whoever dies meanwhile.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use lotus_e2e::sectors::Worker;
use lotus_e2e::{Net, NetConfig, ProcessStatus, secs};
use lotus_types::SectorSize;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Enough for a proof that takes a moment.
const SECTORS: u64 = 40;
/// A proving period, many times over.
const LIMIT: Duration = secs(180);
/// `limits.stop_secs`: whoever has not ended by then is killed.
const STOP: Duration = secs(45);
const SPOKES: [&str; 2] = ["retrieval", "indexing"];

fn config() -> NetConfig {
    let mut cfg = NetConfig {
        devnet_args: "--listen 127.0.0.1:0 --sector-size 2KiB --block-time-ms 500 --deadlines 3 \
                      --deadline-epochs 10 --winning-lookback 10 --seed-delay 3"
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
        services: SPOKES.map(str::to_owned).into(),
        // Deadlines are shorter than `freeze_secs`, so indexing is frozen for all of each.
        guard: toml::toml! {
            services = { indexing = "freeze" }
        },
        ..NetConfig::default()
    };
    for (key, value) in [("SEAL_WORKERS", "0"), ("PROVE_WORKERS", "1")] {
        let key = format!("LOTUS_MINER__WORKERS__{key}");
        cfg.hub_env.insert(key, value.into());
    }
    cfg
}

fn read(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().to_owned()
}

/// Whether the kernel squeezes a process, in the way that the rung names.
fn squeezed(p: &ProcessStatus) -> bool {
    let (pid, guard) = (p.pid.unwrap_or(0), p.guard.as_ref());
    let groups = read(&format!("/proc/{pid}/cgroup"));
    let group = |is: &dyn Fn(&str) -> bool| {
        let mut lines = groups.lines().map(|l| l.splitn(3, ':'));
        lines.find_map(|mut f| {
            let (controllers, path) = (f.nth(1)?, f.next()?);
            is(controllers).then(|| path.to_owned())
        })
    };
    match guard.map(|g| g.rung.as_str()) {
        Some("cgroup1") => {
            let path = group(&|c| c.split(',').any(|c| c == "cpu")).unwrap_or_default();
            lowest(&format!("/sys/fs/cgroup/cpu{path}"), "cpu.shares", "2")
        }
        Some("cgroup2") => {
            let path = group(&|c| c.is_empty()).unwrap_or_default();
            lowest(&format!("/sys/fs/cgroup{path}"), "cpu.weight", "1")
        }
        // SCHED_IDLE; field 41.
        _ => {
            let stat = read(&format!("/proc/{pid}/stat"));
            let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            fields.split_whitespace().nth(38) == Some("5")
        }
    }
}

/// Whether a group is idle, or has the least weight where the kernel knows no idle groups.
fn lowest(dir: &str, weight: &str, least: &str) -> bool {
    match read(&format!("{dir}/cpu.idle")).as_str() {
        "" => read(&format!("{dir}/{weight}")) == least,
        idle => idle == "1",
    }
}

fn state(p: &ProcessStatus) -> &str {
    p.guard.as_ref().map_or("", |g| g.state.as_str())
}

/// Blocks are won all the time, and their squeezes are no events.
fn for_a_deadline(p: &ProcessStatus) -> bool {
    let guard = p.guard.as_ref();
    guard.is_some_and(|g| !g.state.is_empty() && g.reason.contains("WindowPoSt of deadline"))
}

/// The spokes, once they are all squeezed for a deadline, or none is for anything.
async fn wait(net: &Net, wanted: bool) -> Vec<ProcessStatus> {
    let what = if wanted { "a squeeze" } else { "a release" };
    net.wait(what, LIMIT, async |n| {
        let mut all = n.status().await.ok()?;
        all.retain(|p| SPOKES.contains(&p.name.as_str()));
        let says = |p: &ProcessStatus| match wanted {
            true => for_a_deadline(p),
            false => state(p).is_empty(),
        };
        let is = |p: &ProcessStatus| says(p) && squeezed(p) == wanted;
        all.iter().all(is).then_some(all)
    })
    .await
    .unwrap()
}

/// What was written down of a spoke.
fn events(net: &Net, name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(net.root().join("logs/events.jsonl")).unwrap();
    let of = |l: &&str| l.contains(&format!("\"process\":\"{name}\""));
    text.lines().filter(of).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spokes_are_squeezed_while_the_hub_proves_whoever_dies() {
    let net = Net::start(&config()).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let guard = net.process("retrieval").await.unwrap().guard.unwrap();
    if guard.rung == "none" {
        eprintln!("SKIPPED: nobody can be squeezed here: {}", guard.reason);
        return net.stop().await.unwrap();
    }
    let worker = Worker::start(&net, SectorSize::S2KiB).await.unwrap();
    worker.onboard(SECTORS).await.unwrap();
    worker.end().await;

    // While a deadline is proven, and not after.
    let all = wait(&net, true).await;
    let indexing = all.iter().find(|p| p.name == "indexing").unwrap();
    let freezes = state(indexing) == "frozen";
    if !freezes {
        eprintln!("SKIPPED: nothing can be frozen here");
    }
    wait(&net, false).await;

    // The supervisor dies while they are squeezed, and the hub says nothing to the next one.
    let hub = net.process("hub").await.unwrap().pid.unwrap();
    let hub = Pid::from_raw(i32::try_from(hub).unwrap());
    loop {
        wait(&net, true).await;
        kill(hub, Signal::SIGSTOP).unwrap();
        let now = net.status().await.unwrap();
        if now.iter().filter(|p| for_a_deadline(p)).count() == SPOKES.len() {
            break;
        }
        // The proof was faster.
        kill(hub, Signal::SIGCONT).unwrap();
    }
    net.replace_supervisor().unwrap();
    let free = wait(&net, false).await;
    assert!(free.iter().all(|p| !squeezed(p)), "{free:?}");
    kill(hub, Signal::SIGCONT).unwrap();

    // The next one squeezes as well. A stop in the middle of it is no kill.
    wait(&net, true).await;
    wait(&net, false).await;
    for name in SPOKES {
        let all = events(&net, name);
        let count = |what: &str| all.iter().filter(|l| l.contains(what)).count();
        assert!(count("\"squeezed\"") >= 2, "{name}: {all:#?}");
        assert!(count("\"released\"") >= 1, "{name}: {all:#?}");
        assert!(
            count("\"silent\"") == 0 && count("\"ended\"") == 0,
            "{name}: {all:#?}"
        );
    }
    if freezes {
        assert!(
            events(&net, "indexing")
                .iter()
                .any(|l| l.contains("\"frozen\""))
        );
        assert!(
            !events(&net, "retrieval")
                .iter()
                .any(|l| l.contains("\"frozen\""))
        );
        wait(&net, true).await;
        let root = net.root().display().to_string();
        let began = Instant::now();
        let words = ["restart", "indexing", "--repo", &root];
        net.run("lotus-supervisor", &words).await.unwrap();
        let took = began.elapsed();
        assert!(took < STOP, "a frozen process would be killed: {took:?}");
    }
    net.stop().await.unwrap();
}
