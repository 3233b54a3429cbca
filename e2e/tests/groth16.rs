//! SNARKs between the hub, its workers and the devnet.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Output, Stdio};

use lotus_actors::miner::{SUBMIT_WINDOWED_POST, SubmitWindowedPoStParams};
use lotus_e2e::history::History;
use lotus_e2e::{Net, NetConfig, secs};
use lotus_node_client::api::TipSetKey;
use lotus_types::ActorId;
use serde_json::Value;
use tokio::process::Command;

const MINER: ActorId = ActorId(1000);
/// Epochs that an election looks back for power.
const LOOKBACK: i64 = 3;
/// One SNARK.
const SNARK: usize = 192;

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Runs one of our binaries, which must end by itself.
async fn run(exe: &Path, args: &[&str], env: &[(&str, &str)]) -> Output {
    let running = Command::new(exe)
        .args(args)
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let done = tokio::time::timeout(secs(60), running).await;
    done.expect("it ends in time").unwrap()
}

fn refused(out: &Output, why: &[&str]) {
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(78), "{said}");
    for part in why {
        assert!(said.contains(part), "no {part:?} in: {said}");
    }
}

fn binary(name: &str) -> std::path::PathBuf {
    let deps = std::env::current_exe().unwrap();
    let release = deps.parent().unwrap().parent().unwrap();
    release.join(name)
}

/// Needs no parameters: it is about their lack.
#[tokio::test]
async fn without_parameter_files_nothing_starts_and_the_way_out_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().display().to_string();
    let env = [("FIL_PROOFS_PARAMETER_CACHE", empty.as_str())];
    let repo = |name: &str| dir.path().join(name).display().to_string();

    let config = "[miner]\nactor = \"t01000\"\nsector_size = \"2KiB\"\n[proofs]\nmode = \"MODE\"\n";
    std::fs::create_dir(dir.path().join("hub")).unwrap();
    let file = dir.path().join("hub/config.toml");
    let way_out = "lotus-miner params generate --sector-size 2KiB";
    let post = "v28-proof-of-spacetime";
    for (mode, named) in [
        ("groth16-post", vec![post, ".vk", way_out, "--post-only"]),
        (
            "groth16",
            vec![
                post,
                "v28-stacked-proof-of-replication",
                "v28-empty-sector-update",
                "v28-fil-inner-product-v1.srs",
                way_out,
            ],
        ),
    ] {
        std::fs::write(&file, config.replace("MODE", mode)).unwrap();
        let hub = run(
            &binary("lotus-miner"),
            &["run", "--repo", &repo("hub")],
            &env,
        )
        .await;
        refused(&hub, &named);
        let args = ["--repo", &repo("devnet"), "run", "--proofs", mode];
        refused(&run(&binary("lotus-devnet"), &args, &env).await, &named);
    }
    std::fs::write(
        &file,
        config.replace("2KiB", "32GiB").replace("MODE", "groth16"),
    )
    .unwrap();
    let hub = run(
        &binary("lotus-miner"),
        &["run", "--repo", &repo("hub")],
        &env,
    )
    .await;
    refused(&hub, &["v28-stacked", "lotus fetch-params 32GiB"]);

    // Nothing was made on the way, and of large sectors nothing is.
    let args = ["params", "generate", "--sector-size", "32GiB"];
    refused(
        &run(&binary("lotus-miner"), &args, &env).await,
        &["lotus fetch-params 32GiB"],
    );
    let list = ["params", "list", "--sector-size", "2KiB", "--json"];
    let out = run(&binary("lotus-miner"), &list, &env).await;
    assert!(out.status.success());
    let list: Value = serde_json::from_slice(&out.stdout).unwrap();
    let files = list["files"].as_array().unwrap();
    // Two for each of four circuits, and that of aggregates.
    assert_eq!(files.len(), 9);
    assert!(files.iter().all(|f| f["bytes"].is_null()), "{list}");
    let verify = ["params", "verify", "--sector-size", "2KiB", "--post-only"];
    refused(
        &run(&binary("lotus-miner"), &verify, &env).await,
        &[way_out],
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs parameters: cargo xtask test --groth16"]
async fn groth16_posts_of_a_pledged_sector_are_taken() {
    let mut cfg = NetConfig {
        devnet_args: words(&format!(
            "--listen 127.0.0.1:0 --sector-size 2KiB --proofs groth16-post --block-time-ms 500 \
             --deadlines 4 --deadline-epochs 40 --winning-lookback {LOOKBACK} --seed-delay 3",
        )),
        services: Vec::new(),
        ..NetConfig::default()
    };
    let listen = ("LOTUS_MINER__WORKERS__LISTEN", "127.0.0.1:0");
    cfg.hub_env.insert(listen.0.into(), listen.1.into());
    let net = Net::start(&cfg).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let repo = net.root().join("miner").display().to_string();

    // Deadlines are proven by a worker that has no sector, blocks by the hub's own.
    let (file, log) = (net.root().join("p.bundle"), net.root().join("logs/p.log"));
    let hub = lotus_runtime::addr_file::read(&net.root().join("miner/run"), "workers").unwrap();
    let out = file.display().to_string();
    let bundle = [
        "workers",
        "join-bundle",
        "--hub",
        &hub,
        "-o",
        &out,
        "--repo",
        &repo,
    ];
    net.run("lotus-miner", &bundle).await.unwrap();
    let prover = Command::new(net.exe("lotus-worker"))
        .args(["run", "--class", "prove", "--bundle"])
        .arg(&file)
        .arg("--dir")
        .arg(net.root().join("scratch"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let made = || std::fs::read_to_string(&log).unwrap();
    net.wait("the worker", secs(30), async |_| {
        made().contains("attached").then_some(())
    })
    .await
    .unwrap();
    let pledge = ["sectors", "pledge", "--really-do-it", "--repo", &repo];
    net.run("lotus-miner", &pledge).await.unwrap();

    let node = net.node().unwrap();
    let powered = net.wait("power, by a WindowPoSt", secs(300), async |_| {
        let head = &TipSetKey::HEAD;
        let power = node.state_miner_power(MINER.address(), head).await.ok()?;
        let some = power.miner_power.raw_byte_power > 0u64.into();
        some.then_some(node.chain_head().await.ok()?.height.0)
    });
    let powered = powered.await.unwrap();
    let elsewhere = made().contains("step=\"window_post\"");
    assert!(
        elsewhere && net.has_logged("a proof came from another host"),
        "{}",
        made()
    );
    drop(prover);
    net.wait("the rounds with power", secs(60), async |_| {
        let head = node.chain_head().await.ok()?;
        (head.height.0 >= powered + LOOKBACK - 1).then_some(())
    })
    .await
    .unwrap();
    // A WinningPoSt takes seconds, and more on a busy machine, so these rounds are long. The hub
    // asks for their length when it starts.
    let devnet = net.root().join("devnet").display().to_string();
    let slow = ["--repo", &devnet, "fault", "block-time", "60000"];
    net.run("lotus-devnet", &slow).await.unwrap();
    net.kill9("hub").await.unwrap();

    let mut sizes = Vec::new();
    let mut history = History::default();
    history.read(&node).await.unwrap();
    for landed in history.messages() {
        let done = landed.receipt.as_ref().is_some_and(|r| r.exit_code == 0);
        if landed.message.method == SUBMIT_WINDOWED_POST && done {
            let p: SubmitWindowedPoStParams = lotus_actors::decode(&landed.message.params).unwrap();
            sizes.extend(p.proofs.iter().map(|p| p.proof_bytes.len()));
        }
    }
    assert!(
        !sizes.is_empty() && sizes.iter().all(|n| *n == SNARK),
        "{sizes:?}"
    );

    let block = net.wait("an own block", secs(400), async |_| {
        let head = node.chain_head().await.ok()?;
        head.blocks.into_iter().find(|b| b.miner == MINER.address())
    });
    let block = block.await.unwrap();
    let sizes: Vec<_> = block
        .win_post_proof
        .iter()
        .map(|p| p.proof_bytes.len())
        .collect();
    assert_eq!(sizes, [SNARK]);

    // A hub whose proofs would be refused does not start.
    let other = net.root().join("other").display().to_string();
    let init = [
        "init",
        "--actor",
        "t01000",
        "--node-repo",
        &devnet,
        "--repo",
        &other,
    ];
    net.run("lotus-miner", &init).await.unwrap();
    let written = std::fs::read_to_string(net.root().join("other/config.toml")).unwrap();
    assert!(written.contains("mode = \"groth16-post\""), "{written}");
    let env = [
        ("LOTUS_MINER__PROOFS__MODE", "vanilla"),
        ("LOTUS_MINER__API__LISTEN", "127.0.0.1:0"),
        ("LOTUS_MINER__LOTUS_API__LISTEN", "127.0.0.1:0"),
        ("LOTUS_MINER__ADMIN__LISTEN", "127.0.0.1:0"),
    ];
    let hub = run(&net.exe("lotus-miner"), &["run", "--repo", &other], &env).await;
    refused(
        &hub,
        &["takes groth16-post proofs", "proofs.mode is vanilla"],
    );

    net.stop().await.unwrap();
}
