//! What is known of a path: the words of Lotus for it, and the file in which they are kept.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::str::FromStr;

use lotus_types::{ActorId, SectorId, SectorNumber};
use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

/// The file in the root of every path. Source: lotus storage/paths/local.go, `MetaFile`.
pub(super) const META_FILE: &str = "sectorstore.json";
/// A larger file is none of Lotus'.
const META_LIMIT: u64 = 64 << 10;
/// What `lotus-miner storage attach` of Lotus gives a path.
const DEFAULT_WEIGHT: u64 = 10;

/// Names a path for as long as it exists, wherever it is mounted: a UUID when this hub or Lotus
/// made it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PathId(String);

impl PathId {
    pub(super) fn generate() -> Self {
        Self(Uuid::new_v4().to_string())
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PathId {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if (1..=64).contains(&s.len()) && s.chars().all(plain) {
            Ok(Self(s.to_owned()))
        } else {
            let shown: String = s.chars().take(64).collect();
            Err(format!("{shown:?} is no id of a storage path"))
        }
    }
}

impl TryFrom<String> for PathId {
    type Error = String;
    fn try_from(s: String) -> Result<Self, String> {
        s.parse()
    }
}

impl From<PathId> for String {
    fn from(id: PathId) -> Self {
        id.0
    }
}

impl fmt::Display for PathId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `sectorstore.json`. Names and meanings are those of Lotus, so that a path can go from one to
/// the other. Source: lotus storage/sealer/storiface/storage.go, `LocalStorageMeta`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PathMeta {
    /// Names the path.
    #[serde(rename = "ID")]
    pub id: PathId,
    /// How much it is preferred: what counts is the weight times the room. 0: nothing new is put
    /// here.
    #[serde(default)]
    pub weight: u64,
    /// Sectors are sealed here.
    #[serde(default)]
    pub can_seal: bool,
    /// Sealed sectors are kept here.
    #[serde(default)]
    pub can_store: bool,
    /// Most bytes that sectors may take here; 0: as many as the disk holds.
    #[serde(default)]
    pub max_storage: u64,
    /// Groups that it belongs to.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub groups: Vec<String>,
    /// Groups that sectors may be moved to from here; none: to any path.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub allow_to: Vec<String>,
    /// Files that may be put here, as [`FileType::name`]; none: all.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub allow_types: Vec<String>,
    /// Files that may not be put here.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub deny_types: Vec<String>,
    /// Miners whose sectors may be put here; none: all.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub allow_miners: Vec<String>,
    /// Miners whose sectors may not be put here.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub deny_miners: Vec<String>,
}

/// Go writes an empty list as `null`.
fn null_is_empty<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

impl PathMeta {
    /// A path that seals and keeps, without limits.
    pub(super) fn new(id: PathId) -> Self {
        Self {
            id,
            weight: DEFAULT_WEIGHT,
            can_seal: true,
            can_store: true,
            max_storage: 0,
            groups: Vec::new(),
            allow_to: Vec::new(),
            allow_types: Vec::new(),
            deny_types: Vec::new(),
            allow_miners: Vec::new(),
            deny_miners: Vec::new(),
        }
    }

    /// Reads the file of a path.
    pub(super) fn read(root: &Path) -> io::Result<Self> {
        let file = File::open(root.join(META_FILE))?;
        let mut text = String::new();
        file.take(META_LIMIT).read_to_string(&mut text)?;
        serde_json::from_str(&text).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
    }

    /// Writes the file in one step.
    pub(super) fn write(&self, root: &Path) -> io::Result<()> {
        let tmp = root.join(format!(".{META_FILE}.tmp"));
        let mut file = File::create(&tmp)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        fs::rename(tmp, root.join(META_FILE))?;
        File::open(root)?.sync_all()
    }

    pub(super) fn takes_type(&self, file: FileType) -> bool {
        let named = |list: &[String]| list.iter().any(|t| t == file.name());
        (self.allow_types.is_empty() || named(&self.allow_types)) && !named(&self.deny_types)
    }

    pub(super) fn takes_miner(&self, miner: ActorId) -> bool {
        let named = |list: &[String]| list.iter().any(|m| m.parse() == Ok(miner));
        (self.allow_miners.is_empty() || named(&self.allow_miners)) && !named(&self.deny_miners)
    }
}

/// A file or folder of a sector. The folders and their bits are those of Lotus. Source: lotus
/// storage/sealer/storiface/filetype.go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileType {
    /// The replica.
    Sealed,
    /// Its trees.
    Cache,
    /// The replica of an upgraded sector.
    Update,
    /// Its trees.
    UpdateCache,
    /// What only sealing or unsealing needs. Ours alone.
    Scratch,
}

impl FileType {
    pub(super) const ALL: [Self; 5] = [
        Self::Sealed,
        Self::Cache,
        Self::Update,
        Self::UpdateCache,
        Self::Scratch,
    ];

    /// Its name, and its folder in a path.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sealed => "sealed",
            Self::Cache => "cache",
            Self::Update => "update",
            Self::UpdateCache => "update-cache",
            Self::Scratch => "scratch",
        }
    }

    /// Its bit in a sum of types.
    #[must_use]
    pub const fn bit(self) -> u32 {
        match self {
            Self::Sealed => 2,
            Self::Cache => 4,
            Self::Update => 8,
            Self::UpdateCache => 16,
            // Far from what Lotus may add.
            Self::Scratch => 1 << 31,
        }
    }
}

/// A set of [`FileType`]s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FileTypes(u32);

impl FileTypes {
    /// A replica and its trees.
    pub(crate) const REPLICA: Self = Self(FileType::Sealed.bit() | FileType::Cache.bit());
    /// An upgraded replica and its trees.
    pub(crate) const UPDATE: Self = Self(FileType::Update.bit() | FileType::UpdateCache.bit());
    /// All that proofs need, of either.
    pub(super) const KEPT: Self = Self(Self::REPLICA.0 | Self::UPDATE.0);
    /// All.
    pub(super) const EVERY: Self = Self(Self::KEPT.0 | FileType::Scratch.bit());

    pub(super) fn insert(&mut self, file: FileType) {
        self.0 |= file.bit();
    }

    pub(super) fn remove(&mut self, files: Self) {
        self.0 &= !files.0;
    }

    pub(super) const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub(super) const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether it is in the set.
    #[must_use]
    pub const fn has(self, file: FileType) -> bool {
        self.0 & file.bit() != 0
    }

    /// Whether nothing is in the set.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// What is in the set.
    pub fn iter(self) -> impl Iterator<Item = FileType> {
        FileType::ALL.into_iter().filter(move |f| self.has(*f))
    }

    /// The sum of Lotus' bits.
    #[must_use]
    pub const fn lotus(self) -> u32 {
        self.0 & Self::KEPT.0
    }
}

impl From<FileType> for FileTypes {
    fn from(file: FileType) -> Self {
        Self(file.bit())
    }
}

/// The sector of a file, from its name such as `s-t01000-7`.
pub(super) fn sector_of(name: &str) -> Option<SectorId> {
    let (miner, number) = name.strip_prefix("s-")?.split_once('-')?;
    let id = SectorId {
        miner: miner.parse().ok()?,
        number: SectorNumber(number.parse().ok()?),
    };
    // One spelling alone, which is the one that is looked for later.
    (id.to_string() == name).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_lotus_is_read_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        // As Go writes it.
        let text = r#"{"ID":"1a2b","Weight":7,"CanSeal":false,"CanStore":true,"MaxStorage":512,
            "Groups":["hdd"],"AllowTo":null,"AllowTypes":["sealed","cache"],"DenyTypes":null,
            "AllowMiners":["f01000"],"DenyMiners":null}"#;
        fs::write(dir.path().join(META_FILE), text).unwrap();
        let meta = PathMeta::read(dir.path()).unwrap();
        assert_eq!((meta.weight, meta.max_storage), (7, 512));
        assert!(!meta.can_seal && meta.can_store && meta.allow_to.is_empty());
        assert!(meta.takes_type(FileType::Cache) && !meta.takes_type(FileType::Update));
        assert!(meta.takes_miner(ActorId(1000)) && !meta.takes_miner(ActorId(1001)));
        meta.write(dir.path()).unwrap();
        assert_eq!(PathMeta::read(dir.path()).unwrap(), meta);

        for bad in ["", "{}", r#"{"ID":""}"#, r#"{"ID":"../x"}"#] {
            fs::write(dir.path().join(META_FILE), bad).unwrap();
            assert!(PathMeta::read(dir.path()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_of_files_are_those_of_sectors_alone() {
        assert_eq!(sector_of("s-t01000-7").unwrap().to_string(), "s-t01000-7");
        for bad in [
            "s-f01000-7",
            "s-t01000-07",
            "s-t01000-x",
            "attempt",
            "s-t01000",
        ] {
            assert_eq!(sector_of(bad), None, "{bad}");
        }
    }

    #[test]
    fn types_are_a_set() {
        let mut all = FileTypes::EVERY;
        assert_eq!((all.iter().count(), all.lotus()), (5, 30));
        all.remove(FileTypes::UPDATE);
        assert_eq!(all.lotus(), 6);
        assert!(all.has(FileType::Scratch) && !all.has(FileType::Update));
        assert!(all.and(FileTypes::UPDATE).is_empty());
    }
}
