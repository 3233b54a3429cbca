//! Proofs are checked once: executing a message again, after a reorg or a restart, finds the
//! verdict.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use lotus_proofs::{Refused, SealInputs, SealingSector, Seed, Ticket, Verifier};
use lotus_types::{ActorId, Commitment, SectorNumber, SectorSize};

/// Verdicts kept: each is below 100 bytes.
const KEPT: usize = 1 << 16;

/// A digest of everything that the verdict depends on.
pub(super) type VerdictKey = [u8; 32];

#[derive(Default)]
struct Known {
    /// `None` for a right proof.
    by_key: HashMap<VerdictKey, Option<Refused>>,
    /// Right proofs that are not stored yet.
    fresh: Vec<VerdictKey>,
}

/// A verifier with a memory.
pub(super) struct Verdicts {
    inner: Arc<dyn Verifier>,
    known: Mutex<Known>,
}

impl Verdicts {
    pub(super) fn new(inner: Arc<dyn Verifier>, right: impl Iterator<Item = VerdictKey>) -> Self {
        Self {
            inner,
            known: Mutex::new(Known {
                by_key: right.map(|k| (k, None)).collect(),
                fresh: Vec::new(),
            }),
        }
    }

    /// Verdicts to store. Only right proofs are stored: a wrong one is checked again at a
    /// restart, which costs time and never trust.
    pub(super) fn take_fresh(&self) -> Vec<VerdictKey> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut known.fresh)
    }

    fn cached(
        &self,
        key: VerdictKey,
        check: impl FnOnce() -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        let lock = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(verdict) = lock().by_key.get(&key) {
            return verdict.clone().map_or(Ok(()), Err);
        }
        // Not under the lock: this may take a second.
        let verdict = check();
        let mut known = lock();
        if known.by_key.len() >= KEPT {
            known.by_key.clear();
        }
        if verdict.is_ok() {
            known.fresh.push(key);
        }
        known.by_key.insert(key, verdict.clone().err());
        verdict
    }
}

/// Hashes parts with their lengths, so that no two lists of parts collide.
fn key(parts: &[&[u8]]) -> VerdictKey {
    let mut h = blake2b_simd::Params::new().hash_length(32).to_state();
    for p in parts {
        h.update(&(p.len() as u64).to_be_bytes());
        h.update(p);
    }
    let mut out = [0; 32];
    out.copy_from_slice(h.finalize().as_bytes());
    out
}

fn post_key(
    tag: &[u8],
    miner: ActorId,
    size: SectorSize,
    randomness: &[u8; 32],
    sectors: &[(SectorNumber, Commitment)],
    proof: &[u8],
) -> VerdictKey {
    let mut list = Vec::with_capacity(sectors.len() * 40);
    for (n, c) in sectors {
        list.extend_from_slice(&n.0.to_be_bytes());
        list.extend_from_slice(&c.0);
    }
    let head = [miner.0.to_be_bytes(), size.bytes().to_be_bytes()].concat();
    key(&[tag, &head, randomness, &list, proof])
}

impl Verifier for Verdicts {
    fn verify_seal(
        &self,
        s: &SealingSector,
        ticket: &Ticket,
        seed: &Seed,
        comm_d: &Commitment,
        comm_r: &Commitment,
        proof: &[u8],
    ) -> Result<(), Refused> {
        let ids = [s.id.miner.0, s.id.number.0, s.size.bytes()]
            .map(u64::to_be_bytes)
            .concat();
        let k = key(&[b"seal", &ids, ticket, seed, &comm_d.0, &comm_r.0, proof]);
        self.cached(k, || {
            self.inner
                .verify_seal(s, ticket, seed, comm_d, comm_r, proof)
        })
    }

    fn verify_aggregate_seal_proofs(
        &self,
        miner: ActorId,
        size: SectorSize,
        seals: &[SealInputs],
        proof: &[u8],
    ) -> Result<(), Refused> {
        let head = [miner.0.to_be_bytes(), size.bytes().to_be_bytes()].concat();
        let list: Vec<u8> = seals
            .iter()
            .flat_map(|s| {
                let c = &s.commitments;
                let number = s.number.0.to_be_bytes();
                [&number[..], &s.ticket, &s.seed, &c.comm_d.0, &c.comm_r.0].concat()
            })
            .collect();
        let k = key(&[b"aggregate", &head, &list, proof]);
        self.cached(k, || {
            self.inner
                .verify_aggregate_seal_proofs(miner, size, seals, proof)
        })
    }

    fn verify_window_post(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[(SectorNumber, Commitment)],
        proof: &[u8],
    ) -> Result<(), Refused> {
        let k = post_key(b"window", miner, size, randomness, sectors, proof);
        self.cached(k, || {
            self.inner
                .verify_window_post(miner, size, randomness, sectors, proof)
        })
    }

    fn verify_winning_post(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[(SectorNumber, Commitment)],
        proof: &[u8],
    ) -> Result<(), Refused> {
        let k = post_key(b"winning", miner, size, randomness, sectors, proof);
        self.cached(k, || {
            self.inner
                .verify_winning_post(miner, size, randomness, sectors, proof)
        })
    }

    fn verify_update(
        &self,
        size: SectorSize,
        old: &Commitment,
        new: &Commitment,
        new_d: &Commitment,
        proof: &[u8],
    ) -> Result<(), Refused> {
        let size_bytes = size.bytes().to_be_bytes();
        let k = key(&[b"update", &size_bytes, &old.0, &new.0, &new_d.0, proof]);
        self.cached(k, || self.inner.verify_update(size, old, new, new_d, proof))
    }
}
