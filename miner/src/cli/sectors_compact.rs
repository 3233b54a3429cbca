//! `sectors compact-partitions`: ended sectors leave the chain's tables.

use std::collections::BTreeSet;

use lotus_actors::encode;
use lotus_actors::miner::{COMPACT_PARTITIONS, CompactPartitionsParams};
use lotus_node_client::api::{BitField, Partition, TipSetKey};
use lotus_runtime::Fault;
use lotus_types::{Kind, TokenAmount};

use super::order::{Spend, fil, spend};
use super::{Cx, print, table};
use crate::run::from_node;

/// Ended sectors stay in their partitions: each PoSt message pays for reading them, and a
/// partition that is full of them takes no new one. Without --really-do-it nothing is sent: the
/// command shows the partitions and the cost. The chain allows it while the deadline neither is
/// open nor opens next, and after its last proofs can no longer be disputed.
#[derive(Debug, clap::Args)]
pub(super) struct CompactArgs {
    /// The deadline
    #[arg(long)]
    deadline: u64,
    /// Its partitions; by default all in which sectors have ended
    #[arg(long, value_name = "INDEX", value_delimiter = ',')]
    partitions: Vec<u64>,
    /// Limit of the fee, FIL
    #[arg(long, value_parser = fil, value_name = "FIL")]
    max_fee: Option<TokenAmount>,
    /// Do it; without this it is a dry run
    #[arg(long)]
    really_do_it: bool,
}

/// Whether a partition can be compacted; the error says why it is left.
fn judge(p: &Partition) -> Result<(), &'static str> {
    let unproven = &(&p.live_sectors - &p.faulty_sectors) - &p.active_sectors;
    if !p.faulty_sectors.is_empty() {
        Err("has faulty sectors: recover or terminate them first")
    } else if !unproven.is_empty() {
        Err("has sectors without a first proof: wait for their deadline")
    } else if p.all_sectors == p.live_sectors {
        Err("has no ended sector")
    } else {
        Ok(())
    }
}

pub(super) async fn compact(cx: &Cx, args: CompactArgs) -> Result<(), Fault> {
    let (node, cfg) = cx.node()?;
    let miner = cfg.actor()?.address();
    let (deadline, head) = (args.deadline, TipSetKey::HEAD);
    let partitions = node.state_miner_partitions(miner, deadline, &head).await;
    let partitions = partitions.map_err(|e| from_node(&e))?;
    let named: BTreeSet<u64> = args.partitions.iter().copied().collect();
    let count = u64::try_from(partitions.len()).unwrap_or(u64::MAX);
    if let Some(unknown) = named.iter().find(|i| **i >= count) {
        return Err(Fault::new(
            Kind::Data,
            format!("deadline {deadline} has no partition {unknown}, only {count}"),
            "see `lotus-miner proving deadlines`",
        ));
    }
    let mut chosen = BitField::new();
    let (mut ended, mut living) = (0, 0);
    let mut out = table(&["Partition", "Sectors", "Ended", "Compacted"]);
    for (index, p) in (0u64..).zip(&partitions) {
        if !named.is_empty() && !named.contains(&index) {
            continue;
        }
        let (all, live) = (p.all_sectors.len(), p.live_sectors.len());
        let verdict = match judge(p) {
            Ok(()) => {
                chosen.set(index);
                ended += all - live;
                living += live;
                "yes"
            }
            Err(why) => why,
        };
        out.add_row([
            index.to_string(),
            all.to_string(),
            (all - live).to_string(),
            verdict.to_owned(),
        ]);
    }
    if !cx.json {
        print(&out.to_string())?;
    }
    if chosen.is_empty() {
        return Err(Fault::new(
            Kind::Data,
            format!("no partition of deadline {deadline} can be compacted"),
            "sectors leave their partition's tables only after they have ended",
        ));
    }
    let list: Vec<String> = chosen.iter().map(|i| i.to_string()).collect();
    let action = vec![
        ("Deadline".into(), deadline.to_string()),
        ("Partitions".into(), list.join(" ")),
        (
            "Ended sectors that the chain forgets".into(),
            ended.to_string(),
        ),
        (
            "Sectors that move to other partitions of it".into(),
            living.to_string(),
        ),
    ];
    let message = Spend {
        name: "compact",
        action,
        details: Default::default(),
        asked: None,
        from: None,
        miner,
        method: COMPACT_PARTITIONS,
        params: encode(&CompactPartitionsParams {
            deadline,
            partitions: chosen,
        }),
        max_fee: args.max_fee,
    };
    spend(cx, message, args.really_do_it).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_proven_partitions_with_ended_sectors_are_compacted() {
        let bits = |n: &[u64]| BitField::try_from_bits(n.iter().copied()).unwrap();
        for (all, live, faulty, active, why) in [
            (&[1, 2][..], &[1][..], &[][..], &[1][..], None),
            (&[1, 2], &[], &[], &[], None),
            (&[1, 2], &[1, 2], &[], &[1, 2], Some("no ended sector")),
            (&[1, 2], &[1], &[1], &[], Some("faulty")),
            (&[1, 2], &[1], &[], &[], Some("first proof")),
        ] {
            let p = Partition {
                all_sectors: bits(all),
                live_sectors: bits(live),
                faulty_sectors: bits(faulty),
                active_sectors: bits(active),
                ..Partition::default()
            };
            match (judge(&p), why) {
                (Ok(()), None) => {}
                (Err(got), Some(part)) => assert!(got.contains(part), "{got}"),
                (got, want) => panic!("{all:?} {live:?}: {got:?}, not {want:?}"),
            }
        }
    }
}
