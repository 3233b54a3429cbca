//! Tells indexers of a new head.

use std::sync::Arc;
use std::time::Duration;

use cid::Cid;
use lotus_runtime::{Backoff, CancellationToken, Fault, http_client};
use lotus_types::Kind;
use reqwest::Url;
use serde_bytes::ByteBuf;

use crate::addr::Multiaddr;
use crate::chain::Chain;

/// Time for one announcement.
const DEADLINE: Duration = Duration::from_secs(20);

/// Checks the configured URLs; a bare host gets the path that indexers listen on.
pub(crate) fn urls(texts: &[String]) -> Result<Vec<Url>, Fault> {
    let read = |text: &String| {
        let mut url = Url::parse(text)
            .ok()
            .filter(|u| matches!(u.scheme(), "http" | "https"))?;
        if url.path() == "/" {
            url.set_path("/announce");
        }
        Some(url)
    };
    let bad = |text: &String| {
        Fault::new(
            Kind::Config,
            format!("indexing.announce_urls: {text:?} is no HTTP URL"),
            "set it to URLs such as https://cid.contact/announce",
        )
    };
    texts
        .iter()
        .map(|t| read(t).ok_or_else(|| bad(t)))
        .collect()
}

/// Announces the present head and each new one to every indexer, until each has it.
pub(crate) async fn run(
    chain: Arc<Chain>,
    publisher: Multiaddr,
    urls: Vec<Url>,
    stop: CancellationToken,
) -> Result<(), Fault> {
    if urls.is_empty() {
        return Ok(());
    }
    let client = client()?;
    let mut heads = chain.watch();
    let mut wait = Backoff::new(Duration::from_secs(1), Duration::from_secs(300));
    loop {
        let head = *heads.borrow_and_update();
        let mut left = if head.is_some() {
            urls.clone()
        } else {
            Vec::new()
        };
        wait.reset();
        // A newer head makes this one's announcement pointless.
        loop {
            if let Some(head) = head {
                let mut failed = Vec::new();
                for url in left {
                    match send(&client, &url, &head, &chain, &publisher).await {
                        Ok(()) => tracing::info!(%head, %url, "advertisement announced"),
                        Err(error) => {
                            tracing::info!(%head, %url, error, "not announced; trying again");
                            failed.push(url);
                        }
                    }
                }
                left = failed;
            }
            let pause = if left.is_empty() {
                Duration::MAX
            } else {
                wait.next()
            };
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                changed = heads.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return Ok(()),
                },
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}

/// A client for announcements.
pub(crate) fn client() -> Result<reqwest::Client, Fault> {
    http_client().timeout(DEADLINE).build().map_err(|e| {
        Fault::new(
            Kind::Fatal,
            format!("no HTTP client: {e}"),
            "check the TLS setup",
        )
    })
}

/// Tells an indexer of an advertisement, and where it is.
/// Source: ipni/go-libipni, `announce/message`: the CBOR tuple of CID, addresses, extra data.
pub(crate) async fn send(
    client: &reqwest::Client,
    url: &Url,
    head: &Cid,
    chain: &Chain,
    publisher: &Multiaddr,
) -> Result<(), String> {
    let addr = publisher.of_peer(&chain.key.public().to_peer_id().to_bytes());
    let message = (head, [ByteBuf::from(addr)], ByteBuf::new());
    let body = serde_ipld_dagcbor::to_vec(&message).map_err(|e| e.to_string())?;
    let request = client
        .put(url.clone())
        .header(http::header::CONTENT_TYPE, "application/octet-stream")
        .body(body);
    let answer = request.send().await.map_err(|e| e.to_string())?;
    match answer.status().as_u16() {
        200 | 202 | 204 => Ok(()),
        status => Err(format!("HTTP status {status}")),
    }
}
