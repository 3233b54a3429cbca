//! Which address pays for a message: pure.

use lotus_types::{Address, TokenAmount};

use crate::MessageKind;

/// Who may act for a miner, as ID addresses.
#[derive(Clone, Debug)]
pub struct Roles {
    /// The owner.
    pub owner: Address,
    /// The worker.
    pub worker: Address,
    /// Control addresses.
    pub control: Vec<Address>,
}

/// [`crate::AddressConfig`] with ID addresses.
#[derive(Clone, Debug, Default)]
pub struct Controls {
    /// For pre-commits.
    pub pre_commit: Vec<Address>,
    /// For prove-commits.
    pub commit: Vec<Address>,
    /// For terminations.
    pub terminate: Vec<Address>,
    /// For publishing deals.
    pub publish: Vec<Address>,
    /// Leave the owner's funds alone.
    pub disable_owner_fallback: bool,
    /// Leave the worker's funds alone where a control address is named.
    pub disable_worker_fallback: bool,
}

impl Controls {
    fn of(&self, kind: MessageKind) -> &[Address] {
        match kind {
            MessageKind::PreCommit => &self.pre_commit,
            MessageKind::Commit => &self.commit,
            MessageKind::Terminate => &self.terminate,
            MessageKind::Publish => &self.publish,
            MessageKind::Post
            | MessageKind::Declare
            | MessageKind::Operator
            | MessageKind::Other => &[],
        }
    }

    fn is_named(&self, a: &Address) -> bool {
        [
            &self.pre_commit,
            &self.commit,
            &self.terminate,
            &self.publish,
        ]
        .iter()
        .any(|list| list.contains(a))
    }
}

/// Addresses that may pay for a kind of message, the preferred first. After Lotus'
/// `AddressSelector`; WindowPoSt goes further: at the end it may have anything.
#[must_use]
pub fn preference(kind: MessageKind, roles: &Roles, controls: &Controls) -> Vec<Address> {
    let (owner, worker) = (&roles.owner, &roles.worker);
    let mut list: Vec<Address> = Vec::new();
    let mut add = |a: &Address| {
        if !list.contains(a) && (a == owner || a == worker || roles.control.contains(a)) {
            list.push(*a);
        }
        list.len()
    };
    let mut named = 0;
    if matches!(kind, MessageKind::Post | MessageKind::Declare) {
        for a in roles.control.iter().filter(|a| !controls.is_named(a)) {
            if a != owner && a != worker {
                named = add(a);
            }
        }
    }
    for a in controls.of(kind) {
        named = add(a);
    }
    if named == 0 || !controls.disable_worker_fallback {
        add(worker);
    }
    if !controls.disable_owner_fallback {
        add(owner);
    }
    if kind == MessageKind::Post {
        for a in roles.control.iter().chain([worker, owner]) {
            add(a);
        }
    }
    list
}

/// An address that may pay, as the chain and the node's wallet have it.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) address: Address,
    /// Balance less what messages under way may take.
    pub(crate) available: TokenAmount,
    /// What it keeps for more urgent kinds of messages.
    pub(crate) floor: TokenAmount,
    /// The node's wallet has its key.
    pub(crate) key_at_hand: bool,
    /// A message of it does not get on chain, and every later one waits behind.
    pub(crate) blocked: bool,
}

/// The addresses to try, in this order, for a message that takes `need` at most: the first of
/// the preferred that has it; failing that the one with the most, because `need` is a limit and
/// not the price. WindowPoSt and declarations, which have a deadline, may ask all of them, and
/// avoid those that are blocked.
pub(crate) fn rank(
    kind: MessageKind,
    need: &TokenAmount,
    candidates: &[Candidate],
) -> Vec<Address> {
    let urgent = matches!(kind, MessageKind::Post | MessageKind::Declare);
    let spare = |c: &Candidate| &c.available - &c.floor;
    let mut usable: Vec<&Candidate> = candidates.iter().filter(|c| c.key_at_hand).collect();
    // Stable, so that equals stay in the order of preference.
    usable.sort_by(|a, b| {
        let class = |c: &Candidate| (urgent && c.blocked, spare(c) < *need);
        class(a).cmp(&class(b)).then_with(|| {
            if spare(a) < *need {
                spare(b).cmp(&spare(a))
            } else {
                std::cmp::Ordering::Equal
            }
        })
    });
    let most = if urgent { usable.len() } else { 1 };
    usable.into_iter().take(most).map(|c| c.address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use MessageKind::{Commit, Declare, Operator, Other, Post, PreCommit};

    const OWNER: u64 = 1;
    const WORKER: u64 = 2;

    fn ids(list: &[u64]) -> Vec<Address> {
        list.iter().copied().map(Address::new_id).collect()
    }

    fn controls(pre_commit: &[u64], commit: &[u64], off: (bool, bool)) -> Controls {
        Controls {
            pre_commit: ids(pre_commit),
            commit: ids(commit),
            disable_owner_fallback: off.0,
            disable_worker_fallback: off.1,
            ..Controls::default()
        }
    }

    #[test]
    fn each_kind_has_its_addresses() {
        let roles = Roles {
            owner: Address::new_id(OWNER),
            worker: Address::new_id(WORKER),
            control: ids(&[10, 11, 12]),
        };
        let (on, off) = ((false, false), (true, true));
        for (kind, pre_commit, commit, fallback, want) in [
            // Nothing is named: the control addresses are for WindowPoSt.
            (Post, &[][..], &[][..], on, &[10, 11, 12, WORKER, OWNER][..]),
            (Declare, &[], &[], on, &[10, 11, 12, WORKER, OWNER]),
            (PreCommit, &[], &[], on, &[WORKER, OWNER]),
            (Commit, &[], &[], on, &[WORKER, OWNER]),
            (Other, &[], &[], on, &[WORKER, OWNER]),
            // Named ones serve their kind, WindowPoSt takes them last.
            (PreCommit, &[11], &[12], on, &[11, WORKER, OWNER]),
            (Commit, &[11], &[12], on, &[12, WORKER, OWNER]),
            (Post, &[11], &[12], on, &[10, WORKER, OWNER, 11, 12]),
            (Declare, &[11], &[12], on, &[10, WORKER, OWNER]),
            // Without fallback.
            (PreCommit, &[11], &[12], off, &[11]),
            (Declare, &[11], &[12], off, &[10]),
            (Post, &[11], &[12], off, &[10, 11, 12, WORKER, OWNER]),
            // The worker stays where nothing else would pay.
            (Other, &[11], &[12], off, &[WORKER]),
            (Operator, &[], &[], off, &[WORKER]),
            (PreCommit, &[], &[], off, &[WORKER]),
            // Who may not act for the miner is not asked.
            (PreCommit, &[77], &[], off, &[WORKER]),
            (PreCommit, &[77, 12, 12], &[], on, &[12, WORKER, OWNER]),
        ] {
            assert_eq!(
                preference(kind, &roles, &controls(pre_commit, commit, fallback)),
                ids(want),
                "{kind:?} with {pre_commit:?} {commit:?} {fallback:?}"
            );
        }
    }

    #[test]
    fn an_owner_that_is_its_own_worker_is_asked_once() {
        let roles = Roles {
            owner: Address::new_id(OWNER),
            worker: Address::new_id(OWNER),
            control: ids(&[OWNER]),
        };
        for kind in MessageKind::ALL {
            assert_eq!(
                preference(kind, &roles, &Controls::default()),
                ids(&[OWNER])
            );
        }
    }

    fn candidate(id: u64, available: i64, marks: &str) -> Candidate {
        Candidate {
            address: Address::new_id(id),
            available: TokenAmount::from_atto(available),
            floor: TokenAmount::from_atto(10),
            key_at_hand: !marks.contains('k'),
            blocked: marks.contains('b'),
        }
    }

    #[test]
    fn the_first_with_enough_pays_else_the_richest() {
        for (kind, list, want) in [
            (Commit, vec![(1, 110, ""), (2, 500, "")], &[1][..]),
            // The floor counts for all but WindowPoSt.
            (Commit, vec![(1, 109, ""), (2, 500, "")], &[2]),
            (Post, vec![(1, 100, ""), (2, 500, "")], &[1, 2]),
            // Nobody has enough for the limit: the price may be less.
            (Commit, vec![(1, 20, ""), (2, 30, "")], &[2]),
            (Post, vec![(1, 0, ""), (2, 3, ""), (3, 9, "")], &[3, 2, 1]),
            // No key, no use.
            (Post, vec![(1, 500, "k"), (2, 3, "")], &[2]),
            (Commit, vec![(1, 500, "k")], &[]),
            // WindowPoSt does not queue behind a message that does not move.
            (Post, vec![(1, 500, "b"), (2, 500, "")], &[2, 1]),
            (Post, vec![(1, 500, "b"), (2, 3, "")], &[2, 1]),
            (Post, vec![(1, 500, "b")], &[1]),
            (Commit, vec![(1, 500, "b"), (2, 500, "")], &[1]),
            // Nor do declarations; but what is kept for WindowPoSt they leave alone.
            (Declare, vec![(1, 500, "b"), (2, 110, "")], &[2, 1]),
            (Declare, vec![(1, 109, ""), (2, 110, "")], &[2, 1]),
        ] {
            let mut list: Vec<_> = list.iter().map(|(i, n, m)| candidate(*i, *n, m)).collect();
            for c in list.iter_mut().filter(|_| kind == Post) {
                c.floor = TokenAmount::default();
            }
            let need = TokenAmount::from_atto(100);
            assert_eq!(rank(kind, &need, &list), ids(want), "{kind:?} {list:?}");
        }
    }
}
