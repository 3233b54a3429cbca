//! One line of the log: what it says, and the hash that seals it.

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

use crate::AuditError;

/// Bytes of a text in a record. What is longer ends in "…" there.
pub const MAX_TEXT: usize = 256;
/// Bytes of a line with its line feed. Five texts of control characters, each six bytes in JSON, are less.
pub(crate) const MAX_LINE: usize = 16 << 10;
/// Bytes of a torn line that its record shows.
pub(crate) const SHOWN: usize = 512;
/// The format that is written and read.
pub(crate) const FORMAT: u32 = 1;

const MARK: &str = "…";
const OPEN: &[u8] = b",\"hash\":\"";
const CLOSE: &[u8] = b"\"}";
const DIGITS: usize = 64;
/// Bytes from the comma before the hash to the line's end.
const SEAL: usize = OPEN.len() + DIGITS + CLOSE.len();

/// SHA-256 of a line and, through the line before, of all before it.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Hash([u8; 32]);

impl Hash {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Lower-case digits alone: each hash is written in one way.
    fn parse(digits: &[u8]) -> Option<Self> {
        let mut hash = [0; 32];
        let plain = digits.len() == DIGITS && !digits.iter().any(u8::is_ascii_uppercase);
        (plain && hex::decode_to_slice(digits, &mut hash).is_ok()).then_some(Self(hash))
    }
}

impl From<Sha256> for Hash {
    fn from(sum: Sha256) -> Self {
        Self(sum.finalize().into())
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Self::parse(text.as_bytes())
            .ok_or_else(|| serde::de::Error::custom("not 64 hexadecimal digits"))
    }
}

/// A record and its hash, which vouches for the log up to there. Noted elsewhere, it shows whether the
/// log still has that past. Written as `seq:hash`; of a log without records, 0 and its first header's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Head {
    /// Number of the record.
    pub seq: u64,
    /// Its hash.
    pub hash: Hash,
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.seq, self.hash)
    }
}

impl FromStr for Head {
    type Err = AuditError;

    fn from_str(text: &str) -> Result<Self, AuditError> {
        let parsed = text.trim().split_once(':').and_then(|(seq, hash)| {
            Some(Self {
                seq: seq.parse().ok()?,
                hash: Hash::parse(hash.as_bytes())?,
            })
        });
        parsed.ok_or_else(|| AuditError::BadHead { text: clip(text) })
    }
}

/// A state-changing call of the hub API, as the hub tells it. Texts of more than [`MAX_TEXT`] bytes are
/// cut.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Call {
    /// Who called: `deals/d1`, `host`, `worker/w`.
    pub who: String,
    /// Its address, or empty.
    pub from: String,
    /// Path of the gRPC method.
    pub method: String,
    /// Idempotency key, or empty.
    pub key: String,
    /// `ok`, or the name of the gRPC code.
    pub outcome: String,
    /// The hub's generation.
    pub generation: u64,
}

/// A line of the log that is not a file's header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Number, from 1 without a gap.
    pub seq: u64,
    /// When it was appended, by the hub's clock.
    pub time_unix_ms: u64,
    /// Who called. `audit` is the log itself.
    pub who: String,
    /// Its address, or empty.
    pub from: String,
    /// Path of the gRPC method.
    pub method: String,
    /// Idempotency key, or empty.
    pub key: String,
    /// `ok`, or the name of the gRPC code.
    pub outcome: String,
    /// The hub's generation.
    pub generation: u64,
    /// What was cut when the log was opened; only in records of the log itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovered: Option<Recovered>,
    /// Hash of the line before.
    pub prev: Hash,
    /// Hash of this line.
    pub hash: Hash,
}

impl Record {
    pub(crate) const fn head(&self) -> Head {
        Head {
            seq: self.seq,
            hash: self.hash,
        }
    }
}

/// The part of a line that a crash left at the end of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recovered {
    /// Name of the file.
    pub file: String,
    /// Where it began.
    pub at: u64,
    /// How long it was.
    pub bytes: u64,
    /// SHA-256 of it.
    pub sha256: Hash,
    /// Its first bytes, in hexadecimal.
    pub begins: String,
}

/// The first line of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Header {
    /// Of which log the file is.
    pub(crate) log: String,
    pub(crate) format: u32,
    /// Number of the file, as in its name.
    pub(crate) file: u64,
    /// Number of the first record in it.
    pub(crate) seq: u64,
    /// Number of the oldest file that is kept.
    pub(crate) oldest: u64,
    pub(crate) time_unix_ms: u64,
    pub(crate) prev: Hash,
    pub(crate) hash: Hash,
}

impl Header {
    /// The head of a log that ends in this header.
    pub(crate) fn head(&self) -> Head {
        match self.seq {
            0 | 1 => Head {
                seq: 0,
                hash: self.hash,
            },
            seq => Head {
                seq: seq - 1,
                hash: self.prev,
            },
        }
    }
}

/// A line with its place in the chain and its seal.
pub(crate) trait Sealed: Serialize {
    fn set_hash(&mut self, hash: Hash);

    /// The line's bytes with the line feed.
    fn seal(&mut self) -> io::Result<Vec<u8>> {
        self.set_hash(Hash::default());
        let mut line = serde_json::to_vec(self)?;
        let body = line.len().saturating_sub(SEAL);
        let hash = Hash::of(&line[..body]);
        line.truncate(body);
        line.extend_from_slice(OPEN);
        line.extend_from_slice(hash.to_string().as_bytes());
        line.extend_from_slice(CLOSE);
        line.push(b'\n');
        self.set_hash(hash);
        Ok(line)
    }
}

impl Sealed for Record {
    fn set_hash(&mut self, hash: Hash) {
        self.hash = hash;
    }
}

impl Sealed for Header {
    fn set_hash(&mut self, hash: Hash) {
        self.hash = hash;
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Header(Header),
    Record(Record),
}

/// What is wrong with a line, whatever is around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// No form of a line.
    Form,
    /// The hash is of other bytes.
    Hash,
}

impl Line {
    /// Reads a line without its line feed.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, Flaw> {
        let body = line.len().checked_sub(SEAL).ok_or(Flaw::Form)?;
        let (body, seal) = line.split_at(body);
        let hash = seal
            .strip_prefix(OPEN)
            .and_then(|s| s.strip_suffix(CLOSE))
            .and_then(Hash::parse)
            .ok_or(Flaw::Form)?;
        if Hash::of(body) != hash {
            return Err(Flaw::Hash);
        }
        let parsed = if line.starts_with(b"{\"log\":") {
            serde_json::from_slice(line).map(Self::Header)
        } else {
            serde_json::from_slice(line).map(Self::Record)
        };
        parsed.map_err(|_| Flaw::Form)
    }
}

/// A text that fits into a record.
pub(crate) fn clip(text: &str) -> String {
    if text.len() <= MAX_TEXT {
        return text.into();
    }
    let end = text.floor_char_boundary(MAX_TEXT - MARK.len());
    format!("{}{MARK}", &text[..end])
}
