//! Readiness towards a supervisor: a newline on the descriptor in `LOTUS_NOTIFY_FD` (as s6 does
//! it), or `READY=1` on `NOTIFY_SOCKET` (as systemd does it).

use std::io::Write as _;
use std::os::fd::{FromRawFd as _, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Once;

/// Name of the variable that carries the descriptor's number.
pub const FD_VAR: &str = "LOTUS_NOTIFY_FD";

static ONCE: Once = Once::new();

/// Tells the supervisor, if there is one, that this process is ready. Later calls do nothing.
pub fn ready() {
    ONCE.call_once(|| {
        if let Some(fd) = std::env::var(FD_VAR)
            .ok()
            .and_then(|v| v.parse::<RawFd>().ok())
            .filter(|fd| *fd > 2)
        {
            write_newline(fd);
        }
        if let Ok(path) = std::env::var("NOTIFY_SOCKET") {
            let told = UnixDatagram::unbound().and_then(|s| s.send_to(b"READY=1", &path));
            if let Err(e) = told {
                tracing::warn!(%e, path, "the service manager could not be told of readiness");
            }
        }
    });
}

fn write_newline(fd: RawFd) {
    #[expect(
        unsafe_code,
        reason = "the supervisor opened this descriptor for us and nobody else in this process uses it; it is used once, under `ONCE`"
    )]
    // SAFETY: see the reason above; a number that is no open descriptor fails with EBADF.
    let mut file = unsafe { std::fs::File::from_raw_fd(fd) };
    if let Err(e) = file.write_all(b"\n") {
        tracing::warn!(%e, fd, "the supervisor could not be told of readiness");
    }
}
