//! The one-command tools: demo, test, ci, gen.
fn main() {}
