//! What a piece holds, in order of the multihashes: one file for each piece, in the format of a
//! detached CARv2 index, `MultihashIndexSorted`.
//! Source: ipld.io/specs/transport/car/carv2, "Format `0x0401`"; go-car reads it.
//!
//! All numbers are little-endian but the first.
//!
//! | bytes | what |
//! |---|---|
//! | 2 | 0x0401 as a varint |
//! | 4 | count of hash functions |
//! | | for each, rising: |
//! | 8 | its multicodec |
//! | 4 | count of its digest lengths |
//! | | for each, rising: |
//! | 4 | bytes of an entry: those of a digest and 8 |
//! | 8 | bytes of all entries |
//! | | the entries, by their digests: digest, and where the block's section starts in the CARv1 (8) |
//!
//! Of blocks with one multihash the first is listed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use lotus_segments::{SegmentsError, Sorter};
use multihash::Multihash;
use xxhash_rust::xxh3::Xxh3;

use crate::{Entry, IndexError};

/// Varint of the multicodec `car-multihash-index-sorted`.
const CODEC: [u8; 2] = [0x81, 0x08];
/// Bytes of the entries that are sorted in memory, for the first kind of multihash; the others
/// have a part.
const RUN: (usize, usize) = (32 << 20, 1 << 20);
/// Kinds of multihashes (function and digest length) in one piece.
const MAX_KINDS: usize = 256;
/// Longest digest. Source: the `Multihash<64>` of the workspace.
const MAX_DIGEST: usize = 64;
/// Bytes of the offset of an entry.
const OFFSET: usize = 8;
/// Behind the digest while it is sorted: section, offset, length.
const BEHIND: usize = 20;
/// Bytes that a search reads at once.
const WINDOW: usize = 4096;

/// Sorts the entries of a piece. Memory: see [`RUN`], and as much again.
pub(crate) struct Builder {
    dir: PathBuf,
    /// By multicodec and digest length.
    kinds: BTreeMap<(u64, usize), Sorter>,
}

/// What a finished sidecar is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Finished {
    pub(crate) count: u64,
    pub(crate) sum: u64,
}

impl Builder {
    /// A sidecar whose sorting uses `dir`.
    pub(crate) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.into(),
            kinds: BTreeMap::new(),
        }
    }

    pub(crate) fn push(&mut self, entry: &Entry) -> Result<(), IndexError> {
        let digest = entry.hash.digest();
        let kinds = self.kinds.len();
        let sorter = match self.kinds.entry((entry.hash.code(), digest.len())) {
            std::collections::btree_map::Entry::Occupied(o) => o.into_mut(),
            std::collections::btree_map::Entry::Vacant(v) if kinds < MAX_KINDS => {
                let run = if kinds == 0 { RUN.0 } else { RUN.1 };
                v.insert(Sorter::new(&self.dir, digest.len() + BEHIND, run))
            }
            std::collections::btree_map::Entry::Vacant(_) => {
                return Err(IndexError::Kinds { max: MAX_KINDS });
            }
        };
        let mut record = [0; MAX_DIGEST + BEHIND];
        let (head, rest) = record.split_at_mut(digest.len());
        head.copy_from_slice(digest);
        rest[..8].copy_from_slice(&entry.section.to_be_bytes());
        rest[8..16].copy_from_slice(&entry.offset.to_be_bytes());
        rest[16..20].copy_from_slice(&entry.len.to_be_bytes());
        sorter.push(&record[..digest.len() + BEHIND])?;
        Ok(())
    }

    /// Writes the file, for good, and hands each entry that it lists on in its order.
    pub(crate) fn finish(
        self,
        to: &Path,
        mut listed: impl FnMut(&Entry) -> Result<(), IndexError>,
    ) -> Result<Finished, IndexError> {
        let failed = |e| IndexError::file(to, e);
        let fresh = unfinished(to);
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&fresh).map_err(failed)?);
        let mut sum = Xxh3::new();
        let mut count = 0;
        let mut functions = BTreeMap::<u64, u32>::new();
        for (code, _) in self.kinds.keys() {
            *functions.entry(*code).or_default() += 1;
        }
        let lengths = u32::try_from(functions.len()).unwrap_or(u32::MAX);
        let start = [&CODEC[..], &lengths.to_le_bytes()].concat();
        out.write_all(&start).map_err(failed)?;
        let mut last_code = None;
        for ((code, digest), sorter) in self.kinds {
            if last_code.replace(code) != Some(code) {
                out.write_all(&code.to_le_bytes()).map_err(failed)?;
                let lengths = functions.get(&code).copied().unwrap_or(0);
                out.write_all(&lengths.to_le_bytes()).map_err(failed)?;
            }
            let width = digest + OFFSET;
            out.write_all(&u32_of(width).to_le_bytes())
                .map_err(failed)?;
            let at = out.stream_position().map_err(failed)?;
            out.write_all(&[0; 8]).map_err(failed)?;
            let mut bytes = 0u64;
            let mut last = [0; MAX_DIGEST];
            let mut sorted = sorter.finish()?;
            while let Some(record) = sorted.next()? {
                let (hash, behind) = record.split_at(digest);
                if bytes > 0 && last[..digest] == *hash {
                    continue;
                }
                last[..digest].copy_from_slice(hash);
                let section = be64(behind);
                let mut entry = [0; MAX_DIGEST + OFFSET];
                entry[..digest].copy_from_slice(hash);
                entry[digest..width].copy_from_slice(&section.to_le_bytes());
                out.write_all(&entry[..width]).map_err(failed)?;
                sum.update(&entry[..width]);
                bytes += width as u64;
                count += 1;
                let hash = Multihash::wrap(code, hash).map_err(|e| failed(io::Error::other(e)))?;
                listed(&Entry {
                    hash,
                    section,
                    offset: be64(&behind[8..]),
                    len: u32::from_be_bytes(behind[16..20].try_into().expect("four bytes")),
                })?;
            }
            let end = out.stream_position().map_err(failed)?;
            out.seek(SeekFrom::Start(at)).map_err(failed)?;
            out.write_all(&bytes.to_le_bytes()).map_err(failed)?;
            out.seek(SeekFrom::Start(end)).map_err(failed)?;
            add_kind(&mut sum, code, width, bytes);
        }
        let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
        file.sync_all().map_err(failed)?;
        fs::rename(&fresh, to).map_err(failed)?;
        if let Some(dir) = to.parent() {
            let synced = File::open(dir).and_then(|d| d.sync_all());
            synced.map_err(failed)?;
        }
        Ok(Finished {
            count,
            sum: sum.digest(),
        })
    }
}

/// Where a sidecar is written before it is put in its place.
pub(crate) fn unfinished(to: &Path) -> PathBuf {
    to.with_extension("new")
}

/// The checksum covers the entries of each kind, and then what is before them.
fn add_kind(sum: &mut Xxh3, code: u64, width: usize, bytes: u64) {
    for n in [code, width as u64, bytes] {
        sum.update(&n.to_le_bytes());
    }
}

fn u32_of(n: usize) -> u32 {
    u32::try_from(n).expect("a digest has at most 64 bytes")
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
}

/// A sidecar that is read. Nothing of its entries is in memory.
#[derive(Debug)]
pub(crate) struct Sidecar {
    path: PathBuf,
    file: File,
    kinds: Vec<KindOf>,
}

/// The entries of one hash function and digest length.
#[derive(Debug, Clone, Copy)]
struct KindOf {
    code: u64,
    digest: usize,
    /// Where they start in the file.
    at: u64,
    count: u64,
}

impl Sidecar {
    /// Opens it; every size that it says is checked against the file.
    pub(crate) fn open(path: &Path) -> Result<Self, IndexError> {
        let failed = |e| IndexError::file(path, e);
        let file = File::open(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        let bad = |what: &str| {
            IndexError::Segments(
                SegmentsError::Corrupt {
                    path: path.into(),
                    what: what.into(),
                }
                .into(),
            )
        };
        let mut input = &file;
        let mut at = 0u64;
        let mut take = |n: usize| -> Result<[u8; 8], IndexError> {
            let mut bytes = [0; 8];
            input
                .read_exact(&mut bytes[..n])
                .map_err(|e| match e.kind() {
                    io::ErrorKind::UnexpectedEof => bad("it ends early"),
                    _ => failed(e),
                })?;
            Ok(bytes)
        };
        let head = take(2)?;
        if head[..2] != CODEC {
            return Err(bad("it is no index of multihashes"));
        }
        at += 2;
        let functions = u64::from_le_bytes(take(4)?);
        at += 4;
        let mut kinds = Vec::new();
        for _ in 0..functions {
            let code = u64::from_le_bytes(take(8)?);
            let lengths = u64::from_le_bytes(take(4)?);
            at += 12;
            for _ in 0..lengths {
                let width = u64::from_le_bytes(take(4)?);
                let bytes = u64::from_le_bytes(take(8)?);
                at += 12;
                let digest = usize::try_from(width)
                    .ok()
                    .and_then(|w| w.checked_sub(OFFSET))
                    .filter(|d| *d <= MAX_DIGEST)
                    .ok_or_else(|| bad("a digest has an impossible length"))?;
                let end = at.checked_add(bytes).filter(|e| *e <= size);
                let end = end.ok_or_else(|| bad("it is shorter than it says"))?;
                if bytes % width != 0 || kinds.len() == MAX_KINDS {
                    return Err(bad("its sizes do not fit"));
                }
                kinds.push(KindOf {
                    code,
                    digest,
                    at,
                    count: bytes / width,
                });
                (&file).seek(SeekFrom::Start(end)).map_err(failed)?;
                at = end;
            }
        }
        if at != size {
            return Err(bad("it is longer than it says"));
        }
        let kinds = kinds;
        Ok(Self {
            path: path.into(),
            file,
            kinds,
        })
    }

    fn bad(&self, what: &str) -> IndexError {
        IndexError::Segments(
            SegmentsError::Corrupt {
                path: self.path.clone(),
                what: what.into(),
            }
            .into(),
        )
    }

    /// Multihashes in it.
    #[cfg(test)]
    fn count(&self) -> u64 {
        self.kinds.iter().map(|k| k.count).sum()
    }

    fn read(&self, kind: &KindOf, from: u64, entries: usize) -> Result<Vec<u8>, IndexError> {
        let width = kind.digest + OFFSET;
        let mut bytes = vec![0; entries * width];
        let at = kind.at + from * width as u64;
        let read = self.file.read_exact_at(&mut bytes, at);
        read.map_err(|e| IndexError::file(&self.path, e))?;
        Ok(bytes)
    }

    /// Up to `limit` multihashes from the `from`th on, in order.
    pub(crate) fn multihashes(
        &self,
        from: u64,
        limit: usize,
    ) -> Result<Vec<Multihash<64>>, IndexError> {
        let mut out = Vec::new();
        let mut skip = from;
        for kind in &self.kinds {
            if skip >= kind.count {
                skip -= kind.count;
                continue;
            }
            let left = usize::try_from(kind.count - skip).unwrap_or(usize::MAX);
            let wanted = left.min(limit - out.len());
            if wanted == 0 {
                break;
            }
            let bytes = self.read(kind, skip, wanted)?;
            for entry in bytes.chunks_exact(kind.digest + OFFSET) {
                let hash = Multihash::wrap(kind.code, &entry[..kind.digest]);
                out.push(hash.map_err(|_| self.bad("a digest is too long"))?);
            }
            skip = 0;
        }
        Ok(out)
    }

    /// Whether it lists a multihash.
    pub(crate) fn has(&self, hash: &Multihash<64>) -> Result<bool, IndexError> {
        Ok(self.search(hash)?.0)
    }

    /// Whether it lists a multihash, and how many reads that took.
    ///
    /// Digests are spread evenly, so the place is guessed, the next time from where the last guess
    /// led. Every third guess halves what is left, however they are spread.
    fn search(&self, hash: &Multihash<64>) -> Result<(bool, u32), IndexError> {
        let digest = hash.digest();
        let same = |k: &&KindOf| k.code == hash.code() && k.digest == digest.len();
        let Some(kind) = self.kinds.iter().find(same) else {
            return Ok((false, 0));
        };
        let width = kind.digest + OFFSET;
        let window = (WINDOW / width) as u64;
        let (mut low, mut high, mut reads) = (0, kind.count, 0);
        let mut guess = entries_before(first(digest), kind.count);
        while low < high {
            let from = guess.saturating_sub(window / 2).clamp(low, high - 1);
            let until = (from + window).min(high);
            let entries = usize::try_from(until - from).unwrap_or(0);
            let bytes = self.read(kind, from, entries)?;
            reads += 1;
            let entry = |n: usize| &bytes[n * width..n * width + kind.digest];
            let between = |a, b| entries_before(first(b).saturating_sub(first(a)), kind.count);
            if digest < entry(0) {
                high = from;
                guess = from.saturating_sub(between(digest, entry(0)));
            } else if digest > entry(entries - 1) {
                low = until;
                guess = until.saturating_add(between(entry(entries - 1), digest));
            } else {
                let (mut a, mut b) = (0, entries);
                while a < b {
                    let mid = usize::midpoint(a, b);
                    match entry(mid).cmp(digest) {
                        std::cmp::Ordering::Equal => return Ok((true, reads)),
                        std::cmp::Ordering::Less => a = mid + 1,
                        std::cmp::Ordering::Greater => b = mid,
                    }
                }
                return Ok((false, reads));
            }
            if reads % 3 == 0 {
                guess = u64::midpoint(low, high);
            }
        }
        Ok((false, reads))
    }

    /// Reads everything: whether it is in order, and its checksum.
    pub(crate) fn verify(&self) -> Result<Finished, IndexError> {
        let mut sum = Xxh3::new();
        let mut count = 0;
        for kind in &self.kinds {
            let width = kind.digest + OFFSET;
            let mut last = Vec::new();
            let mut at = 0;
            while at < kind.count {
                let entries = usize::try_from(kind.count - at).unwrap_or(usize::MAX);
                let bytes = self.read(kind, at, entries.min((1 << 20) / width))?;
                sum.update(&bytes);
                for entry in bytes.chunks_exact(width) {
                    let digest = &entry[..kind.digest];
                    if (at > 0 || !last.is_empty()) && digest <= &last[..] {
                        return Err(self.bad("it is not in order"));
                    }
                    last.clear();
                    last.extend_from_slice(digest);
                }
                at += (bytes.len() / width) as u64;
            }
            count += kind.count;
            add_kind(&mut sum, kind.code, width, kind.count * width as u64);
        }
        Ok(Finished {
            count,
            sum: sum.digest(),
        })
    }
}

/// The first bytes of a digest as a number.
fn first(digest: &[u8]) -> u64 {
    let mut first = [0; 8];
    let n = digest.len().min(8);
    first[..n].copy_from_slice(&digest[..n]);
    u64::from_be_bytes(first)
}

/// How many of `count` digests that are spread evenly begin with a smaller number.
fn entries_before(first: u64, count: u64) -> u64 {
    let scaled = u128::from(first) * u128::from(count);
    u64::try_from(scaled >> 64).unwrap_or(0)
}

#[cfg(test)]
mod hostile;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use multihash_codetable::{Code, MultihashDigest};
    use proptest::prelude::*;

    use super::*;

    fn built(dir: &Path, entries: &[Entry]) -> (PathBuf, Finished, Vec<Entry>) {
        let mut builder = Builder::new(dir);
        for e in entries {
            builder.push(e).unwrap();
        }
        let path = dir.join("x.idx");
        let mut listed = Vec::new();
        let done = builder.finish(&path, |e| {
            listed.push(*e);
            Ok(())
        });
        (path, done.unwrap(), listed)
    }

    fn entry(code: u64, digest: &[u8], section: u64) -> Entry {
        Entry {
            hash: Multihash::wrap(code, digest).unwrap(),
            section,
            offset: section + 40,
            len: 7,
        }
    }

    /// The bytes of go-car's `index.WriteTo` for these.
    #[test]
    fn its_bytes_are_those_of_the_format() {
        let dir = tempfile::tempdir().unwrap();
        let all = [
            entry(0x12, &[9; 32], 0x2b),
            entry(0x12, &[1; 32], 0x1_0000_0000),
            entry(0x12, &[9; 32], 0x90),
            entry(0x12, &[5; 20], 1),
            entry(0xb220, &[3; 32], 2),
        ];
        let (path, done, _) = built(dir.path(), &all);
        assert_eq!(done.count, 4);
        let mut want = vec![0x81, 0x08, 2, 0, 0, 0];
        want.extend([0x12, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
        want.extend([28, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0]);
        want.extend([5; 20]);
        want.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        want.extend([40, 0, 0, 0, 80, 0, 0, 0, 0, 0, 0, 0]);
        want.extend([1; 32]);
        want.extend([0, 0, 0, 0, 1, 0, 0, 0]);
        want.extend([9; 32]);
        want.extend([0x2b, 0, 0, 0, 0, 0, 0, 0]);
        want.extend([0x20, 0xb2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        want.extend([40, 0, 0, 0, 40, 0, 0, 0, 0, 0, 0, 0]);
        want.extend([3; 32]);
        want.extend([2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(fs::read(path).unwrap(), want);
    }

    #[test]
    fn a_search_reads_little_however_digests_are_spread() {
        const COUNT: u32 = 200_000;
        let dir = tempfile::tempdir().unwrap();
        let even = |n: u32| Code::Sha2_256.digest(&n.to_be_bytes());
        let crowded = |n: u32| {
            let mut digest = [7; 32];
            digest[28..].copy_from_slice(&(n * 2).to_be_bytes());
            Multihash::wrap(0x12, &digest).unwrap()
        };
        let reads = |multihash: &dyn Fn(u32) -> Multihash<64>| {
            let listed = (0..COUNT).map(|n| Entry {
                hash: multihash(n),
                section: 0,
                offset: 0,
                len: 1,
            });
            let (path, ..) = built(dir.path(), &listed.collect::<Vec<_>>());
            let sidecar = Sidecar::open(&path).unwrap();
            let (mut sum, mut most) = (0, 0);
            for n in (0..COUNT * 2).step_by(401) {
                let (found, reads) = sidecar.search(&multihash(n)).unwrap();
                assert_eq!(found, n < COUNT, "{n}");
                (sum, most) = (sum + reads, most.max(reads));
            }
            (f64::from(sum) / f64::from(COUNT * 2 / 401), most)
        };
        let (mean, most) = reads(&even);
        assert!(mean < 2.5 && most < 10, "{mean}, {most}");
        // Three for each halving of 200,000 down to 102.
        let (_, most) = reads(&crowded);
        assert!(most <= 3 * 11, "{most}");
    }

    fn entries() -> impl Strategy<Value = Vec<Entry>> {
        let kind = prop_oneof![
            Just((0x12, 32)),
            Just((0xb220, 32)),
            Just((0x12, 20)),
            Just((0, 3))
        ];
        // Few values in the first bytes, so that guesses are wrong.
        let one = (kind, 0u8..2, any::<u16>(), 0u64..1 << 36);
        let one = one.prop_map(|((code, len), first, n, section)| {
            let mut digest = vec![first * 255; len];
            digest[len - 2..].copy_from_slice(&n.to_be_bytes());
            entry(code, &digest, section)
        });
        proptest::collection::vec(one, 0..700)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn it_knows_what_it_was_given(entries in entries(), other in any::<u16>()) {
            let dir = tempfile::tempdir().unwrap();
            let (path, done, listed) = built(dir.path(), &entries);
            let want: BTreeSet<_> = entries.iter().map(|e| e.hash.to_bytes()).collect();
            prop_assert_eq!(done.count, want.len() as u64);
            prop_assert_eq!(listed.iter().map(|e| e.hash.to_bytes()).collect::<BTreeSet<_>>(), want.clone());
            for l in &listed {
                let first = entries.iter().filter(|e| e.hash == l.hash).map(|e| e.section).min();
                prop_assert_eq!(Some(l.section), first);
            }
            let sidecar = Sidecar::open(&path).unwrap();
            prop_assert_eq!(sidecar.count(), done.count);
            prop_assert_eq!(sidecar.verify().unwrap(), done);
            for e in &entries {
                prop_assert!(sidecar.has(&e.hash).unwrap());
            }
            for first in [0, 77, 255] {
                let mut digest = [first; 32];
                digest[30..].copy_from_slice(&other.to_be_bytes());
                let hash = Multihash::wrap(0x12, &digest).unwrap();
                prop_assert_eq!(sidecar.has(&hash).unwrap(), want.contains(&hash.to_bytes()));
            }
            let mut got = Vec::new();
            while let page @ [_, ..] = &sidecar.multihashes(got.len() as u64, 100).unwrap()[..] {
                got.extend_from_slice(page);
            }
            prop_assert_eq!(got, listed.iter().map(|e| e.hash).collect::<Vec<_>>());
        }

        #[test]
        fn damage_is_noticed(entries in entries(), at in any::<prop::sample::Index>(), mask in 1u8.., cut in any::<bool>()) {
            let dir = tempfile::tempdir().unwrap();
            let (path, done, _) = built(dir.path(), &entries);
            let mut bytes = fs::read(&path).unwrap();
            let at = at.index(bytes.len());
            if cut {
                bytes.truncate(at);
            } else {
                bytes[at] ^= mask;
            }
            fs::write(&path, bytes).unwrap();
            let seen = Sidecar::open(&path).and_then(|s| s.verify());
            prop_assert!(seen.is_err() || seen.unwrap() != done);
        }
    }
}
