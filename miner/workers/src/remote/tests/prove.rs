//! Proofs of spacetime between a worker of the hub's host and one of another, both played by hand.

use tokio::net::UnixStream;

use super::*;
use crate::{Post, PostKind};

/// A connection as a worker of the hub's own host has it.
async fn dial_here(rig: &Rig) -> WorkersClient<Channel> {
    let socket = rig.path("run").join("workers.sock");
    let endpoint = Endpoint::from_static("http://hub");
    let channel = endpoint.connect_with_connector(tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    }));
    WorkersClient::new(channel.await.unwrap())
}

async fn two_are_there(rig: &Rig) {
    let both = async {
        while rig.pool.workers().len() < 2 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, both).await.unwrap();
}

type Proving = JoinSet<Result<Output, WorkError>>;

fn prove(rig: &Rig, kind: PostKind) -> Proving {
    let post = Post {
        kind,
        miner: ActorId(1000),
        size: SectorSize::S2KiB,
        randomness: [1; 32],
        sectors: Vec::new(),
    };
    let pool = rig.pool.clone();
    let mut running = JoinSet::new();
    running.spawn(async move { pool.prove(post, LIMIT).await });
    running
}

async fn output(mut running: Proving) -> Output {
    let ended = tokio::time::timeout(LIMIT, running.join_next()).await;
    ended.unwrap().unwrap().unwrap().unwrap()
}

/// What a worker elsewhere does with a proof.
#[derive(Debug)]
enum Does {
    Right,
    Wrong,
    NoProof,
    Fails,
    Dies,
}

#[tokio::test]
async fn what_another_host_does_not_prove_is_proven_here() {
    let rig = Rig::start().await;
    let version = env!("CARGO_PKG_VERSION");
    let client = dial_here(&rig).await;
    let mut here = Worker::of(client, version, Class::Prove, 1).await.unwrap();
    let client = dial(&rig.bundle("one")).await.unwrap();
    let there = Worker::of(client, version, Class::Prove, 1).await.unwrap();
    two_are_there(&rig).await;
    // Only one of them can read a sector.
    assert_eq!(rig.pool.attached().borrow().prove, 1);

    let mut there = Some(there);
    for does in [
        Does::Right,
        Does::Wrong,
        Does::NoProof,
        Does::Fails,
        Does::Dies,
    ] {
        let running = prove(&rig, PostKind::Window);
        let (open, _) = here.gets("window_openings").await;
        here.gives(&open, &Output::Proof(b"openings".to_vec()))
            .await;
        let elsewhere = there.as_mut().unwrap();
        let (prove, task) = elsewhere.gets("window_post").await;
        assert!(
            matches!(&task, Task::ProvePost { openings, .. } if openings[..] == *b"openings"),
            "{task:?}"
        );
        let made = Output::Proof(b"from elsewhere".to_vec());
        match does {
            Does::Right | Does::Wrong => {
                elsewhere.gives(&prove, &made).await;
                let (verify, task) = here.gets("verify_post").await;
                let of =
                    matches!(&task, Task::VerifyPost { proof, .. } if proof == b"from elsewhere");
                assert!(of, "{task:?}");
                if matches!(does, Does::Right) {
                    here.gives(&verify, &Output::Done).await;
                } else {
                    here.fails(&verify).await;
                }
            }
            Does::NoProof => elsewhere.gives(&prove, &Output::Done).await,
            Does::Fails => elsewhere.fails(&prove).await,
            Does::Dies => drop(there.take()),
        }
        let mut want = made;
        if !matches!(does, Does::Right) {
            want = Output::Proof(b"from here".to_vec());
            let (again, _) = here.gets("window_post").await;
            here.gives(&again, &want).await;
        }
        assert_eq!(output(running).await, want, "{does:?}");
    }
    // A block is not sent away as long as there is somebody here.
    let client = dial(&rig.bundle("two")).await.unwrap();
    let _there = Worker::of(client, version, Class::Prove, 1).await.unwrap();
    two_are_there(&rig).await;
    let running = prove(&rig, PostKind::Winning);
    for step in ["winning_openings", "winning_post"] {
        let (task, _) = here.gets(step).await;
        here.gives(&task, &Output::Proof(step.into())).await;
    }
    assert_eq!(
        output(running).await,
        Output::Proof(b"winning_post".to_vec())
    );
    rig.end().await;
}
