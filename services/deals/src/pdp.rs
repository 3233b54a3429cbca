//! Uploads of pieces at `/pdp/piece`, as Curio has them, so that clients of Filecoin's PDP upload
//! here: the piece named before its bytes, or after them. No one signs, so the client is known by
//! its address alone.

use std::net::SocketAddr;
use std::time::Duration;

use axum::extract::{ConnectInfo, Path, Query, Request, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post, put};
use cid::Cid;
use http::{Method, StatusCode, header};
use lotus_types::PieceInfo;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::http::{App, content_length, drained, small_body};
use crate::mk20::{Code, Refusal};
use crate::openapi::{Api, Operation};

/// Body of `POST /pdp/piece` and `POST /pdp/piece/uploads/{id}`, and answer of `GET /pdp/piece`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PieceName {
    /// Piece CID, version 2.
    #[serde(rename = "pieceCid")]
    pub piece_cid: String,
}

/// Answer of `GET /pdp/piece/{id}/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PieceStatus {
    /// Piece CID, version 2.
    pub piece_cid: String,
    /// `pending`: it is here, and nothing was done with it.
    pub status: String,
    /// Whether its blocks are indexed.
    pub indexed: bool,
    /// Whether there is an advertisement of it.
    pub ad_created: bool,
    /// Whether indexers were told of that.
    pub advertised: bool,
    /// Whether an indexer fetched it.
    pub retrieved: bool,
}

/// Adds the routes.
pub(crate) fn routes(api: Api<App>) -> Api<App> {
    let name = || Operation::new("Begin to upload a piece").takes::<PieceName>(true);
    api.on(
        &Method::GET,
        "/pdp/ping",
        &Operation::new("Whether the service is there").gives_nothing(200, "It is"),
        get(|| async { StatusCode::OK }),
    )
    .on(
        &Method::POST,
        "/pdp/piece",
        &name()
            .gives::<PieceName>(200, "The piece is here already")
            .gives_nothing(201, "Where to PUT its bytes")
            .locates(),
        post(begin),
    )
    .on(
        &Method::GET,
        "/pdp/piece",
        &Operation::new("Find an uploaded piece")
            .query("pieceCid")
            .gives::<PieceName>(200, "It is here"),
        get(find),
    )
    .on(
        &Method::GET,
        "/pdp/piece/{id}/status",
        &Operation::new("What became of an uploaded piece")
            .gives::<PieceStatus>(200, "What became of it"),
        get(status),
    )
    .on(
        &Method::PUT,
        "/pdp/piece/upload/{id}",
        &Operation::new("Upload a piece that was named")
            .takes_bytes()
            .gives_nothing(204, "The piece is here"),
        put(upload_named),
    )
    .on(
        &Method::POST,
        "/pdp/piece/uploads",
        &Operation::new("Begin to upload a piece that is named after its bytes")
            .gives_nothing(201, "Where to PUT its bytes")
            .locates(),
        post(begin_streaming),
    )
    .on(
        &Method::PUT,
        "/pdp/piece/uploads/{id}",
        &Operation::new("Upload a piece that is named later")
            .takes_bytes()
            .gives_nothing(204, "The bytes are here"),
        put(upload_streaming),
    )
    .on(
        &Method::POST,
        "/pdp/piece/uploads/{id}",
        &Operation::new("Name the piece that was uploaded")
            .takes::<PieceName>(true)
            .gives::<PieceName>(200, "The piece is here"),
        post(finalize),
    )
}

fn piece(text: &str) -> Result<PieceInfo, Refusal> {
    let bad = |why: String| {
        Refusal::new(
            Code::BadProposal,
            why,
            "give the version 2 piece CID (bafkzcib…), which has the size",
        )
        .at("pieceCid")
    };
    let cid = Cid::try_from(text).map_err(|_| {
        let clipped: String = text.chars().take(128).collect();
        bad(format!("{clipped:?} is no CID"))
    })?;
    PieceInfo::from_cid_v2(&cid).map_err(|e| bad(e.to_string()))
}

fn name(piece: &PieceInfo) -> PieceName {
    PieceName {
        piece_cid: piece.cid_v2().to_string(),
    }
}

fn upload_id(text: &str) -> Result<Uuid, Refusal> {
    text.parse()
        .map_err(|e| Refusal::new(Code::BadProposal, e, "use the id that the POST gave"))
}

/// Whose upload it is.
fn owner(peer: &SocketAddr) -> String {
    lotus_runtime::client(peer.ip()).to_string()
}

fn created(path: String) -> Response {
    (StatusCode::CREATED, [(header::LOCATION, path)]).into_response()
}

/// Reads a named piece from a body.
async fn named(shared: &App, request: Request) -> Result<PieceInfo, Refusal> {
    let body = small_body(shared, request.into_body()).await?;
    let given: PieceName = serde_json::from_slice(&body).map_err(|e| {
        Refusal::new(
            Code::BadProposal,
            format!("the body names no piece: {e}"),
            r#"send {"pieceCid": "bafkzcib…"}"#,
        )
    })?;
    piece(&given.piece_cid)
}

async fn begin(
    State(shared): State<App>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
) -> Result<Response, Refusal> {
    let piece = named(&shared, request).await?;
    let pieces = &shared.engine.pieces;
    if pieces.file(&piece).is_some() {
        return Ok(axum::Json(name(&piece)).into_response());
    }
    let id = pieces.begin(&owner(&peer), Some(piece))?;
    Ok(created(format!("/pdp/piece/upload/{id}")))
}

async fn begin_streaming(
    State(shared): State<App>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
) -> Result<Response, Refusal> {
    let id = shared.engine.pieces.begin(&owner(&peer), None)?;
    Ok(created(format!("/pdp/piece/uploads/{id}")))
}

async fn upload_named(
    state: State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<StatusCode, Refusal> {
    upload(state, &id, request, true).await
}

async fn upload_streaming(
    state: State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<StatusCode, Refusal> {
    upload(state, &id, request, false).await
}

async fn upload(
    State(shared): State<App>,
    id: &str,
    request: Request,
    named: bool,
) -> Result<StatusCode, Refusal> {
    let (parts, body) = request.into_parts();
    let mut body = body.into_data_stream();
    let idle = Duration::from_secs(shared.engine.cfg.transfer_idle_secs.max(1));
    let announced = content_length(&parts.headers);
    let outcome = match upload_id(id).and_then(|id| Ok((id, shared.unsigned()?))) {
        Ok((id, _places)) => {
            let pieces = &shared.engine.pieces;
            pieces.receive(id, named, announced, &mut body, idle).await
        }
        Err(refusal) => Err(refusal),
    };
    drained(outcome, body).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn finalize(
    State(shared): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<axum::Json<PieceName>, Refusal> {
    let id = upload_id(&id)?;
    let piece = named(&shared, request).await?;
    shared.engine.pieces.finalize(id, piece).await?;
    Ok(axum::Json(name(&piece)))
}

#[derive(Deserialize)]
struct FindQuery {
    #[serde(default, rename = "pieceCid")]
    piece_cid: String,
}

fn here(shared: &App, text: &str) -> Result<PieceInfo, Refusal> {
    let piece = piece(text)?;
    match shared.engine.pieces.file(&piece) {
        Some(_) => Ok(piece),
        None => Err(Refusal::new(
            Code::NotFound,
            format!("piece {} is not here", piece.cid_v2()),
            "upload it with POST /pdp/piece",
        )),
    }
}

async fn find(
    State(shared): State<App>,
    Query(query): Query<FindQuery>,
) -> Result<axum::Json<PieceName>, Refusal> {
    Ok(axum::Json(name(&here(&shared, &query.piece_cid)?)))
}

async fn status(
    State(shared): State<App>,
    Path(text): Path<String>,
) -> Result<axum::Json<PieceStatus>, Refusal> {
    let piece = here(&shared, &text)?;
    Ok(axum::Json(PieceStatus {
        piece_cid: piece.cid_v2().to_string(),
        status: "pending".into(),
        indexed: false,
        ad_created: false,
        advertised: false,
        retrieved: false,
    }))
}
