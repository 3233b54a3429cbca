//! CAR v1 and v2 streams, UnixFS packing, and DAG walks.
//!
//! [`CarReader`] yields verified blocks with the exact position of their bytes, so that an index
//! of a piece addresses blocks inside it. [`Walk`] goes through a DAG depth first over any block
//! source; gateway, export and comparison are built on it. [`pack_dir`] makes a CAR of a folder.

mod error;
mod export;
mod hamt;
mod link;
mod links;
mod memory;
mod pack;
mod read;
mod store;
mod unixfs;
mod verify;
mod walk;
mod write;

pub use error::{BadCid, CarError};
pub use export::{ExportError, Exported, cat, export};
pub use link::{Inline, Link};
pub use links::{BadNode, links};
pub use memory::WalkMemory;
pub use pack::{PackError, pack_dir};
pub use read::{Block, CarReader};
pub use store::CarStore;
pub use verify::{BadBlock, verify};
pub use walk::{ByteRange, Scope, Selector, Walk, WalkError, walk};
pub use write::{CarWriter, car_header, section_prefix};

/// Largest CARv1 header that is read: 1 MiB, room for more than 20,000 roots.
pub const MAX_HEADER: u64 = 1 << 20;
/// Largest block that is read: 8 MiB. Source: go-car v2, `DefaultMaxAllowedSectionSize`.
pub const MAX_BLOCK: u64 = 8 << 20;
/// Largest identity digest: 128 bytes. Source: go-verifcid, `DefaultMaxIdentityDigestSize`.
pub const MAX_INLINE: usize = 128;
/// Shortest digest of a hash that is taken for a proof of its content: 20 bytes.
/// Source: go-verifcid, `DefaultMinDigestSize`.
pub const MIN_DIGEST: usize = 20;

/// Multicodec `raw`.
pub const RAW: u64 = 0x55;
/// Multicodec `dag-pb`.
pub const DAG_PB: u64 = 0x70;
/// Multicodec `dag-cbor`.
pub const DAG_CBOR: u64 = 0x71;
/// Multicodec `dag-json`.
pub const DAG_JSON: u64 = 0x0129;
