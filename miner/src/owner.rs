//! Whose a deal is. Several deals spokes may sell for one hub: a deal is of the one that offers it
//! first, and of nobody else until that one's identity is revoked. What two of them would do about one
//! deal is done by one.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use lotus_journal::{Journal, JournalError, Map};

use crate::pieces::machine::Offer;

/// Proposals that were published, by CID, and the spoke that had it done.
const PUBLISHED: Map<String, String> = Map::new("market.published");

/// Who acts on deals.
#[derive(Clone)]
pub enum Seller {
    /// The operator, whose are all.
    Operator,
    /// A deals spoke.
    Spoke {
        /// `SERVICE/INSTANCE`.
        name: String,
        /// Whether the spoke of this name was sent away.
        is_gone: Arc<dyn Fn(&str) -> bool + Send + Sync>,
    },
}

impl fmt::Debug for Seller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name().unwrap_or("operator"))
    }
}

impl Seller {
    /// The name that a deal of this seller bears.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Operator => None,
            Self::Spoke { name, .. } => Some(name),
        }
    }

    /// Whether a deal with this owner, empty for none, is this seller's.
    #[must_use]
    pub fn owns(&self, owner: &str) -> bool {
        self.name().is_none_or(|me| owner.is_empty() || owner == me)
    }

    /// Whether a hand-off is this seller's.
    #[must_use]
    pub fn has(&self, offer: &Offer) -> bool {
        self.owns(offer.owner.as_deref().unwrap_or_default())
    }

    /// Whether a deal with this owner is, or can become, this seller's.
    #[must_use]
    pub fn may_take(&self, owner: &str) -> bool {
        match self {
            Self::Operator => true,
            Self::Spoke { is_gone, .. } => self.owns(owner) || is_gone(owner),
        }
    }
}

/// What to do about a deal of another.
#[must_use]
pub fn fix(owner: &str) -> String {
    format!(
        "leave it to that spoke; if it will never come back, `lotus-miner credentials revoke {owner}` \
         lets others have its deals"
    )
}

/// Why proposals are not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishedError {
    /// Another spoke did.
    #[error("proposal {proposal} was published by {owner}")]
    NotYours {
        /// Its CID.
        proposal: String,
        /// Who did.
        owner: String,
    },
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Who has published what. Clones share it.
#[derive(Clone, Debug)]
pub struct Published(Journal);

impl Published {
    /// In this journal.
    #[must_use]
    pub const fn new(journal: Journal) -> Self {
        Self(journal)
    }

    /// Notes that a seller publishes these, before it does; all of them, or none if one is another's.
    /// Returns those that nobody had before.
    pub fn claim(
        &self,
        seller: &Seller,
        proposals: &BTreeSet<String>,
    ) -> Result<Vec<String>, PublishedError> {
        let Some(name) = seller.name() else {
            return Ok(Vec::new());
        };
        self.0.write(|tx| {
            let mut fresh = Vec::new();
            for proposal in proposals {
                match tx.get(&PUBLISHED, proposal)? {
                    Some(owner) if owner == name => continue,
                    Some(owner) if !seller.may_take(&owner) => {
                        let proposal = proposal.clone();
                        return Err(PublishedError::NotYours { proposal, owner });
                    }
                    Some(_) => {}
                    None => fresh.push(proposal.clone()),
                }
                tx.put(&PUBLISHED, proposal, &name.to_owned())?;
            }
            Ok(fresh)
        })
    }

    /// Takes a note back: the chain takes none of these.
    pub fn forget(&self, proposals: &[String]) -> Result<(), JournalError> {
        self.0.write(|tx| {
            for proposal in proposals {
                tx.remove(&PUBLISHED, proposal)?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spoke(name: &str, gone: &'static [&'static str]) -> Seller {
        Seller::Spoke {
            name: name.into(),
            is_gone: Arc::new(move |who| gone.contains(&who)),
        }
    }

    #[test]
    fn a_deal_is_of_one_until_that_one_is_gone() {
        let (a, late) = (spoke("deals/a", &[]), spoke("deals/b", &["deals/a"]));
        // Seller, owner: whether it is the seller's, and whether it can be.
        for (seller, owner, is, may) in [
            (&a, "", true, true),
            (&a, "deals/a", true, true),
            (&a, "deals/b", false, false),
            (&late, "deals/a", false, true),
            (&late, "deals/c", false, false),
            (&Seller::Operator, "deals/a", true, true),
        ] {
            assert_eq!(seller.owns(owner), is, "{seller:?} {owner}");
            assert_eq!(seller.may_take(owner), may, "{seller:?} {owner}");
        }
    }

    #[test]
    fn a_proposal_is_published_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("j")).unwrap();
        let published = Published::new(journal);
        let set = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<BTreeSet<_>>();
        let (a, b) = (spoke("deals/a", &[]), spoke("deals/b", &[]));
        assert_eq!(published.claim(&a, &set(&["1", "2"])).unwrap(), ["1", "2"]);
        assert!(published.claim(&a, &set(&["1", "2"])).unwrap().is_empty());
        // All or none: 3 stays free.
        let e = published.claim(&b, &set(&["2", "3"])).unwrap_err();
        assert!(matches!(e, PublishedError::NotYours { owner, .. } if owner == "deals/a"));
        assert_eq!(published.claim(&a, &set(&["3"])).unwrap(), ["3"]);
        published.forget(&["3".into()]).unwrap();
        assert_eq!(published.claim(&b, &set(&["3"])).unwrap(), ["3"]);
        // What one who is gone has published is not published again by mistake: it changes hands.
        let late = spoke("deals/b", &["deals/a"]);
        assert!(published.claim(&late, &set(&["1"])).unwrap().is_empty());
        assert!(published.claim(&a, &set(&["1"])).is_err());
        assert!(
            published
                .claim(&Seller::Operator, &set(&["1"]))
                .unwrap()
                .is_empty()
        );
    }
}
