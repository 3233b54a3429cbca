//! Fetching, with every byte verified: a piece against its piece CID, a DAG block by block.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use cid::Cid;
use lotus_car::{CarStore, Scope, walk};
use lotus_proofs::CommpWriter;
use lotus_runtime::trace;
use lotus_types::PieceCid;
use reqwest::Url;
use serde_json::json;

use super::ClientError;
use super::files::{blocking, bytes_bar};
use super::market::{base_url, http_client, lost};

/// `client fetch`.
#[derive(Debug, clap::Args)]
pub(crate) struct Fetch {
    /// Base URL of the retrieval service.
    #[arg(long, env = "LOTUS_HUB_RETRIEVAL_URL")]
    retrieval_url: String,
    /// Piece to fetch, by piece CID of either version.
    #[arg(long, conflicts_with = "root", required_unless_present = "root")]
    piece: Option<String>,
    /// DAG to fetch as a CAR, by its root.
    #[arg(long)]
    root: Option<String>,
    /// File to write.
    #[arg(short, long)]
    output: PathBuf,
    /// Also write the UnixFS content of the DAG here; the path must not exist.
    #[arg(long, requires = "root")]
    extract: Option<PathBuf>,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl Fetch {
    pub(crate) async fn run(self) -> Result<(), ClientError> {
        let base = base_url(&self.retrieval_url)?;
        match (&self.piece, &self.root) {
            (Some(piece), _) => self.piece(base, piece).await,
            (None, Some(root)) => self.dag(base, root).await,
            (None, None) => Err(ClientError::Argument {
                given: String::new(),
                wanted: "--piece or --root",
            }),
        }
    }

    async fn piece(&self, base: Url, text: &str) -> Result<(), ClientError> {
        let wanted: PieceCid = text.parse().map_err(|_| ClientError::Argument {
            given: text.into(),
            wanted: "a piece CID (baga6ea4sea… or bafkzcib…)",
        })?;
        let tmp = part(&self.output);
        let mut commp = CommpWriter::new();
        let url = join(base, &format!("/piece/{text}"), None);
        let bytes = download(url, &tmp, |chunk| commp.write_all(chunk)).await?;
        let got = commp.finish();
        if got.cid != wanted {
            fs::remove_file(&tmp).map_err(ClientError::file(&tmp))?;
            return Err(ClientError::Wrong {
                got: got.cid.to_string(),
                wanted: wanted.to_string(),
            });
        }
        fs::rename(&tmp, &self.output).map_err(ClientError::file(&self.output))?;
        self.report(
            &json!({"piece_cid": got.cid.to_string(), "bytes": bytes, "file": self.output}),
        );
        Ok(())
    }

    async fn dag(&self, base: Url, text: &str) -> Result<(), ClientError> {
        let root: Cid = text.parse().map_err(|_| ClientError::Argument {
            given: text.into(),
            wanted: "a CID",
        })?;
        let tmp = part(&self.output);
        let url = join(
            base,
            &format!("/ipfs/{root}"),
            Some("format=car&dag-scope=all"),
        );
        let bytes = download(url, &tmp, |_| Ok(())).await?;
        let (car, extract) = (tmp.clone(), self.extract.clone());
        let checked = blocking(&tmp, move || complete(&car, &root, extract.as_deref())).await;
        let blocks = match checked {
            Ok(n) => n,
            Err(e) => {
                fs::remove_file(&tmp).map_err(ClientError::file(&tmp))?;
                return Err(e);
            }
        };
        fs::rename(&tmp, &self.output).map_err(ClientError::file(&self.output))?;
        self.report(&json!({"root": root.to_string(), "blocks": blocks, "bytes": bytes, "file": self.output}));
        Ok(())
    }

    fn report(&self, out: &serde_json::Value) {
        if self.json {
            println!("{out}");
            return;
        }
        for (name, value) in out.as_object().into_iter().flatten() {
            println!(
                "{name:10} {}",
                value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned)
            );
        }
    }
}

fn part(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

fn join(mut base: Url, path: &str, query: Option<&str>) -> Url {
    let whole = format!("{}{path}", base.path().trim_end_matches('/'));
    base.set_path(&whole);
    base.set_query(query);
    base
}

/// Streams a resource to a file. A connection that breaks is an error, never a short file.
async fn download(
    url: Url,
    to: &Path,
    mut also: impl FnMut(&[u8]) -> std::io::Result<()>,
) -> Result<u64, ClientError> {
    let mut request = http_client()?.get(url.clone());
    let trace = trace::current();
    if !trace.is_empty() {
        request = request.header(trace::HEADER, trace);
    }
    let mut answer = request.send().await.map_err(|e| lost(&url, &e))?;
    if !answer.status().is_success() {
        let status = answer.status().as_u16();
        let text = answer.text().await.unwrap_or_default();
        return Err(ClientError::Http {
            url: url.to_string(),
            status,
            text: text.chars().take(200).collect(),
        });
    }
    let bar = bytes_bar(answer.content_length().unwrap_or(0), "fetch");
    let mut file = File::create(to).map_err(ClientError::file(to))?;
    let mut bytes = 0;
    while let Some(chunk) = answer.chunk().await.map_err(|e| lost(&url, &e))? {
        file.write_all(&chunk)
            .and_then(|()| also(&chunk))
            .map_err(ClientError::file(to))?;
        bytes += chunk.len() as u64;
        bar.set_position(bytes);
    }
    bar.finish_and_clear();
    Ok(bytes)
}

/// Checks every block of a CAR, and that it holds the whole DAG. Returns the number of blocks.
fn complete(car: &Path, root: &Cid, extract: Option<&Path>) -> Result<usize, ClientError> {
    let store = CarStore::open(car)?;
    let broken = |e: lotus_car::WalkError| ClientError::Wrong {
        got: format!("a CAR without the whole DAG ({e})"),
        wanted: root.to_string(),
    };
    let mut blocks = 0;
    for block in walk(root, Scope::All, |cid| store.get(cid)).map_err(broken)? {
        block.map_err(broken)?;
        blocks += 1;
    }
    if let Some(to) = extract {
        lotus_car::export(root, &mut |cid| store.get(cid), to)?;
    }
    Ok(blocks)
}
