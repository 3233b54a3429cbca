//! Servers of others, and what a server's work costs.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lotus_e2e::{Failed, secs};
use nix::sys::signal::{Signal, kill};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// Longest that a server may take to start: frisbii reads the whole CAR first.
const START: Duration = secs(120);
/// Longest that it may take to end.
const STOP: Duration = secs(5);

/// A program on the `PATH`, or in the folder for programs that only root starts.
pub(super) fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin")])
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// A server of others that runs until this is dropped.
#[derive(Debug)]
pub(super) struct Server {
    name: &'static str,
    pub(super) addr: SocketAddr,
    process: Child,
}

impl Server {
    /// nginx with one worker, that serves the files of `www` as a provider would have it: with
    /// sendfile, without a log. Its own files go to `dir`.
    pub(super) fn nginx(exe: &Path, dir: &Path, www: &Path) -> Result<Self, Failed> {
        let addr = free_address()?;
        std::fs::create_dir_all(dir)?;
        let (own, www) = (dir.display(), www.display());
        // As root its worker would be someone who may not read a temporary folder.
        let user = if nix::unistd::geteuid().is_root() {
            "user root root;"
        } else {
            ""
        };
        let text = format!(
            "{user}\ndaemon off;\nworker_processes 1;\npid {own}/pid;\n\
             events {{ worker_connections 2048; }}\n\
             http {{\n\
             access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000;\n\
             default_type application/octet-stream;\n\
             client_body_temp_path {own}/body; proxy_temp_path {own}/proxy;\n\
             fastcgi_temp_path {own}/fastcgi; uwsgi_temp_path {own}/uwsgi;\n\
             scgi_temp_path {own}/scgi;\n\
             server {{ listen {addr}; root {www}; }}\n\
             }}\n"
        );
        let conf = dir.join("nginx.conf");
        std::fs::write(&conf, text)?;
        let mut command = Command::new(exe);
        command.arg("-p").arg(dir).arg("-c").arg(conf);
        command.arg("-e").arg(dir.join("error.log"));
        Self::start("nginx", command, addr, dir)
    }

    /// frisbii, that serves the CAR without its limits for the public, without a log.
    pub(super) fn frisbii(exe: &Path, dir: &Path, car: &Path) -> Result<Self, Failed> {
        let addr = free_address()?;
        std::fs::create_dir_all(dir)?;
        let mut command = Command::new(exe);
        command.arg("--car").arg(car);
        command.args(["--listen", &addr.to_string(), "--log-file="]);
        command.args(["--max-response-bytes=0", "--max-response-duration=0"]);
        // It makes itself a key there.
        command.env("HOME", dir).env("XDG_CONFIG_HOME", dir);
        Self::start("frisbii", command, addr, dir)
    }

    fn start(
        name: &'static str,
        mut command: Command,
        addr: SocketAddr,
        dir: &Path,
    ) -> Result<Self, Failed> {
        let log = dir.join("output");
        let output = File::create(&log)?;
        let process = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .map_err(|e| Failed::at(name, e))?;
        let mut server = Self {
            name,
            addr,
            process,
        };
        let end = Instant::now() + START;
        while TcpStream::connect_timeout(&addr, secs(1)).is_err() {
            let ended = server.process.try_wait()?;
            if ended.is_some() || Instant::now() > end {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                return Err(Failed(format!("{name} does not serve: {said}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    /// Processor time that it and its workers took so far.
    pub(super) fn processor_time(&self) -> Result<Duration, Failed> {
        let pid = self.process.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        let mut sum = processor_time(pid)?;
        for child in children.split_whitespace() {
            let child = child.parse().map_err(|e| Failed::at(child, e))?;
            sum += processor_time(child)?;
        }
        Ok(sum)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both end their workers when they are asked to end.
        let pid = Pid::from_raw(self.process.id().cast_signed());
        if let Err(e) = kill(pid, Signal::SIGTERM) {
            eprintln!("{}: {e}", self.name);
        }
        let end = Instant::now() + STOP;
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// Processor time of a process, with that of its threads that ended.
pub(crate) fn processor_time(pid: u32) -> Result<Duration, Failed> {
    let failed = |e| Failed::at("processor time", e);
    let clock = clock_getcpuclockid(Pid::from_raw(pid.cast_signed())).map_err(failed)?;
    clock_gettime(clock).map(Duration::from).map_err(failed)
}

/// An address that nobody listens on; some servers cannot pick one themselves.
fn free_address() -> Result<SocketAddr, Failed> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_works_takes_time() {
        let before = processor_time(std::process::id()).unwrap();
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(50) {}
        let after = processor_time(std::process::id()).unwrap();
        assert!(after - before > Duration::from_millis(5));
        assert!(on_path("sh").is_some() && on_path("no such program").is_none());
    }
}
