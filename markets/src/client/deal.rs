use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;

use clap::ValueEnum;
use lotus_car::CarReader;
use lotus_deals::mk20::{
    self, CidText, DataSource, DdoV1, HttpUrl, PieceFormat, Products, RetrievalV1, SourceHttp,
};
use lotus_deals::validate::MIN_DURATION;
use lotus_types::PieceInfo;
use serde_json::json;
use ulid::Ulid;

use super::files::{blocking, piece_json, piece_of};
use super::market::Market;
use super::{ClientError, Who};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Via {
    /// The client uploads.
    Put,
    /// The provider downloads from --url.
    Url,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A CAR: the provider checks and indexes its blocks.
    Car,
    /// Any bytes.
    Raw,
}

/// `client deal`.
#[derive(Debug, clap::Args)]
pub(crate) struct Deal {
    #[command(flatten)]
    who: Who,
    /// File to store.
    #[arg(long)]
    car: PathBuf,
    /// What the file is.
    #[arg(long, value_enum, default_value_t = Format::Car)]
    format: Format,
    /// How the bytes get to the provider.
    #[arg(long, value_enum, default_value_t = Via::Put)]
    source: Via,
    /// Where the provider downloads the file; may be given several times.
    #[arg(long, required_if_eq("source", "url"))]
    url: Vec<String>,
    /// Actor id of the provider [default: what the service says].
    #[arg(long)]
    provider: Option<String>,
    /// First epoch at which the piece must be proven [default: the provider's choice].
    #[arg(long, allow_hyphen_values = true)]
    start_epoch: Option<i64>,
    /// Epochs of the commitment.
    #[arg(long, default_value_t = MIN_DURATION.0, allow_hyphen_values = true)]
    duration: i64,
    /// Allocation of verified data.
    #[arg(long)]
    allocation: Option<u64>,
    /// Piece CID (version 2) to propose [default: that of the file].
    #[arg(long)]
    piece_cid: Option<String>,
    /// ULID of the deal, to go on with one [default: a new one].
    #[arg(long)]
    deal_id: Option<String>,
    /// Do not index the blocks.
    #[arg(long)]
    no_index: bool,
    /// Advertise the blocks to IPNI.
    #[arg(long)]
    announce: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl Deal {
    pub(crate) async fn run(self) -> Result<(), ClientError> {
        let id = match &self.deal_id {
            None => Ulid::generate(),
            Some(text) => Ulid::from_string(text).map_err(|_| ClientError::Argument {
                given: text.clone(),
                wanted: "a ULID such as 01ARZ3NDEKTSV4RRFFQ69G5FAV",
            })?,
        };
        let market = Market::new(&self.who)?;
        let piece = piece_of(&self.car).await?;
        let roots = self.roots().await?;
        let provider = match &self.provider {
            Some(p) => p.clone(),
            None => market
                .offer()
                .await?
                .provider
                .ok_or_else(|| ClientError::Argument {
                    given: String::new(),
                    wanted: "a provider: the service does not name itself, so --provider is needed",
                })?,
        };
        let proposal = self.proposal(id, &market, &piece, &provider);
        market.propose(&proposal).await?;
        if !self.json {
            println!("deal      {id} accepted by {provider}");
        }
        let checkpoint = if self.source == Via::Put {
            let now = market.status(id).await?;
            if now.ddo_v1.status == "uploading" {
                market.upload(id, &self.car, piece.raw_size).await?;
            }
            market.status(id).await?.deal.checkpoint
        } else {
            market.status(id).await?.deal.checkpoint
        };
        if self.json {
            let mut out = piece_json(&piece);
            out["deal_id"] = json!(id.to_string());
            out["client"] = json!(market.key.address_text());
            out["provider"] = json!(provider);
            out["roots"] = json!(roots);
            out["checkpoint"] = json!(checkpoint);
            println!("{out}");
        } else {
            println!("piece     {}\ncheckpoint {checkpoint}", piece.cid);
            println!(
                "follow it with: lotus-markets client status --provider-url {} {id} --watch",
                self.who.provider_url
            );
        }
        Ok(())
    }

    /// Roots of the CAR. A file that is none is left to the provider's judgement.
    async fn roots(&self) -> Result<Vec<String>, ClientError> {
        if self.format == Format::Raw {
            return Ok(vec![]);
        }
        let path = self.car.clone();
        blocking(&self.car, move || {
            let file = File::open(&path).map_err(ClientError::file(&path))?;
            let roots = CarReader::new(file)
                .map(|car| car.roots().iter().map(ToString::to_string).collect());
            Ok(roots.unwrap_or_default())
        })
        .await
    }

    fn proposal(&self, id: Ulid, market: &Market, piece: &PieceInfo, provider: &str) -> mk20::Deal {
        let urls = self.url.iter().map(|url| HttpUrl {
            url: url.clone(),
            headers: BTreeMap::new(),
            priority: 0,
            fallback: false,
        });
        let put = self.source == Via::Put;
        let car = self.format == Format::Car;
        mk20::Deal {
            identifier: id.to_string(),
            client: market.key.address_text(),
            data: Some(DataSource {
                piece_cid: self
                    .piece_cid
                    .clone()
                    .map_or_else(|| piece.cid_v2().into(), CidText),
                format: PieceFormat {
                    car: car.then(|| json!({})),
                    raw: (!car).then(|| json!({})),
                    aggregate: None,
                },
                source_http: (!put).then(|| SourceHttp {
                    urls: urls.collect(),
                }),
                source_http_put: put.then(|| json!({})),
                source_offline: None,
                source_aggregate: None,
            }),
            products: Products {
                ddo_v1: Some(DdoV1 {
                    provider: provider.into(),
                    start_epoch: self.start_epoch,
                    duration: self.duration,
                    allocation_id: self.allocation,
                    ..DdoV1::default()
                }),
                retrieval_v1: Some(RetrievalV1 {
                    indexing: car && !self.no_index,
                    announce_payload: self.announce,
                    announce_piece: false,
                }),
                pdp_v1: None,
            },
        }
    }
}
