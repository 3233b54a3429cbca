use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use cid::Cid;
use lotus_types::Kind;

use crate::hamt;
use crate::unixfs::{Node, kind};
use crate::{BadBlock, BadNode, DAG_PB, Link, RAW, verify};

/// Nodes that wait while a file or folder is read; see the same limit of a walk.
const MAX_PENDING: usize = 1 << 20;
/// Nodes in a row that give nothing to write: a DAG of duplicates can be 2^n nodes wide.
const MAX_SILENT: usize = 1 << 16;

/// What an export wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Exported {
    /// Files, symbolic links included.
    pub files: u64,
    /// Bytes of all files.
    pub bytes: u64,
}

/// Why an export stops.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// A block is missing.
    #[error("block {0} is missing")]
    Missing(Cid),
    /// The source of the blocks failed.
    #[error("reading a block: {0}")]
    Read(io::Error),
    /// A block is corrupt.
    #[error("a block is corrupt: {0}")]
    Corrupt(#[from] BadBlock),
    /// A block cannot be decoded.
    #[error("the DAG cannot be read: {0}")]
    Node(#[from] BadNode),
    /// A node that is no UnixFS file or folder.
    #[error("{0} is no UnixFS file or folder")]
    NotUnixFs(String),
    /// A name that no file may have.
    #[error("a folder holds the name {0:?}, which no file may have")]
    Name(String),
    /// Too many nodes at once, or too many that are empty.
    #[error(
        "the DAG is too wide: more than {MAX_PENDING} links wait to be followed, or more than \
         {MAX_SILENT} nodes on the way are empty"
    )]
    TooWide,
    /// A file could not be written.
    #[error("writing {path}: {source}")]
    Write {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl ExportError {
    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Read(_) | Self::Write { .. } => Kind::Fatal,
            _ => Kind::Data,
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Missing(_) | Self::Corrupt(_) => {
                "fetch the DAG again, from another provider if it stays so"
            }
            Self::Read(_) => "check the disk",
            Self::NotUnixFs(_) => "keep the CAR: only UnixFS can be written as files",
            Self::Node(_) | Self::Name(_) | Self::TooWide => {
                "keep the CAR: its content cannot be written as files"
            }
            Self::Write { .. } => "choose a path that does not exist yet, on a disk with space",
        }
        .into()
    }
}

/// Writes a UnixFS file or folder to `to`, which must not exist. Nothing outside of `to` is
/// written, whatever the names in the DAG.
pub fn export(
    root: &Cid,
    get: &mut dyn FnMut(&Cid) -> io::Result<Option<Bytes>>,
    to: &Path,
) -> Result<Exported, ExportError> {
    let mut done = Exported::default();
    let mut todo = vec![(Link::from(root), to.to_path_buf())];
    while let Some((link, path)) = todo.pop() {
        let fail = |source| ExportError::Write {
            path: path.clone(),
            source,
        };
        let data = load(&link, get)?;
        let node = match link.codec() {
            DAG_PB => Some(Node::decode(&data)?),
            RAW => None,
            _ => return Err(ExportError::NotUnixFs(name(&link))),
        };
        match node.as_ref().and_then(Node::kind) {
            Some(kind::DIRECTORY | kind::HAMT_SHARD) => {
                // Fails when the path exists, so that no name can lead through a link.
                fs::create_dir(&path).map_err(fail)?;
                for (name, link) in entries(link, get)? {
                    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0'])
                    {
                        return Err(ExportError::Name(name));
                    }
                    todo.push((link, path.join(name)));
                }
            }
            Some(kind::SYMLINK) => {
                let target = node.and_then(|n| n.unixfs?.data).unwrap_or_default();
                let target = String::from_utf8_lossy(&target).into_owned();
                std::os::unix::fs::symlink(target, &path).map_err(fail)?;
                done.files += 1;
            }
            _ => {
                let file = File::create_new(&path).map_err(fail)?;
                let mut out = BufWriter::new(file);
                done.bytes += read_file(link, get, &mut out, &path)?;
                out.flush().map_err(fail)?;
                done.files += 1;
            }
        }
    }
    Ok(done)
}

/// Writes the bytes of a UnixFS file to `out`; returns how many.
pub fn cat(
    root: &Cid,
    get: &mut dyn FnMut(&Cid) -> io::Result<Option<Bytes>>,
    out: &mut dyn Write,
) -> Result<u64, ExportError> {
    read_file(root.into(), get, out, Path::new("the output"))
}

fn load(
    link: &Link,
    get: &mut dyn FnMut(&Cid) -> io::Result<Option<Bytes>>,
) -> Result<Bytes, ExportError> {
    match link {
        Link::Inline(inline) => Ok(inline.data.clone()),
        Link::Block(cid) => {
            let data = get(cid)
                .map_err(ExportError::Read)?
                .ok_or(ExportError::Missing(*cid))?;
            verify(cid, &data)?;
            Ok(data)
        }
    }
}

fn name(link: &Link) -> String {
    match link {
        Link::Block(cid) => cid.to_string(),
        Link::Inline(_) => "an identity CID".into(),
    }
}

/// The entries of a folder, sharded or not.
fn entries(
    folder: Link,
    get: &mut dyn FnMut(&Cid) -> io::Result<Option<Bytes>>,
) -> Result<Vec<(String, Link)>, ExportError> {
    let mut found = Vec::new();
    let mut todo = vec![folder];
    let (mut silent, mut before) = (0, 0);
    while let Some(link) = todo.pop() {
        let node = Node::decode(&load(&link, get)?)?;
        let shard = node.kind() == Some(kind::HAMT_SHARD);
        let digits = node
            .unixfs
            .as_ref()
            .and_then(hamt::fanout)
            .map(hamt::prefix_len);
        for l in node.links {
            match digits {
                _ if !shard => found.push((l.name, l.link)),
                Some(d) if l.name.len() == d => todo.push(l.link),
                Some(d) => {
                    let name = l.name.get(d..).map(str::to_owned);
                    found.push((name.ok_or(ExportError::Name(l.name))?, l.link));
                }
                None => return Err(ExportError::NotUnixFs(name(&link))),
            }
        }
        silent = if found.len() > before { 0 } else { silent + 1 };
        before = found.len();
        if found.len() + todo.len() > MAX_PENDING || silent > MAX_SILENT {
            return Err(ExportError::TooWide);
        }
    }
    Ok(found)
}

fn read_file(
    root: Link,
    get: &mut dyn FnMut(&Cid) -> io::Result<Option<Bytes>>,
    out: &mut dyn Write,
    path: &Path,
) -> Result<u64, ExportError> {
    let mut bytes = 0;
    let mut silent = 0;
    let mut todo = vec![root];
    while let Some(link) = todo.pop() {
        let data = load(&link, get)?;
        let own = match link.codec() {
            RAW => data,
            DAG_PB => {
                let node = Node::decode(&data)?;
                if !matches!(node.kind(), Some(kind::FILE | kind::RAW)) {
                    return Err(ExportError::NotUnixFs(name(&link)));
                }
                todo.extend(node.links.into_iter().rev().map(|l| l.link));
                node.unixfs.and_then(|d| d.data).unwrap_or_default()
            }
            _ => return Err(ExportError::NotUnixFs(name(&link))),
        };
        silent = if own.is_empty() { silent + 1 } else { 0 };
        if todo.len() > MAX_PENDING || silent > MAX_SILENT {
            return Err(ExportError::TooWide);
        }
        out.write_all(&own).map_err(|source| ExportError::Write {
            path: path.into(),
            source,
        })?;
        bytes += own.len() as u64;
    }
    Ok(bytes)
}
