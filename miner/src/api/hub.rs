use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::future::ready;
use hub_proto::v1::capacity_server::Capacity;
use hub_proto::v1::event::What;
use hub_proto::v1::events_server::Events;
use hub_proto::v1::hub_server::Hub;
use hub_proto::v1::{
    AcquireRequest, CapacityState, Credit, Event, HelloRequest, HelloResponse, IdentityRequest,
    IdentityResponse, ProvingState, ReleaseRequest, ReleaseResponse, SafeToRestartRequest,
    SafeToRestartResponse, SubscribeRequest, WatchCapacityRequest, WatchProvingRequest,
};
use hub_proto::{API_VERSION, status, with_code};
use lotus_identity::{Peer, Shown};
use lotus_types::Kind;
use tonic::{Code, Request, Response, Status};

use super::access::Who;
use super::audit::About;
use super::pieces::deal_key;
use super::{Answer, Api, ONLY_LOOKS, Streamed, from_journal, invalid, not_yours};
use crate::capacity::CapacityError;
use crate::events::{EventsError, Topics};

/// How often room is looked at when nothing tells of a change: disks fill without telling.
const CAPACITY_EVERY: Duration = Duration::from_secs(2);

/// So many events cost a spoke as much of its quota as a call.
const EVENTS_OF_A_CALL: usize = 256;

/// Longest that the answer to a question about a restart waits to become yes.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// How often it is thought over meanwhile: what sealing would lose changes by time alone.
const LOOK: Duration = Duration::from_secs(1);

/// What a caller says, as far as it goes into logs.
fn short(said: &str) -> String {
    said.chars().take(64).collect()
}

#[tonic::async_trait]
impl Hub for Api {
    async fn hello(&self, request: Request<HelloRequest>) -> Answer<HelloResponse> {
        let who = request.extensions().get::<Who>().cloned();
        let far = matches!(
            request.extensions().get(),
            Some(Shown::Certificate(Peer { addr: Some(_), .. }))
        );
        let hello = request.into_inner();
        if let Some(Who::Spoke(caller)) = &who
            && caller.service.as_str() != hello.service
        {
            return Err(status(
                Kind::Config,
                format!("{caller} says that it is {}", short(&hello.service)),
                "give each service its own identity: `lotus-miner join-bundle --service NAME`",
                None,
            ));
        }
        let (major, minor) = API_VERSION;
        if hello.major != major {
            return Err(status(
                Kind::Config,
                format!(
                    "this hub speaks API {major}.{minor}, the caller {}.{}",
                    hello.major, hello.minor
                ),
                "install hub and spokes of matching releases",
                None,
            ));
        }
        tracing::info!(
            service = short(&hello.service),
            instance = short(&hello.instance),
            api = format!("{}.{}", hello.major, hello.minor),
            "hello"
        );
        Ok(Response::new(HelloResponse {
            major,
            minor,
            generation: self.generation.0,
            features: vec![
                "pull.unix".into(),
                "pull.http".into(),
                "pull.spoke".into(),
                "lease".into(),
                "events".into(),
                "proving".into(),
                "market".into(),
                "credentials".into(),
            ],
            // Of no use on another host.
            data_socket: if far {
                String::new()
            } else {
                self.data_socket.display().to_string()
            },
        }))
    }

    async fn identity(&self, _: Request<IdentityRequest>) -> Answer<IdentityResponse> {
        // A name that the node does not tell now is no reason to know nothing.
        let network = self.node.state_network_name().await.unwrap_or_default();
        Ok(Response::new(IdentityResponse {
            actor: self.actor.to_string(),
            sector_size: self.sector_size.bytes(),
            height: self.events.head().map_or(0, |h| h.height),
            network,
            proof_mode: "vanilla".into(),
        }))
    }

    async fn safe_to_restart(
        &self,
        request: Request<SafeToRestartRequest>,
    ) -> Answer<SafeToRestartResponse> {
        if !request.metadata().contains_key(ONLY_LOOKS) {
            self.safety.restart_is_wished();
        }
        let wait = Duration::from_millis(request.get_ref().wait_ms).min(LONGEST_WAIT);
        let end = Instant::now() + wait;
        loop {
            let changed = self.safety.changed();
            let answer = self.safety.safe_to_restart();
            let left = end.saturating_duration_since(Instant::now());
            if answer.safe || left.is_zero() {
                return Ok(Response::new(answer));
            }
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(left.min(LOOK)) => {}
                () = self.stop.cancelled() => return Ok(Response::new(answer)),
            }
        }
    }

    type WatchProvingStream =
        std::pin::Pin<Box<dyn futures::Stream<Item = Result<ProvingState, Status>> + Send>>;

    async fn watch_proving(&self, _: Request<WatchProvingRequest>) -> Streamed<ProvingState> {
        let end = self.stop.clone().cancelled_owned();
        let states = self.safety.proving().map(Ok).take_until(end);
        Ok(Response::new(Box::pin(states)))
    }
}

#[tonic::async_trait]
impl Capacity for Api {
    type WatchStream =
        std::pin::Pin<Box<dyn futures::Stream<Item = Result<CapacityState, Status>> + Send>>;

    async fn watch(&self, request: Request<WatchCapacityRequest>) -> Streamed<CapacityState> {
        let who = request.extensions().get().cloned().unwrap_or(Who::Host);
        let place = self.access.quotas().stream(&who)?;
        let credits = self.capacity.watch();
        let pieces = self.pieces.watch();
        let start = (self.clone(), credits, pieces, None::<CapacityState>);
        let stream =
            futures::stream::unfold(start, |(api, mut credits, mut pieces, told)| async move {
                loop {
                    credits.borrow_and_update();
                    pieces.borrow_and_update();
                    let now = api.capacity.state();
                    if told.as_ref() != Some(&now) {
                        return Some((Ok(now), (api, credits, pieces, Some(now))));
                    }
                    tokio::select! {
                        () = api.stop.cancelled() => return None,
                        _ = credits.changed() => {}
                        _ = pieces.changed() => {}
                        () = tokio::time::sleep(CAPACITY_EVERY) => {}
                    }
                }
            });
        let stream = stream.map(move |state| {
            let _ = &place;
            state
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn acquire(&self, request: Request<AcquireRequest>) -> Answer<Credit> {
        let about = About::of(&request);
        let seller = self.access.seller(request.extensions().get());
        let request = request.into_inner();
        let key = deal_key(request.key.as_ref())?;
        about.is(&key);
        // Nobody takes room for what can never be offered.
        let offered = self.pieces.get(&key).map_err(|e| from_journal(&e))?;
        let other = offered.and_then(|offer| offer.owner.filter(|o| !seller.may_take(o)));
        if let Some(owner) = other {
            return Err(from_capacity(&CapacityError::NotYours { key, owner }));
        }
        self.capacity
            .acquire(&key, request.piece_size, request.ttl_seconds, &seller)
            .map(Response::new)
            .map_err(|e| from_capacity(&e))
    }

    async fn release(&self, request: Request<ReleaseRequest>) -> Answer<ReleaseResponse> {
        let about = About::of(&request);
        let seller = self.access.seller(request.extensions().get());
        let id = request.into_inner().id;
        about.is(&id);
        self.capacity.release(&id, &seller);
        Ok(Response::new(ReleaseResponse {}))
    }
}

pub(super) fn from_capacity(e: &CapacityError) -> Status {
    match e {
        CapacityError::NotYours { .. } => not_yours(e.to_string(), &e.fix()),
        _ => status(e.kind(), e.to_string(), e.fix(), e.retry_after()),
    }
}

#[tonic::async_trait]
impl Events for Api {
    type SubscribeStream =
        std::pin::Pin<Box<dyn futures::Stream<Item = Result<Event, Status>> + Send>>;

    async fn subscribe(&self, request: Request<SubscribeRequest>) -> Streamed<Event> {
        let who = request.extensions().get::<Who>().cloned();
        let mut request = request.into_inner();
        if let Some(Who::Spoke(caller)) = &who {
            seen_by(caller.service.as_str(), &mut request.topics)?;
        }
        let topics = Topics::parse(&request.topics).map_err(|name| {
            invalid(
                format!("there is no event topic {name:?}"),
                "subscribe to piece, sector or head",
            )
        })?;
        let events = self
            .events
            .subscribe(request.from_seq, topics, self.stop.clone())
            .map_err(|e| from_events(&e))?;
        let seller = self.sells(who.as_ref());
        let who = who.unwrap_or(Who::Host);
        let quotas = self.access.quotas().clone();
        let place = quotas.stream(&who)?;
        let events = events.enumerate().then(move |(n, event)| {
            // Whoever reads the log from its start again and again pays for it as for calls.
            let due = match n % EVENTS_OF_A_CALL {
                0 if n > 0 => quotas.call(&who),
                _ => Duration::ZERO,
            };
            let _ = &place;
            async move {
                if !due.is_zero() {
                    tokio::time::sleep(due).await;
                }
                event.map_err(|e| from_events(&e))
            }
        });
        let events = events.filter(move |event| match event.as_ref().map(|e| &e.what) {
            Ok(Some(What::Piece(piece))) => ready(seller.owns(&piece.owner)),
            _ => ready(true),
        });
        Ok(Response::new(Box::pin(events)))
    }
}

fn from_events(e: &EventsError) -> Status {
    match e {
        EventsError::OutOfRange { .. } => with_code(
            Code::OutOfRange,
            Kind::Data,
            e.to_string(),
            "list the state and subscribe anew from the present",
            None,
        ),
        EventsError::Journal(e) => from_journal(e),
    }
}

/// The topics that a service asks for, if it may see them; all that it may see, if it names none.
fn seen_by(service: &str, topics: &mut Vec<String>) -> Result<(), Status> {
    let may = hub_proto::access::topics(service);
    if let Some(topic) = topics.iter().find(|t| !may.contains(&t.as_str())) {
        return Err(status(
            Kind::Config,
            format!("{service} may not see the topic {:?}", short(topic)),
            format!("subscribe to {}", may.join(", ")),
            None,
        ));
    }
    if topics.is_empty() {
        topics.extend(may.iter().map(|t| (*t).to_owned()));
    }
    Ok(())
}
