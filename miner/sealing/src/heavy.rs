//! Effects that run in worker processes.

use std::sync::Arc;

use lotus_proofs::{PlacedPiece, comm_d, layout};
use lotus_types::{Kind, SectorNumber};
use lotus_workers::{Output, PieceFile, Progress, Task, WorkError};

use crate::SealingError;
use crate::machine::{Event, Sector};
use crate::shared::{Also, Shared, Stored, unix_ms};
use crate::storage::{FileType, FileTypes, Part};

/// What came of a task.
pub(crate) enum Done {
    Output(Output),
    /// Evidence that this input does not work.
    Failed(String),
}

impl Shared {
    pub(crate) async fn work(
        self: &Arc<Self>,
        n: SectorNumber,
        task: Task,
    ) -> Result<Done, SealingError> {
        self.storage.check(self.id(n))?;
        let shared = self.clone();
        let progress: Progress = Arc::new(move |part| {
            shared.live(n, |l| l.progress = Some(part.clamp(0.0, 1.0)));
        });
        match self.work.run(task, progress).await {
            Ok(output) => Ok(Done::Output(output)),
            // The proof code or the disk looked at this sector and says no.
            Err(WorkError::Failed {
                step,
                kind: Kind::Data | Kind::Fatal | Kind::Chain,
                message,
            }) => {
                // Unless what it looked at was not there.
                self.storage.check(self.id(n))?;
                Ok(Done::Failed(format!("{step}: {message}")))
            }
            Err(e) => Err(e.into()),
        }
    }

    pub(crate) fn layout(&self, s: &Sector) -> Result<Vec<PlacedPiece>, String> {
        layout(self.size, &s.piece_infos()).map_err(|e| e.to_string())
    }

    pub(crate) async fn write_pieces(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let layout = match self.layout(s) {
            Ok(layout) => layout,
            Err(why) => return Ok(Event::Failed(why)),
        };
        let id = self.id(n);
        let shared = self.clone();
        let attempt = self
            .blocking(move || Ok(shared.storage.attempt(id, "add-pieces")?))
            .await?;
        let made = attempt.join("unsealed");
        let task = Task::AddPieces {
            size: self.size,
            layout,
            pieces: s
                .pieces
                .iter()
                .map(|p| PieceFile {
                    cid: p.piece.cid,
                    path: self.pieces.path(&p.piece.cid),
                })
                .collect(),
            unsealed: made.clone(),
        };
        match self.work(n, task).await? {
            Done::Failed(why) => return Ok(Event::Failed(why)),
            Done::Output(Output::Done) => {}
            Done::Output(other) => return Ok(unexpected(&other)),
        }
        self.put_in_place(n, s.state, vec![(made, Part::Unsealed)])
            .await?;
        Ok(Event::PiecesWritten)
    }

    pub(crate) async fn pre_commit1(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<(Event, Also), SealingError> {
        let (Some(ticket), Ok(layout)) = (s.ticket, self.layout(s)) else {
            return Ok((Event::TicketExpired, Also::Nothing));
        };
        if s.pre_commit_epoch.is_none() && self.is_stale(&ticket)? {
            return Ok((Event::TicketExpired, Also::Nothing));
        }
        let id = self.id(n);
        let shared = self.clone();
        let attempt = self
            .blocking(move || Ok(shared.storage.attempt(id, "pre-commit1")?))
            .await?;
        let (sealed, cache) = (attempt.join("sealed"), attempt.join("cache"));
        let task = Task::PreCommit1 {
            sector: id,
            size: self.size,
            ticket: ticket.value,
            layout,
            unsealed: self.storage.unsealed(id),
            sealed: sealed.clone(),
            cache: cache.clone(),
        };
        let labels = match self.work(n, task).await? {
            Done::Failed(why) => return Ok((Event::Failed(why), Also::Nothing)),
            Done::Output(Output::PreCommit1(labels)) => labels,
            Done::Output(other) => return Ok((unexpected(&other), Also::Nothing)),
        };
        let places = vec![
            (cache, Part::File(FileType::Cache)),
            (sealed, Part::File(FileType::Sealed)),
        ];
        self.put_in_place(n, s.state, places).await?;
        Ok((Event::PreCommit1Done, Also::Store(Stored::Labels, labels)))
    }

    pub(crate) async fn pre_commit2(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let id = self.id(n);
        let expected = self
            .layout(s)
            .and_then(|l| comm_d(self.size, &l).map_err(|e| e.to_string()));
        let expected = match expected {
            Ok(c) => c,
            Err(why) => return Ok(Event::Failed(why)),
        };
        let Some(pc1) = self.stored(n, Stored::Labels).await? else {
            return Ok(Event::Failed(
                "the output of PreCommit1 is not stored".into(),
            ));
        };
        let shared = self.clone();
        let attempt = self
            .blocking(move || Ok(shared.storage.attempt(id, "pre-commit2")?))
            .await?;
        let task = Task::PreCommit2 {
            sector: id,
            size: self.size,
            pc1,
            sealed: self.storage.sealed(id),
            cache: self.storage.cache(id),
            attempt,
        };
        Ok(match self.work(n, task).await? {
            Done::Failed(why) => Event::Failed(why),
            Done::Output(Output::Commitments(c)) if c.comm_d == expected => Event::PreCommit2Done {
                commitments: c,
                unix_ms: unix_ms(),
            },
            Done::Output(Output::Commitments(c)) => Event::Failed(format!(
                "comm_d is {:?}, the pieces give {expected:?}",
                c.comm_d
            )),
            Done::Output(other) => unexpected(&other),
        })
    }

    pub(crate) async fn prove(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<(Event, Also), SealingError> {
        let failed = |why: String| Ok((Event::Failed(why), Also::Nothing));
        let id = self.id(n);
        let layout = match self.layout(s) {
            Ok(layout) => layout,
            Err(why) => return failed(why),
        };
        let (Some(ticket), Some(seed), Some(commitments)) = (s.ticket, s.seed, s.commitments)
        else {
            return failed("ticket, seed or commitments are missing".into());
        };
        let task = Task::Commit {
            sector: id,
            size: self.size,
            ticket: ticket.value,
            seed: seed.value,
            layout,
            commitments,
            sealed: self.storage.sealed(id),
            cache: self.storage.cache(id),
        };
        match self.work(n, task).await? {
            Done::Failed(why) => failed(why),
            Done::Output(Output::Proof(proof)) => Ok((
                Event::Proved { unix_ms: unix_ms() },
                Also::Store(Stored::Proof, proof),
            )),
            Done::Output(other) => Ok((unexpected(&other), Also::Nothing)),
        }
    }

    pub(crate) async fn finalize(
        self: &Arc<Self>,
        n: SectorNumber,
    ) -> Result<(Event, Also), SealingError> {
        let id = self.id(n);
        let task = Task::Finalize {
            sector: id,
            size: self.size,
            cache: self.storage.cache(id),
        };
        match self.work(n, task).await? {
            Done::Failed(why) => return Ok((Event::Failed(why), Also::Nothing)),
            Done::Output(Output::Done) => {}
            Done::Output(other) => return Ok((unexpected(&other), Also::Nothing)),
        }
        self.keep(n, FileTypes::REPLICA).await?;
        let cleaned = self.delete(move |storage| storage.clean(id)).await;
        Ok(match cleaned {
            Ok(()) => {
                let upgradable = self.cfg.make_cc_sectors_available;
                // The proof is kept: until the sector is final a reorg may ask for it again.
                (
                    Event::Finalized { upgradable },
                    Also::Drop(&[Stored::Labels]),
                )
            }
            Err(e) => (Event::Failed(e.to_string()), Also::Nothing),
        })
    }

    pub(crate) async fn remove(
        self: &Arc<Self>,
        n: SectorNumber,
    ) -> Result<(Event, Also), SealingError> {
        let id = self.id(n);
        let deleted = self.delete(move |storage| storage.delete(id)).await;
        Ok(match deleted {
            Ok(()) => (Event::FilesRemoved, Also::Drop(Stored::ALL)),
            Err(e) => (Event::Failed(e.to_string()), Also::Nothing),
        })
    }
}

pub(crate) fn unexpected(output: &Output) -> Event {
    let what = match output {
        Output::Done => "nothing",
        Output::PreCommit1(_) => "labels",
        Output::Commitments(_) => "commitments",
        Output::Proof(_) => "a proof",
        Output::Faulty(_) | Output::Checked(_) => "a list of faults",
    };
    Event::Failed(format!(
        "the worker answered with {what}: install one release"
    ))
}
