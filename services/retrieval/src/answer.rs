//! Answers: refusals with their reason, and the headers that all of them share.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{
    ACCESS_CONTROL_ALLOW_ORIGIN, CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue,
    IF_NONE_MATCH, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, StatusCode};
use lotus_types::Kind;

/// What is named by its hash never changes. Source: the value that Curio sends.
pub(crate) const IMMUTABLE: HeaderValue =
    HeaderValue::from_static("public, max-age=29030400, immutable");

/// Why a request gets no content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) error: String,
    pub(crate) fix: &'static str,
    /// Seconds.
    pub(crate) retry_after: Option<u64>,
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, error: impl Into<String>, fix: &'static str) -> Self {
        Self {
            status,
            error: error.into(),
            fix,
            retry_after: None,
        }
    }

    pub(crate) fn bad(error: impl Into<String>, fix: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error, fix)
    }

    pub(crate) fn not_found(error: impl Into<String>) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            error,
            "ask the network's indexers (IPNI) who has it",
        )
    }

    pub(crate) fn later(status: StatusCode, error: impl Into<String>, seconds: u64) -> Self {
        Self {
            retry_after: Some(seconds),
            ..Self::new(status, error, "ask again later")
        }
    }

    /// The content is here, but cannot be read; `kind` says whose matter that is.
    pub(crate) fn unreadable(kind: Kind, error: impl Into<String>) -> Self {
        let error = error.into();
        tracing::warn!(%kind, error, "content cannot be read");
        if kind.is_retryable() {
            Self::later(StatusCode::SERVICE_UNAVAILABLE, error, 5)
        } else {
            Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                error,
                "tell the provider; nothing is wrong with the request",
            )
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let body = serde_json::json!({ "error": self.error, "fix": self.fix });
        let mut response = Response::new(Body::from(format!("{body}\n")));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        common(headers);
        response
    }
}

/// What every answer carries.
pub(crate) fn common(headers: &mut HeaderMap) {
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
}

/// Sets a header whose text may hold something that no header may; then it is left out.
pub(crate) fn set(headers: &mut HeaderMap, name: HeaderName, text: &str) {
    if let Ok(value) = HeaderValue::from_str(text) {
        headers.insert(name, value);
    }
}

/// Whether the client has this version already. Source: RFC 9110, 13.1.2: weak comparison.
pub(crate) fn has_already(request: &HeaderMap, etag: &str) -> bool {
    let bare = |t: &str| t.trim().trim_start_matches("W/").to_owned();
    let etag = bare(etag);
    request
        .get_all(IF_NONE_MATCH)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .any(|t| t.trim() == "*" || bare(t) == etag)
}
