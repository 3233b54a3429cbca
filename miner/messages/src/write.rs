use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cid::Cid;
use lotus_actors::{ExitCode, exit_name};
use lotus_node_client::NodeError;
use lotus_node_client::api::{Message, MessageSendSpec, SignedMessage, TipSetKey};
use lotus_runtime::Backoff;
use lotus_types::{Address, Kind, TokenAmount};

use crate::message::{MESSAGES, NEXT_NONCE, OPEN, Record};
use crate::runner::Job;
use crate::sender::{Shared, lock};
use crate::{SendError, SendRequest};

impl Shared {
    /// Serves one request; while its caller waits, a node that does not answer is asked again.
    pub(crate) async fn serve(self: Arc<Self>, job: Job) {
        let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(8));
        let Job {
            from,
            request,
            mut reply,
            ..
        } = job;
        let result = loop {
            if reply.is_closed() {
                return;
            }
            match self.write(from, &request).await {
                Err(e) if e.kind() == Kind::Transport => {
                    tracing::warn!(key = request.key, error = %e, "message not sent yet");
                    tokio::select! {
                        () = tokio::time::sleep(backoff.next()) => {}
                        () = reply.closed() => return,
                        () = self.stop.cancelled() => break Err(SendError::Stopped),
                    }
                }
                done => break done,
            }
        };
        let outcome = result.as_ref().map_or_else(|e| e.kind().as_str(), |_| "ok");
        metrics::counter!("lotus_miner_messages_total", "kind" => request.kind.as_str(),
            "outcome" => outcome)
        .increment(1);
        if reply.send(result).is_err() {
            tracing::debug!(
                key = request.key,
                "the caller no longer waits for this message"
            );
        }
    }

    /// Writes the message, unless its key has one: gas, nonce, signature, journal, push.
    async fn write(&self, from: Address, request: &SendRequest) -> Result<Cid, SendError> {
        let key = &request.key;
        if let Some(record) = self.record(key).await? {
            return Ok(record.cid);
        }
        let draft = self.priced(from, request).await?;
        let signed = self.numbered_and_signed(draft, key).await?;
        let record = Record::new(request.kind, &signed, self.height(), unix_ms());
        let record = self.journaled(key, record).await?;
        let cid = record.cid;
        tracing::info!(key, %cid, nonce = record.nonce, method = request.method, "message signed");
        self.push(key, &record).await;
        Ok(cid)
    }

    /// The message with its gas, within the fee limit and what the sender has.
    async fn priced(&self, from: Address, request: &SendRequest) -> Result<Message, SendError> {
        let key = &request.key;
        let limit = match &request.max_fee {
            Some(limit) => limit.clone(),
            None => self.cfg.max_fee(request.kind),
        };
        let bare = Message {
            version: 0,
            to: request.to,
            from,
            nonce: 0,
            value: request.value.clone(),
            gas_limit: 0,
            gas_fee_cap: TokenAmount::default(),
            gas_premium: TokenAmount::default(),
            method: request.method,
            params: request.params.clone(),
        };
        let spec = MessageSendSpec {
            max_fee: limit.clone(),
            ..MessageSendSpec::default()
        };
        let estimate = self
            .node
            .gas_estimate_message_gas(&bare, Some(&spec), &TipSetKey::HEAD)
            .await;
        let mut msg = match estimate {
            Ok(msg) => msg,
            Err(e @ NodeError::Rpc { .. }) => return Err(self.explained(&bare, key, e).await),
            Err(e) => return Err(e.into()),
        };
        // The node's word counts for gas alone.
        msg = Message {
            gas_limit: msg.gas_limit,
            gas_fee_cap: msg.gas_fee_cap,
            gas_premium: msg.gas_premium,
            ..bare
        };
        if msg.max_fee() > limit && msg.gas_limit > 0 {
            msg.gas_fee_cap = limit.div_floor(msg.gas_limit);
            let base = self
                .head()
                .map(|h| h.min_ticket_block().parent_base_fee.clone());
            let base = base.unwrap_or_default();
            if msg.gas_fee_cap < base {
                return Err(SendError::FeeLimit {
                    key: key.clone(),
                    needed: base * msg.gas_limit,
                    limit,
                });
            }
        }
        if msg.gas_premium > msg.gas_fee_cap {
            msg.gas_premium = msg.gas_fee_cap.clone();
        }
        let needed = &msg.value + msg.max_fee();
        let balance = self.node.wallet_balance(from).await?;
        if balance < needed {
            return Err(SendError::Funds {
                key: key.clone(),
                from: from.to_string(),
                balance,
                needed,
            });
        }
        Ok(msg)
    }

    /// Why gas could not be estimated: if executing the message fails, that is the chain's
    /// verdict; otherwise it is the node's trouble.
    async fn explained(&self, msg: &Message, key: &str, e: NodeError) -> SendError {
        let call = match self.node.state_call(msg, &TipSetKey::HEAD).await {
            Ok(call) => call,
            Err(_) => return e.into(),
        };
        let Some(exit_code) = call.msg_rct.map(|r| r.exit_code).filter(|c| *c != 0) else {
            return e.into();
        };
        let name = u32::try_from(exit_code).map_or_else(
            |_| format!("exit code {exit_code}"),
            |code| exit_name(ExitCode::new(code)),
        );
        SendError::Refused {
            key: key.into(),
            exit_code,
            why: format!("{name}: {}", call.error),
        }
    }

    async fn numbered_and_signed(
        &self,
        mut msg: Message,
        key: &str,
    ) -> Result<SignedMessage, SendError> {
        let from = msg.from;
        let of_node = self.node.mpool_get_nonce(from).await?;
        let lane = from.to_string();
        let own = self
            .journal(move |j| j.read(|v| v.get(&NEXT_NONCE, &lane)))
            .await?;
        // The mempool may have forgotten what is journaled; it is pushed again.
        msg.nonce = of_node.max(own.unwrap_or(0));
        let signed = self.node.wallet_sign_message(from, &msg).await?;
        if signed.message != msg {
            return Err(SendError::Broken {
                key: key.into(),
                why: "the wallet signed another message than it was given".into(),
            });
        }
        Ok(signed)
    }

    /// Journals the message, unless its key has one by now. Returns the one that counts.
    async fn journaled(&self, key: &str, record: Record) -> Result<Record, SendError> {
        let key = key.to_owned();
        self.journal(move |j| {
            j.write(|tx| {
                if let Some(first) = tx.get(&MESSAGES, &key)? {
                    return Ok(first);
                }
                tx.put(&MESSAGES, &key, &record)?;
                tx.put(&OPEN, &(record.from.clone(), record.nonce), &key)?;
                tx.put(&NEXT_NONCE, &record.from, &(record.nonce + 1))?;
                Ok(record)
            })
        })
        .await
    }

    /// Pushes the journaled bytes. Whatever the node says, the message stays journaled and is
    /// pushed again until it is on chain.
    pub(crate) async fn push(&self, key: &str, record: &Record) {
        let pushed = match record.signed(key) {
            Ok(signed) => self.node.mpool_push(&signed).await.map_err(SendError::from),
            Err(e) => Err(e),
        };
        match pushed {
            Ok(_) => {
                lock(&self.push_errors).remove(key);
            }
            Err(e) => {
                tracing::warn!(key, cid = %record.cid, error = %e, "message not pushed yet");
                lock(&self.push_errors).insert(key.to_owned(), e.to_string());
            }
        }
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
