use std::path::Path;

use clap::Subcommand;
use comfy_table::Table;
use lotus_messages::{FeesConfig, MessageKind, Purse};
use lotus_runtime::Fault;
use lotus_types::{Kind, TokenAmount};
use reqwest::Method;

use super::cost::{Estimate, Report, agreed};
use super::order::{fil, status_path};
use super::{Cx, print, print_json, table, time};
use crate::config::MinerConfig;
use crate::control;
use crate::orders::{MessageView, MessagesView, MoneyView};

#[derive(Debug, Subcommand)]
pub(super) enum MessagesCommand {
    /// Show the messages that are not final, what the day has cost, and what is stopped and why
    List,
    /// Show one message: whether an order was sent, and what became of it
    Status {
        /// Its key, such as that of an order
        key: String,
    },
    /// End a stop: try messages of this kind again at once
    ///
    /// A kind stops when several of its messages in a row are refused or fail on chain, when the
    /// day's fees are spent, or when no address has funds for it. It starts again by itself at
    /// the time that `messages list` shows. Without --really-do-it: show what it may cost.
    Resume {
        /// post, declare, commit, pre_commit, publish, terminate or other
        kind: String,
        /// End it
        #[arg(long)]
        really_do_it: bool,
    },
}

pub(super) async fn messages(cx: &Cx, command: MessagesCommand) -> Result<(), Fault> {
    let socket = cx.control_socket()?;
    match command {
        MessagesCommand::List => {
            let all: MessagesView = control::call(&socket, Method::GET, "/v1/messages").await?;
            list(cx, &all)
        }
        MessagesCommand::Status { key } => {
            let found = control::call(&socket, Method::GET, &status_path(&key)).await;
            let found: MessageView = found.map_err(|e| match e.kind {
                Kind::Fatal => Fault::new(
                    Kind::Data,
                    e.message,
                    "an order of this key was not sent; the command may be repeated",
                ),
                _ => e,
            })?;
            if cx.json {
                return print_json(&found);
            }
            print(&format!("{}\n", one(&found)))
        }
        MessagesCommand::Resume { kind, really_do_it } => {
            resume(cx, &socket, &kind, really_do_it).await
        }
    }
}

async fn resume(cx: &Cx, socket: &Path, name: &str, really: bool) -> Result<(), Fault> {
    let Some(kind) = MessageKind::by_name(name) else {
        return Err(Fault::new(
            Kind::Data,
            format!("there are no {name:?} messages"),
            "see `lotus-miner messages resume --help` for the kinds",
        ));
    };
    let all: MessagesView = control::call(socket, Method::GET, "/v1/messages").await?;
    let fees = MinerConfig::load(&cx.repo()?.config())?.messages.fees;
    let estimate = risk(&all.money, kind, &fees);
    if !cx.json {
        for line in stops(&all.money) {
            print(&line)?;
        }
    }
    if !agreed(
        cx,
        &format!("Trying {name} messages again"),
        &estimate,
        really,
    )? {
        return Ok(());
    }
    let path = format!("/v1/messages/resume/{name}");
    let money: MoneyView = control::call(socket, Method::POST, &path).await?;
    if cx.json {
        return print_json(&Report {
            estimate: &estimate,
            done: true,
            what: money,
        });
    }
    print(&format!("{name} messages are sent again"))
}

/// What may be spent before a kind of message stops again: what each costs at most, and what is
/// left of its day.
fn risk(money: &MoneyView, kind: MessageKind, fees: &FeesConfig) -> Estimate {
    let each = Estimate::default().with(
        "max_fee_fil",
        "Fee of one message about one sector, at most",
        fees.max_fee(kind, 1),
    );
    let day = money
        .day
        .iter()
        .find(|d| d.purse == Purse::of(kind).as_str());
    let left = day.and_then(|d| {
        let cap = fil(d.cap.as_deref()?).ok()?;
        Some(cap - fil(&d.spent).ok()? - fil(&d.reserved).ok()?)
    });
    match left {
        Some(left) => each.with(
            "left_of_day_fil",
            "Fees that the day still allows, at most",
            left.max(TokenAmount::default()),
        ),
        None => each,
    }
}

fn one(m: &MessageView) -> Table {
    let mut out = table(&["Message", &m.cid]);
    let mut row = |name: &str, value: String| {
        out.add_row([name.to_owned(), value]);
    };
    row("Key", m.key.clone());
    row("From", format!("{}, nonce {}", m.from, m.nonce));
    row("Value", format!("{} FIL", m.value));
    row("State", state(m));
    match &m.fee {
        Some(fee) => row("Fee", format!("{fee} FIL")),
        None => row("Fee", format!("up to {} FIL", m.max_fee)),
    }
    out
}

/// Where a message stands.
fn state(m: &MessageView) -> String {
    match (m.landed, m.exit_code) {
        (Some(at), Some(0)) => format!("landed at {at}"),
        (Some(at), Some(code)) => format!("failed at {at}, exit code {code}"),
        _ if m.replaced => "another message took its nonce: it will never land".into(),
        _ => {
            let since = time(m.created_unix_ms);
            let mut state = format!("sent {since}");
            if m.replacements > 0 {
                state = format!("{state}, replaced {} times", m.replacements);
            }
            match &m.last_error {
                Some(e) => format!("{state}: {e}"),
                None => state,
            }
        }
    }
}

fn list(cx: &Cx, all: &MessagesView) -> Result<(), Fault> {
    if cx.json {
        return print_json(all);
    }
    let mut text = String::new();
    if all.messages.is_empty() {
        text.push_str("no message is under way\n");
    } else {
        let mut out = table(&[
            "Key", "Kind", "From", "Nonce", "Value", "Fee", "State", "CID",
        ]);
        for m in &all.messages {
            let fee = match &m.fee {
                Some(fee) => fee.clone(),
                None => format!("up to {}", m.max_fee),
            };
            out.add_row([
                m.key.clone(),
                m.kind.clone(),
                m.from.clone(),
                m.nonce.to_string(),
                m.value.clone(),
                fee,
                state(m),
                m.cid.clone(),
            ]);
        }
        text = format!("{out}\n");
    }
    let waiting = &all.money.waiting;
    if !waiting.is_empty() {
        let mut out = table(&["Waiting", "Kind", "Last try (UTC)", "Why"]);
        for w in waiting {
            out.add_row([&w.key, &w.kind, &time(w.at_unix_ms), &w.why]);
        }
        text = format!("{text}{out}\n");
    }
    let mut out = table(&["Fees of the day, FIL", "Spent", "Under way", "Limit"]);
    for d in &all.money.day {
        let name = match d.purse.as_str() {
            "post" => "WindowPoSt",
            "declare" => "faults and recoveries",
            _ => "everything else",
        };
        let cap = d.cap.clone().unwrap_or_else(|| "none".into());
        out.add_row([name.to_owned(), d.spent.clone(), d.reserved.clone(), cap]);
    }
    text = format!("{text}{out}\n");
    for line in stops(&all.money) {
        text = format!("{text}{line}\n");
    }
    print(&text)
}

/// What is stopped, a line each.
pub(super) fn stops(money: &MoneyView) -> Vec<String> {
    let line = |s: &crate::orders::StopView| {
        let when = if money.height < s.stop.next_try.0 {
            format!(
                "stopped since epoch {}, tried again in {} epochs",
                s.stop.since,
                s.stop.next_try.0 - money.height
            )
        } else {
            "on trial after a stop".into()
        };
        format!("{} messages are {when}: {}", s.kind, s.stop.why)
    };
    money.stops.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orders::DayView;

    #[test]
    fn what_a_resumed_kind_may_spend_is_shown() {
        let day = |purse: &str, cap: Option<&str>, spent: &str| DayView {
            purse: purse.into(),
            cap: cap.map(Into::into),
            spent: spent.into(),
            reserved: "1".into(),
        };
        let money = MoneyView {
            height: 5,
            next_day: 9,
            day: vec![
                day("post", None, "3"),
                day("declare", Some("24"), "2.5"),
                day("rest", Some("10"), "9.5"),
            ],
            stops: vec![],
            waiting: vec![],
        };
        let fees = FeesConfig::default();
        for (kind, left) in [
            (MessageKind::Commit, Some("0")),
            (MessageKind::Declare, Some("20.5")),
            (MessageKind::Post, None),
        ] {
            let all = serde_json::to_value(risk(&money, kind, &fees)).unwrap();
            assert_eq!(all["left_of_day_fil"].as_str().map(fil), left.map(fil));
            let most = fil(all["max_fee_fil"].as_str().unwrap());
            assert_eq!(most, Ok(fees.max_fee(kind, 1)));
        }
    }
}
