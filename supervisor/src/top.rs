//! `lotus-supervisor top`: what runs, each second anew. What it takes is measured here and not in
//! the supervisor, which sleeps meanwhile.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use lotus_runtime::Fault;
use lotus_types::Kind;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::control;
use crate::proto::{StatusRequest, StatusResponse};

/// How often it is drawn.
const EVERY: Duration = Duration::from_secs(1);

/// What a process and all that it started took so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Usage {
    /// Clock ticks of processor time.
    ticks: u64,
    /// Bytes of memory.
    rss: u64,
}

/// What is drawn of one process.
#[derive(Clone, Debug, PartialEq)]
struct Row {
    name: String,
    pid: u32,
    state: String,
    cpu: Option<f64>,
    rss: u64,
    restarts: u32,
    uptime: Duration,
    reason: String,
}

/// Draws until `q` or Ctrl-C. Without a terminal it prints once.
pub(crate) async fn run(root: &Path) -> Result<(), Fault> {
    let (mut before, mut at) = (usage(), Instant::now());
    let screen = if io::stdout().is_terminal() && io::stdin().is_terminal() {
        Some(Screen::enter()?)
    } else {
        // Of two looks the second one knows how much time was used.
        tokio::time::sleep(EVERY).await;
        None
    };
    loop {
        let status = async {
            let mut client = control::client(root).await?;
            let answer = client.status(StatusRequest {}).await.map_err(|s| {
                Fault::new(
                    Kind::Transport,
                    s.message(),
                    "see `lotus-supervisor status`",
                )
            })?;
            Ok::<_, Fault>(answer.into_inner())
        };
        let status = status.await;
        let (now, seconds) = (usage(), at.elapsed().as_secs_f64());
        let text = match &status {
            Ok(all) => draw(&rows(all, &before, &now, seconds), notes(all)),
            // It may be replaced just now.
            Err(e) if screen.is_some() => format!("{e}\n"),
            Err(e) => return Err(e.clone()),
        };
        (before, at) = (now, Instant::now());
        let Some(screen) = &screen else {
            print!("{text}");
            return Ok(());
        };
        screen.show(&text)?;
        if screen.left_within(EVERY)? {
            return Ok(());
        }
    }
}

fn rows(
    all: &StatusResponse,
    before: &BTreeMap<u32, Usage>,
    now: &BTreeMap<u32, Usage>,
    seconds: f64,
) -> Vec<Row> {
    let row = |p: &crate::proto::ProcessStatus| {
        let used = now.get(&p.pid).copied().unwrap_or_default();
        let cpu = before.get(&p.pid).map(|b| {
            #[expect(clippy::cast_precision_loss, reason = "a few hundred ticks")]
            let ticked = used.ticks.saturating_sub(b.ticks) as f64;
            100.0 * ticked / TICKS / seconds.max(0.001)
        });
        Row {
            name: p.name.clone(),
            pid: p.pid,
            state: p.state.clone(),
            cpu: cpu.filter(|_| p.pid > 0),
            rss: used.rss,
            restarts: p.restarts,
            uptime: Duration::from_secs(p.uptime_ms / 1000),
            reason: p.reason.clone(),
        }
    };
    all.processes.iter().map(row).collect()
}

/// What else there is to say.
fn notes(all: &StatusResponse) -> Vec<String> {
    let upgrade = all.upgrade.as_ref().and_then(crate::progress::line);
    upgrade.into_iter().collect()
}

/// The picture, one line each.
fn draw(rows: &[Row], notes: Vec<String>) -> String {
    let mut text = format!(
        "{:<14} {:>8} {:<9} {:>6} {:>9} {:>8} {:>12}  {}\n",
        "PROCESS", "PID", "STATE", "CPU %", "RSS", "RESTARTS", "UPTIME", "REASON"
    );
    for r in rows {
        let (pid, rss, uptime) = if r.pid > 0 {
            let uptime = humantime::format_duration(r.uptime).to_string();
            // Days and hours, or minutes and seconds: more is not looked at.
            let words: Vec<&str> = uptime.split(' ').take(2).collect();
            (r.pid.to_string(), size(r.rss), words.join(" "))
        } else {
            ("-".into(), "-".into(), "-".into())
        };
        let cpu = r.cpu.map_or_else(|| "-".into(), |c| format!("{c:.1}"));
        // A reason is of a program, and must not move the cursor.
        let reason: String = r.reason.chars().filter(|c| !c.is_control()).collect();
        let line = format!(
            "{:<14} {:>8} {:<9} {:>6} {:>9} {:>8} {:>12}  {}",
            r.name, pid, r.state, cpu, rss, r.restarts, uptime, reason
        );
        text += line.trim_end();
        text.push('\n');
    }
    for note in notes {
        text += &note;
        text.push('\n');
    }
    text
}

fn size(bytes: u64) -> String {
    match bytes >> 20 {
        mib @ 0..=9_999 => format!("{mib} MiB"),
        mib => format!("{} GiB", mib >> 10),
    }
}

/// What each process group took: a process leads its own, and what it starts belongs to it.
fn usage() -> BTreeMap<u32, Usage> {
    let mut all: BTreeMap<u32, Usage> = BTreeMap::new();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for entry in processes {
        let name = entry.file_name();
        if !name
            .to_str()
            .is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()))
        {
            continue;
        }
        let read = |file: &str| std::fs::read_to_string(entry.path().join(file));
        let (stat, status) = (read("stat"), read("status"));
        let used = parse(&stat.unwrap_or_default(), &status.unwrap_or_default());
        if let Some((group, used)) = used {
            let sum = all.entry(group).or_default();
            sum.ticks += used.ticks;
            sum.rss += used.rss;
        }
    }
    all
}

/// Process group and processor time (fields 5, 14 and 15 of /proc/PID/stat), and memory (VmRSS of
/// /proc/PID/status, which one that ended has not).
fn parse(stat: &str, status: &str) -> Option<(u32, Usage)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let words: Vec<&str> = rest.split_whitespace().collect();
    let number = |field: usize| words.get(field - 3)?.parse::<u64>().ok();
    let kib = status.lines().find_map(|l| {
        let words = l.strip_prefix("VmRSS:")?;
        words.split_whitespace().next()?.parse::<u64>().ok()
    });
    let usage = Usage {
        ticks: number(14)? + number(15)?,
        rss: kib.unwrap_or(0) << 10,
    };
    Some((u32::try_from(number(5)?).ok()?, usage))
}

/// Clock ticks a second in /proc: 100 on every Linux that we run on, whatever the kernel's own
/// timer is (USER_HZ, proc_pid_stat(5)).
const TICKS: f64 = 100.0;

/// A terminal in which every key is heard at once, with a page of its own.
struct Screen {
    before: Termios,
}

impl Screen {
    fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin().as_fd())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &raw)?;
        let screen = Self { before };
        // Another page, no cursor, and long lines are cut off.
        print!("\x1b[?1049h\x1b[?25l\x1b[?7l");
        io::stdout().flush()?;
        Ok(screen)
    }

    fn show(&self, text: &str) -> io::Result<()> {
        let mut page = String::from("\x1b[H");
        for line in text.lines() {
            // What was there before is cleared behind each line and below.
            page += line;
            page += "\x1b[K\r\n";
        }
        page += "\x1b[K\r\nq leaves\x1b[J";
        print!("{page}");
        io::stdout().flush()
    }

    /// Whether somebody leaves within this time: `q`, Ctrl-C, Ctrl-D, or the end of the input.
    fn left_within(&self, limit: Duration) -> io::Result<bool> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let timeout =
                nix::poll::PollTimeout::try_from(left).unwrap_or(nix::poll::PollTimeout::ZERO);
            let stdin = io::stdin();
            let mut fds = [nix::poll::PollFd::new(
                stdin.as_fd(),
                nix::poll::PollFlags::POLLIN,
            )];
            match nix::poll::poll(&mut fds, timeout) {
                Ok(0) => return Ok(false),
                Ok(_) => {
                    let mut key = [0u8; 1];
                    if stdin.lock().read(&mut key)? == 0 || b"qQ\x03\x04".contains(&key[0]) {
                        return Ok(true);
                    }
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        print!("\x1b[?7h\x1b[?25h\x1b[?1049l");
        drop(io::stdout().flush());
        if let Err(e) = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &self.before) {
            eprintln!("the terminal stays as it is ({e}): `reset` mends it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::ProcessStatus;

    #[test]
    fn a_picture_has_a_line_for_each_process() {
        let all = StatusResponse {
            processes: vec![
                ProcessStatus {
                    name: "hub".into(),
                    state: "ready".into(),
                    pid: 7,
                    ready: true,
                    uptime_ms: 3_723_000,
                    ..ProcessStatus::default()
                },
                ProcessStatus {
                    name: "deals".into(),
                    state: "backoff".into(),
                    restarts: 3,
                    reason: "ended\x1b[2J by itself".into(),
                    ..ProcessStatus::default()
                },
            ],
            upgrade: None,
        };
        let used = |ticks, mib: u64| {
            let rss = mib << 20;
            BTreeMap::from([(7, Usage { ticks, rss })])
        };
        let rows = rows(&all, &used(100, 1), &used(250, 20_480), 2.0);
        assert_eq!(rows[0].cpu, Some(75.0));
        assert_eq!(rows[1].cpu, None);
        let text = draw(&rows, vec!["a note".into()]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("PROCESS "), "{text}");
        assert_eq!(
            lines[1],
            "hub                   7 ready       75.0    20 GiB        0        1h 2m"
        );
        assert_eq!(
            lines[2],
            "deals                 - backoff        -         -        3            -  ended[2J by itself"
        );
        assert_eq!(lines[3], "a note");
    }

    #[test]
    fn processor_time_and_memory_are_read() {
        let stat = "42 (a) b) S 1 40 42 0 -1 4194560 0 0 0 0 11 22 0 0 20 0 1 0 987 0 5 0";
        let used = Usage {
            ticks: 33,
            rss: 5 * 1024,
        };
        assert_eq!(parse(stat, "Name:\ta\nVmRSS:\t   5 kB\n"), Some((40, used)));
        assert_eq!(parse("42 (x", ""), None);
        let us = usage();
        assert!(us.values().any(|u| u.rss > 0), "{us:?}");
    }
}
