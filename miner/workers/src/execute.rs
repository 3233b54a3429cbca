use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use lotus_proofs::{
    PostSector, ProofError, Prover, SealingSector, UnpaddedOffset, Verifier, add_pieces,
    check_sector,
};
use lotus_types::PieceInfo;

use crate::{Output, PostFile, SealProof, Task};

/// Does a task on this thread. Blocking, for minutes or hours.
pub fn execute(prover: &(impl Prover + Verifier), task: &Task) -> Result<Output, ProofError> {
    match task {
        Task::AddPieces {
            size,
            layout,
            pieces,
            unsealed,
        } => {
            let mut open = |want: &PieceInfo| -> io::Result<Box<dyn Read>> {
                let path = pieces
                    .iter()
                    .find(|p| p.cid == want.cid)
                    .map(|p| &p.path)
                    .ok_or_else(|| {
                        io::Error::new(
                            io::ErrorKind::NotFound,
                            format!("no file was given for piece {}", want.cid),
                        )
                    })?;
                // Bounded: a file that is longer than the piece must not fill the sector.
                Ok(Box::new(File::open(path)?.take(want.raw_size)))
            };
            add_pieces(unsealed, *size, layout, &mut open)?;
            Ok(Output::Done)
        }
        Task::PreCommit1 {
            sector,
            size,
            ticket,
            layout,
            unsealed,
            sealed,
            cache,
        } => prover
            .pre_commit1(
                &sealing(*sector, *size),
                ticket,
                layout,
                unsealed,
                sealed,
                cache,
            )
            .map(Output::PreCommit1),
        Task::PreCommit2 {
            sector,
            size,
            pc1,
            sealed,
            cache,
            attempt: _,
        } => prover
            .pre_commit2(&sealing(*sector, *size), pc1, sealed, cache)
            .map(Output::Commitments),
        Task::Commit {
            sector,
            size,
            ticket,
            seed,
            layout,
            commitments,
            sealed,
            cache,
        } => prover
            .commit(
                &sealing(*sector, *size),
                ticket,
                seed,
                layout,
                commitments,
                sealed,
                cache,
            )
            .map(Output::Proof),
        Task::Aggregate { miner, size, seals } => {
            let inputs: Vec<_> = seals.iter().map(SealProof::inputs).collect();
            let proofs: Vec<_> = seals.iter().map(|s| s.proof.clone()).collect();
            prover
                .aggregate_seal_proofs(*miner, *size, &inputs, &proofs)
                .map(Output::Proof)
        }
        Task::Finalize {
            sector,
            size,
            cache,
        } => prover
            .finalize(&sealing(*sector, *size), cache)
            .map(|()| Output::Done),
        Task::Unseal {
            sector,
            size,
            ticket,
            comm_d,
            sealed,
            cache,
            scratch,
            out,
            offset,
            len,
        } => write_out(out, |writer| {
            prover.unseal(
                &sealing(*sector, *size),
                ticket,
                comm_d,
                sealed,
                cache,
                scratch,
                writer,
                UnpaddedOffset(*offset),
                *len,
            )
        }),
        Task::ReplicaUpdate {
            files,
            layout,
            unsealed,
        } => prover
            .replica_update(&files.paths(), layout, unsealed)
            .map(Output::Commitments),
        Task::ProveUpdate {
            files,
            old_comm_r,
            commitments,
        } => prover
            .prove_update(&files.paths(), old_comm_r, commitments)
            .map(Output::Proof),
        Task::UnsealUpdate {
            files,
            comm_d,
            out,
            offset,
            len,
        } => write_out(out, |writer| {
            prover.unseal_update(
                &files.paths(),
                comm_d,
                writer,
                UnpaddedOffset(*offset),
                *len,
            )
        }),
        Task::OpenPost(post) => post.open(),
        Task::ProvePost { claim, openings } => claim.prove(prover, openings),
        Task::VerifyPost { claim, proof } => claim.verify(prover, proof),
        Task::CheckSectors {
            miner,
            size,
            randomness,
            sectors,
        } => Ok(Output::Checked(
            post_sectors(sectors)
                .iter()
                .filter_map(|s| {
                    let bad = check_sector(*miner, *size, randomness.as_ref(), s).err()?;
                    Some((s.number, bad.to_string()))
                })
                .collect(),
        )),
    }
}

/// Creates a file, has it written, and syncs it.
fn write_out(
    out: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<(), ProofError>,
) -> Result<Output, ProofError> {
    let io = |source| ProofError::Io {
        path: out.to_owned(),
        source,
    };
    let file = File::create(out).map_err(io)?;
    let mut writer = BufWriter::with_capacity(1 << 20, &file);
    write(&mut writer)?;
    writer.flush().map_err(io)?;
    drop(writer);
    file.sync_all().map_err(io)?;
    Ok(Output::Done)
}

const fn sealing(id: lotus_types::SectorId, size: lotus_types::SectorSize) -> SealingSector {
    SealingSector { id, size }
}

pub(crate) fn post_sectors(files: &[PostFile]) -> Vec<PostSector> {
    files.iter().map(PostSector::from).collect()
}

/// Directory or file whose growth shows how far a task is, and the bytes it will hold.
pub(crate) struct Growth {
    pub(crate) path: PathBuf,
    pub(crate) expected: u64,
}

impl Task {
    /// What to watch for progress; `None` for tasks too short to tell.
    pub(crate) fn growth(&self) -> Option<Growth> {
        match self {
            Self::AddPieces { size, unsealed, .. } => Some(Growth {
                path: unsealed.clone(),
                expected: size.bytes(),
            }),
            // One file of labels per layer, and the tree over the data: twice the sector.
            Self::PreCommit1 { size, cache, .. } => Some(Growth {
                path: cache.clone(),
                expected: (layers(*size) + 2) * size.bytes(),
            }),
            // The labels are there already; tree C is as large as a sector and a seventh (arity
            // 8), tree R keeps a little.
            Self::PreCommit2 { size, cache, .. } => Some(Growth {
                path: cache.clone(),
                expected: size.bytes() / 7 * 8,
            }),
            // The data tree, and a last tree of arity 8.
            Self::ReplicaUpdate { files, .. } => Some(Growth {
                path: files.updated_cache.clone(),
                expected: files.size.bytes() * 2 + files.size.bytes() / 7,
            }),
            Self::Unseal { out, len, .. } | Self::UnsealUpdate { out, len, .. } => Some(Growth {
                path: out.clone(),
                expected: *len,
            }),
            Self::Commit { .. }
            | Self::Aggregate { .. }
            | Self::Finalize { .. }
            | Self::ProveUpdate { .. }
            | Self::OpenPost(_)
            | Self::ProvePost { .. }
            | Self::VerifyPost { .. }
            | Self::CheckSectors { .. } => None,
        }
    }
}

/// Layers of the stacked graph. Source: filecoin-proofs, `constants.rs`, `LAYERS`.
pub(crate) const fn layers(size: lotus_types::SectorSize) -> u64 {
    use lotus_types::SectorSize as S;
    match size {
        S::S2KiB | S::S8MiB | S::S512MiB => 2,
        S::S32GiB | S::S64GiB => 11,
    }
}
