use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use lotus_actors::{ExitCode, exit_name};
use lotus_node_client::NodeError;
use lotus_node_client::api::{TipSet, TipSetKey};
use lotus_runtime::Backoff;
use lotus_types::{Address, Epoch, EpochDelta, TokenAmount};
use tokio::time::Instant;

use crate::breaker::Event;
use crate::fees::{Purse, day, fits};
use crate::message::{FEES, FEES_KEPT_DAYS, InFlight, MAX_OPEN, OPEN, Record, reserved};
use crate::money::note;
use crate::replace::{Market, Stays, raised};
use crate::sender::{Shared, lock};
use crate::{Landed, MessageKind, SendError};

/// Time between two rounds at least, however fast the chain is.
const PACE: Duration = Duration::from_millis(500);
/// Time between two rounds at most, however slow it is.
const POLL: Duration = Duration::from_secs(10);
/// Versions of one message. Each costs a quarter more than the one before: forty are beyond any
/// limit.
const MAX_VERSIONS: usize = 40;
/// Epochs after which WindowPoSt waits no longer for a nonce that is not ours: a deadline has 60.
const HELD_UP: i64 = 3;
/// Blocks in which a replacement should land.
const SOON_BLOCKS: u64 = 10;

/// When a message is pushed again, or looked at again once it has landed.
struct Watch {
    at: Instant,
    backoff: Backoff,
}

/// What the chain says of a journaled message.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// On chain for good.
    Final(Landed),
    /// On chain with the confidence of the settings.
    Landed(Landed),
    /// On chain, but not deep enough.
    Shallow,
    /// Not on chain.
    Absent,
    /// The node can not tell, because it does not know the message.
    Unknown,
    /// Another message has its nonce.
    Replaced,
}

/// What a round learns about addresses.
#[derive(Default)]
struct Lanes {
    /// Addresses of which a message that is not on chain was met: only the first can move.
    met: HashSet<String>,
    /// Addresses whose first message has not moved for long.
    blocked: HashSet<String>,
    /// Addresses whose next nonce is of a message that is not ours, with WindowPoSt behind it.
    held_up: HashSet<String>,
}

impl Shared {
    /// Pushes what is not on chain, until the runner stops: all of it at once after a start,
    /// then with back-off.
    pub(crate) async fn track(self: Arc<Self>, after: Duration) {
        tokio::select! {
            () = tokio::time::sleep(after) => {}
            () = self.stop.cancelled() => return,
        }
        self.announce_stops().await;
        let mut watches: HashMap<String, Watch> = HashMap::new();
        let mut heads = self.heads();
        loop {
            if let Err(e) = self.round(&mut watches).await {
                tracing::warn!(error = %e, "watching sent messages");
            }
            let pace = tokio::time::sleep(PACE);
            let next = async {
                pace.await;
                tokio::select! {
                    changed = heads.changed() => if changed.is_err() {
                        // No follower any more: the hub is about to stop.
                        tokio::time::sleep(POLL).await;
                    },
                    () = tokio::time::sleep(POLL) => {}
                }
            };
            tokio::select! {
                () = next => {}
                () = self.stop.cancelled() => return,
            }
        }
    }

    async fn round(&self, watches: &mut HashMap<String, Watch>) -> Result<(), SendError> {
        let Some(head) = self.head() else {
            return Ok(());
        };
        // Ordered by address and nonce, which is the order in which a node takes them best.
        let open = self.open().await?;
        metrics::gauge!("lotus_miner_messages_open").set(open.len() as f64);
        watches.retain(|key, _| open.iter().any(|(_, o)| o.key == *key));
        let mut lanes = Lanes::default();
        for (at, (_, o)) in open.iter().enumerate() {
            if self.stop.is_cancelled() {
                return Ok(());
            }
            let due = watches.get(&o.key).is_none_or(|w| w.at <= Instant::now());
            if o.landed && !due {
                continue;
            }
            let Some(record) = self.record(&o.key).await? else {
                continue;
            };
            let urgent = o.kind == MessageKind::Post || urgent_behind(&open, at);
            self.attend(&o.key, record, &head, (due, urgent), watches, &mut lanes)
                .await?;
        }
        *lock(&self.blocked) = lanes.blocked;
        *lock(&self.held_up) = lanes.held_up;
        Ok(())
    }

    async fn attend(
        &self,
        key: &str,
        mut record: Record,
        head: &TipSet,
        (due, urgent): (bool, bool),
        watches: &mut HashMap<String, Watch>,
        lanes: &mut Lanes,
    ) -> Result<(), SendError> {
        match self.judge(&record, head).await? {
            Verdict::Final(found) => {
                if record.fee.is_none() {
                    self.settle(key, &mut record, &found).await?;
                }
                self.close(key, record, false).await?;
            }
            Verdict::Replaced => self.close(key, record, true).await?,
            Verdict::Landed(found) => {
                if record.landed != Some(found.height) {
                    self.settle(key, &mut record, &found).await?;
                }
                watches.insert(key.into(), self.watch());
            }
            Verdict::Shallow => {
                watches.entry(key.into()).or_insert_with(|| self.watch());
            }
            verdict @ (Verdict::Absent | Verdict::Unknown) => {
                if record.landed.is_some() && verdict == Verdict::Absent {
                    tracing::warn!(key, cid = %record.cid(), "a reorg removed the message");
                    record.landed = None;
                    record.exit_code = None;
                    self.save(key, &record).await?;
                }
                let first = lanes.met.insert(record.from.clone());
                let mut changed = false;
                let mut stays = None;
                if first && verdict == Verdict::Absent {
                    let age = |since: Epoch| (head.height - since).0;
                    let stuck = i64::try_from(self.cfg.stuck_epochs).unwrap_or(i64::MAX);
                    if age(record.sent_at) >= stuck {
                        lanes.blocked.insert(record.from.clone());
                    }
                    if urgent
                        && age(record.sent_at) >= stuck.min(HELD_UP)
                        && self.is_held_up(&record, head).await?
                    {
                        lanes.blocked.insert(record.from.clone());
                        lanes.held_up.insert(record.from.clone());
                    }
                    let old = age(record.signed_at) >= stuck;
                    if old || urgent {
                        match self.raise(key, &mut record, head, (old, urgent)).await {
                            Ok(Ok(())) => changed = true,
                            Ok(Err(why)) => stays = why,
                            Err(e) => tracing::warn!(key, error = %e, "its fee is not raised yet"),
                        }
                    }
                }
                if due || changed {
                    self.push(key, &record).await;
                    let w = watches.entry(key.into()).or_insert_with(|| self.watch());
                    w.at = Instant::now() + w.backoff.next();
                }
                if let Some(why) = stays {
                    lock(&self.push_errors)
                        .entry(key.into())
                        .or_insert_with(|| why.into());
                }
            }
        }
        Ok(())
    }

    fn watch(&self) -> Watch {
        let mut backoff = Backoff::new(self.cfg.repush_first(), self.cfg.repush_max());
        Watch {
            at: Instant::now() + backoff.next(),
            backoff,
        }
    }

    async fn judge(&self, record: &Record, head: &TipSet) -> Result<Verdict, SendError> {
        let depth = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let found = match self.locate(record, head).await {
            Ok(found) => found,
            // Without a search there is no telling whether the nonce was taken by a version of
            // this message or by another one.
            Err(SendError::Node(NodeError::Rpc { .. })) => return Ok(Verdict::Unknown),
            Err(e) => return Err(e),
        };
        if let Some(found) = found {
            let age = (head.height - found.height).0;
            return Ok(if age >= depth(self.cfg.finality_epochs) {
                Verdict::Final(found)
            } else if age >= depth(self.cfg.confidence_epochs) {
                Verdict::Landed(found)
            } else {
                Verdict::Shallow
            });
        }
        // Replaced only if the nonce is spent so deep that no reorg is likely to return it.
        let back = EpochDelta(depth(self.cfg.confidence_epochs).min(head.height.0.max(0)));
        let at = head.height - back;
        let past = self
            .node
            .chain_get_tipset_by_height(at, &head.key())
            .await?;
        Ok(match self.nonce(record, &past.key()).await? {
            Some(nonce) if nonce > record.nonce => Verdict::Replaced,
            _ => Verdict::Absent,
        })
    }

    /// The next nonce of a message's sender in the state of a tipset.
    async fn nonce(&self, record: &Record, at: &TipSetKey) -> Result<Option<u64>, SendError> {
        let Ok(from) = record.from.parse::<Address>() else {
            return Ok(None);
        };
        let actor = self.node.state_get_actor(from, at).await?;
        Ok(actor.map(|a| a.nonce))
    }

    /// Whether the first of our messages that is not on chain waits for a nonce before it, which
    /// then is not of a message of ours: no fee that we pay gets it on chain.
    async fn is_held_up(&self, first: &Record, head: &TipSet) -> Result<bool, SendError> {
        let next = self.nonce(first, &head.key()).await?;
        Ok(next.is_some_and(|next| next < first.nonce))
    }

    /// Signs a stuck message again with the same nonce and a higher fee, and journals that before
    /// anyone sees it. The inner error says why it stays as it is, if fees are the trouble.
    ///
    /// Urgent is WindowPoSt, and what it waits behind: that may cost as much as WindowPoSt, out of
    /// the same purse, because a deadline is worth more.
    async fn raise(
        &self,
        key: &str,
        record: &mut Record,
        head: &TipSet,
        (old, urgent): (bool, bool),
    ) -> Result<Result<(), Option<&'static str>>, SendError> {
        let Some(gas) = record.versions.last().map(|v| v.gas.clone()) else {
            return Ok(Err(None));
        };
        if record.versions.len() >= MAX_VERSIONS {
            return Ok(Err(Some(
                "it was replaced so often that something is wrong",
            )));
        }
        // A gap in front of it, or it is being executed.
        if self.nonce(record, &head.key()).await? != Some(record.nonce) {
            return Ok(Err(None));
        }
        let base_fee = head.min_ticket_block().parent_base_fee.clone();
        let Ok(from) = record.from.parse::<Address>() else {
            return Ok(Err(None));
        };
        let gas_limit = i64::try_from(gas.limit).unwrap_or(i64::MAX);
        // A young one may land yet without bidding against others, unless the base fee forbids it.
        let premium = if !old && gas.fee_cap >= base_fee {
            TokenAmount::default()
        } else {
            self.node
                .gas_estimate_gas_premium(SOON_BLOCKS, from, gas_limit, &TipSetKey::HEAD)
                .await?
        };
        let own = record.max_fee();
        let funds = self.available(from, &self.open().await?).await? + &own;
        let mut limit = record.limit.clone();
        if urgent {
            limit = limit.max(self.cfg.fees.max_fee(MessageKind::Post, 1));
        }
        let new = match raised(&gas, &Market { base_fee, premium }, &limit.min(funds)) {
            Ok(new) => new,
            Err(Stays::FeeIsGood) => return Ok(Err(None)),
            Err(Stays::Limit) => {
                return Ok(Err(Some(
                    "the fee with which it would get on chain is above its limit, or above what \
                     its address has",
                )));
            }
        };
        let mut msg = record.signed(key)?.message;
        msg.gas_fee_cap = new.fee_cap.clone();
        msg.gas_premium = new.premium.clone();
        let signed = self.sign(key, &msg).await?;
        let mut next = record.clone();
        next.replace(&signed, head.height);
        if new.max_fee() > next.limit {
            next.purse = Purse::Post;
        }
        if !self.journal_version(key, &next).await? {
            return Ok(Err(Some("the day's fees are spent")));
        }
        tracing::warn!(key, old = %record.cid(), new = %next.cid(), nonce = next.nonce,
            fee_cap = %new.fee_cap, premium = %new.premium, max_fee = %new.max_fee(),
            "a message that does not get on chain is replaced by fee");
        metrics::counter!("lotus_miner_messages_replaced_total", "kind" => next.kind.as_str())
            .increment(1);
        *record = next;
        Ok(Ok(()))
    }

    /// Journals a new version if the day's fees allow it.
    async fn journal_version(&self, key: &str, next: &Record) -> Result<bool, SendError> {
        let (key, next, fees) = (key.to_owned(), next.clone(), self.cfg.fees.clone());
        self.journal(move |j| {
            j.write(|tx| {
                let spent = tx.get(&FEES, &day(&fees, next.signed_at))?;
                let mut others = tx.scan(&OPEN, None, MAX_OPEN)?;
                others.retain(|(_, o)| o.key != key);
                let kind = match next.purse {
                    Purse::Post => MessageKind::Post,
                    Purse::Declare => MessageKind::Declare,
                    Purse::Rest => next.kind,
                };
                let spent = spent.unwrap_or_default();
                if fits(&fees, kind, &spent, &reserved(&others), &next.max_fee()).is_err() {
                    return Ok(false);
                }
                next.put(tx, &key)?;
                Ok(true)
            })
        })
        .await
    }

    /// A message has landed: its fee and its end are counted, once, in the same transaction.
    async fn settle(
        &self,
        key: &str,
        record: &mut Record,
        found: &Landed,
    ) -> Result<(), SendError> {
        let first = record.fee.is_none();
        record.landed = Some(found.height);
        record.exit_code = Some(found.exit_code);
        if !first {
            return self.save(key, record).await;
        }
        let fee = self.fee_of(record, found).await?;
        record.fee = Some(fee.clone());
        let event = match found.exit_code {
            0 => Event::Landed,
            code => {
                let code = u32::try_from(code)
                    .map_or_else(|_| code.to_string(), |code| exit_name(ExitCode::new(code)));
                Event::Failed(format!("{key} failed on chain with {code}"))
            }
        };
        let (kind, today) = (record.kind, day(&self.cfg.fees, found.height));
        let (key, saved, breaker) = (key.to_owned(), record.clone(), self.cfg.breaker.clone());
        let height = found.height;
        let change = self
            .journal(move |j| {
                j.write(|tx| {
                    saved.put(tx, &key)?;
                    let mut spent = tx.get(&FEES, &today)?.unwrap_or_default();
                    spent.add(saved.purse, &fee);
                    tx.put(&FEES, &today, &spent)?;
                    if let Some(old) = today.checked_sub(FEES_KEPT_DAYS) {
                        tx.remove(&FEES, &old)?;
                    }
                    note(tx, &breaker, kind, height, event)
                })
            })
            .await?;
        change.announce(kind);
        let nano =
            (record.fee.clone().unwrap_or_default().atto() / 1_000_000_000u64).to_u64_digits();
        metrics::counter!("lotus_miner_fees_nanofil_total", "purse" => record.purse.as_str(),
            "kind" => kind.as_str())
        .increment(nano.1.first().copied().unwrap_or(0));
        Ok(())
    }

    /// What a message cost, at the base fee of the tipset that it is in.
    async fn fee_of(&self, record: &Record, found: &Landed) -> Result<TokenAmount, SendError> {
        let gas = record.versions.iter().find(|v| v.cid == found.cid);
        let Some(gas) = gas.or(record.versions.last()).map(|v| &v.gas) else {
            return Ok(TokenAmount::default());
        };
        let tipset = async {
            let after = self.node.chain_get_tipset(&found.tipset).await?;
            self.node.chain_get_tipset(&after.parents()).await
        };
        match tipset.await {
            Ok(t) => {
                let used = u64::try_from(found.gas_used).unwrap_or(0);
                Ok(gas.paid(used, &t.min_ticket_block().parent_base_fee))
            }
            // The node has pruned it: count the worst.
            Err(NodeError::Rpc { .. }) => Ok(gas.max_fee()),
            Err(e) => Err(e.into()),
        }
    }

    async fn save(&self, key: &str, record: &Record) -> Result<(), SendError> {
        let (key, record) = (key.to_owned(), record.clone());
        self.journal(move |j| j.write(|tx| record.put(tx, &key)))
            .await
    }

    async fn close(&self, key: &str, mut record: Record, replaced: bool) -> Result<(), SendError> {
        if replaced {
            tracing::error!(key, cid = %record.cid(), from = record.from, nonce = record.nonce,
                "another program sends from this address: its message took the nonce");
        }
        record.replaced = replaced;
        record.finish();
        lock(&self.push_errors).remove(key);
        self.save(key, &record).await
    }
}

/// Whether WindowPoSt waits behind this message of the same address.
fn urgent_behind(open: &InFlight, at: usize) -> bool {
    let Some(((from, _), _)) = open.get(at) else {
        return false;
    };
    let behind = open.iter().skip(at + 1);
    behind
        .take_while(|((f, _), _)| f == from)
        .any(|(_, o)| o.kind == MessageKind::Post && !o.landed)
}
