//! Storage paths: attach, list, find, move.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::Table;
use lotus_node_client::api::TipSetKey;
use lotus_runtime::Fault;
use lotus_sealing::{HeldView, MoveView, NewMeta, NewPath, PathId, PathView};
use lotus_types::{Kind, SectorNumber, TokenAmount};
use reqwest::Method;
use serde::Serialize;

use super::cost::{Estimate, Report, agreed, lost};
use super::{Cx, bytes, print, print_json, table, time};
use crate::control::{self, DEADLINE};
use crate::control_storage::{Detach, MoveOrder, Redeclare};
use crate::run::from_node;

/// How long the hub may look through a path: a large one on slow disks takes a while.
const LOOK: Duration = Duration::from_secs(120);
/// How often the progress of a move is asked for.
const POLL: Duration = Duration::from_secs(1);
/// Sectors whose pledge is looked up for an estimate; the rest are taken to be like them.
const LOOKED_AT: usize = 200;

#[derive(Debug, Subcommand)]
pub(super) enum StorageCommand {
    /// Attach a folder in which sectors are sealed or kept
    ///
    /// A new one: `storage attach /mnt/a --init --store`. One that this hub or Lotus used before
    /// has a sectorstore.json and needs neither; its sectors are found and used.
    Attach(AttachArgs),
    /// Show the paths: room, health, what they are for
    List,
    /// Forget a path; its files stay
    ///
    /// Refused while it has the only files of a sector, with what that would cost, and for the
    /// repo's own path.
    Detach {
        /// Its id
        id: PathId,
        /// Also when it has the only files of sectors: they turn faulty
        #[arg(long)]
        really_do_it: bool,
    },
    /// Read sectorstore.json again, and look what is in the paths
    ///
    /// After files were copied by hand, or sectorstore.json was changed. A path that was not
    /// mounted and is again is found without it.
    Redeclare {
        /// One path; else all
        #[arg(long)]
        id: Option<PathId>,
    },
    /// Show where the files of a sector are
    Find {
        /// Its number
        number: u64,
    },
    /// Move a sector to another path, while it is proven
    ///
    /// The files are copied, compared and synced; then the copies are used, and the old files are
    /// deleted when no proof can be reading them any more (storage.keep_moved_secs). The hub goes
    /// on with it when this command ends, and after a restart.
    Move {
        /// The sector's number
        number: u64,
        /// The path's id
        #[arg(long)]
        to: PathId,
        /// Return at once, without waiting for the end
        #[arg(long)]
        no_wait: bool,
    },
    /// Show the moves that are not done
    Moves,
}

#[derive(Debug, Args)]
pub(super) struct AttachArgs {
    /// The folder, best the root of a mounted disk
    dir: PathBuf,
    /// Make it a new path: write its sectorstore.json
    #[arg(long)]
    init: bool,
    /// Sectors are sealed here: wants a fast disk
    #[arg(long, requires = "init")]
    seal: bool,
    /// Sealed sectors are kept here, and read for each proof
    #[arg(long, requires = "init")]
    store: bool,
    /// How much it is preferred: what counts is the weight times the room. 0: nothing new comes
    /// here
    #[arg(long, requires = "init", default_value_t = 10)]
    weight: u64,
    /// Most that sectors may take, such as 4TiB; else as much as the disk holds
    #[arg(long, requires = "init", value_parser = size, value_name = "SIZE")]
    max_storage: Option<u64>,
    /// Groups that it belongs to
    #[arg(long, requires = "init", value_delimiter = ',')]
    groups: Vec<String>,
    /// Groups that sectors may be moved to from here; else any path
    #[arg(long, requires = "init", value_delimiter = ',')]
    allow_to: Vec<String>,
    /// Never write to it: its sectors are proven, and nothing is put there or deleted
    #[arg(long)]
    read_only: bool,
}

/// Bytes, or a size such as 500GiB or 4TiB.
fn size(text: &str) -> Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        "PiB" => 50,
        _ => return Err("give bytes, or a size such as 500GiB or 4TiB".into()),
    };
    let number: u64 = number.parse().map_err(|_| "it begins with a number")?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "that is more than there is".into())
}

pub(super) async fn storage(cx: &Cx, command: StorageCommand) -> Result<(), Fault> {
    let socket = cx.control_socket()?;
    match command {
        StorageCommand::Attach(args) => attach(cx, args).await,
        StorageCommand::List => {
            let paths: Vec<PathView> = control::call(&socket, Method::GET, "/v1/storage").await?;
            show(cx, &paths)
        }
        StorageCommand::Detach { id, really_do_it } => detach(cx, id, really_do_it).await,
        StorageCommand::Redeclare { id } => {
            let what = Redeclare { id };
            let paths: Vec<PathView> = post(cx, "/v1/storage/redeclare", &what, LOOK).await?;
            show(cx, &paths)
        }
        StorageCommand::Find { number } => {
            let path = format!("/v1/storage/find/{number}");
            let held: Vec<HeldView> = control::call(&socket, Method::GET, &path).await?;
            found(cx, number, &held)
        }
        StorageCommand::Move {
            number,
            to,
            no_wait,
        } => move_to(cx, number, to, no_wait).await,
        StorageCommand::Moves => {
            let all: Vec<MoveView> =
                control::call(&socket, Method::GET, "/v1/storage/moves").await?;
            moves(cx, &all)
        }
    }
}

async fn post<T: serde::de::DeserializeOwned>(
    cx: &Cx,
    path: &str,
    body: &impl Serialize,
    limit: Duration,
) -> Result<T, Fault> {
    let socket = cx.control_socket()?;
    control::call_with(&socket, Method::POST, path, Some(body), limit).await
}

/// Forgets a path, after showing what the sectors cost that have files there alone.
async fn detach(cx: &Cx, id: PathId, really: bool) -> Result<(), Fault> {
    let path = format!("/v1/storage/only/{id}");
    let only: Vec<u64> = control::call(&cx.control_socket()?, Method::GET, &path).await?;
    let mut estimate = Estimate::default();
    if !only.is_empty() {
        let (node, cfg) = cx.node()?;
        let miner = cfg.actor()?.address();
        let mut pledged = TokenAmount::default();
        let mut looked_at = 0;
        for n in only.iter().take(LOOKED_AT) {
            let info = node
                .state_sector_get_info(miner, SectorNumber(*n), &TipSetKey::HEAD)
                .await
                .map_err(|e| from_node(&e))?;
            if let Some(info) = info {
                pledged += info.initial_pledge;
            }
            looked_at += 1;
        }
        estimate = lost(only.len() as u64, looked_at, &pledged);
        let what = format!("{} sectors with files there alone", only.len());
        agreed(cx, &what, &estimate, really)?;
    }
    let what = Detach {
        id: id.clone(),
        really,
    };
    // Without the word it is refused while sectors are lost with it.
    post::<()>(cx, "/v1/storage/detach", &what, DEADLINE).await?;
    if cx.json {
        return print_json(&Report {
            estimate: &estimate,
            done: true,
            what: serde_json::json!({ "path": id, "sectors": only }),
        });
    }
    print(&format!(
        "storage path {id} is detached; its files are as they were"
    ))
}

async fn attach(cx: &Cx, args: AttachArgs) -> Result<(), Fault> {
    let init = args.init.then_some(NewMeta {
        weight: args.weight,
        can_seal: args.seal,
        can_store: args.store,
        max_storage: args.max_storage.unwrap_or_default(),
        groups: args.groups,
        allow_to: args.allow_to,
    });
    let new = NewPath {
        // The hub has another working directory.
        dir: std::path::absolute(&args.dir)?,
        init,
        read_only: args.read_only,
    };
    let path: Option<PathView> = post(cx, "/v1/storage/attach", &new, LOOK).await?;
    let path = path.ok_or_else(|| {
        Fault::new(
            Kind::Transport,
            "the storage path was detached again",
            "see `lotus-miner storage list`",
        )
    })?;
    show(cx, &[path])
}

fn show(cx: &Cx, paths: &[PathView]) -> Result<(), Fault> {
    if cx.json {
        return print_json(&paths);
    }
    print(&list(paths).to_string())
}

fn list(paths: &[PathView]) -> Table {
    let mut out = table(&[
        "ID", "Path", "For", "Weight", "Free", "Reserved", "Limit", "Sectors", "Groups", "Health",
    ]);
    for p in paths {
        let (weight, limit, groups) = match &p.settings {
            Some(s) if s.max_storage > 0 => {
                let limit = format!("{} of {}", bytes(p.used), bytes(s.max_storage));
                (s.weight.to_string(), limit, s.groups.join(", "))
            }
            Some(s) => (s.weight.to_string(), String::new(), s.groups.join(", ")),
            None => Default::default(),
        };
        out.add_row([
            p.id.to_string(),
            p.dir.display().to_string(),
            purpose(p),
            weight,
            format!("{} of {}", bytes(p.available), bytes(p.capacity)),
            bytes(p.reserved),
            limit,
            p.sector_count.to_string(),
            groups,
            p.trouble.clone().unwrap_or_else(|| "good".into()),
        ]);
    }
    out
}

/// What a path is for, in a word or three.
fn purpose(p: &PathView) -> String {
    let mut words = Vec::new();
    match &p.settings {
        _ if p.read_only => words.push("read only"),
        Some(s) if !s.can_seal && !s.can_store => words.push("nothing new"),
        Some(s) => {
            if s.can_seal {
                words.push("seal");
            }
            if s.can_store {
                words.push("store");
            }
        }
        None => words.push("unknown"),
    }
    words.join(", ")
}

fn found(cx: &Cx, number: u64, held: &[HeldView]) -> Result<(), Fault> {
    if cx.json {
        print_json(&held)?;
    }
    // Also with --json: a script must not take nothing for something.
    if held.is_empty() {
        return Err(Fault::new(
            Kind::Data,
            format!("no attached storage path has files of sector {number}"),
            "attach the path that has them, or look again with `lotus-miner storage redeclare`",
        ));
    }
    if cx.json {
        return Ok(());
    }
    let mut out = table(&["Path", "Folder", "Files", "In use", "Note"]);
    for h in held {
        let fate = h.deleted_at_unix_ms.map(|at| match at {
            0 => "old; deleted as soon as its path allows it".to_owned(),
            at => format!("old; deleted after {} UTC", time(at)),
        });
        let note: Vec<String> = fate.into_iter().chain(h.trouble.clone()).collect();
        out.add_row([
            h.path.to_string(),
            h.dir.display().to_string(),
            h.files.join(", "),
            h.in_use.join(", "),
            note.join("; "),
        ]);
    }
    print(&out.to_string())
}

async fn move_to(cx: &Cx, number: u64, to: PathId, no_wait: bool) -> Result<(), Fault> {
    let order = MoveOrder {
        sector: number,
        to: to.clone(),
    };
    let ordered: MoveView = post(cx, "/v1/storage/moves", &order, DEADLINE).await?;
    if no_wait {
        if cx.json {
            return print_json(&ordered);
        }
        return print(&format!(
            "sector {number} goes to {to}; watch it with `lotus-miner storage moves`"
        ));
    }
    let socket = cx.control_socket()?;
    let mut told = String::new();
    loop {
        let all: Vec<MoveView> = control::call(&socket, Method::GET, "/v1/storage/moves").await?;
        let Some(now) = all.into_iter().find(|m| m.sector == number && m.to == to) else {
            break;
        };
        let line = progress(&now);
        // Progress goes beside the answer, so that that can be piped on.
        if line != told && !cx.json {
            eprintln!("{line}");
            told = line;
        }
        tokio::time::sleep(POLL).await;
    }
    let path = format!("/v1/storage/find/{number}");
    let held: Vec<HeldView> = control::call(&socket, Method::GET, &path).await?;
    found(cx, number, &held)
}

fn progress(m: &MoveView) -> String {
    let state = match (&m.trouble, m.total_bytes) {
        (Some(why), _) => format!("waits: {why}"),
        (None, 0) => "waits for its turn".into(),
        (None, total) => {
            let percent = m.done_bytes.saturating_mul(100) / total;
            format!("{} of {} ({percent} %)", bytes(m.done_bytes), bytes(total))
        }
    };
    format!("sector {} to {}: {state}", m.sector, m.to)
}

fn moves(cx: &Cx, all: &[MoveView]) -> Result<(), Fault> {
    if cx.json {
        return print_json(&all);
    }
    if all.is_empty() {
        return print("no sector is being moved");
    }
    let lines: Vec<_> = all.iter().map(progress).collect();
    print(&lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        for (text, want) in [
            ("0", Some(0)),
            ("1024", Some(1024)),
            ("4TiB", Some(4 << 40)),
            ("500 GiB", Some(500 << 30)),
            ("4TB", None),
            ("TiB", None),
            ("16384PiB", None),
            ("-1", None),
        ] {
            assert_eq!(size(text).ok(), want, "{text}");
        }
    }

    #[test]
    fn progress_says_what_it_waits_for() {
        let mut m = MoveView {
            sector: 7,
            to: "a".parse().unwrap(),
            done_bytes: 0,
            total_bytes: 0,
            trouble: None,
        };
        assert_eq!(progress(&m), "sector 7 to a: waits for its turn");
        (m.done_bytes, m.total_bytes) = (512, 2048);
        assert_eq!(progress(&m), "sector 7 to a: 512 B of 2.0 KiB (25 %)");
        m.trouble = Some("full".into());
        assert_eq!(progress(&m), "sector 7 to a: waits: full");
    }
}
