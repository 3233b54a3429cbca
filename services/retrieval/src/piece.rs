//! `GET /piece/{cid}`: the payload bytes of a piece, whole or in ranges.

use std::ops::Range;
use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use cid::Cid;
use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE,
    ETAG, HeaderValue, IF_RANGE, RANGE,
};
use http::request::Parts;
use http::{HeaderMap, StatusCode};
use lotus_piece_index::PieceSource;
use lotus_runtime::splice::{Holes, MAX_STRETCH, Stretch, advise};
use lotus_types::{PieceCid, PieceInfo};
use tracing::Instrument as _;

use crate::answer::{IMMUTABLE, Refusal, has_already, set};
use crate::gateway::Gateway;
use crate::range::{Asked, parse};
use crate::send::{Outlet, Place, body};

/// Bytes read at once.
const CHUNK: u64 = MAX_STRETCH as u64;
const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");

pub(crate) async fn answer(
    gateway: &Arc<Gateway>,
    rest: &str,
    head: bool,
    request: &Parts,
    place: Place,
) -> Result<Response, Refusal> {
    let holes = request.extensions.get::<Holes>().cloned();
    let request = &request.headers;
    let cid: Cid = rest.parse().map_err(|_| {
        let shown: String = rest.chars().take(128).collect();
        Refusal::bad(format!("{shown:?} is no CID"), "ask for /piece/{piece cid}")
    })?;
    let piece = PieceCid::from_cid(&cid)
        .map_err(|e| Refusal::bad(e.to_string(), "ask for /piece/{piece cid}"))?;
    let hub = gateway.hub()?;
    let leased = hub.open(&piece, &cid).await?;
    let len = leased.raw_size;
    // A version 2 CID names the size too.
    if let Ok(named) = PieceInfo::from_cid_v2(&cid)
        && (named.raw_size != len || named.size.get() != leased.piece_size)
    {
        return Err(Refusal::not_found(format!("piece {cid} is not here")));
    }
    let etag = format!("\"{cid}\"");
    let mut headers = HeaderMap::new();
    set(&mut headers, ETAG, &etag);
    headers.insert(CACHE_CONTROL, IMMUTABLE);
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    if has_already(request, &etag) {
        return Ok((StatusCode::NOT_MODIFIED, headers).into_response());
    }
    set(
        &mut headers,
        CONTENT_DISPOSITION,
        &format!("attachment; filename=\"{cid}.piece\""),
    );
    // RFC 9110: ranges are for GET, and for the version that the client has a part of.
    let same = request
        .get(IF_RANGE)
        .is_none_or(|v| v.as_bytes() == etag.as_bytes());
    let range = request.get(RANGE).and_then(|v| v.to_str().ok());
    let asked = parse(range.filter(|_| same && !head), len);
    let (status, parts) = match asked {
        Asked::All => {
            headers.insert(CONTENT_TYPE, OCTETS);
            headers.insert(CONTENT_LENGTH, len.into());
            (StatusCode::OK, vec![Part::Piece(0..len)])
        }
        Asked::Unsatisfiable => {
            let mut refused = Refusal::new(
                StatusCode::RANGE_NOT_SATISFIABLE,
                format!("none of these ranges can be served from {len} bytes"),
                "ask for up to 16 ranges within the piece that do not overlap",
            )
            .into_response();
            set(
                refused.headers_mut(),
                CONTENT_RANGE,
                &format!("bytes */{len}"),
            );
            return Ok(refused);
        }
        Asked::Parts(ranges) => {
            let parts = match &ranges[..] {
                [one] => {
                    headers.insert(CONTENT_TYPE, OCTETS);
                    set(&mut headers, CONTENT_RANGE, &content_range(one, len));
                    vec![Part::Piece(one.clone())]
                }
                _ => multipart(&ranges, len, &piece, &mut headers),
            };
            let total: u64 = parts.iter().map(Part::len).sum();
            headers.insert(CONTENT_LENGTH, total.into());
            (StatusCode::PARTIAL_CONTENT, parts)
        }
    };
    if head {
        return Ok((status, headers).into_response());
    }
    // The kernel sends the bytes of a file on this host, where it can.
    let holes = holes.filter(|_| leased.reader.file().is_some());
    let way = Way::of(holes.is_some());
    let (outlet, body) = body("piece", place, holes);
    let copy = copy(hub.source.clone(), piece, parts, outlet, way);
    gateway.walks.spawn(copy.in_current_span());
    Ok((status, headers, body).into_response())
}

enum Part {
    Text(Bytes),
    Piece(Range<u64>),
}

impl Part {
    fn len(&self) -> u64 {
        match self {
            Self::Text(t) => t.len() as u64,
            Self::Piece(r) => r.end - r.start,
        }
    }
}

fn content_range(r: &Range<u64>, len: u64) -> String {
    format!("bytes {}-{}/{len}", r.start, r.end - 1)
}

/// Source: RFC 9110, 14.6.
fn multipart(
    ranges: &[Range<u64>],
    len: u64,
    piece: &PieceCid,
    headers: &mut HeaderMap,
) -> Vec<Part> {
    // Must not occur in the piece; a piece that holds its own CID cannot be made.
    let boundary = piece.to_string();
    set(
        headers,
        CONTENT_TYPE,
        &format!("multipart/byteranges; boundary={boundary}"),
    );
    let mut parts = Vec::new();
    let mut text = String::new();
    for r in ranges {
        text += &format!(
            "--{boundary}\r\nContent-Type: application/octet-stream\r\nContent-Range: {}\r\n\r\n",
            content_range(r, len)
        );
        parts.push(Part::Text(std::mem::take(&mut text).into()));
        parts.push(Part::Piece(r.clone()));
        text.push_str("\r\n");
    }
    text += &format!("--{boundary}--\r\n");
    parts.push(Part::Text(text.into()));
    parts
}

/// How the bytes get from the piece to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Through this process.
    Copy,
    /// Sent by the kernel.
    Splice,
}

impl Way {
    const fn of(holes: bool) -> Self {
        if holes { Self::Splice } else { Self::Copy }
    }
}

/// Reads and sends until the end, or until the client goes away. The lease is renewed on the way.
async fn copy(source: PieceSource, piece: PieceCid, parts: Vec<Part>, outlet: Outlet, way: Way) {
    for part in parts {
        let mut range = match part {
            Part::Text(text) => {
                if outlet.send(text).await.is_err() {
                    return;
                }
                continue;
            }
            Part::Piece(range) => range,
        };
        while range.start < range.end {
            let len = CHUNK.min(range.end - range.start);
            let leased = match source.open(&piece).await {
                Ok(leased) => leased,
                Err(error) => {
                    tracing::warn!(%piece, %error, "piece is cut short");
                    return;
                }
            };
            let sent = match (way, leased.reader.file()) {
                (Way::Splice, Some(file)) => {
                    let len = usize::try_from(len).unwrap_or(usize::MAX);
                    let (file, offset) = (file.clone(), range.start);
                    // Read by the time that it is sent, so that sending does not wait for a disk.
                    advise(&file, offset, len);
                    outlet.stretch(Stretch { file, offset, len }).await
                }
                _ => match leased.reader.read_at(range.start, len).await {
                    Ok(chunk) => outlet.send(chunk).await,
                    Err(error) => {
                        tracing::warn!(%piece, %error, "piece is cut short");
                        return;
                    }
                },
            };
            if sent.is_err() {
                return;
            }
            range.start += len;
        }
    }
    outlet.finish();
}
