//! Lifecycle and restart order on one host.
