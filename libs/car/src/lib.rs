//! CAR v1 and v2 streams, UnixFS packing, and DAG walks.
