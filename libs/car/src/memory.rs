use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::WalkError;

/// Memory that walks share: one that finds none left ends, so that no DAG and no number of walks
/// takes more.
#[derive(Debug)]
pub struct WalkMemory {
    limit: usize,
    used: AtomicUsize,
}

impl WalkMemory {
    /// At most `limit` bytes for all walks together.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicUsize::new(0),
        })
    }

    /// Bytes in use.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// What one walk has of it; given back when dropped.
#[derive(Debug)]
pub(crate) struct Held {
    /// `None`: without limit.
    of: Option<Arc<WalkMemory>>,
    bytes: usize,
}

impl Held {
    pub(crate) fn none(of: Option<Arc<WalkMemory>>) -> Self {
        Self { of, bytes: 0 }
    }

    /// Has at least `bytes` from now on.
    pub(crate) fn reach(&mut self, bytes: usize) -> Result<(), WalkError> {
        let more = bytes.saturating_sub(self.bytes);
        if let Some(all) = &self.of {
            let add = |used: usize| used.checked_add(more).filter(|n| *n <= all.limit);
            all.used
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)
                .map_err(|_| WalkError::Busy { limit: all.limit })?;
        }
        self.bytes += more;
        Ok(())
    }

    /// `bytes` for a while.
    pub(crate) fn lend(&self, bytes: usize) -> Result<Self, WalkError> {
        let mut lent = Self::none(self.of.clone());
        lent.reach(bytes)?;
        Ok(lent)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(all) = &self.of {
            all.used.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::io;

    use bytes::Bytes;
    use cid::Cid;
    use ipld_core::ipld::Ipld;
    use multihash_codetable::{Code, MultihashDigest};

    use super::*;
    use crate::{DAG_CBOR, RAW, Selector, Walk};

    fn node(links: Vec<Cid>) -> (Cid, Bytes) {
        let list = Ipld::List(links.into_iter().map(Ipld::Link).collect());
        let data = serde_ipld_dagcbor::to_vec(&list).unwrap();
        let cid = Cid::new_v1(DAG_CBOR, Code::Sha2_256.digest(&data));
        (cid, data.into())
    }

    #[test]
    fn walks_share_their_memory_and_give_it_back() {
        let leaves = (0..5_000u32).map(|i| {
            let data = Bytes::copy_from_slice(&i.to_le_bytes());
            (Cid::new_v1(RAW, Code::Sha2_256.digest(&data)), data)
        });
        let mut all: HashMap<Cid, Bytes> = leaves.collect();
        let (wide, data) = node(all.keys().copied().collect());
        all.insert(wide, data);
        let (small, data) = node(Vec::new());
        all.insert(small, data);
        let get = |cid: &Cid| Ok::<_, io::Error>(all.get(cid).cloned());
        let start = |memory: &Arc<WalkMemory>, root: &Cid| {
            Walk::within(memory, root, &[], Selector::default(), get)
        };

        let enough = WalkMemory::new(8 << 20);
        let mut walk = start(&enough, &wide).unwrap();
        assert!(walk.next().unwrap().is_ok());
        let held = enough.used();
        assert!(held > 5_000 * 32, "it holds its links: {held}");
        assert_eq!(walk.filter(Result::is_ok).count(), 5_000);
        assert_eq!(enough.used(), 0);

        // With less it ends with a reason, and what it had serves the next.
        let little = WalkMemory::new(100 << 10);
        let walk = start(&little, &wide).unwrap();
        let last = walk.last().unwrap();
        assert!(matches!(last, Err(WalkError::Busy { limit }) if limit == 100 << 10));
        assert_eq!(little.used(), 0);
        assert_eq!(start(&little, &small).unwrap().count(), 1);
        assert_eq!(little.used(), 0);
    }
}
