//! One task in a process of its own, so that it can be given up at any moment.

use std::io::{self, BufRead as _, Read as _, Write as _};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc;

use lotus_proofs::{ProofError, ProofMode};
use lotus_runtime::Fault;
use lotus_runtime::telemetry::{self, TelemetryConfig};
use lotus_types::Kind;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use crate::{Output, Task, execute};

/// Bytes that the process may answer. As for one message between hub and worker.
const ANSWER_LIMIT: u64 = crate::server::MESSAGE_LIMIT as u64;

/// What the process answers.
#[derive(Serialize, Deserialize)]
enum Answer {
    Output(Output),
    Failed { kind: Kind, message: String },
}

/// Why a task has no output.
pub(super) struct Failed {
    pub(super) kind: Kind,
    pub(super) message: String,
}

/// How the process is started.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) exe: PathBuf,
    pub(super) log: String,
    pub(super) proofs: ProofMode,
    pub(super) parent_cache: Option<PathBuf>,
}

/// Runs a task in a process of its own. Dropping the future kills the process.
pub(super) async fn run(program: &Program, task: &Task) -> Result<Output, Failed> {
    let lost = |message: String| Failed {
        kind: Kind::Transport,
        message,
    };
    let mut spec = serde_json::to_vec(task).map_err(|e| lost(e.to_string()))?;
    spec.push(b'\n');
    let mut command = Command::new(&program.exe);
    command.args(["task", "--log", &program.log]);
    command.args(["--proofs", program.proofs.as_str()]);
    if let Some(dir) = &program.parent_cache {
        command.env("FIL_PROOFS_PARENT_CACHE", dir);
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // Ctrl-C must reach the worker first.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| lost(format!("the proof process did not start: {e}")))?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let (Some(mut stdin), Some(stdout)) = (stdin, stdout) else {
        return Err(lost("the proof process has no pipes".into()));
    };
    let mut answer = Vec::new();
    let talked = async {
        stdin.write_all(&spec).await?;
        stdout.take(ANSWER_LIMIT).read_to_end(&mut answer).await
    };
    let talked = talked.await;
    // Open until here: the process ends when this end is closed.
    drop(stdin);
    let status = child.wait().await;
    match (talked, serde_json::from_slice(&answer)) {
        (Ok(_), Ok(Answer::Output(output))) => Ok(output),
        (Ok(_), Ok(Answer::Failed { kind, message })) => Err(Failed { kind, message }),
        _ => Err(lost(match status {
            Ok(status) => format!("the proof process ended without an answer ({status})"),
            Err(e) => format!("the proof process: {e}"),
        })),
    }
}

/// The process: reads a task from standard input, writes its output to standard output. It ends,
/// in the middle of work, when its standard input is closed, so that it does not outlive its
/// worker.
pub(super) fn task_main(log: &str, proofs: ProofMode) -> Result<(), Fault> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let config = TelemetryConfig {
        log: log.into(),
        ..TelemetryConfig::default()
    };
    let _entered = runtime.enter();
    let _telemetry = telemetry::init("lotus-worker-task", &config)?;
    let mut line = Vec::new();
    io::stdin()
        .lock()
        .take(ANSWER_LIMIT)
        .read_until(b'\n', &mut line)?;
    let task: Task = serde_json::from_slice(&line).map_err(|e| {
        Fault::new(
            Kind::Config,
            format!("unreadable task: {e}"),
            "this command is for `lotus-worker run`, which starts it itself",
        )
    })?;
    let (done, ended) = mpsc::channel();
    let closed = done.clone();
    // Both threads are left behind when the process ends.
    std::thread::spawn(move || {
        let mut byte = [0];
        while io::stdin().read(&mut byte).is_ok_and(|n| n > 0) {}
        closed.send(None)
    });
    std::thread::spawn(move || {
        let result = std::panic::catch_unwind(|| execute(&proofs, &task));
        done.send(Some(answer(task.name(), result)))
    });
    let Ok(Some(answer)) = ended.recv() else {
        return Err(Fault::new(
            Kind::Transport,
            "the worker is gone",
            "nothing: `lotus-worker run` starts tasks itself",
        ));
    };
    let text = serde_json::to_vec(&answer)
        .map_err(|e| Fault::new(Kind::Fatal, e.to_string(), "report this"))?;
    let mut out = io::stdout().lock();
    out.write_all(&text)?;
    Ok(out.flush()?)
}

fn answer(step: &str, result: std::thread::Result<Result<Output, ProofError>>) -> Answer {
    match result {
        Ok(Ok(output)) => Answer::Output(output),
        // This host's disk is no evidence against the sector: another host may do the task.
        Ok(Err(e @ ProofError::Io { .. })) => Answer::Failed {
            kind: Kind::Transport,
            message: e.to_string(),
        },
        Ok(Err(e)) => Answer::Failed {
            kind: e.kind(),
            message: e.to_string(),
        },
        Err(panic) => Answer::Failed {
            kind: Kind::Fatal,
            message: format!("{step} panicked: {}", crate::worker::panic_text(&*panic)),
        },
    }
}
