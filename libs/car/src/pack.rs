use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cid::Cid;
use lotus_types::Kind;
use multihash_codetable::{Code, MultihashDigest};

use crate::hamt::{self, Collision};
use crate::unixfs::{Data, NewLink, encode, kind};
use crate::{CarError, CarWriter, DAG_PB, RAW, car_header};

/// Bytes of a file in one block. This and the numbers below are the profile `unixfs-v1-2025`.
/// Source: ipfs/specs, IPIP-499.
const CHUNK: usize = 1 << 20;
/// Links of a file node.
const FILE_LINKS: usize = 1024;
/// Folders whose names and CIDs take more bytes than this are sharded.
const SHARD_ABOVE: usize = 256 << 10;
/// Folders within folders.
const MAX_DEPTH: usize = 256;

/// Why a folder could not be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// A file or folder could not be read.
    #[error("reading {path}: {source}")]
    Read {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The CAR could not be written.
    #[error("writing {path}: {source}")]
    Write {
        /// Its path.
        path: PathBuf,
        /// The error.
        source: Box<CarError>,
    },
    /// Something else than a file, a folder or a symbolic link.
    #[error("{0} is neither a file nor a folder nor a symbolic link")]
    Special(PathBuf),
    /// A name that is no UTF-8.
    #[error("the name of {0:?} is not UTF-8")]
    Name(PathBuf),
    /// Folders nested too deep.
    #[error("{0} is nested deeper than {MAX_DEPTH} folders")]
    Deep(PathBuf),
    /// Names made to collide.
    #[error("two names in one folder cannot be told apart by their hashes")]
    Collision,
}

impl From<Collision> for PackError {
    fn from(_: Collision) -> Self {
        Self::Collision
    }
}

impl PackError {
    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Write { source, .. } => source.kind(),
            _ => Kind::Data,
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Read { .. } => "check the path and its permissions".into(),
            Self::Write { source, .. } => source.fix(),
            Self::Special(_) | Self::Deep(_) => "leave it out of the folder".into(),
            Self::Name(_) | Self::Collision => "rename it".into(),
        }
    }
}

/// Packs a folder, or one file, as UnixFS into a CARv1 at `out`, and returns its root.
///
/// The same content gives the same bytes: entries are sorted, times and permissions are left
/// out, each block is written once. `out` appears when it is complete; it may lie in `dir`, and
/// is not packed then.
pub fn pack_dir(dir: &Path, out: &Path) -> Result<Cid, PackError> {
    let folder = match out.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let failed = |source: io::Error| PackError::Write {
        path: out.into(),
        source: Box::new(CarError::Write(source)),
    };
    let car = |source: CarError| PackError::Write {
        path: out.into(),
        source: source.into(),
    };
    let tmp = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
    let own = tmp.as_file().metadata().map_err(failed)?;
    let mut skip = vec![(own.dev(), own.ino())];
    if let Ok(old) = fs::metadata(out) {
        skip.push((old.dev(), old.ino()));
    }
    // The header names the root, which is known last; all our CIDs have one length.
    let unknown = sha256(RAW, b"");
    let file = tmp.as_file().try_clone().map_err(failed)?;
    let writer =
        CarWriter::new(BufWriter::with_capacity(1 << 20, file), &[unknown]).map_err(car)?;
    let mut pack = Pack {
        out,
        writer,
        written: HashSet::new(),
        skip,
    };
    let root = pack
        .node(dir, 0)?
        .ok_or_else(|| PackError::Special(dir.into()))?;
    pack.writer.finish().map_err(car)?;
    let mut file = tmp.as_file();
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    file.write_all(&car_header(&[root.cid])).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    // A temporary file is private; what the user asked for has the usual permissions.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    file.set_permissions(mode).map_err(failed)?;
    tmp.persist(out).map_err(|e| failed(e.error))?;
    Ok(root.cid)
}

fn sha256(codec: u64, data: &[u8]) -> Cid {
    Cid::new_v1(codec, Code::Sha2_256.digest(data))
}

struct Pack<'a, W: Write> {
    out: &'a Path,
    writer: CarWriter<W>,
    written: HashSet<Cid>,
    /// Device and inode of the CAR itself.
    skip: Vec<(u64, u64)>,
}

impl<W: Write> Pack<'_, W> {
    /// Writes a block unless it is there already.
    fn block(&mut self, codec: u64, data: &[u8]) -> Result<Cid, PackError> {
        let cid = sha256(codec, data);
        if self.written.insert(cid) {
            self.writer
                .write(&cid, data)
                .map_err(|source| PackError::Write {
                    path: self.out.into(),
                    source: source.into(),
                })?;
        }
        Ok(cid)
    }

    fn pb(&mut self, links: &[NewLink], data: &Data) -> Result<NewLink, PackError> {
        let bytes = encode(links, data);
        let below: u64 = links.iter().map(|l| l.size).sum();
        Ok(NewLink {
            name: String::new(),
            cid: self.block(DAG_PB, &bytes)?,
            size: below + bytes.len() as u64,
        })
    }

    /// `None` for the CAR that is being written.
    fn node(&mut self, path: &Path, depth: usize) -> Result<Option<NewLink>, PackError> {
        let read = |source| PackError::Read {
            path: path.into(),
            source,
        };
        // A root that is a symbolic link is followed, as `ls DIR/` would.
        let meta: Metadata = if depth == 0 {
            fs::metadata(path).map_err(read)?
        } else {
            fs::symlink_metadata(path).map_err(read)?
        };
        if self.skip.contains(&(meta.dev(), meta.ino())) {
            return Ok(None);
        }
        if depth > MAX_DEPTH {
            return Err(PackError::Deep(path.into()));
        }
        let kind = meta.file_type();
        if kind.is_dir() {
            self.folder(path, depth).map(Some)
        } else if kind.is_file() {
            self.file(path).map(Some)
        } else if kind.is_symlink() {
            let target = fs::read_link(path).map_err(read)?;
            let data = Data {
                kind: kind::SYMLINK,
                data: Some(target.as_os_str().as_bytes().to_vec().into()),
                ..Data::default()
            };
            self.pb(&[], &data).map(Some)
        } else {
            Err(PackError::Special(path.into()))
        }
    }

    fn folder(&mut self, path: &Path, depth: usize) -> Result<NewLink, PackError> {
        let read = |source| PackError::Read {
            path: path.into(),
            source,
        };
        let mut names = fs::read_dir(path)
            .map_err(read)?
            .map(|e| e.map(|e| e.file_name()))
            .collect::<io::Result<Vec<OsString>>>()
            .map_err(read)?;
        names.sort();
        let mut links = Vec::with_capacity(names.len());
        for name in names {
            let child = path.join(&name);
            let name = name
                .into_string()
                .map_err(|_| PackError::Name(child.clone()))?;
            if let Some(link) = self.node(&child, depth + 1)? {
                links.push(NewLink { name, ..link });
            }
        }
        let size: usize = links
            .iter()
            .map(|l| l.name.len() + l.cid.encoded_len())
            .sum();
        if size > SHARD_ABOVE {
            return hamt::build(links, &mut |links, data| self.pb(&links, &data));
        }
        let data = Data {
            kind: kind::DIRECTORY,
            ..Data::default()
        };
        self.pb(&links, &data)
    }

    fn file(&mut self, path: &Path) -> Result<NewLink, PackError> {
        let read = |source| PackError::Read {
            path: path.into(),
            source,
        };
        let mut from = BufReader::new(File::open(path).map_err(read)?);
        let mut chunk = Vec::with_capacity(CHUNK);
        // Finished nodes of each level that wait for a parent: a link and its bytes of the file.
        let mut levels: Vec<Vec<(NewLink, u64)>> = Vec::new();
        let mut first = true;
        loop {
            chunk.clear();
            let n = (&mut from)
                .take(CHUNK as u64)
                .read_to_end(&mut chunk)
                .map_err(read)?;
            if n == 0 && !first {
                break;
            }
            first = false;
            let leaf = NewLink {
                name: String::new(),
                cid: self.block(RAW, &chunk)?,
                size: n as u64,
            };
            self.add(&mut levels, 0, (leaf, n as u64))?;
            if n < CHUNK {
                break;
            }
        }
        // Close the levels from below; a level with one node needs no parent.
        let mut level = 0;
        loop {
            let nodes = std::mem::take(&mut levels[level]);
            let last = level + 1 == levels.len();
            if last && nodes.len() == 1 {
                break Ok(nodes.into_iter().next().map(|(l, _)| l).expect("one node"));
            }
            if !nodes.is_empty() {
                let parent = self.parent(nodes)?;
                self.add(&mut levels, level + 1, parent)?;
            }
            level += 1;
        }
    }

    /// Adds a node to a level, and closes the level when it is full.
    fn add(
        &mut self,
        levels: &mut Vec<Vec<(NewLink, u64)>>,
        level: usize,
        node: (NewLink, u64),
    ) -> Result<(), PackError> {
        let mut node = node;
        for level in level.. {
            if levels.len() == level {
                levels.push(Vec::new());
            }
            if levels[level].len() < FILE_LINKS {
                levels[level].push(node);
                return Ok(());
            }
            let full = std::mem::replace(&mut levels[level], vec![node]);
            node = self.parent(full)?;
        }
        Ok(())
    }

    fn parent(&mut self, nodes: Vec<(NewLink, u64)>) -> Result<(NewLink, u64), PackError> {
        let blocksizes: Vec<u64> = nodes.iter().map(|(_, n)| *n).collect();
        let size = blocksizes.iter().sum();
        let data = Data {
            kind: kind::FILE,
            filesize: Some(size),
            blocksizes,
            ..Data::default()
        };
        let links: Vec<NewLink> = nodes.into_iter().map(|(l, _)| l).collect();
        Ok((self.pb(&links, &data)?, size))
    }
}
