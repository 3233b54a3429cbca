use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::line::{FORMAT, Flaw, Header, Line};
use crate::scan::{self, Lines};
use crate::{AuditError, Hash, Head, Record};

/// Problems that are listed; of more, only the number is known.
const LISTED: usize = 100;

/// What [`verify()`] found.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize)]
pub struct Verified {
    /// Identity of the log.
    pub log: String,
    /// Number of the first file that was read. Above 1, earlier ones are not kept.
    pub first_file: u64,
    /// Files that were read.
    pub files: u64,
    /// Sound records in them.
    pub records: u64,
    /// Number of the first of them.
    pub first_seq: Option<u64>,
    /// When it was appended.
    pub first_unix_ms: Option<u64>,
    /// When the last one was appended.
    pub last_unix_ms: Option<u64>,
    /// The last one, to be noted elsewhere.
    pub head: Option<Head>,
    /// Parts of lines that were cut after crashes; each has a record.
    pub recovered: u64,
    /// Bytes at the very end that are no whole line: of a write that goes on, or that a crash ended. No
    /// problem: nothing that was acknowledged is in them, and opening the log notes them.
    pub torn_bytes: u64,
    /// What is wrong, in the order of the files; 100 at most.
    pub problems: Vec<Problem>,
    /// Problems that are not listed.
    pub more_problems: u64,
}

impl Verified {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Something that is wrong with a log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Name of the file, or empty if it is about the log as a whole.
    pub file: String,
    /// Number of the line in the file, from 1; 0 if it is about the whole file.
    pub line: u64,
    /// What is wrong.
    pub trouble: Trouble,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.file.as_str(), self.line) {
            ("", _) => {}
            (file, 0) => write!(f, "{file}: ")?,
            (file, line) => write!(f, "{file}:{line}: ")?,
        }
        self.trouble.fmt(f)
    }
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Trouble {
    /// A line is not what was written.
    Changed,
    /// Bytes that are no line of a log: they were put in, or a line was changed in its end.
    NotALine,
    /// A header or a record that belongs elsewhere.
    Misplaced,
    /// Records are missing before this line.
    Missing {
        /// Number of the first of them.
        first: u64,
        /// And of the last.
        last: u64,
    },
    /// A record that was moved, repeated, or put in.
    OutOfOrder {
        /// Its number.
        seq: u64,
        /// The one that is due.
        due: u64,
    },
    /// The line before is another one than that after which this was written.
    Unlinked,
    /// Files are missing.
    MissingFiles {
        /// Number of the first of them.
        first: u64,
        /// And of the last.
        last: u64,
    },
    /// A file ends within a line, and others follow.
    Torn {
        /// Bytes of that line.
        bytes: u64,
    },
    /// The header is of another log or of another file.
    OtherFile,
    /// The format is not known to this version.
    Format {
        /// Its number.
        format: u32,
    },
    /// The log ends before the head that was given: records at its end are missing.
    HeadMissing {
        /// Number of the record in that head.
        expected: u64,
        /// Number of the last record.
        last: u64,
    },
    /// The record of the head that was given has another hash: the log was written anew.
    HeadDiffers {
        /// Number of the record.
        seq: u64,
    },
    /// The record of the head that was given is not there to be compared.
    HeadUnchecked {
        /// Number of the record.
        seq: u64,
    },
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Changed => write!(f, "the line was changed: its hash is of other bytes"),
            Self::NotALine => write!(f, "this is no line of an audit log"),
            Self::Misplaced => write!(
                f,
                "this line has another place: a header is the first line of a file, and no other is"
            ),
            Self::Missing { first, last } if first == last => {
                write!(f, "record {first} is missing before this line")
            }
            Self::Missing { first, last } => {
                write!(f, "records {first} to {last} are missing before this line")
            }
            Self::OutOfOrder { seq, due } => write!(
                f,
                "record {seq} is here, where {due} is due: it was moved, repeated or put in"
            ),
            Self::Unlinked => write!(
                f,
                "the line before is not the one after which this was written"
            ),
            Self::MissingFiles { first, last } if first == last => {
                write!(f, "file {} is missing", scan::name(*first))
            }
            Self::MissingFiles { first, last } => write!(
                f,
                "files {} to {} are missing",
                scan::name(*first),
                scan::name(*last)
            ),
            Self::Torn { bytes } => write!(
                f,
                "the file ends in {bytes} bytes of a line, and other files follow"
            ),
            Self::OtherFile => write!(f, "the header is of another log or of another file"),
            Self::Format { format } => {
                write!(f, "format {format} is not known to this release")
            }
            Self::HeadMissing { expected, last } => write!(
                f,
                "the log ends at record {last}, and had record {expected}: its end is missing"
            ),
            Self::HeadDiffers { seq } => write!(
                f,
                "record {seq} is not the one that was noted: the log was written anew"
            ),
            Self::HeadUnchecked { seq } => write!(
                f,
                "record {seq}, which was noted, is not there to be compared"
            ),
        }
    }
}

/// Reads a log, or a copy of one, whole, and says what is wrong with it. `expected` is any head that it
/// ever had: the log must have that past, and may have gone on. Nothing is changed; a hub may be writing.
///
/// Blocks for as long as it takes to read the files. Memory does not grow with them.
pub fn verify(dir: &Path, expected: Option<Head>) -> Result<Verified, AuditError> {
    let numbers = scan::list(dir)?;
    let mut check = Check {
        expected,
        ..Check::default()
    };
    for number in &numbers {
        // One that is gone since is like one that was never there.
        if let Some(file) = scan::open(dir, *number)? {
            let last = Some(number) == numbers.last();
            check
                .file(*number, Lines::new(file), last)
                .map_err(AuditError::io(&scan::path(dir, *number)))?;
        }
    }
    if check.found.files == 0 {
        return Err(AuditError::NoLog { dir: dir.into() });
    }
    Ok(check.end())
}

#[derive(Debug, Default)]
struct Check {
    found: Verified,
    /// The head that is still to be seen.
    expected: Option<Head>,
    /// File and line that are looked at.
    file: u64,
    line: u64,
    /// Number of the next record and hash of the line before. Unknown at the start, and after a problem
    /// that was told: it is not to be told twice.
    due: Option<u64>,
    prev: Option<Hash>,
    /// Lines since then that are not sound: each may stand for a record, or was put in.
    unsound: u64,
    /// Number of the oldest file that the log says it keeps.
    oldest: u64,
}

impl Check {
    fn problem(&mut self, trouble: Trouble) {
        let file = if self.file == 0 {
            String::new()
        } else {
            scan::name(self.file)
        };
        if self.found.problems.len() < LISTED {
            self.found.problems.push(Problem {
                file,
                line: self.line,
                trouble,
            });
        } else {
            self.found.more_problems += 1;
        }
    }

    fn file(&mut self, number: u64, mut lines: Lines, last: bool) -> std::io::Result<()> {
        let before = std::mem::replace(&mut self.file, number);
        self.line = 0;
        if self.found.files == 0 {
            self.found.first_file = number;
            if number == 1 {
                (self.due, self.prev) = (Some(1), Some(Hash::default()));
            }
        } else if number != before + 1 {
            self.problem(Trouble::MissingFiles {
                first: before + 1,
                last: number - 1,
            });
            (self.due, self.prev) = (None, None);
        }
        self.found.files += 1;
        while let Some(raw) = lines.next()? {
            self.line += 1;
            if !raw.whole {
                self.unsound += 1;
                self.prev = None;
                if !last {
                    self.problem(Trouble::Torn { bytes: raw.len });
                    continue;
                }
                self.found.torn_bytes = raw.len;
                if self.line == 1 {
                    // A file gets its name once the header is in it: no crash does this.
                    self.problem(Trouble::NotALine);
                }
                continue;
            }
            match (raw.parse(), self.line) {
                (Ok(Line::Header(header)), 1) => self.header(number, &header),
                (Ok(Line::Record(record)), 1) => {
                    self.problem(Trouble::Misplaced);
                    self.prev = None;
                    self.record(&record);
                }
                (Ok(Line::Record(record)), _) => self.record(&record),
                (Ok(Line::Header(_)), _) => {
                    self.problem(Trouble::Misplaced);
                    self.prev = None;
                }
                (Err(flaw), _) => {
                    self.problem(match flaw {
                        Flaw::Form => Trouble::NotALine,
                        Flaw::Hash => Trouble::Changed,
                    });
                    self.unsound += 1;
                    self.prev = None;
                }
            }
        }
        if self.line == 0 {
            // Not even a header.
            self.problem(Trouble::NotALine);
            self.prev = None;
        }
        Ok(())
    }

    fn header(&mut self, number: u64, header: &Header) {
        if self.found.log.is_empty() {
            self.found.log.clone_from(&header.log);
        }
        if header.format != FORMAT {
            self.problem(Trouble::Format {
                format: header.format,
            });
        }
        if header.file != number || header.log != self.found.log {
            self.problem(Trouble::OtherFile);
            (self.due, self.prev) = (None, None);
        }
        self.place(header.seq, header.prev);
        self.due = Some(header.seq);
        self.prev = Some(header.hash);
        self.unsound = 0;
        self.oldest = self.oldest.max(header.oldest.min(number));
        // The last record before the files that are kept, or none at all, may have been noted.
        let head = header.head();
        if self.found.head.is_none() {
            self.found.head = Some(head);
            self.compare(head);
        }
    }

    fn record(&mut self, record: &Record) {
        let inside = self.place(record.seq, record.prev);
        let head = record.head();
        if inside {
            self.due = Some(record.seq.saturating_add(1));
            self.prev = Some(record.hash);
            self.unsound = 0;
            self.found.head = Some(head);
        } else {
            self.prev = None;
        }
        self.compare(head);
        self.found.records += 1;
        self.found.first_seq.get_or_insert(record.seq);
        self.found.first_unix_ms.get_or_insert(record.time_unix_ms);
        self.found.last_unix_ms = Some(record.time_unix_ms);
        self.found.recovered += u64::from(record.recovered.is_some());
    }

    /// Whether a line is not before its place; says what is wrong if it is not in it.
    fn place(&mut self, seq: u64, prev: Hash) -> bool {
        let most = self.due.map(|due| due.saturating_add(self.unsound));
        match (self.due, most) {
            (_, Some(most)) if seq > most => self.problem(Trouble::Missing {
                first: most,
                last: seq - 1,
            }),
            (Some(due), _) if seq < due => {
                self.problem(Trouble::OutOfOrder { seq, due });
                return false;
            }
            _ if self.prev.is_some_and(|p| p != prev) => self.problem(Trouble::Unlinked),
            _ => {}
        }
        true
    }

    fn compare(&mut self, head: Head) {
        if let Some(expected) = self.expected
            && expected.seq == head.seq
        {
            if expected != head {
                self.problem(Trouble::HeadDiffers { seq: head.seq });
            }
            self.expected = None;
        }
    }

    fn end(mut self) -> Verified {
        (self.file, self.line) = (0, 0);
        let first = self.found.first_file;
        if self.oldest < first && self.oldest > 0 {
            self.problem(Trouble::MissingFiles {
                first: self.oldest,
                last: first - 1,
            });
        }
        if let Some(expected) = self.expected.take() {
            let last = self.found.head.map_or(0, |h| h.seq);
            self.problem(if expected.seq > last {
                Trouble::HeadMissing {
                    expected: expected.seq,
                    last,
                }
            } else {
                Trouble::HeadUnchecked { seq: expected.seq }
            });
        }
        self.found
    }
}
