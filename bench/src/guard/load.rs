//! Clients that ask again as soon as they are answered, and files that are read from the disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lotus_e2e::{Failed, Net, secs};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::ratio;

/// How often what is served is thrown out of memory.
const EVICT: Duration = Duration::from_millis(20);

/// Threads of the clients.
const THREADS: usize = 2;

/// What clients ask for.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) piece: String,
    pub(super) root: String,
    pub(super) blocks: Vec<String>,
}

#[derive(Debug, Default)]
struct Counts {
    answered: AtomicU64,
    failed: AtomicU64,
}

/// What the clients' own work is to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clients {
    /// It takes what nobody else wants, as that of clients elsewhere takes nothing from a provider.
    Elsewhere,
    /// It competes with the proof, at the usual priority.
    Here,
}

/// Clients at work, on threads of their own.
#[derive(Debug)]
pub(super) struct Load {
    runtime: Option<Runtime>,
    clients: JoinSet<()>,
    count: u64,
    counts: Arc<Counts>,
}

impl Load {
    /// Half of the clients download the piece or its DAG, half look blocks up.
    pub(super) fn start(
        net: &Net,
        target: &Target,
        clients: u32,
        at: Clients,
    ) -> Result<Self, Failed> {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.worker_threads(THREADS).enable_all();
        if at == Clients::Elsewhere {
            runtime.on_thread_start(only_leftovers);
        }
        let runtime = runtime.build()?;
        let http = lotus_runtime::http_client()
            .timeout(secs(120))
            .build()
            .map_err(|e| Failed::at("HTTP client", e))?;
        let (retrieval, indexing) = (net.spoke_url("retrieval")?, net.spoke_url("indexing")?);
        let counts = Arc::new(Counts::default());
        let mut all = JoinSet::new();
        for n in 0..clients as usize {
            let urls: Vec<String> = match n % 4 {
                0 => vec![format!("{retrieval}/piece/{}", target.piece)],
                2 => vec![format!(
                    "{retrieval}/ipfs/{}?format=car&dag-scope=all",
                    target.root
                )],
                _ => {
                    let lookup = |c: &String| format!("{indexing}/routing/v1/providers/{c}");
                    target.blocks.iter().map(lookup).collect()
                }
            };
            let one = client(http.clone(), urls, n, counts.clone());
            all.spawn_on(one, runtime.handle());
        }
        Ok(Self {
            runtime: Some(runtime),
            clients: all,
            count: u64::from(clients),
            counts,
        })
    }

    /// Waits until each client, on average, was answered once.
    pub(super) async fn goes(&self, limit: Duration) -> Result<(), Failed> {
        let end = Instant::now() + limit;
        while self.answered() < self.count {
            if Instant::now() > end {
                let (answered, failed) = (self.answered(), self.failed());
                return Err(Failed(format!(
                    "{answered} requests answered in {limit:?}, {failed} failed"
                )));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    pub(super) fn answered(&self) -> u64 {
        self.counts.answered.load(Ordering::Relaxed)
    }

    fn failed(&self) -> u64 {
        self.counts.failed.load(Ordering::Relaxed)
    }

    pub(super) async fn stop(mut self) {
        self.clients.shutdown().await;
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Lets this thread have what nobody else wants of the processor. Where that fails, it competes.
fn only_leftovers() {
    let param = libc::sched_param { sched_priority: 0 };
    #[expect(unsafe_code, reason = "the parameter lives for as long as the call")]
    // SAFETY: see the reason above.
    let done = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const param) };
    if done < 0 {
        eprintln!("SCHED_IDLE: {}", std::io::Error::last_os_error());
    }
}

/// Answers a second.
pub(super) fn rate(answered: u64, took: Duration) -> Result<f64, Failed> {
    if answered == 0 {
        return Ok(0.0);
    }
    let answered = u32::try_from(answered).unwrap_or(u32::MAX);
    ratio("requests", f64::from(answered), took.as_secs_f64())
}

/// One client. A piece that is not there yet is asked for again.
async fn client(http: reqwest::Client, urls: Vec<String>, first: usize, counts: Arc<Counts>) {
    for url in urls.iter().cycle().skip(first) {
        let done = async {
            let mut answer = http.get(url).send().await?.error_for_status()?;
            while answer.chunk().await?.is_some() {}
            Ok::<_, reqwest::Error>(())
        };
        match done.await {
            Ok(()) => drop(counts.answered.fetch_add(1, Ordering::Relaxed)),
            Err(_) => {
                counts.failed.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Throws every file below `dir` out of memory.
pub(super) fn evict(dir: &Path) -> Result<(), Failed> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            evict(&entry.path())?;
        } else if let Ok(file) = std::fs::File::open(entry.path()) {
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
                .map_err(|e| Failed::at("fadvise", e))?;
        }
    }
    Ok(())
}

/// Throws what is served out of memory, again and again.
#[derive(Debug)]
pub(super) struct Evicting {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Evicting {
    pub(super) fn start(net: &Net) -> Self {
        let pieces: PathBuf = net.root().join("miner/pieces");
        let stop = Arc::new(AtomicBool::new(false));
        let ended = stop.clone();
        let thread = std::thread::spawn(move || {
            only_leftovers();
            while !ended.load(Ordering::Relaxed) {
                if let Err(e) = evict(&pieces) {
                    eprintln!("{}: {e}", pieces.display());
                    return;
                }
                std::thread::sleep(EVICT);
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Evicting {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("the thread that evicts panicked");
        }
    }
}
