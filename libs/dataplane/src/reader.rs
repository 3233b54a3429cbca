use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, RANGE};

use crate::serve::read_exact_at;
use crate::{DataError, fetch_fd, http_client};

/// The bytes behind a token, by descriptor or by HTTP ranges.
#[derive(Clone, Debug)]
pub struct PieceReader {
    len: u64,
    bytes: Source,
}

#[derive(Clone, Debug)]
enum Source {
    File(Arc<File>),
    Http {
        client: reqwest::Client,
        url: String,
        token: String,
        deadline: Duration,
    },
}

impl PieceReader {
    /// Opens what a lease's `token` names: on the hub's data socket when there is one on this
    /// host, else on its data URL. Each step takes at most `deadline`.
    pub async fn open(
        data_socket: &str,
        data_url: &str,
        token: &str,
        deadline: Duration,
    ) -> Result<Self, DataError> {
        if !data_socket.is_empty() {
            let (file, len) = fetch_fd(Path::new(data_socket), token, deadline).await?;
            return Ok(Self {
                len,
                bytes: Source::File(Arc::new(file)),
            });
        }
        let url = format!("{}/data/v1", data_url.trim_end_matches('/'));
        if data_url.is_empty() {
            return Err(DataError::Unreachable {
                at: "the hub's data plane".into(),
                why: "it serves neither a socket on this host nor a URL ([data] listen)".into(),
            });
        }
        let client = http_client(deadline)?;
        let request = client
            .head(&url)
            .header(AUTHORIZATION, format!("Bearer {token}"));
        let response = send(request, &url, deadline).await?;
        if response.status() != StatusCode::OK {
            return Err(DataError::UnknownToken { at: url });
        }
        let len = response
            .headers()
            .get(CONTENT_LENGTH)
            .and_then(|v| v.to_str().ok()?.parse().ok())
            .ok_or_else(|| DataError::Protocol {
                at: url.clone(),
                what: "no content-length".into(),
            })?;
        Ok(Self {
            len,
            bytes: Source::Http {
                client,
                url,
                token: token.into(),
                deadline,
            },
        })
    }

    /// A reader over a local file of which `len` bytes are meant.
    #[must_use]
    pub fn from_file(file: File, len: u64) -> Self {
        Self {
            len,
            bytes: Source::File(Arc::new(file)),
        }
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The descriptor, when the bytes are on this host. Read it with positions only.
    #[must_use]
    pub fn file(&self) -> Option<&Arc<File>> {
        match &self.bytes {
            Source::File(f) => Some(f),
            Source::Http { .. } => None,
        }
    }

    /// Exactly `len` bytes from `offset`.
    pub async fn read_at(&self, offset: u64, len: u64) -> Result<Bytes, DataError> {
        let end = offset.saturating_add(len);
        if end > self.len {
            return Err(DataError::OutOfRange {
                offset,
                end,
                len: self.len,
            });
        }
        if len == 0 {
            return Ok(Bytes::new());
        }
        match &self.bytes {
            Source::File(file) => {
                let file = file.clone();
                tokio::task::spawn_blocking(move || read_exact_at(&file, offset, len))
                    .await
                    .map_err(|_| DataError::Stopped)?
                    .map_err(DataError::io("read of a leased piece"))
            }
            Source::Http {
                client,
                url,
                token,
                deadline,
            } => {
                let request = client
                    .get(url)
                    .header(AUTHORIZATION, format!("Bearer {token}"))
                    .header(RANGE, format!("bytes={offset}-{}", end - 1));
                let mut response = send(request, url, *deadline).await?;
                match response.status() {
                    StatusCode::PARTIAL_CONTENT => {}
                    StatusCode::OK if offset == 0 && len == self.len => {}
                    StatusCode::NOT_FOUND => {
                        return Err(DataError::UnknownToken { at: url.clone() });
                    }
                    s => {
                        return Err(DataError::Protocol {
                            at: url.clone(),
                            what: format!("HTTP status {s}"),
                        });
                    }
                }
                // Chunk by chunk, so that a wrong server cannot fill our memory.
                let mut bytes = Vec::new();
                loop {
                    let chunk = tokio::time::timeout(*deadline, response.chunk())
                        .await
                        .map_err(|_| DataError::Silent {
                            at: url.clone(),
                            after: *deadline,
                        })?
                        .map_err(|e| DataError::Unreachable {
                            at: url.clone(),
                            why: e.to_string(),
                        })?;
                    match chunk {
                        Some(c) if (bytes.len() + c.len()) as u64 <= len => {
                            bytes.extend_from_slice(&c)
                        }
                        None if bytes.len() as u64 == len => return Ok(bytes.into()),
                        _ => {
                            return Err(DataError::Protocol {
                                at: url.clone(),
                                what: format!("another number of bytes than the {len} asked for"),
                            });
                        }
                    }
                }
            }
        }
    }
}

async fn send(
    request: reqwest::RequestBuilder,
    url: &str,
    deadline: Duration,
) -> Result<reqwest::Response, DataError> {
    tokio::time::timeout(deadline, request.send())
        .await
        .map_err(|_| DataError::Silent {
            at: url.into(),
            after: deadline,
        })?
        .map_err(|e| DataError::Unreachable {
            at: url.into(),
            why: e.to_string(),
        })
}
