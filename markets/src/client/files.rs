//! Commands on local files: packing and piece CIDs.

use std::fs::File;
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use lotus_types::PieceInfo;
use serde_json::json;

use super::ClientError;

/// A bar over bytes; shown on a terminal only.
pub(crate) fn bytes_bar(len: u64, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg:>12} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(len).with_style(style).with_message(what)
}

/// Runs work that blocks.
pub(crate) async fn blocking<T: Send + 'static>(
    what: &Path,
    work: impl FnOnce() -> Result<T, ClientError> + Send + 'static,
) -> Result<T, ClientError> {
    let path = what.to_owned();
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| {
        Err(ClientError::File {
            path,
            source: std::io::Error::other(e),
        })
    })
}

/// The piece that a file is.
pub(crate) async fn piece_of(path: &Path) -> Result<PieceInfo, ClientError> {
    let at = path.to_owned();
    blocking(path, move || {
        let file = File::open(&at).map_err(ClientError::file(&at))?;
        let len = file.metadata().map_err(ClientError::file(&at))?.len();
        let bar = bytes_bar(len, "piece CID");
        let piece = lotus_proofs::commp(bar.wrap_read(file)).map_err(ClientError::file(&at))?;
        bar.finish_and_clear();
        Ok(piece)
    })
    .await
}

pub(crate) fn piece_json(piece: &PieceInfo) -> serde_json::Value {
    json!({
        "piece_cid": piece.cid.to_string(),
        "piece_cid_v2": piece.cid_v2().to_string(),
        "piece_size": piece.size.get(),
        "raw_size": piece.raw_size,
    })
}

/// `client pack`.
#[derive(Debug, clap::Args)]
pub(crate) struct Pack {
    /// Folder or file to pack.
    dir: PathBuf,
    /// CAR to write.
    #[arg(short, long)]
    output: PathBuf,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl Pack {
    pub(crate) async fn run(self) -> Result<(), ClientError> {
        let (dir, out) = (self.dir.clone(), self.output.clone());
        let root = blocking(&self.dir, move || Ok(lotus_car::pack_dir(&dir, &out)?)).await?;
        let bytes = std::fs::metadata(&self.output)
            .map_err(ClientError::file(&self.output))?
            .len();
        if self.json {
            println!(
                "{}",
                json!({"root": root.to_string(), "file": self.output, "bytes": bytes})
            );
        } else {
            println!(
                "root  {root}\nfile  {} ({bytes} bytes)",
                self.output.display()
            );
        }
        Ok(())
    }
}

/// `client piece-cid`.
#[derive(Debug, clap::Args)]
pub(crate) struct PieceCid {
    /// File to read.
    file: PathBuf,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl PieceCid {
    pub(crate) async fn run(self) -> Result<(), ClientError> {
        let piece = piece_of(&self.file).await?;
        if self.json {
            println!("{}", piece_json(&piece));
        } else {
            println!(
                "piece CID     {}\npiece CID v2  {}\npiece size    {}\nraw size      {}",
                piece.cid,
                piece.cid_v2(),
                piece.size,
                piece.raw_size
            );
        }
        Ok(())
    }
}
