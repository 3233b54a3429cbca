//! Sectors as a busy provider has them: 32 GiB, one verified deal each.

use cid::Cid;
use cid::multihash::Multihash;
use lotus_e2e::Failed;
use lotus_journal::Machine as _;
use lotus_miner::pieces::machine::{DealTerms, Offer, Phase, Place, Source, Usage};
use lotus_proofs::SealedCommitments;
use lotus_sealing::machine::{Allocation, Claim, Event, SealSeed, SealTicket, Sectors};
use lotus_sealing::{Sector, SectorPiece, Terms};
use lotus_types::{
    ActorId, Commitment, DealKey, Epoch, EpochDelta, PaddedSize, PieceCid, PieceInfo,
};

/// 2026-01-01.
const OPENED_UNIX_MS: u64 = 1_767_225_600_000;
/// One piece fills a sector of 32 GiB.
const PIECE_BYTES: u64 = 32 << 30;
/// A W3C traceparent.
const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
/// The blake2b-256 of a message, and its codec.
const MESSAGE: (u64, u64) = (0x71, 0xb220);

/// 32 bytes that differ by sector and use, and are a field element.
fn digest(number: u64, of: u8) -> [u8; 32] {
    let mut bytes = [of; 32];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[31] = 0;
    bytes
}

fn message(number: u64, of: u8) -> Result<Cid, Failed> {
    let hash = Multihash::wrap(MESSAGE.1, &digest(number, of));
    let hash = hash.map_err(|e| Failed::at("message", e))?;
    Ok(Cid::new_v1(MESSAGE.0, hash))
}

/// The deal of a sector.
pub(crate) fn deal(number: u64) -> DealKey {
    DealKey {
        client: "t1abjxfbp274xpdqcpuaykwkfb43omjotacm2p3za".into(),
        id: (u128::from(OPENED_UNIX_MS) << 80 | u128::from(number)).into(),
    }
}

fn piece(number: u64) -> Result<PieceInfo, Failed> {
    let size = PaddedSize::new(PIECE_BYTES).map_err(|e| Failed::at("piece", e))?;
    Ok(PieceInfo {
        cid: PieceCid::new(Commitment(digest(number, 1))),
        size,
        raw_size: size.unpadded().get() - 1_000,
    })
}

/// What happens to a sector from its first piece to its proof on chain.
pub(crate) fn way(number: u64) -> Result<Vec<Event>, Failed> {
    let unix_ms = OPENED_UNIX_MS;
    let batch = number / 16;
    Ok(vec![
        Event::PieceAdded {
            piece: SectorPiece {
                key: deal(number),
                piece: piece(number)?,
                offset: 0,
                terms: Terms {
                    start_epoch: Epoch(5_700_000),
                    end_epoch: Epoch(7_200_000),
                    allocation: Some(Allocation {
                        client: ActorId(3_140_000),
                        id: 70_000_000 + number,
                    }),
                    notify: None,
                },
                claim: None,
                trace: TRACE.into(),
            },
            unix_ms,
        },
        Event::StartPacking,
        Event::PiecesWritten,
        Event::Packed {
            claims: vec![(
                deal(number),
                Claim {
                    term_min: EpochDelta(518_400),
                    term_max: EpochDelta(5_256_000),
                },
            )],
        },
        Event::Ticket(SealTicket {
            value: digest(number, 2),
            epoch: Epoch(5_600_000),
        }),
        Event::PreCommit1Done,
        Event::PreCommit2Done {
            commitments: SealedCommitments {
                comm_r: Commitment(digest(number, 3)),
                comm_d: Commitment(digest(number, 4)),
            },
            unix_ms,
        },
        Event::Batched {
            batch,
            aggregate: false,
            place: 0,
            of: 1,
        },
        Event::PreCommitSent(message(batch, 5)?),
        Event::PreCommitLanded {
            epoch: Epoch(5_601_000),
        },
        Event::SeedReady(SealSeed {
            value: digest(number, 6),
            epoch: Epoch(5_601_150),
        }),
        Event::Proved { unix_ms },
        Event::Batched {
            batch,
            aggregate: false,
            place: 0,
            of: 1,
        },
        Event::CommitSent(message(batch, 7)?),
        Event::CommitLanded {
            activation: Epoch(5_602_000),
            expiration: Epoch(7_300_000),
        },
        Event::Finalized { upgradable: false },
    ])
}

/// The sector at the end of its [`way`], in `Proving`.
pub(crate) fn proving(number: u64) -> Result<Sector, Failed> {
    let sector = way(number)?
        .iter()
        .try_fold(None, |s, event| {
            Sectors::step(s.as_ref(), event).map(|(after, _)| Some(after))
        })
        .flatten();
    sector.ok_or_else(|| Failed::new("an event does not apply where it always comes"))
}

/// The hand-off of the sector's piece, long done.
pub(crate) fn offer(number: u64) -> Result<Offer, Failed> {
    Ok(Offer {
        piece: piece(number)?,
        source: Source::Unix {
            socket: "/var/lib/lotus/markets/run/deals-data.sock".into(),
            token: format!("{number:032x}"),
        },
        terms: DealTerms {
            start_epoch: 5_700_000,
            end_epoch: 7_200_000,
            allocation: Some((3_140_000, 70_000_000 + number)),
            notify: None,
        },
        usage: Usage {
            index: true,
            announce_payload: true,
            announce_piece: false,
            format: "car".into(),
            keep_unsealed: None,
        },
        trace: TRACE.into(),
        owner: None,
        phase: Phase::Active(Place {
            sector: number,
            offset: 0,
        }),
    })
}

#[cfg(test)]
mod tests {
    use lotus_sealing::SectorState;

    use super::*;

    #[test]
    fn the_way_ends_in_proving() {
        let sector = proving(7).expect("every event applies");
        assert_eq!(sector.state, SectorState::Proving);
        let events = way(7).expect("messages have CIDs").len();
        assert_eq!(sector.events, events as u64);
        assert!(deal(7) < deal(8), "deals are written in the order of keys");
    }
}
