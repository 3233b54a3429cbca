//! The heart of the service: the journal, the hub, and the way from a proposal to a deal.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hub_proto::v1::{
    AcquireRequest, IdentityRequest, PiecePhase, PieceState, PieceStatusRequest, ReleaseRequest,
    WithdrawRequest,
};
use hub_proto::{HubClient, HubError};
use lotus_journal::{EffectId, JournalError, Machines, Map, Step, Tx};
use lotus_runtime::{Fault, trace};
use lotus_types::{ActorId, Address, DealKey, Epoch, Kind, PieceInfo, SectorSize};
use tokio::sync::{Notify, watch};
use ulid::Ulid;

use crate::DealsConfig;
use crate::arriving::Arriving;
use crate::filter::{Filter, Lists};
use crate::history;
use crate::machine::{Checkpoint, DealMachine, Event, HubView, Record};
use crate::mk12::Mk12;
use crate::mk20::{self, Code, Deal, Refusal};
use crate::pieces::Pieces;
use crate::staging::Staging;
use crate::validate::{self, Rules};

/// Where following the hub's events has got to: the next sequence number wanted.
pub(crate) const CURSOR: Map<String, u64> = Map::new("deals.cursor");
/// Key of the one entry of [`CURSOR`].
pub(crate) const NEXT_SEQ: &str = "next_seq";
/// Life of a capacity credit. One that ends before the hand-off is taken anew.
const CREDIT_TTL_SECS: u32 = 3_600;
/// Longest wait for the hub in a client's request.
const HUB_PATIENCE: Duration = Duration::from_secs(10);

/// The storage provider, as the hub tells it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Provider {
    pub(crate) actor: ActorId,
    pub(crate) sector_size: SectorSize,
    pub(crate) height: Epoch,
}

/// What is kept in memory of a deal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenDeal {
    checkpoint: Checkpoint,
    sector: Option<u64>,
    /// Bytes with padding.
    size: u64,
}

/// The deals that are not final, in memory: everything here is in the journal too.
#[derive(Debug, Default)]
pub(crate) struct Open {
    pub(crate) deals: HashMap<DealKey, OpenDeal>,
    /// Deals that are being accepted, with their padded bytes, by request.
    coming: HashMap<u64, (DealKey, u64)>,
    requests: u64,
    allocations: HashMap<(u64, u64), DealKey>,
}

/// The place of a deal that is being accepted: it counts as an open one. Dropped, whatever became
/// of the request, it is free again.
pub(crate) struct Place {
    request: u64,
    key: DealKey,
    steps: Steps,
    deals: Machines<DealMachine>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.steps.open();
        open.coming.remove(&self.request);
        // A deal that another request made, or makes, keeps its allocation.
        if !open.coming.values().any(|(key, _)| *key == self.key)
            && matches!(self.deals.get(&self.key), Ok(None))
        {
            open.release(&self.key);
        }
    }
}

/// Makes steps of deals known outside of the journal, in the order in which they are in it.
#[derive(Clone)]
struct Steps {
    open: Arc<Mutex<Open>>,
    /// Held from a transaction until its steps are known.
    turn: Arc<Mutex<()>>,
    wake: Arc<Notify>,
    mk12: Arc<Mk12>,
}

impl Steps {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn noted(&self, key: &DealKey, step: &Step<DealMachine>) {
        self.open().note(key, &step.after);
        let after = &step.after;
        if step.before.as_ref().map(|b| b.checkpoint) != Some(after.checkpoint) {
            let to = after.checkpoint.name();
            tracing::info!(deal = %key, checkpoint = to, sector = ?after.place.map(|p| p.0), reason = after.reason, "deal");
            metrics::counter!("lotus_markets_deal_checkpoints_total", "checkpoint" => to)
                .increment(1);
            if after.checkpoint == Checkpoint::Transferred {
                self.mk12.ready.notify_one();
            }
        }
        if !step.effects.is_empty() {
            self.wake.notify_one();
        }
    }
}

/// The heart of the service; shared by the HTTP intake and the background work.
pub(crate) struct Engine {
    pub(crate) cfg: DealsConfig,
    pub(crate) hub: HubClient,
    pub(crate) deals: Machines<DealMachine>,
    pub(crate) staging: Staging,
    pub(crate) arriving: Arriving,
    pub(crate) http: reqwest::Client,
    /// Path of the socket from which the hub pulls.
    pub(crate) data_socket: String,
    /// Told when there may be new effects.
    pub(crate) wake: Arc<Notify>,
    /// Chain height, from the hub's head events and answers.
    pub(crate) height: watch::Sender<Epoch>,
    /// What MK1.2 deals need.
    pub(crate) mk12: Arc<Mk12>,
    steps: Steps,
    pub(crate) lists: Lists,
    /// Asks the operator's filter.
    pub(crate) filter: Filter,
    /// Told whose back-off is to end.
    pub(crate) nudge: watch::Sender<Option<DealKey>>,
    /// Pieces without a deal.
    pub(crate) pieces: Arc<Pieces>,
}

pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

pub(crate) fn journal_fault(e: &JournalError) -> Fault {
    Fault::new(e.kind(), e.to_string(), e.fix())
}

pub(crate) fn journal_refusal(e: &JournalError) -> Refusal {
    tracing::error!(%e, "the deal journal fails");
    let code = if matches!(e, JournalError::DiskFull) {
        Code::InsufficientStorage
    } else {
        Code::Internal
    };
    Refusal::new(code, "the deal can not be recorded", "try again later").retry_after(60)
}

pub(crate) fn hub_refusal(e: &HubError) -> Refusal {
    let wait = e.retry_after().map_or(10, |d| d.as_secs().max(1));
    match e.kind() {
        Kind::Capacity => Refusal::new(
            Code::Overloaded,
            format!("there is no room for the piece now: {e}"),
            "propose again later",
        )
        .retry_after(wait),
        Kind::Data => Refusal::new(Code::BadProposal, e, e.fix()),
        Kind::Transport | Kind::Chain | Kind::Config | Kind::Fatal => {
            tracing::warn!(%e, "the hub did not help");
            Refusal::new(
                Code::Unavailable,
                "the provider's hub does not answer",
                "try again later",
            )
            .retry_after(wait)
        }
    }
}

impl Engine {
    pub(crate) fn new(
        cfg: DealsConfig,
        hub: HubClient,
        deals: Machines<DealMachine>,
        staging: Staging,
        pieces: Pieces,
        data_socket: String,
    ) -> Result<Self, Fault> {
        let lists = Lists::new(&cfg)?;
        let filter = Filter::new(&cfg)?;
        let http = crate::source::client(cfg.allow_private_sources)?;
        let mk12 = Arc::new(Mk12::new(&cfg.mk12)?);
        let mut open = Open::default();
        for (key, record) in deals.all().map_err(|e| journal_fault(&e))? {
            open.note(&key, &record);
        }
        let steps = Steps {
            open: Arc::new(Mutex::new(open)),
            turn: Arc::default(),
            wake: Arc::default(),
            mk12: mk12.clone(),
        };
        let engine = Self {
            cfg,
            hub,
            deals,
            staging,
            arriving: Arriving::default(),
            http,
            data_socket,
            wake: steps.wake.clone(),
            height: watch::Sender::new(Epoch(0)),
            mk12,
            steps,
            lists,
            filter,
            nudge: watch::Sender::new(None),
            pieces: Arc::new(pieces),
        };
        let open = engine.open_deals();
        engine.staging.sweep(|key| {
            open.iter()
                .any(|(k, checkpoint, _)| k == key && *checkpoint <= Checkpoint::Offered)
        })?;
        Ok(engine)
    }

    pub(crate) fn open(&self) -> MutexGuard<'_, Open> {
        self.steps.open()
    }

    /// Deals that are not final, with checkpoint and sector.
    pub(crate) fn open_deals(&self) -> Vec<(DealKey, Checkpoint, Option<u64>)> {
        let open = self.open();
        open.deals
            .iter()
            .map(|(k, d)| (k.clone(), d.checkpoint, d.sector))
            .collect()
    }

    /// Applies an event to a deal, durably, and wakes the runner. `cursor` is written with it.
    pub(crate) async fn apply(
        &self,
        key: &DealKey,
        event: Event,
        settles: Option<EffectId>,
        cursor: Option<u64>,
    ) -> Result<Option<Record>, JournalError> {
        self.apply_with(key, event, settles, move |tx| match cursor {
            Some(seq) => tx.put(&CURSOR, &NEXT_SEQ.to_owned(), &seq),
            None => Ok(()),
        })
        .await
    }

    /// Applies an event to a deal, durably, and wakes the runner, even if nobody waits for that any
    /// more. `also` is written with it.
    pub(crate) async fn apply_with(
        &self,
        key: &DealKey,
        event: Event,
        settles: Option<EffectId>,
        also: impl FnOnce(&mut Tx) -> Result<(), JournalError> + Send + 'static,
    ) -> Result<Option<Record>, JournalError> {
        let (deals, key, steps) = (self.deals.clone(), key.clone(), self.steps.clone());
        blocking(move || {
            let _turn = steps.turn();
            let step = deals.apply(&key, &event, settles, |tx, before, after| {
                history::note(tx, &key, before, after, unix_ms())?;
                also(tx)
            })?;
            Ok(step.map(|step| {
                steps.noted(&key, &step);
                step.after
            }))
        })
        .await
    }

    /// Applies events to deals in one transaction, and wakes the runner. `also` is written with
    /// them.
    pub(crate) async fn apply_all(
        &self,
        events: Vec<(DealKey, Event)>,
        also: impl FnOnce(&mut Tx) -> Result<(), JournalError> + Send + 'static,
    ) -> Result<(), JournalError> {
        let (journal, known) = (self.deals.journal().clone(), self.steps.clone());
        blocking(move || {
            let _turn = known.turn();
            let steps = journal.write(|tx| {
                let mut steps = Vec::with_capacity(events.len());
                for (key, event) in events {
                    let step = Machines::<DealMachine>::apply_in(
                        tx,
                        &key,
                        &event,
                        None,
                        |tx, before, after| history::note(tx, &key, before, after, unix_ms()),
                    )?;
                    steps.extend(step.map(|s| (key, s)));
                }
                also(tx)?;
                Ok::<_, JournalError>(steps)
            })?;
            for (key, step) in &steps {
                known.noted(key, step);
            }
            Ok(())
        })
        .await
    }

    pub(crate) async fn provider(&self) -> Result<Provider, HubError> {
        let mut client = self.hub.hub();
        let ask = client.identity(self.hub.request(IdentityRequest {}));
        let i = tokio::time::timeout(HUB_PATIENCE, ask)
            .await
            .map_err(|_| HubError::Silent {
                addr: "hub".into(),
                why: "no answer in time".into(),
            })?
            .map_err(HubError::from)?
            .into_inner();
        let wrong = |message: String| HubError::Refused {
            kind: Kind::Config,
            code: 0,
            message,
            fix: "use hub and markets of one release".into(),
            retry_after: None,
        };
        self.height.send_replace(Epoch(i.height));
        Ok(Provider {
            actor: i
                .actor
                .parse()
                .map_err(|e: lotus_types::BadId| wrong(e.to_string()))?,
            sector_size: i
                .sector_size
                .try_into()
                .map_err(|e: lotus_types::BadSize| wrong(e.to_string()))?,
            height: Epoch(i.height),
        })
    }

    /// Checks a proposal and journals it. The same proposal again is answered the same way.
    pub(crate) async fn propose(&self, deal: &Deal, signer: &Address) -> Result<DealKey, Refusal> {
        let key = DealKey {
            client: mk20::address_text(signer),
            id: validate::identifier(&deal.identifier)?,
        };
        if mk20::parse_address(&deal.client) == Some(*signer)
            && let Some(known) = self.get(&key)?
        {
            return same_deal(key, &known, deal);
        }
        self.lists.admit(signer)?;
        let provider = self.provider().await.map_err(|e| hub_refusal(&e))?;
        let rules = Rules {
            provider: provider.actor,
            sector_size: provider.sector_size,
            height: provider.height,
            cfg: &self.cfg,
        };
        let mut proposal = validate::validate(deal, signer, &rules)?;
        let _place = self.admit(&mut proposal, &rules).await?;
        self.accept(&key, proposal, deal).await
    }

    /// Takes a place among the open deals of its client, if `within` lets it be one more than
    /// these.
    pub(crate) fn place(
        &self,
        key: &DealKey,
        size: u64,
        within: impl FnOnce((usize, u64)) -> Result<(), Refusal>,
    ) -> Result<(Place, (usize, u64)), Refusal> {
        let mut open = self.open();
        let others = open.others(key);
        within(others)?;
        open.requests += 1;
        let request = open.requests;
        open.coming.insert(request, (key.clone(), size));
        drop(open);
        let place = Place {
            request,
            key: key.clone(),
            steps: self.steps.clone(),
            deals: self.deals.clone(),
        };
        Ok((place, others))
    }

    /// Keeps an allocation for a deal.
    pub(crate) fn reserve(
        &self,
        key: &DealKey,
        allocation: Option<(u64, u64)>,
    ) -> Result<(), Refusal> {
        let reserved = self.open().reserve(key, allocation);
        reserved.map_err(|holder| {
            Refusal::new(
                Code::InvalidProduct,
                format!("deal {} uses this allocation already", holder.id),
                "use one allocation for one deal",
            )
            .at("products.ddo_v1.allocation_id")
        })
    }

    async fn accept(
        &self,
        key: &DealKey,
        proposal: validate::Proposal,
        deal: &Deal,
    ) -> Result<DealKey, Refusal> {
        let wants_upload = proposal.source == validate::Source::Put;
        let piece = proposal.piece;
        let credit = self
            .acquire(key, proposal.piece.size.get())
            .await
            .map_err(|e| hub_refusal(&e))?;
        let event = Event::Accept {
            proposal: Box::new(proposal),
            unix_ms: unix_ms(),
            credit: credit.clone(),
            trace: trace::current(),
        };
        match self.apply(key, event, None, None).await {
            Ok(Some(_)) => {
                if wants_upload {
                    self.adopt(key, &piece).await;
                }
                Ok(key.clone())
            }
            // Another request with this id was faster.
            Ok(None) => match self.get(key)? {
                Some(known) => same_deal(key.clone(), &known, deal),
                None => Err(Refusal::new(
                    Code::Internal,
                    "the deal is gone",
                    "propose again",
                )),
            },
            Err(e) => {
                self.release(&credit).await;
                Err(journal_refusal(&e))
            }
        }
    }

    /// Takes a piece that was uploaded before its deal. If that fails the client uploads it.
    async fn adopt(&self, key: &DealKey, piece: &PieceInfo) {
        let Some(file) = self.pieces.file(piece) else {
            return;
        };
        // The client uploads already.
        let Some(lease) = self.arriving.lease(key) else {
            return;
        };
        let staging = self.staging.clone();
        let link = move || staging.adopt(&lease.key, &file);
        let linked = tokio::task::spawn_blocking(link).await;
        match linked {
            Ok(Ok(())) => match self.apply(key, Event::Uploaded, None, None).await {
                Ok(_) => tracing::info!(deal = %key, "its piece is here already"),
                Err(e) => tracing::warn!(%e, deal = %key, "the piece is not taken over"),
            },
            Ok(Err(e)) => tracing::warn!(%e, deal = %key, "the piece is not taken over"),
            Err(e) => tracing::warn!(%e, deal = %key, "the piece is not taken over"),
        }
    }

    /// Takes room for a piece. The same deal gets the same credit while it lives.
    pub(crate) async fn acquire(&self, key: &DealKey, piece_size: u64) -> Result<String, HubError> {
        let request = AcquireRequest {
            key: Some(key.into()),
            piece_size,
            ttl_seconds: CREDIT_TTL_SECS,
        };
        let credit = self
            .hub
            .capacity()
            .acquire(self.hub.request(request))
            .await?;
        Ok(credit.into_inner().id)
    }

    /// Gives a credit back. If that fails it comes back by itself.
    pub(crate) async fn release(&self, credit: &str) {
        if credit.is_empty() {
            return;
        }
        let request = ReleaseRequest { id: credit.into() };
        if let Err(e) = self.hub.capacity().release(self.hub.request(request)).await {
            tracing::debug!(%e, credit, "credit not given back; it ends by itself");
        }
    }

    fn get(&self, key: &DealKey) -> Result<Option<Record>, Refusal> {
        self.deals.get(key).map_err(|e| journal_refusal(&e))
    }

    /// The deal `id` of this client.
    pub(crate) fn deal_of(&self, signer: &Address, id: Ulid) -> Result<Record, Refusal> {
        let key = DealKey {
            client: mk20::address_text(signer),
            id,
        };
        self.get(&key)?.ok_or_else(|| {
            Refusal::new(
                Code::NotFound,
                format!("{} has no deal {id} here", key.client),
                "check the id, and that the same key signs as for the proposal",
            )
        })
    }

    /// Takes an offer back. Returns the hub's view of the piece; `None` when it knows none.
    pub(crate) async fn withdraw(&self, key: &DealKey) -> Result<Option<PieceState>, HubError> {
        let request = WithdrawRequest {
            key: Some(key.into()),
        };
        let mut pieces = self.hub.pieces();
        let asked = pieces.withdraw(self.hub.request(request)).await;
        match asked.map_err(HubError::from) {
            Ok(state) => Ok(Some(state.into_inner())),
            Err(e) if e.is_not_found() => Ok(None),
            // It is in a sector, or on its way there: that is what it is then.
            Err(e) if e.kind() == Kind::Data => self.hub_state(key).await,
            Err(e) => Err(e),
        }
    }

    /// The hub's view of a deal's piece; `None` when it knows none.
    pub(crate) async fn hub_state(&self, key: &DealKey) -> Result<Option<PieceState>, HubError> {
        let request = PieceStatusRequest {
            key: Some(key.into()),
        };
        match self
            .hub
            .pieces()
            .status(self.hub.request(request))
            .await
            .map_err(HubError::from)
        {
            Ok(state) => Ok(Some(state.into_inner())),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Runs a journal call on a thread that may block.
pub(crate) async fn blocking<R: Send + 'static>(
    f: impl FnOnce() -> Result<R, JournalError> + Send + 'static,
) -> Result<R, JournalError> {
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(f))
        .await
        .map_err(|e| JournalError::Encode {
            table: "deals",
            why: e.to_string(),
        })?
}

impl Open {
    /// The other open deals of a deal's client, and those that are being accepted: how many, and
    /// their bytes with padding.
    fn others(&self, of: &DealKey) -> (usize, u64) {
        let open = self.deals.iter().map(|(key, deal)| (key, deal.size));
        let coming = self.coming.values().map(|(key, size)| (key, *size));
        let coming = coming.filter(|(key, _)| !self.deals.contains_key(key));
        open.chain(coming)
            .filter(|(key, _)| key.client == of.client && *key != of)
            .fold((0, 0), |(n, bytes), (_, size)| {
                (n + 1, size.saturating_add(bytes))
            })
    }

    fn note(&mut self, key: &DealKey, record: &Record) {
        if record.checkpoint.is_final() {
            self.deals.remove(key);
            // A sealed deal has used its allocation up; a failed one frees it.
            if record.checkpoint != Checkpoint::Active {
                self.release(key);
                return;
            }
        } else {
            let deal = OpenDeal {
                checkpoint: record.checkpoint,
                sector: record.place.map(|(s, _)| s),
                size: record.proposal.piece.size.get(),
            };
            self.deals.insert(key.clone(), deal);
        }
        if let Some(allocation) = record.proposal.allocation {
            self.allocations.insert(allocation, key.clone());
        }
    }

    fn reserve(&mut self, key: &DealKey, allocation: Option<(u64, u64)>) -> Result<(), DealKey> {
        let Some(allocation) = allocation else {
            return Ok(());
        };
        match self.allocations.get(&allocation) {
            Some(holder) if holder != key => Err(holder.clone()),
            _ => {
                self.allocations.insert(allocation, key.clone());
                Ok(())
            }
        }
    }

    pub(crate) fn release(&mut self, key: &DealKey) {
        self.allocations.retain(|_, holder| holder != key);
    }
}

fn same_deal(key: DealKey, known: &Record, deal: &Deal) -> Result<DealKey, Refusal> {
    if known.proposal.digest == validate::digest(deal) {
        return Ok(key);
    }
    Err(Refusal::new(
        Code::Conflict,
        format!("deal {} exists with other contents", key.id),
        "use a new ULID for each deal",
    )
    .at("identifier"))
}

/// The hub's state of a piece, for the machine.
pub(crate) fn view(state: &PieceState) -> HubView {
    let place = state.sector.zip(state.offset);
    match (state.phase(), place) {
        (PiecePhase::Stored, _) => HubView::Stored,
        (PiecePhase::Placed, Some((sector, offset))) => HubView::Placed {
            sector,
            offset,
            state: state.sector_state.clone(),
        },
        (PiecePhase::Active, Some((sector, offset))) => HubView::Active { sector, offset },
        (PiecePhase::Withdrawn, _) => {
            HubView::Failed("the piece was withdrawn from the hub".into())
        }
        (PiecePhase::Failed, _) => HubView::Failed(if state.reason.is_empty() {
            "the hub gave no reason".into()
        } else {
            state.reason.clone()
        }),
        (
            PiecePhase::Unspecified
            | PiecePhase::Offered
            | PiecePhase::Pulling
            | PiecePhase::Placed
            | PiecePhase::Active,
            _,
        ) => HubView::Taken,
    }
}
