//! The life of a deal, as a table. Checkpoints carry Boost's names where it has them.

use lotus_journal::{EffectId, Machine, Map};
use lotus_types::{DealKey, PaddedSize};
use serde::{Deserialize, Serialize};

use crate::validate::{Proposal, Source};

/// How far a deal has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Checkpoint {
    /// Journaled; the bytes are not here yet.
    Accepted,
    /// The bytes are here, complete and verified.
    Transferred,
    /// The message that publishes the deal is under way (MK1.2).
    Published,
    /// The deal is on chain (MK1.2).
    PublishConfirmed,
    /// The hub has journaled the hand-off, and pulls.
    Offered,
    /// The piece has a place in a sector.
    AddedPiece,
    /// The sector is being sealed.
    Sealing,
    /// The sector is proven.
    Active,
    /// Given up: the record says why.
    Failed,
    /// The bytes did not come in time.
    Expired,
}

impl Checkpoint {
    /// Whether nothing follows.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Active | Self::Failed | Self::Expired)
    }

    /// The name as shown.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::Transferred => "Transferred",
            Self::Published => "Published",
            Self::PublishConfirmed => "PublishConfirmed",
            Self::Offered => "Offered",
            Self::AddedPiece => "AddedPiece",
            Self::Sealing => "Sealing",
            Self::Active => "Active",
            Self::Failed => "Failed",
            Self::Expired => "Expired",
        }
    }
}

/// A deal in the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What was agreed.
    pub proposal: Proposal,
    /// How far it has come.
    pub checkpoint: Checkpoint,
    /// Unix milliseconds of the acceptance.
    pub accepted_unix_ms: u64,
    /// The hub's credit for the piece.
    pub credit: String,
    /// Trace of the request that made the deal: W3C traceparent, or empty.
    pub trace: String,
    /// The hub has all bytes: the staging copy is not needed any more.
    pub stored: bool,
    /// Sector and offset (padded bytes), once the piece has a place.
    pub place: Option<(u64, u64)>,
    /// Sealing state of the sector.
    pub sealing_state: String,
    /// Why it failed, or what went wrong last.
    pub reason: String,
    /// The deal on chain (MK1.2), once the message that publishes it is under way.
    #[serde(default)]
    pub published: Option<Publication>,
    /// Every byte was uploaded in chunks, or was here before the deal; they are being checked.
    #[serde(default)]
    pub checking: bool,
    /// Why the operator gives the deal up, while the hub is asked for its piece back; or empty.
    #[serde(default)]
    pub cancel: String,
}

impl Record {
    /// Whether the deal still waits for its bytes.
    #[must_use]
    pub const fn awaits_bytes(&self) -> bool {
        matches!(self.checkpoint, Checkpoint::Accepted) && !self.checking
    }
}

/// A deal that is published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// CID of the message.
    pub cid: String,
    /// The deal's id on chain, once it has one.
    pub deal_id: Option<u64>,
}

/// The hub's view of the piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HubView {
    /// Journaled by the hub; the bytes are on their way.
    Taken,
    /// Complete and verified in the hub.
    Stored,
    /// In a sector.
    Placed {
        /// The sector.
        sector: u64,
        /// Padded bytes.
        offset: u64,
        /// Lotus' name of the sector's state.
        state: String,
    },
    /// In a proven sector.
    Active {
        /// The sector.
        sector: u64,
        /// Padded bytes.
        offset: u64,
    },
    /// Refused or lost for good.
    Failed(String),
    /// The hub does not know the piece, or not any more.
    Unknown,
}

/// What happens to a deal.
#[derive(Clone, Debug)]
pub enum Event {
    /// A proposal passed every check.
    Accept {
        /// The proposal.
        proposal: Box<Proposal>,
        /// Unix milliseconds.
        unix_ms: u64,
        /// The hub's credit.
        credit: String,
        /// W3C traceparent.
        trace: String,
    },
    /// Every byte is on disk, and none of them is checked.
    Uploaded,
    /// The operator has a file of this length for an offline deal that names none.
    Length(u64),
    /// The bytes are here, complete, verified and on disk.
    Transferred,
    /// The bytes can not be had.
    TransferFailed(String),
    /// The hub refused the offer for good.
    Refused(String),
    /// What the hub says of the piece.
    Hub(HubView),
    /// The time for the transfer is over.
    TooLate(String),
    /// The hub sends the message with this CID, which publishes the deal.
    Published(String),
    /// The deal is on chain.
    PublishConfirmed {
        /// CID of the message.
        cid: String,
        /// The deal's id.
        deal_id: u64,
    },
    /// The chain does not take the deal.
    PublishFailed(String),
    /// The operator gives the deal up.
    Cancel(String),
    /// The operator wants a deal that failed before its hand-off to be tried once more, from
    /// this time on, in Unix milliseconds.
    Retry(u64),
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Effect {
    /// Download the piece.
    Pull,
    /// Check the bytes that are here.
    Check,
    /// Hand it to the hub.
    Offer,
    /// Remove the staging copy.
    DropStaging,
    /// Give the credit back.
    ReleaseCredit,
    /// Take the offer back from the hub.
    Withdraw,
}

/// The machine.
#[derive(Debug)]
pub struct DealMachine;

impl Machine for DealMachine {
    const NAME: &'static str = "deals";
    const STATES: Map<DealKey, Record> = Map::new("deals.states");
    const EFFECTS: Map<EffectId, (Vec<u8>, Effect)> = Map::new("deals.effects");
    type Key = DealKey;
    type State = Record;
    type Event = Event;
    type Effect = Effect;

    fn step(state: Option<&Record>, event: &Event) -> Option<(Record, Vec<Effect>)> {
        match state {
            None => create(event),
            Some(record) => advance(record, event),
        }
    }
}

fn create(event: &Event) -> Option<(Record, Vec<Effect>)> {
    match event {
        Event::Accept {
            proposal,
            unix_ms,
            credit,
            trace,
        } => {
            let effects = match proposal.source {
                Source::Put | Source::Offline => vec![],
                Source::Http(_) => vec![Effect::Pull],
            };
            let record = Record {
                proposal: (**proposal).clone(),
                checkpoint: Checkpoint::Accepted,
                accepted_unix_ms: *unix_ms,
                credit: credit.clone(),
                trace: trace.clone(),
                stored: false,
                place: None,
                sealing_state: String::new(),
                reason: String::new(),
                published: None,
                checking: false,
                cancel: String::new(),
            };
            Some((record, effects))
        }
        Event::Uploaded
        | Event::Length(_)
        | Event::Transferred
        | Event::Cancel(_)
        | Event::Retry(_)
        | Event::TransferFailed(_)
        | Event::Refused(_)
        | Event::Hub(_)
        | Event::TooLate(_)
        | Event::Published(_)
        | Event::PublishConfirmed { .. }
        | Event::PublishFailed(_) => None,
    }
}

fn advance(now: &Record, event: &Event) -> Option<(Record, Vec<Effect>)> {
    use Checkpoint::{
        Accepted, Active, AddedPiece, Expired, Failed, Offered, PublishConfirmed, Published,
        Sealing, Transferred,
    };
    use Effect::{Check, DropStaging, Offer, Pull, ReleaseCredit, Withdraw};
    let to = |checkpoint, reason: &str, effects: Vec<Effect>| {
        let next = Record {
            checkpoint,
            reason: reason.to_owned(),
            checking: false,
            cancel: String::new(),
            ..now.clone()
        };
        Some((next, effects))
    };
    let published = |checkpoint, cid: &str, deal_id, effects| {
        let publication = Publication {
            cid: cid.to_owned(),
            deal_id,
        };
        let next = Record {
            checkpoint,
            reason: String::new(),
            published: Some(publication),
            ..now.clone()
        };
        (next != *now).then_some((next, effects))
    };
    let by_proposal = now.proposal.signed.is_some();
    match (now.checkpoint, event) {
        // A deal by proposal waits here until it is on chain.
        (Accepted, Event::Transferred) if by_proposal => to(Transferred, "", vec![]),
        (Accepted, Event::Transferred) => to(Transferred, "", vec![Offer]),
        (Accepted, Event::TransferFailed(why))
        | (Transferred | PublishConfirmed, Event::Refused(why))
        | (Transferred | Published, Event::PublishFailed(why)) => {
            to(Failed, why, vec![DropStaging, ReleaseCredit])
        }
        (Transferred | Published, Event::Published(cid)) if by_proposal => {
            published(Published, cid, None, vec![])
        }
        (Transferred | Published, Event::PublishConfirmed { cid, deal_id }) if by_proposal => {
            published(PublishConfirmed, cid, Some(*deal_id), vec![Offer])
        }
        (Accepted, Event::Uploaded) if !now.checking => {
            let next = Record {
                checking: true,
                ..now.clone()
            };
            Some((next, vec![Check]))
        }
        // Until its bytes are here it may be another file the next time.
        (Accepted, Event::Length(len))
            if now.awaits_bytes()
                && now.proposal.takes_any_length()
                && PaddedSize::to_hold(*len) == Some(now.proposal.piece.size) =>
        {
            let mut next = now.clone();
            next.proposal.piece.raw_size = *len;
            (next != *now).then_some((next, vec![]))
        }
        (Accepted, Event::TooLate(why)) if !now.checking => {
            to(Expired, why, vec![DropStaging, ReleaseCredit])
        }
        (Accepted, Event::Cancel(why)) => to(Failed, why, vec![DropStaging, ReleaseCredit]),
        // The hub may have it already: its answer to the withdrawal decides.
        // A deal by proposal is on chain, or may be on its way there, and stays there.
        (Transferred | Offered, Event::Cancel(why)) if now.cancel.is_empty() && !by_proposal => {
            let next = Record {
                cancel: why.clone(),
                ..now.clone()
            };
            Some((next, vec![Withdraw]))
        }
        // The hub never had it, so it can have it now.
        (Failed | Expired, Event::Retry(at))
            if now.place.is_none() && !now.stored && now.published.is_none() =>
        {
            let next = Record {
                checkpoint: Accepted,
                accepted_unix_ms: *at,
                reason: String::new(),
                ..now.clone()
            };
            let effects = match now.proposal.source {
                Source::Put | Source::Offline => vec![],
                Source::Http(_) => vec![Pull],
            };
            Some((next, effects))
        }
        // The hub decides from the hand-off on: it may have the piece although its answer is lost.
        (Transferred | PublishConfirmed | Offered | AddedPiece | Sealing, Event::Hub(view)) => {
            follow(now, view)
        }
        // Late repeats are normal.
        (
            _,
            Event::Accept { .. }
            | Event::Uploaded
            | Event::Length(_)
            | Event::TooLate(_)
            | Event::Retry(_),
        )
        | (
            Accepted,
            Event::Refused(_)
            | Event::Hub(_)
            | Event::Published(_)
            | Event::PublishConfirmed { .. }
            | Event::PublishFailed(_),
        )
        | (
            Transferred | Published | PublishConfirmed,
            Event::Transferred
            | Event::TransferFailed(_)
            | Event::Published(_)
            | Event::PublishConfirmed { .. }
            | Event::Cancel(_),
        )
        | (Published, Event::Hub(_) | Event::Refused(_))
        | (PublishConfirmed, Event::PublishFailed(_))
        | (
            Offered | AddedPiece | Sealing | Active | Failed | Expired,
            Event::Transferred
            | Event::TransferFailed(_)
            | Event::Refused(_)
            | Event::Published(_)
            | Event::PublishConfirmed { .. }
            | Event::PublishFailed(_)
            | Event::Cancel(_),
        )
        | (Active | Failed | Expired, Event::Hub(_)) => None,
    }
}

/// Sealing states in which the sector still takes pieces or has just been closed.
const OPEN_SECTOR: [&str; 7] = [
    "",
    "WaitDeals",
    "AddPiece",
    "Packing",
    "SnapDealsWaitDeals",
    "SnapDealsAddPiece",
    "SnapDealsPacking",
];

fn follow(now: &Record, view: &HubView) -> Option<(Record, Vec<Effect>)> {
    let mut next = now.clone();
    next.reason.clear();
    let had = now.stored;
    match view {
        HubView::Taken => next.checkpoint = now.checkpoint.max(Checkpoint::Offered),
        HubView::Stored => {
            next.checkpoint = now.checkpoint.max(Checkpoint::Offered);
            next.stored = true;
        }
        HubView::Placed {
            sector,
            offset,
            state,
        } => {
            let sealing = !OPEN_SECTOR.contains(&state.as_str());
            let reached = if sealing {
                Checkpoint::Sealing
            } else {
                Checkpoint::AddedPiece
            };
            next.checkpoint = now.checkpoint.max(reached);
            next.stored = true;
            next.place = Some((*sector, *offset));
            // Too late: a sector has it.
            next.cancel.clear();
            if !state.is_empty() {
                next.sealing_state.clone_from(state);
            }
        }
        HubView::Active { sector, offset } => {
            next.checkpoint = Checkpoint::Active;
            next.stored = true;
            next.place = Some((*sector, *offset));
            next.cancel.clear();
            "Proving".clone_into(&mut next.sealing_state);
        }
        HubView::Failed(why) => {
            next.checkpoint = Checkpoint::Failed;
            next.reason.clone_from(if now.cancel.is_empty() {
                why
            } else {
                &now.cancel
            });
            next.cancel.clear();
            return Some((next, vec![Effect::DropStaging, Effect::ReleaseCredit]));
        }
        HubView::Unknown => {
            if !now.cancel.is_empty() {
                next.checkpoint = Checkpoint::Failed;
                next.reason = std::mem::take(&mut next.cancel);
                return Some((next, vec![Effect::DropStaging, Effect::ReleaseCredit]));
            }
            return match (now.checkpoint, now.stored) {
                // It has not got the offer yet: that effect is still pending.
                (Checkpoint::Transferred | Checkpoint::PublishConfirmed, _) => None,
                // It lost the offer, and the bytes are still here.
                (_, false) => {
                    next.checkpoint = if now.published.is_some() {
                        Checkpoint::PublishConfirmed
                    } else {
                        Checkpoint::Transferred
                    };
                    next.place = None;
                    Some((next, vec![Effect::Offer]))
                }
                (_, true) => {
                    next.checkpoint = Checkpoint::Failed;
                    "the hub does not know the piece any more, and the staging copy is gone"
                        .clone_into(&mut next.reason);
                    Some((next, vec![Effect::ReleaseCredit]))
                }
            };
        }
    }
    let effects = if next.stored && !had {
        vec![Effect::DropStaging]
    } else {
        vec![]
    };
    (next != *now).then_some((next, effects))
}

#[cfg(test)]
mod tests;
