//! `GET /piece/{cid}`: the payload bytes of a piece, whole or in ranges.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use cid::Cid;
use futures::stream;
use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE,
    ETAG, HeaderValue, IF_RANGE, RANGE,
};
use http::request::Parts;
use http::{HeaderMap, StatusCode};
use lotus_piece_index::{Leased, PieceSource, SourceError};
use lotus_runtime::splice::{Holes, MAX_STRETCH, Stretch, advise};
use lotus_types::{PieceCid, PieceInfo};
use tracing::Instrument as _;

use crate::answer::{IMMUTABLE, Refusal, has_already, set};
use crate::gateway::Gateway;
use crate::range::{Asked, parse};
use crate::send::{self, Outlet, Place};

/// Bytes read at once.
const CHUNK: u64 = MAX_STRETCH as u64;
/// Bytes that are read ahead of their sending.
const AHEAD: u64 = 4 * CHUNK;
/// Bytes that the kernel reads at once when it is asked for the first of them.
const SHORT: u64 = 128 << 10;
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
    let source = hub.source.clone();
    let body = match holes.filter(|_| leased.reader.file().is_some()) {
        // The kernel sends the bytes of a file on this host.
        Some(holes) => {
            let whole = Arc::<AtomicBool>::default();
            let stretches = Stretches {
                source,
                piece,
                leased,
                parts: parts.into(),
                advised: 0,
                whole: whole.clone(),
                span: tracing::Span::current(),
            };
            let parts = stream::unfold(stretches, Stretches::next);
            send::made("piece", place, holes, whole, parts)
        }
        None => {
            let (outlet, body) = send::body("piece", place);
            let copy = copy(source, piece, parts, outlet);
            gateway.walks.spawn(copy.in_current_span());
            body
        }
    };
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

/// Reads and sends until the end, or until the client goes away. The lease is renewed on the way.
async fn copy(source: PieceSource, piece: PieceCid, parts: Vec<Part>, outlet: Outlet) {
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
            let read = async {
                let leased = source.open(&piece).await?;
                Ok::<_, SourceError>(leased.reader.read_at(range.start, len).await?)
            };
            let chunk = match read.await {
                Ok(chunk) => chunk,
                Err(error) => {
                    tracing::warn!(%piece, %error, "piece is cut short");
                    return;
                }
            };
            if outlet.send(chunk).await.is_err() {
                return;
            }
            range.start += len;
        }
    }
    outlet.finish();
}

/// The parts of a body that the kernel sends: made one by one when the connection can take more,
/// because handing them over from a task costs more than making them.
struct Stretches {
    source: PieceSource,
    piece: PieceCid,
    leased: Leased,
    parts: VecDeque<Part>,
    /// Up to where the kernel was told to read.
    advised: u64,
    whole: Arc<AtomicBool>,
    span: tracing::Span,
}

impl Stretches {
    async fn next(mut self) -> Option<(send::Part, Self)> {
        let range = loop {
            match self.parts.pop_front() {
                None => {
                    self.whole.store(true, Ordering::Release);
                    return None;
                }
                Some(Part::Text(text)) => return Some((send::Part::Data(text), self)),
                Some(Part::Piece(range)) if range.is_empty() => {}
                Some(Part::Piece(range)) => break range,
            }
        };
        let end = range.end.min(range.start + CHUNK);
        match self.part(&range, end).await {
            Ok(part) => {
                self.parts.push_front(Part::Piece(end..range.end));
                Some((part, self))
            }
            Err(error) => {
                let piece = self.piece;
                let cut = || tracing::warn!(%piece, %error, "piece is cut short");
                self.span.in_scope(cut);
                None
            }
        }
    }

    /// The first bytes of a range, up to `end`.
    async fn part(&mut self, range: &Range<u64>, end: u64) -> Result<send::Part, SourceError> {
        if !self.leased.is_fresh() {
            self.leased = self.source.open(&self.piece).await?;
        }
        let (offset, len) = (range.start, end - range.start);
        // The hub may have become one that passes no descriptors.
        let Some(file) = self.leased.reader.file().cloned() else {
            let chunk = self.leased.reader.read_at(offset, len).await?;
            return Ok(send::Part::Data(chunk));
        };
        self.advise(&file, range);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        Ok(send::Part::Stretch(Stretch { file, offset, len }))
    }

    /// Has the kernel read ahead, so that sending does not wait for a disk. What is short it reads
    /// at once anyhow.
    fn advise(&mut self, file: &File, range: &Range<u64>) {
        if !(range.start..range.start + AHEAD).contains(&self.advised) {
            self.advised = range.start;
        }
        let until = range.end.min(range.start + AHEAD);
        while self.advised < until {
            let len = CHUNK.min(until - self.advised);
            if len > SHORT {
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                advise(file, self.advised, len);
            }
            self.advised += len;
        }
    }
}
