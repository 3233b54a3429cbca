//! The state transition: pure functions from a state and messages to the next state.
//!
//! Nothing here reads a clock or does I/O. Randomness comes through [`Draw`], proofs are checked
//! through the injected verifier.

mod account;
mod compact;
mod cron;
mod gas;
mod market;
mod money;
mod post;
mod power;
mod registry;
mod seals;
mod sectors;
mod update;

use lotus_actors::{Dst, ExitCode, decode};
use lotus_node_client::api::{Message, MessageReceipt, SignedMessage};
use lotus_proofs::Verifier;
use lotus_types::{Address, TokenAmount};
use serde::de::DeserializeOwned;

use crate::policy::Policy;
use crate::state::{ActorKind, Miner, State};

pub use gas::{Cost, next_base_fee};
pub use money::Economy;
pub(crate) use money::circulating;
pub(crate) use power::code_cid;
pub use power::create_miner;

/// An actor's refusal: everything that the message did is undone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Abort {
    /// The receipt's exit code.
    pub code: ExitCode,
    /// The actor's words.
    pub message: String,
}

/// Ends a method with an exit code.
macro_rules! abort {
    ($code:ident, $($arg:tt)*) => {
        return Err($crate::vm::Abort {
            code: lotus_actors::ExitCode::$code,
            message: format!($($arg)*),
        })
    };
}
pub(crate) use abort;

/// What a method returns: its return value's CBOR.
pub type Outcome = Result<Vec<u8>, Abort>;

/// Randomness of the chain on which a message executes.
pub trait Draw {
    /// From the ticket chain.
    fn tickets(&self, dst: Dst, epoch: i64, entropy: &[u8]) -> Result<[u8; 32], String>;
    /// From the beacon.
    fn beacon(&self, dst: Dst, epoch: i64, entropy: &[u8]) -> Result<[u8; 32], String>;
}

/// What a message can see of the world.
#[derive(Clone, Copy)]
pub struct Env<'a> {
    /// The network's constants.
    pub policy: &'a Policy,
    /// The epoch in which the message executes.
    pub epoch: i64,
    /// The chain's randomness.
    pub draw: &'a dyn Draw,
    /// Checks proofs.
    pub verifier: &'a dyn Verifier,
}

/// One method call.
pub(crate) struct Call<'a> {
    pub(crate) env: &'a Env<'a>,
    pub(crate) state: &'a mut State,
    pub(crate) caller: u64,
    pub(crate) to: u64,
    pub(crate) value: &'a TokenAmount,
    pub(crate) params: &'a [u8],
}

impl Call<'_> {
    pub(crate) fn params<T: DeserializeOwned>(&self) -> Result<T, Abort> {
        decode(self.params).map_err(|e| Abort {
            code: ExitCode::USR_SERIALIZATION,
            message: format!("failed to decode parameters: {e}"),
        })
    }

    pub(crate) fn epoch(&self) -> i64 {
        self.env.epoch
    }

    pub(crate) fn policy(&self) -> &Policy {
        self.env.policy
    }

    /// The called miner, to change and [`Call::save`].
    pub(crate) fn miner(&self) -> Result<Miner, Abort> {
        match self.state.miners.get(&self.to) {
            Some(m) => Ok(Miner::clone(m)),
            None => abort!(SYS_INVALID_RECEIVER, "actor t0{} is no miner", self.to),
        }
    }

    pub(crate) fn save(&mut self, m: Miner) {
        self.state.miners.insert(m.id, m.into());
    }

    /// Refuses everyone but owner, worker and control addresses.
    pub(crate) fn operators_only(&self, m: &Miner) -> Result<(), Abort> {
        if self.caller == m.owner || self.caller == m.worker || m.control.contains(&self.caller) {
            return Ok(());
        }
        abort!(
            USR_FORBIDDEN,
            "caller t0{} is not owner, worker or control address of t0{}",
            self.caller,
            m.id
        )
    }

    /// The miner's address as entropy.
    pub(crate) fn entropy(&self) -> Vec<u8> {
        lotus_actors::address_entropy(&Address::new_id(self.to))
    }

    pub(crate) fn tickets(&self, dst: Dst, epoch: i64, entropy: &[u8]) -> Result<[u8; 32], Abort> {
        self.env
            .draw
            .tickets(dst, epoch, entropy)
            .map_err(no_randomness)
    }

    pub(crate) fn beacon(&self, dst: Dst, epoch: i64, entropy: &[u8]) -> Result<[u8; 32], Abort> {
        self.env
            .draw
            .beacon(dst, epoch, entropy)
            .map_err(no_randomness)
    }

    /// Moves funds on behalf of the called actor.
    pub(crate) fn pay(&mut self, to: u64, amount: &TokenAmount) -> Result<(), Abort> {
        if self.state.transfer(self.to, to, amount) {
            return Ok(());
        }
        abort!(
            SYS_INSUFFICIENT_FUNDS,
            "t0{} can not pay {amount} to t0{to}",
            self.to
        )
    }
}

fn no_randomness(why: String) -> Abort {
    Abort {
        code: ExitCode::SYS_ILLEGAL_INSTRUCTION,
        message: format!("no randomness: {why}"),
    }
}

fn dispatch(call: Call<'_>, method: u64) -> Outcome {
    use lotus_actors::actors;
    let kind = call.state.account(call.to).map(|a| a.kind);
    if method == lotus_actors::METHOD_SEND {
        return Ok(Vec::new());
    }
    match (kind, call.to) {
        (Some(ActorKind::Miner), _) => miner_method(call, method),
        (_, id) if id == actors::POWER.0 => power::method(call, method),
        (_, id) if id == actors::MARKET.0 => market::method(call, method),
        (_, id) if id == actors::VERIFREG.0 => registry::verifreg(call, method),
        (_, id) if id == actors::DATACAP.0 => registry::datacap(call, method),
        _ => unhandled(method),
    }
}

pub(crate) fn unhandled(method: u64) -> Outcome {
    abort!(USR_UNHANDLED_MESSAGE, "no method {method} on this actor")
}

fn miner_method(call: Call<'_>, method: u64) -> Outcome {
    use lotus_actors::miner as m;
    match method {
        m::CONTROL_ADDRESSES => account::control_addresses(call),
        m::CHANGE_WORKER_ADDRESS => account::change_worker(call),
        m::CONFIRM_CHANGE_WORKER_ADDRESS => account::confirm_worker(call),
        m::CHANGE_OWNER_ADDRESS => account::change_owner(call),
        m::CHANGE_PEER_ID => account::change_peer_id(call),
        m::CHANGE_MULTIADDRS => account::change_multiaddrs(call),
        m::WITHDRAW_BALANCE => account::withdraw(call),
        m::REPAY_DEBT => account::repay_debt(call),
        m::PRE_COMMIT_SECTOR_BATCH2 => sectors::pre_commit(call),
        m::PROVE_COMMIT_SECTORS3 => sectors::prove_commit(call),
        m::PROVE_REPLICA_UPDATES3 => update::prove_updates(call),
        m::SUBMIT_WINDOWED_POST => post::submit(call),
        m::DISPUTE_WINDOWED_POST => post::dispute_message(call),
        m::DECLARE_FAULTS => post::declare_faults(call),
        m::DECLARE_FAULTS_RECOVERED => post::declare_recovered(call),
        m::TERMINATE_SECTORS => post::terminate(call),
        m::COMPACT_PARTITIONS => compact::method(call),
        m::MAX_TERMINATION_FEE => post::max_termination_fee(&call),
        m::EXTEND_SECTOR_EXPIRATION2 => update::extend(call),
        other => unhandled(other),
    }
}

/// What applying one message gave.
#[derive(Clone, Debug)]
pub struct Applied {
    /// The receipt.
    pub receipt: MessageReceipt,
    /// Who paid what.
    pub cost: Cost,
    /// Why it failed; empty on success.
    pub error: String,
}

impl Applied {
    fn skipped(code: ExitCode, error: String) -> Self {
        Self {
            receipt: receipt(code, Vec::new(), 0),
            cost: Cost::default(),
            error,
        }
    }
}

fn receipt(code: ExitCode, ret: Vec<u8>, gas: u64) -> MessageReceipt {
    MessageReceipt {
        exit_code: i64::from(code.value()),
        r#return: ret,
        gas_used: gas.cast_signed(),
        events_root: None,
    }
}

/// Applies a message: nonce, gas, value, method. The gas that it burns is burnt here; the tip is
/// left for the caller to pay out of [`lotus_actors::actors::REWARD`].
pub fn apply_message(
    state: &mut State,
    env: &Env<'_>,
    base_fee: &TokenAmount,
    msg: &Message,
) -> Applied {
    use lotus_actors::actors;
    let Some(from) = state.lookup(&msg.from) else {
        let why = format!("sender {} does not exist", msg.from);
        return Applied::skipped(ExitCode::SYS_SENDER_INVALID, why);
    };
    let invalid = |why: String| Applied::skipped(ExitCode::SYS_SENDER_STATE_INVALID, why);
    match state.account(from) {
        Some(a) if a.kind != ActorKind::Account => {
            return invalid(format!("sender t0{from} is not an account"));
        }
        Some(a) if a.nonce != msg.nonce => {
            return invalid(format!("nonce is {}, must be {}", msg.nonce, a.nonce));
        }
        Some(a) if a.balance < msg.max_fee() => {
            return invalid(format!(
                "balance {} is below the gas limit's cost",
                a.balance
            ));
        }
        Some(_) => {}
        None => return invalid(format!("sender t0{from} does not exist")),
    }
    if let Some(a) = state.accounts.edit().by_id.get_mut(&from) {
        a.nonce += 1;
    }
    let used = gas::of(msg);
    let outcome = if used > msg.gas_limit {
        Err(Abort {
            code: ExitCode::SYS_OUT_OF_GAS,
            message: format!("gas limit {} is below {used}", msg.gas_limit),
        })
    } else {
        let before = state.clone();
        let outcome = execute(state, env, msg, from);
        if outcome.is_err() {
            *state = before;
        }
        outcome
    };
    let used = used.min(msg.gas_limit);
    let cost = gas::settle(msg, used, base_fee);
    state.burn(from, &cost.burnt());
    // The balance was checked above and the value was moved only if enough was left for gas.
    let _paid = state.transfer(from, actors::REWARD.0, &cost.tip);
    let (code, ret, error) = match outcome {
        Ok(ret) => (ExitCode::OK, ret, String::new()),
        Err(a) => {
            let name = lotus_actors::exit_name(a.code);
            (
                a.code,
                Vec::new(),
                format!("{} ({name}, {})", a.message, a.code),
            )
        }
    };
    Applied {
        receipt: receipt(code, ret, used),
        cost,
        error,
    }
}

fn execute(state: &mut State, env: &Env<'_>, msg: &Message, from: u64) -> Outcome {
    let to = match state.lookup(&msg.to) {
        Some(id) => id,
        // Sending to a key that the chain has not seen makes its account.
        None if is_key(&msg.to) => state.create(ActorKind::Account, msg.to),
        None => abort!(SYS_INVALID_RECEIVER, "receiver {} does not exist", msg.to),
    };
    let spendable = state.balance(from) - msg.max_fee();
    if spendable < msg.value || !state.transfer(from, to, &msg.value) {
        abort!(
            SYS_INSUFFICIENT_FUNDS,
            "sender does not have {} to send",
            msg.value
        );
    }
    let call = Call {
        env,
        state,
        caller: from,
        to,
        value: &msg.value,
        params: &msg.params,
    };
    dispatch(call, msg.method)
}

fn is_key(a: &Address) -> bool {
    use fvm_shared::address::Protocol;
    matches!(a.protocol(), Protocol::BLS | Protocol::Secp256k1)
}

/// A block as the state transition sees it.
#[derive(Clone, Debug)]
pub struct BlockMessages<'a> {
    /// Who gets reward and tips.
    pub miner: u64,
    /// Wins of the election.
    pub wins: i64,
    /// In the block's order: BLS messages, then secp256k1 ones.
    pub messages: Vec<&'a SignedMessage>,
}

/// What applying a tipset gave.
#[derive(Debug)]
pub struct TipSetOutcome {
    /// One for each distinct message, in order of execution.
    pub applied: Vec<(cid::Cid, Applied)>,
    /// Gas limits of all messages, which moves the base fee.
    pub gas_limit: u64,
}

/// Applies a tipset to the state of its parent: cron for the null rounds between, the messages,
/// the rewards, cron. Source: lotus, chain/consensus/compute_state.go, ApplyBlocks.
pub fn apply_tipset(
    state: &mut State,
    env: &Env<'_>,
    parent_epoch: i64,
    base_fee: &TokenAmount,
    blocks: &[BlockMessages<'_>],
) -> TipSetOutcome {
    for epoch in parent_epoch + 1..env.epoch {
        cron::tick(state, &Env { epoch, ..*env });
    }
    let mut seen = std::collections::HashSet::new();
    let mut out = TipSetOutcome {
        applied: Vec::new(),
        gas_limit: 0,
    };
    for block in blocks {
        let mut tips = TokenAmount::default();
        for msg in &block.messages {
            let cid = msg.cid();
            if !seen.insert(cid) {
                continue;
            }
            let applied = apply_message(state, env, base_fee, &msg.message);
            tips += &applied.cost.tip;
            out.gas_limit = out.gas_limit.saturating_add(msg.message.gas_limit);
            out.applied.push((cid, applied));
        }
        money::reward(state, env, block.miner, block.wins, &tips);
    }
    cron::tick(state, env);
    out
}
