//! The audit log: who changed what, and whether the log is what was written.

use std::path::PathBuf;

use clap::Subcommand;
use lotus_audit::{AuditError, Filter, Head, Order, Record, read, verify};
use lotus_runtime::Fault;
use lotus_types::Kind;

use super::credentials::initialised;
use super::{Cx, print, print_json, table, time};

#[derive(Debug, Subcommand)]
pub(super) enum AuditCommand {
    /// List the latest calls that changed something
    List {
        /// How many
        #[arg(short = 'n', long, default_value_t = 50)]
        last: usize,
        /// Of callers whose name begins so: deals/, retrieval/r1, operator
        #[arg(long)]
        who: Option<String>,
        /// Of methods that have this in their name: Publish, Pieces/
        #[arg(long)]
        method: Option<String>,
        #[command(flatten)]
        at: At,
    },
    /// Read the whole log and say whether anything was changed, removed or put in
    ///
    /// Prints the number and the hash of the last record. Note them somewhere else: with --head they
    /// show that what was there then is there still. Without, lines that are missing at the very end
    /// cannot be seen.
    Verify {
        /// NUMBER:HASH that an earlier `audit verify` printed
        #[arg(long)]
        head: Option<Head>,
        #[command(flatten)]
        at: At,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct At {
    /// Folder of a copy of the log. Without it, `audit` in the repo; the hub may run
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl At {
    fn dir(&self, cx: &Cx) -> Result<PathBuf, Fault> {
        match &self.dir {
            Some(dir) => Ok(dir.clone()),
            None => Ok(initialised(cx)?.audit()),
        }
    }
}

pub(super) fn audit(cx: &Cx, command: &AuditCommand) -> Result<(), Fault> {
    match command {
        AuditCommand::List {
            last,
            who,
            method,
            at,
        } => {
            let filter = Filter {
                who: who.clone(),
                method: method.clone(),
                order: Order::NewestFirst,
                ..Filter::default()
            };
            let records = read(&at.dir(cx)?, filter).map_err(fault)?.take(*last);
            list(cx, records)
        }
        AuditCommand::Verify { head, at } => check(cx, *head, at),
    }
}

fn list(cx: &Cx, records: impl Iterator<Item = Result<Record, AuditError>>) -> Result<(), Fault> {
    let records = records.collect::<Result<Vec<_>, _>>().map_err(fault)?;
    if cx.json {
        return print_json(&records);
    }
    let mut out = table(&[
        "Number", "Time", "Who", "From", "Method", "About", "Outcome",
    ]);
    for r in records {
        out.add_row([
            r.seq.to_string(),
            time(r.time_unix_ms),
            r.who,
            r.from,
            r.method.trim_start_matches("/hub.v1.").into(),
            r.key,
            r.outcome,
        ]);
    }
    print(&out.to_string())
}

fn check(cx: &Cx, head: Option<Head>, at: &At) -> Result<(), Fault> {
    let dir = at.dir(cx)?;
    let found = verify(&dir, head).map_err(fault)?;
    if cx.json {
        print_json(&found)?;
    } else {
        for p in &found.problems {
            print(&p.to_string())?;
        }
        let from = found.first_file;
        print(&format!(
            "{} records in {} files{}{}",
            found.records,
            found.files,
            if from > 1 {
                format!(", the first of them {from}: earlier ones are not kept")
            } else {
                String::new()
            },
            found.head.map_or_else(String::new, |h| format!(
                "\nthe last one, to be noted elsewhere:\n  {h}"
            )),
        ))?;
    }
    if found.is_sound() {
        return Ok(());
    }
    Err(Fault::new(
        Kind::Data,
        format!(
            "the audit log in {} is not what was written: {} problems",
            dir.display(),
            found.problems.len() as u64 + found.more_problems
        ),
        "keep a copy of it as it is, and find out who could write there",
    ))
}

fn fault(e: AuditError) -> Fault {
    Fault::new(e.kind(), e.to_string(), e.fix())
}
