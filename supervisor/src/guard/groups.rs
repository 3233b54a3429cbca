//! Control groups, one for each process that is squeezed: version 2 where it is delegated, else
//! version 1. They are siblings of the group of the supervisor and the hub, because weights count
//! between siblings only, and their names tell a later supervisor whose they are.

use std::io;
use std::path::{Path, PathBuf};

use super::threads;
use super::{Bounds, disks, processor};

/// The supervisor's own group below one that is delegated to it: version 2 wants processes in
/// leaves only. The unit asks systemd for it by the same name (`DelegateSubgroup=`).
const LEAF: &str = "supervisor";
/// Least that a squeezed process may have in memory before it is made to give back.
const MEMORY_LEAST: u64 = 64 << 20;

/// A folder of which kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    V2,
    Cpu,
    Blkio,
    Freezer,
}

/// A file of a group, and what is written to it. Files that a kernel does not have are left out.
struct Knob {
    file: &'static str,
    squeezed: &'static str,
    free: &'static str,
}

const fn knob(file: &'static str, squeezed: &'static str, free: &'static str) -> Knob {
    Knob {
        file,
        squeezed,
        free,
    }
}

/// In the order of squeezing; it is released in reverse, because the weight of an idle group can
/// not be set. Free, a spoke has a third of the usual weight: a group weighs as one, with all its
/// threads, so three spokes would push the hub's group down to a quarter, also when it only seals.
const V2: [Knob; 4] = [
    knob("cpu.weight", "1", "33"),
    knob("cpu.idle", "1", "0"),
    knob("io.weight", "default 1", "default 100"),
    knob("io.prio.class", "idle", "no-change"),
];
const CPU: [Knob; 2] = [knob("cpu.shares", "2", "341"), knob("cpu.idle", "1", "0")];
const BLKIO: [Knob; 3] = [
    knob("blkio.weight", "10", "500"),
    knob("blkio.bfq.weight", "1", "100"),
    knob("blkio.prio.class", "idle", "no-change"),
];
/// Those that no scheduler of a disk ignores.
const DISK_CLASS: [&str; 2] = ["io.prio.class", "blkio.prio.class"];

impl Kind {
    const fn knobs(self) -> &'static [Knob] {
        match self {
            Self::V2 => &V2,
            Self::Cpu => &CPU,
            Self::Blkio => &BLKIO,
            Self::Freezer => &[],
        }
    }

    /// The files that bound what is read of a disk.
    const fn caps(self) -> &'static [disks::Cap] {
        match self {
            Self::V2 => &disks::V2,
            Self::Blkio => &disks::BLKIO,
            Self::Cpu | Self::Freezer => &[],
        }
    }

    /// The file that bounds its processor's time.
    const fn quota(self) -> Option<processor::Quota> {
        match self {
            Self::V2 => Some(processor::V2),
            Self::Cpu => Some(processor::V1),
            Self::Blkio | Self::Freezer => None,
        }
    }

    /// The file that freezes, and its words for frozen and not.
    const fn freezer(self) -> Option<Knob> {
        match self {
            Self::V2 => Some(knob("cgroup.freeze", "1", "0")),
            Self::Freezer => Some(knob("freezer.state", "FROZEN", "THAWED")),
            Self::Cpu | Self::Blkio => None,
        }
    }
}

/// The group of one process.
#[derive(Debug)]
pub(crate) struct Group {
    dirs: Vec<(Kind, PathBuf)>,
}

impl Group {
    /// Name of the rung.
    pub(crate) fn name(&self) -> &'static str {
        match self.dirs.first() {
            Some((Kind::V2, _)) => "cgroup2",
            _ => "cgroup1",
        }
    }

    /// Puts a process in, and what it started before.
    pub(crate) fn add(&self, pid: u32) -> io::Result<()> {
        for (_, dir) in &self.dirs {
            let file = dir.join("cgroup.procs");
            let there = std::fs::read_to_string(&file)?;
            for pid in threads::family(pid) {
                if there.lines().any(|l| l.parse() == Ok(pid)) {
                    continue;
                }
                match std::fs::write(&file, pid.to_string()) {
                    // It ended meanwhile.
                    Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                    done => done?,
                }
            }
        }
        Ok(())
    }

    /// Whether it squeezes the disk's part whatever schedules the disk.
    pub(crate) fn has_disk_class(&self) -> bool {
        let has = |dir: &Path| DISK_CLASS.iter().any(|f| dir.join(f).exists());
        self.dirs.iter().any(|(_, dir)| has(dir))
    }

    /// Squeezes it, and keeps it within the bounds.
    pub(crate) fn squeeze(&self, bounds: Bounds) -> io::Result<()> {
        for (kind, dir) in &self.dirs {
            for knob in kind.knobs() {
                set(dir, knob.file, knob.squeezed)?;
            }
            if let (Some(quota), Some(share)) = (kind.quota(), bounds.share) {
                set(dir, quota.file, &quota.words(share))?;
            }
            if let Some(reads) = bounds.reads {
                for cap in kind.caps() {
                    cap.set(dir, reads)?;
                }
            }
            if *kind == Kind::V2
                && let Some(high) = memory_high(dir)
            {
                set(dir, "memory.high", &high.to_string())?;
            }
        }
        Ok(())
    }

    /// Takes back squeezing and freezing. All of it is tried; the first failure is told.
    pub(crate) fn release(&self) -> io::Result<()> {
        let mut done = self.thaw();
        for (kind, dir) in &self.dirs {
            for cap in kind.caps() {
                done = done.and(cap.lift(dir));
            }
            if let Some(quota) = kind.quota() {
                done = done.and(set(dir, quota.file, quota.free));
            }
            for knob in kind.knobs().iter().rev() {
                done = done.and(set(dir, knob.file, knob.free));
            }
            if *kind == Kind::V2 {
                done = done.and(set(dir, "memory.high", "max"));
            }
        }
        done
    }

    /// Whether it can.
    pub(crate) fn freezes(&self) -> bool {
        let has = |(kind, dir): &(Kind, PathBuf)| {
            kind.freezer().is_some_and(|k| dir.join(k.file).exists())
        };
        self.dirs.iter().any(has)
    }

    pub(crate) fn freeze(&self) -> io::Result<()> {
        for (kind, dir) in &self.dirs {
            if let Some(knob) = kind.freezer() {
                set(dir, knob.file, knob.squeezed)?;
            }
        }
        Ok(())
    }

    pub(crate) fn thaw(&self) -> io::Result<()> {
        let mut done = Ok(());
        for (kind, dir) in &self.dirs {
            if let Some(knob) = kind.freezer() {
                done = done.and(set(dir, knob.file, knob.free));
            }
        }
        done
    }

    /// Removes it. One that somebody is still in stays for the next start.
    pub(crate) fn remove(&self) {
        for (_, dir) in &self.dirs {
            if let Err(e) = std::fs::remove_dir(dir)
                && e.kind() != io::ErrorKind::NotFound
            {
                tracing::debug!(dir = %dir.display(), %e, "the control group stays");
            }
        }
    }
}

/// Writes a file of a group, if the kernel has it.
fn set(dir: &Path, file: &str, value: &str) -> io::Result<()> {
    let path = dir.join(file);
    if !path.exists() {
        return Ok(());
    }
    std::fs::write(&path, value)
        .map_err(|e| io::Error::new(e.kind(), format!("{} {value:?}: {e}", path.display())))
}

/// What a squeezed process may have in memory: what it has and an eighth more, so that what it
/// reads pushes out its own pages and not those of the proof.
fn memory_high(dir: &Path) -> Option<u64> {
    let now: u64 = std::fs::read_to_string(dir.join("memory.current"))
        .ok()?
        .trim()
        .parse()
        .ok()?;
    Some((now.saturating_add(now / 8)).max(MEMORY_LEAST))
}

/// Where groups can be made on this host.
#[derive(Debug)]
pub(crate) struct Places {
    prefix: String,
    v2: Result<PathBuf, String>,
    cpu: Result<PathBuf, String>,
    blkio: Option<PathBuf>,
    freezer: Option<PathBuf>,
}

impl Places {
    /// Looks, and changes nothing. `root` is the supervisor's folder, which names the groups.
    pub(crate) fn find(root: &Path) -> Self {
        let read = |file| std::fs::read_to_string(file).unwrap_or_default();
        let mounts = mounts(&read("/proc/self/mountinfo"));
        let own = read("/proc/self/cgroup");
        let v1 = |controller: &str| {
            let dir = dir_of(&mounts, &own, controller);
            dir.filter(|d| d.is_dir())
        };
        Self {
            prefix: format!("lotus-{:08x}-", hash(root)),
            v2: dir_of(&mounts, &own, "")
                .ok_or_else(|| "no cgroup v2".to_owned())
                .and_then(|dir| delegated(&dir)),
            cpu: v1("cpu").ok_or_else(|| "no cgroup v1 with cpu".to_owned()),
            blkio: v1("blkio"),
            freezer: v1("freezer"),
        }
    }

    /// Lets go of what a dead supervisor squeezed or froze, and removes groups that are empty.
    pub(crate) fn sweep(&self) {
        let v1 = [
            (Kind::Cpu, self.cpu.as_ref().ok()),
            (Kind::Blkio, self.blkio.as_ref()),
            (Kind::Freezer, self.freezer.as_ref()),
        ];
        let all = v1.into_iter().chain([(Kind::V2, self.v2.as_ref().ok())]);
        for (kind, parent) in all {
            let entries = parent.and_then(|p| std::fs::read_dir(p).ok());
            for entry in entries.into_iter().flatten().flatten() {
                if !entry
                    .file_name()
                    .to_string_lossy()
                    .starts_with(&self.prefix)
                {
                    continue;
                }
                let group = Group {
                    dirs: vec![(kind, entry.path())],
                };
                if let Err(e) = group.release() {
                    tracing::warn!(%e, "a control group of an earlier supervisor is not released");
                }
                group.remove();
            }
        }
    }

    /// The rung that groups made here would be, and where.
    pub(crate) fn usable(&self) -> Result<String, String> {
        let writable = |dir: &PathBuf| {
            let ours = nix::unistd::access(dir, nix::unistd::AccessFlags::W_OK);
            ours.map_err(|e| format!("{}: {e}", dir.display()))
        };
        let said = |name: &str, dir: &Result<PathBuf, String>| {
            let dir = dir.clone()?;
            writable(&dir).map(|()| format!("{name} in {}", dir.display()))
        };
        said("cgroup2", &self.v2).or_else(|first| {
            said("cgroup1", &self.cpu).map_err(|second| format!("{first}; {second}"))
        })
    }

    /// Makes the group of a process, or finds it. Says why there can be none.
    pub(crate) fn group(&self, name: &str, freezes: bool) -> Result<Group, String> {
        let name = format!("{}{name}", self.prefix);
        let v2 = self.v2.clone().and_then(|parent| {
            prepare(&parent).map_err(|e| format!("cgroup v2: {e}"))?;
            let dir = make(&parent.join(&name)).map_err(|e| format!("cgroup v2: {e}"))?;
            Ok(Group {
                dirs: vec![(Kind::V2, dir)],
            })
        });
        let v1 = || -> Result<Group, String> {
            let parent = self.cpu.clone()?;
            let dir = make(&parent.join(&name)).map_err(|e| format!("cgroup v1: {e}"))?;
            let mut dirs = vec![(Kind::Cpu, dir)];
            let freezer = self.freezer.as_ref().filter(|_| freezes);
            for (kind, parent) in [(Kind::Blkio, self.blkio.as_ref()), (Kind::Freezer, freezer)] {
                match parent.map(|p| make(&p.join(&name))) {
                    Some(Ok(dir)) => dirs.push((kind, dir)),
                    Some(Err(e)) => tracing::debug!(%e, ?kind, "no control group"),
                    None => {}
                }
            }
            Ok(Group { dirs })
        };
        v2.or_else(|first| v1().map_err(|second| format!("{first}; {second}")))
    }
}

fn make(dir: &Path) -> io::Result<PathBuf> {
    match std::fs::create_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ => Ok(dir.to_path_buf()),
    }
}

/// The folder below which groups of version 2 may be made, given the supervisor's own.
fn delegated(own: &Path) -> Result<PathBuf, String> {
    let name = own.file_name().unwrap_or_default().to_string_lossy();
    let parent = if name == LEAF {
        own.parent().unwrap_or(own)
    } else {
        // A service manager puts a restarted supervisor where it was, and that must be a leaf.
        let managed = own.components().any(|c| {
            let c = c.as_os_str().to_string_lossy();
            [".slice", ".scope", ".service"]
                .iter()
                .any(|end| c.ends_with(end))
        });
        if managed {
            return Err(format!(
                "{} is not delegated: the unit needs Delegate=yes and DelegateSubgroup={LEAF} \
                 (systemd 254)",
                own.display()
            ));
        }
        own
    };
    let has = std::fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
    if !has.split_whitespace().any(|c| c == "cpu") {
        return Err("cgroup v2 has no cpu controller here".into());
    }
    Ok(parent.to_path_buf())
}

/// Lets the groups below `parent` have weights: the supervisor itself goes into a leaf first, if
/// it is in `parent` and that is not the root, which alone may have processes beside groups.
fn prepare(parent: &Path) -> io::Result<()> {
    let control = parent.join("cgroup.subtree_control");
    let on = std::fs::read_to_string(&control)?;
    let missing = |c: &&&str| !on.split_whitespace().any(|o| o == **c);
    let wanted: Vec<&&str> = ["cpu", "io", "memory"].iter().filter(missing).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let us = std::process::id().to_string();
    let inside = std::fs::read_to_string(parent.join("cgroup.procs"))?;
    let move_us = parent.join("cgroup.type").exists() && inside.lines().any(|l| l == us);
    if move_us {
        let leaf = make(&parent.join(LEAF))?;
        std::fs::write(leaf.join("cgroup.procs"), &us)?;
    }
    for controller in wanted {
        match std::fs::write(&control, format!("+{controller}")) {
            Ok(()) => {}
            // Somebody else is in there, or it is not ours to give: back to where we were.
            Err(e) if *controller == "cpu" => {
                if move_us {
                    std::fs::write(parent.join("cgroup.procs"), &us)?;
                    std::fs::remove_dir(parent.join(LEAF))?;
                }
                return Err(e);
            }
            Err(e) => tracing::debug!(%e, controller, "not delegated"),
        }
    }
    Ok(())
}

/// A mounted hierarchy: where, which of its groups is there, and its controllers; none for
/// version 2.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    point: PathBuf,
    root: String,
    controllers: Vec<String>,
}

/// The hierarchies in /proc/self/mountinfo (proc(5)).
fn mounts(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (first, second) = line.split_once(" - ")?;
        let fields: Vec<&str> = first.split(' ').collect();
        let mut second = second.split(' ');
        let controllers = match second.next()? {
            "cgroup2" => Vec::new(),
            "cgroup" => second.nth(1)?.split(',').map(str::to_owned).collect(),
            _ => return None,
        };
        Some(Mount {
            point: fields.get(4)?.into(),
            root: (*fields.get(3)?).to_owned(),
            controllers,
        })
    };
    text.lines().filter_map(mount).collect()
}

/// The own group in the hierarchy with this controller of version 1, or "" for version 2.
fn dir_of(mounts: &[Mount], own: &str, controller: &str) -> Option<PathBuf> {
    let path = own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        is(controller, controllers.split(',')).then_some(path)
    })?;
    let mount = mounts
        .iter()
        .find(|m| is(controller, m.controllers.iter().map(String::as_str)))?;
    let below = match mount.root.as_str() {
        "/" => path,
        root => path.strip_prefix(root)?,
    };
    Some(mount.point.join(below.trim_start_matches('/')))
}

/// Whether a hierarchy with these controllers is the one that is meant.
fn is<'a>(controller: &str, mut all: impl Iterator<Item = &'a str>) -> bool {
    if controller.is_empty() {
        all.next().is_none_or(str::is_empty)
    } else {
        all.any(|c| c == controller)
    }
}

/// FNV-1a, 32 bits: a name, not a proof.
fn hash(path: &Path) -> u32 {
    let bytes = path.as_os_str().as_encoded_bytes();
    bytes.iter().fold(0x811c_9dc5, |h: u32, b| {
        (h ^ u32::from(*b)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
#[path = "groups_tests.rs"]
mod tests;
