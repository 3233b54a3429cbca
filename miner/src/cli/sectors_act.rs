//! Commands that change what becomes of a sector.

use clap::{Subcommand, ValueEnum};
use lotus_runtime::Fault;
use lotus_sealing::{SectorState, Stake};
use lotus_types::{Kind, TokenAmount};

use super::sectors::act;
use super::{Cx, print, print_json, table, time};
use crate::control::{self, Seat};

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
    SnapUp {
        /// Its number
        number: u64,
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
        /// Send it now
        #[arg(long)]
        publish_now: bool,
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
            if !really_do_it {
                return stake(cx, number, "terminate").await;
            }
            let path = format!("/v1/sectors/{number}/terminate");
            act(cx, &path, "is being terminated").await
        }
        ActCommand::Remove {
            number,
            really_do_it,
        } => {
            if !really_do_it {
                return stake(cx, number, "remove").await;
            }
            let path = format!("/v1/sectors/{number}/remove");
            act(cx, &path, "is being removed").await
        }
        ActCommand::SnapUp { number } => {
            let path = format!("/v1/sectors/{number}/snap-up");
            act(cx, &path, "takes deals as an upgrade").await
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
                return Err(not_yet("a wrong state can lose work and deposits"));
            }
            let path = format!("/v1/sectors/{number}/state/{state}");
            act(cx, &path, "is put into another state").await
        }
        ActCommand::Batching { kind, publish_now } => batching(cx, kind, publish_now).await,
    }
}

fn not_yet(risk: &str) -> Fault {
    Fault::new(
        Kind::Config,
        format!("nothing was done: {risk}"),
        "repeat the command with --really-do-it",
    )
}

/// Shows what a command would cost.
async fn stake(cx: &Cx, number: u64, command: &str) -> Result<(), Fault> {
    let path = format!("/v1/sectors/{number}/stake");
    let stake: Stake = control::call(&cx.control_socket()?, reqwest::Method::GET, &path).await?;
    if cx.json {
        return print_json(&stake);
    }
    let mut out = table(&["Sector", &number.to_string()]);
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
    print(&format!(
        "{out}\nnothing was done; to {command} it: \
         `lotus-miner sectors {command} {number} --really-do-it`"
    ))
}

/// attoFIL as operators read them.
fn fil(atto: &str) -> String {
    atto.parse::<u128>().map_or_else(
        |_| format!("{atto} attoFIL"),
        |a| format!("{} FIL", TokenAmount::from_atto(a)),
    )
}

async fn batching(cx: &Cx, kind: Batch, publish: bool) -> Result<(), Fault> {
    let method = if publish {
        reqwest::Method::POST
    } else {
        reqwest::Method::GET
    };
    let seats: Vec<Seat> = control::call(&cx.control_socket()?, method, kind.path()).await?;
    if cx.json {
        return print_json(&seats);
    }
    if seats.is_empty() {
        return print("no sector waits for this message");
    }
    let mut out = table(&[
        "Sector",
        "Waits since (UTC)",
        "Must be on chain by epoch",
        "Proof",
    ]);
    for s in &seats {
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
    let note = if publish {
        "\ntheir message is on its way"
    } else {
        ""
    };
    print(&format!("{out}{note}"))
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
