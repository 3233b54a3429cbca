//! An embedded Filecoin chain behind Lotus JSON-RPC that verifies every proof.
fn main() {}
