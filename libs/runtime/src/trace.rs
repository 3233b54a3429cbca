//! One trace over client, spoke, hub and worker: the W3C `traceparent` on every hop.

use std::collections::HashMap;

use opentelemetry::Context;
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::metadata::{MetadataMap, MetadataValue};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Name of the HTTP header and of the gRPC metadata key.
pub const HEADER: &str = "traceparent";

/// The current span's context; empty when there is none.
#[must_use]
pub fn current() -> String {
    of(&Span::current())
}

/// The context of a span; empty when it is not recorded.
#[must_use]
pub fn of(span: &Span) -> String {
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&span.context(), &mut carrier);
    carrier.remove(HEADER).unwrap_or_default()
}

/// Makes `span` a child of the remote context; a text that is none is ignored.
pub fn set_parent(span: &Span, traceparent: &str) {
    if let Some(parent) = remote(traceparent)
        && let Err(e) = span.set_parent(parent)
    {
        tracing::debug!(?e, "trace context not taken over");
    }
}

/// Links `span` to a remote context that it also works for; a text that is none is ignored.
pub fn link(span: &Span, traceparent: &str) {
    if let Some(other) = remote(traceparent) {
        span.add_link(other.span().span_context().clone());
    }
}

fn remote(traceparent: &str) -> Option<Context> {
    // Longer ones are junk: version 00 has 55 characters.
    if traceparent.is_empty() || traceparent.len() > 128 {
        return None;
    }
    let carrier = HashMap::from([(HEADER.to_owned(), traceparent.to_owned())]);
    Some(TraceContextPropagator::new().extract(&carrier))
}

/// The trace id (32 hex digits) in a `traceparent`.
#[must_use]
pub fn id(traceparent: &str) -> Option<&str> {
    traceparent.split('-').nth(1).filter(|id| id.len() == 32)
}

/// gRPC client interceptor that sends the current context.
pub fn client_interceptor(
    mut request: tonic::Request<()>,
) -> Result<tonic::Request<()>, tonic::Status> {
    if let Ok(value) = MetadataValue::try_from(current())
        && !value.is_empty()
    {
        request.metadata_mut().insert(HEADER, value);
    }
    Ok(request)
}

/// The context that a gRPC caller sent; empty when none.
#[must_use]
pub fn from_metadata(metadata: &MetadataMap) -> String {
    metadata
        .get(HEADER)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default()
        .to_owned()
}

/// The context that an HTTP caller sent; empty when none.
#[must_use]
pub fn from_headers(headers: &http::HeaderMap) -> String {
    headers
        .get(HEADER)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default()
        .to_owned()
}
