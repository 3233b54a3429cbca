//! What the messages of a sector say, as pure functions of the sector.

use lotus_actors::RawBytes;
use lotus_actors::miner::{
    DataActivationNotification, PieceActivationManifest, VerifiedAllocationKey,
};
use lotus_types::{Commitment, Epoch, EpochDelta};

use crate::SealingConfig;
use crate::machine::{Sector, SectorPiece};

/// Epochs in a day of 30-second epochs: how much longer than an allocation asks a sector lives,
/// because it becomes active later than it is pre-committed.
const TERM_SLACK: EpochDelta = EpochDelta(2_880);

/// commD as the chain wants it: a sector without pieces has none.
pub(crate) fn data_cid(s: &Sector, comm_d: &Commitment) -> Option<lotus_actors::Cid> {
    (!s.pieces.is_empty()).then(|| comm_d.unsealed_cid())
}

pub(crate) fn manifest(p: &SectorPiece, claimed: bool) -> PieceActivationManifest {
    let allocation = p.terms.allocation.filter(|_| claimed);
    PieceActivationManifest {
        cid: p.piece.cid.cid(),
        size: lotus_actors::PaddedPieceSize(p.piece.size.get()),
        verified_allocation_key: allocation.map(|a| VerifiedAllocationKey {
            client: a.client.0,
            id: a.id,
        }),
        notify: p
            .terms
            .notify
            .iter()
            .map(|n| DataActivationNotification {
                address: n.address,
                payload: RawBytes::new(n.payload.clone()),
            })
            .collect(),
    }
}

/// When the sector's commitment ends: after its pieces, within what allocations and the network
/// allow.
pub(crate) fn expiration(cfg: &SealingConfig, head: Epoch, pieces: &[SectorPiece]) -> Epoch {
    let claims = || pieces.iter().filter_map(|p| p.claim);
    let earliest = pieces
        .iter()
        .map(|p| p.terms.end_epoch)
        .chain(claims().map(|c| head + c.term_min + TERM_SLACK))
        .fold(
            head + EpochDelta(cfg.expected_sector_duration_epochs),
            Epoch::max,
        );
    claims()
        .map(|c| head + c.term_max)
        .fold(
            head + EpochDelta(cfg.max_sector_duration_epochs),
            Epoch::min,
        )
        .min(earliest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Claim, testing};

    #[test]
    fn a_sector_outlives_its_pieces_within_the_limits() {
        let cfg = SealingConfig {
            expected_sector_duration_epochs: 1_000_000,
            max_sector_duration_epochs: 3_000_000,
            ..SealingConfig::default()
        };
        let head = Epoch(500);
        let piece = |end: i64, claim: Option<(i64, i64)>| {
            let mut p = testing::placed(1, testing::piece(1, 1 << 20), 0);
            p.terms.end_epoch = Epoch(end);
            p.claim = claim.map(|(min, max)| Claim {
                term_min: EpochDelta(min),
                term_max: EpochDelta(max),
            });
            p
        };
        for (pieces, end) in [
            (vec![], 1_000_500),
            (vec![piece(900_000, None)], 1_000_500),
            (vec![piece(2_000_000, None), piece(5, None)], 2_000_000),
            (vec![piece(9_000_000, None)], 3_000_500),
            (vec![piece(5, Some((1_500_000, 2_500_000)))], 1_503_380),
            (vec![piece(2_800_000, Some((10, 2_500_000)))], 2_500_500),
            (vec![piece(5, Some((10, 700_000)))], 700_500),
        ] {
            assert_eq!(expiration(&cfg, head, &pieces), Epoch(end), "{pieces:?}");
        }
    }

    #[test]
    fn the_manifest_claims_only_what_is_there() {
        let mut p = testing::placed(7, testing::piece(1, 1 << 20), 0);
        p.terms.allocation = Some(crate::machine::Allocation {
            client: lotus_types::ActorId(1001),
            id: 9,
        });
        let key = manifest(&p, true).verified_allocation_key.unwrap();
        assert_eq!((key.client, key.id), (1001, 9));
        assert_eq!(manifest(&p, false).verified_allocation_key, None);
        assert_eq!(manifest(&p, true).size.0, 1 << 20);
    }
}
