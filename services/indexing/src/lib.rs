//! Multihash index of the pieces, IPNI advertisement chain, lookups.
