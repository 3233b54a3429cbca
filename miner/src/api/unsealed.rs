use std::time::Duration;

use hub_proto::status;
use hub_proto::v1::unsealed_server::Unsealed;
use hub_proto::v1::{LeaseRequest, LeaseResponse, LocateRequest, LocateResponse};
use tonic::{Request, Response, Status};

use super::access::Who;
use super::audit::About;
use super::pieces::piece_cid;
use super::{Answer, Api, not_found};
use crate::pieces::blocking;
use crate::unsealed::{Readable, UnsealedError};

#[tonic::async_trait]
impl Unsealed for Api {
    async fn locate(&self, request: Request<LocateRequest>) -> Answer<LocateResponse> {
        let (cid, _) = piece_cid(&request.into_inner().piece_cid)?;
        let unsealed = self.unsealed.clone();
        let found = blocking(move || unsealed.locate(&cid)).await;
        let found = found.map_err(|e| refuse(&e))?;
        Ok(Response::new(
            found.map_or_else(LocateResponse::default, answer),
        ))
    }

    async fn lease(&self, request: Request<LeaseRequest>) -> Answer<LeaseResponse> {
        let to = request.extensions().get::<Who>().map(Who::to_string);
        let request = request.into_inner();
        let (cid, v2) = piece_cid(&request.piece_cid)?;
        let life = Duration::from_secs(request.ttl_seconds.into());
        let (unsealed, to) = (self.unsealed.clone(), to.unwrap_or_default());
        let lease = blocking(move || unsealed.lease(&to, &cid, v2.map(|p| p.raw_size), life))
            .await
            .map_err(|e| refuse(&e))?;
        Ok(Response::new(LeaseResponse {
            token: lease.token,
            generation: lease.generation.0,
            expires_unix_ms: lease.expires_unix_ms,
            raw_size: lease.piece.raw_size,
            piece_size: lease.piece.size.get(),
        }))
    }

    async fn request_unseal(&self, request: Request<LocateRequest>) -> Answer<LocateResponse> {
        let about = About::of(&request);
        let (cid, _) = piece_cid(&request.into_inner().piece_cid)?;
        about.is(cid);
        let unsealed = self.unsealed.clone();
        let found = blocking(move || unsealed.request(&cid)).await;
        Ok(Response::new(answer(found.map_err(|e| refuse(&e))?)))
    }
}

fn answer(found: Readable) -> LocateResponse {
    LocateResponse {
        known: true,
        readable: found.readable,
        unsealing: found.unsealing,
        piece_size: found.piece.size.get(),
        raw_size: found.piece.raw_size,
        sector: found.sector.unwrap_or_default(),
    }
}

fn refuse(e: &UnsealedError) -> Status {
    match e {
        UnsealedError::Unknown(_) => not_found(e.to_string(), &e.fix()),
        UnsealedError::NotReadable(_) | UnsealedError::Busy(_) => status(
            e.kind(),
            e.to_string(),
            e.fix(),
            Some(Duration::from_secs(5)),
        ),
        _ => status(e.kind(), e.to_string(), e.fix(), None),
    }
}
