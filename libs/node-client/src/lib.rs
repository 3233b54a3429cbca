//! Full-node JSON-RPC client behind `trait FullNode`, and the JSON forms of its types.
