use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cid::Cid;
use lotus_chain::Follower;
use lotus_journal::{Journal, JournalError};
use lotus_node_client::api::{TipSet, TipSetKey};
use lotus_node_client::{Node, NodeError};
use lotus_types::{Address, EpochDelta, TokenAmount};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::message::{MESSAGES, Record};
use crate::runner::{Job, Runner};
use crate::waiting::WaitList;
use crate::{Landed, MessageKind, MessageStatus, MessagesConfig, Quote, SendError, SendRequest};

/// Longest key, in bytes.
const MAX_KEY: usize = 256;
/// The chain is looked at this often even when no new head is seen.
const POLL: Duration = Duration::from_secs(10);

/// Sends messages and waits for them. Clones share one queue.
#[derive(Clone)]
pub struct Sender(pub(crate) Arc<Shared>);

/// What the handle, the writers and the tracker share.
pub(crate) struct Shared {
    pub(crate) journal: Journal,
    pub(crate) node: Node,
    pub(crate) cfg: MessagesConfig,
    head: watch::Receiver<Option<Arc<TipSet>>>,
    queue: mpsc::Sender<Job>,
    room: Arc<Semaphore>,
    order: AtomicU64,
    /// Key address of each address that was ever used; they never change.
    pub(crate) key_addresses: Mutex<HashMap<Address, Address>>,
    /// ID address of each configured address; they never change.
    pub(crate) id_addresses: Mutex<HashMap<Address, Address>>,
    /// Why a message is not on chain: what the node said at its last push, or why its fee is not
    /// raised. By key.
    pub(crate) push_errors: Mutex<HashMap<String, String>>,
    /// Requests that were turned down and not sent since, by key.
    pub(crate) waiting: Mutex<WaitList>,
    /// Addresses, in key form, whose next message does not get on chain.
    pub(crate) blocked: Mutex<HashSet<String>>,
    /// Those of them, in key form, where WindowPoSt waits for a nonce that is not ours.
    pub(crate) held_up: Mutex<HashSet<String>>,
    pub(crate) stop: CancellationToken,
    /// Journal calls: awaited at the end, so that nothing is written after it.
    pub(crate) calls: TaskTracker,
}

impl Sender {
    /// A sender and what runs it. Requests may be queued before the runner starts.
    #[must_use]
    pub fn new(
        journal: Journal,
        node: Node,
        follower: &Follower,
        cfg: MessagesConfig,
    ) -> (Self, Runner) {
        let limit = usize::try_from(cfg.max_queued).unwrap_or(usize::MAX).max(1);
        let limit = limit.min(Semaphore::MAX_PERMITS);
        let (queue, jobs) = mpsc::channel(64);
        let shared = Arc::new(Shared {
            journal,
            node,
            cfg,
            head: follower.head(),
            queue,
            room: Arc::new(Semaphore::new(limit)),
            order: AtomicU64::new(0),
            key_addresses: Mutex::default(),
            id_addresses: Mutex::default(),
            push_errors: Mutex::default(),
            waiting: Mutex::default(),
            blocked: Mutex::default(),
            held_up: Mutex::default(),
            stop: CancellationToken::new(),
            calls: TaskTracker::new(),
        });
        (Self(shared.clone()), Runner::new(shared, jobs))
    }

    /// Sends a message: returns once it is journaled, with its CID. From then on it is pushed
    /// until it is on chain, over restarts too. The same key gives the same message for ever; its
    /// CID changes only when it is replaced by fee, and whichever version lands counts.
    ///
    /// An error means that nothing was journaled under this key, except for
    /// [`SendError::TooSlow`], [`SendError::Stopped`] and [`SendError::Journal`], after which
    /// asking again with the same key tells.
    pub async fn send(&self, request: SendRequest) -> Result<Cid, SendError> {
        let key = &request.key;
        if key.is_empty() || key.len() > MAX_KEY || key.contains('\0') {
            return Err(SendError::BadKey(key.clone()));
        }
        if let Some(record) = self.0.record(key).await? {
            return Ok(record.cid());
        }
        let key = key.clone();
        let secs = self.0.cfg.send_secs;
        let queued = async {
            let payers = self.0.payers(&request).await?;
            let mut poor = None;
            for from in payers {
                match self.queue(from, request.clone()).await {
                    // Only what is urgent has a second address to ask.
                    Err(e) if e.is_short() => poor = Some(e),
                    done => return done,
                }
            }
            Err(poor.unwrap_or_else(|| SendError::NoPayer {
                key: request.key.clone(),
            }))
        };
        let stopped = self.0.stop.cancelled();
        tokio::select! {
            done = tokio::time::timeout(Duration::from_secs(secs), queued) => done.unwrap_or(Err(
                SendError::TooSlow { what: "sending", key, secs },
            )),
            () = stopped => Err(SendError::Stopped),
        }
    }

    async fn queue(&self, from: Address, request: SendRequest) -> Result<Cid, SendError> {
        let permit = self.0.room.clone().try_acquire_owned();
        let permit = permit.map_err(|_| SendError::QueueFull(self.0.cfg.max_queued))?;
        let (reply, answer) = oneshot::channel();
        let job = Job {
            order: self.0.order.fetch_add(1, Ordering::Relaxed),
            from,
            request,
            reply,
            _permit: permit,
            span: tracing::Span::current(),
        };
        let sent = self.0.queue.send(job).await;
        sent.map_err(|_| SendError::Stopped)?;
        answer.await.unwrap_or(Err(SendError::Stopped))
    }

    /// What a message would cost, and who would pay it. Nothing is signed.
    ///
    /// # Errors
    /// Those of [`Sender::send`] that come before the signature.
    pub async fn quote(&self, request: &SendRequest) -> Result<Quote, SendError> {
        let payers = self.0.payers(request).await?;
        let from = payers.first().ok_or_else(|| SendError::NoPayer {
            key: request.key.clone(),
        })?;
        self.0.priced(*from, request).await
    }

    /// The fee limit of a message of this kind about so many sectors.
    #[must_use]
    pub fn max_fee(&self, kind: MessageKind, sectors: u64) -> TokenAmount {
        self.0.cfg.fees.max_fee(kind, sectors)
    }

    /// Waits until the message of this key has a receipt with `confidence` epochs on top of it.
    /// A receipt that a reorg removes before that does not count. The exit code may be a
    /// failure: that is for the caller to judge.
    pub async fn wait(&self, key: &str, confidence: u64) -> Result<Landed, SendError> {
        let shared = &self.0;
        let mut record = shared.record(key).await?;
        let unknown = || SendError::Unknown(key.into());
        let confidence = i64::try_from(confidence).unwrap_or(i64::MAX);
        let secs = shared.cfg.wait_secs;
        let deadline = tokio::time::sleep(Duration::from_secs(secs));
        tokio::pin!(deadline);
        let mut head = shared.head.clone();
        loop {
            let r = record.ok_or_else(unknown)?;
            if r.replaced {
                return Err(SendError::Replaced {
                    key: key.into(),
                    from: r.from,
                    nonce: r.nonce,
                });
            }
            let now = head.borrow_and_update().clone();
            if let Some(now) = now {
                match shared.locate(&r, &now).await {
                    Ok(Some(found)) if (now.height - found.height).0 >= confidence => {
                        return Ok(found);
                    }
                    Ok(_) => {}
                    // The next head is another chance.
                    Err(e) => tracing::debug!(key, error = %e, "looking for a receipt"),
                }
            }
            tokio::select! {
                changed = head.changed() => if changed.is_err() {
                    return Err(SendError::Stopped);
                },
                () = tokio::time::sleep(POLL) => {}
                () = &mut deadline => {
                    return Err(SendError::TooSlow { what: "waiting for", key: key.into(), secs });
                }
                () = shared.stop.cancelled() => return Err(SendError::Stopped),
            }
            record = shared.record(key).await?;
        }
    }

    /// Where the message of this key stands; `None` if there is none.
    pub async fn status(&self, key: &str) -> Result<Option<MessageStatus>, SendError> {
        match self.0.record(key).await? {
            Some(r) => self.0.describe(key, r).map(Some),
            None => Ok(None),
        }
    }
}

impl Shared {
    pub(crate) fn head(&self) -> Option<Arc<TipSet>> {
        self.head.borrow().clone()
    }

    pub(crate) fn heads(&self) -> watch::Receiver<Option<Arc<TipSet>>> {
        self.head.clone()
    }

    /// Runs a journal call on a thread that may block.
    pub(crate) async fn journal<R: Send + 'static>(
        &self,
        f: impl FnOnce(&Journal) -> Result<R, JournalError> + Send + 'static,
    ) -> Result<R, SendError> {
        if self.stop.is_cancelled() {
            return Err(SendError::Stopped);
        }
        let journal = self.journal.clone();
        match self.calls.spawn_blocking(move || f(&journal)).await {
            Ok(done) => Ok(done?),
            // The runtime is shutting down, or the journal panicked, which ends the process.
            Err(_) => Err(SendError::Stopped),
        }
    }

    pub(crate) async fn record(&self, key: &str) -> Result<Option<Record>, SendError> {
        let key = key.to_owned();
        self.journal(move |j| j.read(|v| v.get(&MESSAGES, &key)))
            .await
    }

    pub(crate) fn describe(&self, key: &str, r: Record) -> Result<MessageStatus, SendError> {
        let from = r.from.parse().map_err(|e| SendError::Broken {
            key: key.into(),
            why: format!("the journaled sender {} is no address: {e}", r.from),
        })?;
        Ok(MessageStatus {
            key: key.into(),
            cid: r.cid(),
            kind: r.kind,
            from,
            nonce: r.nonce,
            max_fee: r.max_fee(),
            replacements: r.versions.len().saturating_sub(1) as u64,
            value: r.value,
            fee: r.fee,
            created_unix_ms: r.created_unix_ms,
            landed: r.landed,
            exit_code: r.exit_code,
            replaced: r.replaced,
            last_error: lock(&self.push_errors).get(key).cloned(),
        })
    }

    pub(crate) async fn key_address(&self, addr: Address) -> Result<Address, SendError> {
        if let Some(known) = lock(&self.key_addresses).get(&addr) {
            return Ok(*known);
        }
        let key = self.node.state_account_key(addr, &TipSetKey::HEAD).await?;
        lock(&self.key_addresses).insert(addr, key);
        Ok(key)
    }

    /// The receipt of a message on the chain of `head`: that of whichever version landed.
    pub(crate) async fn locate(
        &self,
        record: &Record,
        head: &TipSet,
    ) -> Result<Option<Landed>, SendError> {
        // A little more than the message's age: the head that it was signed on may be gone.
        let age = (head.height - record.sent_at).0.max(0);
        let lookback = EpochDelta(age.saturating_add(20));
        let mut refusal = None;
        for version in record.versions.iter().rev() {
            let found = self
                .node
                .state_search_msg(&head.key(), version.cid, lookback, true)
                .await;
            match found {
                Ok(Some(l)) => {
                    return Ok(Some(Landed {
                        cid: l.message,
                        height: l.height,
                        tipset: l.tip_set,
                        exit_code: l.receipt.exit_code,
                        return_data: l.receipt.r#return,
                        gas_used: l.receipt.gas_used,
                    }));
                }
                Ok(None) => {}
                // A node does not search for a message that it never had; it may have had
                // another version.
                Err(e @ NodeError::Rpc { .. }) => refusal = Some(e),
                Err(e) => return Err(e.into()),
            }
        }
        refusal.map_or(Ok(None), |e| Err(e.into()))
    }

    /// The head that was seen last, or, before the first is seen, the node's.
    pub(crate) async fn head_now(&self) -> Result<Arc<TipSet>, SendError> {
        match self.head() {
            Some(head) => Ok(head),
            None => Ok(Arc::new(self.node.chain_head().await?)),
        }
    }
}

/// A poisoned lock means that a thread panicked between two lines that keep no invariant open.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
