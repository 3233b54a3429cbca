//! Raw pieces as Lotus serves them: ranges of a sector's unsealed data, at `/remote`.
//!
//! A hub keeps no unsealed sector file, but each piece for itself. What is asked for is put
//! together from the pieces' files and padded while it is sent. Nothing else of a sector is sent,
//! and nothing is deleted. A reader holds open files and no lock: it is cut when it takes nothing
//! for a while. Source: lotus storage/paths/http_handler.go.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Poller, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use http::{HeaderMap, Method, Response, StatusCode};
use hyper::body::{Body, Frame};
use jsonrpsee::server::HttpBody;
use lotus_proofs::fr32_pad;
use lotus_sealing::SectorPiece;
use lotus_types::{SectorId, SectorNumber};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::Hub;

/// Where sectors are.
pub(crate) const PATH: &str = "/remote/";
/// Fr32 stores 127 bytes in every 128.
const RAW: u64 = 127;
const PADDED: u64 = 128;
/// Padded bytes of a chunk.
const CHUNK: u64 = 1 << 20;
/// Chunks on their way.
const QUEUE: usize = 2;
/// How long a reader may take nothing.
const SILENCE: Duration = Duration::from_secs(60);

/// What a path below [`PATH`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// The padded bytes of a sector.
    Bytes(SectorId),
    /// Whether unsealed data is there: of a sector, from, and how many, without padding.
    Allocated(SectorId, u64, u64),
}

/// `None`: nothing that is served.
fn parse(path: &str) -> Option<Asked> {
    let rest = path.strip_prefix(PATH)?.strip_prefix("unsealed/")?;
    let parts: Vec<&str> = rest.split('/').collect();
    let sector = |text: &str| {
        let (miner, number) = text.strip_prefix("s-")?.split_once('-')?;
        Some(SectorId {
            miner: miner.parse().ok()?,
            number: SectorNumber(number.parse().ok()?),
        })
    };
    match parts[..] {
        [id] => Some(Asked::Bytes(sector(id)?)),
        [id, _proof, "allocated", from, len] => Some(Asked::Allocated(
            sector(id)?,
            from.parse().ok()?,
            len.parse().ok()?,
        )),
        _ => None,
    }
}

/// A range of bytes, from and to before. `None`: one that can not be served.
fn range(headers: &HeaderMap, len: u64) -> Option<(u64, u64)> {
    let Some(value) = headers.get(RANGE) else {
        return Some((0, len));
    };
    let (from, to) = value
        .to_str()
        .ok()?
        .strip_prefix("bytes=")?
        .split_once('-')?;
    let from: u64 = from.parse().ok()?;
    let to = match to {
        "" => len,
        to => to.parse::<u64>().ok()?.checked_add(1)?.min(len),
    };
    (from < to).then_some((from, to))
}

/// The pieces that a padded range touches.
fn touched(pieces: &[SectorPiece], from: u64, to: u64) -> Vec<&SectorPiece> {
    let end = |p: &SectorPiece| p.offset.saturating_add(p.piece.size.get());
    let all = pieces.iter();
    all.filter(|p| p.offset < to && end(p) > from).collect()
}

/// A piece of a sector, open.
struct Open {
    /// Where it begins, without padding.
    at: u64,
    file: File,
    raw_size: u64,
}

/// The part of a sector's unsealed data that is sent.
struct Part {
    pieces: Vec<Open>,
    /// Padded bytes still to send.
    from: u64,
    to: u64,
}

impl Part {
    /// The next bytes, padded.
    fn take_chunk(&mut self) -> io::Result<Bytes> {
        let first = self.from / PADDED;
        let end = self.to.min((first * PADDED).saturating_add(CHUNK));
        let units = end.div_ceil(PADDED) - first;
        let raw_at = first * RAW;
        let mut raw = vec![0; usize::try_from(units * RAW).map_err(io::Error::other)?];
        for piece in &self.pieces {
            let begin = piece.at.max(raw_at);
            let stop = (piece.at + piece.raw_size).min(raw_at + units * RAW);
            if begin < stop {
                let into = usize::try_from(begin - raw_at).map_err(io::Error::other)?;
                let len = usize::try_from(stop - begin).map_err(io::Error::other)?;
                let to = &mut raw[into..into + len];
                piece.file.read_exact_at(to, begin - piece.at)?;
            }
        }
        let padded = Bytes::from(fr32_pad(&raw));
        let skip = usize::try_from(self.from - first * PADDED).map_err(io::Error::other)?;
        let until = usize::try_from(end - first * PADDED).map_err(io::Error::other)?;
        self.from = end;
        Ok(padded.slice(skip..until))
    }
}

/// Answers a request below [`PATH`] of a caller who may do everything.
pub(crate) async fn answer(
    hub: &Arc<dyn Hub>,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
) -> Response<HttpBody> {
    if method != Method::GET {
        return words(
            StatusCode::METHOD_NOT_ALLOWED,
            "files of sectors can only be read\n",
        );
    }
    let Some(asked) = parse(path) else {
        return words(
            StatusCode::NOT_FOUND,
            "only unsealed data is served: /remote/unsealed/s-t01000-7\n",
        );
    };
    let (hub, headers) = (hub.clone(), headers.clone());
    let found = tokio::task::spawn_blocking(move || find(&*hub, asked, &headers)).await;
    match found {
        Ok(Ok(Some(sent))) => sent,
        Ok(Ok(None)) => words(StatusCode::OK, ""),
        Ok(Err((status, why))) => words(status, &why),
        Err(e) => words(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
    }
}

type No = (StatusCode, String);

/// Opens what is asked for. `None`: it was only asked whether it is there.
fn find(
    hub: &dyn Hub,
    asked: Asked,
    headers: &HeaderMap,
) -> Result<Option<Response<HttpBody>>, No> {
    let (Asked::Bytes(sector) | Asked::Allocated(sector, ..)) = asked;
    let unknown = || {
        (
            StatusCode::NOT_FOUND,
            format!("sector {sector} is not of this hub\n"),
        )
    };
    if sector.miner != hub.miner() {
        return Err(unknown());
    }
    let failed = |e: String| (StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n"));
    let record = hub
        .sector(sector.number)
        .map_err(|e| failed(e.to_string()))?;
    let pieces = record.ok_or_else(unknown)?.sector.pieces;
    let size = hub.sector_size().bytes();
    let not_there = || {
        let why = format!("sector {sector} has no unsealed copy there: SectorsUnsealPiece\n");
        (StatusCode::RANGE_NOT_SATISFIABLE, why)
    };
    let (from, to) = match asked {
        Asked::Bytes(_) => range(headers, size),
        Asked::Allocated(_, from, len) => padded_range(from, len),
    }
    .filter(|(_, to)| *to <= size)
    .ok_or_else(not_there)?;
    let touched = touched(&pieces, from, to);
    if touched.is_empty() {
        return Err(not_there());
    }
    let mut open = Vec::new();
    for p in touched {
        let path = hub.raw_file(&p.piece.cid).ok_or_else(not_there)?;
        let file = File::open(path).map_err(|_| not_there())?;
        open.push(Open {
            at: p.offset / PADDED * RAW,
            file,
            raw_size: p.piece.raw_size,
        });
    }
    if matches!(asked, Asked::Allocated(..)) {
        return Ok(None);
    }
    let part = Part {
        pieces: open,
        from,
        to,
    };
    let (tx, rx) = mpsc::channel(QUEUE);
    let mut reads = JoinSet::new();
    reads.spawn(send(part, tx));
    let whole = !headers.contains_key(RANGE);
    let status = if whole {
        StatusCode::OK
    } else {
        StatusCode::PARTIAL_CONTENT
    };
    let mut response = Response::builder()
        .status(status)
        .header(CONTENT_TYPE, "application/octet-stream")
        .header(CONTENT_LENGTH, to - from);
    if !whole {
        response = response.header(CONTENT_RANGE, format!("bytes {from}-{}/{size}", to - 1));
    }
    response
        .body(HttpBody::new(Feed { rx, _reads: reads }))
        .map(Some)
        .map_err(|e| failed(e.to_string()))
}

/// A range without padding, padded.
fn padded_range(from: u64, len: u64) -> Option<(u64, u64)> {
    let pad = |n: u64| n.div_ceil(RAW).checked_mul(PADDED);
    let begin = (from / RAW).checked_mul(PADDED)?;
    let end = pad(from.checked_add(len)?)?;
    (len > 0).then_some((begin, end))
}

async fn send(mut part: Part, tx: mpsc::Sender<io::Result<Bytes>>) {
    while part.from < part.to {
        let read = tokio::task::spawn_blocking(move || {
            let bytes = part.take_chunk();
            (part, bytes)
        });
        let Ok((rest, bytes)) = read.await else {
            return;
        };
        part = rest;
        let broken = bytes.is_err();
        if tx.send_timeout(bytes, SILENCE).await.is_err() || broken {
            return;
        }
    }
}

/// Bytes that come from a task, which ends with it. It ends early when the length that was promised
/// is not reached, which the connection tells its caller.
struct Feed {
    rx: mpsc::Receiver<io::Result<Bytes>>,
    _reads: JoinSet<()>,
}

impl Body for Feed {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Poller<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.rx
            .poll_recv(cx)
            .map(|next| next.map(|b| b.map(Frame::data)))
    }
}

pub(crate) fn words(status: StatusCode, why: &str) -> Response<HttpBody> {
    let mut response = Response::new(HttpBody::from(why.to_owned()));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_lotus() {
        let sector = SectorId {
            miner: lotus_types::ActorId(1000),
            number: SectorNumber(7),
        };
        for (path, want) in [
            ("/remote/unsealed/s-t01000-7", Some(Asked::Bytes(sector))),
            (
                "/remote/unsealed/s-t01000-7/5/allocated/127/254",
                Some(Asked::Allocated(sector, 127, 254)),
            ),
            ("/remote/sealed/s-t01000-7", None),
            ("/remote/unsealed/s-t01000-7/5/allocated/127", None),
            ("/remote/unsealed/s-t01000-x", None),
            ("/remote/unsealed/../s-t01000-7", None),
            ("/remote/stat/hdd", None),
        ] {
            assert_eq!(parse(path), want, "{path}");
        }
    }

    #[test]
    fn ranges_are_cut_to_what_there_is() {
        for (text, want) in [
            (None, Some((0, 1000))),
            (Some("bytes=0-127"), Some((0, 128))),
            (Some("bytes=128-"), Some((128, 1000))),
            (Some("bytes=900-5000"), Some((900, 1000))),
            (Some("bytes=1000-1001"), None),
            (Some("bytes=5-4"), None),
            (Some("bytes=-5"), None),
            (Some("bytes=0-18446744073709551615"), None),
            (Some("lines=0-1"), None),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(text) = text {
                headers.insert(RANGE, text.parse().unwrap());
            }
            assert_eq!(range(&headers, 1000), want, "{text:?}");
        }
        assert_eq!(padded_range(127, 127), Some((128, 256)));
        assert_eq!(padded_range(0, 0), None);
        assert_eq!(padded_range(u64::MAX, 1), None);
    }

    #[test]
    fn any_range_is_the_padded_data() {
        let dir = tempfile::tempdir().unwrap();
        let raw: Vec<u8> = (0..300u32).map(|i| (i % 251) as u8).collect();
        let path = dir.path().join("piece");
        std::fs::write(&path, &raw).unwrap();
        // A piece of 512 padded bytes in the second half of a kibibyte.
        let mut all = vec![0; 508];
        all.extend_from_slice(&raw);
        all.resize(1016, 0);
        let want = fr32_pad(&all);
        for from in [0u64, 100, 512, 600, 1023] {
            for to in [from + 1, 640, 1024] {
                if to <= from {
                    continue;
                }
                let open = Open {
                    at: 508,
                    file: File::open(&path).unwrap(),
                    raw_size: 300,
                };
                let mut part = Part {
                    pieces: vec![open],
                    from,
                    to,
                };
                let got = part.take_chunk().unwrap();
                let (a, b) = (usize::try_from(from).unwrap(), usize::try_from(to).unwrap());
                assert_eq!(got, want[a..b], "{from} {to}");
            }
        }
    }
}
