//! Looks after the paths: whether they are there, what may be deleted, which moves are due.

use std::time::{Duration, Instant};

use lotus_runtime::Health;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Storage;
use super::health::{Call, PathHealth, Seen, bytes_of, look};
use super::meta::{FileType, PathId};
use crate::shared::lock;

/// The health component of the paths.
const COMPONENT: &str = "storage";

impl Storage {
    /// Looks after the paths until `stop`.
    pub async fn run(self, health: Health, stop: CancellationToken) {
        let every = Duration::from_secs(self.0.cfg.check_secs.max(1));
        let mut tick = tokio::time::interval(every);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut tasks = JoinSet::new();
        let mut copies = JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = tick.tick() => {
                    let storage = self.clone();
                    let look = move || {
                        storage.look_at_all();
                        storage.erase_due();
                    };
                    if tasks.is_empty() {
                        tasks.spawn_blocking(look);
                    }
                }
                Some(looked) = tasks.join_next() => {
                    if let Err(e) = looked {
                        tracing::error!("looking after the storage paths: {e}");
                    }
                    health.set(COMPONENT, self.told());
                }
                () = self.0.wake.notified() => {}
                Some(copied) = copies.join_next() => match copied {
                    // The next one.
                    Ok(true) => self.0.wake.notify_one(),
                    Ok(false) => continue,
                    Err(e) => tracing::error!("moving a sector: {e}"),
                },
            }
            if copies.is_empty() && !self.moves().is_empty() {
                let (storage, end) = (self.clone(), stop.clone());
                copies.spawn(async move { storage.move_one(end).await });
            }
        }
        while tasks.join_next().await.is_some() {}
        while copies.join_next().await.is_some() {}
    }

    async fn move_one(self, stop: CancellationToken) -> bool {
        let turn = tokio::select! {
            turn = self.turn() => turn,
            () = stop.cancelled() => return false,
        };
        let storage = self.clone();
        let copy = tokio::task::spawn_blocking(move || storage.next_move(&stop));
        let moved = copy.await;
        drop(turn);
        moved.unwrap_or_else(|e| {
            tracing::error!("moving a sector: {e}");
            false
        })
    }

    /// Looks at every path, all at the same time. One that is there again is read anew.
    pub(super) fn look_at_all(&self) {
        let limit = Duration::from_secs(self.0.cfg.check_limit_secs.max(1));
        let end = Instant::now() + limit;
        let ids: Vec<PathId> = lock(&self.0.state).paths.keys().cloned().collect();
        let calls: Vec<_> = ids
            .into_iter()
            .map(|id| (self.begin_look(&id), id))
            .collect();
        for (call, id) in calls {
            let seen = match call {
                Some(Ok(call)) => call.until(end),
                Some(Err(e)) => Err(e.to_string()),
                None => Err("it has not answered the last look yet".into()),
            };
            if self.note(&id, seen) {
                match self.redeclare(Some(&id)) {
                    Ok(()) => tracing::info!(path = %id, "a storage path is there again"),
                    Err(e) => tracing::warn!(path = %id, error = %e, "a storage path"),
                }
            }
        }
        self.tell_metrics();
    }

    /// Begins a look at a path, unless one hangs in it already.
    fn begin_look(&self, id: &PathId) -> Option<std::io::Result<Call<Result<Seen, String>>>> {
        let (dir, read_only, worked) = {
            let mut state = lock(&self.0.state);
            let worked = state.index.on(id).into_iter();
            let worked: Vec<_> = worked.filter(|(_, f)| f.has(FileType::Scratch)).collect();
            let path = state.paths.get_mut(id)?;
            if std::mem::replace(&mut path.looking, true) {
                return None;
            }
            (path.dir.clone(), path.read_only, worked)
        };
        let (storage, at, name) = (self.clone(), dir.clone(), id.clone());
        let call = Call::begin(&dir, move || {
            let seen = look(&at, &name, read_only);
            // What sealing has taken is not promised any more: both are measured together.
            let sizes: Vec<_> = worked
                .iter()
                .map(|(s, f)| (*s, bytes_of(&at, *s, *f)))
                .collect();
            let mut state = lock(&storage.0.state);
            if let Some(path) = state.paths.get_mut(&name) {
                path.looking = false;
            }
            for (sector, bytes) in sizes {
                state.sizes.insert((name.clone(), sector), bytes);
            }
            drop(state);
            seen
        });
        if call.is_err()
            && let Some(path) = lock(&self.0.state).paths.get_mut(id)
        {
            path.looking = false;
        }
        Some(call)
    }

    /// Takes over what a look said. `true`: the path was gone and is there again.
    fn note(&self, id: &PathId, seen: Result<Result<Seen, String>, String>) -> bool {
        let mut state = lock(&self.0.state);
        let Some(path) = state.paths.get_mut(id) else {
            return false;
        };
        let was_gone = !path.reachable();
        let next = match seen {
            Ok(Ok(_)) if was_gone => return true,
            Ok(Ok(seen)) => {
                path.space = seen.space;
                seen.health
            }
            Ok(Err(why)) => PathHealth::Gone(why),
            // A slow disk is there: its sectors are still proven.
            Err(why) if was_gone => PathHealth::Gone(why),
            Err(why) => PathHealth::Silent(why),
        };
        if path.health != next {
            match next.trouble() {
                Some(why) => tracing::error!(path = %id, "storage path: {why}"),
                None => tracing::info!(path = %id, "the storage path is well again"),
            }
            path.health = next;
        }
        false
    }

    /// What the health component says: a path that takes no new files for now is no reason.
    fn told(&self) -> Result<String, String> {
        let state = lock(&self.0.state);
        let mut gone = state.paths.iter().filter(|(_, p)| !p.reachable());
        match gone.next() {
            Some((id, path)) => {
                let why = path.health.trouble().unwrap_or_default();
                Err(format!("storage path {id} is not there: {why}"))
            }
            None => Ok(format!("{} paths", state.paths.len())),
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a gauge needs no exact bytes")]
    fn tell_metrics(&self) {
        for path in self.paths() {
            let gauge = |name: &'static str, value: f64| {
                metrics::gauge!(name, "path" => path.id.to_string()).set(value);
            };
            let healthy = path.trouble.is_none();
            gauge("lotus_miner_storage_healthy", f64::from(u8::from(healthy)));
            gauge("lotus_miner_storage_capacity_bytes", path.capacity as f64);
            gauge("lotus_miner_storage_available_bytes", path.available as f64);
            gauge("lotus_miner_storage_reserved_bytes", path.reserved as f64);
            gauge("lotus_miner_storage_sectors", path.sector_count as f64);
        }
    }
}
