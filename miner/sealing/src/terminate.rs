//! The end of a sector before its time, and what it costs.

use lotus_actors::miner::{
    MAX_TERMINATION_FEE, MaxTerminationFeeParams, MaxTerminationFeeReturn, TERMINATE_SECTORS,
    TerminateSectorsParams, TerminationDeclaration, power_of,
};
use lotus_actors::{BitField, decode, encode};
use lotus_messages::{MessageKind, Payer, SendRequest};
use lotus_node_client::api::{Message, SectorOnChainInfo};
use lotus_types::{SectorNumber, TokenAmount};

use crate::SealingError;
use crate::chain::refused;
use crate::machine::{Cause, Event, Sector};
use crate::shared::Shared;

impl Shared {
    pub(crate) async fn send_terminate(
        &self,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let mut heads = self.head.clone();
        let key = terminate_key(n, s);
        loop {
            heads.borrow_and_update();
            let head = self.chain_head()?;
            let at = head.key();
            if self.live_info(n, &at).await?.is_none() {
                return Ok(Event::Terminated);
            }
            if let Some(sent) = self.sender.status(&key).await? {
                return Ok(Event::TerminateSent(sent.cid));
            }
            let (place, mutable) = self.location(n, &head).await?;
            if mutable {
                let mut sectors = BitField::new();
                sectors.set(n.0);
                let params = TerminateSectorsParams {
                    terminations: vec![TerminationDeclaration {
                        deadline: place.deadline,
                        partition: place.partition,
                        sectors,
                    }],
                };
                let request = SendRequest {
                    key,
                    from: Payer::Miner(self.actor()),
                    to: self.actor(),
                    method: TERMINATE_SECTORS,
                    params: encode(&params),
                    value: TokenAmount::default(),
                    kind: MessageKind::Terminate,
                    max_fee: None,
                };
                return match self.sender.send(request).await {
                    Ok(cid) => Ok(Event::TerminateSent(cid)),
                    Err(e) => refused(e),
                };
            }
            self.live(n, |l| {
                l.last_error = Some("waiting until the sector's deadline takes changes".into());
            });
            if heads.changed().await.is_err() {
                return Err(SealingError::Stopped);
            }
        }
    }

    pub(crate) async fn await_terminate(
        &self,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let landed = match self.landed(&terminate_key(n, s), true).await? {
            Ok(landed) => landed,
            Err(event) => return Ok(event),
        };
        let at = self.chain_head()?.key();
        Ok(match self.live_info(n, &at).await? {
            None => Event::Terminated,
            // The actor puts large terminations off to the end of the epoch.
            Some(_) => Event::Refused {
                why: format!(
                    "message {} succeeded, but the sector is still there",
                    landed.cid
                ),
                spent: true,
                cause: Cause::Other,
            },
        })
    }

    /// Waits until no reorg can bring the sector back.
    pub(crate) async fn await_terminate_finality(
        &self,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<Event, SealingError> {
        let mut heads = self.head.clone();
        loop {
            heads.borrow_and_update();
            let head = self.chain_head()?;
            if self.live_info(n, &head.key()).await?.is_some() {
                return Ok(Event::TerminateLost);
            }
            if self.is_gone(n, s, &head).await? {
                return Ok(Event::Final);
            }
            if heads.changed().await.is_err() {
                return Err(SealingError::Stopped);
            }
        }
    }

    /// The most that ending the sector now costs, asked of the actor: FIP-0098.
    pub(crate) async fn termination_fee(
        &self,
        info: &SectorOnChainInfo,
    ) -> Result<TokenAmount, SealingError> {
        let head = self.chain_head()?;
        let params = MaxTerminationFeeParams {
            power: power_of(
                self.size,
                info.expiration - info.power_base_epoch.max(info.activation),
                &info.verified_deal_weight,
            ),
            initial_pledge: info.initial_pledge.clone(),
        };
        let call = Message {
            version: 0,
            to: self.actor(),
            from: self.worker().await?,
            nonce: 0,
            value: TokenAmount::default(),
            gas_limit: 0,
            gas_fee_cap: TokenAmount::default(),
            gas_premium: TokenAmount::default(),
            method: MAX_TERMINATION_FEE,
            params: encode(&params),
        };
        let result = self.node.state_call(&call, &head.key()).await?;
        let receipt = result.msg_rct.filter(|r| r.exit_code == 0);
        let receipt = receipt.ok_or_else(|| {
            SealingError::Chain(format!(
                "the actor tells no termination fee: {}",
                result.error
            ))
        })?;
        let fee: MaxTerminationFeeReturn =
            decode(&receipt.r#return).map_err(|e| SealingError::Chain(e.to_string()))?;
        Ok(fee.max_fee)
    }
}

fn terminate_key(n: SectorNumber, s: &Sector) -> String {
    format!("terminate/{n}/{}", s.terminate_tries)
}
