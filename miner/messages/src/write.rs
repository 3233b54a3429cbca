use std::sync::Arc;
use std::time::Duration;

use cid::Cid;
use lotus_actors::{ExitCode, exit_name};
use lotus_node_client::NodeError;
use lotus_node_client::api::{Message, MessageSendSpec, SignedMessage, TipSetKey};
use lotus_runtime::Backoff;
use lotus_types::{Address, Kind, TokenAmount};

use crate::breaker::Event;
use crate::fees::{OverCap, day, fits};
use crate::message::{FEES, MAX_OPEN, MESSAGES, MessageKind, NEXT_NONCE, OPEN, Record, reserved};
use crate::money::{Change, Quote, note, unix_ms};
use crate::runner::Job;
use crate::sender::{Shared, lock};
use crate::{SendError, SendRequest};

/// What became of a signed message.
enum Journaled {
    /// It is journaled.
    New(Record, Change),
    /// Its key had a message by now.
    Known(Record),
    /// The day's fees are spent: it was not journaled.
    Over(OverCap),
}

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
        self.remember(&request, &result);
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

    /// Writes the message, unless its key has one: limits, gas, nonce, signature, journal, push.
    async fn write(&self, from: Address, request: &SendRequest) -> Result<Cid, SendError> {
        let (key, kind) = (&request.key, request.kind);
        if let Some(record) = self.record(key).await? {
            return Ok(record.cid());
        }
        if let Some(stop) = self.stopped(kind).await? {
            let stop = Box::new(stop);
            return Err(SendError::Halted { kind, stop });
        }
        let quote = match self.priced(from, request).await {
            Ok(quote) => quote,
            Err(e) => {
                self.note_failure(request, &e).await?;
                return Err(e);
            }
        };
        let fee = quote.max_fee();
        let limit = quote.limit.clone();
        let signed = self.numbered_and_signed(request, quote).await?;
        let now = self.head_now().await?.height;
        let record = Record::new(kind, &signed, limit, now, unix_ms());
        let record = match self.journaled(key, record).await? {
            Journaled::Known(record) => return Ok(record.cid()),
            Journaled::Over(over) => {
                let e = SendError::DailyCap {
                    key: key.clone(),
                    over: Box::new(over),
                    needed: fee,
                };
                if let Some(event) = self.over_cap(now, &e) {
                    self.note(kind, event).await?;
                }
                return Err(e);
            }
            Journaled::New(record, change) => {
                change.announce(kind);
                record
            }
        };
        let cid = record.cid();
        tracing::info!(key, %cid, from = record.from, nonce = record.nonce,
            method = request.method, value = %record.value, max_fee = %fee, "message signed");
        self.push(key, &record).await;
        Ok(cid)
    }

    /// The message's gas and its price, within the fee limit and what the sender has.
    pub(crate) async fn priced(
        &self,
        from: Address,
        request: &SendRequest,
    ) -> Result<Quote, SendError> {
        let (key, kind, value) = (&request.key, request.kind, &request.value);
        let available = self.available(from, &self.open().await?).await?;
        let mut limit = self.limit(request);
        let spare = &available - value;
        let poor = |needed: TokenAmount| SendError::Funds {
            key: key.clone(),
            from: from.to_string(),
            available: available.clone(),
            needed,
        };
        // Before the node is asked: it would execute the message and call it a failure.
        if !spare.is_positive() {
            return Err(poor(value + limit));
        }
        // WindowPoSt makes do with what there is.
        let short = kind == MessageKind::Post && spare < limit;
        if short {
            limit = spare;
        }
        let bare = draft(from, request);
        let spec = MessageSendSpec {
            max_fee: limit.clone(),
            ..MessageSendSpec::default()
        };
        let estimate = self
            .node
            .gas_estimate_message_gas(&bare, Some(&spec), &TipSetKey::HEAD)
            .await;
        let msg = match estimate {
            Ok(msg) => msg,
            Err(e @ NodeError::Rpc { .. }) => return Err(self.explained(&bare, key, e).await),
            Err(e) => return Err(e.into()),
        };
        // The node's word counts for gas alone.
        let mut quote = Quote {
            from,
            available: available.clone(),
            value: value.clone(),
            gas_limit: msg.gas_limit,
            fee_cap: msg.gas_fee_cap,
            premium: msg.gas_premium,
            limit,
        };
        if quote.gas_limit > 0 {
            let most = quote.limit.div_floor(quote.gas_limit);
            quote.fee_cap = quote.fee_cap.min(most);
            let head = self.head_now().await?;
            let base = &head.min_ticket_block().parent_base_fee;
            if quote.fee_cap < *base {
                let needed = base * quote.gas_limit;
                return Err(if short {
                    poor(value + needed)
                } else {
                    SendError::FeeLimit {
                        key: key.clone(),
                        needed,
                        limit: quote.limit,
                    }
                });
            }
        }
        quote.premium = quote.premium.min(quote.fee_cap.clone());
        let needed = value + quote.max_fee();
        if available < needed {
            return Err(poor(needed));
        }
        let above = available - self.floor(kind, from);
        if above < needed {
            return Err(SendError::Floor {
                key: key.clone(),
                from: from.to_string(),
                above,
                needed,
            });
        }
        Ok(quote)
    }

    /// Why gas could not be estimated: if executing the message fails, that is the chain's
    /// verdict, or it waits for money; otherwise it is the node's trouble.
    async fn explained(&self, msg: &Message, key: &str, e: NodeError) -> SendError {
        let call = match self.node.state_call(msg, &TipSetKey::HEAD).await {
            Ok(call) => call,
            Err(_) => return e.into(),
        };
        let Some(exit_code) = call.msg_rct.map(|r| r.exit_code).filter(|c| *c != 0) else {
            return e.into();
        };
        let code = u32::try_from(exit_code).map(ExitCode::new);
        let name = code.map_or_else(|_| format!("exit code {exit_code}"), exit_name);
        let (key, why) = (key.to_owned(), format!("{name}: {}", call.error));
        match whose_funds(msg, code.ok()) {
            Some(who) => SendError::Unfunded {
                key,
                who: who.to_string(),
                why,
            },
            None => SendError::Refused {
                key,
                exit_code,
                why,
            },
        }
    }

    async fn numbered_and_signed(
        &self,
        request: &SendRequest,
        quote: Quote,
    ) -> Result<SignedMessage, SendError> {
        let from = quote.from;
        let of_node = self.node.mpool_get_nonce(from).await?;
        let lane = from.to_string();
        let own = self
            .journal(move |j| j.read(|v| v.get(&NEXT_NONCE, &lane)))
            .await?;
        let msg = Message {
            // The mempool may have forgotten what is journaled; it is pushed again.
            nonce: of_node.max(own.unwrap_or(0)),
            gas_limit: quote.gas_limit,
            gas_fee_cap: quote.fee_cap,
            gas_premium: quote.premium,
            ..draft(from, request)
        };
        self.sign(&request.key, &msg).await
    }

    pub(crate) async fn sign(&self, key: &str, msg: &Message) -> Result<SignedMessage, SendError> {
        let signed = self.node.wallet_sign_message(msg.from, msg).await?;
        if signed.message != *msg {
            return Err(SendError::Broken {
                key: key.into(),
                why: "the wallet signed another message than it was given".into(),
            });
        }
        Ok(signed)
    }

    /// Journals the message, unless its key has one by now or the day's fees are spent. All
    /// writers go through here one at a time, so that together they keep the limit too.
    async fn journaled(&self, key: &str, record: Record) -> Result<Journaled, SendError> {
        let key = key.to_owned();
        let (fees, breaker) = (self.cfg.fees.clone(), self.cfg.breaker.clone());
        self.journal(move |j| {
            j.write(|tx| {
                if let Some(first) = tx.get(&MESSAGES, &key)? {
                    return Ok(Journaled::Known(first));
                }
                let now = record.sent_at;
                let spent = tx.get(&FEES, &day(&fees, now))?.unwrap_or_default();
                let reserved = reserved(&tx.scan(&OPEN, None, MAX_OPEN)?);
                let fee = record.max_fee();
                if let Err(over) = fits(&fees, record.kind, &spent, &reserved, &fee) {
                    return Ok(Journaled::Over(over));
                }
                record.put(tx, &key)?;
                tx.put(&NEXT_NONCE, &record.from, &(record.nonce + 1))?;
                let change = note(tx, &breaker, record.kind, now, Event::Signed)?;
                Ok(Journaled::New(record, change))
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
            // It waits in the head to be executed, or another one with its nonce does: the search
            // of the next rounds tells which.
            Err(SendError::Node(e)) if e.is_nonce_taken() => {
                tracing::debug!(key, cid = %record.cid(), error = %e, "message not pushed again");
            }
            Err(e) => {
                tracing::warn!(key, cid = %record.cid(), error = %e, "message not pushed yet");
                lock(&self.push_errors).insert(key.to_owned(), e.to_string());
            }
        }
    }
}

/// Whose funds are short, by the code with which a message fails. A sender may be short although
/// its balance is not: other programs' messages wait in the node's mempool.
fn whose_funds(msg: &Message, code: Option<ExitCode>) -> Option<Address> {
    match code? {
        ExitCode::SYS_INSUFFICIENT_FUNDS => Some(msg.from),
        ExitCode::USR_INSUFFICIENT_FUNDS => Some(msg.to),
        _ => None,
    }
}

fn draft(from: Address, request: &SendRequest) -> Message {
    Message {
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
    }
}
