//! `lotus-markets index`: the operator's view of the index, asked of the service where it runs, of
//! the files where it does not.

use std::path::PathBuf;
use std::time::Duration;

use cid::Cid;
use clap::{Subcommand, ValueEnum};
use comfy_table::{Table, presets};
use lotus_indexing::control::{
    self, Announced, Holder, IndexStats, IndexVerified, Refusal, SOCKET,
};
use lotus_piece_index::PieceIndex;
use lotus_runtime::Fault;
use lotus_types::{Kind, PieceCid};
use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::Repo;

/// Longest that an answer may take, but for a verification.
const DEADLINE: Duration = Duration::from_secs(60);
/// Longest verification: it reads every byte of the index.
const VERIFY: Duration = Duration::from_secs(6 * 3600);

#[derive(Debug, Subcommand)]
pub(crate) enum IndexCommand {
    /// Show how large the index is, and the newest advertisement.
    Stats {
        #[command(flatten)]
        of: Of,
    },
    /// Show which pieces hold a block, and where.
    Find {
        /// CID of the block.
        cid: Cid,
        #[command(flatten)]
        of: Of,
    },
    /// Read the whole index and compare its parts. Exits with an error when one is damaged.
    Verify {
        /// Multihashes of each piece that are looked up; the rest of a piece's list is read and
        /// compared with its checksum.
        #[arg(long, default_value_t = 1000)]
        samples: u64,
        #[command(flatten)]
        of: Of,
    },
    /// Index one piece, or all, anew from the pieces' bytes. The index answers as before until that
    /// is done; `stats` shows how many pieces are still to go.
    Rebuild {
        /// CID of the piece, version 1; all pieces when left out.
        piece: Option<PieceCid>,
        #[command(flatten)]
        of: Of,
    },
    /// Tell indexers of the newest advertisement now. The service does so by itself with each new
    /// one; this is for an indexer that lost its state, or a new one.
    Announce {
        /// URL of an indexer, such as https://cid.contact/announce; may be repeated. Those of
        /// indexing.announce_urls when left out.
        #[arg(long)]
        url: Vec<String>,
        #[command(flatten)]
        of: Of,
    },
}

/// Which index.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Of {
    /// Directory of configuration and state [default: ~/.lotus-hub/markets].
    #[arg(long, env = "LOTUS_HUB_MARKETS")]
    repo: Option<PathBuf>,
    /// The service whose index it is: each keeps its own. That of retrieval can be looked at while
    /// retrieval does not run.
    #[arg(long, value_enum, default_value_t = Owner::Indexing)]
    service: Owner,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Owner {
    Indexing,
    Retrieval,
}

impl Owner {
    fn name(self) -> &'static str {
        match self {
            Self::Indexing => "indexing",
            Self::Retrieval => "retrieval",
        }
    }
}

/// Runs a command.
pub(crate) async fn run(command: IndexCommand) -> Result<(), Fault> {
    match command {
        IndexCommand::Stats { of } => {
            let stats = of.get(Method::GET, "/v1/stats", control::stats).await?;
            of.print(&stats, stats_table)
        }
        IndexCommand::Find { cid, of } => {
            let path = format!("/v1/find/{cid}");
            let found = of
                .get(Method::GET, &path, move |i| control::find(i, &cid))
                .await?;
            if found.is_empty() {
                return Err(Fault::new(
                    Kind::Data,
                    format!("no indexed piece holds {cid}"),
                    "check the CID; a piece is indexed when its deal asks for it and its data is a CAR",
                ));
            }
            of.print(&found, |found| holders_table(found))
        }
        IndexCommand::Verify { samples, of } => {
            let path = format!("/v1/verify?samples={samples}");
            let seen = of
                .call(Method::POST, &path, VERIFY, None::<&()>, move |i| {
                    control::verify(i, samples)
                })
                .await?;
            of.print(&seen, verified_text)?;
            if seen.ok {
                return Ok(());
            }
            Err(Fault::new(
                Kind::Fatal,
                format!("{} parts of the index are damaged", seen.damaged.len()),
                "check the disk, then `lotus-markets index rebuild`",
            ))
        }
        IndexCommand::Rebuild { piece, of } => {
            let path = match &piece {
                Some(piece) => format!("/v1/rebuild?piece={piece}"),
                None => "/v1/rebuild".into(),
            };
            let asked = of
                .get(Method::POST, &path, move |i| {
                    control::rebuild(i, piece.as_ref())
                })
                .await?;
            of.print(&asked, |r| {
                format!(
                    "{} pieces are indexed anew while the service runs; `lotus-markets index stats` shows how many are to go",
                    r.pieces
                )
            })
        }
        IndexCommand::Announce { url, of } => {
            let none = |_: &PieceIndex| -> Result<Vec<Announced>, Fault> {
                Err(Fault::new(
                    Kind::Transport,
                    "the indexing service does not run, and only it advertises",
                    "start `lotus-markets run --services=indexing`, or name its --repo",
                ))
            };
            let told = of
                .call(Method::POST, "/v1/announce", DEADLINE, Some(&url), none)
                .await?;
            of.print(&told, |told| announced_table(told))?;
            match told.iter().find(|t| !t.error.is_empty()) {
                Some(t) => Err(Fault::new(
                    Kind::Transport,
                    format!("{} was not told: {}", t.url, t.error),
                    "check the URL, and that the indexer answers",
                )),
                None => Ok(()),
            }
        }
    }
}

impl Of {
    async fn get<T: DeserializeOwned + Send + 'static>(
        &self,
        method: Method,
        path: &str,
        own: impl FnOnce(&PieceIndex) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        self.call(method, path, DEADLINE, None::<&()>, own).await
    }

    /// Asks the running service; where none runs, the files.
    async fn call<T: DeserializeOwned + Send + 'static>(
        &self,
        method: Method,
        path: &str,
        limit: Duration,
        body: Option<&impl Serialize>,
        own: impl FnOnce(&PieceIndex) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let repo = Repo::at(self.repo.clone())?;
        let dir = repo.of(self.service.name());
        let socket = dir.join(SOCKET);
        // A socket that nobody listens on is left by a service that was killed.
        let silent = match std::os::unix::net::UnixStream::connect(&socket) {
            Ok(_) => false,
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                return Err(Fault::new(
                    Kind::Config,
                    format!("{}: {e}", socket.display()),
                    "run this as the user of the service, or as root",
                ));
            }
            Err(_) => true,
        };
        if silent {
            return self.offline(dir.join("index.redb"), own).await;
        }
        let failed = |e: reqwest::Error| {
            Fault::new(
                Kind::Transport,
                format!("no answer at {}: {e}", socket.display()),
                "see the service's log",
            )
        };
        let client = lotus_dataplane::http_client_on(&socket, limit)
            .map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;
        let url = format!("http://indexing{path}");
        let mut request = client.request(method, url).timeout(limit);
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await.map_err(failed)?;
        if answer.status().is_success() {
            return answer.json().await.map_err(failed);
        }
        let status = answer.status();
        match answer.json::<Refusal>().await {
            Ok(r) => Err(Fault::new(r.kind, r.error, r.fix)),
            Err(_) => Err(Fault::new(
                Kind::Fatal,
                format!("the service answered with HTTP status {status}"),
                "use the lotus-markets of the same release as the service",
            )),
        }
    }

    async fn offline<T: Send + 'static>(
        &self,
        path: PathBuf,
        own: impl FnOnce(&PieceIndex) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let name = self.service.name();
        if !path.exists() {
            return Err(Fault::new(
                Kind::Config,
                format!("there is no index at {}", path.display()),
                format!("start `lotus-markets run --services={name}`, or name its --repo"),
            ));
        }
        let work = move || {
            let index = PieceIndex::open_existing(&path).map_err(|e| {
                let in_use = matches!(e, lotus_piece_index::IndexError::Locked { .. });
                let fix = match name {
                    "retrieval" if in_use => {
                        "stop retrieval first, or ask `--service indexing`, which has the same pieces".into()
                    }
                    _ => e.fix(),
                };
                Fault::new(e.kind(), e.to_string(), fix)
            })?;
            own(&index)
        };
        let broken = |e| {
            Fault::new(
                Kind::Fatal,
                format!("the work broke off: {e}"),
                "report this",
            )
        };
        tokio::task::spawn_blocking(work).await.map_err(broken)?
    }

    fn print<T: Serialize, D: std::fmt::Display>(
        &self,
        value: &T,
        text: impl FnOnce(&T) -> D,
    ) -> Result<(), Fault> {
        if self.json {
            let json = serde_json::to_string(value).map_err(std::io::Error::from)?;
            println!("{json}");
        } else {
            println!("{}", text(value));
        }
        Ok(())
    }
}

fn plain<const N: usize>(header: Option<[&str; N]>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    if let Some(header) = header {
        table.set_header(header);
    }
    table
}

fn stats_table(s: &IndexStats) -> Table {
    let mut t = plain::<2>(None);
    let or_none = |v: &Option<String>| v.clone().unwrap_or_else(|| "-".into());
    for (name, value) in [
        ("pieces", s.pieces.to_string()),
        ("multihashes", s.multihashes.to_string()),
        ("to be indexed anew", s.stale.to_string()),
        ("segments", s.segments.to_string()),
        ("bytes of segments", s.segment_bytes.to_string()),
        ("bytes of sidecars", s.sidecar_bytes.to_string()),
        ("bytes in memory", s.memory_bytes.to_string()),
        ("records of gone pieces", s.records_gone.to_string()),
        ("pages read", s.pages_read.to_string()),
        ("newest advertisement", or_none(&s.head)),
        ("provider", or_none(&s.provider)),
    ] {
        t.add_row([name, &value]);
    }
    t
}

fn holders_table(found: &[Holder]) -> Table {
    let mut t = plain(Some(["PIECE", "OFFSET", "LENGTH"]));
    for h in found {
        t.add_row([h.piece.to_string(), h.offset.to_string(), h.len.to_string()]);
    }
    t
}

fn verified_text(seen: &IndexVerified) -> String {
    let mut text = format!(
        "{} pieces with {} multihashes are good, of {} segments",
        seen.pieces, seen.multihashes, seen.segments
    );
    for what in &seen.damaged {
        text += &format!("\ndamaged: {what}");
    }
    text
}

fn announced_table(told: &[Announced]) -> Table {
    let mut t = plain(Some(["INDEXER", "ADVERTISEMENT", "OUTCOME"]));
    for a in told {
        let outcome = if a.error.is_empty() { "told" } else { &a.error };
        t.add_row([&a.url, &a.head, outcome]);
    }
    t
}
