//! Which worker a task fits.

use std::fmt;

use lotus_proofs::aggregate_memory;
use lotus_types::SectorSize;
use serde::{Deserialize, Serialize};

use crate::Task;
use crate::slots::cache_bytes;

/// What a worker on another host says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Declared {
    /// Names of the tasks that it does.
    pub steps: Vec<String>,
    /// CPU threads.
    pub cores: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes that its scratch directory can take, copies included that it can drop.
    pub scratch: u64,
    /// GPUs that it proves with.
    pub gpus: u32,
}

/// Who runs a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    /// A process of the hub's own host.
    Local {
        /// Whether it leaves to others what they can do.
        rest_only: bool,
    },
    /// A worker on another host.
    Remote(Declared),
}

/// Which of two free workers gets a task that both can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rather {
    Any,
    /// One of the hub's host.
    Here,
    /// One of another host.
    Elsewhere,
}

/// What a task needs of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Needs {
    step: &'static str,
    can_be_remote: bool,
    rather: Rather,
    /// Bytes of memory.
    pub(crate) memory: u64,
    /// Bytes of scratch space on another host.
    pub(crate) scratch: u64,
}

/// Why a worker does not get a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Misfit {
    LocalOnly,
    LeftToOthers,
    Step,
    Memory { needs: u64, has: u64 },
    Scratch { needs: u64, has: u64 },
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        match self {
            Self::LocalOnly => {
                f.write_str("it is on another host, and the task is done on the hub's")
            }
            Self::LeftToOthers => f.write_str("workers.seal_locally is false"),
            Self::Step => f.write_str("it does not do this step"),
            Self::Memory { needs, has } => {
                write!(
                    f,
                    "needs {} MiB of memory, has {} MiB",
                    mib(*needs),
                    mib(*has)
                )
            }
            Self::Scratch { needs, has } => {
                write!(
                    f,
                    "needs {} MiB of scratch, has {} MiB",
                    mib(*needs),
                    mib(*has)
                )
            }
        }
    }
}

impl Needs {
    /// The table. Memory in parts of the sector, after Lotus' minimum for 32 GiB sectors
    /// (storage/sealer/storiface/resources.go): PreCommit1 56 GiB, which is two layers and the
    /// parents that are read all the time; PreCommit2 15 GiB; updates the same. A vanilla proof
    /// opens leaves, and holds no more than its paths. The SNARK of a PoSt: what Lotus says, with
    /// its parameters in memory.
    ///
    /// A block is for the hub's host, if that has a free worker: its proof takes seconds, of which
    /// none are left for a network. That of a deadline is for others, who are there for it, so
    /// that the workers beside the sectors stay free to open them.
    pub(crate) fn of(task: &Task) -> Self {
        const BASE: u64 = 64 << 20;
        let part = |size: SectorSize, of_32: u64| size.bytes() / 32 * of_32;
        let (memory, scratch) = match (task, task.size()) {
            (Task::PreCommit1 { .. }, Some(size)) => {
                (part(size, 56), 2 * size.bytes() + cache_bytes(size))
            }
            (Task::PreCommit2 { .. }, Some(size)) => {
                (part(size, 16), size.bytes() + cache_bytes(size))
            }
            (Task::Commit { .. }, Some(size)) => (part(size, 1), size.bytes() + cache_bytes(size)),
            (Task::Aggregate { seals, .. }, Some(size)) => (aggregate_memory(size, seals.len()), 0),
            // The cache of a finalized sector is small, but nobody promises that it is final.
            (Task::ReplicaUpdate { .. }, Some(size)) => {
                (part(size, 16), 3 * size.bytes() + 2 * cache_bytes(size))
            }
            (Task::ProveUpdate { .. }, Some(size)) => {
                (part(size, 1), 2 * size.bytes() + 2 * cache_bytes(size))
            }
            (Task::ProvePost { .. }, Some(size)) if task.is_for_a_block() => (part(size, 33), 0),
            (Task::ProvePost { .. }, Some(size)) => (part(size, 62), 0),
            _ => (0, 0),
        };
        Self {
            step: task.name(),
            can_be_remote: task.can_be_remote(),
            rather: match task {
                Task::ProvePost { .. } if task.is_for_a_block() => Rather::Here,
                Task::ProvePost { .. } => Rather::Elsewhere,
                _ => Rather::Any,
            },
            memory: memory + BASE,
            scratch,
        }
    }

    /// The same for a task that must not leave the hub's host.
    pub(crate) const fn kept_here(self) -> Self {
        Self {
            can_be_remote: false,
            ..self
        }
    }

    /// Whether the task is rather for `one` than for `other`.
    pub(crate) fn rather_for(&self, one: &Host, other: &Host) -> bool {
        let here = |host: &Host| matches!(host, Host::Local { .. });
        match self.rather {
            Rather::Any => false,
            Rather::Here => here(one) && !here(other),
            Rather::Elsewhere => !here(one) && here(other),
        }
    }
}

/// Whether a worker with this much left may have a task. A local worker is not asked for
/// resources: the operator has sized the hub's host by `[workers]`.
pub(crate) fn fits(needs: &Needs, host: &Host) -> Result<(), Misfit> {
    let has = match host {
        Host::Local { rest_only } if *rest_only && needs.can_be_remote => {
            return Err(Misfit::LeftToOthers);
        }
        Host::Local { .. } => return Ok(()),
        Host::Remote(declared) => declared,
    };
    if !needs.can_be_remote {
        Err(Misfit::LocalOnly)
    } else if !has.steps.iter().any(|s| s == needs.step) {
        Err(Misfit::Step)
    } else if has.memory < needs.memory {
        Err(Misfit::Memory {
            needs: needs.memory,
            has: has.memory,
        })
    } else if has.scratch < needs.scratch {
        Err(Misfit::Scratch {
            needs: needs.scratch,
            has: has.scratch,
        })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use lotus_types::{ActorId, SectorId, SectorNumber};

    use super::*;

    use crate::{Class, Post, PostClaim, PostKind};

    const GIB: u64 = 1 << 30;

    fn sector() -> SectorId {
        SectorId {
            miner: ActorId(1000),
            number: SectorNumber(1),
        }
    }

    fn pre_commit1(size: SectorSize) -> Needs {
        Needs::of(&Task::PreCommit1 {
            sector: sector(),
            size,
            ticket: [1; 32],
            layout: Vec::new(),
            unsealed: "u".into(),
            sealed: "s".into(),
            cache: "c".into(),
        })
    }

    fn declared() -> Declared {
        Declared {
            steps: Class::ALL
                .iter()
                .flat_map(|c| Task::remote(*c))
                .map(|s| (*s).to_owned())
                .collect(),
            cores: 16,
            memory: 64 * GIB,
            scratch: 700 * GIB,
            gpus: 0,
        }
    }

    #[test]
    fn a_worker_gets_what_it_can_hold() {
        let needs = pre_commit1(SectorSize::S32GiB);
        assert!((56 * GIB..57 * GIB).contains(&needs.memory), "{needs:?}");
        // Eleven layers, the data, the replica, and the trees.
        assert!((600 * GIB..640 * GIB).contains(&needs.scratch), "{needs:?}");
        let with = |change: fn(&mut Declared)| {
            let mut d = declared();
            change(&mut d);
            fits(&needs, &Host::Remote(d))
        };
        assert_eq!(with(|_| {}), Ok(()));
        assert_eq!(with(|d| d.steps.clear()), Err(Misfit::Step));
        assert!(matches!(
            with(|d| d.memory = 55 * GIB),
            Err(Misfit::Memory { .. })
        ));
        assert!(matches!(
            with(|d| d.scratch = 599 * GIB),
            Err(Misfit::Scratch { .. })
        ));
        let small = pre_commit1(SectorSize::S8MiB);
        assert!(small.memory < GIB && small.scratch < GIB, "{small:?}");
    }

    #[test]
    fn what_needs_the_hubs_disks_stays_there() {
        let finalize = Needs::of(&Task::Finalize {
            sector: sector(),
            size: SectorSize::S32GiB,
            cache: "c".into(),
        });
        assert_eq!(
            fits(&finalize, &Host::Remote(declared())),
            Err(Misfit::LocalOnly)
        );
        let local = |rest_only| Host::Local { rest_only };
        assert_eq!(fits(&finalize, &local(true)), Ok(()));
        let seal = pre_commit1(SectorSize::S32GiB);
        assert_eq!(fits(&seal, &local(false)), Ok(()));
        assert_eq!(fits(&seal, &local(true)), Err(Misfit::LeftToOthers));
    }

    fn post(kind: PostKind) -> Post {
        Post {
            kind,
            miner: ActorId(1000),
            size: SectorSize::S32GiB,
            randomness: [1; 32],
            sectors: Vec::new(),
        }
    }

    #[test]
    fn a_block_stays_here_and_a_deadline_leaves() {
        use PostKind::{Window, Winning};
        let here = Host::Local { rest_only: false };
        let there = Host::Remote(Declared {
            memory: 62 * GIB + GIB,
            ..declared()
        });
        let small = Host::Remote(Declared {
            memory: 40 * GIB,
            ..declared()
        });
        let open = |kind| Task::OpenPost(post(kind));
        let prove = |kind| Task::ProvePost {
            claim: PostClaim::from(&post(kind)),
            openings: Vec::new().into(),
        };
        let verify = |kind| Task::VerifyPost {
            claim: PostClaim::from(&post(kind)),
            proof: Vec::new(),
        };
        // What the large and the small worker elsewhere may do, and which side comes first.
        for (task, large, little, first) in [
            (open(Window), false, false, None),
            (open(Winning), false, false, None),
            (prove(Window), true, false, Some(&there)),
            (prove(Winning), true, true, Some(&here)),
            (verify(Window), false, false, None),
            (verify(Winning), false, false, None),
            (
                Task::CheckSectors {
                    miner: ActorId(1000),
                    size: SectorSize::S32GiB,
                    randomness: None,
                    sectors: Vec::new(),
                },
                false,
                false,
                None,
            ),
        ] {
            let needs = Needs::of(&task);
            let name = task.name();
            assert_eq!(fits(&needs, &here), Ok(()), "{name}");
            assert_eq!(fits(&needs, &there).is_ok(), large, "{name}");
            assert_eq!(fits(&needs, &small).is_ok(), little, "{name}");
            for (one, other) in [(&here, &there), (&there, &here)] {
                let rather = needs.rather_for(one, other);
                assert_eq!(rather, first == Some(one), "{name}");
            }
            assert!(!needs.rather_for(&here, &here) && !needs.rather_for(&there, &there));
            let kept = fits(&needs.kept_here(), &there);
            assert_eq!(kept, Err(Misfit::LocalOnly), "{name}");
        }
    }
}
