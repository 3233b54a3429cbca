use clap::Subcommand;
use lotus_runtime::Fault;
use reqwest::Method;

use super::{Cx, print, print_json, table, time};
use crate::control;
use crate::orders::{MessagesView, MoneyView};

#[derive(Debug, Subcommand)]
pub(super) enum MessagesCommand {
    /// Show the messages that are not final, what the day has cost, and what is stopped and why
    List,
    /// End a stop: try messages of this kind again at once
    ///
    /// A kind stops when several of its messages in a row are refused or fail on chain, when the
    /// day's fees are spent, or when no address has funds for it. It starts again by itself at
    /// the time that `messages list` shows.
    Resume {
        /// post, declare, commit, pre_commit, publish, terminate or other
        kind: String,
    },
}

pub(super) async fn messages(cx: &Cx, command: MessagesCommand) -> Result<(), Fault> {
    let socket = cx.control_socket()?;
    match command {
        MessagesCommand::List => {
            let all: MessagesView = control::call(&socket, Method::GET, "/v1/messages").await?;
            list(cx, &all)
        }
        MessagesCommand::Resume { kind } => {
            let path = format!("/v1/messages/resume/{kind}");
            let money: MoneyView = control::call(&socket, Method::POST, &path).await?;
            if cx.json {
                return print_json(&money);
            }
            print(&format!("{kind} messages are sent again"))
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
            let state = match (m.landed, m.exit_code) {
                (Some(at), Some(0)) => format!("landed at {at}"),
                (Some(at), Some(code)) => format!("failed at {at}, exit code {code}"),
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
            };
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
                state,
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
