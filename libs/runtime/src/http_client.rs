//! The HTTP client of the workspace.

use std::sync::Once;
use std::time::Duration;

static PROVIDER: Once = Once::new();

/// Makes ring the TLS provider of this process. Every use of reqwest or rustls needs it once;
/// later calls do nothing.
pub fn install_tls_provider() {
    PROVIDER.call_once(|| {
        // An error means that one is installed already, which is what we want.
        drop(rustls::crypto::ring::default_provider().install_default());
    });
}

/// A client builder with the product's name and a connect deadline. Calls need a deadline of
/// their own where the whole answer is awaited.
pub fn http_client() -> reqwest::ClientBuilder {
    install_tls_provider();
    reqwest::Client::builder()
        .user_agent(concat!("lotus-hub/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(10))
}
