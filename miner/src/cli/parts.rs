//! What the parts of a running hub say of themselves.

use std::collections::BTreeMap;

use lotus_runtime::Fault;
use lotus_types::Kind;

use super::Cx;
use crate::control;
use crate::control_proving::PartView;

/// Parts by name.
pub(super) type Parts = BTreeMap<String, PartView>;

/// Parts that are always shown, by the names that operators know.
const SHOWN: [(&str, &str); 3] = [
    ("mining", "Mining"),
    ("window_post", "WindowPoSt"),
    ("storage", "Storage"),
];

/// Asks the hub.
pub(super) async fn parts(cx: &Cx) -> Result<Parts, Fault> {
    let socket = cx.control_socket()?;
    control::call(&socket, reqwest::Method::GET, "/v1/health").await
}

/// A line for each part that matters now: the three on which money depends, and any that does not
/// do its job.
pub(super) fn lines(parts: &Parts) -> Vec<(String, String)> {
    let shown = SHOWN.iter().map(|(name, label)| {
        let text = parts.get(*name).map_or_else(|| "starting".into(), text);
        ((*label).to_owned(), text)
    });
    let others = parts.iter().filter(|(name, part)| {
        !part.ready && !SHOWN.iter().any(|(shown, _)| *shown == name.as_str())
    });
    shown
        .chain(others.map(|(name, part)| (name.clone(), text(part))))
        .collect()
}

fn text(part: &PartView) -> String {
    match (part.ready, part.detail.as_str()) {
        (true, "") => "ok".into(),
        (true, detail) => detail.into(),
        (false, detail) => format!("NOT READY: {detail}"),
    }
}

/// The parts as checks.
pub(super) fn checks(parts: Parts) -> Vec<(String, Result<String, Fault>)> {
    let check = |(name, part): (String, PartView)| {
        let done = if part.ready {
            Ok(text(&part))
        } else {
            let kind = if name == "node" {
                Kind::Transport
            } else {
                Kind::Config
            };
            Err(Fault::new(
                kind,
                part.detail,
                "act on this; the hub's log has more, and `lotus-miner info` shows what is left",
            ))
        };
        (format!("hub: {name}"), done)
    };
    parts.into_iter().map(check).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(ready: bool, detail: &str) -> PartView {
        PartView {
            ready,
            detail: detail.into(),
        }
    }

    #[test]
    fn a_refusal_to_mine_is_told() {
        let parts: Parts = [
            ("api", part(true, "127.0.0.1:1")),
            ("mining", part(false, "refused: a block")),
            ("workers", part(false, "no seal worker")),
            ("window_post", part(true, "")),
        ]
        .map(|(name, part)| (name.to_owned(), part))
        .into();
        let told = lines(&parts);
        let told: Vec<(&str, &str)> = told.iter().map(|(a, b)| (&a[..], &b[..])).collect();
        assert_eq!(
            told,
            [
                ("Mining", "NOT READY: refused: a block"),
                ("WindowPoSt", "ok"),
                ("Storage", "starting"),
                ("workers", "NOT READY: no seal worker"),
            ]
        );
        let bad = checks(parts).into_iter().filter(|(_, c)| c.is_err());
        let bad: Vec<String> = bad.map(|(name, _)| name).collect();
        assert_eq!(bad, ["hub: mining", "hub: workers"]);
    }
}
