//! Many spokes at once: each with an identity and a connection of its own, said hello, holds a
//! stream of events.

use std::time::{Duration, Instant};

use comfy_table::Table;
use hub_proto::HubClient;
use hub_proto::v1::Event;
use lotus_e2e::{Failed, secs};
use serde::Serialize;
use tokio::task::JoinSet;
use tonic::Streaming;

use super::rig::{PATIENCE, Rig, idle, last_event, spoke, subscribe};
use super::{float, rss};

/// That connect at the same time.
const AT_ONCE: usize = 32;
/// How long the hub is left alone before its memory is looked at.
const SETTLE: Duration = secs(5);
/// How long its processor time is looked at then.
const IDLE: Duration = secs(10);

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Spokes that were connected at once, and those that heard what happened then.
    spokes: u32,
    spokes_heard: u32,
    /// Resident memory of the hub for each.
    bytes_per_spoke: f64,
    spokes_rss_before: u64,
    spokes_rss_after: u64,
    /// Seconds until all were connected.
    spokes_connect_seconds: f64,
    /// Share of one core that the hub takes when nothing happens: before, and with all of them.
    spokes_idle_cores_before: f64,
    spokes_idle_cores: f64,
}

impl Report {
    pub(super) fn ok(&self) -> bool {
        self.spokes_heard == self.spokes
    }

    pub(super) fn rows(&self, table: &mut Table) {
        table.add_row([
            format!("{} connected spokes", self.spokes),
            format!("{:.0} bytes each", self.bytes_per_spoke),
            format!(
                "connected in {:.1} s; the idle hub takes {:.3} cores, before {:.3}",
                self.spokes_connect_seconds, self.spokes_idle_cores, self.spokes_idle_cores_before
            ),
        ]);
    }
}

pub(super) async fn run(count: u32) -> Result<Report, Failed> {
    let rig = Rig::start(0, 0).await?;
    eprintln!("spokes: {count} identities");
    let identities = rig.identities(count as usize)?;
    let seller = rig.seller().await?;
    // What the first ones bring the hub to allocate is not for each.
    rig.offers(&seller, 0..1, SETTLE).await?;
    let from = last_event(&seller).await? + 1;
    tokio::time::sleep(SETTLE).await;
    let idle_before = idle(rig.pid, IDLE).await?;
    let before = rss(rig.pid)?;

    eprintln!("spokes: connecting");
    let began = Instant::now();
    let (mut open, mut connecting) = (Vec::new(), JoinSet::new());
    for identity in identities {
        if connecting.len() >= AT_ONCE
            && let Some(one) = connecting.join_next().await
        {
            open.push(one.map_err(|e| Failed::at("spoke", e))??);
        }
        let addr = rig.addr();
        connecting.spawn(async move {
            let spoke = spoke(addr, &identity).await?;
            let events = subscribe(&spoke, from).await;
            let events = events.map_err(|e| Failed::at("events", e.message()))?;
            Ok::<_, Failed>((spoke, events))
        });
    }
    while let Some(one) = connecting.join_next().await {
        open.push(one.map_err(|e| Failed::at("spoke", e))??);
    }
    let connect_seconds = began.elapsed().as_secs_f64();
    rig.offers(&seller, 1..2, SETTLE).await?;
    let heard = heard(&mut open, from).await;
    tokio::time::sleep(SETTLE).await;
    let after = rss(rig.pid)?;
    let idle_after = idle(rig.pid, IDLE).await?;
    drop(open);
    rig.stop().await?;
    Ok(Report {
        spokes: count,
        spokes_heard: heard,
        bytes_per_spoke: float(after.saturating_sub(before)) / f64::from(count),
        spokes_rss_before: before,
        spokes_rss_after: after,
        spokes_connect_seconds: connect_seconds,
        spokes_idle_cores_before: idle_before,
        spokes_idle_cores: idle_after,
    })
}

/// How many heard both events of an offer.
async fn heard(open: &mut [(HubClient, Streaming<Event>)], from: u64) -> u32 {
    let mut all = 0;
    for (_, events) in open {
        let mut both = true;
        for seq in [from, from + 1] {
            let event = tokio::time::timeout(PATIENCE, events.message()).await;
            both &= matches!(event, Ok(Ok(Some(e))) if e.seq == seq);
        }
        all += u32::from(both);
    }
    all
}
