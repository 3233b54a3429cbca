use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytes::Bytes;
use cid::Cid;
use multihash::Multihash;

use crate::{CarError, CarReader};

/// A CAR file with random access to its blocks: for comparing, exporting and tests. The index is
/// in memory, about 100 bytes for each block.
#[derive(Debug)]
pub struct CarStore {
    file: File,
    roots: Vec<Cid>,
    blocks: HashMap<Multihash<64>, (u64, u32)>,
    order: Vec<Cid>,
}

impl CarStore {
    /// Reads the whole file once and checks every block.
    pub fn open(path: &Path) -> Result<Self, CarError> {
        let read = |source| CarError::Read { offset: 0, source };
        let file = File::open(path).map_err(read)?;
        let reader = CarReader::new(file.try_clone().map_err(read)?)?;
        let roots = reader.roots().to_vec();
        let mut blocks = HashMap::new();
        let mut order = Vec::new();
        for block in reader {
            let block = block?;
            let len = u32::try_from(block.data.len()).expect("a block has at most 8 MiB");
            blocks
                .entry(*block.cid.hash())
                .or_insert((block.offset, len));
            order.push(block.cid);
        }
        Ok(Self {
            file,
            roots,
            blocks,
            order,
        })
    }

    /// The roots that the header names.
    #[must_use]
    pub fn roots(&self) -> &[Cid] {
        &self.roots
    }

    /// The CIDs of the blocks, in file order, repeats included.
    #[must_use]
    pub fn cids(&self) -> &[Cid] {
        &self.order
    }

    /// The bytes of a block.
    pub fn get(&self, cid: &Cid) -> io::Result<Option<Bytes>> {
        let Some(&(offset, len)) = self.blocks.get(cid.hash()) else {
            return Ok(None);
        };
        let mut data = vec![0; len as usize];
        self.file.read_exact_at(&mut data, offset)?;
        Ok(Some(data.into()))
    }
}
