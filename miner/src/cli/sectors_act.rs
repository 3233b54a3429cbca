//! Commands that change what becomes of a sector.

use clap::{Subcommand, ValueEnum};
use comfy_table::Table;
use lotus_node_client::api::TipSetKey;
use lotus_runtime::Fault;
use lotus_sealing::{SectorState, Stake};
use lotus_types::{Kind, SectorNumber, TokenAmount};

use super::cost::{Prices, Report, agreed};
use super::sectors::{act, being, spend_on};
use super::{Cx, print, print_json, table, time};
use crate::control::{self, Opened, Seat};
use crate::run::from_node;

#[derive(Debug, Subcommand)]
pub(super) enum ActCommand {
    /// End a sector before its time
    ///
    /// Without --really-do-it: show what it costs. The sector's power goes, a fee is burnt, the
    /// rest of its pledge comes back, its deals are broken. Its files are deleted when no reorg
    /// can bring it back.
    Terminate {
        /// Its number
        number: u64,
        /// Send the message
        #[arg(long)]
        really_do_it: bool,
    },
    /// Delete the files of a sector that the chain does not need
    ///
    /// Without --really-do-it: show what is lost. Pieces of a sector that never was on chain go
    /// into another. A sector on chain must be terminated first.
    Remove {
        /// Its number
        number: u64,
        /// Delete them
        #[arg(long)]
        really_do_it: bool,
    },
    /// Offer a proven sector without data for upgrades with deals (snap deals)
    ///
    /// Without --really-do-it: show what an upgrade costs.
    SnapUp {
        /// Its number
        number: u64,
        /// Offer it
        #[arg(long)]
        really_do_it: bool,
    },
    /// Give the upgrade of a sector up; its pieces go into another
    AbortUpgrade {
        /// Its number
        number: u64,
        /// Give it up
        #[arg(long)]
        really_do_it: bool,
    },
    /// Put a sector into another state, when nothing else helps
    ///
    /// Failures are tried again by themselves; this is for what nobody foresaw. A sector goes
    /// only to a state whose work it has the means for.
    UpdateState {
        /// Its number
        number: u64,
        /// The state, as `sectors status` writes it
        state: SectorState,
        /// Change it
        #[arg(long)]
        really_do_it: bool,
    },
    /// Show the sectors that wait for others to share a message with
    Batching {
        /// Which message
        #[arg(value_enum)]
        kind: Batch,
        /// Send it now; without --really-do-it: show what it costs
        #[arg(long)]
        publish_now: bool,
        /// Send it
        #[arg(long, requires = "publish_now")]
        really_do_it: bool,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Batch {
    /// Pre-commits
    #[value(name = "precommit")]
    PreCommit,
    /// Prove-commits
    Commit,
}

impl Batch {
    const fn path(self) -> &'static str {
        match self {
            Self::PreCommit => "/v1/batches/precommit",
            Self::Commit => "/v1/batches/commit",
        }
    }
}

pub(super) async fn run(cx: &Cx, command: ActCommand) -> Result<(), Fault> {
    match command {
        ActCommand::Terminate {
            number,
            really_do_it,
        } => {
            let done = really_do_it.then_some("is being terminated");
            staked(cx, number, "terminate", done).await
        }
        ActCommand::Remove {
            number,
            really_do_it,
        } => {
            let done = really_do_it.then_some("is being removed");
            staked(cx, number, "remove", done).await
        }
        ActCommand::SnapUp {
            number,
            really_do_it,
        } => {
            let (node, cfg) = cx.node()?;
            let miner = cfg.actor()?.address();
            let info = node
                .state_sector_get_info(miner, SectorNumber(number), &TipSetKey::HEAD)
                .await
                .map_err(|e| from_node(&e))?;
            let pledged = info.map(|i| i.initial_pledge).unwrap_or_default();
            let estimate = Prices::of(cx).await?.upgrade(&pledged);
            let path = format!("/v1/sectors/{number}/snap-up");
            let what = "takes deals as an upgrade";
            spend_on(cx, &estimate, &path, what, really_do_it).await
        }
        ActCommand::AbortUpgrade {
            number,
            really_do_it,
        } => {
            if !really_do_it {
                return Err(not_yet("the work on the upgrade is lost"));
            }
            let path = format!("/v1/sectors/{number}/abort-upgrade");
            act(cx, &path, "is not upgraded").await
        }
        ActCommand::UpdateState {
            number,
            state,
            really_do_it,
        } => {
            if !really_do_it {
                let stake = stake(cx, number).await?;
                if cx.json {
                    print_json(&stake)?;
                } else {
                    print(&at_stake(&stake).to_string())?;
                }
                return Err(not_yet("a wrong state can lose work and deposits"));
            }
            let path = format!("/v1/sectors/{number}/state/{state}");
            act(cx, &path, "is put into another state").await
        }
        ActCommand::Batching {
            kind,
            publish_now: false,
            really_do_it: _,
        } => batching(cx, kind).await,
        ActCommand::Batching {
            kind,
            publish_now: true,
            really_do_it,
        } => publish(cx, kind, really_do_it).await,
    }
}

fn not_yet(risk: &str) -> Fault {
    Fault::new(
        Kind::Config,
        format!("nothing was done: {risk}"),
        "repeat the command with --really-do-it",
    )
}

async fn stake(cx: &Cx, number: u64) -> Result<Stake, Fault> {
    let path = format!("/v1/sectors/{number}/stake");
    control::call(&cx.control_socket()?, reqwest::Method::GET, &path).await
}

/// Shows what a command costs, and with `done`, the words for that, does it.
async fn staked(cx: &Cx, number: u64, command: &str, done: Option<&str>) -> Result<(), Fault> {
    let stake = stake(cx, number).await?;
    if !cx.json {
        print(&at_stake(&stake).to_string())?;
    }
    match done {
        Some(done) => {
            let path = format!("/v1/sectors/{number}/{command}");
            let socket = cx.control_socket()?;
            let opened: Opened = control::call(&socket, reqwest::Method::POST, &path).await?;
            if !cx.json {
                return being(opened.sector, done);
            }
        }
        None if cx.json => {}
        None => {
            return print(&format!(
                "nothing was done; to {command} it: \
                 `lotus-miner sectors {command} {number} --really-do-it`"
            ));
        }
    }
    print_json(&stake)
}

fn at_stake(stake: &Stake) -> Table {
    let mut out = table(&["Sector", &stake.sector.to_string()]);
    out.add_row(["State", &stake.state]);
    out.add_row(["Deals in it", &stake.deals.to_string()]);
    for (name, amount) in [
        ("Termination fee, at most", &stake.termination_fee_attofil),
        ("Pledge", &stake.pledge_attofil),
        ("Pre-commit deposit", &stake.deposit_attofil),
    ] {
        if let Some(amount) = amount {
            out.add_row([name, &fil(amount)]);
        }
    }
    out
}

/// attoFIL as operators read them.
fn fil(atto: &str) -> String {
    atto.parse::<u128>().map_or_else(
        |_| format!("{atto} attoFIL"),
        |a| format!("{} FIL", TokenAmount::from_atto(a)),
    )
}

async fn batching(cx: &Cx, kind: Batch) -> Result<(), Fault> {
    let socket = cx.control_socket()?;
    let seats: Vec<Seat> = control::call(&socket, reqwest::Method::GET, kind.path()).await?;
    if cx.json {
        return print_json(&seats);
    }
    show(kind, &seats)
}

/// Sends the message of those that wait, after showing what it costs.
async fn publish(cx: &Cx, kind: Batch, really: bool) -> Result<(), Fault> {
    let socket = cx.control_socket()?;
    let seats: Vec<Seat> = control::call(&socket, reqwest::Method::GET, kind.path()).await?;
    let (prices, count) = (Prices::of(cx).await?, seats.len() as u64);
    let estimate = match kind {
        Batch::PreCommit => prices.pre_commit(count),
        Batch::Commit => prices.commit(count),
    };
    if !cx.json {
        show(kind, &seats)?;
    }
    if !agreed(cx, &format!("{count} sectors"), &estimate, really)? {
        return Ok(());
    }
    let sent: Vec<Seat> = control::call(&socket, reqwest::Method::POST, kind.path()).await?;
    if cx.json {
        return print_json(&Report {
            estimate: &estimate,
            done: true,
            what: serde_json::json!({ "sectors": sent }),
        });
    }
    print(&format!(
        "the message of {} sectors is on its way",
        sent.len()
    ))
}

fn show(kind: Batch, seats: &[Seat]) -> Result<(), Fault> {
    if seats.is_empty() {
        return print("no sector waits for this message");
    }
    let mut out = table(&[
        "Sector",
        "Waits since (UTC)",
        "Must be on chain by epoch",
        "Proof",
    ]);
    for s in seats {
        out.add_row([
            s.sector.to_string(),
            time(s.since_unix_ms),
            match s.cutoff_epoch {
                0 => String::new(),
                epoch => epoch.to_string(),
            },
            match (kind, s.aggregate) {
                (Batch::PreCommit, _) => "",
                (Batch::Commit, true) => "in an aggregate",
                (Batch::Commit, false) => "as it is",
            }
            .into(),
        ]);
    }
    print(&out.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_shown_in_fil() {
        assert_eq!(fil("1500000000000000000"), "1.5 FIL");
        assert_eq!(fil("x"), "x attoFIL");
    }
}
