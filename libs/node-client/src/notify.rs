//! `ChainNotify`: a Lotus channel subscription over a WebSocket of its own.
//!
//! Lotus answers the call with a channel id, sends items as notifications `xrpc.ch.val` with
//! `[id, item]`, and ends with `xrpc.ch.close`, also when the reader is 16 items behind. The RPC
//! library takes the items for those of a subscription, but ignores the close; the receiver below
//! turns it into the end of the connection, which here carries nothing else.

use std::sync::Arc;

use futures::stream::{self, StreamExt};
use jsonrpsee::client_transport::ws::{WsHandshakeError, WsTransportClientBuilder};
use jsonrpsee::core::client::{
    ReceivedMessage, Subscription, SubscriptionClientT, TransportReceiverT,
};
use jsonrpsee::ws_client::{PingConfig, WsClientBuilder};

use crate::api::HeadChange;
use crate::client::{CONNECT, Conn, MAX_ANSWER, Params, auth_header, classify};
use crate::{Client, HeadChanges, NodeError};

/// Items that may wait for the reader before the subscription is given up.
const MAX_UNREAD: usize = 1024;
const METHOD: &str = "ChainNotify";

impl Client {
    pub(crate) async fn subscribe_heads(&self) -> Result<HeadChanges, NodeError> {
        match self.subscribe_once().await {
            Err(NodeError::Transport { .. } | NodeError::Auth { .. }) => {
                self.look_again();
                self.subscribe_once().await
            }
            other => other,
        }
    }

    async fn subscribe_once(&self) -> Result<HeadChanges, NodeError> {
        let conn = self.conn()?;
        let waited = self.call_timeout();
        match tokio::time::timeout(waited, open(conn.clone())).await {
            Ok(r) => r,
            Err(_) => Err(NodeError::Timeout {
                endpoint: conn.endpoint.to_string(),
                method: METHOD.into(),
                waited,
            }),
        }
    }
}

async fn open(conn: Arc<Conn>) -> Result<HeadChanges, NodeError> {
    let broken = |why: String| NodeError::Transport {
        endpoint: conn.endpoint.to_string(),
        method: METHOD.into(),
        why,
    };
    let (sender, receiver) = WsTransportClientBuilder {
        max_response_size: MAX_ANSWER,
        connection_timeout: CONNECT,
        headers: auth_header(&conn.endpoint)?,
        ..Default::default()
    }
    .build(conn.endpoint.ws())
    .await
    .map_err(|e| match e {
        WsHandshakeError::Rejected {
            status_code: code @ (401 | 403),
        } => NodeError::Auth {
            endpoint: conn.endpoint.to_string(),
            why: format!("HTTP status {code}"),
        },
        e => broken(e.to_string()),
    })?;
    let client = WsClientBuilder::default()
        .max_buffer_capacity_per_subscription(MAX_UNREAD)
        .enable_ws_ping(PingConfig::default())
        .build_with_transport(sender, UntilClose(receiver));
    let sub: Subscription<Vec<HeadChange>> = client
        .subscribe("Filecoin.ChainNotify", Params(vec![]), "xrpc.cancel")
        .await
        .map_err(|e| classify(&conn.endpoint, METHOD, e))?;
    let ended = broken("the node closed the subscription".into());
    // The client lives in the stream: dropping it closes the connection.
    let items = stream::unfold(Some((sub, client)), move |state| {
        let ended = ended.clone();
        async move {
            let (mut sub, client) = state?;
            match sub.next().await {
                Some(Ok(changes)) => Some((Ok(changes), Some((sub, client)))),
                Some(Err(e)) => {
                    let (method, why) = (METHOD.into(), e.to_string());
                    Some((Err(NodeError::Decode { method, why }), None))
                }
                None => Some((Err(ended), None)),
            }
        }
    });
    Ok(items.boxed())
}

/// Ends the connection when the node closes the channel.
struct UntilClose<R>(R);

#[derive(Debug, thiserror::Error)]
enum Ended<E> {
    #[error("the node closed the channel")]
    Channel,
    #[error(transparent)]
    Connection(E),
}

impl<R: TransportReceiverT + Send> TransportReceiverT for UntilClose<R>
where
    R::Error: 'static,
{
    type Error = Ended<R::Error>;

    async fn receive(&mut self) -> Result<ReceivedMessage, Self::Error> {
        let message = self.0.receive().await.map_err(Ended::Connection)?;
        let head = match &message {
            ReceivedMessage::Text(t) => t.as_bytes(),
            ReceivedMessage::Bytes(b) => b,
            ReceivedMessage::Pong => &[],
        };
        // A close is short; an item may be long and hold anything.
        let close = b"\"xrpc.ch.close\"";
        if head.len() < 256 && head.windows(close.len()).any(|w| w == close) {
            return Err(Ended::Channel);
        }
        Ok(message)
    }
}
