use std::io::{self, BufReader, Read};

use bytes::Bytes;
use cid::Cid;
use serde::Deserialize;

use crate::{BadCid, CarError, Inline, Link, MAX_BLOCK, MAX_HEADER, MAX_INLINE, verify};

/// CARv2 pragma: the 10-byte dag-cbor header `{version: 2}` with its length.
/// Source: ipld.io/specs/transport/car/carv2, "Pragma".
pub(crate) const V2_PRAGMA_LEN: u64 = 11;
/// CARv2 header: 16 bytes of characteristics, then three little-endian u64.
const V2_HEADER_LEN: u64 = 40;
/// Longest CID of a section: version and codec, hash code and length, each a varint, and a digest.
const MAX_CID: u64 = 4 * 9 + MAX_INLINE as u64;

/// A verified block of a CAR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Its CID.
    pub cid: Cid,
    /// Its bytes, which hash to the CID.
    pub data: Bytes,
    /// Where its bytes start in the stream: bytes from the start, the headers included.
    pub offset: u64,
    /// Where its section starts in the stream.
    pub section: u64,
}

/// Reads a CARv1 or CARv2 and checks each block against its CID.
///
/// The iterator ends after the last block, or with the first error. Sections with identity CIDs
/// are checked and skipped, because the CID holds their content already. Zeros after the last
/// section, as in a padded piece, are its end.
#[derive(Debug)]
pub struct CarReader<R> {
    from: Source<R>,
    version: u64,
    roots: Vec<Cid>,
    /// Start of the index of a CARv2; 0 when there is none.
    index: u64,
    done: bool,
}

#[derive(Deserialize)]
struct Header {
    version: u64,
    roots: Option<Vec<Cid>>,
}

impl<R: Read> CarReader<R> {
    /// Reads the headers.
    pub fn new(from: R) -> Result<Self, CarError> {
        let mut from = Source {
            from: BufReader::with_capacity(1 << 18, from),
            at: 0,
            end: u64::MAX,
        };
        let first = from.header()?;
        let mut index = 0;
        let mut version = 1;
        let v1 = if first.version == 2 {
            version = 2;
            index = from.v2_header()?;
            from.header()?
        } else {
            first
        };
        let Header {
            version: 1,
            roots: Some(roots),
        } = v1
        else {
            return Err(CarError::Header {
                offset: from.at,
                why: format!("version {} without roots is unknown here", v1.version),
            });
        };
        Ok(Self {
            from,
            version,
            roots,
            index,
            done: false,
        })
    }

    /// 1 or 2.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The roots that the header names.
    #[must_use]
    pub fn roots(&self) -> &[Cid] {
        &self.roots
    }

    fn read_block(&mut self) -> Result<Option<Block>, CarError> {
        loop {
            let section = self.from.at;
            let Some(len) = self.from.varint()? else {
                self.finish()?;
                return Ok(None);
            };
            if len == 0 {
                self.from.only_zeros()?;
                self.finish()?;
                return Ok(None);
            }
            let max = MAX_BLOCK + MAX_CID;
            if len > max {
                return Err(CarError::TooLarge {
                    offset: section,
                    len,
                    max: MAX_BLOCK,
                });
            }
            let start = self.from.at;
            let bytes = Bytes::from(self.from.exact(len, "block section", section)?);
            let bad = |why: BadCid| CarError::Cid {
                offset: section,
                why,
            };
            let (link, cid_len) = Link::read(&bytes).map_err(bad)?;
            let data = bytes.slice(cid_len..);
            let offset = start + cid_len as u64;
            match link {
                Link::Block(cid) => {
                    if data.len() as u64 > MAX_BLOCK {
                        return Err(CarError::TooLarge {
                            offset: section,
                            len,
                            max: MAX_BLOCK,
                        });
                    }
                    verify(&cid, &data).map_err(|why| CarError::Block { offset, why })?;
                    return Ok(Some(Block {
                        cid,
                        data,
                        offset,
                        section,
                    }));
                }
                Link::Inline(Inline { data: inline, .. }) if inline == data => {}
                Link::Inline(_) => {
                    return Err(bad(BadCid::Encoding(
                        "an identity CID that differs from its block".into(),
                    )));
                }
            }
        }
    }

    /// The payload is over; a CARv2 must still reach to its index.
    fn finish(&mut self) -> Result<(), CarError> {
        if self.version == 2 {
            if self.from.end != u64::MAX && self.from.at < self.from.end {
                return Err(self.from.truncated("CARv2 payload", V2_PRAGMA_LEN));
            }
            self.from.end = u64::MAX;
            if self.index > 0 {
                self.from.skip_to(self.index, "CARv2 index")?;
                self.from.exact(1, "CARv2 index", self.index)?;
            }
        }
        Ok(())
    }
}

impl<R: Read> Iterator for CarReader<R> {
    type Item = Result<Block, CarError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.read_block().transpose();
        self.done = !matches!(next, Some(Ok(_)));
        next
    }
}

/// A reader that knows where it is and where the payload ends.
#[derive(Debug)]
struct Source<R> {
    from: BufReader<R>,
    at: u64,
    end: u64,
}

impl<R: Read> Source<R> {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize, CarError> {
        let room = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let take = buf.len().min(room);
        loop {
            match self.from.read(&mut buf[..take]) {
                Ok(n) => {
                    self.at += n as u64;
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(CarError::Read {
                        offset: self.at,
                        source,
                    });
                }
            }
        }
    }

    fn truncated(&self, what: &'static str, offset: u64) -> CarError {
        CarError::Truncated {
            what,
            offset,
            end: self.at,
        }
    }

    /// Exactly `len` bytes; the caller bounds `len`.
    fn exact(&mut self, len: u64, what: &'static str, offset: u64) -> Result<Vec<u8>, CarError> {
        let len = usize::try_from(len).map_err(|_| self.truncated(what, offset))?;
        let mut buf = vec![0; len];
        let mut have = 0;
        while have < len {
            match self.read(&mut buf[have..])? {
                0 => return Err(self.truncated(what, offset)),
                n => have += n,
            }
        }
        Ok(buf)
    }

    /// A minimal varint of at most nine bytes; `None` at the end of the payload.
    fn varint(&mut self) -> Result<Option<u64>, CarError> {
        let offset = self.at;
        let mut value = 0u64;
        for i in 0..9 {
            let mut byte = [0u8];
            if self.read(&mut byte)? == 0 {
                if i == 0 {
                    return Ok(None);
                }
                return Err(self.truncated("section length", offset));
            }
            value |= u64::from(byte[0] & 0x7f) << (7 * i);
            if byte[0] & 0x80 == 0 {
                if i > 0 && byte[0] == 0 {
                    return Err(CarError::Varint { offset });
                }
                return Ok(Some(value));
            }
        }
        Err(CarError::Varint { offset })
    }

    fn header(&mut self) -> Result<Header, CarError> {
        let offset = self.at;
        let header = |why: String| CarError::Header { offset, why };
        let len = match self.varint() {
            Ok(Some(len)) => len,
            Ok(None) => return Err(self.truncated("header", offset)),
            Err(CarError::Varint { .. }) => return Err(header("its length is no varint".into())),
            Err(e) => return Err(e),
        };
        if len == 0 || len > MAX_HEADER {
            return Err(header(format!(
                "it claims {len} bytes; a header has between 1 and {MAX_HEADER}"
            )));
        }
        let bytes = self.exact(len, "header", offset)?;
        serde_ipld_dagcbor::from_slice(&bytes)
            .map_err(|e| header(format!("not the dag-cbor map of a header ({e})")))
    }

    /// Reads the fixed header of a CARv2, goes to its payload and limits reading to it. Returns
    /// where the index starts.
    fn v2_header(&mut self) -> Result<u64, CarError> {
        let offset = self.at;
        let bytes = self.exact(V2_HEADER_LEN, "CARv2 header", offset)?;
        let field = |i: usize| {
            let mut le = [0; 8];
            le.copy_from_slice(&bytes[i..i + 8]);
            u64::from_le_bytes(le)
        };
        let (start, size, index) = (field(16), field(24), field(32));
        let header = |why: &str| CarError::Header {
            offset,
            why: why.into(),
        };
        if start == 0 {
            return Err(header("the CARv2 was never finalized"));
        }
        let end = start.checked_add(size);
        let Some(end) = end.filter(|_| start >= V2_PRAGMA_LEN + V2_HEADER_LEN && size > 0) else {
            return Err(header("the CARv2 names an impossible payload"));
        };
        if index != 0 && index < end {
            return Err(header("the CARv2 index overlaps the payload"));
        }
        self.skip_to(start, "CARv2 payload")?;
        self.end = end;
        Ok(index)
    }

    fn skip_to(&mut self, to: u64, what: &'static str) -> Result<(), CarError> {
        let mut buf = [0; 8192];
        while self.at < to {
            let take = usize::try_from(to - self.at).map_or(buf.len(), |n| n.min(buf.len()));
            if self.read(&mut buf[..take])? == 0 {
                return Err(self.truncated(what, to));
            }
        }
        Ok(())
    }

    fn only_zeros(&mut self) -> Result<(), CarError> {
        let mut buf = [0; 8192];
        loop {
            let offset = self.at;
            match self.read(&mut buf)? {
                0 => return Ok(()),
                n => {
                    if let Some(i) = buf[..n].iter().position(|b| *b != 0) {
                        return Err(CarError::Trailing {
                            offset: offset + i as u64,
                        });
                    }
                }
            }
        }
    }
}
