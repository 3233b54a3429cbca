//! Hosts of their own, as network namespaces: each has one link, to this host, and no other route.

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::process::Stdio;

use tokio::process::Command;

use crate::Failed;

/// A network namespace. It goes with this value.
#[derive(Debug)]
pub struct Host {
    name: String,
    link: String,
    /// This host, as it sees it.
    pub gateway: Ipv4Addr,
    /// It, as this host sees it.
    pub addr: Ipv4Addr,
}

impl Host {
    /// Makes host number `n` of this process. Needs root and `ip` (`apt-get install iproute2`).
    pub async fn new(n: u8) -> Result<Self, Failed> {
        let pid = std::process::id();
        // Of two runs at once each has its own network.
        let net = 128 + u8::try_from(pid % 100).unwrap_or_default();
        let host = Self {
            name: format!("lotus-{pid}-{n}"),
            link: format!("lh{}n{n}", pid % 1_000_000),
            gateway: Ipv4Addr::new(10, net, n, 1),
            addr: Ipv4Addr::new(10, net, n, 2),
        };
        let Self {
            name,
            link,
            gateway,
            addr,
        } = &host;
        ip(&format!("netns add {name}")).await?;
        ip(&format!(
            "link add {link} type veth peer name eth0 netns {name}"
        ))
        .await?;
        ip(&format!("addr add {gateway}/30 dev {link}")).await?;
        ip(&format!("link set {link} up")).await?;
        ip(&format!("-n {name} addr add {addr}/30 dev eth0")).await?;
        ip(&format!("-n {name} link set eth0 up")).await?;
        ip(&format!("-n {name} link set lo up")).await?;
        Ok(host)
    }

    /// Lets it reach another address of this host.
    pub async fn route_to(&self, addr: Ipv4Addr) -> Result<(), Failed> {
        let Self { name, gateway, .. } = self;
        ip(&format!("-n {name} route add {addr}/32 via {gateway}")).await
    }

    /// A program on it.
    pub fn command(&self, exe: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(exe);
        command
    }

    /// Takes its link away, or gives it back.
    pub async fn linked(&self, linked: bool) -> Result<(), Failed> {
        let to = if linked { "up" } else { "down" };
        ip(&format!("link set {} {to}", self.link)).await
    }

    /// Whether a program there can open a connection.
    pub async fn reaches(&self, host: Ipv4Addr, port: u16) -> Result<bool, Failed> {
        let script = format!("exec 3<>/dev/tcp/{host}/{port}");
        let mut bash = self.command("bash");
        bash.args(["-c", &script]).stderr(Stdio::null());
        Ok(bash.status().await?.success())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Its link goes with it. What still runs there was killed before.
        let mut ip = std::process::Command::new("ip");
        ip.args(["netns", "del", &self.name]);
        ip.status().map(|_| ()).unwrap_or_default();
    }
}

async fn ip(words: &str) -> Result<(), Failed> {
    let mut ip = Command::new("ip");
    let out = ip.args(words.split(' ')).stdin(Stdio::null()).output();
    let out = out.await.map_err(|e| Failed::at("ip", e))?;
    match out.status.success() {
        true => Ok(()),
        false => Err(Failed::at(
            &format!("ip {words}"),
            String::from_utf8_lossy(&out.stderr),
        )),
    }
}
