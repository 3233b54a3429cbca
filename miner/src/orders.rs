//! Messages as an operator sees and orders them: JSON over the control socket.
//!
//! Everything that the command line sends goes through the hub, because an address has one
//! writer.

use axum::Json;
use axum::Router;
use axum::extract::{Path, Query, State};
use axum::routing::{get, post};
use lotus_messages::{
    MessageKind, MessageStatus, Money, Payer, Quote, SendError, SendRequest, Sender, Stop,
};
use lotus_node_client::json::{address_text, parse_address};
use lotus_types::{Address, Kind, TokenAmount};
use serde::{Deserialize, Serialize};

use crate::control::Failed;

/// A message that an operator orders.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// Names the order: the same name twice is one message.
    pub key: String,
    /// Who pays; without it, one of the addresses that may act for the miner.
    pub from: Option<String>,
    /// The miner.
    pub miner: String,
    /// Receiver.
    pub to: String,
    /// Method number.
    pub method: u64,
    /// CBOR parameters.
    pub params: Vec<u8>,
    /// attoFIL that go with it.
    pub value: String,
    /// Limit of the fee in attoFIL; without it that of the settings.
    pub max_fee: Option<String>,
}

/// What an order would cost.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct QuoteView {
    /// Who would pay.
    pub from: String,
    /// FIL that it can spend.
    pub available: String,
    /// FIL that go along.
    pub value: String,
    /// Most FIL of fees.
    pub max_fee: String,
    /// Gas limit.
    pub gas_limit: u64,
}

impl From<Quote> for QuoteView {
    fn from(q: Quote) -> Self {
        Self {
            from: address_text(&q.from),
            max_fee: q.max_fee().to_string(),
            available: q.available.to_string(),
            value: q.value.to_string(),
            gas_limit: q.gas_limit,
        }
    }
}

/// A message.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MessageView {
    /// Its key.
    pub key: String,
    /// Its CID, that of the newest version.
    pub cid: String,
    /// What it is for.
    pub kind: String,
    /// Who pays.
    pub from: String,
    /// Its nonce.
    pub nonce: u64,
    /// FIL that go along.
    pub value: String,
    /// Most FIL of fees.
    pub max_fee: String,
    /// FIL of fees that it cost.
    pub fee: Option<String>,
    /// Times that it was replaced by fee.
    pub replacements: u64,
    /// When it was journaled, Unix milliseconds.
    pub created_unix_ms: u64,
    /// Height of its receipt.
    pub landed: Option<i64>,
    /// Exit code of its receipt.
    pub exit_code: Option<i64>,
    /// Another message took its nonce.
    pub replaced: bool,
    /// Why it is not on chain.
    pub last_error: Option<String>,
}

impl From<MessageStatus> for MessageView {
    fn from(m: MessageStatus) -> Self {
        Self {
            key: m.key,
            cid: m.cid.to_string(),
            kind: m.kind.as_str().into(),
            from: address_text(&m.from),
            nonce: m.nonce,
            value: m.value.to_string(),
            max_fee: m.max_fee.to_string(),
            fee: m.fee.map(|f| f.to_string()),
            replacements: m.replacements,
            created_unix_ms: m.created_unix_ms,
            landed: m.landed.map(|e| e.0),
            exit_code: m.exit_code,
            replaced: m.replaced,
            last_error: m.last_error,
        }
    }
}

/// The fees of a day.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DayView {
    /// `post` for WindowPoSt, `declare` for fault and recovery declarations, `rest` for everything
    /// else.
    pub purse: String,
    /// The limit in FIL; none for none.
    pub cap: Option<String>,
    /// FIL spent.
    pub spent: String,
    /// FIL that messages under way may still cost.
    pub reserved: String,
}

/// A kind of message that is stopped.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StopView {
    /// The kind.
    pub kind: String,
    /// Why.
    #[serde(flatten)]
    pub stop: Stop,
}

/// A request that was turned down.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WaitingView {
    /// Its key.
    pub key: String,
    /// What it is for.
    pub kind: String,
    /// Why, the last time.
    pub why: String,
    /// When that was, Unix milliseconds.
    pub at_unix_ms: u64,
}

/// Where the money is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MoneyView {
    /// The chain's height.
    pub height: i64,
    /// First epoch of the next day of fees.
    pub next_day: i64,
    /// Fees of the day.
    pub day: Vec<DayView>,
    /// What is stopped.
    pub stops: Vec<StopView>,
    /// What was turned down.
    pub waiting: Vec<WaitingView>,
}

impl From<Money> for MoneyView {
    fn from(m: Money) -> Self {
        let day = m.purses.into_iter().map(|p| DayView {
            purse: p.purse.as_str().into(),
            cap: p.cap.map(|c| c.to_string()),
            spent: p.spent.to_string(),
            reserved: p.reserved.to_string(),
        });
        let stops = m.stops.into_iter().map(|(kind, stop)| StopView {
            kind: kind.as_str().into(),
            stop,
        });
        let waiting = m.waiting.into_iter().map(|w| WaitingView {
            key: w.key,
            kind: w.kind.as_str().into(),
            why: w.why,
            at_unix_ms: w.at_unix_ms,
        });
        Self {
            height: m.height.0,
            next_day: m.next_day.0,
            day: day.collect(),
            stops: stops.collect(),
            waiting: waiting.collect(),
        }
    }
}

/// Everything about messages.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MessagesView {
    /// Limits, stops, refusals.
    pub money: MoneyView,
    /// Messages that are not final.
    pub messages: Vec<MessageView>,
}

/// Which message.
#[derive(Debug, Serialize, Deserialize)]
struct ByKey {
    key: String,
}

/// The routes, for the control socket.
pub(crate) fn routes(sender: Sender) -> Router {
    Router::new()
        .route("/v1/messages", get(list))
        .route("/v1/messages/status", get(status))
        .route("/v1/messages/quote", post(quote))
        .route("/v1/messages/send", post(send))
        .route("/v1/messages/resume/{kind}", post(resume))
        .with_state(sender)
}

async fn list(State(s): State<Sender>) -> Result<Json<MessagesView>, Failed> {
    let messages = s.list().await?.into_iter().map(MessageView::from);
    Ok(Json(MessagesView {
        money: s.money().await?.into(),
        messages: messages.collect(),
    }))
}

async fn status(
    State(s): State<Sender>,
    Query(q): Query<ByKey>,
) -> Result<Json<MessageView>, Failed> {
    match s.status(&q.key).await? {
        Some(m) => Ok(Json(m.into())),
        None => Err(SendError::Unknown(q.key).into()),
    }
}

async fn quote(
    State(s): State<Sender>,
    Json(order): Json<Order>,
) -> Result<Json<QuoteView>, Failed> {
    Ok(Json(s.quote(&request(order)?).await?.into()))
}

async fn send(
    State(s): State<Sender>,
    Json(order): Json<Order>,
) -> Result<Json<MessageView>, Failed> {
    let request = request(order)?;
    let key = request.key.clone();
    s.send(request).await?;
    status(State(s), Query(ByKey { key })).await
}

async fn resume(
    State(s): State<Sender>,
    Path(kind): Path<String>,
) -> Result<Json<MoneyView>, Failed> {
    let Some(kind) = MessageKind::by_name(&kind) else {
        return Err(bad("kind", &kind));
    };
    s.resume(kind).await?;
    Ok(Json(s.money().await?.into()))
}

fn request(order: Order) -> Result<SendRequest, Failed> {
    let address = |what: &str, text: &str| -> Result<Address, Failed> {
        parse_address(text).map_err(|_| bad(what, text))
    };
    let atto = |what: &str, text: &str| -> Result<TokenAmount, Failed> {
        let n: u128 = text.parse().map_err(|_| bad(what, text))?;
        Ok(TokenAmount::from_atto(n))
    };
    Ok(SendRequest {
        from: match &order.from {
            Some(from) => Payer::Address(address("from", from)?),
            None => Payer::Miner(address("miner", &order.miner)?),
        },
        to: address("to", &order.to)?,
        method: order.method,
        value: atto("value", &order.value)?,
        max_fee: match &order.max_fee {
            Some(fee) => Some(atto("max_fee", fee)?),
            None => None,
        },
        key: order.key,
        params: order.params,
        kind: MessageKind::Operator,
    })
}

fn bad(what: &str, text: &str) -> Failed {
    Failed::new(
        Kind::Data,
        format!("{what} {text:?} is not understood"),
        "use the lotus-miner of the same release as the hub",
    )
}
