use std::io::Write;

use cid::Cid;
use serde::Serialize;

use crate::CarError;

#[derive(Serialize)]
struct Header<'a> {
    roots: &'a [Cid],
    version: u64,
}

/// The header of a CARv1 with these roots, its length prefix included.
#[must_use]
pub fn car_header(roots: &[Cid]) -> Vec<u8> {
    let body = serde_ipld_dagcbor::to_vec(&Header { roots, version: 1 })
        .expect("CIDs and an integer have a dag-cbor form");
    let mut buf = unsigned_varint::encode::usize_buffer();
    let mut out = unsigned_varint::encode::usize(body.len(), &mut buf).to_vec();
    out.extend_from_slice(&body);
    out
}

/// What stands before the bytes of a block in a CAR: the section's length and the CID.
#[must_use]
pub fn section_prefix(cid: &Cid, data_len: usize) -> Vec<u8> {
    let mut buf = unsigned_varint::encode::usize_buffer();
    let mut out = unsigned_varint::encode::usize(cid.encoded_len() + data_len, &mut buf).to_vec();
    out.extend_from_slice(&cid.to_bytes());
    out
}

/// Writes a CARv1.
#[derive(Debug)]
pub struct CarWriter<W> {
    to: W,
    at: u64,
}

impl<W: Write> CarWriter<W> {
    /// Writes the header.
    pub fn new(mut to: W, roots: &[Cid]) -> Result<Self, CarError> {
        let header = car_header(roots);
        to.write_all(&header).map_err(CarError::Write)?;
        Ok(Self {
            to,
            at: header.len() as u64,
        })
    }

    /// Writes one block and returns where its bytes start.
    pub fn write(&mut self, cid: &Cid, data: &[u8]) -> Result<u64, CarError> {
        let prefix = section_prefix(cid, data.len());
        self.to.write_all(&prefix).map_err(CarError::Write)?;
        self.to.write_all(data).map_err(CarError::Write)?;
        let offset = self.at + prefix.len() as u64;
        self.at = offset + data.len() as u64;
        Ok(offset)
    }

    /// Bytes written so far.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.at
    }

    /// Never: there is a header.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Flushes, and returns what was written to.
    pub fn finish(mut self) -> Result<W, CarError> {
        self.to.flush().map_err(CarError::Write)?;
        Ok(self.to)
    }
}
