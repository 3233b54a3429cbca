//! Which piece holds a multihash, and where.
