//! Messages of WindowPoSt.

use lotus_actors::miner::{PoStPartition, SubmitWindowedPoStParams};
use lotus_actors::{Dst, PoStProof, Randomness, RegisteredPoStProof, miner};
use lotus_messages::{Landed, MessageKind, Payer, SendRequest};
use lotus_node_client::api::{Partition, TipSetKey};
use lotus_types::{Address, TokenAmount};

use crate::ProvingError;
use crate::deadline::Window;
use crate::record::ProofRecord;
use crate::window::Shared;

/// Partitions are given up for their deadline after this many failed messages.
pub(crate) const MAX_ATTEMPTS: u64 = 8;

impl Shared {
    /// Idempotency key of a message for these partitions.
    fn post_key(&self, w: &Window, partitions: &[u64], attempt: u64) -> String {
        let of: Vec<String> = partitions.iter().map(u64::to_string).collect();
        format!(
            "wdpost/{}/{}/{}/{}/{attempt}",
            self.deps.miner,
            w.period_start,
            w.index,
            of.join("-")
        )
    }

    /// Submits a proof, by this address if one is named. The message commits to the ticket of the
    /// opening epoch on the chain of `head`.
    pub(crate) async fn submit(
        &self,
        w: &Window,
        attempt: u64,
        record: &ProofRecord,
        sectors: &[Partition],
        head: &TipSetKey,
        way: Option<Address>,
    ) -> Result<String, ProvingError> {
        let ticket = self
            .deps
            .node
            .state_get_randomness_from_tickets(Dst::PoStChainCommit as i64, w.open, &[], head)
            .await?;
        let proof_type = lotus_proofs::window_post_proof_type(self.deps.size);
        let mut partitions = Vec::new();
        for index in &record.partitions {
            let at = usize::try_from(*index).unwrap_or(usize::MAX);
            let of = sectors.get(at).map(|p| &p.all_sectors);
            let of = of.ok_or_else(|| ProvingError::Inconsistent {
                what: "deadline",
                why: format!("partition {index} is gone"),
            })?;
            partitions.push(PoStPartition {
                index: *index,
                skipped: &record.skipped & of,
            });
        }
        let params = SubmitWindowedPoStParams {
            deadline: w.index,
            partitions,
            proofs: vec![PoStProof {
                post_proof: RegisteredPoStProof::from(proof_type),
                proof_bytes: record.proof.clone(),
            }],
            chain_commit_epoch: w.open.0,
            chain_commit_rand: Randomness(ticket.to_vec()),
        };
        let key = self.post_key(w, &record.partitions, attempt);
        let (key, from) = match way {
            Some(way) => (format!("{key}/{way}"), Payer::Address(way)),
            None => (key, Payer::Miner(self.deps.miner.address())),
        };
        let (method, kind) = (miner::SUBMIT_WINDOWED_POST, MessageKind::Post);
        let params = lotus_actors::encode(&params);
        self.send_from(from, key.clone(), method, params, kind)
            .await?;
        Ok(key)
    }

    /// Sends a message to the miner actor from an address that may.
    pub(crate) async fn send(
        &self,
        key: String,
        method: u64,
        params: Vec<u8>,
        kind: MessageKind,
    ) -> Result<(), ProvingError> {
        let from = Payer::Miner(self.deps.miner.address());
        self.send_from(from, key, method, params, kind).await
    }

    async fn send_from(
        &self,
        from: Payer,
        key: String,
        method: u64,
        params: Vec<u8>,
        kind: MessageKind,
    ) -> Result<(), ProvingError> {
        let cid = self
            .deps
            .sender
            .send(SendRequest {
                key: key.clone(),
                from,
                to: self.deps.miner.address(),
                method,
                params,
                value: TokenAmount::default(),
                kind,
                max_fee: None,
            })
            .await?;
        tracing::info!(key, %cid, method = miner::method_name(method), "sent");
        Ok(())
    }

    /// Waits for a message and turns a failed execution into an error.
    pub(crate) async fn landed(&self, key: &str) -> Result<Landed, ProvingError> {
        let confidence = self.deps.cfg.confidence_epochs;
        let landed = self.deps.sender.wait(key, confidence).await?;
        if landed.exit_code == 0 {
            return Ok(landed);
        }
        Err(ProvingError::Landed {
            what: key.into(),
            exit: u32::try_from(landed.exit_code).map_or_else(
                |_| landed.exit_code.to_string(),
                |code| lotus_actors::exit_name(code.into()),
            ),
        })
    }
}
