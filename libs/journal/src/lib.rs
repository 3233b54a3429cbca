//! Durable state with pending effects, on an embedded transactional store.
