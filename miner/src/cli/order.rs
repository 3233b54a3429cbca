//! How a command spends: it shows the amounts, and does it only when told `--really-do-it`.

use std::path::Path;
use std::time::Duration;

use lotus_actors::miner::method_name;
use lotus_messages::SendError;
use lotus_node_client::json::address_text;
use lotus_runtime::Fault;
use lotus_types::{Address, Kind, TokenAmount};
use reqwest::Method;
use serde::Serialize;
use tokio::time::Instant;

use super::kept::Kept;
use super::{Cx, print, print_json, table};
use crate::config::MinerConfig;
use crate::control;
use crate::orders::{MessageView, Order, QuoteView};

/// How long the command waits for the receipt. The message lands without it too.
const PATIENCE: Duration = Duration::from_secs(600);
const POLL: Duration = Duration::from_secs(2);
/// How much longer than the hub may take to send a message its answer is waited for.
const ANSWER: Duration = Duration::from_secs(30);

/// What a command shows, and what came of it.
#[derive(Serialize)]
struct Outcome {
    /// What it does, in words.
    action: Vec<(String, String)>,
    to: String,
    method: String,
    /// What the action has besides, for programs.
    #[serde(flatten)]
    details: serde_json::Map<String, serde_json::Value>,
    #[serde(flatten)]
    quote: QuoteView,
    /// The order's key, once it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    order: Option<String>,
    sent: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<MessageView>,
}

/// A message to the miner actor.
pub(super) struct Spend {
    /// Names the command in the message's key.
    pub(super) name: &'static str,
    /// What is shown before the costs.
    pub(super) action: Vec<(String, String)>,
    /// The same for programs, where `action` is not enough.
    pub(super) details: serde_json::Map<String, serde_json::Value>,
    /// What makes the same command again the same order, where that is not its parameters.
    pub(super) asked: Option<String>,
    /// Who must pay; `None` for any address that may act for the miner.
    pub(super) from: Option<Address>,
    pub(super) miner: Address,
    pub(super) method: u64,
    pub(super) params: Vec<u8>,
    /// Limit of the fee; without it that of the settings.
    pub(super) max_fee: Option<TokenAmount>,
}

/// Shows what a message does and costs; with `really`, sends it and waits for its receipt.
pub(super) async fn spend(cx: &Cx, s: Spend, really: bool) -> Result<(), Fault> {
    let asked = s.asked.map_or_else(|| s.params.clone(), String::into_bytes);
    if repeated(cx, s.name, &asked, really).await? {
        return Ok(());
    }
    let socket = cx.control_socket()?;
    let mut order = Order {
        key: String::new(),
        from: s.from.map(|a| address_text(&a)),
        miner: address_text(&s.miner),
        to: address_text(&s.miner),
        method: s.method,
        params: s.params,
        value: "0".into(),
        max_fee: s.max_fee.map(|f| f.atto().to_string()),
    };
    let path = "/v1/messages/quote";
    let quote: QuoteView =
        control::call_with(&socket, Method::POST, path, Some(&order), control::DEADLINE).await?;
    let mut outcome = Outcome {
        action: s.action,
        details: s.details,
        order: None,
        to: order.to.clone(),
        method: method_name(s.method).map_or_else(|| s.method.to_string(), ToOwned::to_owned),
        quote,
        sent: really,
        message: None,
    };
    if !cx.json {
        show(&outcome)?;
    }
    let mut kept = None;
    if really {
        let kept = kept.insert(Kept::of(cx.repo()?.root(), s.name, &asked)?);
        order.key.clone_from(&kept.key);
        outcome.order = Some(kept.key.clone());
        eprintln!("order {}", kept.key);
        let limit = send_limit(&MinerConfig::load(&cx.repo()?.config())?);
        let path = "/v1/messages/send";
        let sent = control::call_with(&socket, Method::POST, path, Some(&order), limit).await;
        let sent: MessageView = sent.map_err(|e| kept.failed(e))?;
        if !cx.json {
            print(&format!("sent as message {}; waiting for it", sent.cid))?;
        }
        outcome.message = Some(receipt(cx, sent, kept).await?);
    }
    if cx.json {
        print_json(&outcome)?;
    }
    match (&outcome.message, &kept) {
        (Some(m), Some(kept)) => ended(cx, m, kept),
        _ if cx.json => Ok(()),
        _ => print("nothing was sent: repeat the command with --really-do-it"),
    }
}

/// Whether the same command was sent before without the operator learning its end: then it is not
/// sent again, and its end is told. Commands ask before they look at the chain, which the first may
/// have changed.
pub(super) async fn repeated(
    cx: &Cx,
    name: &str,
    asked: &[u8],
    really: bool,
) -> Result<bool, Fault> {
    let kept = match really {
        true => Kept::find(cx.repo()?.root(), name, asked)?,
        false => None,
    };
    let Some(kept) = kept else {
        return Ok(false);
    };
    let Some(sent) = known(&cx.control_socket()?, &kept.key).await? else {
        return Ok(false);
    };
    eprintln!(
        "the same command was sent before, as order {}: nothing more is sent",
        kept.key
    );
    let sent = receipt(cx, sent, &kept).await?;
    if cx.json {
        print_json(&sent)?;
    }
    ended(cx, &sent, &kept)?;
    Ok(true)
}

/// The hub gives a request up before its client does: a client that is told nothing must not
/// think that nothing was sent.
fn send_limit(cfg: &MinerConfig) -> Duration {
    Duration::from_secs(cfg.messages.send_secs).saturating_add(ANSWER)
}

/// The message of a key, if the hub has one.
async fn known(socket: &Path, key: &str) -> Result<Option<MessageView>, Fault> {
    match control::call(socket, Method::GET, &status_path(key)).await {
        Ok(found) => Ok(Some(found)),
        Err(e) if e.message == SendError::Unknown(key.into()).to_string() => Ok(None),
        Err(e) => Err(e),
    }
}

pub(super) fn status_path(key: &str) -> String {
    let encoded: String = key
        .bytes()
        .map(|b| match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' => {
                char::from(b).to_string()
            }
            _ => format!("%{b:02X}"),
        })
        .collect();
    format!("/v1/messages/status?key={encoded}")
}

/// What became of a message. Once that is known, the same command is a new order.
fn ended(cx: &Cx, m: &MessageView, kept: &Kept) -> Result<(), Fault> {
    if m.landed.is_some() {
        kept.done();
    }
    match (m.landed, m.exit_code) {
        (Some(_), Some(0)) if cx.json => Ok(()),
        (Some(at), Some(0)) => print(&format!(
            "landed at height {at} for {} FIL in fees",
            m.fee.clone().unwrap_or_default()
        )),
        (Some(at), code) => Err(Fault::new(
            Kind::Chain,
            format!(
                "message {} failed at height {at} with exit code {}",
                m.cid,
                code.unwrap_or(-1)
            ),
            "the state of the chain changed meanwhile: look again and repeat the command",
        )),
        (None, _) => Err(Fault::new(
            Kind::Transport,
            format!("message {} is not on chain after {PATIENCE:?}", m.cid),
            "it is journaled and will land: see `lotus-miner messages list`; the same command \
             again waits for it, and sends nothing more",
        )),
    }
}

fn show(o: &Outcome) -> Result<(), Fault> {
    let mut out = table(&["Message", &o.method]);
    for (name, value) in &o.action {
        out.add_row([name, value]);
    }
    let fee = format!("{} FIL at most", o.quote.max_fee);
    let value = format!("{} FIL", o.quote.value);
    let has = format!("{} FIL", o.quote.available);
    for (name, value) in [
        ("From", &o.quote.from),
        ("To", &o.to),
        ("Value", &value),
        ("Network fee", &fee),
        ("Sender can spend", &has),
    ] {
        out.add_row([name, value.as_str()]);
    }
    print(&out.to_string())
}

/// Waits until the message has a receipt.
async fn receipt(cx: &Cx, sent: MessageView, kept: &Kept) -> Result<MessageView, Fault> {
    let socket = cx.control_socket()?;
    let path = status_path(&sent.key);
    let until = Instant::now() + PATIENCE;
    let mut last = sent;
    while last.landed.is_none() && Instant::now() < until {
        tokio::time::sleep(POLL).await;
        // A hub that restarts has the message in its journal.
        match control::call(&socket, Method::GET, &path).await {
            Ok(now) => last = now,
            Err(e) if e.kind == Kind::Transport => {}
            Err(e) => return Err(e),
        }
        if last.replaced {
            kept.done();
            return Err(Fault::new(
                Kind::Chain,
                format!("another message took nonce {} of {}", last.nonce, last.from),
                "use this address in this hub alone, and repeat the command",
            ));
        }
    }
    Ok(last)
}

/// Reads an amount in FIL, such as 1.5.
pub(super) fn fil(text: &str) -> Result<TokenAmount, String> {
    let wrong = || format!("{text:?} is no amount: use FIL, such as 1.5");
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if (whole.is_empty() && part.is_empty()) || !digits(whole) || !digits(part) || part.len() > 18 {
        return Err(wrong());
    }
    let atto: u128 = format!("{whole}{part:0<18}").parse().map_err(|_| wrong())?;
    Ok(TokenAmount::from_atto(atto))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_outwaits_the_hub() {
        let mut cfg = MinerConfig::default();
        for secs in [1, 60, 3_600, u64::MAX] {
            cfg.messages.send_secs = secs;
            assert!(send_limit(&cfg) > Duration::from_secs(secs) || secs == u64::MAX);
        }
        assert_eq!(
            status_path("order/a b&c/01"),
            "/v1/messages/status?key=order/a%20b%26c/01"
        );
    }

    #[test]
    fn amounts_are_read_to_the_last_atto() {
        for (text, atto) in [
            ("1", Some(1_000_000_000_000_000_000u128)),
            ("1.5", Some(1_500_000_000_000_000_000)),
            (".5", Some(500_000_000_000_000_000)),
            ("0.000000000000000001", Some(1)),
            ("0.0000000000000000001", None),
            ("-1", None),
            ("1.2.3", None),
            ("1e3", None),
            ("", None),
            (".", None),
            ("1 FIL", None),
        ] {
            let want = atto.map(TokenAmount::from_atto);
            assert_eq!(fil(text).ok(), want, "{text:?}");
        }
    }
}
