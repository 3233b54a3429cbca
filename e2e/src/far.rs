//! A spoke as on another host: with a folder and an identity of its own, to the hub's port.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::Stdio;

use tokio::process::{Child, Command};

use crate::{Failed, Host, Net, secs};

/// Where a spoke is.
#[derive(Debug, Clone, Copy)]
pub enum At<'a> {
    /// On this host, as if it were another.
    Here,
    /// On a host that reaches the hub.
    Host(&'a Host),
    /// On a host that the hub reaches, at this port.
    Dialed(&'a Host, u16),
}

impl At<'_> {
    fn command(self, exe: PathBuf) -> Command {
        match self {
            Self::Here => Command::new(exe),
            Self::Host(host) | Self::Dialed(host, _) => host.command(exe),
        }
    }

    fn addr(self) -> IpAddr {
        match self {
            Self::Here => Ipv4Addr::LOCALHOST.into(),
            Self::Host(host) | Self::Dialed(host, _) => host.addr.into(),
        }
    }
}

/// A spoke that joined with a bundle. It is killed with this value.
#[derive(Debug)]
pub struct Far {
    service: String,
    repo: PathBuf,
    process: Child,
}

impl Far {
    /// Invites `service/instance` at the hub and lets it join. Returns its folder and the bundle, which
    /// is used up.
    pub async fn join(
        net: &Net,
        service: &str,
        instance: &str,
        at: At<'_>,
    ) -> Result<(PathBuf, PathBuf), Failed> {
        let hub = net.root().join("miner").display().to_string();
        let repo = net.root().join(instance);
        let bundle = net.root().join(format!("{instance}.bundle"));
        let file = bundle.display().to_string();
        let invite = ["join-bundle", "--service", service, "--instance", instance];
        let words = [&invite[..], &["--output", &file, "--repo", &hub]].concat();
        match at {
            At::Here | At::Host(_) => net.run("lotus-miner", &words).await?,
            At::Dialed(host, port) => {
                let here = format!("listen:{}:{port}", host.addr);
                let words = [&words[..], &["--hub", &here]].concat();
                net.run("lotus-miner", &words).await?
            }
        };
        let mut join = at.command(net.exe("lotus-markets"));
        join.args(["join", &file, "--repo"]).arg(&repo);
        let joining = tokio::time::timeout(secs(60), join.kill_on_drop(true).output());
        let out = joining.await.map_err(|e| Failed::at("join", e))??;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        if !said.contains(&format!("{service}/{instance} joined the hub")) {
            let why = String::from_utf8_lossy(&out.stderr);
            return Err(Failed(format!("join: {said}{why}")));
        }
        Ok((repo, bundle))
    }

    /// Runs `service` with the identity in that folder, until it is ready.
    pub async fn run(net: &Net, service: &str, repo: PathBuf, at: At<'_>) -> Result<Self, Failed> {
        let mut log = File::options();
        let log = log.create(true).append(true).open(repo.join("log"))?;
        let listen = format!("LOTUS_MARKETS__{}__LISTEN", service.to_uppercase());
        let process = at
            .command(net.exe("lotus-markets"))
            .args(["run", &format!("--services={service}"), "--repo"])
            .arg(&repo)
            .env(listen, format!("{}:0", at.addr()))
            .env("LOTUS_MARKETS__ADMIN__LISTEN", format!("{}:0", at.addr()))
            .env(
                "LOTUS_MARKETS__DEALS__MK12__LISTEN",
                format!("{}:0", at.addr()),
            )
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()?;
        let far = Self {
            service: service.into(),
            repo,
            process,
        };
        let ready = async |_: &Net| far.ready().await.then_some(());
        let waited = net.wait("a spoke from elsewhere", secs(60), ready).await;
        waited.map_err(|Failed(why)| Failed(format!("{why}\n{}", far.log())))?;
        Ok(far)
    }

    /// Kills it, and returns its folder.
    pub async fn kill(mut self) -> Result<PathBuf, Failed> {
        self.process.kill().await?;
        Ok(self.repo.clone())
    }

    /// Whether it says that it is ready.
    pub async fn ready(&self) -> bool {
        let asked = async {
            let admin = format!("{}-admin", self.service);
            let admin = lotus_runtime::addr_file::read(&self.repo.join("run"), &admin).ok()?;
            let http = lotus_runtime::http_client().timeout(secs(5)).build().ok()?;
            let url = format!("http://{admin}/readyz");
            Some(http.get(url).send().await.ok()?.status().is_success())
        };
        asked.await.unwrap_or(false)
    }

    /// `http://host:port` where it serves clients.
    pub fn url(&self) -> Result<String, Failed> {
        let addr = lotus_runtime::addr_file::read(&self.repo.join("run"), &self.service);
        Ok(format!(
            "http://{}",
            addr.map_err(|e| Failed::at(&self.service, e))?
        ))
    }

    /// Where it logs.
    #[must_use]
    pub fn log_file(&self) -> PathBuf {
        self.repo.join("log")
    }

    /// What it logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap_or_default()
    }
}
