use std::net::SocketAddr;
use std::num::NonZeroU16;

use lotus_runtime::Needs;
use serde::{Deserialize, Serialize};

/// `[indexing]` in config.toml.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IndexingConfig {
    /// HTTP address of lookups and of the advertisement chain. Port 0 picks a free port.
    pub listen: SocketAddr,
    /// Where the advertised content is served: `http://host:port`, or a multiaddr such as
    /// `/dns4/sp.example/tcp/443/https`. Indexers hand it to clients, so it must be reachable
    /// for them.
    pub retrieval_url: String,
    /// Where indexers fetch the advertisement chain, in the same form. Empty: the listen address.
    pub publisher_url: String,
    /// Indexers that are told of every new advertisement, such as
    /// `https://cid.contact/announce`. Empty: none are.
    pub announce_urls: Vec<String>,
    /// Other providers of everything that is advertised here, such as a cache in front of
    /// retrieval: `name=http://host:port` each, or a multiaddr behind the `=`. Each has a key of its
    /// own, `indexing/NAME.key` in the repo, made on first use.
    pub extended_providers: Vec<String>,
    /// Requests served at once; more are answered 429.
    pub max_requests: NonZeroU16,
    /// Open connections; more wait.
    pub max_connections: NonZeroU16,
    /// Seconds a client may take for the headers of a request.
    pub header_secs: u64,
    /// Seconds after which a client that takes nothing is dropped.
    pub stall_secs: u64,
    /// Seconds a stopping service may spend finishing open requests.
    pub drain_secs: u64,
}

impl Default for IndexingConfig {
    fn default() -> Self {
        Self {
            listen: ([127, 0, 0, 1], 7778).into(),
            retrieval_url: "http://127.0.0.1:7777".into(),
            publisher_url: String::new(),
            announce_urls: Vec::new(),
            extended_providers: Vec::new(),
            max_requests: limit(256),
            max_connections: limit(1024),
            header_secs: 10,
            stall_secs: 30,
            drain_secs: 10,
        }
    }
}

impl IndexingConfig {
    /// What the service needs beside its folder and the hub.
    #[must_use]
    pub fn needs(&self) -> Needs {
        let needs = Needs::default().socket("indexing", self.listen);
        if self.announce_urls.is_empty() {
            return needs;
        }
        let urls = self.announce_urls.iter();
        urls.fold(needs.names(), |needs, url| needs.url(url))
    }
}

/// A limit of a default configuration.
const fn limit(n: u16) -> NonZeroU16 {
    NonZeroU16::new(n).expect("no limit is zero")
}
