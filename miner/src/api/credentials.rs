use std::sync::Arc;

use hub_proto::status;
use hub_proto::v1::credentials_server::Credentials;
use hub_proto::v1::{
    Credential, Identified, JoinRequest, ListCredentialsRequest, ListCredentialsResponse,
    RenewRequest, RevokeRequest, RevokeResponse,
};
use lotus_identity::{Authority, Caller, Peer, Refused, Registered, Shown, State};
use lotus_runtime::Fault;
use lotus_types::Kind;
use tonic::{Request, Response, Status};

use super::access::unknown;
use super::audit::About;
use super::{Answer, Api, invalid};

/// Largest public key that is looked at, bytes; one of P-256 has 91.
const MAX_KEY: usize = 1024;

#[tonic::async_trait]
impl Credentials for Api {
    async fn join(&self, request: Request<JoinRequest>) -> Answer<Credential> {
        let peer = peer(&request)?;
        let key = request.into_inner().public_key;
        if key.len() > MAX_KEY {
            return Err(invalid(
                format!("a public key of {} bytes", key.len()),
                "send the SubjectPublicKeyInfo of a P-256 key",
            ));
        }
        let made = self.ask(move |a| a.join(&peer.certificate, &key)).await?;
        answer(made)
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Answer<Credential> {
        let peer = peer(&request)?;
        let made = self.ask(move |a| a.renew(&peer)).await?;
        answer(made)
    }

    async fn list(&self, _: Request<ListCredentialsRequest>) -> Answer<ListCredentialsResponse> {
        let all = self.ask(Authority::callers).await?;
        let identities = all.map_err(|e| from_fault(&e))?;
        Ok(Response::new(ListCredentialsResponse {
            identities: identities.into_iter().map(identified).collect(),
        }))
    }

    async fn revoke(&self, request: Request<RevokeRequest>) -> Answer<RevokeResponse> {
        let about = About::of(&request);
        let RevokeRequest { service, instance } = request.into_inner();
        let caller: Caller = format!("{service}/{instance}")
            .parse()
            .map_err(|e: String| invalid(e, "see `lotus-miner credentials list`"))?;
        let name = caller.to_string();
        about.is(&name);
        let revoked = self.ask(move |a| a.revoke(&caller)).await?;
        let revoked = revoked.map_err(|e| from_fault(&e))?;
        self.access.sweep(true);
        tracing::info!(caller = name, revoked, "identity revoked");
        Ok(Response::new(RevokeResponse { revoked }))
    }
}

impl Api {
    /// Asks the register, which waits for the disk.
    async fn ask<T: Send + 'static>(
        &self,
        what: impl FnOnce(&Authority) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let authority: Arc<Authority> = self.access.authority();
        tokio::task::spawn_blocking(move || what(&authority))
            .await
            .map_err(|e| status(Kind::Fatal, format!("identities: {e}"), "see the log", None))
    }
}

/// The certificate of the connection that a request came by.
fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
    match request.extensions().get() {
        Some(Shown::Certificate(peer)) => Ok(peer.clone()),
        _ => Err(status(
            Kind::Config,
            "an operator's process needs no credential",
            "call as it is",
            None,
        )),
    }
}

fn answer(made: Result<lotus_identity::Credential, Refused>) -> Answer<Credential> {
    let made = made.map_err(|refused| unknown(&refused))?;
    Ok(Response::new(Credential {
        certificate: made.certificate,
        expires_unix_ms: made.expires_unix_ms,
    }))
}

pub(crate) fn identified(r: Registered) -> Identified {
    Identified {
        service: r.caller.service.to_string(),
        instance: r.caller.instance.to_string(),
        state: match r.state {
            State::Invited => "invited",
            State::Joined => "joined",
            State::Revoked => "revoked",
        }
        .into(),
        invited_unix_ms: r.invited_unix_ms,
        joined_unix_ms: r.joined_unix_ms.unwrap_or(0),
        renewed_unix_ms: r.renewed_unix_ms.unwrap_or(0),
        expires_unix_ms: r.ends_unix_ms,
    }
}

fn from_fault(fault: &Fault) -> Status {
    status(fault.kind, fault.message.clone(), fault.fix.clone(), None)
}
