//! The launch shim and a shell in a sandbox: what the kernel does with a profile.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::json;

/// A secret, a folder of the program's own, and the profile that tells them apart.
struct Place {
    dir: tempfile::TempDir,
    profile: serde_json::Value,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("secret"), "secret\n").unwrap();
        std::fs::write(dir.path().join("public"), "public\n").unwrap();
        // All loaders are allowed: a shell is run by one of them.
        let mut run = vec![PathBuf::from(SHELL).canonicalize().unwrap()];
        for dir in ["/lib", "/lib64"] {
            let all = std::fs::read_dir(dir).into_iter().flatten().flatten();
            run.extend(
                all.map(|e| e.path())
                    .filter(|p| p.file_name().unwrap().to_string_lossy().starts_with("ld-")),
            );
        }
        let own = dir.path().join("own");
        let profile = json!({
            "read": ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", dir.path().join("public")],
            "write": [own], "own": [own], "devices": ["/dev/null"], "run": run,
            "connect": [], "bind": [], "variables": ["KEPT"], "account": null,
        });
        Self { dir, profile }
    }

    /// Runs a line of shell in the sandbox, in its folder.
    fn shell(&self, line: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lotus-supervisor"));
        let launch = json!({ "sockets": [], "sandbox": self.profile });
        command
            .args(["launch", SHELL, "-c", line])
            .env("LOTUS_LAUNCH", launch.to_string())
            .env("KEPT", "1")
            .env("LOTUS_MINER__NODE__TOKEN", "secret")
            .current_dir(self.dir.path());
        command.output().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

const SHELL: &str = "/bin/sh";

/// Whether this kernel has Landlock. Without it nothing here is said of files.
fn landlock() -> bool {
    #[expect(unsafe_code, reason = "it asks for the version, and names no memory")]
    // SAFETY: see the reason above; landlock_create_ruleset(2).
    let version = unsafe {
        let none = std::ptr::null::<libc::c_void>();
        libc::syscall(libc::SYS_landlock_create_ruleset, none, 0usize, 1u32)
    };
    if version < 1 {
        let line = b"SKIPPED sandbox: this kernel has no Landlock, so nothing is tried on files\n";
        std::io::stdout().write_all(line).unwrap();
    }
    version >= 1
}

fn said(out: &Output) -> String {
    format!(
        "{}: {}{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    )
}

#[test]
fn a_program_reaches_its_own_and_nothing_else() {
    if !landlock() {
        return;
    }
    let place = Place::new();
    let out =
        place.shell("read x < public && echo $x > own/file && read y < own/file && echo got $y");
    assert!(said(&out).contains("got public"), "{}", said(&out));
    assert!(place.path("own/file").is_file());
    for line in [
        "read x < secret && echo got $x",
        "echo > public && echo got",
        "echo > new && echo got",
        "read x < /etc/passwd && echo got $x",
        "read x < /proc/self/status && echo got $x",
        "/bin/cat public",
        "/lib64/ld-linux-x86-64.so.2 /bin/cat public",
    ] {
        let out = place.shell(line);
        let text = said(&out);
        assert!(
            !out.status.success() && !text.contains("got") && !text.contains("exit status: 0"),
            "{line}: {text}"
        );
    }
    assert_eq!(
        std::fs::read_to_string(place.path("public")).unwrap(),
        "public\n"
    );
}

#[test]
fn a_program_signals_nobody_and_gets_no_secrets_from_the_environment() {
    let place = Place::new();
    let us = std::process::id();
    // It is the shell itself that sends the signals.
    let out = place.shell(&format!(
        "kill -0 {us} || echo refused; kill -0 $$ && echo self"
    ));
    let text = said(&out);
    assert!(text.contains("refused") && text.contains("self"), "{text}");
    let out = place.shell("echo [$KEPT] [$LOTUS_MINER__NODE__TOKEN] [$LOTUS_LAUNCH]");
    assert!(said(&out).contains("[1] [] []"), "{}", said(&out));
}

#[test]
fn a_wrong_profile_does_not_start() {
    let mut place = Place::new();
    place.profile["write"] = json!(["/proc/nowhere"]);
    let out = place.shell("echo got");
    assert!(!out.status.success(), "{}", said(&out));
    assert!(said(&out).contains("/proc/nowhere"), "{}", said(&out));
}

/// A kernel without Landlock, played by a filter that this thread passes on to what it starts.
#[test]
fn without_landlock_the_rest_still_holds() {
    let tried = std::thread::spawn(|| {
        use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
        let rules = [(libc::SYS_landlock_create_ruleset, Vec::new())];
        let filter = SeccompFilter::new(
            rules.into(),
            SeccompAction::Allow,
            SeccompAction::Errno(libc::ENOSYS.cast_unsigned()),
            std::env::consts::ARCH.try_into().unwrap(),
        );
        let filter: BpfProgram = filter.unwrap().try_into().unwrap();
        seccompiler::apply_filter(&filter).unwrap();
        let us = std::process::id();
        let line = format!("read x < secret && echo got $x; kill -0 {us} || echo refused");
        said(&Place::new().shell(&line))
    });
    let text = tried.join().unwrap();
    assert!(text.contains("got secret"), "the file is open: {text}");
    assert!(text.contains("refused"), "signals are not: {text}");
}
