//! The systemd units, plain and the supervisor's, as systemd itself reads them.

use std::path::Path;
use std::process::Command;

#[test]
fn the_units_are_good() {
    let tool = Command::new("systemd-analyze").arg("--version").output();
    if tool.is_err() {
        println!("SKIPPED systemd units: apt-get install systemd");
        return;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd");
    let dir = tempfile::tempdir().unwrap();
    let mut units = Vec::new();
    for (unit, instance) in [
        ("lotus-miner.service", "lotus-miner.service"),
        ("lotus-markets@.service", "lotus-markets@retrieval.service"),
    ] {
        let text = std::fs::read_to_string(source.join(unit)).unwrap();
        // Readiness is told, so that what is started after the hub finds it ready.
        assert!(text.contains("\nType=notify\n"), "{unit}");
        // The programs are where the operator put them, not where this test runs.
        let here = text
            .replace("/usr/local/bin/lotus-miner ", "/bin/true ")
            .replace("/usr/local/bin/lotus-markets ", "/bin/true ");
        assert_ne!(here, text);
        let path = dir.path().join(instance);
        std::fs::write(&path, here).unwrap();
        units.push(path);
    }
    // As root, because systemd wants the user of a unit to exist.
    let printed = Command::new(lotus_e2e::binary("lotus-supervisor").unwrap())
        .args(["systemd-unit", "--user", "root", "--repo", "/var/lib/lotus"])
        .output()
        .unwrap();
    let text = String::from_utf8(printed.stdout).unwrap();
    for line in ["KillMode=process", "Delegate=yes", "Type=notify"] {
        assert!(text.lines().any(|l| l == line), "{text}");
    }
    assert!(text.contains("lotus-supervisor run --repo /var/lib/lotus\n"));
    let path = dir.path().join("lotus-supervisor.service");
    std::fs::write(&path, text).unwrap();
    units.push(path);
    let out = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .args(&units)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    // systemd before 254 warns of what it does not know.
    let new = |l: &&str| !l.contains("'DelegateSubgroup'");
    let ours: Vec<&str> = said
        .lines()
        .filter(|l| l.contains("lotus-"))
        .filter(new)
        .collect();
    assert!(
        out.status.success() && ours.is_empty(),
        "{}: {said}",
        out.status
    );
}
