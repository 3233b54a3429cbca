//! Which sector takes a piece, and when a sector closes. Pure.

use std::collections::BTreeMap;

use lotus_proofs::layout;
use lotus_types::{Epoch, EpochDelta, PieceInfo, SectorNumber, SectorSize};

use crate::SealingConfig;
use crate::machine::{Claim, Sector, SectorState};

/// A sector with less room than this part of its size is full: 512 MiB of 32 GiB.
const SMALLEST_USEFUL: u64 = 64;

/// What to do with a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Put it into this sector, at this offset.
    Into(SectorNumber, u64),
    /// Begin to upgrade this sector with it.
    Upgrade(SectorNumber),
    /// Open a sector for it.
    Open,
    /// Close this sector and choose again.
    Close(SectorNumber),
    /// Nothing can take it; so many sectors are in use.
    NoRoom(usize),
}

/// What a piece asks of a sector that is on chain already.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Upgrade {
    /// Last epoch of the deal.
    pub(crate) end: Epoch,
    /// Limits of its allocation.
    pub(crate) claim: Option<Claim>,
    /// The chain's head.
    pub(crate) head: Epoch,
    /// The sector to upgrade, if one is needed: proven, and it fits.
    pub(crate) candidate: Option<SectorNumber>,
}

/// Epochs that an upgrade may take: so much longer than an allocation asks a sector must live.
const UPGRADE_TIME: EpochDelta = EpochDelta(2_880);

impl Upgrade {
    /// Whether a sector with this end lives long enough, and not too long.
    pub(crate) fn fits(&self, end: Epoch) -> bool {
        let left = end - self.head;
        let claim = self
            .claim
            .is_none_or(|c| left.0 >= c.term_min.0 + UPGRADE_TIME.0 && left <= c.term_max);
        end >= self.end && claim
    }
}

/// First the fullest waiting sector that the piece fits, then a sector without data, then a new
/// one.
pub(crate) fn choose(
    size: SectorSize,
    cfg: &SealingConfig,
    sectors: &BTreeMap<SectorNumber, Sector>,
    piece: &PieceInfo,
    upgrade: &Upgrade,
) -> Choice {
    let mut waiting: Vec<_> = sectors
        .iter()
        .filter(|(_, s)| s.state.takes_pieces())
        .collect();
    waiting.sort_by_key(|(n, s)| (room(size, s), **n));
    for (n, s) in &waiting {
        if s.pieces.len() < max_pieces(cfg)
            && (s.state == SectorState::WaitDeals
                || s.expiration.is_some_and(|end| upgrade.fits(end)))
            && let Some(offset) = fit(size, s, piece)
        {
            return Choice::Into(**n, offset);
        }
    }
    let in_use = in_use(sectors);
    let upgrading = sectors.values().filter(|s| s.state.is_upgrading()).count();
    let free = |limit: u32, used: usize| limit == 0 || used < limit as usize;
    let room = free(cfg.max_sealing_sectors, in_use);
    let opens = room && cfg.make_new_sector_for_deals;
    let upgrades = upgrade
        .candidate
        .filter(|_| room && free(cfg.max_upgrading_sectors, upgrading));
    let choice = match upgrades {
        Some(n) if !(opens && cfg.prefer_new_sectors_for_deals) => Choice::Upgrade(n),
        _ if opens => Choice::Open,
        _ => return Choice::NoRoom(in_use),
    };
    match waiting.first() {
        Some((n, _)) if waiting.len() >= cfg.max_wait_deals_sectors.max(1) as usize => {
            Choice::Close(**n)
        }
        _ => choice,
    }
}

/// Sectors that have begun and are not done.
pub(crate) fn in_use(sectors: &BTreeMap<SectorNumber, Sector>) -> usize {
    sectors.values().filter(|s| s.state.is_sealing()).count()
}

fn max_pieces(cfg: &SealingConfig) -> usize {
    cfg.max_pieces_per_sector.max(1) as usize
}

/// The offset that the piece would get behind those that the sector has.
fn fit(size: SectorSize, sector: &Sector, piece: &PieceInfo) -> Option<u64> {
    let mut pieces = sector.piece_infos();
    pieces.push(*piece);
    let placed = layout(size, &pieces).ok()?;
    placed.iter().rev().find(|p| !p.filler).map(|p| p.offset)
}

/// Bytes behind the last piece, Fr32 padding included.
pub(crate) fn room(size: SectorSize, sector: &Sector) -> u64 {
    let end = sector.pieces.last();
    let end = end.map_or(0, |p| p.offset.saturating_add(p.piece.size.get()));
    size.bytes().saturating_sub(end)
}

/// When a waiting sector closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// At once.
    Now,
    /// At this time, Unix milliseconds, unless something changes.
    At(u64),
}

/// A sector closes when it is full, when its oldest piece has waited long enough, or when a piece
/// must soon be proven.
pub(crate) fn due(
    size: SectorSize,
    cfg: &SealingConfig,
    sector: &Sector,
    height: Option<Epoch>,
    now_unix_ms: u64,
) -> Due {
    let full = room(size, sector) < size.bytes() / SMALLEST_USEFUL
        || sector.pieces.len() >= max_pieces(cfg);
    let pressing = height.is_some_and(|h| {
        sector.pieces.iter().any(|p| {
            let start = p.terms.start_epoch;
            start.0 > 0 && (start - h).0 <= cfg.start_epoch_buffer_epochs
        })
    });
    let at = sector
        .opened_unix_ms
        .saturating_add(cfg.wait_deals_secs.saturating_mul(1_000));
    if full || pressing || at <= now_unix_ms {
        Due::Now
    } else {
        Due::At(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Event, testing};
    use crate::machine::{SectorPiece, Terms, step};
    use lotus_types::PaddedSize;
    use proptest::prelude::*;

    const SIZE: SectorSize = SectorSize::S8MiB;

    fn piece(n: u8, size: u64) -> PieceInfo {
        testing::piece(n, size)
    }

    fn add(sectors: &mut BTreeMap<SectorNumber, Sector>, n: SectorNumber, p: SectorPiece) {
        let event = Event::PieceAdded {
            piece: p,
            unix_ms: 1_000,
        };
        let (after, _) = step(sectors.get(&n), &event).unwrap();
        sectors.insert(n, after);
    }

    fn config() -> SealingConfig {
        SealingConfig {
            wait_deals_secs: 10,
            max_wait_deals_sectors: 2,
            max_sealing_sectors: 3,
            ..SealingConfig::default()
        }
    }

    proptest! {
        /// Every piece is placed once, aligned, without overlap, and within the limits.
        #[test]
        fn pieces_pack_into_sectors(powers in proptest::collection::vec(7u32..=23, 1..60)) {
            let cfg = SealingConfig { max_sealing_sectors: 0, ..config() };
            let mut sectors = BTreeMap::new();
            for (i, power) in powers.iter().enumerate() {
                let p = piece(u8::try_from(i).unwrap(), 1 << power);
                let mut rounds = 0;
                loop {
                    rounds += 1;
                    prop_assert!(rounds < 4);
                    match choose(SIZE, &cfg, &sectors, &p, &Upgrade::default()) {
                        Choice::Into(n, offset) => {
                            add(&mut sectors, n, testing::placed(i as u64, p, offset));
                            break;
                        }
                        Choice::Open => {
                            let n = SectorNumber(sectors.len() as u64);
                            add(&mut sectors, n, testing::placed(i as u64, p, 0));
                            break;
                        }
                        Choice::Close(n) => {
                            let closed = step(sectors.get(&n), &Event::StartPacking).unwrap().0;
                            sectors.insert(n, closed);
                        }
                        Choice::Upgrade(_) | Choice::NoRoom(_) => {
                            prop_assert!(false, "nothing to upgrade, and no limit");
                        }
                    }
                }
                let waiting = sectors.values().filter(|s| s.state == SectorState::WaitDeals);
                prop_assert!(waiting.count() <= 2);
            }
            let mut keys = Vec::new();
            for s in sectors.values() {
                let mut end = 0;
                for p in &s.pieces {
                    prop_assert_eq!(p.offset % p.piece.size.get(), 0);
                    prop_assert!(p.offset >= end);
                    end = p.offset + p.piece.size.get();
                    keys.push(p.key.clone());
                }
                prop_assert!(end <= SIZE.bytes());
                // The offsets that were promised are those of the sector's final layout.
                let whole = layout(SIZE, &s.piece_infos()).unwrap();
                let offsets: Vec<_> = whole.iter().filter(|p| !p.filler).map(|p| p.offset).collect();
                prop_assert_eq!(offsets, s.pieces.iter().map(|p| p.offset).collect::<Vec<_>>());
            }
            keys.sort();
            keys.dedup();
            prop_assert_eq!(keys.len(), powers.len());
        }
    }

    #[test]
    fn limits_hold() {
        let cfg = config();
        let mut sectors = BTreeMap::new();
        let whole = piece(1, SIZE.bytes());
        for n in 0..2 {
            assert_eq!(
                choose(SIZE, &cfg, &sectors, &whole, &Upgrade::default()),
                Choice::Open
            );
            add(&mut sectors, SectorNumber(n), testing::placed(n, whole, 0));
        }
        assert_eq!(
            choose(SIZE, &cfg, &sectors, &whole, &Upgrade::default()),
            Choice::Close(SectorNumber(0))
        );
        for n in 0..2 {
            let n = SectorNumber(n);
            let closed = step(sectors.get(&n), &Event::StartPacking).unwrap().0;
            sectors.insert(n, closed);
        }
        assert_eq!(
            choose(SIZE, &cfg, &sectors, &whole, &Upgrade::default()),
            Choice::Open
        );
        add(&mut sectors, SectorNumber(2), testing::placed(2, whole, 0));
        assert_eq!(
            choose(SIZE, &cfg, &sectors, &whole, &Upgrade::default()),
            Choice::NoRoom(3)
        );
    }

    #[test]
    fn a_sector_without_data_comes_before_a_new_one() {
        let mut sectors = BTreeMap::new();
        let n = SectorNumber(7);
        let mut cc = Sector::new(SectorState::Available, 0);
        cc.activation = Some(Epoch(10));
        cc.expiration = Some(Epoch(9_000));
        sectors.insert(n, cc);
        let piece = piece(1, SIZE.bytes() / 4);
        let want = |end, claim: Option<(i64, i64)>| Upgrade {
            end: Epoch(end),
            claim: claim.map(|(min, max)| Claim {
                term_min: EpochDelta(min),
                term_max: EpochDelta(max),
            }),
            head: Epoch(1_000),
            candidate: Some(n),
        };
        for (end, claim, fits) in [
            (9_000, None, true),
            (9_001, None, false),
            (0, Some((5_120, 8_000)), true),
            (0, Some((5_121, 9_000)), false),
            (0, Some((100, 7_999)), false),
        ] {
            let want = want(end, claim);
            assert_eq!(want.fits(Epoch(9_000)), fits, "{end} {claim:?}");
        }
        let choose = |cfg: &SealingConfig, sectors: &_, want: &Upgrade| {
            choose(SIZE, cfg, sectors, &piece, want)
        };
        let want = want(9_000, None);
        let with = |f: fn(&mut SealingConfig)| {
            let mut cfg = config();
            f(&mut cfg);
            cfg
        };
        let plain = config();
        assert_eq!(choose(&plain, &sectors, &want), Choice::Upgrade(n));
        let new_first = with(|c| c.prefer_new_sectors_for_deals = true);
        assert_eq!(choose(&new_first, &sectors, &want), Choice::Open);
        let no_new = with(|c| c.make_new_sector_for_deals = false);
        assert_eq!(choose(&no_new, &sectors, &want), Choice::Upgrade(n));
        let nothing = Upgrade::default();
        assert_eq!(choose(&plain, &sectors, &nothing), Choice::Open);
        assert_eq!(choose(&no_new, &sectors, &nothing), Choice::NoRoom(0));
        // Once it takes pieces, the next that fits joins it.
        add(&mut sectors, n, testing::placed(1, piece, 0));
        let offset = SIZE.bytes() / 4;
        assert_eq!(choose(&plain, &sectors, &want), Choice::Into(n, offset));
        let longer = Upgrade {
            end: Epoch(9_001),
            candidate: None,
            ..want.clone()
        };
        assert_eq!(choose(&plain, &sectors, &longer), Choice::Open);
        let one = with(|c| c.max_upgrading_sectors = 1);
        let other = Upgrade {
            end: Epoch(9_001),
            candidate: Some(SectorNumber(8)),
            ..want
        };
        assert_eq!(
            choose(&plain, &sectors, &other),
            Choice::Upgrade(SectorNumber(8))
        );
        assert_eq!(choose(&one, &sectors, &other), Choice::Open);
    }

    #[test]
    fn a_sector_closes_in_time() {
        let cfg = config();
        let mut sectors = BTreeMap::new();
        let n = SectorNumber(0);
        let quarter = piece(1, SIZE.bytes() / 4);
        assert_eq!(quarter.size, PaddedSize::new(SIZE.bytes() / 4).unwrap());
        let mut first = testing::placed(0, quarter, 0);
        first.terms = Terms {
            start_epoch: Epoch(1_000),
            ..first.terms
        };
        add(&mut sectors, n, first);
        let at = |s: &BTreeMap<_, _>, h: i64, ms| due(SIZE, &cfg, &s[&n], Some(Epoch(h)), ms);
        assert_eq!(at(&sectors, 100, 2_000), Due::At(11_000));
        assert_eq!(at(&sectors, 100, 11_000), Due::Now);
        assert_eq!(at(&sectors, 1_000 - 480, 2_000), Due::Now);
        assert_eq!(due(SIZE, &cfg, &sectors[&n], None, 2_000), Due::At(11_000));
        let half = piece(2, SIZE.bytes() / 2);
        add(&mut sectors, n, testing::placed(1, half, SIZE.bytes() / 2));
        assert_eq!(at(&sectors, 100, 2_000), Due::Now);
    }
}
