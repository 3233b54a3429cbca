use hub_proto::v1::AllocationResponse;

use super::{Proposal, Rules};
use crate::mk20::{Code, Refusal};

/// Checks the proposal against its allocation, and fills in the allocation's client. `None`: the
/// chain has no such allocation.
pub fn check_allocation(
    proposal: &mut Proposal,
    allocation: Option<&AllocationResponse>,
    rules: &Rules<'_>,
) -> Result<(), Refusal> {
    let Some((_, id)) = proposal.allocation else {
        return Ok(());
    };
    let bad = |error: String, fix: &str| {
        Err(Refusal::new(Code::InvalidProduct, error, fix).at("products.ddo_v1.allocation_id"))
    };
    let Some(a) = allocation else {
        return bad(
            format!("{} has no allocation {id}", proposal.key.client),
            "name an allocation of the client that is not claimed yet",
        );
    };
    let duration = (proposal.end_epoch - proposal.start_epoch).0;
    if a.provider != rules.provider.0 {
        return bad(
            format!(
                "allocation {id} is for t0{}, this is {}",
                a.provider, rules.provider
            ),
            "allocate to this provider",
        );
    }
    if a.piece_cid.parse() != Ok(proposal.piece.cid) || a.piece_size != proposal.piece.size.get() {
        return bad(
            format!(
                "allocation {id} is for piece {} of {} bytes",
                a.piece_cid, a.piece_size
            ),
            "propose that piece, or name another allocation",
        );
    }
    if a.expiration <= rules.height.0 || proposal.start_epoch.0 > a.expiration {
        return bad(
            format!("allocation {id} expires at {}", a.expiration),
            "start before it expires, or make a new allocation",
        );
    }
    if duration < a.term_min || duration > a.term_max {
        return bad(
            format!(
                "allocation {id} is for {} to {} epochs, not {duration}",
                a.term_min, a.term_max
            ),
            "choose a duration within the allocation's terms",
        );
    }
    proposal.allocation = Some((a.client, id));
    Ok(())
}
