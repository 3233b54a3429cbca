use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use lotus_runtime::Fault;
use reqwest::Method;

use super::{Cx, bytes, print, print_json, table, time};
use crate::backup::{self, Made, QUIET};
use crate::control;
use crate::operations::BackupRequest;

/// How long a hub may take to write a backup to a slow disk.
const LIMIT: Duration = Duration::from_secs(3_600);

#[derive(Debug, Args)]
pub(super) struct BackupArgs {
    /// File to write; it must not exist
    file: PathBuf,
    /// The hub does not run: read its repo directly
    #[arg(long)]
    offline: bool,
    /// Check a backup that was made before instead of making one
    #[arg(long, conflicts_with = "offline")]
    verify: bool,
}

/// Makes a backup through the running hub, or without it, or checks one.
pub(super) async fn backup(cx: &Cx, args: BackupArgs) -> Result<(), Fault> {
    let file = std::path::absolute(&args.file)?;
    let made = if args.verify {
        backup::verify(&file)?
    } else if args.offline {
        let open = cx.repo()?.open()?;
        backup::make(&open.journal, &open.repo, &file)?
    } else {
        let socket = cx.control_socket()?;
        let wanted = BackupRequest { file };
        let made =
            control::call_with(&socket, Method::POST, "/v1/backup", Some(&wanted), LIMIT).await;
        made.map_err(|f| match f.kind {
            lotus_types::Kind::Transport => Fault {
                fix: format!("{}; if the hub is stopped, use --offline", f.fix),
                ..f
            },
            _ => f,
        })?
    };
    if cx.json {
        return print_json(&made);
    }
    let verb = if args.verify {
        "is good"
    } else {
        "was written and read back"
    };
    print(&format!(
        "{}\n{} {verb}\nnot in it: pieces and sectors; they are files below the repo",
        rows(&made),
        made.file.display()
    ))
}

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// The backup
    file: PathBuf,
    /// The hub that made the backup is stopped for good: its host is lost, or it will not start
    /// again
    #[arg(long)]
    really_do_it: bool,
}

/// Makes a new repo from a backup.
pub(super) fn restore(cx: &Cx, args: &RestoreArgs) -> Result<(), Fault> {
    let repo = cx.repo()?;
    let file = std::path::absolute(&args.file)?;
    if !args.really_do_it {
        let made = backup::verify(&file)?;
        if cx.json {
            return print_json(&made);
        }
        return print(&format!(
            "{}\n{} is good; nothing was done.\n\
             Two hubs of one miner cost it its collateral: they sign two blocks at one height, and\n\
             are slashed. Stop the hub that made this backup, for good, and then add\n\
             --really-do-it.",
            rows(&made),
            file.display()
        ));
    }
    let made = backup::restore(&file, &repo)?;
    if cx.json {
        return print_json(&made);
    }
    print(&next(&made, repo.root()))
}

fn next(made: &Made, root: &Path) -> String {
    let root = root.display();
    format!(
        "{}\n{root} was restored.\n\
         Before `lotus-miner run --repo {root}`:\n\
         - the old hub must never run again;\n\
         - put its pieces/ and storage/ folders back below {root}, and mount its other storage\n  \
           paths where they were; sectors that began after the backup are not known to this\n  \
           hub;\n\
         - config.toml is that of the old host: check addresses and [node].\n\
         This hub will not mine for {QUIET} epochs after its first head. If the chain then has a\n\
         block of this miner that its log lacks, it goes on refusing, says so in\n\
         `lotus-miner info`, and goes on after `lotus-miner mining allow`.",
        rows(made),
    )
}

fn rows(made: &Made) -> String {
    let m = &made.manifest;
    let mut out = table(&["Backup", &made.file.display().to_string()]);
    for (name, value) in [
        ("Miner", format!("{}, {} sectors", m.actor, m.sector_size)),
        ("Made (UTC)", time(m.created_unix_ms)),
        ("Release", m.release.clone()),
        ("Generation", m.generation.to_string()),
        (
            "Journal",
            format!("{} entries, {}", m.entries, bytes(m.bytes)),
        ),
        ("SHA-256", m.sha256.clone()),
        ("Size of the file", bytes(made.size)),
    ] {
        out.add_row([name, value.as_str()]);
    }
    out.to_string()
}
