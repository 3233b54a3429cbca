//! The follower against a node whose chain reorganises and whose subscriptions break.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use lotus_chain::{Change, Changes, Follower};
use lotus_node_client::api::{
    BlockHeader, HeadChange, HeadChangeKind, NetworkParams, Ticket, TipSet, TipSetKey, cbor_cid,
};
use lotus_node_client::{FullNode, HeadChanges, NodeError};
use lotus_types::{Address, Epoch, EpochDelta};
use proptest::prelude::*;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const WAIT: Duration = Duration::from_secs(20);

fn tipset(parent: Option<&TipSet>, height: i64, salt: u64) -> TipSet {
    let none = cbor_cid(&[]);
    TipSet::new(vec![BlockHeader {
        miner: Address::new_id(salt),
        ticket: Some(Ticket {
            vrf_proof: salt.to_be_bytes().to_vec(),
        }),
        election_proof: None,
        beacon_entries: vec![],
        win_post_proof: vec![],
        parents: parent.map(|p| p.cids.clone()).unwrap_or_default(),
        parent_weight: 0.into(),
        height: Epoch(height),
        parent_state_root: none,
        parent_message_receipts: none,
        messages: none,
        bls_aggregate: None,
        timestamp: 0,
        block_sig: None,
        fork_signaling: 0,
        parent_base_fee: Default::default(),
    }])
    .unwrap()
}

type Item = Result<Vec<HeadChange>, NodeError>;

#[derive(Default)]
struct Chain {
    head: Option<TipSet>,
    known: HashMap<TipSetKey, TipSet>,
    readers: Vec<mpsc::UnboundedSender<Item>>,
    /// Every tipset that ever was the head.
    salt: u64,
}

impl Chain {
    fn path(&self, from: &TipSet, to: &TipSet) -> Vec<HeadChange> {
        let (mut a, mut b) = (from.clone(), to.clone());
        let (mut down, mut up) = (vec![], vec![]);
        let change = |kind, val| HeadChange { kind, val };
        while a != b {
            if a.height >= b.height {
                let parent = self.known[&a.parents()].clone();
                down.push(change(
                    HeadChangeKind::Revert,
                    std::mem::replace(&mut a, parent),
                ));
            } else {
                let parent = self.known[&b.parents()].clone();
                up.push(change(
                    HeadChangeKind::Apply,
                    std::mem::replace(&mut b, parent),
                ));
            }
        }
        up.reverse();
        down.extend(up);
        down
    }

    /// Grows a branch from the ancestor `depth` below the head, and tells the readers.
    fn grow(&mut self, depth: usize, lengths: &[i64]) {
        let from = self.head.clone().unwrap();
        let mut at = from.clone();
        for _ in 0..depth {
            match self.known.get(&at.parents()) {
                Some(p) => at = p.clone(),
                None => break,
            }
        }
        for gap in lengths {
            self.salt += 1;
            at = tipset(Some(&at), at.height.0 + gap, self.salt);
            self.known.insert(at.key(), at.clone());
        }
        let steps = self.path(&from, &at);
        self.head = Some(at);
        self.readers.retain(|r| r.send(Ok(steps.clone())).is_ok());
    }

    fn genesis() -> Self {
        let genesis = tipset(None, 0, 0);
        let known = HashMap::from([(genesis.key(), genesis.clone())]);
        Self {
            head: Some(genesis),
            known,
            ..Self::default()
        }
    }
}

#[derive(Clone)]
struct Fake(Arc<Mutex<Chain>>);

impl Fake {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Chain::genesis())))
    }

    fn head(&self) -> TipSet {
        self.0.lock().unwrap().head.clone().unwrap()
    }
}

#[async_trait]
impl FullNode for Fake {
    async fn chain_notify(&self) -> Result<HeadChanges, NodeError> {
        let (tx, rx) = mpsc::unbounded_channel();
        let mut chain = self.0.lock().unwrap();
        let val = chain.head.clone().unwrap();
        let kind = HeadChangeKind::Current;
        tx.send(Ok(vec![HeadChange { kind, val }])).unwrap();
        chain.readers.push(tx);
        Ok(futures::stream::unfold(rx, |mut rx| async {
            rx.recv().await.map(|item| (item, rx))
        })
        .boxed())
    }

    async fn chain_get_path(
        &self,
        from: &TipSetKey,
        to: &TipSetKey,
    ) -> Result<Vec<HeadChange>, NodeError> {
        let chain = self.0.lock().unwrap();
        let get = |k| {
            chain.known.get(k).ok_or(NodeError::Rpc {
                method: "ChainGetPath".into(),
                code: 1,
                message: "tipset not found".into(),
            })
        };
        Ok(chain.path(get(from)?, get(to)?))
    }

    async fn state_get_network_params(&self) -> Result<NetworkParams, NodeError> {
        Ok(NetworkParams {
            network_name: "fake".into(),
            block_delay_secs: 1,
            block_delay_millis: Some(20),
            consensus_miner_min_power: 0.into(),
            pre_commit_challenge_delay: EpochDelta(10),
            fork_upgrade_params: Default::default(),
            eip155_chain_id: 0,
            genesis_timestamp: 0,
        })
    }

    async fn chain_get_tipset(&self, key: &TipSetKey) -> Result<TipSet, NodeError> {
        Ok(self.0.lock().unwrap().known[key].clone())
    }
}

/// A reader that keeps the chain by the changes alone, and checks each.
#[derive(Default)]
struct Walk {
    chain: Vec<Arc<TipSet>>,
}

impl Walk {
    fn take(&mut self, change: Change) {
        match change {
            Change::Apply(t) => {
                if let Some(top) = self.chain.last() {
                    assert_eq!(t.parents(), top.key(), "apply on the head");
                }
                self.chain.push(t);
            }
            Change::Revert(t) => {
                assert_eq!(self.chain.pop().as_ref(), Some(&t), "revert of the head");
            }
        }
    }

    async fn until(&mut self, changes: &mut Changes, head: &TipSet) {
        while self.chain.last().map(|t| t.key()) != Some(head.key()) {
            let change = timeout(WAIT, changes.next()).await;
            self.take(change.expect("the head arrives").unwrap());
        }
    }
}

/// What happens to the node.
#[derive(Clone, Debug)]
enum Event {
    Grow {
        depth: usize,
        gaps: Vec<i64>,
    },
    Break,
    /// The reader catches up.
    Read,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let gaps = || prop::collection::vec(1i64..4, 1..4);
    let grow = (0usize..5, gaps()).prop_map(|(depth, gaps)| Event::Grow { depth, gaps });
    prop::collection::vec(
        prop_oneof![6 => grow, 2 => Just(Event::Break), 2 => Just(Event::Read)],
        1..25,
    )
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn changes_are_one_unbroken_walk(events in events()) {
        runtime().block_on(async {
            let fake = Fake::new();
            let (follower, runner) = Follower::new(Arc::new(fake.clone()));
            let stop = CancellationToken::new();
            let mut tasks = JoinSet::new();
            tasks.spawn(runner.run(stop.clone()));
            // A base deep enough for every reorg below to stay above the reader's start.
            let (mut changes, mut walk) = (follower.changes(), Walk::default());
            walk.until(&mut changes, &fake.head()).await;
            for event in events {
                match event {
                    Event::Grow { depth, gaps } => fake.0.lock().unwrap().grow(depth, &gaps),
                    Event::Break => fake.0.lock().unwrap().readers.clear(),
                    Event::Read => walk.until(&mut changes, &fake.head()).await,
                }
                tokio::task::yield_now().await;
            }
            walk.until(&mut changes, &fake.head()).await;
            let head = follower.wait_height(fake.head().height).await.unwrap();
            assert_eq!(head.key(), fake.head().key());
            timeout(WAIT, follower.connection().wait_for(Result::is_ok)).await.unwrap().unwrap();
            stop.cancel();
            timeout(WAIT, tasks.join_all()).await.unwrap();
        });
    }
}

#[test]
fn a_reader_far_behind_catches_up() {
    runtime().block_on(async {
        let fake = Fake::new();
        let (follower, runner) = Follower::new(Arc::new(fake.clone()));
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(runner.run(stop.clone()));
        let (mut changes, mut walk) = (follower.changes(), Walk::default());
        walk.until(&mut changes, &fake.head()).await;
        for _ in 0..2_000 {
            fake.0.lock().unwrap().grow(1, &[1, 1]);
            follower.wait_height(fake.head().height).await.unwrap();
        }
        walk.until(&mut changes, &fake.head()).await;
        let below = usize::try_from(fake.head().height.0).unwrap();
        assert_eq!(walk.chain.len(), below + 1);
        drop(follower);
        stop.cancel();
        timeout(WAIT, tasks.join_all()).await.unwrap();
    });
}

#[test]
fn silence_leads_to_a_new_subscription_and_a_reset_node_to_a_jump() {
    runtime().block_on(async {
        let fake = Fake::new();
        let (follower, runner) = Follower::new(Arc::new(fake.clone()));
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(runner.run(stop.clone()));
        let (mut changes, mut walk) = (follower.changes(), Walk::default());
        walk.until(&mut changes, &fake.head()).await;

        // A subscription that stays open and says nothing, while the chain goes on.
        let silent = std::mem::take(&mut fake.0.lock().unwrap().readers);
        fake.0.lock().unwrap().grow(0, &[1, 3, 1]);
        timeout(WAIT, follower.wait_height(Epoch(5)))
            .await
            .unwrap()
            .unwrap();
        walk.until(&mut changes, &fake.head()).await;
        drop(silent);

        let other = tipset(None, 1, 99);
        {
            let mut chain = fake.0.lock().unwrap();
            *chain = Chain {
                head: Some(other.clone()),
                known: HashMap::from([(other.key(), other.clone())]),
                ..Chain::default()
            };
        }
        let change = timeout(WAIT, changes.next()).await.unwrap().unwrap();
        assert_eq!(change, Change::Apply(Arc::new(other)));
        stop.cancel();
        timeout(WAIT, tasks.join_all()).await.unwrap();
    });
}
