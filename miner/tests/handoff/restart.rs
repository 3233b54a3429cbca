//! Whether the hub may be restarted, as somebody asks who waits to do it.

use std::sync::Arc;

use hub_proto::v1::SafeToRestartRequest;
use lotus_journal::{Journal, JournalError, Map};
use lotus_types::Generation;

use crate::harness::{DEADLINE, Hub, Sectors, fast};

#[tokio::test(flavor = "multi_thread")]
async fn a_question_about_a_restart_waits_for_the_moment() {
    let dir = tempfile::tempdir().unwrap();
    let sectors = Arc::new(Sectors::default());
    let hub = Hub::start(dir.path(), &sectors, fast()).await;
    let ask = |wait_ms| {
        let question = hub.client.request(SafeToRestartRequest { wait_ms });
        let mut hub = hub.client.hub();
        async move {
            hub.safe_to_restart(question)
                .await
                .unwrap()
                .into_inner()
                .safe
        }
    };
    assert!(!ask(0).await, "the answer is there at once");
    let moment = async {
        while sectors.safe.receiver_count() == 0 {
            tokio::task::yield_now().await;
        }
        sectors.safe.send_replace(true);
    };
    let (safe, ()) = tokio::time::timeout(DEADLINE, async { tokio::join!(ask(60_000), moment) })
        .await
        .unwrap();
    assert!(safe, "it became safe");
    sectors.safe.send_replace(false);
    assert!(!ask(1).await, "it is so no more");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spoke_does_not_go_back_to_an_older_hub() {
    const GENERATION: Map<u64, Generation> = Map::new("hub.generation");
    let dir = tempfile::tempdir().unwrap();
    let sectors = Arc::new(Sectors::default());
    Hub::start(dir.path(), &sectors, fast()).await.crash().await;
    let hub = Hub::start(dir.path(), &sectors, fast()).await;
    let (spoke, file) = (hub.client.clone(), hub.dir.join("journal.redb"));
    assert_eq!(spoke.say_hello().await.unwrap().generation, 2);
    hub.crash().await;
    // The next one is the first again, as one from before the second would be.
    let journal = Journal::open(&file).unwrap();
    let lower = journal.write(|tx| tx.put(&GENERATION, &0, &Generation(0)));
    lower.map_err(|e: JournalError| e.to_string()).unwrap();
    drop(journal);
    let old = Hub::start(dir.path(), &sectors, fast()).await;
    assert_eq!(old.client.hello().generation, 1);
    let refused = spoke.say_hello().await.unwrap_err();
    assert!(refused.kind().is_retryable(), "{refused}");
    let said = refused.to_string();
    assert!(said.contains("was replaced has come back"), "{said}");
    assert_eq!(spoke.hello().generation, 2);
}
