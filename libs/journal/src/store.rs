use std::fmt;
use std::marker::PhantomData;
use std::ops::Bound;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lotus_types::Kind;
use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::JournalKey;

/// What can go wrong with the store.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another process has the file open.
    #[error("the journal {} is in use by another process", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The file at the path is another one than that which was opened: somebody moved it, or put
    /// another in its place. Nothing is written any more: whoever opens the path now does not see it.
    #[error("the journal {} was moved or replaced while it was in use", path.display())]
    Moved {
        /// Where it was opened.
        path: PathBuf,
    },
    /// The disk is full: nothing of the transaction was written.
    #[error("no space left on the disk of the journal")]
    DiskFull,
    /// The file can not be read or written.
    #[error("journal: {0}")]
    Store(Box<redb::Error>),
    /// A record does not have the form that this version expects.
    #[error("record in table {table} does not decode: {why}")]
    Decode {
        /// The table.
        table: &'static str,
        /// The decoder's words.
        why: String,
    },
    /// A record that can not be written.
    #[error("record for table {table} does not encode: {why}")]
    Encode {
        /// The table.
        table: &'static str,
        /// The encoder's words.
        why: String,
    },
}

impl JournalError {
    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Locked { .. } | Self::Moved { .. } => Kind::Config,
            Self::DiskFull => Kind::Capacity,
            Self::Store(_) | Self::Decode { .. } | Self::Encode { .. } => Kind::Fatal,
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Locked { path } => format!(
                "stop the other process (`fuser {}` names it), or give this one its own --repo",
                path.display()
            ),
            Self::Moved { .. } => {
                "start one process on the repo that is to be used, and leave this one stopped"
                    .into()
            }
            Self::DiskFull => "free space on the disk that holds the repo; it is retried".into(),
            Self::Store(_) => {
                "check the disk; restore the repo from a backup if it is damaged".into()
            }
            Self::Decode { .. } | Self::Encode { .. } => {
                "run the release that wrote this repo, or restore a backup".into()
            }
        }
    }
}

impl<E: Into<redb::Error>> From<E> for JournalError {
    fn from(e: E) -> Self {
        match e.into() {
            redb::Error::Io(io) if io.kind() == std::io::ErrorKind::StorageFull => Self::DiskFull,
            other => Self::Store(Box::new(other)),
        }
    }
}

/// A named table with ordered keys. Values are stored as DAG-CBOR.
pub struct Map<K, V> {
    name: &'static str,
    types: PhantomData<fn(K) -> V>,
}

impl<K, V> Map<K, V> {
    /// The table of this name. Two maps of one name must have the same types.
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self {
            name,
            types: PhantomData,
        }
    }
}

impl<K, V> Clone for Map<K, V> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<K, V> Copy for Map<K, V> {}

impl<K, V> fmt::Debug for Map<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

type Bytes = TableDefinition<'static, &'static [u8], &'static [u8]>;
type ReadBytes = redb::ReadOnlyTable<&'static [u8], &'static [u8]>;

/// Keys with their values, in key order.
pub type Entries<K, V> = Vec<(K, V)>;

impl<K: JournalKey, V: Serialize + DeserializeOwned> Map<K, V> {
    const fn table(self) -> Bytes {
        TableDefinition::new(self.name)
    }

    fn key(k: &K) -> Vec<u8> {
        let mut out = Vec::with_capacity(48);
        k.encode(&mut out);
        out
    }

    fn value(self, bytes: &[u8]) -> Result<V, JournalError> {
        serde_ipld_dagcbor::from_slice(bytes).map_err(|e| JournalError::Decode {
            table: self.name,
            why: e.to_string(),
        })
    }

    fn pair(self, k: &[u8], v: &[u8]) -> Result<(K, V), JournalError> {
        match K::decode(k) {
            Some((key, [])) => Ok((key, self.value(v)?)),
            _ => Err(JournalError::Decode {
                table: self.name,
                why: "the key has another form".into(),
            }),
        }
    }

    fn get_in(
        self,
        t: &impl ReadableTable<&'static [u8], &'static [u8]>,
        k: &K,
    ) -> Result<Option<V>, JournalError> {
        match t.get(Self::key(k).as_slice())? {
            Some(v) => self.value(v.value()).map(Some),
            None => Ok(None),
        }
    }

    fn scan_in(
        self,
        t: &impl ReadableTable<&'static [u8], &'static [u8]>,
        after: Option<&K>,
        limit: usize,
    ) -> Result<Entries<K, V>, JournalError> {
        let after = after.map(Self::key);
        let from = match &after {
            Some(k) => Bound::Excluded(k.as_slice()),
            None => Bound::Unbounded,
        };
        t.range::<&[u8]>((from, Bound::Unbounded))?
            .take(limit)
            .map(|item| {
                let (k, v) = item?;
                self.pair(k.value(), v.value())
            })
            .collect()
    }

    fn last_in(
        self,
        t: &impl ReadableTable<&'static [u8], &'static [u8]>,
    ) -> Result<Option<(K, V)>, JournalError> {
        match t.last()? {
            Some((k, v)) => self.pair(k.value(), v.value()).map(Some),
            None => Ok(None),
        }
    }
}

/// Bytes of the file's pages that are kept in memory. A hub writes a few pages at a time; more
/// would only make its memory look like a leak.
const CACHE: usize = 256 << 20;

/// The store: one file, one process at a time. Clones share it.
#[derive(Clone)]
pub struct Journal {
    db: Arc<Database>,
    file: Arc<OpenFile>,
}

/// The file that was opened.
struct OpenFile {
    path: PathBuf,
    /// Device and inode.
    id: (u64, u64),
}

impl OpenFile {
    fn at(path: &Path) -> std::io::Result<Self> {
        let found = std::fs::metadata(path)?;
        Ok(Self {
            path: std::path::absolute(path)?,
            id: (found.dev(), found.ino()),
        })
    }

    fn is_there(&self) -> bool {
        Self::at(&self.path).is_ok_and(|found| found.id == self.id)
    }
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Journal")
    }
}

impl Journal {
    /// Opens the file, or creates it; repairs it after a crash.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        match Database::builder().set_cache_size(CACHE).create(path) {
            Ok(db) => Ok(Self {
                db: Arc::new(db),
                file: Arc::new(OpenFile::at(path).map_err(redb::Error::Io)?),
            }),
            Err(redb::DatabaseError::DatabaseAlreadyOpen) => Err(JournalError::Locked {
                path: path.to_owned(),
            }),
            Err(e) => Err(e.into()),
        }
    }

    /// Runs `f` in one durable transaction: when this returns `Ok` everything is on disk, when it
    /// returns `Err` nothing is. Writers wait for each other. A process whose journal was taken from
    /// it, while it was paused for example, writes nothing more and so does nothing more.
    pub fn write<R, E: From<JournalError>>(
        &self,
        f: impl FnOnce(&mut Tx) -> Result<R, E>,
    ) -> Result<R, E> {
        let tx = self.db.begin_write().map_err(JournalError::from)?;
        let mut tx = Tx { tx };
        let out = f(&mut tx)?;
        self.check()?;
        tx.tx.commit().map_err(JournalError::from)?;
        Ok(out)
    }

    /// Whether the file at the path is the one that is open.
    pub fn check(&self) -> Result<(), JournalError> {
        match self.file.is_there() {
            true => Ok(()),
            false => Err(JournalError::Moved {
                path: self.file.path.clone(),
            }),
        }
    }

    pub(crate) fn begin_read(&self) -> Result<redb::ReadTransaction, JournalError> {
        Ok(self.db.begin_read()?)
    }

    /// Runs `f` over one consistent view; never waits for a writer.
    pub fn read<R, E: From<JournalError>>(
        &self,
        f: impl FnOnce(&View) -> Result<R, E>,
    ) -> Result<R, E> {
        let tx = self.db.begin_read().map_err(JournalError::from)?;
        f(&View { tx })
    }
}

/// A write transaction.
pub struct Tx {
    tx: redb::WriteTransaction,
}

impl fmt::Debug for Tx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tx")
    }
}

impl Tx {
    /// The value at `k`.
    pub fn get<K: JournalKey, V: Serialize + DeserializeOwned>(
        &self,
        map: &Map<K, V>,
        k: &K,
    ) -> Result<Option<V>, JournalError> {
        map.get_in(&self.tx.open_table(map.table())?, k)
    }

    /// Sets the value at `k`.
    pub fn put<K: JournalKey, V: Serialize + DeserializeOwned>(
        &mut self,
        map: &Map<K, V>,
        k: &K,
        v: &V,
    ) -> Result<(), JournalError> {
        let bytes = serde_ipld_dagcbor::to_vec(v).map_err(|e| JournalError::Encode {
            table: map.name,
            why: e.to_string(),
        })?;
        self.tx
            .open_table(map.table())?
            .insert(Map::<K, V>::key(k).as_slice(), bytes.as_slice())?;
        Ok(())
    }

    /// Removes and returns the value at `k`.
    pub fn remove<K: JournalKey, V: Serialize + DeserializeOwned>(
        &mut self,
        map: &Map<K, V>,
        k: &K,
    ) -> Result<Option<V>, JournalError> {
        let mut table = self.tx.open_table(map.table())?;
        let old = table.remove(Map::<K, V>::key(k).as_slice())?;
        old.map(|v| map.value(v.value())).transpose()
    }

    /// Up to `limit` entries with keys above `after`, in key order.
    pub fn scan<K: JournalKey, V: Serialize + DeserializeOwned>(
        &self,
        map: &Map<K, V>,
        after: Option<&K>,
        limit: usize,
    ) -> Result<Entries<K, V>, JournalError> {
        map.scan_in(&self.tx.open_table(map.table())?, after, limit)
    }

    /// The entry with the largest key.
    pub fn last<K: JournalKey, V: Serialize + DeserializeOwned>(
        &self,
        map: &Map<K, V>,
    ) -> Result<Option<(K, V)>, JournalError> {
        map.last_in(&self.tx.open_table(map.table())?)
    }

    /// Number of entries.
    pub fn len<K: JournalKey, V: Serialize + DeserializeOwned>(
        &self,
        map: &Map<K, V>,
    ) -> Result<u64, JournalError> {
        Ok(self.tx.open_table(map.table())?.len()?)
    }
}

/// A read transaction.
pub struct View {
    pub(crate) tx: redb::ReadTransaction,
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("View")
    }
}

impl View {
    /// `None` when nothing was ever written to the map.
    fn table<K: JournalKey, V: Serialize + DeserializeOwned>(
        &self,
        map: &Map<K, V>,
    ) -> Result<Option<ReadBytes>, JournalError> {
        match self.tx.open_table(map.table()) {
            Ok(t) => Ok(Some(t)),
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// The value at `k`.
    pub fn get<K: JournalKey, V: Serialize + DeserializeOwned>(
        &self,
        map: &Map<K, V>,
        k: &K,
    ) -> Result<Option<V>, JournalError> {
        self.table(map)?.map_or(Ok(None), |t| map.get_in(&t, k))
    }

    /// Up to `limit` entries with keys above `after`, in key order.
    pub fn scan<K: JournalKey, V: Serialize + DeserializeOwned>(
        &self,
        map: &Map<K, V>,
        after: Option<&K>,
        limit: usize,
    ) -> Result<Entries<K, V>, JournalError> {
        self.table(map)?
            .map_or(Ok(Vec::new()), |t| map.scan_in(&t, after, limit))
    }

    /// Calls `f` with every entry, in key order, and keeps none: there may be millions.
    pub fn each<K: JournalKey, V: Serialize + DeserializeOwned, E: From<JournalError>>(
        &self,
        map: &Map<K, V>,
        mut f: impl FnMut(K, V) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(table) = self.table(map)? else {
            return Ok(());
        };
        for item in table.iter().map_err(JournalError::from)? {
            let (k, v) = item.map_err(JournalError::from)?;
            let (k, v) = map.pair(k.value(), v.value())?;
            f(k, v)?;
        }
        Ok(())
    }

    /// The entry with the largest key.
    pub fn last<K: JournalKey, V: Serialize + DeserializeOwned>(
        &self,
        map: &Map<K, V>,
    ) -> Result<Option<(K, V)>, JournalError> {
        self.table(map)?.map_or(Ok(None), |t| map.last_in(&t))
    }

    /// Number of entries.
    pub fn len<K: JournalKey, V: Serialize + DeserializeOwned>(
        &self,
        map: &Map<K, V>,
    ) -> Result<u64, JournalError> {
        self.table(map)?.map_or(Ok(0), |t| Ok(t.len()?))
    }
}
