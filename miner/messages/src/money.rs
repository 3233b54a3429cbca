//! Who pays, what is spent, what is stopped: the effects around `select`, `fees` and `breaker`.

use std::time::{SystemTime, UNIX_EPOCH};

use lotus_journal::{JournalError, Map, Tx};
use lotus_node_client::NodeError;
use lotus_node_client::api::TipSetKey;
use lotus_node_client::json::parse_address;
use lotus_types::{Address, Epoch, TokenAmount};

use crate::breaker::{Breaker, Event};
use crate::fees::{Purse, day, day_begins};
use crate::message::{FEES, InFlight, MAX_OPEN, MESSAGES, MessageKind, OPEN, reserved};
use crate::select::{Candidate, Controls, Roles, preference, rank};
use crate::sender::{Shared, lock};
use crate::{MessageStatus, Payer, SendError, SendRequest, Sender, Stop, StopReason, Waiting};

/// The breaker of each kind that ever had trouble, by the kind's name.
pub(crate) const BREAKERS: Map<String, Breaker> = Map::new("messages.breakers");
/// Breakers that are ever read: more than there are kinds.
const MAX_BREAKERS: usize = 100;

/// What a message would cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quote {
    /// Who would pay, in key form.
    pub from: Address,
    /// What that address has, less what messages under way may take.
    pub available: TokenAmount,
    /// Tokens that go with the message.
    pub value: TokenAmount,
    /// Gas limit.
    pub gas_limit: u64,
    /// Most attoFIL per unit of gas.
    pub fee_cap: TokenAmount,
    /// attoFIL per unit of gas for the block's miner.
    pub premium: TokenAmount,
    /// The limit of its fee.
    pub limit: TokenAmount,
}

impl Quote {
    /// The most that it can cost in fees.
    #[must_use]
    pub fn max_fee(&self) -> TokenAmount {
        &self.fee_cap * self.gas_limit
    }
}

/// A purse's day.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PurseStatus {
    /// Which.
    pub purse: Purse,
    /// Its limit, if it has one.
    pub cap: Option<TokenAmount>,
    /// Fees paid today.
    pub spent: TokenAmount,
    /// The most that messages under way may still cost.
    pub reserved: TokenAmount,
}

/// Where the money is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Money {
    /// The chain's height.
    pub height: Epoch,
    /// First epoch of the next day.
    pub next_day: Epoch,
    /// What is spent.
    pub purses: Vec<PurseStatus>,
    /// What is stopped, or on trial after a stop.
    pub stops: Vec<(MessageKind, Stop)>,
    /// What was turned down and is still tried.
    pub waiting: Vec<Waiting>,
}

impl Sender {
    /// The messages that are not final, by address and nonce.
    pub async fn list(&self) -> Result<Vec<MessageStatus>, SendError> {
        let records = self
            .0
            .journal(|j| {
                j.read(|v| {
                    let mut all = Vec::new();
                    for (_, o) in v.scan(&OPEN, None, MAX_OPEN)? {
                        if let Some(r) = v.get(&MESSAGES, &o.key)? {
                            all.push((o.key, r));
                        }
                    }
                    Ok(all)
                })
            })
            .await?;
        let all = records.into_iter();
        all.map(|(key, r)| self.0.describe(&key, r)).collect()
    }

    /// What is spent, stopped and waiting.
    pub async fn money(&self) -> Result<Money, SendError> {
        let shared = &self.0;
        let fees = shared.cfg.fees.clone();
        let height = shared.head_now().await?.height;
        let today = day(&fees, height);
        let (spent, open, stops) = shared
            .journal(move |j| {
                j.read(|v| {
                    let spent = v.get(&FEES, &today)?.unwrap_or_default();
                    let open = v.scan(&OPEN, None, MAX_OPEN)?;
                    Ok((spent, open, v.scan(&BREAKERS, None, MAX_BREAKERS)?))
                })
            })
            .await?;
        let reserved = reserved(&open);
        let purses = Purse::ALL.map(|purse| PurseStatus {
            purse,
            cap: purse.cap(&fees),
            spent: spent.of(purse).clone(),
            reserved: reserved.of(purse).clone(),
        });
        let stop = |(name, b): (String, Breaker)| Some((MessageKind::by_name(&name)?, b.stop?));
        Ok(Money {
            height,
            next_day: day_begins(&fees, today + 1),
            purses: purses.into(),
            stops: stops.into_iter().filter_map(stop).collect(),
            waiting: lock(&shared.waiting).present(unix_ms()),
        })
    }

    /// The address, in key form, that can send a WindowPoSt now whose message, of this key, waits
    /// for a nonce that is not ours; `None` while it may land as it is, or no other address has funds.
    ///
    /// # Errors
    /// The node does not answer, or the journal can not be read.
    pub async fn way_around(
        &self,
        key: &str,
        miner: Address,
    ) -> Result<Option<Address>, SendError> {
        let shared = &self.0;
        let waits = match shared.record(key).await? {
            Some(r) => r.landed.is_none() && !r.replaced && lock(&shared.held_up).contains(&r.from),
            None => false,
        };
        if !waits {
            return Ok(None);
        }
        let kind = MessageKind::Post;
        let mut ways = shared.candidates(kind, miner).await?;
        ways.retain(|c| !c.blocked && c.available.is_positive());
        let need = shared.cfg.fees.max_fee(kind, 1);
        match rank(kind, &need, &ways).first() {
            Some(way) => Ok(Some(shared.key_address(*way).await?)),
            None => Ok(None),
        }
    }

    /// Ends a stop of this kind: the next message is tried at once.
    pub async fn resume(&self, kind: MessageKind) -> Result<(), SendError> {
        self.0.note(kind, Event::Resume).await
    }
}

impl Shared {
    /// The addresses to try for a request, in key form.
    pub(crate) async fn payers(&self, request: &SendRequest) -> Result<Vec<Address>, SendError> {
        let miner = match request.from {
            Payer::Address(a) => return Ok(vec![self.key_address(a).await?]),
            Payer::Miner(m) => m,
        };
        let candidates = self.candidates(request.kind, miner).await?;
        let need = &request.value + self.limit(request);
        let mut keys = Vec::new();
        for address in rank(request.kind, &need, &candidates) {
            keys.push(self.key_address(address).await?);
        }
        Ok(keys)
    }

    /// The addresses that may pay for a kind of message, the preferred first.
    async fn candidates(
        &self,
        kind: MessageKind,
        miner: Address,
    ) -> Result<Vec<Candidate>, SendError> {
        let info = self.node.state_miner_info(miner, &TipSetKey::HEAD).await?;
        let roles = Roles {
            owner: info.owner,
            worker: info.worker,
            control: info.control_addresses,
        };
        let open = self.open().await?;
        let mut candidates = Vec::new();
        for address in preference(kind, &roles, &self.controls().await?) {
            if let Some(c) = self.candidate(kind, address, &open).await? {
                candidates.push(c);
            }
        }
        Ok(candidates)
    }

    /// The settings with ID addresses. One that the chain does not know is left out.
    async fn controls(&self) -> Result<Controls, SendError> {
        let cfg = &self.cfg.addresses;
        Ok(Controls {
            pre_commit: self.ids(&cfg.pre_commit_control).await?,
            commit: self.ids(&cfg.commit_control).await?,
            terminate: self.ids(&cfg.terminate_control).await?,
            publish: self.ids(&cfg.deal_publish_control).await?,
            disable_owner_fallback: cfg.disable_owner_fallback,
            disable_worker_fallback: cfg.disable_worker_fallback,
        })
    }

    async fn ids(&self, texts: &[String]) -> Result<Vec<Address>, SendError> {
        let mut ids = Vec::new();
        for address in texts.iter().filter_map(|t| parse_address(t).ok()) {
            let known = lock(&self.id_addresses).get(&address).copied();
            let id = match known {
                Some(id) => Some(id),
                None => known_to_chain(self.node.state_lookup_id(address, &TipSetKey::HEAD).await)?,
            };
            if let Some(id) = id {
                lock(&self.id_addresses).insert(address, id);
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// `None` for an address that can not sign, such as a multisig owner.
    async fn candidate(
        &self,
        kind: MessageKind,
        address: Address,
        open: &InFlight,
    ) -> Result<Option<Candidate>, SendError> {
        let key = match self.key_address(address).await {
            Ok(key) => key,
            Err(SendError::Node(NodeError::Rpc { .. })) => return Ok(None),
            Err(e) => return Err(e),
        };
        let key_at_hand = self.node.wallet_has(key).await?;
        Ok(Some(Candidate {
            address,
            available: if key_at_hand {
                self.available(key, open).await?
            } else {
                TokenAmount::default()
            },
            floor: self.floor(kind, key),
            key_at_hand,
            blocked: lock(&self.blocked).contains(&key.to_string()),
        }))
    }

    /// What an address in key form keeps when it pays for a kind of message; the settings may name
    /// its ID.
    pub(crate) fn floor(&self, kind: MessageKind, key: Address) -> TokenAmount {
        let known = lock(&self.key_addresses);
        let mut forms: Vec<Address> = known
            .iter()
            .filter(|(_, k)| **k == key)
            .map(|(form, _)| *form)
            .collect();
        forms.push(key);
        self.cfg.fees.floor(kind, &forms)
    }

    /// Balance less what messages under way may take.
    pub(crate) async fn available(
        &self,
        key: Address,
        open: &InFlight,
    ) -> Result<TokenAmount, SendError> {
        let actor = self.node.state_get_actor(key, &TipSetKey::HEAD).await;
        let Some(actor) = known_to_chain(actor)?.flatten() else {
            return Ok(TokenAmount::default());
        };
        let lane = key.to_string();
        // Nonces below the actor's are executed: the balance knows of them.
        let under_way = open
            .iter()
            .filter(|((from, nonce), _)| *from == lane && *nonce >= actor.nonce);
        let mut left = actor.balance;
        for (_, o) in under_way {
            left -= &o.value + &o.max_fee;
        }
        Ok(left)
    }

    pub(crate) async fn open(&self) -> Result<InFlight, SendError> {
        self.journal(|j| j.read(|v| v.scan(&OPEN, None, MAX_OPEN)))
            .await
    }

    /// The limit on a request's fee.
    pub(crate) fn limit(&self, request: &SendRequest) -> TokenAmount {
        match &request.max_fee {
            Some(limit) => limit.clone(),
            None => self.cfg.fees.max_fee(request.kind, 1),
        }
    }

    /// The stop of a kind that is in force.
    pub(crate) async fn stopped(&self, kind: MessageKind) -> Result<Option<Stop>, SendError> {
        let name = kind.as_str().to_owned();
        let breaker = self
            .journal(move |j| j.read(|v| v.get(&BREAKERS, &name)))
            .await?;
        let Some(breaker) = breaker.filter(|b| b.stop.is_some()) else {
            return Ok(None);
        };
        let now = self.head_now().await?.height;
        Ok(breaker.stopped(now).cloned())
    }

    /// Tells the breaker of a kind what happened.
    pub(crate) async fn note(&self, kind: MessageKind, event: Event) -> Result<(), SendError> {
        let now = self.head_now().await?.height;
        let cfg = self.cfg.breaker.clone();
        let change = self
            .journal(move |j| j.write(|tx| note(tx, &cfg, kind, now, event)))
            .await?;
        change.announce(kind);
        Ok(())
    }

    /// What a failed attempt to send means for the kind. What somebody sends from an address of
    /// his own choice says nothing about the kind.
    pub(crate) async fn note_failure(
        &self,
        request: &SendRequest,
        e: &SendError,
    ) -> Result<(), SendError> {
        if matches!(request.from, Payer::Address(_)) {
            return Ok(());
        }
        let event = match e {
            SendError::Refused { .. } => Event::Refused(e.to_string()),
            e if e.is_short() => Event::Balance(e.to_string()),
            _ => return Ok(()),
        };
        self.note(request.kind, event).await
    }

    /// The event of a message that would go over the day's limit. What is spent is in the way for
    /// the whole day; what is only reserved until messages land for less, and a price above all
    /// of the limit until fees fall.
    pub(crate) fn over_cap(&self, now: Epoch, e: &SendError) -> Option<Event> {
        let SendError::DailyCap { over, needed, .. } = e else {
            return None;
        };
        let fees = &self.cfg.fees;
        let tomorrow = day_begins(fees, day(fees, now) + 1);
        let pause = i64::try_from(self.cfg.breaker.pause_epochs.max(1)).unwrap_or(i64::MAX / 2);
        let next = if *needed <= over.cap && &over.spent + needed > over.cap {
            tomorrow
        } else {
            tomorrow.min(Epoch(now.0.saturating_add(pause)))
        };
        Some(Event::DailyCap(e.to_string(), next))
    }

    /// Remembers, or forgets, that a request was turned down.
    pub(crate) fn remember(&self, request: &SendRequest, result: &Result<cid::Cid, SendError>) {
        lock(&self.waiting).note(request, result.as_ref().err(), unix_ms());
    }

    /// Says at the start what is still stopped.
    pub(crate) async fn announce_stops(&self) {
        let stops = self
            .journal(|j| j.read(|v| v.scan(&BREAKERS, None, MAX_BREAKERS)))
            .await;
        for (name, after) in stops.unwrap_or_default() {
            if let Some(kind) = MessageKind::by_name(&name) {
                let before = Breaker::default();
                Change { before, after }.announce(kind);
            }
        }
    }
}

/// `None` for an address that the chain does not know. A node that answers with another error has
/// not said that.
fn known_to_chain<T>(answer: Result<T, NodeError>) -> Result<Option<T>, SendError> {
    match answer {
        Ok(t) => Ok(Some(t)),
        Err(e) if e.is_unknown_actor() => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// A breaker before and after an event.
pub(crate) struct Change {
    before: Breaker,
    after: Breaker,
}

/// Steps a kind's breaker within a transaction.
pub(crate) fn note(
    tx: &mut Tx,
    cfg: &crate::BreakerConfig,
    kind: MessageKind,
    now: Epoch,
    event: Event,
) -> Result<Change, JournalError> {
    let name = kind.as_str().to_owned();
    let before = tx.get(&BREAKERS, &name)?.unwrap_or_default();
    let after = before.clone().step(cfg, kind, now, event);
    if after != before {
        tx.put(&BREAKERS, &name, &after)?;
    }
    Ok(Change { before, after })
}

impl Change {
    /// Says it once: when a stop begins, changes its reason, or ends.
    pub(crate) fn announce(self, kind: MessageKind) {
        let (before, after) = (self.before.stop, self.after.stop);
        let name = kind.as_str();
        for reason in StopReason::ALL {
            let on = after.as_ref().is_some_and(|s| s.reason == reason);
            metrics::gauge!("lotus_miner_messages_stopped", "kind" => name,
                "reason" => reason.as_str())
            .set(f64::from(u8::from(on)));
        }
        match (&before, &after) {
            (Some(b), Some(a)) if b.reason == a.reason => {}
            (_, Some(a)) => tracing::error!(
                kind = name,
                reason = a.reason.as_str(),
                next_try = %a.next_try,
                "messages of this kind are stopped: {}; `lotus-miner messages resume {name}` \
                 tries at once",
                a.why
            ),
            (Some(_), None) => tracing::info!(kind = name, "messages of this kind are sent again"),
            (None, None) => {}
        }
    }
}

pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
