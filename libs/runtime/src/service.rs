use std::fmt::Display;
use std::future::Future;

use tokio_util::sync::CancellationToken;

use crate::{Fault, Health};

/// A part of a process that starts, serves, drains and ends.
///
/// Ready means "bound and useful", not "spawned". Stop means "finish, then return".
pub trait Service: Send + 'static {
    /// Name in `--services`, in configuration, logs and metrics.
    const NAME: &'static str;

    /// Runs until stopped. An error ends the service, not its host.
    fn run(self, cx: Cx) -> impl Future<Output = Result<(), Fault>> + Send;
}

/// What a host gives to a service.
#[derive(Debug)]
pub struct Cx {
    /// To be released when the service is useful.
    pub ready: Ready,
    /// Cancelled when the service must finish what it does and return.
    pub stop: CancellationToken,
    /// For components below the service, named `<service>.<part>`.
    pub health: Health,
}

impl Cx {
    /// The context of a service called `name`.
    #[must_use]
    pub fn new(name: &str, health: Health, stop: CancellationToken) -> Self {
        Self {
            ready: Ready::new(name, health.clone()),
            stop,
            health,
        }
    }
}

/// The duty to say when a service is ready. Dropped unreleased it records a failed start.
#[derive(Debug)]
pub struct Ready {
    name: String,
    health: Health,
    released: bool,
}

impl Ready {
    fn new(name: &str, health: Health) -> Self {
        health.set(name, Err("starting".into()));
        Self {
            name: name.into(),
            health,
            released: false,
        }
    }

    /// The service is useful; `detail` says where, such as the address it listens on.
    pub fn release(mut self, detail: impl Display) {
        self.released = true;
        self.health.set(&self.name, Ok(detail.to_string()));
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        if !self.released {
            self.health
                .set(&self.name, Err("did not become ready".into()));
        }
    }
}
