//! The launch shim: a real `exec` of a program that gets its sockets as sd_listen_fds(3) says.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::process::{Child, Command, Stdio};

const SHIM: &str = env!("CARGO_BIN_EXE_lotus-supervisor");
/// Asks this file's program to be the one that is launched.
const ROLE: &str = "LAUNCH_TEST_ROLE";

/// The program that is launched. It answers one connection on each socket with what it was told,
/// and says on the descriptor for readiness that it is there.
#[test]
fn program() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let var = |name: &str| std::env::var(name).unwrap_or_default();
    let n: RawFd = var("LISTEN_FDS").parse().unwrap();
    let notify: RawFd = var("LOTUS_NOTIFY_FD").parse().unwrap();
    let fence: RawFd = var("LOTUS_FENCE_FD").parse().unwrap();
    file(notify).write_all(b"\n").unwrap();
    let ours = var("LISTEN_PID") == std::process::id().to_string();
    let is = |fd: RawFd| std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
    for (i, name) in (0..n).zip(var("LISTEN_FDNAMES").split(':')) {
        let socket = is(3 + i);
        let all = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let same = |e: &std::fs::DirEntry| std::fs::read_link(e.path()).is_ok_and(|l| l == socket);
        let times = all.filter(same).count();
        let (mut peer, _) = listener(3 + i).accept().unwrap();
        let told = var("LOTUS_LAUNCH").is_empty();
        write!(peer, "{name} {ours} {told} {} {times}", is(fence).display()).unwrap();
    }
}

#[expect(unsafe_code, reason = "the test was spawned with this descriptor")]
fn listener(fd: RawFd) -> TcpListener {
    // SAFETY: see the reason above.
    unsafe { TcpListener::from_raw_fd(fd) }
}

#[expect(unsafe_code, reason = "the test was spawned with this descriptor")]
fn file(fd: RawFd) -> std::fs::File {
    // SAFETY: see the reason above.
    unsafe { std::fs::File::from_raw_fd(fd) }
}

/// A copy of a descriptor that a child inherits, with a number from `least` on.
fn inheritable(fd: &impl std::os::fd::AsFd, least: RawFd) -> OwnedFd {
    let copy = nix::fcntl::fcntl(fd.as_fd(), nix::fcntl::FcntlArg::F_DUPFD(least)).unwrap();
    OwnedFd::from(file(copy))
}

fn shim(launch: &str) -> Command {
    let mut command = Command::new(SHIM);
    command
        .arg("launch")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "program", "--nocapture"])
        .env("LOTUS_LAUNCH", launch)
        .env(ROLE, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

fn ask(listener: &TcpListener) -> String {
    let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    peer.set_read_timeout(Some(std::time::Duration::from_secs(30)))
        .unwrap();
    let mut text = String::new();
    peer.read_to_string(&mut text).unwrap();
    text
}

fn ended(child: Child) -> (Option<i32>, String) {
    let out = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    (out.status.code(), text)
}

#[test]
fn the_program_finds_its_sockets_wherever_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let lock = dir.path().join("x.lock");
    // Numbers that do, and that do not, collide with those that the sockets get.
    for least in [3, 10, 40] {
        let (a, b) = (
            TcpListener::bind("127.0.0.1:0").unwrap(),
            TcpListener::bind("127.0.0.1:0").unwrap(),
        );
        let fence = inheritable(&std::fs::File::create(&lock).unwrap(), 3);
        let (mut told, notify) = std::io::pipe().unwrap();
        let notify = inheritable(&notify, 3);
        let (fd_b, fd_a) = (inheritable(&b, least), inheritable(&a, least));
        let launch = serde_json::json!({"sockets": [
            {"name": "a", "fd": fd_a.as_raw_fd()},
            {"name": "b", "fd": fd_b.as_raw_fd()},
        ]});
        let child = shim(&launch.to_string())
            .env("LOTUS_NOTIFY_FD", notify.as_raw_fd().to_string())
            .env("LOTUS_FENCE_FD", fence.as_raw_fd().to_string())
            .spawn()
            .unwrap();
        drop((fd_a, fd_b, fence, notify));
        let lock = lock.display();
        // It has each of them once.
        assert_eq!(ask(&a), format!("a true true {lock} 1"), "{least}");
        assert_eq!(ask(&b), format!("b true true {lock} 1"), "{least}");
        let mut byte = [0];
        told.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"\n");
        assert_eq!(ended(child).0, Some(0));
    }
}

#[test]
fn a_failure_says_why_and_whether_trying_again_helps() {
    let run = |launch: &str, program: &str| {
        let mut command = Command::new(SHIM);
        command.args(["launch", program]).stderr(Stdio::piped());
        if !launch.is_empty() {
            command.env("LOTUS_LAUNCH", launch);
        }
        ended(command.spawn().unwrap())
    };
    let none = r#"{"sockets":[]}"#;
    let (code, text) = run("", "true");
    assert_eq!(code, Some(78), "{text}");
    assert!(text.contains("for the supervisor itself"), "{text}");
    assert_eq!(run("{", "true").0, Some(78));
    let (code, text) = run(none, "/nowhere/x");
    assert_eq!(code, Some(71), "{text}");
    assert!(text.contains("/nowhere/x: No such file"), "{text}");
    let (code, text) = run(r#"{"sockets":[{"name":"a","fd":77}]}"#, "true");
    assert_eq!(code, Some(71), "{text}");
    assert!(text.contains("its sockets: Bad file"), "{text}");
    assert_eq!(run(none, "true").0, Some(0));
}
