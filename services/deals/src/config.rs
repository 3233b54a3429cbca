use std::net::SocketAddr;
use std::num::{NonZeroU8, NonZeroU16};
use std::time::Duration;

use lotus_runtime::{Needs, Network};
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
    /// Open connections; more wait.
    pub max_connections: NonZeroU16,
    /// Of those, connections of one client: an IPv4 address, or a /64 of IPv6; more are closed.
    pub max_connections_per_client: NonZeroU16,
    /// Load balancers and proxies before this service, such as `10.0.0.0/8`: they may have every
    /// connection.
    pub trusted_proxies: Vec<Network>,
    /// Seconds a client may take for the headers of a request, and as long for a body that is no
    /// piece.
    pub header_secs: u64,
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
    /// Ranges of one download that are fetched at the same time, where the server gives ranges.
    pub pull_ranges: NonZeroU16,
    /// Clients to accept, as addresses; empty accepts everyone.
    pub allowed_clients: Vec<String>,
    /// Clients to refuse, as addresses.
    pub denied_clients: Vec<String>,
    /// Take deals whose bytes are uploaded or downloaded.
    pub accept_online: bool,
    /// Take deals whose bytes the operator imports from a file.
    pub accept_offline: bool,
    /// Take deals with an allocation of verified data.
    pub accept_verified: bool,
    /// Take deals without one.
    pub accept_unverified: bool,
    /// Smallest piece that is taken, in bytes with padding.
    pub min_piece_bytes: u64,
    /// Largest piece that is taken, in bytes with padding; 0: what a sector holds.
    pub max_piece_bytes: u64,
    /// Bytes with padding of the open deals of one client; 0: no limit.
    pub max_open_bytes_per_client: u64,
    /// URL of a filter of your own, asked about each proposal that passed every other check; empty
    /// for none. docs/deals.md has the request, and how to use a command.
    pub filter_url: String,
    /// Seconds that the filter may take. Without its answer no deal is taken.
    pub filter_timeout_secs: u64,
    /// Smallest chunk of an upload in chunks, in bytes.
    pub min_chunk_bytes: u64,
    /// Largest one.
    pub max_chunk_bytes: u64,
    /// Chunks that may arrive at the same time.
    pub max_chunk_uploads: NonZeroU16,
    /// Uploads of pieces without a deal.
    pub pieces: PiecesConfig,
    /// Deals by proposal.
    pub mk12: Mk12Config,
}

/// `[deals.mk12]`: deals by proposal, market protocol 1.2 of Boost. They are published on chain
/// before they are sealed, which costs fees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mk12Config {
    /// Take them: over libp2p, and over HTTP at `/market/mk12`.
    pub enabled: bool,
    /// TCP address of the libp2p listener. Port 0 picks a free one; `run/deals-p2p.addr` has the
    /// multiaddress in use.
    pub listen: SocketAddr,
    /// libp2p connections at the same time.
    pub max_connections: u32,
    /// libp2p connections of one peer.
    pub max_connections_per_peer: u32,
    /// Least price, in attoFIL per GiB and epoch.
    pub price_attofil: String,
    /// Least price of verified data, in attoFIL per GiB and epoch.
    pub verified_price_attofil: String,
    /// Smallest piece, in padded bytes.
    pub min_piece_bytes: u64,
    /// Largest piece, in padded bytes; 0 for a whole sector.
    pub max_piece_bytes: u64,
    /// The provider's collateral may be this many times the least that the chain asks for.
    pub max_collateral_multiplier: u32,
    /// Most deals of one message.
    pub max_deals_per_publish: NonZeroU8,
    /// Seconds after its acceptance at which a deal whose bytes are here is published, even if
    /// fewer wait than fit one message.
    pub publish_period_secs: u64,
    /// Multiaddresses of the retrieval gateway, as clients are told them: `/dns/NAME/tcp/443/https`.
    pub retrieval_addresses: Vec<String>,
}

impl Default for Mk12Config {
    fn default() -> Self {
        Self {
            enabled: true,
            listen: ([127, 0, 0, 1], 7781).into(),
            max_connections: 256,
            max_connections_per_peer: 4,
            price_attofil: "0".into(),
            verified_price_attofil: "0".into(),
            // Boost, storagemarket/storedask, DefaultMinPieceSize.
            min_piece_bytes: 256,
            max_piece_bytes: 0,
            // Boost, node/config/def.go, MaxProviderCollateralMultiplier.
            max_collateral_multiplier: 2,
            // Boost, node/config/def.go, MaxDealsPerPublishMsg and PublishMsgPeriod.
            max_deals_per_publish: NonZeroU8::new(8).expect("8 is not zero"),
            publish_period_secs: 3_600,
            retrieval_addresses: Vec::new(),
        }
    }
}

/// `[deals.pieces]`: pieces that are uploaded at `/pdp/piece`, by whoever comes, before there is a
/// deal for them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PiecesConfig {
    /// Take them.
    pub enabled: bool,
    /// Bytes that all of them may take.
    pub max_bytes: u64,
    /// Bytes that those of one client, known by its address, may take.
    pub max_bytes_per_client: u64,
    /// Seconds that one is kept.
    pub ttl_secs: u64,
}

impl Default for PiecesConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            max_bytes: 32 << 30,
            max_bytes_per_client: 4 << 30,
            ttl_secs: 6 * 3600,
        }
    }
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
            max_connections: limit(1024),
            max_connections_per_client: limit(128),
            trusted_proxies: Vec::new(),
            header_secs: 10,
            max_open_deals_per_client: 1_000,
            upload_ttl_secs: 24 * 3600,
            transfer_idle_secs: 60,
            max_pull_attempts: 15,
            pull_backoff_secs: 5,
            min_start_delay_epochs: 0,
            default_start_delay_epochs: 5_760,
            allow_private_sources: false,
            pull_ports: vec![80, 443],
            pull_ranges: limit(5),
            allowed_clients: Vec::new(),
            mk12: Mk12Config::default(),
            denied_clients: Vec::new(),
            accept_online: true,
            accept_offline: true,
            accept_verified: true,
            accept_unverified: true,
            min_piece_bytes: 0,
            max_piece_bytes: 0,
            max_open_bytes_per_client: 0,
            filter_url: String::new(),
            filter_timeout_secs: 10,
            min_chunk_bytes: 16 << 20,
            max_chunk_bytes: 256 << 20,
            max_chunk_uploads: limit(64),
            pieces: PiecesConfig::default(),
        }
    }
}

impl DealsConfig {
    /// What the service needs beside its folder and the hub.
    #[must_use]
    pub fn needs(&self) -> Needs {
        let mut needs = Needs::default().socket("deals", self.listen).names();
        needs.connect.extend(&self.pull_ports);
        // The library binds its socket itself, so nobody can hand one over.
        if self.mk12.enabled {
            needs.bind.push(self.mk12.listen.port());
        }
        needs.url(&self.filter_url)
    }

    /// Time for the headers of a request, and for a body that is no piece: with none at all nobody
    /// could ask.
    pub(crate) fn header_patience(&self) -> Duration {
        Duration::from_secs(self.header_secs.max(1))
    }
}

/// A limit of a default configuration.
const fn limit(n: u16) -> NonZeroU16 {
    NonZeroU16::new(n).expect("no limit is zero")
}
