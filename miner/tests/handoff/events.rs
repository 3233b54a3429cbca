//! Many subscribers of the event stream that come and go.

use std::sync::Arc;

use futures::StreamExt as _;
use hub_proto::HubClient;
use hub_proto::v1::event::What;
use hub_proto::v1::{SectorChanged, SubscribeRequest};
use lotus_journal::JournalError;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::JoinSet;

use super::harness::{DEADLINE, Hub, Sectors, fast};

const SUBSCRIBERS: u64 = 50;
const EVENTS: u64 = 20_000;
/// Events of a transaction.
const AT_ONCE: u64 = 50;

/// Reads every event, over streams that it drops at random.
async fn follow(hub: HubClient, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut next = 1;
    while next <= EVENTS {
        let request = SubscribeRequest {
            from_seq: next,
            topics: vec!["sector".into()],
        };
        let mut events = hub.events().subscribe(request).await.unwrap().into_inner();
        for _ in 0..random.random_range(0..EVENTS / 4) {
            if next > EVENTS {
                return;
            }
            let event = events.next().await.unwrap().unwrap();
            assert_eq!(event.seq, next, "subscriber {seed}");
            let Some(What::Sector(change)) = event.what else {
                panic!("{event:?}")
            };
            assert_eq!(change.number, next, "subscriber {seed}");
            next += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn subscribers_that_come_and_go_miss_nothing_and_hear_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let hub = Hub::start(dir.path(), &Arc::new(Sectors::default()), fast()).await;
    let mut subscribers = JoinSet::new();
    for seed in 0..SUBSCRIBERS {
        subscribers.spawn(follow(hub.client.clone(), seed));
    }
    let (journal, events) = (hub.journal.clone(), hub.events.clone());
    let writer = tokio::task::spawn_blocking(move || {
        for first in (1..=EVENTS).step_by(usize::try_from(AT_ONCE).unwrap()) {
            let append = journal.write(|tx| {
                for number in first..first + AT_ONCE {
                    let change = SectorChanged {
                        number,
                        ..SectorChanged::default()
                    };
                    events.append(tx, What::Sector(change))?;
                }
                Ok::<_, JournalError>(())
            });
            append.unwrap();
            events.committed();
        }
    });
    let all = async {
        writer.await.unwrap();
        while let Some(done) = subscribers.join_next().await {
            done.unwrap();
        }
    };
    tokio::time::timeout(3 * DEADLINE, all).await.unwrap();
}
