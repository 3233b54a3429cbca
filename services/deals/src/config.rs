use std::net::SocketAddr;
use std::num::NonZeroU16;

use lotus_runtime::Needs;
use serde::{Deserialize, Serialize};

/// `[deals]` in config.toml.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DealsConfig {
    /// Address of the public HTTP intake. Port 0 picks a free port, and keeps it over restarts as
    /// long as it stays free.
    pub listen: SocketAddr,
    /// Seconds that a stopping service may spend finishing open requests.
    pub drain_secs: u64,
    /// Largest proposal body, in bytes.
    pub max_proposal_bytes: usize,
    /// Uploads and downloads that may run at the same time; more are told to come back.
    pub max_transfers: NonZeroU16,
    /// Other requests that may run at the same time.
    pub max_requests: NonZeroU16,
    /// Requests per second from one address, with bursts of twice as many.
    pub requests_per_second: u32,
    /// Open deals (not sealed, not failed) of one client.
    pub max_open_deals_per_client: usize,
    /// Seconds a deal waits for its bytes before it expires.
    pub upload_ttl_secs: u64,
    /// Seconds without a byte after which a transfer is broken off.
    pub transfer_idle_secs: u64,
    /// Attempts of one download before the deal fails.
    pub max_pull_attempts: u32,
    /// Seconds before the second attempt of a download; doubles up to 100 times as much.
    pub pull_backoff_secs: u64,
    /// Epochs between now and the earliest start epoch that is accepted.
    pub min_start_delay_epochs: i64,
    /// Epochs between now and the start epoch of a deal that names none. 2,880 epochs are a day
    /// on mainnet.
    pub default_start_delay_epochs: i64,
    /// Fetch from loopback, private and link-local addresses too. Leave it off on a public
    /// service: clients choose the addresses.
    pub allow_private_sources: bool,
    /// TCP ports that deals are fetched from; a deal whose URL has another one is refused. A
    /// sandboxed service cannot connect to any other.
    pub pull_ports: Vec<u16>,
    /// Clients to accept, as addresses; empty accepts everyone.
    pub allowed_clients: Vec<String>,
}

impl Default for DealsConfig {
    fn default() -> Self {
        Self {
            listen: ([127, 0, 0, 1], 7780).into(),
            drain_secs: 20,
            max_proposal_bytes: 256 << 10,
            max_transfers: limit(16),
            max_requests: limit(128),
            requests_per_second: 50,
            max_open_deals_per_client: 1_000,
            upload_ttl_secs: 24 * 3600,
            transfer_idle_secs: 60,
            max_pull_attempts: 15,
            pull_backoff_secs: 5,
            min_start_delay_epochs: 0,
            default_start_delay_epochs: 5_760,
            allow_private_sources: false,
            pull_ports: vec![80, 443],
            allowed_clients: Vec::new(),
        }
    }
}

impl DealsConfig {
    /// What the service needs beside its folder and the hub.
    #[must_use]
    pub fn needs(&self) -> Needs {
        let mut needs = Needs::default().socket("deals", self.listen).names();
        needs.connect.extend(&self.pull_ports);
        needs
    }
}

/// A limit of a default configuration.
const fn limit(n: u16) -> NonZeroU16 {
    NonZeroU16::new(n).expect("no limit is zero")
}
