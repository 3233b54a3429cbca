//! What a service needs from its host, in its own words: who runs it binds its sockets, and builds
//! its sandbox, from this.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Port of DNS over TCP, which a long answer takes.
const DNS: u16 = 53;
/// What name resolution and TLS read. Not all of it is on every host. Folders of certificates, and
/// not those above them, where private keys are.
const RESOLVER: [&str; 14] = [
    "/etc/resolv.conf",
    "/run/systemd/resolve",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/ssl/certs",
    "/etc/ssl/cert.pem",
    "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/certs",
    "/etc/pki/ca-trust/extracted",
    "/usr/share/ca-certificates",
    "/var/lib/ca-certificates",
];

/// What a service needs from its host. Unknown fields are those of a later version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Needs {
    /// TCP sockets that it listens on; they may be handed to it.
    pub sockets: Vec<Socket>,
    /// Files and folders that it reads. They need not exist.
    pub read: Vec<PathBuf>,
    /// Folders that it writes in. They need not exist.
    pub write: Vec<PathBuf>,
    /// TCP ports that it connects to.
    pub connect: Vec<u16>,
    /// TCP ports that it binds itself, beside `sockets`; 0 is one that the system picks.
    pub bind: Vec<u16>,
}

/// A socket that a service listens on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// Name by which the service finds it.
    pub name: String,
    /// As configured. Port 0 leaves the choice to whoever binds it.
    pub address: SocketAddr,
}

impl Needs {
    /// Listens on `address`.
    #[must_use]
    pub fn socket(mut self, name: &str, address: SocketAddr) -> Self {
        self.sockets.push(Socket {
            name: name.into(),
            address,
        });
        self
    }

    /// Connects to the port of a URL. A text that is none needs nothing: whoever uses it says what
    /// is wrong with it.
    #[must_use]
    pub fn url(mut self, text: &str) -> Self {
        let port = reqwest::Url::parse(text)
            .ok()
            .and_then(|url| url.port_or_known_default());
        self.connect.extend(port);
        self
    }

    /// Looks names up, and checks certificates.
    #[must_use]
    pub fn names(mut self) -> Self {
        self.connect.push(DNS);
        self.read.extend(RESOLVER.map(PathBuf::from));
        self
    }

    /// This and that, each thing once, in order.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.sockets.extend(other.sockets);
        self.read.extend(other.read);
        self.write.extend(other.write);
        self.connect.extend(other.connect);
        self.bind.extend(other.bind);
        self.sockets
            .sort_by(|a, b| (&a.name, a.address).cmp(&(&b.name, b.address)));
        self.sockets.dedup();
        for paths in [&mut self.read, &mut self.write] {
            paths.sort();
            paths.dedup();
        }
        for ports in [&mut self.connect, &mut self.bind] {
            ports.sort_unstable();
            ports.dedup();
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needs_add_up() {
        let listen = "127.0.0.1:7777".parse().unwrap();
        let one = Needs::default().socket("a", listen).url("https://x.y/z");
        let two = Needs::default()
            .url("http://127.0.0.1:4317")
            .url("nonsense");
        let both = one.clone().and(two).and(one);
        assert_eq!(both.sockets.len(), 1);
        assert_eq!(both.connect, [443, 4317]);
        let text = serde_json::to_string(&both).unwrap();
        assert_eq!(serde_json::from_str::<Needs>(&text).unwrap(), both);
        let later = serde_json::from_str::<Needs>(r#"{"gpus":["all"],"bind":[1]}"#).unwrap();
        assert_eq!(later.bind, [1]);
    }
}
