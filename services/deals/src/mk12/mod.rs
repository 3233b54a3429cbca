//! Market protocol 1.2 (Boost): proposals, status, ask and transports, over libp2p and over HTTP.
//! One handler ([`Engine::mk12_deal`] and its sisters) is under both.
//!
//! What such a deal has beyond others: it is published by `PublishStorageDeals` before it is
//! sealed ([`publish`]), and the market actor is told its id when the sector is proven.

pub(crate) mod ask;
pub(crate) mod check;
mod handler;
pub(crate) mod http;
pub(crate) mod net;
pub(crate) mod publish;
pub(crate) mod transfer;
pub mod wire;

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, OnceLock};

use lotus_p2p::{Keypair, Multiaddr};
use lotus_runtime::Fault;
use lotus_types::{DealKey, Kind, PaddedSize, SectorSize, TokenAmount};
use tokio::sync::Notify;

use crate::config::Mk12Config;
use check::Terms;
use wire::{SignedStorageAsk, Transport, TransportsResponse};

/// Deals by UUID: unlike elsewhere it is not the client's alone.
pub(crate) const BY_UUID: lotus_journal::Map<String, DealKey> =
    lotus_journal::Map::new("deals.mk12_uuids");
/// Deals by the CID of their proposal, without its signature: the market takes each once.
pub(crate) const BY_PROPOSAL: lotus_journal::Map<String, DealKey> =
    lotus_journal::Map::new("deals.mk12_proposals");

/// What the engine keeps for MK1.2.
#[derive(Debug)]
pub(crate) struct Mk12 {
    price: TokenAmount,
    verified_price: TokenAmount,
    min_piece_size: PaddedSize,
    max_piece_size: Option<PaddedSize>,
    transports: TransportsResponse,
    /// The ask that was signed last.
    signed_ask: Mutex<Option<SignedStorageAsk>>,
    /// Of this provider as a peer, once it is one.
    pub(crate) key: OnceLock<Keypair>,
    /// Held while a deal's names are looked up and taken.
    accepting: tokio::sync::Mutex<()>,
    /// Told when a deal may be ready to be published.
    pub(crate) ready: Notify,
    /// The operator wants everything published that waits.
    now: AtomicBool,
}

impl Mk12 {
    /// Checks the settings.
    pub(crate) fn new(cfg: &Mk12Config) -> Result<Self, Fault> {
        let wrong = |key: &str, why: String, fix: &str| {
            Fault::new(Kind::Config, format!("deals.mk12.{key}: {why}"), fix)
        };
        let atto = |key: &str, text: &str| {
            let parsed = text.parse::<u128>();
            parsed.map(TokenAmount::from_atto).map_err(|_| {
                let why = format!("{text:?} is no amount");
                wrong(key, why, "give attoFIL per GiB and epoch as a whole number")
            })
        };
        let size = |key: &str, bytes: u64| {
            PaddedSize::new(bytes)
                .map_err(|e| wrong(key, e.to_string(), "give a power of two, at least 128"))
        };
        let addresses: Vec<_> = cfg
            .retrieval_addresses
            .iter()
            .map(|text| {
                let parsed = text.parse::<Multiaddr>();
                parsed
                    .map(|a| serde_bytes::ByteBuf::from(a.to_vec()))
                    .map_err(|e| {
                        let why = format!("{text:?} is no multiaddress: {e}");
                        wrong(
                            "retrieval_addresses",
                            why,
                            "write such as /dns/sp.example/tcp/443/https",
                        )
                    })
            })
            .collect::<Result<_, _>>()?;
        let http = (!addresses.is_empty()).then(|| Transport {
            name: "http".into(),
            addresses,
        });
        Ok(Self {
            price: atto("price_attofil", &cfg.price_attofil)?,
            verified_price: atto("verified_price_attofil", &cfg.verified_price_attofil)?,
            min_piece_size: size("min_piece_bytes", cfg.min_piece_bytes)?,
            max_piece_size: match cfg.max_piece_bytes {
                0 => None,
                bytes => Some(size("max_piece_bytes", bytes)?),
            },
            transports: TransportsResponse {
                protocols: http.into_iter().collect(),
            },
            signed_ask: Mutex::default(),
            key: OnceLock::new(),
            accepting: tokio::sync::Mutex::default(),
            ready: Notify::new(),
            now: AtomicBool::new(false),
        })
    }

    /// The provider's terms.
    pub(crate) fn terms(&self, sector: SectorSize) -> Terms {
        let whole = sector.padded();
        Terms {
            price: self.price.clone(),
            verified_price: self.verified_price.clone(),
            min_piece_size: self.min_piece_size,
            max_piece_size: self.max_piece_size.map_or(whole, |m| m.min(whole)),
        }
    }
}
