//! Rewards, deposits, pledges and penalties.

use lotus_actors::miner::{
    initial_pledge_for_power, locked_reward_from_reward, pledge_penalty_for_continued_fault,
    pledge_penalty_for_invalid_windowpost, pledge_penalty_for_termination,
    pre_commit_deposit_for_power, qa_power_max,
};
use lotus_actors::{BigInt, EXPECTED_LEADERS, FilterEstimate, actors};
use lotus_types::TokenAmount;

use super::Env;
use crate::policy::Policy;
use crate::state::{ActorKind, Miner, State};

/// The estimates from which the actors compute amounts.
#[derive(Clone, Debug)]
pub struct Economy {
    reward: FilterEstimate,
    power: FilterEstimate,
    floor: BigInt,
    circulating: TokenAmount,
}

impl Economy {
    /// The estimates at a state.
    #[must_use]
    pub fn of(state: &State, policy: &Policy) -> Self {
        let reward = TokenAmount::from_whole(policy.epoch_reward_fil);
        let floor = BigInt::from(policy.power_floor);
        let power = state.total_power().qa.max(floor.clone());
        Self {
            reward: FilterEstimate::new(reward.atto().clone(), BigInt::default()),
            power: FilterEstimate::new(power, BigInt::default()),
            floor,
            circulating: circulating(state),
        }
    }

    /// Deposit for one sector's pre-commit: as if all of its data were verified.
    #[must_use]
    pub fn pre_commit_deposit(&self, size: fvm_shared::sector::SectorSize) -> TokenAmount {
        pre_commit_deposit_for_power(&self.reward, &self.power, &qa_power_max(size))
    }

    /// Pledge for power.
    #[must_use]
    pub fn pledge(&self, qa_power: &BigInt) -> TokenAmount {
        initial_pledge_for_power(
            qa_power,
            &self.floor,
            &self.reward,
            &self.power,
            &self.circulating,
            0,
            0,
        )
    }

    /// Fee of one proving period for faulty power.
    #[must_use]
    pub fn fault_fee(&self, qa_power: &BigInt) -> TokenAmount {
        pledge_penalty_for_continued_fault(&self.reward, &self.power, qa_power)
    }

    /// Fee for ending a sector before its time.
    #[must_use]
    pub fn termination_fee(
        &self,
        pledge: &TokenAmount,
        age: i64,
        qa_power: &BigInt,
    ) -> TokenAmount {
        pledge_penalty_for_termination(pledge, age, &self.fault_fee(qa_power))
    }

    /// Penalty for a PoSt that was disputed.
    #[must_use]
    pub fn wrong_post_penalty(&self, qa_power: &BigInt) -> TokenAmount {
        pledge_penalty_for_invalid_windowpost(&self.reward, &self.power, qa_power)
    }
}

/// Funds outside of the reward actor, not burnt.
#[must_use]
pub(crate) fn circulating(state: &State) -> TokenAmount {
    let mut sum = TokenAmount::default();
    for (id, a) in &state.accounts.by_id {
        if *id != actors::REWARD.0 && *id != actors::BURNT_FUNDS.0 {
            sum += &a.balance;
        }
    }
    sum
}

/// Pays a block: its wins' share of the epoch's reward, of which a miner's vests three quarters,
/// and the tips of its messages.
pub(super) fn reward(state: &mut State, env: &Env<'_>, to: u64, wins: i64, tips: &TokenAmount) {
    let epoch = TokenAmount::from_whole(env.policy.epoch_reward_fil);
    let share = epoch.div_floor(EXPECTED_LEADERS) * wins.max(0).cast_unsigned();
    let amount = share + tips;
    if !state.transfer(actors::REWARD.0, to, &amount) {
        return; // everything is minted
    }
    if state.account(to).map(|a| a.kind) != Some(ActorKind::Miner) {
        return;
    }
    if let Some(part) = state.miners.get_mut(&to) {
        let (locked, spec) = locked_reward_from_reward(amount);
        let m = part.edit();
        m.vest(env.epoch);
        m.lock_reward(env.epoch, &locked, spec.vest_period, spec.step_duration);
    }
    if state
        .miners
        .get(&to)
        .is_some_and(|m| m.fee_debt.is_positive())
    {
        let mut m = Miner::clone(&state.miners[&to]);
        penalize(state, &mut m, &TokenAmount::default());
        state.miners.insert(to, m.into());
    }
}

/// Adds a penalty to the miner's debt and pays as much of the debt as its funds allow: from what
/// vests first, then from what is unlocked. Returns what was burnt.
pub(super) fn penalize(state: &mut State, m: &mut Miner, penalty: &TokenAmount) -> TokenAmount {
    m.fee_debt += penalty;
    if !m.fee_debt.is_positive() {
        return TokenAmount::default();
    }
    let debt = m.fee_debt.clone();
    m.unlock_for_penalty(&debt);
    let unlocked = m.unlocked(&state.balance(m.id)).max(TokenAmount::default());
    let burnt = state.burn(m.id, &unlocked.min(debt));
    m.fee_debt -= &burnt;
    burnt
}
