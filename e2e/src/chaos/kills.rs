//! Who is killed, and when.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lotus_e2e::Net;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// Processes that die again and again, each at moments of its own.
pub(crate) struct Kills {
    seed: u64,
    start: Instant,
    count: Mutex<BTreeMap<String, u64>>,
}

impl Kills {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            seed,
            start: Instant::now(),
            count: Mutex::default(),
        }
    }

    /// Kills `victim` for ever, each time after so many milliseconds. `hub` is a process of the
    /// supervisor's; `prove` and `seal` are workers.
    pub(crate) async fn strike(&self, net: &Net, victim: &str, every_ms: Range<u64>) {
        let own: u64 = victim.bytes().map(u64::from).sum();
        let mut random = StdRng::seed_from_u64(self.seed.wrapping_add(own));
        loop {
            let wait = random.random_range(every_ms.clone());
            let which = random.random_range(0..64);
            tokio::time::sleep(Duration::from_millis(wait)).await;
            let done = match victim {
                "seal" | "prove" => net.kill9_worker(victim, which),
                process => net.kill9(process).await,
            };
            match done {
                Ok(pid) => {
                    let at = self.start.elapsed().as_secs_f64();
                    eprintln!("[{at:7.2} s] kill -9 {victim} ({pid})");
                    let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
                    *count.entry(victim.to_owned()).or_default() += 1;
                }
                // It is down already.
                Err(e) => eprintln!("{victim}: {e}"),
            }
        }
    }

    pub(crate) fn count(&self) -> BTreeMap<String, u64> {
        self.count
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}
