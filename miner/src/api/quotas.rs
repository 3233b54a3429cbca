//! How much of the hub one spoke may have. The operator's processes may have all.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hub_proto::status;
use lotus_runtime::Rates;
use lotus_types::Kind;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

use super::access::Who;

/// Streams of one spoke: it needs a few.
const STREAMS: usize = 64;
/// Requests for bytes, for each call that it may make: they cost less, and a read needs several.
const READS: u32 = 5;

/// Shares of all spokes. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Quotas(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    calls: Rates<String>,
    reads: Rates<String>,
    streams: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Quotas {
    /// Each spoke may make so many calls a second.
    pub(crate) fn new(calls_per_second: u32) -> Self {
        Self(Arc::new(Inner {
            calls: Rates::new(calls_per_second),
            reads: Rates::new(calls_per_second.saturating_mul(READS)),
            streams: Mutex::default(),
        }))
    }

    /// How long a call has to wait. It is not refused: a refusal costs as much as an answer, and
    /// nothing keeps its caller from calling again.
    pub(crate) fn call(&self, who: &Who) -> Duration {
        Self::due(&self.0.calls, who)
    }

    /// The same of a request for bytes.
    pub(crate) fn read(&self, who: &Who) -> Duration {
        Self::due(&self.0.reads, who)
    }

    fn due(rates: &Rates<String>, who: &Who) -> Duration {
        match who {
            Who::Host => Duration::ZERO,
            spoke => rates.due(spoke.to_string(), Instant::now()),
        }
    }

    /// One more stream, for as long as what is returned is kept.
    pub(crate) fn stream(&self, who: &Who) -> Result<Option<OwnedSemaphorePermit>, Status> {
        if *who == Who::Host {
            return Ok(None);
        }
        let mut streams = self
            .0
            .streams
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // There are no more than identities.
        let of_one = streams.entry(who.to_string());
        let of_one = of_one.or_insert_with(|| Arc::new(Semaphore::new(STREAMS)));
        of_one.clone().try_acquire_owned().map(Some).map_err(|_| {
            status(
                Kind::Capacity,
                format!("{who} has {STREAMS} streams open"),
                "end one of them",
                Some(Duration::from_secs(5)),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spoke_has_its_share_and_the_operator_has_all() {
        let quotas = Quotas::new(10);
        let spoke = |name: &str| Who::Spoke(name.parse().unwrap());
        let (greedy, other) = (spoke("retrieval/a"), spoke("retrieval/b"));
        let waits = |who: &Who, n: usize| (0..n).map(|_| quotas.call(who)).max().unwrap();
        assert!(waits(&greedy, 40) > Duration::from_secs(1));
        assert_eq!(waits(&other, 20), Duration::ZERO);
        assert_eq!(waits(&Who::Host, 1000), Duration::ZERO);
        assert_eq!(quotas.read(&greedy), Duration::ZERO);

        let mut open: Vec<_> = (0..STREAMS).map(|_| quotas.stream(&greedy)).collect();
        assert!(open.iter().all(Result::is_ok));
        assert!(quotas.stream(&greedy).is_err());
        assert!(quotas.stream(&other).is_ok());
        open.pop();
        assert!(quotas.stream(&greedy).is_ok());
        assert!((0..1000).all(|_| quotas.stream(&Who::Host).is_ok()));
    }
}
