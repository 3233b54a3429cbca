//! Hosts the public services of a storage provider.
fn main() {}
