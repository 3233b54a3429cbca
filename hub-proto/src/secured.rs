//! A connection with an identity of this spoke, over TLS, which is renewed for as long as the client
//! is there.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use lotus_identity::{Credential, Held, LIFE, ToHub, connect};
use lotus_runtime::Fault;
use lotus_types::Kind;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use crate::HubError;
use crate::v1::credentials_client::CredentialsClient;
use crate::v1::{self, JoinRequest, RenewRequest};
use crate::way::{Stream, Way};

/// A credential is renewed when this much of its life is left.
const EARLY: Duration = Duration::from_secs(LIFE.as_secs() / 3 * 2);
/// Waits between tries to renew.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// A connection with an identity.
pub type Secure = ToHub<Stream>;

/// This spoke's identity. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Secured(Arc<Mutex<Held>>);

impl Secured {
    /// The identity in a folder.
    pub(crate) fn open(dir: &Path) -> Result<Self, HubError> {
        let held = Held::open(dir, None).map_err(|e| own(&e))?;
        Ok(Self(Arc::new(Mutex::new(held))))
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the hub is that it is for: `host:port`, `unix:/path`, or `listen:ip:port`.
    pub(crate) fn hub(&self) -> String {
        self.held().hub().to_owned()
    }

    /// The instance that it names.
    pub(crate) fn instance(&self) -> String {
        self.held().caller().instance.to_string()
    }

    /// A connection to the hub for this protocol, with the credential of this moment.
    pub(crate) async fn connect(&self, way: &Way, alpn: &[u8]) -> io::Result<Secure> {
        let stream = way.stream().await?;
        let config = self.held().client_config(&[alpn]);
        connect(Arc::new(config.map_err(io::Error::other)?), stream).await
    }

    /// The calls of `endpoint`.
    pub(crate) fn channel(&self, endpoint: &Endpoint, way: &Way) -> Channel {
        let (this, way) = (self.clone(), way.clone());
        endpoint.connect_with_connector_lazy(tower::service_fn(move |_| {
            let (this, way) = (this.clone(), way.clone());
            async move { this.connect(&way, b"h2").await.map(TokioIo::new) }
        }))
    }

    /// Gets the first credential, or the next one if the one that is held is about to end.
    pub(crate) async fn ready(&self, endpoint: &Endpoint, way: &Way) -> Result<(), HubError> {
        if !self.held().has_joined() {
            let public_key = self.held().public_key();
            let request = JoinRequest { public_key };
            // A connection of its own: this one is with the join bundle's certificate.
            let mut hub = CredentialsClient::new(self.channel(endpoint, way));
            let credential = hub.join(request).await?.into_inner();
            self.accept(credential).await?;
        }
        if self.due() == Duration::ZERO {
            self.renew(self.channel(endpoint, way)).await?;
        }
        Ok(())
    }

    /// Renews the credential again and again, for as long as what is returned is kept. Each try may
    /// take `limit`.
    pub(crate) fn keep(&self, channel: Channel, limit: Duration) -> JoinSet<()> {
        let this = self.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut wait = FIRST_WAIT;
            loop {
                tokio::time::sleep(this.due()).await;
                let renewed = tokio::time::timeout(limit, this.renew(channel.clone())).await;
                match renewed {
                    Ok(Ok(())) => {
                        wait = FIRST_WAIT;
                        continue;
                    }
                    Ok(Err(error)) => {
                        tracing::warn!(%error, fix = error.fix(), "identity not renewed");
                    }
                    Err(_) => tracing::warn!(?limit, "identity not renewed: no answer in time"),
                }
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(LONGEST_WAIT);
            }
        });
        tasks
    }

    async fn renew(&self, channel: Channel) -> Result<(), HubError> {
        let mut hub = CredentialsClient::new(channel);
        let credential = hub.renew(RenewRequest {}).await?.into_inner();
        self.accept(credential).await
    }

    async fn accept(&self, credential: v1::Credential) -> Result<(), HubError> {
        let credential = Credential {
            certificate: credential.certificate,
            expires_unix_ms: credential.expires_unix_ms,
        };
        let this = self.clone();
        // Waits for the disk.
        let kept = tokio::task::spawn_blocking(move || this.held().accept(credential));
        match kept.await {
            Ok(kept) => kept.map_err(|e| own(&e)),
            Err(e) => Err(own(&Fault::new(Kind::Fatal, e.to_string(), "see the log"))),
        }
    }

    /// How long the credential need not be renewed.
    fn due(&self) -> Duration {
        let end = self.held().expires();
        let left = end.and_then(|at| at.duration_since(SystemTime::now()).ok());
        left.unwrap_or_default().saturating_sub(EARLY)
    }
}

fn own(fault: &Fault) -> HubError {
    HubError::Identity {
        message: fault.message.clone(),
        fix: fault.fix.clone(),
    }
}
