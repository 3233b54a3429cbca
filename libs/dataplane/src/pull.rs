use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_RANGE, ETAG, IF_RANGE, RANGE};
use http::{HeaderMap, HeaderName, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Body;
use lotus_types::Kind;
use tokio::sync::mpsc;

use crate::DataError;

/// A ranged GET that can go on where an earlier one stopped.
#[derive(Clone, Debug)]
pub struct HttpPull {
    /// Where. For [`Far::pull`](crate::Far::pull), what it is called.
    pub url: String,
    /// Headers to send, such as `authorization`.
    pub headers: HashMap<String, String>,
    /// First byte wanted.
    pub from: u64,
    /// Bytes that the whole resource has at most. One more is [`DataError::TooLong`].
    pub limit: u64,
    /// Longest silence before the answer and between two reads.
    pub idle: Duration,
    /// ETag of the earlier part: the server refuses to continue another content.
    pub etag: Option<String>,
}

/// What a finished pull knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// End of the bytes delivered, counted from the start of the resource.
    pub end: u64,
    /// The resource's ETag, to resume with.
    pub etag: Option<String>,
}

/// A client for the data plane: no redirects, connects within `connect`.
pub fn http_client(connect: Duration) -> Result<reqwest::Client, DataError> {
    build(builder(connect))
}

/// A client whose every connection goes to a Unix socket on this host.
pub fn http_client_on(socket: &Path, connect: Duration) -> Result<reqwest::Client, DataError> {
    build(builder(connect).unix_socket(socket))
}

fn builder(connect: Duration) -> reqwest::ClientBuilder {
    // Already installed by another part of the process: just as good.
    drop(rustls::crypto::ring::default_provider().install_default());
    reqwest::Client::builder()
        .connect_timeout(connect)
        .redirect(reqwest::redirect::Policy::none())
}

fn build(builder: reqwest::ClientBuilder) -> Result<reqwest::Client, DataError> {
    builder.build().map_err(|e| DataError::Unreachable {
        at: "the HTTP client".into(),
        why: e.to_string(),
    })
}

/// Pulls `pull.url` from byte `pull.from` to its end into `sink`, waiting while the sink is full.
/// On an error the bytes already sent are good: resume at their end.
pub async fn pull_http(
    client: &reqwest::Client,
    pull: &HttpPull,
    sink: &mpsc::Sender<Bytes>,
) -> Result<Pulled, DataError> {
    let mut request = client.get(&pull.url);
    for (name, value) in &pull.headers {
        request = request.header(name, value);
    }
    for (name, value) in pull.resumed() {
        request = request.header(name, value);
    }
    let response = tokio::time::timeout(pull.idle, request.send())
        .await
        .map_err(|_| pull.silent())?
        .map_err(|e| lost(pull, &e))?;
    receive(response.into(), pull, sink).await
}

impl HttpPull {
    /// The headers that ask for the rest.
    pub(crate) fn resumed(&self) -> impl Iterator<Item = (HeaderName, String)> {
        let rest = (self.from > 0).then(|| format!("bytes={}-", self.from));
        let same = self.etag.clone().filter(|_| self.from > 0);
        let range = rest.map(|r| (RANGE, r));
        range.into_iter().chain(same.map(|tag| (IF_RANGE, tag)))
    }

    fn silent(&self) -> DataError {
        DataError::Silent {
            at: self.url.clone(),
            after: self.idle,
        }
    }
}

/// Sends the bytes of an answer to the sink.
pub(crate) async fn receive<B>(
    response: Response<B>,
    pull: &HttpPull,
    sink: &mpsc::Sender<Bytes>,
) -> Result<Pulled, DataError>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::error::Error,
{
    let at = || pull.url.clone();
    let etag = header(response.headers(), ETAG.as_str());
    if let (Some(old), Some(new)) = (&pull.etag, &etag)
        && old != new
    {
        return Err(DataError::Changed { at: at() });
    }

    // Bytes of the answer that the caller has already.
    let mut skip = match response.status() {
        StatusCode::OK => pull.from,
        StatusCode::PARTIAL_CONTENT => {
            let range = header(response.headers(), CONTENT_RANGE.as_str());
            match range.as_deref().and_then(range_start) {
                Some(start) if start <= pull.from => pull.from - start,
                _ => {
                    return Err(DataError::Protocol {
                        at: at(),
                        what: format!("asked for bytes {}-, got {range:?}", pull.from),
                    });
                }
            }
        }
        // Everything was here already.
        StatusCode::RANGE_NOT_SATISFIABLE if pull.from > 0 => {
            let range = header(response.headers(), CONTENT_RANGE.as_str());
            let total = range
                .as_deref()
                .and_then(|r| r.strip_prefix("bytes */")?.parse().ok());
            return if total == Some(pull.from) {
                Ok(Pulled {
                    end: pull.from,
                    etag,
                })
            } else {
                Err(DataError::Changed { at: at() })
            };
        }
        StatusCode::NOT_FOUND
        | StatusCode::GONE
        | StatusCode::UNAUTHORIZED
        | StatusCode::FORBIDDEN => {
            return Err(DataError::UnknownToken { at: at() });
        }
        status => {
            let passing = status.is_server_error()
                || matches!(
                    status,
                    StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT
                );
            return Err(DataError::Refused {
                at: at(),
                kind: if passing { Kind::Transport } else { Kind::Data },
                message: format!("HTTP status {status}"),
            });
        }
    };

    let mut end = pull.from;
    let mut body = response.into_body();
    loop {
        let frame = tokio::time::timeout(pull.idle, body.frame())
            .await
            .map_err(|_| pull.silent())?
            .transpose()
            .map_err(|e| lost(pull, &e))?;
        let Some(frame) = frame else {
            return Ok(Pulled { end, etag });
        };
        // Trailers are of no interest.
        let Ok(mut chunk) = frame.into_data() else {
            continue;
        };
        let dropped = usize::try_from(skip).unwrap_or(usize::MAX).min(chunk.len());
        skip -= dropped as u64;
        let chunk = chunk.split_off(dropped);
        if chunk.is_empty() {
            continue;
        }
        end = end.saturating_add(chunk.len() as u64);
        if end > pull.limit {
            return Err(DataError::TooLong {
                at: at(),
                limit: pull.limit,
            });
        }
        sink.send(chunk).await.map_err(|_| DataError::Stopped)?;
    }
}

fn lost(pull: &HttpPull, e: &impl std::error::Error) -> DataError {
    DataError::Unreachable {
        at: pull.url.clone(),
        why: e
            .source()
            .map_or_else(|| e.to_string(), |s| format!("{e}: {s}")),
    }
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.into())
}

/// `bytes 5-9/10` starts at 5.
fn range_start(s: &str) -> Option<u64> {
    s.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}
