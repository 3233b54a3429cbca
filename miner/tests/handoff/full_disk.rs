//! A full disk costs time, nothing else. Needs the right to mount a small tmpfs.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use hub_proto::v1::{AcquireRequest, PiecePhase};

use crate::harness::{DEADLINE, Hub, Sectors, Spoke, bytes, fast, key};

/// A file system of a few MiB, until dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=6m", "tmpfs"])
            .arg(at)
            .output();
        mount
            .is_ok_and(|m| m.status.success())
            .then(|| Self(at.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let umount = Command::new("umount").arg("-l").arg(&self.0).status();
        if !umount.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.0.display());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_named_and_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(&dir.path().join("hub/pieces")) else {
        // Past the capture of the test's output: a skip must be seen.
        let why = "SKIPPED a_full_disk_is_named_and_waited_for: mounting a tmpfs needs root\n";
        std::io::stdout().write_all(why.as_bytes()).unwrap();
        return;
    };
    let hub = Hub::start(dir.path(), &Arc::new(Sectors::default()), fast()).await;
    let mut spoke = Spoke::new(dir.path());
    let data = bytes(3_000_000);
    let (piece, mut offer) = spoke.stage("car", &data);

    // Room was there when the credit was taken; it is gone when the bytes come.
    let acquire = hub.client.request(AcquireRequest {
        key: Some(key(1)),
        piece_size: piece.size.get(),
        ttl_seconds: 60,
    });
    let credit = hub.client.capacity().acquire(acquire).await.unwrap();
    offer.credit = credit.into_inner().id;
    let ballast = disk.0.join("ballast");
    std::fs::write(&ballast, vec![1; 4 << 20]).unwrap();
    spoke.serve();
    hub.offer(offer).await.unwrap();
    let state = hub
        .until(key(1), "a word of the full disk", |s| {
            s.reason.contains("free space")
        })
        .await;
    assert_eq!(state.phase(), PiecePhase::Pulling);
    // Nothing of the piece keeps the room that others may need.
    let end = tokio::time::Instant::now() + DEADLINE;
    while hub.parts() > 0 {
        assert!(tokio::time::Instant::now() < end, "the part stays");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // More is refused at the door, with the reason.
    let (_, mut more) = spoke.stage("more", &data);
    more.key = Some(key(2));
    let e = hub.offer(more).await.unwrap_err();
    assert!(
        e.to_string().contains("no room") && e.retry_after().is_some(),
        "{e}"
    );

    std::fs::remove_file(ballast).unwrap();
    hub.phase(key(1), PiecePhase::Placed).await;
    assert!(std::fs::read(hub.piece_file(&piece)).unwrap() == data);
    hub.crash().await;
}
