use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use bytes::Bytes;
use futures::stream;
use http::header::{
    ACCEPT_RANGES, AUTHORIZATION, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG,
    IF_RANGE, RANGE,
};
use http::{HeaderMap, Method, StatusCode};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use lotus_types::Kind;

use crate::{DataError, Duplex, OpenToken};

/// Bytes read from disk at a time.
const CHUNK: u64 = 512 << 10;

/// Where [`http_router`] answers.
pub const PATH: &str = "/data/v1";

/// ALPN name of connections that a spoke opens to be asked by the hub.
pub const PULL_ALPN: &[u8] = b"lotus-pull/1";

/// Who asks, as an extension of a request; whoever knows puts it there.
#[derive(Clone, Debug)]
pub struct Asker(pub String);

/// `GET` and `HEAD` of what the bearer token opens, at [`PATH`]. One range per request; strong ETag.
pub fn http_router(open: Arc<dyn OpenToken>) -> Router {
    Router::new().route(PATH, get(bearer)).with_state(open)
}

/// Answers as [`http_router`] does on one connection, whoever opened it, until it ends.
pub async fn serve_on(connection: impl Duplex, open: Arc<dyn OpenToken>) -> io::Result<()> {
    let service = TowerToHyperService::new(http_router(open));
    hyper::server::conn::http1::Builder::new()
        // The next request may come much later.
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(connection), service)
        .await
        .map_err(io::Error::other)
}

async fn bearer(
    State(open): State<Arc<dyn OpenToken>>,
    asker: Option<Extension<Asker>>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    let token = headers
        .get(AUTHORIZATION)
        .and_then(|v| v.to_str().ok()?.strip_prefix("Bearer "));
    let Some(token) = token else {
        let fix = "send the data token as a bearer token\n";
        return (StatusCode::BAD_REQUEST, fix).into_response();
    };
    let asker = asker.as_ref().map(|Extension(Asker(who))| who.as_str());
    match open.open(token, asker).await {
        Ok((file, len)) => respond(file, len, &method, &headers),
        Err(e) => {
            let status = match (&e, e.kind()) {
                (DataError::UnknownToken { .. }, _) => StatusCode::NOT_FOUND,
                (_, Kind::Transport | Kind::Capacity) => StatusCode::SERVICE_UNAVAILABLE,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            };
            (status, format!("{e}\n")).into_response()
        }
    }
}

fn respond(file: File, len: u64, method: &Method, headers: &HeaderMap) -> Response {
    let etag = match file.metadata() {
        Ok(m) => format!(
            "\"{:x}-{:x}-{len:x}-{:x}{:x}\"",
            m.dev(),
            m.ino(),
            m.mtime(),
            m.mtime_nsec()
        ),
        Err(e) => return (StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n")).into_response(),
    };
    let text = |name| {
        headers
            .get(name)
            .and_then(|v: &http::HeaderValue| v.to_str().ok())
    };
    let same = text(IF_RANGE).is_none_or(|tag| tag == etag);
    let asked = text(RANGE)
        .filter(|_| same)
        .map_or(Asked::Whole, |r| parse_range(r, len));
    let base = Response::builder()
        .header(ETAG, &etag)
        .header(ACCEPT_RANGES, "bytes")
        .header(CONTENT_TYPE, "application/octet-stream")
        .header(CACHE_CONTROL, "no-store");
    let (response, from, to) = match asked {
        Asked::Whole => (base.status(StatusCode::OK), 0, len),
        Asked::Part(from, to) => (
            base.status(StatusCode::PARTIAL_CONTENT)
                .header(CONTENT_RANGE, format!("bytes {from}-{}/{len}", to - 1)),
            from,
            to,
        ),
        Asked::Outside => {
            return base
                .status(StatusCode::RANGE_NOT_SATISFIABLE)
                .header(CONTENT_RANGE, format!("bytes */{len}"))
                .body(Body::empty())
                .unwrap_or_else(|e| e.to_string().into_response());
        }
    };
    let body = if *method == Method::HEAD {
        Body::empty()
    } else {
        file_body(file, from, to)
    };
    response
        .header(CONTENT_LENGTH, to - from)
        .body(body)
        .unwrap_or_else(|e| (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response())
}

/// Bytes `from..to` of the file, read as the reader takes them.
fn file_body(file: File, from: u64, to: u64) -> Body {
    let file = Arc::new(file);
    Body::from_stream(stream::try_unfold(from, move |at| {
        let file = file.clone();
        async move {
            if at >= to {
                return Ok::<_, io::Error>(None);
            }
            let chunk =
                tokio::task::spawn_blocking(move || read_exact_at(&file, at, CHUNK.min(to - at)))
                    .await
                    .map_err(io::Error::other)??;
            let next = at + chunk.len() as u64;
            Ok(Some((chunk, next)))
        }
    }))
}

/// Exactly `len` bytes at `offset`; a file that ends early is an error.
pub(crate) fn read_exact_at(file: &File, offset: u64, len: u64) -> io::Result<Bytes> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    let mut buf = vec![0; len];
    file.read_exact_at(&mut buf, offset)?;
    Ok(buf.into())
}

#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Whole,
    /// Half-open, not empty.
    Part(u64, u64),
    Outside,
}

/// One `bytes=` range. Anything else (several ranges, another unit, bad syntax) is answered with
/// the whole, as RFC 9110 section 14.2 allows.
fn parse_range(header: &str, len: u64) -> Asked {
    let Some((first, last)) = header
        .strip_prefix("bytes=")
        .and_then(|r| r.trim().split_once('-'))
    else {
        return Asked::Whole;
    };
    match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(from), _) if !last.is_empty() && last.parse::<u64>().map_or(true, |l| l < from) => {
            Asked::Whole
        }
        (Ok(from), _) if from >= len => Asked::Outside,
        (Ok(from), Ok(last)) => Asked::Part(from, last.saturating_add(1).min(len)),
        (Ok(from), Err(_)) => Asked::Part(from, len),
        (Err(_), Ok(_)) if !first.is_empty() => Asked::Whole,
        (Err(_), Ok(0)) => Asked::Outside,
        (Err(_), Ok(_)) if len == 0 => Asked::Outside,
        (Err(_), Ok(suffix)) => Asked::Part(len.saturating_sub(suffix), len),
        (Err(_), Err(_)) => Asked::Whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (header, asked) in [
            ("bytes=0-", Asked::Part(0, 10)),
            ("bytes=0-0", Asked::Part(0, 1)),
            ("bytes=3-99", Asked::Part(3, 10)),
            ("bytes=9-9", Asked::Part(9, 10)),
            ("bytes=-4", Asked::Part(6, 10)),
            ("bytes=-99", Asked::Part(0, 10)),
            ("bytes=-0", Asked::Outside),
            ("bytes=10-", Asked::Outside),
            (
                "bytes=18446744073709551615-18446744073709551615",
                Asked::Outside,
            ),
            ("bytes=4-2", Asked::Whole),
            ("bytes=-", Asked::Whole),
            ("bytes=a-b", Asked::Whole),
            ("bytes=0-1,3-4", Asked::Whole),
            ("items=0-1", Asked::Whole),
            ("", Asked::Whole),
        ] {
            assert_eq!(parse_range(header, 10), asked, "{header}");
        }
        assert_eq!(parse_range("bytes=-1", 0), Asked::Outside);
    }
}
