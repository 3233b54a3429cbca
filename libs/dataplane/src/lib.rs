//! Bytes between hub and spokes: descriptors over a Unix socket, HTTP ranges otherwise.
