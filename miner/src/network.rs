//! Whether the hub's proofs are those that its node's network takes.

use std::sync::Arc;
use std::time::Duration;

use lotus_node_client::{Client, NodeError};
use lotus_proofs::params::{self, Circuit};
use lotus_proofs::{ProofError, ProofMode};
use lotus_runtime::Fault;
use lotus_types::{Kind, SectorSize};
use tokio_util::sync::CancellationToken;

/// How often a node that did not answer at the start is asked again.
const ASK_EVERY: Duration = Duration::from_secs(5);

/// The proofs that a node's network takes, by the version that the node tells. A lotus-devnet
/// tells its mode: `lotus-devnet-0.1.0+vanilla`. Every other network wants SNARKs.
pub(crate) fn proofs_of(version: &str) -> ProofMode {
    if is_devnet(version) {
        version
            .rsplit_once('+')
            .and_then(|(_, mode)| mode.parse().ok())
            .unwrap_or_default()
    } else {
        ProofMode::Groth16
    }
}

fn is_devnet(version: &str) -> bool {
    version.starts_with("lotus-devnet-")
}

/// Refuses a mode whose proofs would be refused, at the cost of their fees, and on networks of
/// others keys that nobody else has.
pub(crate) fn fits(version: &str, mode: ProofMode, size: SectorSize) -> Result<(), Fault> {
    let wanted = proofs_of(version);
    if wanted != mode {
        return Err(Fault::new(
            Kind::Config,
            format!("the network of {version} takes {wanted} proofs, proofs.mode is {mode}"),
            format!("set proofs.mode to \"{wanted}\", or connect to another node"),
        ));
    }
    if is_devnet(version) {
        return Ok(());
    }
    params::require_published_keys(Circuit::of(mode), size).map_err(|e| from_proofs(&e))
}

/// Asks the node, and checks. `false`: it does not answer now.
pub(crate) async fn check(
    node: &Client,
    mode: ProofMode,
    size: SectorSize,
    limit: Duration,
) -> Result<bool, Fault> {
    match tokio::time::timeout(limit, node.check()).await {
        Ok(Ok(version)) => fits(&version.version, mode, size).map(|()| true),
        Ok(Err(e)) if e.kind() == Kind::Config => Err(from_node(&e)),
        Ok(Err(_)) | Err(_) => Ok(false),
    }
}

/// Checks as soon as the node answers, and waits for the stop.
pub(crate) async fn check_when_there(
    node: Arc<Client>,
    mode: ProofMode,
    size: SectorSize,
    stop: CancellationToken,
) -> Result<(), Fault> {
    while !check(&node, mode, size, ASK_EVERY).await? {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(ASK_EVERY) => {}
        }
    }
    stop.cancelled().await;
    Ok(())
}

fn from_node(e: &NodeError) -> Fault {
    Fault::new(e.kind(), e.to_string(), e.fix())
}

pub(crate) fn from_proofs(e: &ProofError) -> Fault {
    Fault::new(e.kind(), e.to_string(), e.fix())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_devnet_tells_its_mode_and_all_others_want_snarks() {
        for mode in ProofMode::ALL {
            assert_eq!(proofs_of(&format!("lotus-devnet-0.1.0+{mode}")), mode);
        }
        assert_eq!(proofs_of("lotus-devnet-0.1.0"), ProofMode::Vanilla);
        for public in [
            "lotus-1.34.1+mainnet+git.0ab1c2d",
            "lotus-1.34.1+calibnet",
            "lotus-1.34.1+2k+vanilla",
            "1.34.1+debug",
            "forest-0.39.0",
            "",
        ] {
            assert_eq!(proofs_of(public), ProofMode::Groth16, "{public}");
        }
    }

    #[test]
    fn a_mode_that_does_not_fit_is_a_configuration_mistake() {
        let size = SectorSize::S2KiB;
        let fits = |version, mode| fits(version, mode, size);
        assert!(fits("lotus-devnet-0.1.0+vanilla", ProofMode::Vanilla).is_ok());
        assert!(fits("lotus-devnet-0.1.0+groth16", ProofMode::Groth16).is_ok());
        for (version, mode) in [
            ("lotus-devnet-0.1.0+vanilla", ProofMode::Groth16),
            ("lotus-devnet-0.1.0+groth16", ProofMode::Groth16Post),
            ("lotus-1.34.1+mainnet", ProofMode::Vanilla),
            ("lotus-1.34.1+mainnet", ProofMode::Groth16Post),
        ] {
            let fault = fits(version, mode).unwrap_err();
            assert_eq!(fault.kind, Kind::Config);
            let wanted = format!("set proofs.mode to \"{}\"", proofs_of(version));
            assert!(fault.fix.starts_with(&wanted), "{}", fault.fix);
        }
    }
}
