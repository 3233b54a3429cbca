//! Whether the hub may be restarted, as somebody asks who waits to do it.

use std::sync::Arc;

use hub_proto::v1::SafeToRestartRequest;

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
