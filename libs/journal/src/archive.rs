use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use redb::{
    Database, ReadOnlyDatabase, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition,
    TableHandle,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::store::View;
use crate::{Journal, JournalError};

/// What a set of tables holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// Tables with entries.
    pub tables: u64,
    /// Entries in all of them.
    pub entries: u64,
    /// Bytes of their keys and values.
    pub bytes: u64,
    /// SHA-256 over the tables by name and their entries by key, in hexadecimal.
    pub sha256: String,
}

/// The copy of a journal, opened for reading alone.
pub struct Archive {
    db: ReadOnlyDatabase,
}

impl fmt::Debug for Archive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Archive")
    }
}

impl Archive {
    /// Opens a copy. Nothing in the file changes.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        Ok(Self {
            db: ReadOnlyDatabase::open(path)?,
        })
    }

    /// Runs `f` over the copy.
    pub fn read<R, E: From<JournalError>>(
        &self,
        f: impl FnOnce(&View) -> Result<R, E>,
    ) -> Result<R, E> {
        let tx = self.db.begin_read().map_err(JournalError::from)?;
        f(&View { tx })
    }

    /// Reads every table but those named, all of it.
    pub fn contents(&self, skip: &[&str]) -> Result<Contents, JournalError> {
        walk(&self.db.begin_read()?, skip, |_, _, _| Ok(()))
    }

    /// Writes every table but those named into a new journal.
    pub fn copy_to(&self, path: &Path, skip: &[&str]) -> Result<Contents, JournalError> {
        copy(&self.db.begin_read()?, path, skip)
    }
}

impl Journal {
    /// Writes a copy of this journal as it is at one moment, while others go on reading and
    /// writing. The file must not exist; it is for this user alone. Durable when this returns.
    pub fn copy_to(&self, path: &Path) -> Result<Contents, JournalError> {
        copy(&self.begin_read()?, path, &[])
    }
}

fn copy(from: &ReadTransaction, path: &Path, skip: &[&str]) -> Result<Contents, JournalError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(redb::Error::Io)?;
    let db = Database::builder().create_file(file)?;
    let to = db.begin_write()?;
    let contents = walk(from, skip, |name, key, value| {
        to.open_table(table(name))?.insert(key, value)?;
        Ok(())
    })?;
    to.commit()?;
    drop(db);
    let synced = File::open(path).and_then(|f| f.sync_all());
    synced.map_err(redb::Error::Io)?;
    Ok(contents)
}

fn table(name: &str) -> TableDefinition<'_, &'static [u8], &'static [u8]> {
    TableDefinition::new(name)
}

/// Shows `each` every entry, in order, and sums up.
fn walk(
    tx: &ReadTransaction,
    skip: &[&str],
    mut each: impl FnMut(&str, &[u8], &[u8]) -> Result<(), JournalError>,
) -> Result<Contents, JournalError> {
    let mut names: Vec<String> = tx
        .list_tables()?
        .map(|t| t.name().to_owned())
        .filter(|name| !skip.contains(&name.as_str()))
        .collect();
    names.sort_unstable();
    let mut sum = Sha256::new();
    // Lengths go in too, so that no two contents give the same stream of bytes.
    let mut add = |bytes: &[u8]| {
        sum.update((bytes.len() as u64).to_le_bytes());
        sum.update(bytes);
        bytes.len() as u64
    };
    let (mut entries, mut bytes) = (0, 0);
    let mut tables = 0;
    for name in &names {
        let mut first = true;
        for item in tx.open_table(table(name))?.iter()? {
            // A table without entries is as good as none, and is not copied.
            if std::mem::take(&mut first) {
                add(name.as_bytes());
                tables += 1;
            }
            let (key, value) = item?;
            bytes += add(key.value()) + add(value.value());
            entries += 1;
            each(name, key.value(), value.value())?;
        }
    }
    Ok(Contents {
        tables,
        entries,
        bytes,
        sha256: hex::encode(sum.finalize()),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use proptest::prelude::*;

    use super::*;
    use crate::Map;

    const A: Map<u64, String> = Map::new("a");
    const B: Map<String, u64> = Map::new("b");
    const C: Map<u64, u64> = Map::new("c");

    fn open(path: &Path) -> Journal {
        Journal::open(path).unwrap()
    }

    #[test]
    fn a_copy_is_of_one_moment_and_bit_flips_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let (live, file) = (open(&dir.path().join("live")), dir.path().join("copy"));
        let put = |n: u64, text: &str| {
            live.write(|tx| {
                tx.put(&B, &text.to_owned(), &n)?;
                tx.put(&A, &n, &text.to_owned())
            })
            .unwrap();
        };
        for n in 0..500 {
            put(n, &format!("entry {n}"));
        }
        // A table that was in use and is empty now.
        let emptied = live.write(|tx| {
            tx.put(&C, &1, &1)?;
            tx.remove(&C, &1)
        });
        emptied.unwrap();
        let made = live.copy_to(&file).unwrap();
        assert_eq!((made.tables, made.entries), (2, 1000));
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // What comes later is not in it, and a file is never overwritten.
        put(500, "late");
        assert!(live.copy_to(&file).is_err());
        let archive = Archive::open(&file).unwrap();
        assert_eq!(archive.contents(&[]).unwrap(), made);
        let last = archive.read(|v| v.last(&A)).unwrap();
        assert_eq!(last, Some((499, "entry 499".into())));
        // Copied again without a table.
        let second = dir.path().join("second");
        let less = archive.copy_to(&second, &["b"]).unwrap();
        assert_eq!((less.tables, less.entries), (1, 500));
        assert_eq!(open(&second).read(|v| v.len(&B)).unwrap(), 0);
        drop(archive);

        // A changed byte of a value is an error or another sum.
        let mut bytes = std::fs::read(&file).unwrap();
        let at = bytes.windows(9).position(|w| w == b"entry 250").unwrap();
        bytes[at] = b'E';
        std::fs::write(&file, bytes).unwrap();
        let found = Archive::open(&file).and_then(|a| a.contents(&[]));
        assert_ne!(found.ok(), Some(made));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn equal_contents_have_equal_sums(
            entries in prop::collection::btree_map(any::<u64>(), ".{0,8}", 0..20),
            other in (any::<u64>(), ".{0,8}"),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (one, two) = (open(&dir.path().join("1")), open(&dir.path().join("2")));
            for (k, v) in &entries {
                one.write(|tx| tx.put(&A, k, v)).unwrap();
            }
            two.write(|tx| {
                for (k, v) in entries.iter().rev() {
                    tx.put(&A, k, v)?;
                }
                Ok::<_, JournalError>(())
            }).unwrap();
            one.write(|tx| tx.put(&B, &"x".to_owned(), &1)).unwrap();
            two.write(|tx| tx.put(&B, &"x".to_owned(), &1)).unwrap();
            let sum = one.copy_to(&dir.path().join("c1")).unwrap();
            prop_assert_eq!(&sum, &two.copy_to(&dir.path().join("c2")).unwrap());
            let changed = entries.get(&other.0) != Some(&other.1);
            two.write(|tx| tx.put(&A, &other.0, &other.1)).unwrap();
            let after = two.copy_to(&dir.path().join("c3")).unwrap();
            prop_assert_eq!(after.sha256 != sum.sha256, changed);
        }
    }
}
