use super::*;
use crate::machine::{SectorState, Update};

const fn c(n: u8) -> Commitment {
    Commitment([n; 32])
}

fn sector(state: SectorState, own: Option<u8>) -> Sector {
    let mut s = Sector::new(state, 1);
    s.commitments = own.map(|n| SealedCommitments {
        comm_r: c(n),
        comm_d: c(0),
    });
    if state.is_upgrading() {
        s.activation = Some(Epoch(5));
        s.update = Some(Update::default());
    }
    s
}

const fn pre_commit(n: u8, same_data: bool, remade: bool) -> Known {
    Known::PreCommit {
        comm_r: c(n),
        same_data,
        remade,
    }
}

const fn on_chain(n: u8) -> Known {
    Known::Sector {
        comm_r: c(n),
        key: None,
    }
}

/// Replica 1, upgraded to this one.
const fn upgraded(n: u8) -> Known {
    Known::Sector {
        comm_r: c(n),
        key: Some(c(1)),
    }
}

const fn disk(sealed: Record, update: Record) -> Disk {
    Disk { sealed, update }
}

/// Replica 1 is the journal's where it has one, 2 another, 3 an upgrade of the first, 4 another
/// upgrade.
#[test]
fn nothing_that_the_chain_knows_is_overwritten() {
    use Record::{Nothing, Of, Unreadable};
    use Verdict::{Follow, GoOn, Stop};
    let new = |own| sector(SectorState::PreCommit1, own);
    let update = || sector(SectorState::UpdateReplica, Some(1));
    let abort = || sector(SectorState::AbortUpgrade, Some(1));
    let (pc1, ur, au, rm) = (
        Effect::PreCommit1,
        Effect::UpdateReplica,
        Effect::AbortUpgrade,
        Effect::Remove,
    );
    let first = || disk(Of(c(1)), Nothing);
    let both = |n| disk(Of(c(1)), Of(c(n)));
    let none = || disk(Nothing, Nothing);
    let broken = || disk(Unreadable, Nothing);
    let rows = [
        // The journal's own replica is made again.
        (pc1, new(Some(1)), pre_commit(1, true, true), first(), GoOn),
        (pc1, new(Some(1)), pre_commit(1, true, true), none(), GoOn),
        // A pre-commit that the journal does not know.
        (pc1, new(None), pre_commit(1, true, false), first(), Follow),
        (
            pc1,
            new(Some(2)),
            pre_commit(1, true, true),
            first(),
            Follow,
        ),
        (pc1, new(None), pre_commit(1, false, false), first(), Stop),
        (pc1, new(None), pre_commit(1, true, true), none(), GoOn),
        (pc1, new(None), pre_commit(1, true, true), broken(), Stop),
        (pc1, new(None), pre_commit(1, true, false), none(), Stop),
        (pc1, new(None), pre_commit(2, true, false), first(), Stop),
        // A sector that it does not know.
        (pc1, new(None), on_chain(1), first(), Follow),
        (pc1, new(Some(2)), on_chain(1), first(), Follow),
        (pc1, new(None), on_chain(2), first(), Stop),
        (pc1, new(None), on_chain(1), none(), Stop),
        (pc1, new(None), on_chain(1), broken(), Stop),
        (pc1, new(Some(1)), on_chain(1), none(), GoOn),
        (pc1, new(Some(1)), on_chain(1), broken(), Stop),
        (pc1, new(None), upgraded(3), both(3), Follow),
        (pc1, new(None), upgraded(3), disk(Nothing, Of(c(3))), Follow),
        (pc1, new(None), upgraded(3), first(), Stop),
        (pc1, new(Some(1)), upgraded(3), both(4), Stop),
        // An upgrade.
        (ur, update(), on_chain(1), both(4), GoOn),
        (ur, update(), on_chain(1), disk(Of(c(1)), Unreadable), GoOn),
        (ur, update(), upgraded(3), both(3), Follow),
        (ur, update(), upgraded(3), both(4), Stop),
        (ur, update(), upgraded(3), first(), Stop),
        (ur, update(), on_chain(2), first(), Stop),
        (au, abort(), on_chain(1), both(4), GoOn),
        (au, abort(), upgraded(3), both(3), Follow),
        (au, abort(), upgraded(3), both(4), GoOn),
        (au, abort(), upgraded(3), first(), GoOn),
        (au, abort(), upgraded(3), disk(Of(c(1)), Unreadable), Stop),
        // A removal.
        (rm, new(None), pre_commit(1, true, true), first(), GoOn),
        (rm, new(None), on_chain(1), first(), Follow),
        (rm, new(None), on_chain(2), first(), GoOn),
        (rm, new(None), on_chain(2), none(), GoOn),
        (rm, new(None), on_chain(2), broken(), Stop),
        (rm, new(None), upgraded(3), both(3), Follow),
    ];
    for (effect, s, known, disk, want) in rows {
        let got = verdict(effect, &s, &known, &disk);
        assert_eq!(got, want, "{effect:?} {} {known:?} {disk:?}", s.state);
    }
}

#[test]
fn no_step_ever_harms_the_replica_of_the_chain() {
    let records = [
        Record::Nothing,
        Record::Unreadable,
        Record::Of(c(1)),
        Record::Of(c(2)),
        Record::Of(c(3)),
    ];
    let effects = [
        (Effect::WaitForPieces, SectorState::WaitDeals),
        (Effect::WritePieces, SectorState::AddPiece),
        (Effect::PreCommit1, SectorState::PreCommit1),
        (Effect::PreCommit2, SectorState::PreCommit2),
        (Effect::Remove, SectorState::Removing),
        (Effect::WaitForPieces, SectorState::SnapDealsWaitDeals),
        (Effect::UpdateReplica, SectorState::UpdateReplica),
        (Effect::AbortUpgrade, SectorState::AbortUpgrade),
    ];
    for (effect, state) in effects {
        for own in [None, Some(1), Some(2)] {
            let s = sector(state, own);
            for (sealed, update) in records
                .iter()
                .flat_map(|a| records.iter().map(move |b| (*a, *b)))
            {
                let disk = disk(sealed, update);
                for known in [on_chain(1), on_chain(2), upgraded(3)] {
                    let Known::Sector { comm_r, .. } = known else {
                        continue;
                    };
                    // What the step replaces.
                    let ours = s.commitments.map(|c| c.comm_r) == Some(comm_r);
                    let (first, second) =
                        (sealed == Record::Of(comm_r), update == Record::Of(comm_r));
                    let harmed = match effect {
                        Effect::Remove => first || second,
                        _ if state.is_upgrading() => second && !ours,
                        _ => first,
                    };
                    if harmed {
                        let got = verdict(effect, &s, &known, &disk);
                        assert_ne!(got, Verdict::GoOn, "{effect:?} {own:?} {known:?} {disk:?}");
                    }
                }
            }
        }
    }
}
