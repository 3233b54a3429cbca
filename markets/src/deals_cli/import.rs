//! Files for offline deals, one or thousands. The service knows which deals still wait, so the
//! same command goes on after any interruption.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use lotus_deals::mk20::Done;
use lotus_deals::operator::{DealRow, ListQuery};
use lotus_runtime::Fault;
use lotus_types::{Kind, PaddedSize};
use reqwest::Method;
use serde::Serialize;
use serde_json::json;
use tokio::io::AsyncReadExt as _;
use tokio_util::io::ReaderStream;

use super::Where;
use super::link::Link;

/// Deepest folder below --dir that is looked into.
const MAX_DEPTH: usize = 16;
/// Most files that are looked at.
const MAX_FILES: usize = 1_000_000;

/// `storage-deals import-data`.
#[derive(Debug, clap::Args)]
pub(crate) struct ImportData {
    #[command(flatten)]
    at: Where,
    /// ULID of a deal, or CLIENT/ULID, and its file.
    #[arg(num_args = 0..=2, value_names = ["DEAL", "FILE"], conflicts_with = "dir")]
    one: Vec<String>,
    /// Folder with files for any of the deals that wait; folders below it count too.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Files that are sent at the same time.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    parallel: u16,
    /// Show what belongs to what, and import nothing.
    #[arg(long)]
    dry_run: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// A file for a deal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Match {
    deal: String,
    client: String,
    file: PathBuf,
}

#[derive(Debug, Serialize)]
struct Failure {
    #[serde(flatten)]
    of: Match,
    error: String,
}

/// What was done.
#[derive(Debug, Default, Serialize)]
struct Report {
    imported: Vec<Match>,
    failed: Vec<Failure>,
    /// Files that belong to no deal that waits.
    unmatched: Vec<PathBuf>,
    /// Deals that still wait.
    waiting: usize,
    seconds: f64,
}

fn file_fault(path: &Path, e: &std::io::Error) -> Fault {
    Fault::new(
        Kind::Data,
        format!("{}: {e}", path.display()),
        "check the path and its permissions",
    )
}

/// Every file below a folder. Links are not followed: they lead elsewhere, or in circles.
fn files(dir: &Path) -> Result<Vec<PathBuf>, Fault> {
    let mut found = Vec::new();
    let mut folders = VecDeque::from([(dir.to_owned(), 0)]);
    while let Some((folder, depth)) = folders.pop_front() {
        let entries = std::fs::read_dir(&folder).map_err(|e| file_fault(&folder, &e))?;
        for entry in entries {
            let entry = entry.map_err(|e| file_fault(&folder, &e))?;
            let kind = entry
                .file_type()
                .map_err(|e| file_fault(&entry.path(), &e))?;
            if kind.is_dir() && depth < MAX_DEPTH {
                folders.push_back((entry.path(), depth + 1));
            } else if kind.is_file() {
                found.push(entry.path());
            }
            if found.len() > MAX_FILES {
                return Err(Fault::new(
                    Kind::Data,
                    format!("{} has more than {MAX_FILES} files", dir.display()),
                    "import its folders one by one",
                ));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Which deal gets which file: each deal one, by the file's name before its piece. `piece_of` is
/// asked only for files whose size is that of a deal without one.
fn matched(
    deals: &[DealRow],
    files: &[(PathBuf, u64)],
    mut piece_of: impl FnMut(&Path) -> Result<String, Fault>,
) -> Result<(Vec<Match>, Vec<PathBuf>), Fault> {
    let mut open: BTreeMap<(&str, &str), &DealRow> = deals
        .iter()
        .map(|d| ((d.deal.client.as_str(), d.deal.id.as_str()), d))
        .collect();
    let mut found = Vec::new();
    let mut rest = Vec::new();
    for (file, len) in files {
        let name = file
            .file_name()
            .and_then(|n| n.to_str())
            .unwrap_or_default();
        let stem = name.split('.').next().unwrap_or_default();
        // Several deals may be of one piece: a file with its name serves all of them.
        let named: Vec<_> = open
            .iter()
            .filter(|(_, d)| fits(d, *len))
            .filter(|(_, d)| {
                let names = [&d.deal.id, &d.deal.piece_cid, &d.deal.piece_cid_v2];
                names.iter().any(|n| n.eq_ignore_ascii_case(stem))
            })
            .map(|(key, _)| *key)
            .collect();
        if named.is_empty() {
            rest.push((file, *len));
        }
        for key in named {
            open.remove(&key);
            found.push((key, file));
        }
    }
    let mut unmatched = Vec::new();
    for (file, len) in rest {
        let mut own = Vec::new();
        if open.values().any(|d| fits(d, len)) {
            let piece = piece_of(file)?;
            let same = open
                .iter()
                .filter(|(_, d)| fits(d, len) && d.deal.piece_cid == piece);
            own = same.map(|(key, _)| *key).collect();
        }
        if own.is_empty() {
            unmatched.push(file.clone());
        }
        for key in own {
            open.remove(&key);
            found.push((key, file));
        }
    }
    let found = found.into_iter().map(|((client, deal), file)| Match {
        deal: deal.to_owned(),
        client: client.to_owned(),
        file: file.clone(),
    });
    Ok((found.collect(), unmatched))
}

/// Whether a file of this length can be a deal's.
fn fits(deal: &DealRow, len: u64) -> bool {
    let padded = || PaddedSize::to_hold(len).map(PaddedSize::get);
    deal.deal.raw_size == len || deal.any_length && padded() == Some(deal.deal.piece_size)
}

fn commp(file: &Path) -> Result<String, Fault> {
    let opened = File::open(file).map_err(|e| file_fault(file, &e))?;
    let piece = lotus_proofs::commp(opened).map_err(|e| file_fault(file, &e))?;
    Ok(piece.cid.to_string())
}

impl ImportData {
    pub(crate) async fn run(self) -> Result<(), Fault> {
        let began = Instant::now();
        let link = Link::new(&self.at)?;
        let waiting = ListQuery {
            source: Some("offline".into()),
            waiting: true,
            ..ListQuery::default()
        };
        let (todo, unmatched) = match (&self.dir, &self.one[..]) {
            (Some(dir), _) => {
                let deals = link.all(waiting.clone()).await?;
                let dir = dir.clone();
                let look = move || {
                    let mut sized = Vec::new();
                    for file in files(&dir)? {
                        let meta = std::fs::metadata(&file).map_err(|e| file_fault(&file, &e))?;
                        sized.push((file, meta.len()));
                    }
                    matched(&deals, &sized, commp)
                };
                let looked = tokio::task::spawn_blocking(look).await;
                looked.map_err(|e| Fault::new(Kind::Fatal, e.to_string(), "report it"))??
            }
            (None, [deal, file]) => {
                let row = link.detail(deal).await?.row;
                let one = Match {
                    deal: row.deal.id,
                    client: row.deal.client,
                    file: file.into(),
                };
                (vec![one], vec![])
            }
            (None, _) => {
                return Err(Fault::new(
                    Kind::Config,
                    "neither a deal with its file nor a folder is named",
                    "use `import-data DEAL FILE` or `import-data --dir FOLDER`",
                ));
            }
        };
        let mut report = Report {
            unmatched,
            ..Report::default()
        };
        if self.dry_run {
            report.imported = todo;
        } else {
            self.import(&link, todo, &mut report).await?;
        }
        report.waiting = link.all(waiting).await?.len();
        report.seconds = began.elapsed().as_secs_f64();
        self.show(&report)
    }

    async fn import(
        &self,
        link: &Link,
        todo: Vec<Match>,
        report: &mut Report,
    ) -> Result<(), Fault> {
        let sizes: HashMap<&Path, u64> = todo
            .iter()
            .filter_map(|m| Some((m.file.as_path(), std::fs::metadata(&m.file).ok()?.len())))
            .collect();
        let total = todo
            .iter()
            .filter_map(|m| sizes.get(m.file.as_path()))
            .sum();
        let bars = MultiProgress::new();
        let style = ProgressStyle::with_template(
            "{prefix:>28} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        let all = bars.add(ProgressBar::new(total));
        all.set_style(style.clone());
        all.set_prefix(format!("{} files", todo.len()));
        let imports = todo.iter().map(|one| {
            let (bars, style, all) = (&bars, &style, &all);
            async move {
                let bar = bars.add(ProgressBar::new(0));
                bar.set_style(style.clone());
                bar.set_prefix(one.deal.clone());
                let done = send(link, one, &bar, all).await;
                bar.finish_and_clear();
                (one.clone(), done)
            }
        });
        let mut imports = stream::iter(imports).buffer_unordered(self.parallel.into());
        while let Some((one, done)) = imports.next().await {
            match done {
                Ok(()) => report.imported.push(one),
                // The others will fare no better.
                Err(e) if matches!(e.kind, Kind::Transport | Kind::Config) => return Err(e),
                Err(e) => report.failed.push(Failure {
                    of: one,
                    error: e.message,
                }),
            }
        }
        all.finish_and_clear();
        Ok(())
    }

    fn show(&self, report: &Report) -> Result<(), Fault> {
        if self.json {
            println!("{}", json!(report));
        } else {
            let verb = if self.dry_run {
                "would import"
            } else {
                "imported"
            };
            for one in &report.imported {
                println!("{verb} {} for {}", one.file.display(), one.deal);
            }
            for Failure { of, error } in &report.failed {
                println!("FAILED {} for {}: {error}", of.file.display(), of.deal);
            }
            for file in &report.unmatched {
                println!("no deal waits for {}", file.display());
            }
            println!(
                "{} imported, {} failed, {} files without a deal, {} deals still wait, {:.1} s",
                if self.dry_run {
                    0
                } else {
                    report.imported.len()
                },
                report.failed.len(),
                report.unmatched.len(),
                report.waiting,
                report.seconds
            );
        }
        if report.failed.is_empty() {
            return Ok(());
        }
        let deals: BTreeSet<&str> = report.failed.iter().map(|f| f.of.deal.as_str()).collect();
        Err(Fault::new(
            Kind::Data,
            format!("{} deals did not get their data", deals.len()),
            "see the reasons; run the command again for those that are left",
        ))
    }
}

/// Opens a file. A pipe would wait for its writer, and a device has no end.
async fn opened(path: &Path) -> Result<(tokio::fs::File, u64), Fault> {
    let fault = |e| file_fault(path, &e);
    let meta = tokio::fs::metadata(path).await.map_err(fault)?;
    if !meta.is_file() {
        return Err(Fault::new(
            Kind::Data,
            format!("{} is no file", path.display()),
            "name the file with the deal's bytes",
        ));
    }
    let file = tokio::fs::File::open(path).await.map_err(fault)?;
    Ok((file, meta.len()))
}

async fn send(link: &Link, one: &Match, bar: &ProgressBar, all: &ProgressBar) -> Result<(), Fault> {
    let (file, len) = opened(&one.file).await?;
    bar.set_length(len);
    let (own, sum) = (bar.clone(), all.clone());
    // What is written to it meanwhile is not what was matched.
    let file = file.take(len);
    let bytes = ReaderStream::with_capacity(file, 1 << 20).inspect_ok(move |part| {
        own.inc(part.len() as u64);
        sum.inc(part.len() as u64);
    });
    let path = format!("/deals/{}/{}/data", one.client, one.deal);
    let put = link
        .request(Method::PUT, &path)
        .header("content-length", len)
        .body(reqwest::Body::wrap_stream(bytes));
    let _done: Done = link.send(put).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lotus_deals::mk20::DealStatus;

    fn deal(id: &str, piece: &str, raw_size: u64) -> DealRow {
        DealRow {
            deal: DealStatus {
                id: id.into(),
                client: "t1a".into(),
                piece_cid: piece.into(),
                piece_cid_v2: format!("{piece}v2"),
                raw_size,
                piece_size: 128,
                ..DealStatus::default()
            },
            source: "offline".into(),
            format: "car".into(),
            any_length: false,
            accepted_unix_ms: 0,
            arriving: false,
            checking: false,
            transfer_ms: 0,
        }
    }

    #[test]
    fn files_are_matched_by_name_and_by_piece() {
        let deals = [
            deal("01A", "p1", 10),
            deal("01B", "p2", 20),
            deal("01C", "p3", 30),
            deal("01D", "p3", 30),
            deal("01E", "p5", 50),
            DealRow {
                any_length: true,
                ..deal("01F", "p6", 127)
            },
        ];
        let files: Vec<(PathBuf, u64)> = [
            ("d/01a.car", 10),
            ("d/p2v2.car.zst", 20),
            ("d/x", 30),
            ("d/y", 40),
            ("d/01E.car", 51),
            ("d/z", 50),
            ("d/p6", 128),
            ("d/01F.car", 64),
        ]
        .map(|(f, n)| (f.into(), n))
        .into();
        let mut asked = Vec::new();
        let (found, unmatched) = matched(&deals, &files, |f| {
            asked.push(f.to_owned());
            Ok(if f.ends_with("x") { "p3" } else { "other" }.into())
        })
        .unwrap();
        let pairs: Vec<_> = found
            .iter()
            .map(|m| (m.deal.as_str(), m.file.to_str().unwrap()))
            .collect();
        assert_eq!(
            pairs,
            [
                ("01A", "d/01a.car"),
                ("01B", "d/p2v2.car.zst"),
                ("01F", "d/01F.car"),
                ("01C", "d/x"),
                ("01D", "d/x")
            ]
        );
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(unmatched, paths(&["d/y", "d/01E.car", "d/z", "d/p6"]));
        assert_eq!(asked, paths(&["d/x", "d/z"]), "only where the size fits");
    }

    #[test]
    fn links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("in")).unwrap();
        std::fs::write(dir.path().join("in/b"), "x").unwrap();
        std::fs::write(dir.path().join("a"), "x").unwrap();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("in/loop")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("c")).unwrap();
        let found = files(dir.path()).unwrap();
        assert_eq!(found, [dir.path().join("a"), dir.path().join("in/b")]);
    }

    #[tokio::test]
    async fn what_is_no_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut pipe = std::process::Command::new("mkfifo");
        assert!(pipe.arg(path("pipe")).status().unwrap().success());
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        std::fs::create_dir(path("folder")).unwrap();
        std::fs::write(path("file"), "abc").unwrap();
        for (to, name) in [
            ("/dev/zero", "zeros"),
            ("pipe", "to-pipe"),
            ("round", "round"),
            ("absent", "nowhere"),
            ("folder/../file", "to-file"),
        ] {
            std::os::unix::fs::symlink(to, path(name)).unwrap();
        }
        assert_eq!(files(dir.path()).unwrap(), [path("file")]);
        for name in ["pipe", "socket", "folder", "zeros", "to-pipe"] {
            let refused = opened(&path(name)).await.unwrap_err();
            assert!(refused.message.ends_with("is no file"), "{refused}");
            assert!(refused.message.contains(name), "{refused}");
        }
        for name in ["round", "nowhere", "file/x"] {
            let refused = opened(&path(name)).await.unwrap_err();
            assert!(refused.message.contains(name), "{refused}");
        }
        assert_eq!(opened(&path("file")).await.unwrap().1, 3);
        assert_eq!(opened(&path("to-file")).await.unwrap().1, 3);
    }
}
