//! What every process of the product shares: the service trait, readiness, the admin endpoint,
//! telemetry, signals and back-off.

pub mod addr_file;
pub mod admin;
mod backoff;
mod clients;
mod drain;
mod fault;
mod health;
mod http_client;
mod listen;
mod needs;
pub mod notify;
pub mod peer;
mod rate;
pub mod serve;
mod service;
pub mod signals;
pub mod splice;
mod streams;
pub mod telemetry;
mod tls;
pub mod trace;

pub use backoff::Backoff;
pub use clients::{Network, PerClient, Share, client};
pub use fault::Fault;
pub use health::{Component, Health};
pub use http_client::{http_client, install_tls_provider};
pub use listen::{handed, listen};
pub use needs::{Needs, Socket};
pub use rate::Rates;
pub use service::{Cx, Ready, Service};
pub use tls::Tls;
pub use tokio_util::sync::CancellationToken;
