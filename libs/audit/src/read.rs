use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use crate::line::Line;
use crate::scan::{self, Backwards, Lines};
use crate::{AuditError, Record};

/// In which order records are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Order {
    /// The last one first.
    #[default]
    NewestFirst,
    /// The first one first.
    OldestFirst,
}

/// Which records are read: those that meet all of it. The default is all, the last one first.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Filter {
    /// What the caller's name begins with, as in `deals/`.
    pub who: Option<String>,
    /// What the method's path contains.
    pub method: Option<String>,
    /// Not appended before this, Unix milliseconds.
    pub since_unix_ms: Option<u64>,
    /// In which order.
    pub order: Order,
}

impl Filter {
    fn takes(&self, record: &Record) -> bool {
        let who = self.who.as_ref();
        let method = self.method.as_ref();
        who.is_none_or(|w| record.who.starts_with(w.as_str()))
            && method.is_none_or(|m| record.method.contains(m.as_str()))
            && self.since_unix_ms.is_none_or(|t| record.time_unix_ms >= t)
    }
}

/// The records of a log, or of a copy of one. Nothing is changed; a hub may be writing.
///
/// A line that is not sound is left out: each is looked at by itself, and [`crate::verify()`] says whether
/// all are there.
pub fn read(dir: &Path, filter: Filter) -> Result<Records, AuditError> {
    let mut files = VecDeque::from(scan::list(dir)?);
    if files.is_empty() {
        return Err(AuditError::NoLog { dir: dir.into() });
    }
    if filter.order == Order::NewestFirst {
        files.make_contiguous().reverse();
    }
    Ok(Records {
        dir: dir.into(),
        filter,
        files,
        open: None,
    })
}

/// What [`read()`] finds.
#[derive(Debug)]
pub struct Records {
    dir: PathBuf,
    filter: Filter,
    files: VecDeque<u64>,
    open: Option<(PathBuf, Reading)>,
}

#[derive(Debug)]
enum Reading {
    Forwards(Lines),
    Backwards(Backwards),
}

impl Reading {
    /// The next record; lines that are none are skipped.
    fn next(&mut self) -> std::io::Result<Option<Record>> {
        loop {
            let line = match self {
                Self::Forwards(lines) => match lines.next()? {
                    Some(raw) => raw.parse(),
                    None => return Ok(None),
                },
                Self::Backwards(lines) => match lines.next()? {
                    Some(line) => Line::parse(&line),
                    None => return Ok(None),
                },
            };
            if let Ok(Line::Record(record)) = line {
                return Ok(Some(record));
            }
        }
    }
}

impl Records {
    /// The next record of the file that is open, or of the next one; `None` at the end.
    fn step(&mut self) -> Result<Option<Record>, AuditError> {
        loop {
            if let Some((path, reading)) = &mut self.open {
                match reading.next() {
                    Ok(Some(record)) => return Ok(Some(record)),
                    Ok(None) => {}
                    Err(e) => {
                        let e = AuditError::io(path)(e);
                        self.open = None;
                        return Err(e);
                    }
                }
            }
            self.open = None;
            let Some(number) = self.files.pop_front() else {
                return Ok(None);
            };
            // It may have been removed since, to keep a number of files.
            let Some(file) = scan::open(&self.dir, number)? else {
                continue;
            };
            let path = scan::path(&self.dir, number);
            let reading = match self.filter.order {
                Order::OldestFirst => Reading::Forwards(Lines::new(file)),
                Order::NewestFirst => {
                    Reading::Backwards(Backwards::new(file).map_err(AuditError::io(&path))?)
                }
            };
            self.open = Some((path, reading));
        }
    }
}

impl Iterator for Records {
    type Item = Result<Record, AuditError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.step() {
                Ok(Some(record)) if !self.filter.takes(&record) => {}
                other => return other.transpose(),
            }
        }
    }
}
