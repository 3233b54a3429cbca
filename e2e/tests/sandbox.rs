//! What a spoke can do from inside its sandbox: a probe runs in the place of each spoke, under the
//! profile that the supervisor makes for that spoke, and tries. The same probe outside of a
//! sandbox can do all of it, so this test can fail.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lotus_e2e::attempts::{Answer, Attempt, SILENT};
use lotus_e2e::{Net, NetConfig, binary, demo, secs};

const SERVICES: [&str; 3] = ["deals", "retrieval", "indexing"];
/// A variable of the supervisor's environment, as the node's token often is one.
const SECRET: &str = "PROBE_SECRET_TOKEN";

const WORKS: &[i32] = &[0];
const EACCES: &[i32] = &[13];
const EPERM: &[i32] = &[1];
const ENOENT: &[i32] = &[2];
const SIGSYS: &[i32] = &[-31];
/// The other side hangs up: before, while or after it is spoken to.
const REFUSED: &[i32] = &[SILENT, libc::EPIPE, libc::ECONNRESET];

/// One thing that is tried: what must come of it in a sandbox, and what of the sandbox does it.
struct Row {
    attempt: Attempt,
    inside: &'static [i32],
    by: &'static str,
}

fn row(attempt: Attempt, inside: &'static [i32], by: &'static str) -> Row {
    Row {
        attempt,
        inside,
        by,
    }
}

/// Says it past the capture of the test's output: a skip must be seen.
fn skipped(what: &str) {
    let line = format!("SKIPPED {what}\n");
    std::io::stdout().write_all(line.as_bytes()).unwrap();
}

/// A folder of binaries in which the probe has the place of `lotus-markets`.
fn programs() -> tempfile::TempDir {
    let dir = tempfile::Builder::new()
        .prefix("lotus-bin-")
        .tempdir()
        .unwrap();
    for (name, real) in [
        ("lotus-miner", "lotus-miner"),
        ("lotus-devnet", "lotus-devnet"),
        ("lotus-markets", "lotus-probe"),
        ("lotus-markets.real", "lotus-markets"),
    ] {
        let real = binary(real).unwrap();
        assert!(real.is_file(), "{} is not built", real.display());
        symlink(real, dir.path().join(name)).unwrap();
    }
    dir
}

fn addr(dir: PathBuf, name: &str) -> SocketAddr {
    let text = lotus_runtime::addr_file::read(&dir, name).unwrap();
    text.parse().unwrap()
}

/// The first file below a folder whose path has `part`.
fn file_below(dir: &Path, part: &str) -> Option<PathBuf> {
    for entry in std::fs::read_dir(dir).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = file_below(&path, part) {
                return Some(found);
            }
        } else if path.to_string_lossy().contains(part) {
            return Some(path);
        }
    }
    None
}

/// Everything that is tried from inside `service`. `open` is a port that the operator allowed.
async fn rows(net: &Net, service: &str, sector: &Path, open: u16) -> Vec<Row> {
    use Attempt as A;
    let root = net.root();
    let hub = net.process("hub").await.unwrap().pid.unwrap();
    let supervisor = net.supervisor_pid().unwrap();
    let mine = root.join("markets").join(service);
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();

    let mut rows = vec![
        // What it needs.
        row(A::Write(mine.join("file")), WORKS, ""),
        row(A::Write(root.join("markets/run/file")), WORKS, ""),
        row(A::Talk(root.join("miner/run/hub.sock")), WORKS, ""),
        row(A::Connect(([127, 0, 0, 1], open).into()), WORKS, ""),
        row(A::Bind(([127, 0, 0, 1], 0).into()), WORKS, ""),
        row(A::Read("/dev/null".into()), WORKS, ""),
        // Ports of others.
        row(
            A::Connect(addr(root.join("devnet/run"), "api")),
            EACCES,
            "ports",
        ),
        row(
            A::Connect(addr(root.join("miner/run"), "api")),
            EACCES,
            "ports",
        ),
        row(
            A::Connect(addr(root.join("miner/run"), "admin")),
            EACCES,
            "ports",
        ),
        row(
            A::Connect(addr(root.join("run"), "supervisor")),
            EACCES,
            "ports",
        ),
        row(A::Bind(free), EACCES, "ports"),
        // Ways around the rules for ports.
        row(
            A::FastOpen(addr(root.join("devnet/run"), "api")),
            EPERM,
            "system calls",
        ),
        row(A::Multipath, EPERM, "system calls"),
        row(A::Family(libc::AF_ALG), EPERM, "system calls"),
        row(A::Family(libc::AF_VSOCK), EPERM, "system calls"),
        // Sockets with a path: only the operator gives orders.
        row(
            A::Talk(root.join("run/supervisor.sock")),
            REFUSED,
            "system calls",
        ),
        row(
            A::Talk(root.join("miner/run/control.sock")),
            REFUSED,
            "system calls",
        ),
        row(
            A::Talk(root.join("miner/run/workers.sock")),
            REFUSED,
            "system calls",
        ),
        row(
            A::Order(root.join("miner/run/hub.sock")),
            EACCES,
            "system calls",
        ),
        // Other processes.
        row(A::Trace(hub), EPERM, "system calls"),
        row(A::ReadMemory(hub), EPERM, "system calls"),
        row(A::Signal(hub), EPERM, "system calls"),
        row(A::Signal(supervisor), EPERM, "system calls"),
        row(A::Limit(hub), EPERM, "system calls"),
        row(A::Priority(hub), EPERM, "system calls"),
        row(A::OtherTable, SIGSYS, "system calls"),
        row(A::Call(libc::SYS_unshare), EPERM, "system calls"),
        row(A::Call(libc::SYS_add_key), EPERM, "system calls"),
        row(A::Call(libc::SYS_name_to_handle_at), EPERM, "system calls"),
        // Programs.
        row(A::Execute("/bin/sh".into()), EACCES, "files"),
        row(A::Write(net.programs().join("file")), EACCES, "files"),
        row(A::Write("/tmp/lotus-probe-file".into()), EACCES, "files"),
        row(A::List(root.to_owned()), EACCES, "files"),
        row(A::List("/proc".into()), EACCES, "files"),
        row(A::Write(root.join("miner/file")), EACCES, "files"),
        row(A::Variable(SECRET.into()), ENOENT, "environment"),
    ];
    let mut secrets = vec![
        sector.to_owned(),
        root.join("miner/config.toml"),
        root.join("miner/ca/ca.key"),
        root.join("supervisor.toml"),
        root.join("run/processes.json"),
        root.join("logs/events.jsonl"),
        root.join("logs/hub.log"),
        root.join(format!("logs/{service}.log")),
        format!("/proc/{hub}/environ").into(),
        format!("/proc/{hub}/mem").into(),
        format!("/proc/{hub}/cmdline").into(),
        "/proc/self/status".into(),
        "/etc/hostname".into(),
    ];
    for (dir, part) in [("miner", ".redb"), ("miner", "token"), ("devnet", "token")] {
        let found = file_below(&root.join(dir), part);
        secrets.push(found.unwrap_or_else(|| panic!("no {part} below {dir}")));
    }
    for other in SERVICES.iter().filter(|s| **s != service) {
        let dir = root.join("markets").join(other);
        let secret = dir.join("secret");
        std::fs::write(&secret, "of another spoke").unwrap();
        rows.push(row(A::List(dir.clone()), EACCES, "files"));
        rows.push(row(A::Write(dir.join("file")), EACCES, "files"));
        secrets.push(secret);
    }
    for secret in secrets {
        assert!(secret.exists(), "{}", secret.display());
        rows.push(row(A::Read(secret), EACCES, "files"));
    }
    rows
}

/// Has the probe whose folder is `dir` try all of it.
async fn tried(net: &Net, dir: &Path, rows: &[Row]) -> Vec<Answer> {
    let ask: Vec<&Attempt> = rows.iter().map(|r| &r.attempt).collect();
    let part = dir.join("ask.part");
    std::fs::write(&part, serde_json::to_vec(&ask).unwrap()).unwrap();
    std::fs::rename(part, dir.join("ask.json")).unwrap();
    let answer = dir.join("answer.json");
    let text = net
        .wait("the probe's answer", secs(60), async |_| {
            std::fs::read(&answer).ok()
        })
        .await
        .unwrap();
    std::fs::remove_file(answer).unwrap();
    serde_json::from_slice(&text).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spoke_reaches_what_it_needs_and_nothing_else() {
    let open = TcpListener::bind("127.0.0.1:0").unwrap();
    let open = (open.local_addr().unwrap().port(), open);
    let bin = programs();
    let net = Net::start(&NetConfig {
        bin_dir: Some(bin.path().to_owned()),
        sandbox: toml::Table::from_iter([("connect".to_owned(), vec![i64::from(open.0)].into())]),
        env: BTreeMap::from([(SECRET.to_owned(), "x".to_owned())]),
        ..NetConfig::default()
    })
    .await
    .unwrap();
    net.ready(secs(120)).await.unwrap();
    let repo = net.root().join("miner").display().to_string();
    let pledge = ["sectors", "pledge", "--really-do-it", "--repo", &repo];
    net.run("lotus-miner", &pledge).await.unwrap();
    let storage = net.root().join("miner");
    let sector = net
        .wait("a sealed sector", secs(180), async |_| {
            file_below(&storage, "/sealed/")
        })
        .await
        .unwrap();

    for service in SERVICES {
        let process = net.process(service).await.unwrap();
        for part in ["files", "ports", "signals", "system calls", "capabilities"] {
            if process.sandbox.contains(part) {
                skipped(&format!(
                    "sandbox of {service}: this host is {}",
                    process.sandbox
                ));
            }
        }
        if process.sandbox == "full" {
            confined(process.pid.unwrap());
        }
        let rows = rows(&net, service, &sector, open.0).await;
        let answers = tried(&net, &net.root().join("markets").join(service), &rows).await;
        assert_eq!(answers.len(), rows.len());
        for (row, answer) in rows.iter().zip(&answers) {
            assert_eq!(row.attempt, answer.attempt);
            if !row.by.is_empty() && process.sandbox.contains(row.by) {
                continue;
            }
            assert!(
                row.inside.contains(&answer.errno),
                "{service}: {:?}: errno {}, wanted one of {:?}",
                row.attempt,
                answer.errno,
                row.inside
            );
        }
        eprintln!("{service}: {} attempts as they should be", rows.len());
    }
    outside(&net, &sector, open.0).await;
    net.stop().await.unwrap();
}

/// What the kernel says of a process in a full sandbox.
fn confined(pid: u32) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name));
        line.unwrap_or_default()
            .trim_matches([':', '\t'])
            .to_owned()
    };
    for (name, wanted) in [
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("CapInh", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
    ] {
        assert_eq!(field(&format!("{name}:")), wanted, "{name}");
    }
    if nix::unistd::geteuid().is_root() {
        assert_eq!(field("CapBnd:"), "0000000000000000");
    }
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|l| l.starts_with("Max core file size"));
    assert!(
        core.is_some_and(|l| l.split_whitespace().nth(4) == Some("0")),
        "{limits}"
    );
}

/// The same without a sandbox: each thing that was refused is not, or not so.
async fn outside(net: &Net, sector: &Path, open: u16) {
    let repo = net.root().join("outside");
    let dir = repo.join("deals");
    let mut probe = Command::new(net.programs().join("lotus-markets"))
        .args(["run", "--services=deals", "--repo"])
        .arg(&repo)
        .env(SECRET, "x")
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    net.wait("the probe outside", secs(30), async |_| {
        dir.is_dir().then_some(())
    })
    .await
    .unwrap();
    let rows = rows(net, "deals", sector, open).await;
    let answers = tried(net, &dir, &rows).await;
    probe.kill().unwrap();
    probe.wait().unwrap();
    // Whether one may debug a process of the same user is a setting of the host.
    let yama = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    let may_trace = nix::unistd::geteuid().is_root() || yama.is_err();
    for (row, answer) in rows.iter().zip(&answers) {
        let traces = match &row.attempt {
            Attempt::Trace(_) | Attempt::ReadMemory(_) => true,
            Attempt::Read(path) => path.starts_with("/proc") && path.ends_with("mem"),
            _ => false,
        };
        if traces && !may_trace {
            skipped("sandbox: tracing outside of a sandbox: not allowed by yama either");
            continue;
        }
        let same = row.inside.contains(&answer.errno);
        assert_eq!(same, row.inside == WORKS, "outside: {answer:?}");
    }
}

/// With a user of its own for each spoke the whole product works.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spokes_have_users_of_their_own() {
    if !nix::unistd::geteuid().is_root() {
        skipped("sandbox users: only root may start processes of other users");
        return;
    }
    let sandbox = toml::toml! {
        group = "61000"
        [users]
        deals = "61001"
        retrieval = "61002"
        indexing = "61003"
    };
    let net = Net::start(&NetConfig {
        sandbox,
        ..NetConfig::default()
    })
    .await
    .unwrap();
    net.ready(secs(120)).await.unwrap();
    for (service, uid) in [
        ("deals", "61001"),
        ("retrieval", "61002"),
        ("indexing", "61003"),
    ] {
        let pid = net.process(service).await.unwrap().pid.unwrap();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let ids = |name: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
            line.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(ids("Uid:"), [uid; 4]);
        assert_eq!(ids("Gid:"), ["61000"; 4]);
        assert_eq!(ids("Groups:"), ["61000"]);
        let owner = std::fs::metadata(net.root().join("markets").join(service)).unwrap();
        assert_eq!(std::os::unix::fs::MetadataExt::uid(&owner).to_string(), uid);
    }
    // The hub's sockets are there for them after a restart of the hub too.
    let old = net.kill9("hub").await.unwrap();
    net.wait("a new hub", secs(60), async |n| {
        let p = n.process("hub").await.ok()?;
        (p.ready && p.pid != Some(old)).then_some(())
    })
    .await
    .unwrap();
    net.ready(secs(60)).await.unwrap();
    let data = net.root().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("a"), vec![7; 300_000]).unwrap();
    let car = net.root().join("a.car");
    lotus_car::pack_dir(&data, &car).unwrap();
    let report = demo::run(&net, &[car], &mut demo::Lines::default())
        .await
        .unwrap();
    assert!(report.ok, "{report:?}\n{}", net.logs());
    let all = net.status().await.unwrap();
    assert!(
        all.iter()
            .filter(|p| p.name != "hub")
            .all(|p| p.restarts == 0),
        "{all:?}"
    );
    net.stop().await.unwrap();
}
