//! Trustless gateway and piece retrieval.
