use fvm_shared::address::Address;
use lotus_types::Epoch;

/// What a piece of randomness is for. Source: go-state-types, crypto.DomainSeparationTag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
pub enum Dst {
    /// A block's ticket.
    TicketProduction = 1,
    /// A block's election proof.
    ElectionProofProduction = 2,
    /// Which sectors and leaves a WinningPoSt opens.
    WinningPoStChallengeSeed = 3,
    /// Which leaves a WindowPoSt opens.
    WindowedPoStChallengeSeed = 4,
    /// The ticket that a replica is sealed with.
    SealRandomness = 5,
    /// The seed that chooses the leaves a seal proof opens.
    InteractiveSealChallengeSeed = 6,
    /// Which deadline a sector is put into.
    WindowedPoStDeadlineAssignment = 7,
    /// When a deal is first updated.
    MarketDealCronSeed = 8,
    /// Ties a WindowPoSt message to a chain.
    PoStChainCommit = 9,
}

impl TryFrom<i64> for Dst {
    type Error = i64;
    fn try_from(n: i64) -> Result<Self, i64> {
        Ok(match n {
            1 => Self::TicketProduction,
            2 => Self::ElectionProofProduction,
            3 => Self::WinningPoStChallengeSeed,
            4 => Self::WindowedPoStChallengeSeed,
            5 => Self::SealRandomness,
            6 => Self::InteractiveSealChallengeSeed,
            7 => Self::WindowedPoStDeadlineAssignment,
            8 => Self::MarketDealCronSeed,
            9 => Self::PoStChainCommit,
            other => return Err(other),
        })
    }
}

fn blake2b256(parts: &[&[u8]]) -> [u8; 32] {
    let mut state = blake2b_simd::Params::new().hash_length(32).to_state();
    for p in parts {
        state.update(p);
    }
    let mut out = [0; 32];
    out.copy_from_slice(state.finalize().as_bytes());
    out
}

/// Randomness for one purpose from a base: a beacon entry's data or a ticket's VRF proof.
/// Source: lotus, chain/rand, DrawRandomnessFromBase.
#[must_use]
pub fn draw_randomness(base: &[u8], dst: Dst, epoch: Epoch, entropy: &[u8]) -> [u8; 32] {
    draw_randomness_from_digest(&ticket_digest(base), dst, epoch, entropy)
}

/// [`draw_randomness`] from the digest of the base, which is what
/// `StateGetRandomnessDigestFrom…` returns.
#[must_use]
pub fn draw_randomness_from_digest(
    digest: &[u8; 32],
    dst: Dst,
    epoch: Epoch,
    entropy: &[u8],
) -> [u8; 32] {
    blake2b256(&[
        &(dst as i64).to_be_bytes(),
        digest,
        &epoch.0.to_be_bytes(),
        entropy,
    ])
}

/// BLAKE2b-256 of a VRF proof: orders tickets, and decides elections.
#[must_use]
pub fn ticket_digest(vrf_proof: &[u8]) -> [u8; 32] {
    blake2b256(&[vrf_proof])
}

/// A miner's address as entropy: the CBOR form of its ID address.
#[must_use]
pub fn address_entropy(miner: &Address) -> Vec<u8> {
    crate::encode(miner)
}

/// Proof-of-spacetime randomness must be a field element of BLS12-381: the two highest bits are
/// cleared.
#[must_use]
pub const fn post_randomness(mut r: [u8; 32]) -> [u8; 32] {
    r[31] &= 0x3f;
    r
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_matters() {
        let base = draw_randomness(b"vrf", Dst::SealRandomness, Epoch(5), b"e");
        for other in [
            draw_randomness(b"vrg", Dst::SealRandomness, Epoch(5), b"e"),
            draw_randomness(b"vrf", Dst::PoStChainCommit, Epoch(5), b"e"),
            draw_randomness(b"vrf", Dst::SealRandomness, Epoch(6), b"e"),
            draw_randomness(b"vrf", Dst::SealRandomness, Epoch(5), b"f"),
        ] {
            assert_ne!(base, other);
        }
        let digest = ticket_digest(b"vrf");
        assert_eq!(
            base,
            draw_randomness_from_digest(&digest, Dst::SealRandomness, Epoch(5), b"e")
        );
    }

    #[test]
    fn the_layout_is_the_networks() {
        // tag (8 bytes, big-endian) ‖ BLAKE2b-256(base) ‖ epoch (8 bytes, big-endian) ‖ entropy.
        let mut preimage = vec![0, 0, 0, 0, 0, 0, 0, 6];
        preimage.extend_from_slice(&ticket_digest(b"base"));
        preimage.extend_from_slice(&[0, 0, 0, 0, 0, 0, 1, 2]);
        preimage.extend_from_slice(&address_entropy(&Address::new_id(1000)));
        assert_eq!(
            draw_randomness(
                b"base",
                Dst::InteractiveSealChallengeSeed,
                Epoch(258),
                &[0x43, 0x00, 0xe8, 0x07]
            ),
            ticket_digest(&preimage)
        );
    }

    #[test]
    fn tags_are_numbers() {
        for n in 1..=9 {
            assert_eq!(Dst::try_from(n).map(|d| d as i64), Ok(n));
        }
        assert_eq!(Dst::try_from(0), Err(0));
        assert_eq!(Dst::try_from(10), Err(10));
    }

    #[test]
    fn post_randomness_is_a_field_element() {
        assert_eq!(post_randomness([0xff; 32])[31], 0x3f);
        assert_eq!(post_randomness([0xff; 32])[0], 0xff);
    }
}
