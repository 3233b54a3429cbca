//! Small deals with a piece each, and where the hub put their pieces.

use std::collections::BTreeMap;
use std::time::Instant;

use lotus_e2e::{Failed, Net, NetConfig, secs};
use rand::Rng as _;
use rand::rngs::StdRng;
use serde::Deserialize;

/// Fills a 2 KiB sector, so that each piece has a sector of its own.
const PIECE_BYTES: usize = 2_000;

/// A sector of `lotus-miner sectors list --json` or `sectors status --log --json`.
#[derive(Debug, Deserialize)]
pub(crate) struct Sector {
    pub(crate) number: u64,
    pub(crate) state: String,
    pub(crate) pieces: Vec<Piece>,
    #[serde(default)]
    pub(crate) log: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Piece {
    pub(crate) piece_cid: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Entry {
    pub(crate) unix_ms: u64,
    pub(crate) event: String,
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) message: String,
}

/// Sectors of 2 KiB, short epochs, a deal service.
pub(crate) fn config() -> NetConfig {
    let mut cfg = NetConfig {
        devnet_args: "--listen 127.0.0.1:0 --sector-size 2KiB --block-time-ms 500 --deadlines 8 \
                      --deadline-epochs 12 --winning-lookback 10"
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
        services: vec!["deals".into()],
        ..NetConfig::default()
    };
    // A retry after a minute is right for 30-second epochs, not for these.
    let retry = "LOTUS_MINER__SEALING__RETRY_FIRST_SECS";
    cfg.hub_env.insert(retry.into(), "1".into());
    // Nor are 900 epochs with the old replica after an upgrade: reorgs here are short.
    let finality = "LOTUS_MINER__SEALING__FINALITY_EPOCHS";
    cfg.hub_env.insert(finality.into(), "30".into());
    cfg
}

/// Makes a deal for random bytes, the `n`-th. While the provider is down it is asked again with
/// the same deal id. Returns the piece CID.
pub(crate) async fn deal(net: &Net, n: usize, random: &mut StdRng) -> Result<String, Failed> {
    let mut bytes = vec![0; PIECE_BYTES];
    random.fill(&mut bytes[..]);
    let file = net.root().join(format!("piece-{n}"));
    std::fs::write(&file, bytes)?;
    let file = file.display().to_string();
    let key = net.root().join("client.key").display().to_string();
    let id = ulid::Ulid::generate().to_string();
    let deadline = Instant::now() + secs(300);
    loop {
        let url = net.spoke_url("deals")?;
        let args = [
            "client",
            "deal",
            "--provider-url",
            &url,
            "--format",
            "raw",
            "--car",
            &file,
            "--key",
            &key,
            "--deal-id",
            &id,
            "--json",
        ];
        match net.run("lotus-markets", &args).await {
            Ok(out) => {
                let deal: serde_json::Value =
                    serde_json::from_str(&out).map_err(|e| Failed::at("client deal", e))?;
                let cid = deal["piece_cid"].as_str();
                return cid
                    .map(str::to_owned)
                    .ok_or_else(|| Failed(format!("no piece_cid in {deal}")));
            }
            Err(e) if Instant::now() > deadline => return Err(e),
            Err(_) => net.ready(secs(120)).await?,
        }
    }
}

/// How many proven sectors hold each piece.
pub(crate) fn proven(sectors: &[Sector]) -> BTreeMap<String, usize> {
    let mut places = BTreeMap::new();
    for sector in sectors.iter().filter(|s| s.state == "Proving") {
        for piece in &sector.pieces {
            *places.entry(piece.piece_cid.clone()).or_default() += 1;
        }
    }
    places
}

/// Every sector, without its log.
pub(crate) async fn sectors(net: &Net) -> Result<Vec<Sector>, Failed> {
    let repo = net.root().join("miner").display().to_string();
    let args = ["sectors", "list", "--json", "--repo", &repo];
    let out = net.run("lotus-miner", &args).await?;
    serde_json::from_str(&out).map_err(|e| Failed::at("sectors list", e))
}

/// One sector with its log.
pub(crate) async fn status(net: &Net, number: u64) -> Result<Sector, Failed> {
    let repo = net.root().join("miner").display().to_string();
    let number = number.to_string();
    let args = [
        "sectors", "status", &number, "--log", "--json", "--repo", &repo,
    ];
    let out = net.run("lotus-miner", &args).await?;
    serde_json::from_str(&out).map_err(|e| Failed::at("sectors status", e))
}
