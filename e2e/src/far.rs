//! A spoke as on another host: with a folder and an identity of its own, to the hub's port.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::{Failed, Net, secs};

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
    ) -> Result<(PathBuf, PathBuf), Failed> {
        let hub = net.root().join("miner").display().to_string();
        let repo = net.root().join(instance);
        let bundle = net.root().join(format!("{instance}.bundle"));
        let file = bundle.display().to_string();
        let invite = ["join-bundle", "--service", service, "--instance", instance];
        let words = [&invite[..], &["--output", &file, "--repo", &hub]].concat();
        net.run("lotus-miner", &words).await?;
        let words = ["join", &file, "--repo", &repo.display().to_string()];
        net.run("lotus-markets", &words).await?;
        Ok((repo, bundle))
    }

    /// Runs `service` with the identity in that folder, until it is ready.
    pub async fn run(net: &Net, service: &str, repo: PathBuf) -> Result<Self, Failed> {
        let mut log = File::options();
        let log = log.create(true).append(true).open(repo.join("log"))?;
        let listen = format!("LOTUS_MARKETS__{}__LISTEN", service.to_uppercase());
        let process = Command::new(net.exe("lotus-markets"))
            .args(["run", &format!("--services={service}"), "--repo"])
            .arg(&repo)
            .env(listen, "127.0.0.1:0")
            .env("LOTUS_MARKETS__ADMIN__LISTEN", "127.0.0.1:0")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
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

    /// Whether it says that it is ready.
    pub async fn ready(&self) -> bool {
        let asked = async {
            let admin = format!("{}-admin", self.service);
            let admin = lotus_runtime::addr_file::read(&self.repo.join("run"), &admin).ok()?;
            let http = lotus_runtime::http_client().build().ok()?;
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

    /// What it logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.repo.join("log")).unwrap_or_default()
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        // It may have ended by itself.
        self.process.kill().unwrap_or_default();
        self.process.wait().map(|_| ()).unwrap_or_default();
    }
}
