//! `lotus-probe`, for `tests/sandbox.rs` only: it runs where a spoke would, in the place of
//! `lotus-markets`, tries what it is asked to try, and answers with the errno of each attempt.
//!
//! `needs` is answered by the real program, `lotus-markets.real` beside it, so the profile is that
//! of the real service.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use hub_proto::HubClient;
use lotus_e2e::attempts::{Answer, Attempt, SILENT};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// How long anything that is tried may take.
const LIMIT: Duration = Duration::from_secs(5);
/// How often it looks for a question.
const LOOK: Duration = Duration::from_millis(50);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    if words.get(1).is_some_and(|w| w != "run") {
        let real = PathBuf::from(format!("{}.real", words[0]));
        let e = Command::new(&real).args(&words[1..]).exec();
        eprintln!("{}: {e}", real.display());
        return ExitCode::from(71);
    }
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("lotus-probe: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Says that it is ready, and answers questions in the service's own folder until it is killed.
fn run(words: &[String]) -> io::Result<()> {
    let word = |prefix: &str| words.iter().find_map(|w| w.strip_prefix(prefix));
    let service = word("--services=").ok_or(io::ErrorKind::InvalidInput)?;
    let repo = words.iter().skip_while(|w| *w != "--repo").nth(1);
    let dir = Path::new(repo.ok_or(io::ErrorKind::InvalidInput)?).join(service);
    std::fs::create_dir_all(&dir)?;
    lotus_runtime::notify::ready();
    eprintln!("lotus-probe is ready in {}", dir.display());
    let (ask, answer) = (dir.join("ask.json"), dir.join("answer.json"));
    loop {
        if let Ok(text) = std::fs::read(&ask) {
            let all: Vec<Attempt> = serde_json::from_slice(&text)?;
            let answers: Vec<Answer> = all.into_iter().map(answered).collect();
            std::fs::remove_file(&ask)?;
            let part = dir.join("answer.part");
            std::fs::write(&part, serde_json::to_vec(&answers)?)?;
            std::fs::rename(part, &answer)?;
        }
        alive();
        std::thread::sleep(LOOK);
    }
}

/// A sign of life, if somebody wants one.
fn alive() {
    let Ok(name) = std::env::var("NOTIFY_SOCKET") else {
        return;
    };
    if let Ok(socket) = std::os::unix::net::UnixDatagram::unbound() {
        // A supervisor that is away does not hear it.
        drop(socket.send_to(b"READY=1\nWATCHDOG=1", name));
    }
}

fn answered(attempt: Attempt) -> Answer {
    let errno = match tried(&attempt) {
        Ok(()) => 0,
        Err(e) => e.raw_os_error().unwrap_or(SILENT),
    };
    Answer { attempt, errno }
}

fn tried(attempt: &Attempt) -> io::Result<()> {
    match attempt {
        Attempt::Read(path) => std::fs::File::open(path)?.read(&mut [0; 1]).map(drop),
        Attempt::List(path) => std::fs::read_dir(path).map(drop),
        Attempt::Write(path) => {
            std::fs::write(path, b"probe")?;
            std::fs::remove_file(path)
        }
        Attempt::Execute(path) => Command::new(path)
            .arg("--version")
            .stdout(Stdio::null())
            .spawn()?
            .wait()
            .map(drop),
        Attempt::Connect(addr) => std::net::TcpStream::connect_timeout(addr, LIMIT).map(drop),
        Attempt::FastOpen(addr) => fast_open(*addr),
        Attempt::Multipath => socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP),
        Attempt::Family(family) => socket(*family, libc::SOCK_DGRAM, 0),
        Attempt::Bind(addr) => std::net::TcpListener::bind(addr).map(drop),
        Attempt::Talk(path) => talk(path),
        Attempt::Order(path) => order(path),
        Attempt::Signal(pid) => Ok(nix::sys::signal::kill(as_pid(*pid)?, None)?),
        Attempt::Trace(pid) => trace(*pid),
        Attempt::ReadMemory(pid) => read_memory(*pid),
        Attempt::Limit(pid) => limit(*pid),
        Attempt::Priority(pid) => priority(*pid),
        Attempt::Call(number) => call(*number),
        Attempt::OtherTable => in_child(|| drop(call(0x4000_0000 | libc::SYS_getpid))),
        Attempt::Variable(name) => match std::env::var_os(name) {
            Some(_) => Ok(()),
            None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        },
    }
}

fn as_pid(pid: u32) -> io::Result<Pid> {
    i32::try_from(pid)
        .map(Pid::from_raw)
        .map_err(io::Error::other)
}

fn checked(answer: libc::c_long) -> io::Result<()> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A system call with no arguments that mean anything: the kernel refuses them, or the sandbox the
/// call.
fn call(number: i64) -> io::Result<()> {
    #[expect(unsafe_code, reason = "null and 0 name no memory of this process")]
    // SAFETY: see the reason above.
    let answer = unsafe { libc::syscall(number, 0i64, 0i64, 0i64, 0i64, 0i64, 0i64) };
    checked(answer)
}

fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<()> {
    #[expect(unsafe_code, reason = "numbers go in; the descriptor is closed below")]
    // SAFETY: see the reason above.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    checked(fd.into())?;
    nix::unistd::close(fd)?;
    Ok(())
}

/// Connects with the first bytes instead of connect(2).
fn fast_open(addr: std::net::SocketAddr) -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, sendto};
    let family = if addr.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let socket = nix::sys::socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let flags = MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);
    sendto(
        socket.as_raw_fd(),
        b"GET / HTTP/1.0\r\n\r\n",
        &SockaddrStorage::from(addr),
        flags,
    )?;
    Ok(())
}

/// Speaks HTTP/2, and waits for a word of the other side.
fn talk(path: &Path) -> io::Result<()> {
    let mut stream = std::os::unix::net::UnixStream::connect(path)?;
    stream.set_read_timeout(Some(LIMIT))?;
    // The preface and empty SETTINGS. Source: RFC 9113, sections 3.4 and 6.5.
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")?;
    match stream.read(&mut [0; 9])? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// EACCES when the hub takes it for nobody.
fn order(path: &Path) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let hello = HubClient::on_this_host(path, LIMIT, "operator", "probe", Ok);
    match runtime.block_on(hello) {
        Ok(_) => Ok(()),
        Err(e) if e.to_string().contains("a process in a sandbox") => {
            Err(io::Error::from_raw_os_error(libc::EACCES))
        }
        Err(e) => Err(io::Error::other(e)),
    }
}

/// Seizes the process, which does not stop it, and lets go by ending.
fn trace(pid: u32) -> io::Result<()> {
    let pid = as_pid(pid)?.as_raw();
    in_child(|| {
        #[expect(
            unsafe_code,
            reason = "numbers go in; no memory of this process is named"
        )]
        // SAFETY: see the reason above.
        let answer =
            unsafe { libc::ptrace(libc::PTRACE_SEIZE, libc::c_long::from(pid), 0i64, 0i64) };
        if answer < 0 {
            exit_with_errno();
        }
    })
}

fn read_memory(pid: u32) -> io::Result<()> {
    let mut byte = [0u8; 1];
    let local = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    // Any address will do: whether one may look is decided first. EFAULT is a yes.
    let remote = libc::iovec {
        iov_base: std::ptr::without_provenance_mut(0x1000),
        iov_len: 1,
    };
    let pid = as_pid(pid)?.as_raw();
    #[expect(
        unsafe_code,
        reason = "the one byte that is written lives longer than the call"
    )]
    // SAFETY: see the reason above.
    let answer =
        unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    match checked(answer.try_into().unwrap_or(-1)) {
        Err(e) if e.raw_os_error() == Some(libc::EFAULT) => Ok(()),
        other => other,
    }
}

/// Sets a limit of another process to what it is.
fn limit(pid: u32) -> io::Result<()> {
    let pid = as_pid(pid)?.as_raw();
    let mut now = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    #[expect(unsafe_code, reason = "the structure lives longer than both calls")]
    // SAFETY: see the reason above.
    let answer = unsafe {
        match libc::prlimit(pid, libc::RLIMIT_CORE, std::ptr::null(), &raw mut now) {
            0 => libc::prlimit(pid, libc::RLIMIT_CORE, &raw const now, std::ptr::null_mut()),
            refused => refused,
        }
    };
    checked(answer.into())
}

/// Sets the priority of another process to what it is.
fn priority(pid: u32) -> io::Result<()> {
    #[expect(unsafe_code, reason = "numbers go in")]
    // SAFETY: see the reason above.
    let answer = unsafe {
        let now = libc::getpriority(libc::PRIO_PROCESS, pid);
        libc::setpriority(libc::PRIO_PROCESS, pid, now)
    };
    checked(answer.into())
}

/// Does something in a process of its own: it may be killed for it. Its exit status is an errno.
fn in_child(what: impl FnOnce()) -> io::Result<()> {
    #[expect(unsafe_code, reason = "this process has one thread")]
    // SAFETY: see the reason above; fork(2).
    let forked = unsafe { nix::unistd::fork() }?;
    let child = match forked {
        nix::unistd::ForkResult::Child => {
            what();
            exit(0);
        }
        nix::unistd::ForkResult::Parent { child } => child,
    };
    let end = Instant::now() + LIMIT;
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG))? {
            WaitStatus::Exited(_, 0) => return Ok(()),
            WaitStatus::Exited(_, errno) => return Err(io::Error::from_raw_os_error(errno)),
            WaitStatus::Signaled(_, signal, _) => {
                return Err(io::Error::from_raw_os_error(-(signal as i32)));
            }
            _ if Instant::now() > end => {
                nix::sys::signal::kill(child, Signal::SIGKILL)?;
                return Err(io::ErrorKind::TimedOut.into());
            }
            _ => std::thread::sleep(LOOK),
        }
    }
}

fn exit_with_errno() -> ! {
    exit(io::Error::last_os_error().raw_os_error().unwrap_or(1))
}

/// Ends a forked child without what this program does at its end.
fn exit(status: i32) -> ! {
    #[expect(unsafe_code, reason = "it does not return, and touches no memory")]
    // SAFETY: see the reason above; _exit(2).
    unsafe {
        libc::_exit(status)
    }
}
