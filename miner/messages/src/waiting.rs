//! Which requests wait to be sent, and why: pure.

use std::collections::BTreeMap;

use lotus_types::Kind;

use crate::{MessageKind, SendError, SendRequest};

/// Requests that are remembered: beyond, the one that was tried longest ago is forgotten.
const MAX: usize = 1_000;
/// A request that was not tried again for so long is not tried any more: whoever waits asks every
/// few minutes at least.
const FORGOTTEN_MS: u64 = 30 * 60 * 1_000;

/// A request that was turned down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Its key.
    pub key: String,
    /// What it is for.
    pub kind: MessageKind,
    /// Why, the last time.
    pub why: String,
    /// When that was, Unix milliseconds.
    pub at_unix_ms: u64,
}

/// The requests that were turned down and are tried again, by key.
#[derive(Debug, Default)]
pub(crate) struct WaitList(BTreeMap<String, Waiting>);

impl WaitList {
    /// A request was sent, or turned down. What the chain refuses is at an end: the step that sent
    /// it says why, and looks at the chain before it makes another.
    pub(crate) fn note(&mut self, request: &SendRequest, e: Option<&SendError>, now_ms: u64) {
        self.0.remove(&request.key);
        let again =
            |e: &&SendError| matches!(e.kind(), Kind::Capacity | Kind::Transport | Kind::Config);
        let Some(e) = e.filter(again) else {
            return;
        };
        self.clean(now_ms);
        if self.0.len() >= MAX
            && let Some(oldest) = self.0.values().min_by_key(|w| w.at_unix_ms)
        {
            let key = oldest.key.clone();
            self.0.remove(&key);
        }
        let waiting = Waiting {
            key: request.key.clone(),
            kind: request.kind,
            why: e.to_string(),
            at_unix_ms: now_ms,
        };
        self.0.insert(request.key.clone(), waiting);
    }

    /// Those that still wait.
    pub(crate) fn present(&mut self, now_ms: u64) -> Vec<Waiting> {
        self.clean(now_ms);
        self.0.values().cloned().collect()
    }

    fn clean(&mut self, now_ms: u64) {
        self.0
            .retain(|_, w| now_ms.saturating_sub(w.at_unix_ms) <= FORGOTTEN_MS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Payer;
    use lotus_types::{Address, TokenAmount};

    fn request(key: &str) -> SendRequest {
        SendRequest {
            key: key.into(),
            from: Payer::Address(Address::new_id(1)),
            to: Address::new_id(2),
            method: 0,
            params: vec![],
            value: TokenAmount::default(),
            kind: MessageKind::Commit,
            max_fee: None,
        }
    }

    fn keys(list: &mut WaitList, now_ms: u64) -> Vec<String> {
        list.present(now_ms).into_iter().map(|w| w.key).collect()
    }

    #[test]
    fn only_what_is_tried_again_is_shown() {
        let refused = SendError::Refused {
            key: "a".into(),
            exit_code: 16,
            why: "no".into(),
        };
        let full = SendError::QueueFull(3);
        let mut list = WaitList::default();
        for (key, e, at, want) in [
            ("a", Some(&full), 0, &["a"][..]),
            ("b", Some(&full), 1_000, &["a", "b"]),
            // Sent, or refused for good.
            ("b", None, 2_000, &["a"]),
            ("a", Some(&refused), 3_000, &[]),
            ("c", Some(&full), 4_000, &["c"]),
            // Its batch has a new key: nobody asks for the old one any more.
            ("d", Some(&full), 5_000 + FORGOTTEN_MS, &["d"]),
        ] {
            list.note(&request(key), e, at);
            assert_eq!(keys(&mut list, at), want, "{key} at {at}");
        }
        assert!(keys(&mut list, u64::MAX).is_empty());
    }

    #[test]
    fn a_full_list_keeps_the_newest() {
        let mut list = WaitList::default();
        for n in 0..2_500u64 {
            list.note(&request(&format!("k{n:04}")), Some(&SendError::Stopped), n);
            assert!(list.0.len() <= MAX);
        }
        let all = keys(&mut list, 2_500);
        assert_eq!(all.first().map(String::as_str), Some("k1500"));
        assert_eq!((all.len(), list.0.len()), (MAX, MAX));
    }
}
