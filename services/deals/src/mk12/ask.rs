//! The ask: the provider's terms, signed by its worker's key, so that a client can hold them
//! against a proposal that was refused.

use std::sync::PoisonError;

use fvm_shared::crypto::signature::Signature;
use hub_proto::HubError;
use hub_proto::v1::SignAskRequest;
use lotus_actors::decode;
use lotus_actors::market::StorageAsk;
use lotus_journal::Map;
use lotus_types::{Address, Epoch, Kind};
use serde::{Deserialize, Serialize};

use super::check::Terms;
use super::wire::{AskRequest, AskResponse, SignedStorageAsk};
use crate::engine::{Engine, blocking};

/// Epochs for which an ask holds. Source: Boost, storagemarket/storedask, DefaultDuration.
const DURATION: i64 = 1_000_000;
/// An ask is made anew this many epochs before it ends: a day on mainnet.
const RENEW_BEFORE: i64 = 2_880;

/// The ask that was made last.
const ASK: Map<String, Posted> = Map::new("deals.mk12_ask");
/// Key of the one entry of [`ASK`].
const LAST: &str = "last";

/// An ask as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Posted {
    terms: Terms,
    seq_no: u64,
    timestamp: i64,
    expiry: i64,
}

/// The ask that holds now: the last one, or one more if the terms have changed or it ends.
fn renew(last: Option<Posted>, terms: &Terms, now: Epoch) -> Posted {
    match last {
        Some(p) if p.terms == *terms && now.0 < p.expiry.saturating_sub(RENEW_BEFORE) => p,
        last => Posted {
            terms: terms.clone(),
            seq_no: last.map_or(0, |p| p.seq_no + 1),
            timestamp: now.0,
            expiry: now.0.saturating_add(DURATION),
        },
    }
}

impl Engine {
    /// The ask; none when another provider is asked for.
    ///
    /// # Errors
    /// The hub does not sign it now.
    pub(crate) async fn mk12_ask(&self, request: &AskRequest) -> Result<AskResponse, HubError> {
        let provider = self.provider().await?;
        if request.miner != Address::new_id(provider.actor.0) {
            return Ok(AskResponse { ask: None });
        }
        let terms = self.mk12.terms(provider.sector_size);
        let journal = self.deals.journal().clone();
        let now = provider.height;
        let posted = blocking(move || {
            journal.write(|tx| {
                let key = LAST.to_owned();
                let last = tx.get(&ASK, &key)?;
                let next = renew(last.clone(), &terms, now);
                if last.as_ref() != Some(&next) {
                    tx.put(&ASK, &key, &next)?;
                }
                Ok(next)
            })
        })
        .await
        .map_err(|e| odd(e.to_string()))?;
        let ask = StorageAsk {
            miner: request.miner,
            price: posted.terms.price,
            seq_no: posted.seq_no,
            expiry: posted.expiry,
            timestamp: posted.timestamp,
            max_piece_size: posted.terms.max_piece_size.get(),
            min_piece_size: posted.terms.min_piece_size.get(),
            verified_price: posted.terms.verified_price,
        };
        let cached = || {
            self.mk12
                .signed_ask
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        if let Some(known) = cached().clone().filter(|s| s.ask == ask) {
            return Ok(AskResponse { ask: Some(known) });
        }
        let signed = self.sign_ask(ask).await?;
        *cached() = Some(signed.clone());
        Ok(AskResponse { ask: Some(signed) })
    }

    async fn sign_ask(&self, ask: StorageAsk) -> Result<SignedStorageAsk, HubError> {
        let request = SignAskRequest {
            price: ask.price.atto().to_string(),
            verified_price: ask.verified_price.atto().to_string(),
            min_piece_size: ask.min_piece_size,
            max_piece_size: ask.max_piece_size,
            timestamp: ask.timestamp,
            expiry: ask.expiry,
            seq_no: ask.seq_no,
        };
        let answer = self.hub.chain().sign_ask(self.hub.request(request)).await?;
        let signature: Signature =
            decode(&answer.into_inner().signature).map_err(|e| odd(e.to_string()))?;
        Ok(SignedStorageAsk { ask, signature })
    }
}

fn odd(message: String) -> HubError {
    HubError::Refused {
        kind: Kind::Fatal,
        code: 0,
        message,
        fix: "see the log".into(),
        retry_after: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lotus_types::{PaddedSize, TokenAmount};

    fn terms(price: u64) -> Terms {
        Terms {
            price: TokenAmount::from_atto(price),
            verified_price: TokenAmount::from_atto(0),
            min_piece_size: PaddedSize::new(256).unwrap(),
            max_piece_size: PaddedSize::new(8 << 20).unwrap(),
        }
    }

    #[test]
    fn an_ask_is_made_anew_when_it_changes_or_ends() {
        let first = renew(None, &terms(1), Epoch(10));
        assert_eq!(
            (first.seq_no, first.timestamp, first.expiry),
            (0, 10, 1_000_010)
        );
        let same = renew(Some(first.clone()), &terms(1), Epoch(500));
        assert_eq!(same, first);
        let dearer = renew(Some(first.clone()), &terms(2), Epoch(500));
        assert_eq!((dearer.seq_no, dearer.timestamp), (1, 500));
        let renewed = renew(Some(dearer), &terms(2), Epoch(1_000_000));
        assert_eq!((renewed.seq_no, renewed.timestamp), (2, 1_000_000));
    }
}
