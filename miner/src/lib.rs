//! The hub: sealing, proving, mining.
