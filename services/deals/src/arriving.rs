//! Who may change the files of which deal now, and how much of it is here.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lotus_runtime::CancellationToken;
use lotus_types::DealKey;

/// The deals whose bytes are arriving now. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arriving(Arc<Mutex<Places>>);

#[derive(Debug, Default)]
struct Places {
    whole: HashMap<DealKey, Arc<Transfer>>,
    chunks: HashMap<DealKey, HashMap<u32, CancellationToken>>,
}

/// A transfer under way.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) received: AtomicU64,
    since: Instant,
    /// Cancelled when the deal is given up.
    pub(crate) stop: CancellationToken,
}

impl Arriving {
    fn places(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right to change the files of a deal; `None` while another transfer has it.
    pub(crate) fn lease(&self, key: &DealKey) -> Option<Lease> {
        let mut places = self.places();
        if places.whole.contains_key(key) || places.chunks.contains_key(key) {
            return None;
        }
        let transfer = Arc::new(Transfer {
            received: AtomicU64::new(0),
            since: Instant::now(),
            stop: CancellationToken::new(),
        });
        places.whole.insert(key.clone(), transfer.clone());
        drop(places);
        Some(Lease {
            transfer,
            arriving: self.clone(),
            key: key.clone(),
        })
    }

    /// The right to write one chunk of a deal; `None` while another transfer has it or the whole.
    pub(crate) fn chunk(&self, key: &DealKey, chunk: u32) -> Option<ChunkLease> {
        let mut places = self.places();
        if places.whole.contains_key(key) {
            return None;
        }
        let of_deal = places.chunks.entry(key.clone()).or_default();
        if of_deal.contains_key(&chunk) {
            return None;
        }
        let stop = CancellationToken::new();
        of_deal.insert(chunk, stop.clone());
        drop(places);
        Some(ChunkLease {
            stop,
            arriving: self.clone(),
            key: key.clone(),
            chunk,
        })
    }

    /// Bytes that are here of a deal whose bytes are arriving in one piece.
    pub(crate) fn received(&self, key: &DealKey) -> Option<u64> {
        let places = self.places();
        let transfer = places.whole.get(key)?;
        Some(transfer.received.load(Ordering::Relaxed))
    }

    /// Whether bytes of a deal are arriving.
    pub(crate) fn has(&self, key: &DealKey) -> bool {
        let places = self.places();
        places.whole.contains_key(key) || places.chunks.contains_key(key)
    }

    /// For how long the bytes of a deal have been arriving in one piece.
    pub(crate) fn takes(&self, key: &DealKey) -> Option<Duration> {
        Some(self.places().whole.get(key)?.since.elapsed())
    }

    /// Ends the transfers of a deal.
    pub(crate) fn stop(&self, key: &DealKey) {
        let places = self.places();
        if let Some(transfer) = places.whole.get(key) {
            transfer.stop.cancel();
        }
        for stop in places.chunks.get(key).into_iter().flat_map(HashMap::values) {
            stop.cancel();
        }
    }
}

/// The right to change the files of one deal, and how many of its bytes are here.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) transfer: Arc<Transfer>,
    pub(crate) key: DealKey,
    arriving: Arriving,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.arriving.places().whole.remove(&self.key);
    }
}

/// The right to write one chunk.
#[derive(Debug)]
pub(crate) struct ChunkLease {
    pub(crate) stop: CancellationToken,
    arriving: Arriving,
    key: DealKey,
    chunk: u32,
}

impl Drop for ChunkLease {
    fn drop(&mut self) {
        let mut places = self.arriving.places();
        if let Some(of_deal) = places.chunks.get_mut(&self.key) {
            of_deal.remove(&self.chunk);
            if of_deal.is_empty() {
                places.chunks.remove(&self.key);
            }
        }
    }
}
