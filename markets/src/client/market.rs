//! Requests to a provider's deal service: signed, traced, and tried again while that helps.

use std::path::Path;
use std::time::{Duration, Instant};

use futures::TryStreamExt as _;
use lotus_deals::mk20::{BASE, Deal, Refusal, StatusResponse};
use lotus_runtime::{Backoff, trace};
use reqwest::{Method, Response, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio_util::io::ReaderStream;
use ulid::Ulid;

use super::files::bytes_bar;
use super::key::ClientKey;
use super::{ClientError, Who};

/// Longest time for one request that carries no piece.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest silence on a connection that carries one.
const IDLE: Duration = Duration::from_secs(120);

/// What a provider says of itself.
#[derive(Debug, Deserialize)]
pub(crate) struct Offer {
    /// Its actor id; absent on services other than ours.
    #[serde(default)]
    pub(crate) provider: Option<String>,
}

/// A provider's deal service.
pub(crate) struct Market {
    base: Url,
    http: reqwest::Client,
    pub(crate) key: ClientKey,
    patience: Duration,
}

/// What a request carries.
#[derive(Clone, Copy)]
enum Body<'a> {
    None,
    Json(&'a Deal),
    File(&'a Path, u64),
}

pub(crate) fn http_client() -> Result<reqwest::Client, ClientError> {
    reqwest::Client::builder()
        .connect_timeout(Duration::from_secs(10))
        .read_timeout(IDLE)
        .build()
        .map_err(|e| ClientError::Unreachable {
            url: "the HTTP client".into(),
            why: e.to_string(),
        })
}

/// The base of a service, without a slash at the end.
pub(crate) fn base_url(text: &str) -> Result<Url, ClientError> {
    let with_scheme = if text.contains("://") {
        text.to_owned()
    } else {
        format!("http://{text}")
    };
    Url::parse(with_scheme.trim_end_matches('/'))
        .ok()
        .filter(|u| u.has_host() && matches!(u.scheme(), "http" | "https"))
        .ok_or_else(|| ClientError::Argument {
            given: text.into(),
            wanted: "a URL such as http://host:7780",
        })
}

pub(crate) fn lost(url: &Url, e: &reqwest::Error) -> ClientError {
    let mut why = e.to_string();
    let mut at: &dyn std::error::Error = e;
    while let Some(next) = at.source() {
        why = next.to_string();
        at = next;
    }
    ClientError::Unreachable {
        url: url.to_string(),
        why,
    }
}

impl Market {
    pub(crate) fn new(who: &Who) -> Result<Self, ClientError> {
        Ok(Self {
            base: base_url(&who.provider_url)?,
            http: http_client()?,
            key: ClientKey::load_or_make(who.key.as_deref())?,
            patience: Duration::from_secs(who.patience_secs),
        })
    }

    pub(crate) async fn offer(&self) -> Result<Offer, ClientError> {
        self.json(Method::GET, "/products", Body::None).await
    }

    /// Proposes. The same deal again does no harm.
    pub(crate) async fn propose(&self, deal: &Deal) -> Result<(), ClientError> {
        self.again(Method::POST, "/deal", Body::Json(deal))
            .await
            .map(drop)
    }

    pub(crate) async fn status(&self, id: Ulid) -> Result<StatusResponse, ClientError> {
        self.json(Method::GET, &format!("/status/{id}"), Body::None)
            .await
    }

    /// Sends the bytes and finishes the upload. A provider that has them already is content.
    pub(crate) async fn upload(&self, id: Ulid, file: &Path, len: u64) -> Result<(), ClientError> {
        let path = format!("/upload/{id}");
        match self.again(Method::PUT, &path, Body::File(file, len)).await {
            // The bytes came through an earlier attempt whose answer was lost.
            Err(ClientError::Refused(r)) if r.code == 409 && self.has_bytes(id).await? => {}
            other => drop(other?),
        }
        self.again(Method::POST, &path, Body::None).await.map(drop)
    }

    async fn has_bytes(&self, id: Ulid) -> Result<bool, ClientError> {
        let d = self.status(id).await?;
        Ok(d.ddo_v1.status != "failed" && d.deal.received_bytes == d.deal.raw_size)
    }

    async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Body<'_>,
    ) -> Result<T, ClientError> {
        let answer = self.again(method, path, body).await?;
        let url = answer.url().clone();
        let bytes = answer.bytes().await.map_err(|e| lost(&url, &e))?;
        serde_json::from_slice(&bytes).map_err(|e| ClientError::Answer {
            url: url.to_string(),
            why: e.to_string(),
        })
    }

    /// One request, tried again as long as that helps and patience lasts.
    async fn again(
        &self,
        method: Method,
        path: &str,
        body: Body<'_>,
    ) -> Result<Response, ClientError> {
        let began = Instant::now();
        let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(10));
        loop {
            let e = match self.once(method.clone(), path, body).await {
                Ok(answer) => return Ok(answer),
                Err(e) => e,
            };
            let wait = e.retry_after().unwrap_or_else(|| backoff.next());
            if !e.kind().is_retryable() || began.elapsed() + wait > self.patience {
                return Err(e);
            }
            tracing::info!(%e, ?wait, "trying again");
            tokio::time::sleep(wait).await;
        }
    }

    async fn once(
        &self,
        method: Method,
        path: &str,
        body: Body<'_>,
    ) -> Result<Response, ClientError> {
        let mut url = self.base.clone();
        url.set_path(&format!(
            "{}{BASE}{path}",
            self.base.path().trim_end_matches('/')
        ));
        let auth = self
            .key
            .header(method.as_str(), url.path())
            .unwrap_or_default();
        let mut request = self
            .http
            .request(method, url.clone())
            .header("authorization", auth);
        let trace = trace::current();
        if !trace.is_empty() {
            request = request.header(trace::HEADER, trace);
        }
        let request = match body {
            Body::None => request.timeout(CALL_TIMEOUT),
            Body::Json(deal) => request.timeout(CALL_TIMEOUT).json(deal),
            Body::File(file, len) => {
                let opened = tokio::fs::File::open(file)
                    .await
                    .map_err(ClientError::file(file))?;
                let bar = bytes_bar(len, "upload");
                let stream = ReaderStream::with_capacity(opened, 256 << 10)
                    .inspect_ok(move |chunk| bar.inc(chunk.len() as u64));
                request
                    .header("content-type", "application/octet-stream")
                    .header("content-length", len)
                    .body(reqwest::Body::wrap_stream(stream))
            }
        };
        let answer = request.send().await.map_err(|e| lost(&url, &e))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let text = answer.text().await.unwrap_or_default();
        Err(match serde_json::from_str::<Refusal>(&text) {
            Ok(refusal) => ClientError::Refused(refusal),
            Err(_) => ClientError::Http {
                url: url.to_string(),
                status: status.as_u16(),
                text: text.chars().take(200).collect(),
            },
        })
    }
}
