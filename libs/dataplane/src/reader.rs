use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::CONTENT_LENGTH;
use http::{Method, StatusCode};
use http_body_util::{BodyExt as _, Limited};

use crate::far::WHERE;
use crate::serve::read_exact_at;
use crate::{DataError, Far, fetch_fd};

/// The bytes behind a token, by descriptor or by HTTP ranges.
#[derive(Clone, Debug)]
pub struct PieceReader {
    len: u64,
    bytes: Source,
}

#[derive(Clone, Debug)]
enum Source {
    File(Arc<File>),
    Far {
        far: Far,
        token: String,
        deadline: Duration,
    },
}

/// Where the bytes of leases are.
#[derive(Clone, Debug)]
pub enum Plane {
    /// Behind a socket of this host.
    Socket(PathBuf),
    /// On another host.
    Far(Far),
}

impl PieceReader {
    /// Opens what a lease's `token` names. Each step takes at most `deadline`.
    pub async fn open(plane: &Plane, token: &str, deadline: Duration) -> Result<Self, DataError> {
        let far = match plane {
            Plane::Socket(socket) => {
                let (file, len) = fetch_fd(socket, token, deadline).await?;
                return Ok(Self::from_file(file, len));
            }
            Plane::Far(far) => far,
        };
        let answer = far.ask(Method::HEAD, token, None, deadline).await?;
        let len = answer
            .response
            .headers()
            .get(CONTENT_LENGTH)
            .and_then(|v| v.to_str().ok()?.parse().ok())
            .ok_or_else(|| broken("no content-length"))?;
        Ok(Self {
            len,
            bytes: Source::Far {
                far: far.clone(),
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
            Source::Far { .. } => None,
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
            Source::Far {
                far,
                token,
                deadline,
            } => {
                let range = format!("bytes={offset}-{}", end - 1);
                let asked = far.ask(Method::GET, token, Some(&range), *deadline).await?;
                let status = asked.response.status();
                if status != StatusCode::PARTIAL_CONTENT && (offset, len) != (0, self.len) {
                    return Err(broken(format!("HTTP status {status} to a range")));
                }
                // No more than asked for, so that a wrong server cannot fill our memory.
                let most = usize::try_from(len).unwrap_or(usize::MAX);
                let mut body = Limited::new(asked.response.into_body(), most);
                let mut bytes = BytesMut::new();
                loop {
                    let frame = tokio::time::timeout(*deadline, body.frame()).await;
                    let frame = frame.map_err(|_| DataError::Silent {
                        at: WHERE.into(),
                        after: *deadline,
                    })?;
                    let Some(frame) = frame else { break };
                    let frame = frame.map_err(|e| DataError::Unreachable {
                        at: WHERE.into(),
                        why: e.to_string(),
                    })?;
                    if let Ok(chunk) = frame.into_data() {
                        bytes.extend_from_slice(&chunk);
                    }
                }
                if bytes.len() as u64 != len {
                    return Err(broken(format!("{} bytes, asked for {len}", bytes.len())));
                }
                Ok(bytes.freeze())
            }
        }
    }
}

fn broken(what: impl Into<String>) -> DataError {
    DataError::Protocol {
        at: WHERE.into(),
        what: what.into(),
    }
}
