//! The hub's audit log: who changed what and when, so that nobody can alter the answer unseen.
//!
//! [`Audit`] appends [`Call`]s from one thread, in groups: one write and one sync for all that wait.
//! [`verify()`] says whether a log, or a copy of it, is what was written; [`read()`] lists it. Both
//! only read, and may run beside the hub.
//!
//! # Format
//!
//! A folder of its own (mode 0700) with files `00000001.jsonl`, `00000002.jsonl`, … (mode 0600). Each
//! line is a JSON object. The first line of a file is its header, all others are [`Record`]s with `seq`
//! from 1 without a gap, over all files:
//!
//! ```text
//! {"log":"5f0c…","format":1,"file":1,"seq":1,"oldest":1,"time_unix_ms":1767225600000,"prev":"0000…","hash":"63b1…"}
//! {"seq":1,"time_unix_ms":1767225600123,"who":"deals/d1","from":"","method":"/…","key":"…","outcome":"ok","generation":3,"prev":"63b1…","hash":"a94a…"}
//! ```
//!
//! `hash` is the SHA-256 of the line's bytes before `,"hash"`. Among them is `prev`, the hash of the line
//! before (64 zeros in the first line of all), so a hash vouches for every line up to its own. A header
//! links to the last line of the file before, and names the log, the file's number, the `seq` of its
//! first record, and the oldest file that was kept when it was begun.
//!
//! # What is detected
//!
//! Without help from elsewhere: a byte that was changed, added or removed in any line; lines that are
//! missing before the last one, or were moved, repeated or put in; files that are missing before the
//! last one, unless the hub itself removed them ([`AuditConfig::keep_files`]), were swapped, or are of
//! another log. Part of a line at the very end is told apart ([`Verified::torn_bytes`]), as a crash leaves
//! that, too.
//!
//! What a chain alone can not show: lines missing at the very end, and a log that was written anew from
//! some line to its end. There is no secret in it, so whoever may write the files can do either. Both show
//! against a [`Head`] (`seq:hash`) that was noted where that person can not write: [`verify()`] takes any
//! head that the log ever had. [`Audit::head`] and [`Verified::head`] are to be noted, the more often the
//! better: what came after the last noted one is not covered.
//!
//! Left out: a file beside the log with the head in it, and a key on the same host. Whoever can change the
//! one can change the other, and a crash takes nothing that was acknowledged.
//!
//! Never detected: a call that was not appended, and a record that was wrong from the start.
//!
//! # Crashes and damage
//!
//! A record whose [`Ticket`] is done is synced. A process that dies leaves at most a part of a line, without
//! its line feed, at the end of the last file. [`Audit::open`] cuts that part and notes it in a record of its
//! own ([`Record::recovered`]); it never removes a whole line. Damaged lines stay where they are, for
//! [`verify()`] to name. If the last lines are damaged, the log goes on after the last sound one, and each of
//! the others counts as one record.
//!
//! An append that fails leaves nothing in the log, and what is appended next takes its place. The exception
//! is a process that ends before the failed part was cut: a record may then be there although its call was
//! told otherwise.

mod audit;
mod config;
mod disk;
mod error;
mod line;
mod log;
mod read;
mod scan;
#[cfg(test)]
mod tests;
mod verify;

pub use audit::{Audit, Ticket};
pub use config::AuditConfig;
pub use error::AuditError;
pub use line::{Call, Hash, Head, MAX_TEXT, Record, Recovered};
pub use log::Opened;
pub use read::{Filter, Order, Records, read};
pub use verify::{Problem, Trouble, Verified, verify};
