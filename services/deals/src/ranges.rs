//! Downloads in several ranges at a time. The bytes are checked in order, so ranges that come too
//! early wait in memory: as many as are fetched at once, each of a fixed size.

use std::num::NonZeroU16;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, stream};
use http::StatusCode;
use http::header::{CONTENT_RANGE, ETAG, IF_RANGE, RANGE};
use lotus_dataplane::{DataError, HttpPull, Pulled, pull_http};
use tokio::sync::mpsc;

/// Bytes of one range.
const RANGE_BYTES: u64 = 4 << 20;
/// Bytes that are sent on at a time: the sink's queue is made for pieces as a socket gives them.
const STEP: usize = 128 << 10;

/// One range, and the resource's ETag.
struct Part {
    bytes: Bytes,
    etag: Option<String>,
}

/// Pulls as [`pull_http`] does, with several ranges at a time where the server gives ranges. On an
/// error the bytes already sent are good: resume at their end.
pub(crate) async fn pull(
    client: &reqwest::Client,
    pull: &HttpPull,
    at_once: NonZeroU16,
    sink: &mpsc::Sender<Bytes>,
) -> Result<Pulled, DataError> {
    let whole = pull.limit.saturating_sub(pull.from);
    if at_once.get() == 1 || whole <= RANGE_BYTES {
        return pull_http(client, pull, sink).await;
    }
    // The first range shows whether there are ranges. Whatever else comes is told apart by the
    // plain download.
    let Ok(first) = part(client, pull, pull.from, pull.etag.as_deref()).await else {
        return pull_http(client, pull, sink).await;
    };
    let etag = first.etag.clone();
    let mut end = pull.from + first.bytes.len() as u64;
    give(first.bytes, sink).await?;
    let step = usize::try_from(RANGE_BYTES).unwrap_or(usize::MAX);
    let rest = (end..pull.limit).step_by(step);
    let mut parts = stream::iter(rest)
        .map(|from| part(client, pull, from, etag.as_deref()))
        .buffered(at_once.get().into());
    while let Some(next) = parts.next().await {
        let next = next?;
        if next.etag != etag {
            return Err(DataError::Changed {
                at: pull.url.clone(),
            });
        }
        end += next.bytes.len() as u64;
        give(next.bytes, sink).await?;
    }
    Ok(Pulled {
        end,
        etag: etag.clone(),
    })
}

async fn give(mut bytes: Bytes, sink: &mpsc::Sender<Bytes>) -> Result<(), DataError> {
    while !bytes.is_empty() {
        let step = bytes.split_to(STEP.min(bytes.len()));
        sink.send(step).await.map_err(|_| DataError::Stopped)?;
    }
    Ok(())
}

/// The range from this byte on: exactly that, or an error.
async fn part(
    client: &reqwest::Client,
    pull: &HttpPull,
    from: u64,
    etag: Option<&str>,
) -> Result<Part, DataError> {
    let broken = |why: String| DataError::Unreachable {
        at: pull.url.clone(),
        why,
    };
    let silent = |_| DataError::Silent {
        at: pull.url.clone(),
        after: pull.idle,
    };
    let len = RANGE_BYTES.min(pull.limit - from);
    let mut request = client
        .get(&pull.url)
        .header(RANGE, format!("bytes={from}-{}", from + len - 1));
    for (name, value) in &pull.headers {
        request = request.header(name, value);
    }
    // With a weak one a server must send everything (RFC 9110, 13.1.5); it is compared all the same.
    if let Some(etag) = etag.filter(|e| !e.starts_with("W/")) {
        request = request.header(IF_RANGE, etag);
    }
    let sent = tokio::time::timeout(pull.idle, request.send()).await;
    let mut response = sent
        .map_err(silent)?
        .map_err(|e| broken(e.without_url().to_string()))?;
    let status = response.status();
    let header = |name| response.headers().get(name)?.to_str().ok();
    let given = header(CONTENT_RANGE).unwrap_or_default();
    let wanted = format!("bytes {from}-{}/{}", from + len - 1, pull.limit);
    if status != StatusCode::PARTIAL_CONTENT || given != wanted {
        return Err(broken(format!(
            "asked for {wanted}, got status {status} and {given:?}"
        )));
    }
    let etag = header(ETAG).map(str::to_owned);
    let mut bytes = BytesMut::new();
    loop {
        let more = tokio::time::timeout(pull.idle, response.chunk()).await;
        let more = more
            .map_err(silent)?
            .map_err(|e| broken(e.without_url().to_string()))?;
        let Some(more) = more else { break };
        if bytes.len() as u64 + more.len() as u64 > len {
            return Err(broken(format!("more than the {len} bytes of a range came")));
        }
        bytes.extend_from_slice(&more);
    }
    if bytes.len() as u64 != len {
        return Err(broken(format!(
            "{} of the {len} bytes of a range came",
            bytes.len()
        )));
    }
    Ok(Part {
        bytes: bytes.freeze(),
        etag,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::task::JoinSet;

    use super::*;

    /// How a server behaves.
    #[derive(Clone, Copy, PartialEq)]
    enum Server {
        Ranges,
        /// Has a weak ETag, and so gives everything when it is asked for a range under it.
        Weak,
        /// Knows no ranges.
        Whole,
        /// Breaks the connection of the third range.
        Breaks,
        /// Has other contents from the third range on.
        Changes,
    }

    async fn answer(mut s: TcpStream, data: Arc<Vec<u8>>, kind: Server, seen: Arc<AtomicUsize>) {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(s.read_u8().await.unwrap());
        }
        let nth = seen.fetch_add(1, Ordering::SeqCst);
        let text = String::from_utf8(request).unwrap().to_ascii_lowercase();
        let range = text.split("range: bytes=").nth(1).map(|r| {
            let (from, to) = r.lines().next().unwrap().split_once('-').unwrap();
            (from.parse::<usize>().unwrap(), to.parse::<usize>().unwrap())
        });
        let all = data.len();
        let (head, body) = match range {
            Some((from, to))
                if kind != Server::Whole
                    && (kind != Server::Weak || !text.contains("if-range")) =>
            {
                let tag = match kind {
                    Server::Changes if nth >= 2 => "\"b\"",
                    Server::Weak => "W/\"a\"",
                    _ => "\"a\"",
                };
                let head = format!(
                    "HTTP/1.1 206 P\r\ncontent-range: bytes {from}-{to}/{all}\r\netag: {tag}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    to - from + 1
                );
                (head, &data[from..=to])
            }
            _ => {
                let head = format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {all}\r\nconnection: close\r\n\r\n"
                );
                (head, &data[..])
            }
        };
        let body = if kind == Server::Breaks && nth == 2 {
            &body[..body.len() / 2]
        } else {
            body
        };
        // The client may have gone: it has seen enough.
        drop(s.write_all(head.as_bytes()).await);
        drop(s.write_all(body).await);
        drop(s.shutdown().await);
    }

    /// What a pull of 4.5 ranges gives and delivers, and how many requests it took.
    async fn run(kind: Server) -> (Result<Pulled, DataError>, Vec<u8>, usize, Vec<u8>) {
        let len = usize::try_from(RANGE_BYTES).unwrap() * 9 / 2;
        let data: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let data = Arc::new(data);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let seen = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        let (served, counted) = (data.clone(), seen.clone());
        tasks.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let (s, _) = listener.accept().await.unwrap();
                open.spawn(answer(s, served.clone(), kind, counted.clone()));
            }
        });
        let wanted = HttpPull {
            url: format!("http://{at}/x"),
            headers: HashMap::new(),
            from: 0,
            limit: data.len() as u64,
            idle: Duration::from_secs(20),
            etag: None,
        };
        let client = crate::source::client(true).unwrap();
        let (sink, mut chunks) = mpsc::channel::<Bytes>(4);
        let taking = async {
            let mut got = Vec::new();
            while let Some(chunk) = chunks.recv().await {
                got.extend_from_slice(&chunk);
            }
            got
        };
        let pulled = async move {
            let out = pull(&client, &wanted, NonZeroU16::new(4).unwrap(), &sink).await;
            drop(sink);
            out
        };
        let (out, got) = tokio::join!(pulled, taking);
        (out, got, seen.load(Ordering::SeqCst), data.to_vec())
    }

    #[tokio::test]
    async fn ranges_come_in_order_whatever_the_server_does() {
        for kind in [Server::Ranges, Server::Weak] {
            let (out, got, requests, data) = run(kind).await;
            assert_eq!(out.unwrap().end, data.len() as u64);
            assert!(got == data, "the same bytes");
            assert_eq!(requests, 5);
        }
        let (out, got, requests, data) = run(Server::Whole).await;
        assert_eq!(out.unwrap().end, data.len() as u64);
        assert!(got == data, "the same bytes");
        assert_eq!(requests, 2, "one to see that it has no ranges");
        let (out, got, _, data) = run(Server::Breaks).await;
        assert!(matches!(out, Err(DataError::Unreachable { .. })), "{out:?}");
        assert!(
            !got.is_empty() && data.starts_with(&got),
            "a good beginning"
        );
        let (out, got, _, data) = run(Server::Changes).await;
        assert!(matches!(out, Err(DataError::Changed { .. })), "{out:?}");
        assert!(
            !got.is_empty() && data.starts_with(&got),
            "a good beginning"
        );
    }
}
