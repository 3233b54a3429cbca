//! Pieces without an unsealed copy: the hub is asked to make one, and the client to come back.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::StatusCode;
use hub_proto::v1::LocateRequest;
use hub_proto::{HubClient, HubError};
use lotus_types::PieceCid;

use crate::answer::Refusal;

/// A piece that was asked for is not asked for again for so long, whoever wants it.
const AGAIN: Duration = Duration::from_secs(30);
/// Pieces that are remembered for that; with more the hub's own queue is long full.
const MAX_ASKED: usize = 1024;
/// Seconds after which a client comes back for a piece that is being unsealed.
const COME_BACK: u64 = 30;

/// Asks the hub for unsealed copies, once for each piece however many clients want it.
#[derive(Debug)]
pub(crate) struct Unseals {
    hub: HubClient,
    asked: Mutex<HashMap<PieceCid, Instant>>,
}

impl Unseals {
    pub(crate) fn new(hub: HubClient) -> Self {
        Self {
            hub,
            asked: Mutex::default(),
        }
    }

    /// What a client gets whose piece the hub gave no lease on for now.
    pub(crate) async fn ask(&self, piece: &PieceCid) -> Refusal {
        match self.first(piece, Instant::now()) {
            First::Yes => {}
            First::No => return unsealing(piece),
            First::Full => return busy("too many pieces wait to be unsealed", 30),
        }
        let asking = Asking { all: self, piece };
        let request = self.hub.request(LocateRequest {
            piece_cid: piece.to_string(),
        });
        let asked = self.hub.unsealed().request_unseal(request).await;
        let asked = asked.map_err(HubError::from);
        if matches!(&asked, Ok(found) if !found.get_ref().readable) {
            tracing::info!(%piece, "asked the hub to unseal it");
            metrics::counter!("lotus_markets_retrieval_unseals_total").increment(1);
            std::mem::forget(asking);
            return unsealing(piece);
        }
        drop(asking);
        match asked {
            // There is a copy, so what was refused was one lease more.
            Ok(_) => busy("too many readers at once", 5),
            Err(e) => {
                let seconds = e.retry_after().map_or(5, |d| d.as_secs().max(1));
                tracing::warn!(%piece, error = %e, "no unsealed copy");
                busy(
                    "the piece has no unsealed copy, and none can be made now",
                    seconds,
                )
            }
        }
    }

    fn first(&self, piece: &PieceCid, now: Instant) -> First {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.len() >= MAX_ASKED {
            asked.retain(|_, at| now.duration_since(*at) < AGAIN);
        }
        match asked.get(piece) {
            Some(at) if now.duration_since(*at) < AGAIN => First::No,
            None if asked.len() >= MAX_ASKED => First::Full,
            _ => {
                asked.insert(*piece, now);
                First::Yes
            }
        }
    }
}

/// A piece that the hub is being asked for. When it is not made now, or the client goes away
/// before the hub heard of it, the next who wants it may ask.
struct Asking<'a> {
    all: &'a Unseals,
    piece: &'a PieceCid,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let asked = &self.all.asked;
        let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.remove(self.piece);
    }
}

enum First {
    Yes,
    No,
    Full,
}

fn unsealing(piece: &PieceCid) -> Refusal {
    busy(&format!("piece {piece} is being unsealed"), COME_BACK)
}

fn busy(error: &str, seconds: u64) -> Refusal {
    Refusal::later(StatusCode::SERVICE_UNAVAILABLE, error, seconds)
}
