//! Programs that are run for what they print. The runner reaps every child of the supervisor, so
//! it hands the exit status of these in here.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use crate::child;
use crate::table::Ended;

/// Most bytes of each stream that are kept; a program that prints more is broken.
const LONGEST: u64 = 256 << 10;

/// Tells who waits for a program how it ended, in a word and in words.
type Waits = oneshot::Sender<(Ended, String)>;

/// Those that run. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Helpers(Arc<Mutex<HashMap<u32, Waits>>>);

/// What a program left.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) ended: Ended,
    /// How it ended, in words.
    pub(crate) words: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Helpers {
    fn running(&self) -> MutexGuard<'_, HashMap<u32, Waits>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the end of a child, if it is one of these.
    pub(crate) fn ended(&self, pid: u32, how: Ended, words: &str) {
        if let Some(waits) = self.running().remove(&pid)
            && waits.send((how, words.into())).is_err()
        {
            tracing::debug!(pid, words, "a program that nobody waits for any more");
        }
    }

    /// Runs a program to its end, at most for `limit`; then, and when this is dropped, it is
    /// killed with what it started.
    pub(crate) async fn run(&self, mut command: Command, limit: Duration) -> io::Result<Output> {
        use std::os::unix::process::CommandExt as _;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        // The runner shares this thread, so it does not reap between these two.
        let mut child = command.spawn()?;
        let (tx, rx) = oneshot::channel();
        self.running().insert(child.id(), tx);
        let kill = Kill(self, child.id());
        let stdout = receiver(child.stdout.take().map(OwnedFd::from))?;
        let stderr = receiver(child.stderr.take().map(OwnedFd::from))?;
        let all = async { tokio::try_join!(text(stdout), text(stderr), end(rx)) };
        let (stdout, stderr, (ended, words)) = tokio::time::timeout(limit, all)
            .await
            .map_err(|_| io::Error::other(format!("gave no answer in {limit:?}")))??;
        drop(kill);
        Ok(Output {
            ended,
            words,
            stdout,
            stderr,
        })
    }
}

fn receiver(fd: Option<OwnedFd>) -> io::Result<pipe::Receiver> {
    pipe::Receiver::from_owned_fd(fd.ok_or_else(|| io::Error::other("no pipe"))?)
}

async fn text(pipe: pipe::Receiver) -> io::Result<String> {
    let mut bytes = Vec::new();
    pipe.take(LONGEST).read_to_end(&mut bytes).await?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

async fn end(rx: oneshot::Receiver<(Ended, String)>) -> io::Result<(Ended, String)> {
    rx.await.map_err(io::Error::other)
}

/// Kills the program unless it ended.
struct Kill<'a>(&'a Helpers, u32);

impl Drop for Kill<'_> {
    fn drop(&mut self) {
        // While it is listed nobody has reaped it, so the number is its own.
        if self.0.running().remove(&self.1).is_some() {
            child::kill_group(self.1);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Reaps for helpers, as the runner does.
    pub(crate) async fn reap(helpers: Helpers) {
        loop {
            let pids: Vec<u32> = helpers.running().keys().copied().collect();
            for pid in pids {
                // Not `child::reaped`: other tests have children too.
                if let Some((how, words)) = child::reaped_one(pid) {
                    helpers.ended(pid, how, &words);
                }
            }
            tokio::task::yield_now().await;
        }
    }

    async fn run(script: &str, limit: Duration) -> io::Result<Output> {
        let _alone = child::FORKS.lock().await;
        let helpers = Helpers::default();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        tokio::select! {
            out = helpers.run(command, limit) => out,
            () = reap(helpers.clone()) => Err(io::Error::other("reaping ended")),
        }
    }

    #[tokio::test]
    async fn a_program_is_heard_to_its_end() {
        let patient = Duration::from_secs(60);
        let out = run("echo out; echo err >&2; exit 78", patient)
            .await
            .unwrap();
        assert_eq!(out.ended, Ended::BadConfig);
        assert_eq!(
            (out.stdout.as_str(), out.stderr.as_str()),
            ("out\n", "err\n")
        );
        assert_eq!(out.words, "exit status 78");
        let out = run("true", patient).await.unwrap();
        assert_eq!(out.ended, Ended::Clean);
        let e = run("sleep 600", Duration::from_millis(50))
            .await
            .unwrap_err();
        assert!(e.to_string().contains("no answer in 50ms"), "{e}");
    }
}
