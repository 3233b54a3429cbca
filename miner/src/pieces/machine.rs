//! The hand-off of one piece, as a table.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lotus_journal::{EffectId, Machine, Map};
use lotus_types::{DealKey, PieceInfo};
use serde::{Deserialize, Serialize};

/// Where the bytes are pulled from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// A spoke on this host passes a descriptor.
    Unix {
        /// The spoke's data socket.
        socket: PathBuf,
        /// Opaque name of the staged bytes.
        token: String,
    },
    /// Ranged GET.
    Http {
        /// Where.
        url: String,
        /// Headers to send.
        headers: BTreeMap<String, String>,
    },
    /// The hub has them already, where they would be pulled to.
    Staged,
    /// A spoke on another host has them.
    Spoke {
        /// Its name, `SERVICE/INSTANCE`.
        name: String,
        /// Opaque name of the staged bytes.
        token: String,
    },
}

/// What the chain is told about the piece.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DealTerms {
    /// First epoch at which the piece must be in a proven sector; 0: none.
    pub start_epoch: i64,
    /// Last epoch of the commitment; 0: as long as the sector lives.
    pub end_epoch: i64,
    /// Allocation of verified data: client actor id, allocation id.
    pub allocation: Option<(u64, u64)>,
    /// Actor to notify when the sector is proven, with a payload.
    pub notify: Option<(String, Vec<u8>)>,
}

/// What the spokes do with the piece.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Index its blocks.
    pub index: bool,
    /// Advertise its blocks.
    pub announce_payload: bool,
    /// Advertise the piece itself.
    pub announce_piece: bool,
    /// "car" or "raw".
    pub format: String,
    /// Whether the client wants the raw piece kept beside its sealed sector, if it said so.
    #[serde(default)]
    pub keep_unsealed: Option<bool>,
}

/// A place in a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Number of the sector.
    pub sector: u64,
    /// Padded bytes from its start.
    pub offset: u64,
}

/// How far the hand-off is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Journaled.
    Offered,
    /// Bytes arrive.
    Pulling,
    /// Complete and verified.
    Stored,
    /// In a sector.
    Placed(Place),
    /// The sector is proven.
    Active(Place),
    /// Taken back by the spoke.
    Withdrawn,
    /// Refused for good.
    Failed {
        /// Why.
        reason: String,
        /// Where it was, if the sector was lost.
        place: Option<Place>,
    },
}

/// One hand-off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The piece.
    pub piece: PieceInfo,
    /// Where its bytes come from.
    pub source: Source,
    /// What the chain is told.
    pub terms: DealTerms,
    /// What the spokes do with it.
    pub usage: Usage,
    /// Trace context of the offer, so that pull and placement join its trace.
    pub trace: String,
    /// The spoke whose deal it is; none of one that the operator handed over.
    #[serde(default)]
    pub owner: Option<String>,
    /// How far it is.
    pub phase: Phase,
}

/// What happens to a hand-off.
#[derive(Clone, Debug)]
pub enum Event {
    /// A spoke offers it. Again: perhaps from another source.
    Offered(Box<Offer>),
    /// The first bytes are on their way.
    PullStarted,
    /// All bytes are here and right.
    Stored,
    /// The bytes are wrong, or no sector will ever take them.
    Refused(String),
    /// A sector took it.
    Placed(Place),
    /// The sector is proven.
    Proven,
    /// The sector is lost.
    SectorLost(String),
    /// The sector gives the piece back: it needs another.
    Returned,
    /// The spoke takes it back.
    Withdrawn,
}

/// What is to be done. Each is run again after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Effect {
    /// Pull the bytes.
    Pull,
    /// Find a sector.
    Place,
    /// Delete what was pulled, unless another hand-off needs it.
    Discard,
}

impl Effect {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Place => "place",
            Self::Discard => "discard",
        }
    }
}

impl Source {
    pub(super) fn name(&self) -> String {
        match self {
            Self::Unix { socket, .. } => socket.display().to_string(),
            Self::Http { url, .. } => url.clone(),
            Self::Staged => "the hub itself".into(),
            Self::Spoke { name, .. } => name.clone(),
        }
    }
}

/// All hand-offs of the journal.
#[derive(Debug)]
pub struct PieceMachine;

impl Machine for PieceMachine {
    const NAME: &'static str = "pieces";
    const STATES: Map<DealKey, Offer> = Map::new("pieces.offers");
    const EFFECTS: Map<EffectId, (Vec<u8>, Effect)> = Map::new("pieces.effects");
    type Key = DealKey;
    type State = Offer;
    type Event = Event;
    type Effect = Effect;

    fn step(now: Option<&Offer>, event: &Event) -> Option<(Offer, Vec<Effect>)> {
        let Some(now) = now else {
            return match event {
                Event::Offered(offer) => Some(((**offer).clone(), vec![Effect::Pull])),
                Event::PullStarted
                | Event::Stored
                | Event::Refused(_)
                | Event::Placed(_)
                | Event::Proven
                | Event::SectorLost(_)
                | Event::Returned
                | Event::Withdrawn => None,
            };
        };
        let (phase, effects) = next(&now.phase, event)?;
        let mut offer = now.clone();
        if let Event::Offered(again) = event {
            offer.source = again.source.clone();
        }
        offer.phase = phase;
        Some((offer, effects))
    }
}

fn next(phase: &Phase, event: &Event) -> Option<(Phase, Vec<Effect>)> {
    use Phase::{Active, Failed, Offered, Placed, Pulling, Stored, Withdrawn};
    let failed = |reason: &String, place| Failed {
        reason: reason.clone(),
        place,
    };
    Some(match (phase, event) {
        // The happy path.
        (Offered, Event::PullStarted) => (Pulling, vec![]),
        (Offered | Pulling, Event::Stored) => (Stored, vec![Effect::Place]),
        (Stored, Event::Placed(place)) => (Placed(*place), vec![]),
        (Placed(place), Event::Proven) => (Active(*place), vec![]),
        // Of an active piece too: a deep reorg can take an upgrade away.
        (Placed(_) | Active(_), Event::Returned) => (Stored, vec![Effect::Place]),

        // The spoke restarted: the pull goes on from where it says now.
        (Offered, Event::Offered(_)) => (Offered, vec![]),
        (Pulling, Event::Offered(_)) => (Pulling, vec![]),

        (Offered | Pulling | Stored, Event::Refused(why)) => {
            (failed(why, None), vec![Effect::Discard])
        }
        (Offered | Pulling | Stored, Event::Withdrawn) => (Withdrawn, vec![Effect::Discard]),
        (Placed(place) | Active(place), Event::SectorLost(why)) => {
            (failed(why, Some(*place)), vec![Effect::Discard])
        }

        // Late repeats.
        (Offered, Event::Placed(_) | Event::Proven | Event::SectorLost(_) | Event::Returned)
        | (
            Pulling,
            Event::PullStarted
            | Event::Placed(_)
            | Event::Proven
            | Event::SectorLost(_)
            | Event::Returned,
        )
        | (
            Stored,
            Event::Offered(_)
            | Event::PullStarted
            | Event::Stored
            | Event::Proven
            | Event::SectorLost(_)
            | Event::Returned,
        )
        | (
            Placed(_),
            Event::Offered(_)
            | Event::PullStarted
            | Event::Stored
            | Event::Refused(_)
            | Event::Placed(_)
            | Event::Withdrawn,
        )
        | (
            Active(_),
            Event::Offered(_)
            | Event::PullStarted
            | Event::Stored
            | Event::Refused(_)
            | Event::Placed(_)
            | Event::Proven
            | Event::Withdrawn,
        )
        | (
            Withdrawn | Failed { .. },
            Event::Offered(_)
            | Event::PullStarted
            | Event::Stored
            | Event::Refused(_)
            | Event::Placed(_)
            | Event::Proven
            | Event::SectorLost(_)
            | Event::Returned
            | Event::Withdrawn,
        ) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lotus_types::{Commitment, PaddedSize, PieceCid};
    use proptest::prelude::*;

    const P: Place = Place {
        sector: 3,
        offset: 0,
    };

    fn offer(phase: Phase, token: &str) -> Offer {
        Offer {
            piece: PieceInfo {
                cid: PieceCid::new(Commitment([0; 32])),
                size: PaddedSize::new(128).unwrap(),
                raw_size: 100,
            },
            source: Source::Unix {
                socket: "/s".into(),
                token: token.into(),
            },
            terms: DealTerms::default(),
            usage: Usage::default(),
            trace: String::new(),
            owner: None,
            phase,
        }
    }

    fn phases() -> [Phase; 7] {
        [
            Phase::Offered,
            Phase::Pulling,
            Phase::Stored,
            Phase::Placed(P),
            Phase::Active(P),
            Phase::Withdrawn,
            lost("x", None),
        ]
    }

    fn lost(reason: &str, place: Option<Place>) -> Phase {
        Phase::Failed {
            reason: reason.into(),
            place,
        }
    }

    fn events() -> [Event; 9] {
        [
            Event::Offered(Box::new(offer(Phase::Offered, "second"))),
            Event::PullStarted,
            Event::Stored,
            Event::Refused("y".into()),
            Event::Placed(P),
            Event::Proven,
            Event::SectorLost("z".into()),
            Event::Withdrawn,
            Event::Returned,
        ]
    }

    /// Every state and event. `None`: nothing changes.
    #[test]
    fn the_table() {
        use Effect::{Discard, Place as Find};
        let row = |phase: Phase, effects: &[Effect]| Some((phase, effects.to_vec()));
        let refused = || row(lost("y", None), &[Discard]);
        let gone = || row(Phase::Withdrawn, &[Discard]);
        let stored = || row(Phase::Stored, &[Find]);
        let sector_lost = || row(lost("z", Some(P)), &[Discard]);
        #[rustfmt::skip]
        let table = [
            // Offered                   PullStarted                Stored    Refused    Placed                   Proven                   SectorLost     Withdrawn  Returned
            [row(Phase::Offered, &[]), row(Phase::Pulling, &[]), stored(), refused(), None,                        None,                       None,          gone(), None],
            [row(Phase::Pulling, &[]), None,                     stored(), refused(), None,                        None,                       None,          gone(), None],
            [None,                     None,                     None,     refused(), row(Phase::Placed(P), &[]),  None,                       None,          gone(), None],
            [None,                     None,                     None,     None,      None,                        row(Phase::Active(P), &[]), sector_lost(), None,   stored()],
            [None,                     None,                     None,     None,      None,                        None,                       sector_lost(), None,   stored()],
            [None,                     None,                     None,     None,      None,                        None,                       None,          None,   None],
            [None,                     None,                     None,     None,      None,                        None,                       None,          None,   None],
        ];
        for (phase, row) in phases().into_iter().zip(table) {
            for (event, want) in events().into_iter().zip(row) {
                let got = PieceMachine::step(Some(&offer(phase.clone(), "first")), &event);
                let got = got.map(|(offer, effects)| (offer.phase, effects));
                assert_eq!(got, want, "{phase:?} {event:?}");
            }
        }
        for event in events() {
            let got = PieceMachine::step(None, &event);
            assert_eq!(
                got.is_some(),
                matches!(event, Event::Offered(_)),
                "{event:?}"
            );
        }
    }

    #[test]
    fn a_repeated_offer_moves_the_source_only() {
        let now = offer(Phase::Pulling, "first");
        let (after, _) = PieceMachine::step(Some(&now), &events()[0]).unwrap();
        assert_eq!(after, offer(Phase::Pulling, "second"));
    }

    proptest! {
        /// No dead end: a hand-off that is not at its end has something to do or waits for a
        /// sector. And a place, once given, stays until the sector gives the piece back.
        #[test]
        fn every_way_leads_on(picks in proptest::collection::vec(0usize..9, 0..40)) {
            let (mut now, mut open) = PieceMachine::step(None, &events()[0]).unwrap();
            for i in picks {
                let before = now.phase.clone();
                if let Some((after, effects)) = PieceMachine::step(Some(&now), &events()[i]) {
                    // The effect at hand is settled by the event that it causes.
                    let work_done = matches!(events()[i], Event::Stored | Event::Refused(_) | Event::Placed(_));
                    if work_done || !matches!(after.phase, Phase::Offered | Phase::Pulling | Phase::Stored) {
                        open.clear();
                    }
                    open.extend(effects);
                    now = after;
                }
                match &now.phase {
                    Phase::Offered | Phase::Pulling => prop_assert_eq!(&open, &[Effect::Pull]),
                    Phase::Stored => prop_assert_eq!(&open, &[Effect::Place]),
                    Phase::Placed(_) | Phase::Active(_) => prop_assert!(open.is_empty()),
                    Phase::Withdrawn | Phase::Failed { .. } => prop_assert_eq!(&open, &[Effect::Discard]),
                }
                let back = matches!(events()[i], Event::Returned);
                if let Phase::Placed(p) = before && !back {
                    let kept = match &now.phase {
                        Phase::Placed(q) | Phase::Active(q) => Some(*q),
                        Phase::Failed { place, .. } => *place,
                        _ => None,
                    };
                    prop_assert_eq!(kept, Some(p));
                }
            }
        }
    }
}
