//! The hub: sealing, proving, mining.
fn main() {}
