//! A client that makes deals by proposal (MK1.2), and what the chain says of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cid::Cid;
use lotus_actors::market::{
    ClientDealProposal, DealProposal, Label, PUBLISH_STORAGE_DEALS, PublishStorageDealsParams,
};
use lotus_actors::{PaddedPieceSize, actors, decode, encode};
use lotus_deals::mk12::wire::{self, DealParams, DealResponse, DealUuid, Transfer};
use lotus_e2e::history::Landed;
use lotus_e2e::sectors::{HEAD, MINER};
use lotus_e2e::{Failed, Net, NetConfig, secs};
use lotus_node_client::{Node, json};
use lotus_types::{Address, TokenAmount};
use rand::Rng as _;
use rand::rngs::StdRng;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use ulid::Ulid;

/// Bytes of the file in a CAR, which then makes a piece of 2 KiB.
const FILE_BYTES: usize = 1_800;
/// How long a proposal may take to be accepted under kills.
const ACCEPTED: Duration = secs(300);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(200);
/// Epochs from a proposal to the start of its deal, and those of its commitment.
const START: i64 = 20_000;
const DURATION: i64 = 530_000;
/// Longest head of a request for a file.
const MAX_HEAD: usize = 8 << 10;

/// The files of the deals, over HTTP, for the service to download. Bound before the net starts,
/// as the service is told the port.
pub(crate) struct Files {
    listener: TcpListener,
    port: u16,
}

impl Files {
    pub(crate) async fn bind() -> Result<Self, Failed> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        Ok(Self { listener, port })
    }

    /// Lets the service fetch from here, and publish what comes within a few seconds together.
    pub(crate) fn allow(&self, config: &mut NetConfig) {
        for (key, value) in [
            ("ALLOW_PRIVATE_SOURCES", "true"),
            ("PULL_PORTS", &format!("[{}]", self.port)),
            ("PULL_BACKOFF_SECS", "1"),
            ("MK12__PUBLISH_PERIOD_SECS", "3"),
        ] {
            let key = format!("LOTUS_MARKETS__DEALS__{key}");
            config.spoke_env.insert(key, value.into());
        }
    }

    /// Gives out the files of a folder until dropped.
    async fn serve(self, folder: PathBuf) {
        let mut open = JoinSet::new();
        loop {
            tokio::select! {
                Some(_) = open.join_next() => {}
                accepted = self.listener.accept() => {
                    // A service that dies may be gone by then.
                    if let Ok((stream, _)) = accepted {
                        open.spawn(give(stream, folder.clone()));
                    }
                }
            }
        }
    }
}

/// Answers one request. Whoever goes away is killed at that moment.
async fn give(mut stream: TcpStream, folder: PathBuf) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut buf = [0; 1024];
    while !head.ends_with(b"\r\n\r\n") {
        let n = stream.read(&mut buf).await?;
        if n == 0 || head.len() > MAX_HEAD {
            return Ok(());
        }
        head.extend_from_slice(&buf[..n]);
    }
    let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
    let name = head.split_whitespace().nth(1).unwrap_or_default();
    let bytes = tokio::fs::read(folder.join(name.trim_start_matches('/'))).await?;
    let from = head
        .split_once("range: bytes=")
        .and_then(|(_, range)| range.split_once('-')?.0.parse::<usize>().ok());
    let rest = bytes.get(from.unwrap_or(0)..).unwrap_or_default();
    let status = match from {
        Some(at) => format!(
            "206 Partial Content\r\ncontent-range: bytes {at}-{}/{}",
            bytes.len().saturating_sub(1),
            bytes.len()
        ),
        None => "200 OK".into(),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        rest.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(rest).await?;
    stream.shutdown().await
}

/// A client with a key in the node's wallet.
pub(crate) struct Proposer {
    node: Node,
    client: Address,
    folder: PathBuf,
    port: u16,
    http: reqwest::Client,
    /// The server of the files; ends when dropped.
    _server: JoinSet<()>,
}

impl Proposer {
    /// Makes a key that the chain knows. Deals cost nothing here, so that it needs no funds in the
    /// market.
    pub(crate) async fn new(net: &Net, files: Files) -> Result<Self, Failed> {
        let repo = net.root().join("devnet").display().to_string();
        let wallet = async |words: &[&str]| {
            let args = [&["--repo", &repo, "wallet"], words].concat();
            net.run("lotus-devnet", &args).await
        };
        let printed = wallet(&["new", "secp256k1"]).await?;
        let text = printed.lines().next_back().unwrap_or_default().trim();
        wallet(&["fund", text, "1"]).await?;
        let client = json::parse_address(text).map_err(|e| Failed::at("wallet new", e))?;
        let node = net.node()?;
        net.wait("the client's account", secs(60), async |_| {
            let funds = node.state_market_balance(client, HEAD).await;
            funds.ok().map(|_| ())
        })
        .await?;
        let folder = net.root().join("files");
        std::fs::create_dir(&folder)?;
        let port = files.port;
        let mut server = JoinSet::new();
        server.spawn(files.serve(folder.clone()));
        let http = lotus_runtime::http_client().timeout(secs(60)).build();
        Ok(Self {
            node,
            client,
            folder,
            port,
            http: http.map_err(|e| Failed::at("HTTP client", e))?,
            _server: server,
        })
    }

    /// Makes a deal for random bytes, the `n`-th. While the provider is down it is asked again
    /// with the same proposal. Returns the piece CID.
    pub(crate) async fn deal(
        &self,
        net: &Net,
        n: usize,
        random: &mut StdRng,
    ) -> Result<String, Failed> {
        let params = self.params(n, random).await?;
        let deadline = Instant::now() + ACCEPTED;
        loop {
            match self.store(net, &params).await {
                Ok(answer) if answer.accepted => break,
                Ok(answer) if !answer.message.starts_with("server error") => {
                    return Err(Failed(answer.message));
                }
                Ok(answer) if Instant::now() > deadline => return Err(Failed(answer.message)),
                Err(e) if Instant::now() > deadline => return Err(e),
                Ok(_) | Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
        let piece = params.client_deal_proposal.proposal.piece_cid;
        Ok(piece.to_string())
    }

    /// A signed proposal, with its file in its place.
    async fn params(&self, n: usize, random: &mut StdRng) -> Result<DealParams, Failed> {
        let mut bytes = vec![0; FILE_BYTES];
        random.fill(&mut bytes[..]);
        let file = self.folder.join(format!("{n}.bin"));
        std::fs::write(&file, bytes)?;
        let name = format!("{n}.car");
        let (root, size, piece) = pack(&file, &self.folder.join(&name))?;
        let head = self.node.chain_head().await;
        let start_epoch = head.map_err(|e| Failed::at("ChainHead", e))?.height.0 + START;
        let proposal = DealProposal {
            piece_cid: piece.cid.cid(),
            piece_size: PaddedPieceSize(piece.size.get()),
            verified_deal: false,
            client: self.client,
            provider: MINER.address(),
            label: Label::String(format!("chaos {n}")),
            start_epoch,
            end_epoch: start_epoch + DURATION,
            storage_price_per_epoch: TokenAmount::default(),
            provider_collateral: TokenAmount::default(),
            client_collateral: TokenAmount::default(),
        };
        let signature = self
            .node
            .wallet_sign(self.client, &encode(&proposal))
            .await
            .map_err(|e| Failed::at("WalletSign", e))?;
        let url = format!("http://127.0.0.1:{}/{name}", self.port);
        Ok(DealParams {
            deal_uuid: DealUuid::from(Ulid::generate()),
            transfer: Transfer {
                size,
                kind: "http".into(),
                params: serde_json::json!({ "URL": url }).to_string().into(),
                client_id: String::new(),
            },
            is_offline: false,
            deal_data_root: root,
            skip_ipni_announce: true,
            client_deal_proposal: ClientDealProposal {
                proposal,
                client_signature: signature,
            },
            remove_unsealed_copy: false,
        })
    }

    async fn store(&self, net: &Net, params: &DealParams) -> Result<DealResponse, Failed> {
        let url = format!("{}/market/mk12/store", net.spoke_url("deals")?);
        let failed = |e: reqwest::Error| Failed::at("store", e);
        let answer = self
            .http
            .post(url)
            .header("content-type", "application/cbor")
            .body(wire::encode(params))
            .send()
            .await
            .map_err(failed)?;
        let answer = answer.error_for_status().map_err(failed)?;
        let bytes = answer.bytes().await.map_err(failed)?;
        wire::decode(&bytes).map_err(|e| Failed::at("store", e))
    }
}

/// Packs a file. Returns its root, the bytes of the CAR, and its piece.
fn pack(file: &Path, car: &Path) -> Result<(Cid, u64, lotus_types::PieceInfo), Failed> {
    let root = lotus_car::pack_dir(file, car).map_err(|e| Failed::at("pack", e))?;
    let bytes = std::fs::read(car)?;
    let piece = lotus_proofs::commp(&bytes[..])?;
    Ok((root, bytes.len() as u64, piece))
}

/// What the chain says of the proposals.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Published {
    /// `PublishStorageDeals` on the chain.
    pub(crate) messages: usize,
    /// Of these, those that failed.
    pub(crate) failed: usize,
    /// Proposals that one of them put on the chain.
    pub(crate) deals: usize,
    /// Proposals that are in more than one of them, also where the chain refused the second.
    pub(crate) doubled: usize,
}

pub(crate) fn published(messages: &[Landed]) -> Result<Published, Failed> {
    let mut all = Published::default();
    // How often each is in a message, and in one that succeeded.
    let mut deals: BTreeMap<Vec<u8>, (usize, usize)> = BTreeMap::new();
    let publishes = messages.iter().filter(|m| {
        m.message.to == actors::MARKET.address() && m.message.method == PUBLISH_STORAGE_DEALS
    });
    for one in publishes {
        let params: PublishStorageDealsParams =
            decode(&one.message.params).map_err(|e| Failed::at("a message on the chain", e))?;
        let well = one.receipt.as_ref().is_some_and(|r| r.exit_code == 0);
        all.messages += 1;
        all.failed += usize::from(!well);
        for deal in &params.deals {
            let times = deals.entry(encode(&deal.proposal)).or_default();
            times.0 += 1;
            times.1 += usize::from(well);
        }
    }
    all.deals = deals.values().filter(|(_, well)| *well > 0).count();
    all.doubled = deals.values().filter(|(times, _)| *times > 1).count();
    Ok(all)
}

#[cfg(test)]
mod tests {
    use lotus_node_client::api::{Message, MessageReceipt, Signature};
    use lotus_types::Epoch;

    use super::*;

    fn landed(labels: &[&str], signature: u8, exit_code: i64) -> Landed {
        let deal = |label: &&str| ClientDealProposal {
            proposal: DealProposal {
                piece_cid: Cid::default(),
                piece_size: PaddedPieceSize(128),
                verified_deal: false,
                client: Address::new_id(1),
                provider: Address::new_id(2),
                label: Label::String((*label).into()),
                start_epoch: 1,
                end_epoch: 2,
                storage_price_per_epoch: TokenAmount::default(),
                provider_collateral: TokenAmount::default(),
                client_collateral: TokenAmount::default(),
            },
            client_signature: Signature::new_secp256k1(vec![signature; 65]),
        };
        let deals = labels.iter().map(deal).collect();
        Landed {
            cid: Cid::default(),
            height: Epoch(1),
            message: Message {
                version: 0,
                to: actors::MARKET.address(),
                from: Address::new_id(3),
                nonce: 0,
                value: TokenAmount::default(),
                gas_limit: 0,
                gas_fee_cap: TokenAmount::default(),
                gas_premium: TokenAmount::default(),
                method: PUBLISH_STORAGE_DEALS,
                params: encode(&PublishStorageDealsParams { deals }),
            },
            receipt: Some(MessageReceipt {
                exit_code,
                r#return: Vec::new(),
                gas_used: 0,
                events_root: None,
            }),
        }
    }

    #[test]
    fn a_proposal_counts_as_doubled_whatever_became_of_the_second() {
        let once = [landed(&["a", "b"], 1, 0), landed(&["c"], 1, 0)];
        let want = Published {
            messages: 2,
            failed: 0,
            deals: 3,
            doubled: 0,
        };
        assert_eq!(published(&once).unwrap(), want);
        let other = Landed {
            message: Message {
                method: 0,
                ..once[0].message.clone()
            },
            ..once[0].clone()
        };
        assert_eq!(published(&[&once[..], &[other]].concat()).unwrap(), want);
        // Refused by the chain, or with another signature.
        for again in [landed(&["b"], 1, 16), landed(&["b", "d"], 2, 0)] {
            let all = published(&[&once[..], &[again]].concat()).unwrap();
            assert_eq!((all.messages, all.doubled), (3, 1));
        }
    }
}
