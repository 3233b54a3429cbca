//! The operator's side: a Unix socket in the service's folder, for
//! `lotus-markets storage-deals`. Whoever can read the token beside it may give orders: other
//! services in their sandboxes can not.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path as UrlPath, Query, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post, put};
use http::header;
use lotus_journal::{JournalError, Machine as _};
use lotus_runtime::{CancellationToken, Fault};
use lotus_types::DealKey;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use ulid::Ulid;
use uuid::Uuid;

use crate::engine::{Engine, journal_refusal, unix_ms};
use crate::history::{HISTORY, Step};
use crate::machine::{Checkpoint, DealMachine, Event, Record};
use crate::mk20::{Code, DealStatus, Done, Refusal};

/// Deals of one answer at most.
pub const MAX_PAGE: usize = 1_000;
/// Longest reason of a cancellation, in bytes.
const MAX_REASON: usize = 500;

/// The socket in a service's folder.
#[must_use]
pub fn socket(dir: &Path) -> PathBuf {
    dir.join("operator.sock")
}

/// The file with the token, in the same folder.
#[must_use]
pub fn token_file(dir: &Path) -> PathBuf {
    dir.join("operator.token")
}

/// Which deals to list. What is absent does not count.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ListQuery {
    /// Address of the client.
    pub client: Option<String>,
    /// ULID.
    pub id: Option<String>,
    /// Name of the checkpoint.
    pub checkpoint: Option<String>,
    /// `put`, `http` or `offline`.
    pub source: Option<String>,
    /// Only those that are not over.
    pub open: bool,
    /// Only those that wait for their bytes.
    pub waiting: bool,
    /// From the one after this on: `next` of the last answer.
    pub after: Option<String>,
    /// At most so many; [`MAX_PAGE`] at most.
    pub limit: Option<usize>,
}

/// A deal, as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DealRow {
    /// What its client sees.
    #[serde(flatten)]
    pub deal: DealStatus,
    /// `put`, `http` or `offline`.
    pub source: String,
    /// `car` or `raw`.
    pub format: String,
    /// Its proposal names no length: it takes any file whose piece it is.
    #[serde(default)]
    pub any_length: bool,
    /// When it was accepted, in Unix milliseconds.
    pub accepted_unix_ms: u64,
    /// Its bytes are arriving now.
    pub arriving: bool,
    /// Its bytes are here and are being checked.
    pub checking: bool,
    /// Milliseconds that its transfer takes so far; 0 without one.
    pub transfer_ms: u64,
}

/// Some deals, in the order of client and id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DealPage {
    /// The deals.
    pub deals: Vec<DealRow>,
    /// To be sent as `after` for those that follow; absent at the end.
    pub next: Option<String>,
}

/// A deal with all that there is to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DealDetail {
    /// The deal.
    #[serde(flatten)]
    pub row: DealRow,
    /// Where it is downloaded from.
    pub urls: Vec<String>,
    /// Allocation of verified data.
    pub allocation_id: Option<u64>,
    /// Its steps, oldest first.
    pub history: Vec<Step>,
}

/// Deals by proposal on their way to the chain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publishing {
    /// Those that one message each publishes.
    pub batches: Vec<PublishBatch>,
    /// Deals that wait for a batch, oldest first, as CLIENT/ID.
    pub waiting: Vec<String>,
    /// When they make one even if no more come, in Unix milliseconds; absent if none waits.
    pub due_unix_ms: Option<u64>,
}

/// Deals that one message publishes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishBatch {
    /// Number in the order of making.
    pub number: u64,
    /// Messages of it that are known not to have landed.
    pub attempt: u32,
    /// CID of the message, once the hub has one.
    pub message: Option<String>,
    /// The deals, as CLIENT/ID.
    pub deals: Vec<String>,
}

/// Body of a cancellation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelRequest {
    /// For the client and the record.
    pub reason: String,
}

/// The bound socket.
pub(crate) struct Operator {
    listener: UnixListener,
    token: String,
    engine: Arc<Engine>,
}

impl Operator {
    /// Binds the socket and writes a new token. The journal's lock keeps a second service out.
    pub(crate) fn bind(dir: &Path, engine: Arc<Engine>) -> Result<Self, Fault> {
        let token = format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
        let next = dir.join(".operator.token.tmp");
        for old in [&next, &socket(dir)] {
            match fs::remove_file(old) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
                _ => {}
            }
        }
        let mut options = fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&next)?;
        file.write_all(token.as_bytes())?;
        fs::rename(next, token_file(dir))?;
        let listener = UnixListener::bind(socket(dir))?;
        Ok(Self {
            listener,
            token,
            engine,
        })
    }

    /// Serves until stopped.
    pub(crate) async fn serve(self, stop: CancellationToken) -> Result<(), Fault> {
        let shared = Arc::new(Shared {
            token: format!("Bearer {}", self.token),
            engine: self.engine,
        });
        let app = Router::new()
            .route("/deals", get(list))
            .route("/deals/{client}/{id}", get(detail))
            .route("/deals/{client}/{id}/cancel", post(cancel))
            .route("/deals/{client}/{id}/retry", post(retry))
            .route("/deals/{client}/{id}/data", put(import))
            .route("/publish", get(publishing).post(publish_now))
            .layer(middleware::from_fn_with_state(shared.clone(), admit))
            .with_state(shared);
        let until = stop.clone();
        let serving = axum::serve(self.listener, app)
            .with_graceful_shutdown(async move { until.cancelled().await });
        tokio::select! {
            served = serving => served.map_err(Fault::from),
            // An import that is under way is begun anew.
            () = stop.cancelled() => Ok(()),
        }
    }
}

struct Shared {
    token: String,
    engine: Arc<Engine>,
}

type App = State<Arc<Shared>>;

async fn admit(State(shared): App, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION);
    if given.is_some_and(|v| v.as_bytes() == shared.token.as_bytes()) {
        return next.run(request).await;
    }
    Refusal::new(
        Code::Unauthorized,
        "the token is not that of this service",
        "run the command as the user that runs the service, outside of any sandbox",
    )
    .into_response()
}

fn key(client: &str, id: &str) -> Result<DealKey, Refusal> {
    format!("{client}/{id}").parse().map_err(|e| {
        Refusal::new(
            Code::BadProposal,
            e,
            "name a deal as CLIENT/ID or by its ULID",
        )
    })
}

fn record(engine: &Engine, key: &DealKey) -> Result<Record, Refusal> {
    let found = engine.deals.get(key).map_err(|e| journal_refusal(&e))?;
    found.ok_or_else(|| {
        Refusal::new(
            Code::NotFound,
            format!("there is no deal {key}"),
            "see `lotus-markets storage-deals list`",
        )
    })
}

fn matches(q: &ListQuery, key: &DealKey, r: &Record) -> bool {
    let is = |wanted: &Option<String>, have: &str| wanted.as_ref().is_none_or(|w| w == have);
    let id = q.id.as_deref().map(str::parse::<Ulid>);
    is(&q.client, &key.client)
        && id.is_none_or(|id| id.is_ok_and(|id| id == key.id))
        && is(&q.checkpoint, r.checkpoint.name())
        && is(&q.source, r.proposal.source.name())
        && (!q.open || !r.checkpoint.is_final())
        && (!q.waiting || r.awaits_bytes())
}

fn row(engine: &Engine, r: &Record) -> DealRow {
    let key = &r.proposal.key;
    DealRow {
        deal: engine.known(r),
        source: r.proposal.source.name().into(),
        any_length: r.proposal.takes_any_length(),
        format: r.proposal.format.as_str().into(),
        accepted_unix_ms: r.accepted_unix_ms,
        arriving: engine.arriving.has(key) && !r.checking,
        checking: r.checking,
        transfer_ms: engine.arriving.takes(key).map_or(0, |took| {
            u64::try_from(took.as_millis()).unwrap_or(u64::MAX)
        }),
    }
}

async fn list(
    State(shared): App,
    Query(q): Query<ListQuery>,
) -> Result<axum::Json<DealPage>, Refusal> {
    let mut after =
        match &q.after {
            None => None,
            Some(text) => Some(text.parse::<DealKey>().map_err(|e| {
                Refusal::new(Code::BadProposal, e, "send `next` of the last answer")
            })?),
        };
    let limit = q.limit.unwrap_or(MAX_PAGE).clamp(1, MAX_PAGE);
    let engine = shared.engine.clone();
    let find = move || -> Result<DealPage, JournalError> {
        let mut page = DealPage::default();
        loop {
            let journal = engine.deals.journal();
            let some = journal.read(|v| v.scan(&DealMachine::STATES, after.as_ref(), MAX_PAGE))?;
            let Some((last, _)) = some.last() else {
                return Ok(page);
            };
            after = Some(last.clone());
            for (key, record) in &some {
                if !matches(&q, key, record) {
                    continue;
                }
                page.deals.push(row(&engine, record));
                if page.deals.len() == limit {
                    page.next = Some(key.to_string());
                    return Ok(page);
                }
            }
        }
    };
    let found = tokio::task::spawn_blocking(find).await;
    let page = found.map_err(|e| Refusal::new(Code::Internal, e, "see the log"))?;
    Ok(axum::Json(page.map_err(|e| journal_refusal(&e))?))
}

async fn detail(
    State(shared): App,
    UrlPath((client, id)): UrlPath<(String, String)>,
) -> Result<axum::Json<DealDetail>, Refusal> {
    let engine = &shared.engine;
    let key = key(&client, &id)?;
    let record = record(engine, &key)?;
    let mut row = row(engine, &record);
    row.deal = engine.status(&record).await.deal;
    let read = engine.deals.journal().read(|v| v.get(&HISTORY, &key));
    let urls = match &record.proposal.source {
        crate::validate::Source::Http(urls) => urls.iter().map(|u| u.url.clone()).collect(),
        _ => Vec::new(),
    };
    Ok(axum::Json(DealDetail {
        row,
        urls,
        allocation_id: record.proposal.allocation.map(|(_, id)| id),
        history: read
            .map_err(|e: JournalError| journal_refusal(&e))?
            .unwrap_or_default(),
    }))
}

async fn cancel(
    State(shared): App,
    UrlPath((client, id)): UrlPath<(String, String)>,
    axum::Json(asked): axum::Json<CancelRequest>,
) -> Result<axum::Json<Done>, Refusal> {
    let engine = &shared.engine;
    let key = key(&client, &id)?;
    let record = record(engine, &key)?;
    if record.checkpoint > Checkpoint::Offered {
        return Err(Refusal::new(
            Code::Conflict,
            format!("the deal is {}", record.checkpoint.name()),
            "a piece that is in a sector stays there: `lotus-miner sectors terminate` ends a sector",
        ));
    }
    let reason: String = asked.reason.chars().filter(|c| !c.is_control()).collect();
    if reason.len() > MAX_REASON {
        return Err(Refusal::new(
            Code::BadProposal,
            "the reason is too long",
            "use 500 bytes",
        ));
    }
    let why = match reason.trim() {
        "" => "cancelled by the provider".to_owned(),
        reason => format!("cancelled by the provider: {reason}"),
    };
    let done = engine
        .apply(&key, Event::Cancel(why), None, None)
        .await
        .map_err(|e| journal_refusal(&e))?;
    if done.is_none() && record.proposal.signed.is_some() && record.cancel.is_empty() {
        return Err(Refusal::new(
            Code::Conflict,
            format!(
                "the deal is {}: it is on chain, or on its way there",
                record.checkpoint.name()
            ),
            "let it be sealed: a published deal that is not costs its collateral",
        ));
    }
    engine.arriving.stop(&key);
    engine.nudge.send_replace(Some(key));
    Ok(axum::Json(Done::OK))
}

async fn retry(
    State(shared): App,
    UrlPath((client, id)): UrlPath<(String, String)>,
) -> Result<axum::Json<Done>, Refusal> {
    let engine = &shared.engine;
    let key = key(&client, &id)?;
    let record = record(engine, &key)?;
    let no = |error: String, fix: &str| Err(Refusal::new(Code::Conflict, error, fix));
    match record.checkpoint {
        Checkpoint::Failed | Checkpoint::Expired => {}
        Checkpoint::AddedPiece | Checkpoint::Sealing | Checkpoint::Active => {
            return no(
                format!("the deal is {}", record.checkpoint.name()),
                "follow its sector with `lotus-miner sectors status`",
            );
        }
        Checkpoint::Accepted
        | Checkpoint::Transferred
        | Checkpoint::Published
        | Checkpoint::PublishConfirmed
        | Checkpoint::Offered => {
            // It waits for its next attempt.
            engine.nudge.send_replace(Some(key));
            return Ok(axum::Json(Done::OK));
        }
    }
    if *engine.height.borrow() >= record.proposal.start_epoch {
        return no(
            format!("its start epoch {} has passed", record.proposal.start_epoch),
            "the client must propose a new deal",
        );
    }
    let pending = engine.deals.pending().map_err(|e| journal_refusal(&e))?;
    if pending.iter().any(|task| task.key == key) {
        return no(
            "it is still being cleaned up".into(),
            "try again in a moment",
        );
    }
    match engine.hub_state(&key).await {
        Ok(None) => {}
        Ok(Some(_)) => {
            return no(
                "the hub has given its piece up".into(),
                "the client must propose a new deal",
            );
        }
        Err(e) => return Err(crate::engine::hub_refusal(&e)),
    }
    // Another deal may use what this one gave up.
    engine.reserve(&key, record.proposal.allocation)?;
    let retried = engine
        .apply(&key, Event::Retry(unix_ms()), None, None)
        .await;
    {
        let mut open = engine.open();
        if !open.deals.contains_key(&key) {
            open.release(&key);
        }
    }
    match retried.map_err(|e| journal_refusal(&e))? {
        Some(_) => Ok(axum::Json(Done::OK)),
        None => no(
            "its piece was handed over before, or it is on chain".into(),
            "the client must propose a new deal",
        ),
    }
}

async fn publishing(State(shared): App) -> Result<axum::Json<Publishing>, Refusal> {
    let found = shared.engine.publishing();
    Ok(axum::Json(found.map_err(|e| journal_refusal(&e))?))
}

async fn publish_now(State(shared): App) -> axum::Json<Done> {
    shared.engine.publish_now();
    axum::Json(Done::OK)
}

async fn import(
    State(shared): App,
    UrlPath((client, id)): UrlPath<(String, String)>,
    request: Request,
) -> Result<axum::Json<Done>, Refusal> {
    let engine = &shared.engine;
    let record = record(engine, &key(&client, &id)?)?;
    let (parts, body): (_, Body) = request.into_parts();
    let announced = crate::http::content_length(&parts.headers);
    engine
        .import(&record, announced, body.into_data_stream())
        .await?;
    Ok(axum::Json(Done::OK))
}
