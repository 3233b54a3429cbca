use super::*;
use std::collections::BTreeMap;
use std::process::{Child, Command};

const HYBRID: &str = "\
30 29 0:26 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
31 29 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpuacct
32 29 0:28 /docker/abc /sys/fs/cgroup/blkio ro,nosuid shared:9 - cgroup cgroup rw,blkio
39 29 0:35 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
40 29 0:36 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
41 29 0:37 / /proc rw - proc proc rw
";
const OWN: &str = "4:blkio:/docker/abc/x\n3:cpu,cpuacct:/a/b\n1:name=systemd:/\n0::/c\n";

#[test]
fn the_own_groups_are_found() {
    let mounts = mounts(HYBRID);
    assert_eq!(mounts.len(), 5);
    for (controller, wanted) in [
        ("cpu", Some("/sys/fs/cgroup/cpu/a/b")),
        ("blkio", Some("/sys/fs/cgroup/blkio/x")),
        ("", Some("/sys/fs/cgroup/unified/c")),
        ("freezer", None),
    ] {
        let got = dir_of(&mounts, OWN, controller);
        assert_eq!(got.as_deref(), wanted.map(Path::new), "{controller}");
    }
}

/// A folder with the files that a kernel would have.
fn fake(dir: &Path, files: &[(&str, &str)]) -> PathBuf {
    std::fs::create_dir_all(dir).unwrap();
    for (name, text) in files {
        std::fs::write(dir.join(name), text).unwrap();
    }
    dir.to_path_buf()
}

fn bounds() -> Bounds {
    Bounds {
        reads: disks::Reads::new(4),
        share: processor::Share::new(5, 2),
    }
}

fn read(dir: &Path) -> BTreeMap<String, String> {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap())
        .filter(|e| e.path().is_file())
        .map(|e| {
            let name = e.file_name().into_string().unwrap();
            let text = std::fs::read_to_string(e.path()).unwrap();
            (name, text.trim().to_owned())
        })
        .collect()
}

#[test]
fn version_2_is_squeezed_frozen_and_released() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = fake(
        &tmp.path().join("g"),
        &[
            ("cpu.weight", "33"),
            ("cpu.max", "max"),
            ("io.weight", "default 100"),
            ("memory.high", "max"),
            ("memory.current", "900000000\n"),
            ("cgroup.freeze", "0"),
        ],
    );
    let before = read(&dir);
    let group = Group {
        dirs: vec![(Kind::V2, dir.clone())],
    };
    assert_eq!(group.name(), "cgroup2");
    assert!(group.freezes() && !group.has_disk_class());
    group.squeeze(bounds()).unwrap();
    let now = read(&dir);
    assert_eq!(now["cpu.weight"], "1");
    assert_eq!(now["cpu.max"], "10000 100000");
    assert_eq!(now["io.weight"], "default 1");
    assert_eq!(
        now["memory.high"], "1012500000",
        "an eighth above what it has"
    );
    assert!(!now.contains_key("cpu.idle"), "this kernel has none");
    group.freeze().unwrap();
    assert_eq!(read(&dir)["cgroup.freeze"], "1");
    group.release().unwrap();
    assert_eq!(read(&dir), before);
}

#[test]
fn only_what_is_delegated_is_used() {
    let tmp = tempfile::tempdir().unwrap();
    let controllers = [("cgroup.controllers", "cpuset cpu io memory")];
    let at = |path: &str| fake(&tmp.path().join(path), &controllers);
    let service = at("system.slice/lotus.service");
    assert!(
        delegated(&service)
            .unwrap_err()
            .contains("DelegateSubgroup")
    );
    let leaf = at("system.slice/lotus.service/supervisor");
    assert_eq!(delegated(&leaf).unwrap(), service);
    let container = at("box");
    assert_eq!(delegated(&container).unwrap(), container);
    let bare = fake(&tmp.path().join("bare"), &[("cgroup.controllers", "")]);
    assert!(delegated(&bare).unwrap_err().contains("no cpu controller"));
}

#[test]
fn the_supervisor_goes_into_a_leaf_before_controllers_are_given_on() {
    let tmp = tempfile::tempdir().unwrap();
    let us = std::process::id().to_string();
    let dir = fake(
        tmp.path(),
        &[
            ("cgroup.subtree_control", ""),
            ("cgroup.procs", &us),
            ("cgroup.type", "domain"),
        ],
    );
    prepare(&dir).unwrap();
    assert_eq!(read(&dir.join(LEAF))["cgroup.procs"], us);
    // The kernel adds; a file keeps the last.
    assert_eq!(read(&dir)["cgroup.subtree_control"], "+memory");
    // The root of all groups may have processes beside groups.
    let root = fake(
        &tmp.path().join("root"),
        &[("cgroup.subtree_control", "cpu"), ("cgroup.procs", &us)],
    );
    prepare(&root).unwrap();
    assert!(!root.join(LEAF).exists());
}

struct Sleeper(Child);

impl Sleeper {
    fn start() -> Self {
        Self(Command::new("sleep").arg("60").spawn().unwrap())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// The kernel's own files of a real group, of whichever version this machine has.
#[test]
fn a_real_process_is_squeezed_frozen_and_released() {
    let tmp = tempfile::tempdir().unwrap();
    let places = Places::find(tmp.path());
    let group = match places.group("sleeper", true) {
        Ok(group) => group,
        Err(why) => {
            eprintln!("SKIPPED: no control group can be made on this machine: {why}");
            return;
        }
    };
    let sleeper = Sleeper::start();
    group.add(sleeper.0.id()).unwrap();
    group.release().unwrap();
    let dirs = group.dirs.clone();
    let values = || -> Vec<(PathBuf, String)> {
        let all = dirs.iter().flat_map(|(kind, dir)| {
            let knobs = kind.knobs().iter().map(|k| dir.join(k.file));
            let caps = kind.caps().iter().map(|c| dir.join(c.file));
            let quota = kind.quota().map(|q| dir.join(q.file));
            let freezer = kind.freezer().map(|k| dir.join(k.file));
            knobs.chain(caps).chain(quota).chain(freezer)
        });
        all.filter(|f| f.exists())
            .map(|f| (f.clone(), std::fs::read_to_string(f).unwrap()))
            .collect()
    };
    let own = std::fs::read_to_string(format!("/proc/{}/cgroup", sleeper.0.id())).unwrap();
    assert!(own.contains(&places.prefix), "{own}");
    let before = values();
    group.squeeze(bounds()).unwrap();
    let squeezed = values();
    assert_ne!(squeezed, before);
    if let Some((_, idle)) = squeezed.iter().find(|(f, _)| f.ends_with("cpu.idle")) {
        assert_eq!(idle.trim(), "1");
    }
    // Squeezing twice is no error for whoever releases in between.
    group.release().unwrap();
    assert_eq!(values(), before);
    group.squeeze(bounds()).unwrap();
    if group.freezes() {
        group.freeze().unwrap();
        assert_ne!(values(), squeezed);
    } else {
        eprintln!("SKIPPED: no freezer on this machine");
    }
    // A supervisor that died leaves it so, and the next one finds it by name.
    Places::find(tmp.path()).sweep();
    assert_eq!(values(), before, "somebody is in it, so it stays, free");
    // Frozen, it could not be killed in version 1; released, it can.
    drop(sleeper);
    group.remove();
    assert!(dirs.iter().all(|(_, d)| !d.exists()), "{dirs:?}");
}
