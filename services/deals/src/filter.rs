//! What this provider takes: lists of clients, the operator's rules, limits of a client, and last
//! a filter of the operator's own, which is asked over HTTP. A sandboxed service starts no
//! programs, so a command is run by `lotus-markets storage-deals filter`, outside of it.

use std::time::Duration;

use hub_proto::HubError;
use hub_proto::v1::AllocationRequest;
use lotus_runtime::Fault;
use lotus_types::{Address, Kind};
use serde::{Deserialize, Serialize};

use crate::DealsConfig;
use crate::engine::{Engine, Place, hub_refusal};
use crate::mk20::{self, Code, Refusal};
use crate::validate::{self, Proposal, Rules, Source};

/// Bytes of a filter's answer that are read: the reason of a refusal.
const MAX_ANSWER: usize = 4_096;
/// Characters of it that the client gets.
const MAX_REASON: usize = 500;

/// Who may make deals.
#[derive(Debug, Default)]
pub(crate) struct Lists {
    allowed: Vec<Address>,
    denied: Vec<Address>,
}

impl Lists {
    pub(crate) fn new(cfg: &DealsConfig) -> Result<Self, Fault> {
        let read = |name: &str, list: &[String]| {
            let parsed = list.iter().map(|text| {
                mk20::parse_address(text).ok_or_else(|| {
                    Fault::new(
                        Kind::Config,
                        format!("{text:?} in deals.{name} is no address"),
                        "list addresses such as t1…",
                    )
                })
            });
            parsed.collect::<Result<_, _>>()
        };
        Ok(Self {
            allowed: read("allowed_clients", &cfg.allowed_clients)?,
            denied: read("denied_clients", &cfg.denied_clients)?,
        })
    }

    pub(crate) fn admit(&self, client: &Address) -> Result<(), Refusal> {
        let out = self.denied.contains(client)
            || !self.allowed.is_empty() && !self.allowed.contains(client);
        if !out {
            return Ok(());
        }
        let who = mk20::address_text(client);
        Err(Refusal::new(
            Code::Unauthorized,
            format!("{who} is not among this provider's clients"),
            "ask the provider to accept you",
        )
        .at("client"))
    }
}

/// The operator's rules that need nothing but the proposal.
pub(crate) fn takes(p: &Proposal, cfg: &DealsConfig) -> Result<(), Refusal> {
    let no =
        |code, field: &str, error: String, fix: &str| Err(Refusal::new(code, error, fix).at(field));
    if !cfg.accept_online && !cfg.accept_offline {
        let error = "this provider takes no deals now".to_owned();
        return no(
            Code::MarketDisabled,
            "",
            error,
            "try again later, or ask another provider",
        );
    }
    let offline = p.source == Source::Offline;
    if offline && !cfg.accept_offline || !offline && !cfg.accept_online {
        let (is, other) = if offline {
            ("offline", "online")
        } else {
            ("online", "offline")
        };
        return no(
            Code::UnsupportedSource,
            "data",
            format!("this provider takes no {is} deals"),
            &format!("propose an {other} deal"),
        );
    }
    let verified = p.allocation.is_some();
    if verified && !cfg.accept_verified || !verified && !cfg.accept_unverified {
        let word = if verified { "with" } else { "without" };
        return no(
            Code::Rejected,
            "products.ddo_v1.allocation_id",
            format!("this provider takes no deals {word} an allocation"),
            "ask another provider",
        );
    }
    let size = p.piece.size.get();
    let largest = if cfg.max_piece_bytes == 0 {
        u64::MAX
    } else {
        cfg.max_piece_bytes
    };
    if size < cfg.min_piece_bytes || size > largest {
        return no(
            Code::Rejected,
            "data.piece_cid",
            format!("the piece takes {size} bytes"),
            &match cfg.max_piece_bytes {
                0 => format!(
                    "this provider takes pieces from {} bytes on",
                    cfg.min_piece_bytes
                ),
                most => format!(
                    "this provider takes {} to {most} bytes",
                    cfg.min_piece_bytes
                ),
            },
        );
    }
    Ok(())
}

/// What the operator's filter is asked, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// ULID.
    pub id: String,
    /// Address of the client.
    pub client: String,
    /// Piece CID, version 1.
    pub piece_cid: String,
    /// Piece CID, version 2.
    pub piece_cid_v2: String,
    /// Bytes with padding.
    pub piece_size: u64,
    /// Bytes without padding.
    pub raw_size: u64,
    /// `car` or `raw`.
    pub format: String,
    /// `put`, `http` or `offline`.
    pub source: String,
    /// First epoch at which the piece must be proven.
    pub start_epoch: i64,
    /// Last epoch of the commitment.
    pub end_epoch: i64,
    /// Allocation of verified data.
    pub allocation_id: Option<u64>,
    /// Whether its blocks are indexed.
    pub index: bool,
    /// Whether its blocks are advertised.
    pub announce_payload: bool,
    /// Whether the piece is advertised.
    pub announce_piece: bool,
    /// Open deals of the client.
    pub client_open_deals: u64,
    /// Their bytes with padding.
    pub client_open_bytes: u64,
    /// Chain height.
    pub height: i64,
}

impl Question {
    fn new(p: &Proposal, (deals, bytes): (usize, u64), height: i64) -> Self {
        Self {
            id: p.key.id.to_string(),
            client: p.key.client.clone(),
            piece_cid: p.piece.cid.to_string(),
            piece_cid_v2: p.piece.cid_v2().to_string(),
            piece_size: p.piece.size.get(),
            raw_size: p.piece.raw_size,
            format: p.format.as_str().into(),
            source: p.source.name().into(),
            start_epoch: p.start_epoch.0,
            end_epoch: p.end_epoch.0,
            allocation_id: p.allocation.map(|(_, id)| id),
            index: p.retrieval.index,
            announce_payload: p.retrieval.announce_payload,
            announce_piece: p.retrieval.announce_piece,
            client_open_deals: deals as u64,
            client_open_bytes: bytes,
            height,
        }
    }
}

/// Asks the operator's filter.
#[derive(Debug)]
pub(crate) struct Filter {
    url: Option<reqwest::Url>,
    http: reqwest::Client,
}

impl Filter {
    pub(crate) fn new(cfg: &DealsConfig) -> Result<Self, Fault> {
        let bad = |why: String| {
            Fault::new(
                Kind::Config,
                format!("deals.filter_url: {why}"),
                "give a URL such as http://127.0.0.1:7790/",
            )
        };
        let url = match cfg.filter_url.as_str() {
            "" => None,
            text => {
                let url = reqwest::Url::parse(text).map_err(|e| bad(e.to_string()))?;
                if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
                    return Err(bad(format!("{text:?} is not for http")));
                }
                Some(url)
            }
        };
        let http = lotus_runtime::http_client()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(Duration::from_secs(cfg.filter_timeout_secs.max(1)))
            .build()
            .map_err(|e| bad(e.to_string()))?;
        Ok(Self { url, http })
    }

    /// Success takes the deal, a status from 400 to 499 refuses it, and the text of the answer is
    /// the reason. Anything else is no answer.
    async fn ask(&self, question: &Question) -> Result<(), Refusal> {
        let Some(url) = &self.url else { return Ok(()) };
        let silent = |why: String| {
            tracing::error!(why, "the deal filter does not answer");
            Refusal::new(
                Code::Unavailable,
                "the provider's deal filter does not answer",
                "try again later",
            )
            .retry_after(60)
        };
        let asked = self.http.post(url.clone()).json(question).send().await;
        let mut answer = asked.map_err(|e| silent(e.to_string()))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        if !status.is_client_error() {
            return Err(silent(format!("it answers with {status}")));
        }
        let mut text = Vec::new();
        while text.len() < MAX_ANSWER
            && let Ok(Some(part)) = answer.chunk().await
        {
            text.extend_from_slice(&part);
        }
        let text = String::from_utf8_lossy(&text);
        let printable = text.trim().chars().filter(|c| !c.is_control());
        let why: String = printable.take(MAX_REASON).collect();
        let why = if why.is_empty() {
            "it gives no reason".into()
        } else {
            why
        };
        Err(Refusal::new(
            Code::Rejected,
            format!("the provider's filter refuses the deal: {why}"),
            "ask the provider which deals it takes",
        ))
    }
}

impl Engine {
    /// The checks that come after those of the proposal itself: the operator's rules, the client's
    /// limits, the allocation, and last the operator's filter. The deal has its place among those
    /// of its client as long as the answer is kept.
    pub(crate) async fn admit(
        &self,
        proposal: &mut Proposal,
        rules: &Rules<'_>,
    ) -> Result<Place, Refusal> {
        takes(proposal, &self.cfg)?;
        let size = proposal.piece.size.get();
        let (place, own) = self.place(&proposal.key, size, |own| self.within_limits(own, size))?;
        if let Some((_, id)) = proposal.allocation {
            let request = AllocationRequest {
                client: proposal.key.client.clone(),
                id,
            };
            let mut chain = self.hub.chain();
            let asked = chain.allocation(self.hub.request(request)).await;
            let found = match asked.map_err(HubError::from) {
                Ok(a) => Some(a.into_inner()),
                Err(e) if e.is_not_found() => None,
                Err(e) => return Err(hub_refusal(&e)),
            };
            validate::check_allocation(proposal, found.as_ref(), rules)?;
            self.reserve(&proposal.key, proposal.allocation)?;
        }
        let question = Question::new(proposal, own, rules.height.0);
        self.filter.ask(&question).await?;
        Ok(place)
    }

    fn within_limits(&self, (deals, bytes): (usize, u64), more: u64) -> Result<(), Refusal> {
        let later = |error: String| {
            Err(Refusal::new(
                Code::Overloaded,
                error,
                "wait until some of them are sealed",
            )
            .retry_after(600))
        };
        if deals >= self.cfg.max_open_deals_per_client {
            return later(format!("{deals} deals of this client are open"));
        }
        let most = self.cfg.max_open_bytes_per_client;
        if most > 0 && bytes.saturating_add(more) > most {
            return later(format!(
                "open deals of this client have {bytes} bytes, and may have {most}"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use lotus_types::{Commitment, DealKey, Epoch, PaddedSize, PieceCid, PieceInfo};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use ulid::Ulid;

    use super::*;
    use crate::validate::{Format, Retrieval};

    fn proposal() -> Proposal {
        Proposal {
            key: DealKey {
                client: "t1abc".into(),
                id: Ulid::from(1u128),
            },
            piece: PieceInfo {
                cid: PieceCid::new(Commitment([1; 32])),
                size: PaddedSize::new(1024).unwrap(),
                raw_size: 1000,
            },
            format: Format::Raw,
            source: Source::Put,
            start_epoch: Epoch(10),
            end_epoch: Epoch(20),
            allocation: None,
            notify: None,
            signed: None,
            retrieval: Retrieval {
                index: false,
                announce_payload: false,
                announce_piece: false,
            },
            digest: [0; 32],
        }
    }

    #[test]
    fn each_rule_has_its_own_refusal() {
        type Rule = fn(&mut DealsConfig, &mut Proposal);
        let table: [(u16, &str, Rule); 8] = [
            (440, "no deals now", |c, _| {
                (c.accept_online, c.accept_offline) = (false, false)
            }),
            (422, "no online", |c, _| c.accept_online = false),
            (422, "no offline", |c, p| {
                c.accept_offline = false;
                p.source = Source::Offline;
            }),
            (426, "without an allocation", |c, _| {
                c.accept_unverified = false
            }),
            (426, "with an allocation", |c, p| {
                c.accept_verified = false;
                p.allocation = Some((0, 5));
            }),
            (426, "1024 bytes", |c, _| c.min_piece_bytes = 2048),
            (426, "1024 bytes", |c, _| c.max_piece_bytes = 512),
            (0, "", |c, _| {
                (c.min_piece_bytes, c.max_piece_bytes) = (1024, 1024)
            }),
        ];
        for (code, words, change) in table {
            let (mut cfg, mut p) = (DealsConfig::default(), proposal());
            change(&mut cfg, &mut p);
            match takes(&p, &cfg) {
                Ok(()) => assert_eq!(code, 0, "{words}"),
                Err(e) => {
                    assert_eq!(e.code, code, "{e:?}");
                    assert!(e.error.contains(words) && !e.fix.is_empty(), "{e:?}");
                }
            }
        }
    }

    #[test]
    fn lists_name_clients() {
        let text = |seed| mk20::address_text(&Address::new_bls(&[seed; 48]).unwrap());
        let (one, other) = (&text(1)[..], &text(2)[..]);
        let admits = |allowed: &[&str], denied: &[&str]| {
            let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
            let cfg = DealsConfig {
                allowed_clients: own(allowed),
                denied_clients: own(denied),
                ..DealsConfig::default()
            };
            let lists = Lists::new(&cfg).unwrap();
            lists.admit(&mk20::parse_address(one).unwrap()).is_ok()
        };
        assert!(admits(&[], &[]) && admits(&[one], &[]) && admits(&[other, one], &[other]));
        assert!(!admits(&[other], &[]) && !admits(&[], &[one]) && !admits(&[one], &[one]));
        let cfg = DealsConfig {
            denied_clients: vec!["nobody".into()],
            ..DealsConfig::default()
        };
        assert_eq!(Lists::new(&cfg).unwrap_err().kind, Kind::Config);
    }

    /// Asks a filter that answers with these bytes; `None` hangs.
    async fn ask(answer: Option<&'static str>) -> Result<(), Refusal> {
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cfg = DealsConfig {
            filter_url: format!("http://{}/", server.local_addr().unwrap()),
            filter_timeout_secs: 1,
            ..DealsConfig::default()
        };
        let question = Question::new(&proposal(), (3, 4096), 7);
        let wanted = serde_json::to_vec(&question).unwrap();
        let serve = async {
            let (mut s, _) = server.accept().await.unwrap();
            let mut got = Vec::new();
            while !got.ends_with(&wanted) {
                assert!(s.read_buf(&mut got).await.unwrap() > 0);
            }
            match answer {
                Some(text) => {
                    s.write_all(text.as_bytes()).await.unwrap();
                    s.shutdown().await.unwrap();
                }
                None => std::future::pending().await,
            }
        };
        let filter = Filter::new(&cfg).unwrap();
        let mut serve = std::pin::pin!(serve);
        let mut asking = std::pin::pin!(filter.ask(&question));
        tokio::select! {
            out = &mut asking => out,
            () = &mut serve => asking.await,
        }
    }

    #[tokio::test]
    async fn a_filter_decides_and_its_silence_takes_nothing() {
        assert_eq!(ask(Some("HTTP/1.1 204 No\r\n\r\n")).await, Ok(()));
        let no = "HTTP/1.1 403 No\r\nconnection: close\r\n\r\nnot\n on\x07 Sundays";
        let e = ask(Some(no)).await.unwrap_err();
        assert_eq!(e.code, 426);
        assert!(e.error.ends_with("not on Sundays"), "{e:?}");
        for answer in [
            Some("HTTP/1.1 500 Oops\r\n\r\n"),
            Some("nonsense\r\n\r\n"),
            None,
        ] {
            let e = ask(answer).await.unwrap_err();
            assert_eq!((e.code, e.retry_after_secs), (503, 60), "{answer:?}");
        }
        let cfg = DealsConfig {
            filter_url: "ftp://x".into(),
            ..DealsConfig::default()
        };
        assert!(Filter::new(&cfg).is_err());
    }
}
