//! Files of a log, and their lines from either end, in bounded memory.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::line::{Flaw, Line, MAX_LINE, SHOWN};
use crate::{AuditError, Hash};

/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;
/// Bytes at the end of a file in which its last sound line is looked for first.
const WINDOW: u64 = 256 << 10;

/// Largest number of a file.
const LAST: u64 = 1 << 48;

pub(crate) fn name(number: u64) -> String {
    format!("{number:08}.jsonl")
}

pub(crate) fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(name(number))
}

/// Numbers of the files that are there, in order.
pub(crate) fn list(dir: &Path) -> Result<Vec<u64>, AuditError> {
    let mut numbers = Vec::new();
    let entries = fs::read_dir(dir).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => AuditError::NoLog { dir: dir.into() },
        _ => AuditError::io(dir)(e),
    })?;
    for entry in entries {
        let file = entry.map_err(AuditError::io(dir))?.file_name();
        let number = file
            .to_str()
            .and_then(|n| n.strip_suffix(".jsonl"))
            .and_then(|n| n.parse().ok())
            .filter(|n| (1..=LAST).contains(n) && file.to_str() == Some(name(*n).as_str()));
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Opens a file for reading; `None` if it was removed since it was listed.
pub(crate) fn open(dir: &Path, number: u64) -> Result<Option<File>, AuditError> {
    let path = path(dir, number);
    match File::open(&path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(AuditError::io(&path)(e)),
    }
}

/// Bytes between two line feeds.
#[derive(Debug)]
pub(crate) struct Raw<'a> {
    bytes: &'a [u8],
    /// Where it starts in the file.
    pub(crate) at: u64,
    /// All its bytes, the line feed too.
    pub(crate) len: u64,
    /// Whether it has a line feed.
    pub(crate) whole: bool,
}

impl Raw<'_> {
    pub(crate) fn parse(&self) -> Result<Line, Flaw> {
        if self.whole && self.len <= MAX_LINE as u64 {
            Line::parse(self.bytes)
        } else {
            Err(Flaw::Form)
        }
    }
}

/// The lines of a file, first to last.
#[derive(Debug)]
pub(crate) struct Lines {
    reader: BufReader<File>,
    line: Vec<u8>,
    at: u64,
}

impl Lines {
    pub(crate) fn new(file: File) -> Self {
        Self {
            reader: BufReader::with_capacity(CHUNK, file),
            line: Vec::new(),
            at: 0,
        }
    }

    fn from(mut file: File, at: u64) -> io::Result<Self> {
        file.seek(SeekFrom::Start(at))?;
        Ok(Self {
            at,
            ..Self::new(file)
        })
    }

    pub(crate) fn next(&mut self) -> io::Result<Option<Raw<'_>>> {
        self.line.clear();
        let limit = MAX_LINE as u64;
        let mut start = (&mut self.reader).take(limit);
        let mut len = start.read_until(b'\n', &mut self.line)? as u64;
        if len == 0 {
            return Ok(None);
        }
        let mut whole = self.line.ends_with(b"\n");
        if whole {
            self.line.pop();
        } else if len == limit {
            let more = self.reader.skip_until(b'\n')? as u64;
            if more > 0 {
                len += more;
                let mut last = [0];
                let file = self.reader.get_ref();
                file.read_exact_at(&mut last, self.at + len - 1)?;
                whole = last == *b"\n";
            }
        }
        let at = self.at;
        self.at += len;
        Ok(Some(Raw {
            bytes: &self.line,
            at,
            len,
            whole,
        }))
    }
}

/// The lines of a file, last to first. What is too long for a line, or has no line feed, is left out.
#[derive(Debug)]
pub(crate) struct Backwards {
    file: File,
    /// What is before this was not read yet.
    at: u64,
    /// What was read and not given out.
    part: Vec<u8>,
    /// Whether the end of a line that is too long was left out of `part`.
    dropped: bool,
}

impl Backwards {
    pub(crate) fn new(file: File) -> io::Result<Self> {
        let at = file.metadata()?.len();
        // What is after the last line feed ends nowhere.
        Ok(Self {
            file,
            at,
            part: Vec::new(),
            dropped: true,
        })
    }

    /// The line before, without its line feed.
    pub(crate) fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            // The last line of `part` ends with its last byte, unless that line was dropped.
            let within = self.part.len() - usize::from(!self.dropped && !self.part.is_empty());
            if let Some(feed) = self.part[..within].iter().rposition(|b| *b == b'\n') {
                let mut line = self.part.split_off(feed + 1);
                if std::mem::take(&mut self.dropped) || line.len() > MAX_LINE {
                    continue;
                }
                line.pop();
                return Ok(Some(line));
            }
            if self.at == 0 {
                let mut line = std::mem::take(&mut self.part);
                let good = !self.dropped && line.pop().is_some() && line.len() < MAX_LINE;
                return Ok(good.then_some(line));
            }
            if self.part.len() > MAX_LINE {
                self.part.clear();
                self.dropped = true;
            }
            let n = self.at.min(CHUNK as u64);
            self.at -= n;
            let mut chunk = vec![0; usize::try_from(n).map_err(io::Error::other)?];
            self.file.read_exact_at(&mut chunk, self.at)?;
            chunk.append(&mut self.part);
            self.part = chunk;
        }
    }
}

/// How a file ends.
#[derive(Debug)]
pub(crate) struct Tail {
    /// The last line that is sound.
    pub(crate) last: Option<Line>,
    /// Whole lines after it.
    pub(crate) unsound: u64,
    /// Bytes up to the last line feed.
    pub(crate) whole: u64,
    /// All bytes.
    pub(crate) len: u64,
}

pub(crate) fn tail(file: &File) -> io::Result<Tail> {
    let from = file.metadata()?.len().saturating_sub(WINDOW);
    let near = tail_from(file, from)?;
    if near.last.is_some() || from == 0 {
        Ok(near)
    } else {
        tail_from(file, 0)
    }
}

fn tail_from(file: &File, from: u64) -> io::Result<Tail> {
    let mut lines = Lines::from(file.try_clone()?, from)?;
    if from > 0 {
        // It began before.
        lines.next()?;
    }
    let mut tail = Tail {
        last: None,
        unsound: 0,
        whole: lines.at,
        len: lines.at,
    };
    while let Some(raw) = lines.next()? {
        tail.len = raw.at + raw.len;
        if raw.whole {
            tail.whole = tail.len;
            match raw.parse() {
                Ok(line) => {
                    tail.last = Some(line);
                    tail.unsound = 0;
                }
                Err(_) => tail.unsound += 1,
            }
        }
    }
    Ok(tail)
}

/// The hash of a file's bytes from `at` on, and the first of them.
pub(crate) fn digest(file: &File, mut at: u64) -> io::Result<(Hash, Vec<u8>)> {
    let (mut sum, mut begins) = (Sha256::new(), Vec::new());
    let mut chunk = vec![0; CHUNK];
    loop {
        let n = match file.read_at(&mut chunk, at) {
            Ok(0) => return Ok((Hash::from(sum), begins)),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        sum.update(&chunk[..n]);
        let room = SHOWN - begins.len();
        begins.extend_from_slice(&chunk[..n.min(room)]);
        at += n as u64;
    }
}
