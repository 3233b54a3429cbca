//! A command as the filter of deals.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::{Router, routing::post};
use lotus_deals::Question;
use lotus_runtime::{CancellationToken, Fault, signals};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::sync::Semaphore;

/// Largest question.
const MAX_QUESTION: usize = 64 << 10;
/// Bytes of the command's output that are read.
const MAX_OUTPUT: u64 = 4_096;

/// `storage-deals filter`.
#[derive(Debug, clap::Args)]
pub(crate) struct Filter {
    /// Where to listen. Keep it on loopback.
    #[arg(long, default_value = "127.0.0.1:7790")]
    listen: SocketAddr,
    /// Seconds that the command may take; then it is killed, and the deal is not taken.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    timeout_secs: u64,
    /// Commands that run at the same time.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256))]
    parallel: u16,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

struct Shared {
    command: Vec<OsString>,
    timeout: Duration,
    slots: Semaphore,
}

impl Filter {
    pub(crate) async fn run(self) -> Result<(), Fault> {
        let listener = TcpListener::bind(self.listen)
            .await
            .map_err(|e| Fault::bind(&self.listen, "--listen", &e))?;
        println!("filter listens at http://{}/", listener.local_addr()?);
        signals::run_until_signal(|stop| self.serve(listener, stop)).await
    }

    async fn serve(self, listener: TcpListener, stop: CancellationToken) -> Result<(), Fault> {
        let shared = Arc::new(Shared {
            command: self.command,
            timeout: Duration::from_secs(self.timeout_secs),
            slots: Semaphore::new(self.parallel.into()),
        });
        let app = Router::new()
            .route("/", post(ask))
            .layer(DefaultBodyLimit::max(MAX_QUESTION))
            .with_state(shared);
        axum::serve(listener, app)
            .with_graceful_shutdown(async move { stop.cancelled().await })
            .await
            .map_err(Fault::from)
    }
}

async fn ask(State(shared): State<Arc<Shared>>, body: Bytes) -> Response {
    // A question of another form is one that the command was not written for.
    if let Err(e) = serde_json::from_slice::<Question>(&body) {
        return (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response();
    }
    let Ok(_slot) = shared.slots.acquire().await else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    match tokio::time::timeout(shared.timeout, run(&shared.command, &body)).await {
        Ok(Ok((true, _))) => StatusCode::OK.into_response(),
        Ok(Ok((false, why))) => (StatusCode::FORBIDDEN, why).into_response(),
        Ok(Err(e)) => {
            tracing::error!(%e, command = ?shared.command, "the filter's command does not run");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
        Err(_) => {
            tracing::error!(command = ?shared.command, "the filter's command took too long");
            StatusCode::GATEWAY_TIMEOUT.into_response()
        }
    }
}

/// Runs the command. Returns whether it takes the deal, and the first line that it printed. A
/// signal that ends it is no decision. Dropped, the command is killed.
async fn run(command: &[OsString], question: &[u8]) -> std::io::Result<(bool, String)> {
    let Some((program, args)) = command.split_first() else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let tell = async {
        if let Some(mut stdin) = stdin {
            // It may decide without reading.
            drop(stdin.write_all(question).await);
        }
    };
    let mut printed = Vec::new();
    let read = async {
        if let Some(mut stdout) = stdout {
            (&mut stdout)
                .take(MAX_OUTPUT)
                .read_to_end(&mut printed)
                .await?;
            // The rest is of no interest, and must not block it.
            tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await?;
        }
        Ok::<_, std::io::Error>(())
    };
    let ((), read, status) = tokio::join!(tell, read, child.wait());
    read?;
    let status = status?;
    let line = String::from_utf8_lossy(&printed);
    let line = line.lines().next().unwrap_or_default().trim().to_owned();
    match status.code() {
        Some(code) => Ok((code == 0, line)),
        None => Err(std::io::Error::other(format!(
            "the command ended by {status}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn sh(script: &str) -> std::io::Result<(bool, String)> {
        let command = ["sh", "-c", script].map(OsString::from);
        run(&command, br#"{"raw_size": 5}"#).await
    }

    #[tokio::test]
    async fn the_exit_status_decides_and_the_first_line_is_the_reason() {
        assert_eq!(sh("true").await.unwrap(), (true, String::new()));
        assert_eq!(
            sh("cat; echo; echo more; exit 3").await.unwrap(),
            (false, r#"{"raw_size": 5}"#.into())
        );
        let (taken, line) = sh("yes a | head -c 1000000; exit 1").await.unwrap();
        assert_eq!((taken, line.as_str()), (false, "a"));
        assert!(sh("kill -9 $$").await.is_err());
        assert!(run(&["/nonexistent".into()], b"").await.is_err());
        let endless = tokio::time::timeout(Duration::from_millis(100), sh("sleep 100")).await;
        assert!(endless.is_err());
    }
}
