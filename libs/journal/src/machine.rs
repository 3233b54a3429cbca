use std::fmt;
use std::marker::PhantomData;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::store::Entries;
use crate::{Journal, JournalError, JournalKey, Map, Tx};

/// A pure state machine: a table from state and event to state and effects. `step` does no I/O
/// and reads no clock.
pub trait Machine {
    /// Prefix of the machine's tables in the journal.
    const NAME: &'static str;
    /// Map of the states. Its name must start with [`Machine::NAME`].
    const STATES: Map<Self::Key, Self::State>;
    /// Map of the unsettled effects. Its name must start with [`Machine::NAME`].
    const EFFECTS: Map<EffectId, (Vec<u8>, Self::Effect)>;

    /// Names one instance.
    type Key: JournalKey;
    /// State of one instance.
    type State: Clone + Serialize + DeserializeOwned;
    /// What happens to an instance.
    type Event;
    /// What is to be done in the world; run again after a crash, so it must be idempotent.
    type Effect: Clone + Serialize + DeserializeOwned;

    /// The table. `None`: the event changes nothing here.
    fn step(
        state: Option<&Self::State>,
        event: &Self::Event,
    ) -> Option<(Self::State, Vec<Self::Effect>)>;
}

/// Names an effect in the journal; counts up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EffectId(pub u64);

impl JournalKey for EffectId {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
    }
    fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        u64::decode(bytes).map(|(n, rest)| (Self(n), rest))
    }
}

/// An effect that is journaled and not settled.
pub struct Pending<M: Machine> {
    /// To settle it.
    pub id: EffectId,
    /// The instance it belongs to.
    pub key: M::Key,
    /// What to do.
    pub effect: M::Effect,
}

impl<M: Machine<Key: fmt::Debug, Effect: fmt::Debug>> fmt::Debug for Pending<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending")
            .field("id", &self.id)
            .field("key", &self.key)
            .field("effect", &self.effect)
            .finish()
    }
}

/// What an event did.
pub struct Step<M: Machine> {
    /// The state before; `None` when the event created the instance.
    pub before: Option<M::State>,
    /// The state now.
    pub after: M::State,
    /// The effects to run now.
    pub effects: Vec<Pending<M>>,
}

impl<M: Machine<State: fmt::Debug>> fmt::Debug for Step<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Step")
            .field("before", &self.before)
            .field("after", &self.after)
            .field("effects", &self.effects.len())
            .finish()
    }
}

/// All instances of one machine in a journal.
pub struct Machines<M> {
    journal: Journal,
    machine: PhantomData<fn() -> M>,
}

impl<M> Clone for Machines<M> {
    fn clone(&self) -> Self {
        Self {
            journal: self.journal.clone(),
            machine: PhantomData,
        }
    }
}

impl<M: Machine> fmt::Debug for Machines<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Machines({})", M::NAME)
    }
}

/// Next effect id of every machine, kept apart from the effects so that ids are never reused.
const NEXT_EFFECT: Map<String, u64> = Map::new("machine.next_effect");

impl<M: Machine> Machines<M> {
    /// The machine's instances in this journal.
    #[must_use]
    pub const fn new(journal: Journal) -> Self {
        Self {
            journal,
            machine: PhantomData,
        }
    }

    /// The journal below.
    #[must_use]
    pub const fn journal(&self) -> &Journal {
        &self.journal
    }

    /// Applies an event in one transaction: the new state is saved, effect `settles` is dropped,
    /// the new effects are appended, and `also` writes what must change with it. Returns `None`
    /// when the table has nothing for the event (then `settles` is dropped all the same).
    pub fn apply(
        &self,
        key: &M::Key,
        event: &M::Event,
        settles: Option<EffectId>,
        also: impl FnOnce(&mut Tx, Option<&M::State>, &M::State) -> Result<(), JournalError>,
    ) -> Result<Option<Step<M>>, JournalError> {
        self.journal
            .write(|tx| Self::apply_in(tx, key, event, settles, also))
    }

    /// [`Machines::apply`] inside a transaction that does other things too.
    pub fn apply_in(
        tx: &mut Tx,
        key: &M::Key,
        event: &M::Event,
        settles: Option<EffectId>,
        also: impl FnOnce(&mut Tx, Option<&M::State>, &M::State) -> Result<(), JournalError>,
    ) -> Result<Option<Step<M>>, JournalError> {
        if let Some(id) = settles {
            tx.remove(&M::EFFECTS, &id)?;
        }
        let before = tx.get(&M::STATES, key)?;
        let Some((after, effects)) = M::step(before.as_ref(), event) else {
            return Ok(None);
        };
        tx.put(&M::STATES, key, &after)?;
        let mut pending = Vec::with_capacity(effects.len());
        if !effects.is_empty() {
            let counter = M::NAME.to_owned();
            let mut next = tx.get(&NEXT_EFFECT, &counter)?.unwrap_or(1);
            for effect in effects {
                let id = EffectId(next);
                next += 1;
                let mut key_bytes = Vec::new();
                key.encode(&mut key_bytes);
                let record = (key_bytes, effect);
                tx.put(&M::EFFECTS, &id, &record)?;
                pending.push(Self::pending_of(id, record)?);
            }
            tx.put(&NEXT_EFFECT, &counter, &next)?;
        }
        also(tx, before.as_ref(), &after)?;
        Ok(Some(Step {
            before,
            after,
            effects: pending,
        }))
    }

    fn pending_of(
        id: EffectId,
        (key, effect): (Vec<u8>, M::Effect),
    ) -> Result<Pending<M>, JournalError> {
        match M::Key::decode(&key) {
            Some((key, [])) => Ok(Pending { id, key, effect }),
            _ => Err(JournalError::Decode {
                table: M::NAME,
                why: format!("effect {} belongs to a key of another form", id.0),
            }),
        }
    }

    /// Drops an effect that is done and causes no event.
    pub fn settle(&self, id: EffectId) -> Result<(), JournalError> {
        self.journal
            .write(|tx| tx.remove(&M::EFFECTS, &id).map(|_| ()))
    }

    /// Every unsettled effect, oldest first: what to run again after a start.
    pub fn pending(&self) -> Result<Vec<Pending<M>>, JournalError> {
        self.collect(&M::EFFECTS)?
            .into_iter()
            .map(|(id, record)| Self::pending_of(id, record))
            .collect()
    }

    /// One instance.
    pub fn get(&self, key: &M::Key) -> Result<Option<M::State>, JournalError> {
        self.journal.read(|v| v.get(&M::STATES, key))
    }

    /// Every instance, in key order.
    pub fn all(&self) -> Result<Entries<M::Key, M::State>, JournalError> {
        self.collect(&M::STATES)
    }

    /// Calls `f` with every instance, in key order, and keeps none.
    pub fn each<E: From<JournalError>>(
        &self,
        f: impl FnMut(M::Key, M::State) -> Result<(), E>,
    ) -> Result<(), E> {
        self.journal.read(|view| view.each(&M::STATES, f))
    }

    fn collect<K: JournalKey, V: Serialize + DeserializeOwned>(
        &self,
        map: &Map<K, V>,
    ) -> Result<Entries<K, V>, JournalError> {
        let mut out = Vec::new();
        self.journal.read(|view| {
            view.each(map, |k, v| {
                out.push((k, v));
                Ok::<_, JournalError>(())
            })
        })?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A counter that asks for a bell at every even number.
    #[derive(Debug)]
    struct Counter;

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    enum Effect {
        Ring(u64),
    }

    #[derive(Debug, Clone, Copy)]
    enum Event {
        Add(u64),
        Nothing,
    }

    impl Machine for Counter {
        const NAME: &'static str = "counter";
        const STATES: Map<u64, u64> = Map::new("counter.states");
        const EFFECTS: Map<EffectId, (Vec<u8>, Effect)> = Map::new("counter.effects");
        type Key = u64;
        type State = u64;
        type Event = Event;
        type Effect = Effect;

        fn step(state: Option<&u64>, event: &Event) -> Option<(u64, Vec<Effect>)> {
            match event {
                Event::Add(n) => {
                    let now = state.copied().unwrap_or(0) + n;
                    let ring = (now % 2 == 0).then_some(Effect::Ring(now));
                    Some((now, ring.into_iter().collect()))
                }
                Event::Nothing => None,
            }
        }
    }

    const SUM: Map<u64, u64> = Map::new("sum");

    fn add(m: &Machines<Counter>, key: u64, n: u64) -> Step<Counter> {
        m.apply(&key, &Event::Add(n), None, |tx, _, _| {
            let sum = tx.get(&SUM, &0)?.unwrap_or(0);
            tx.put(&SUM, &0, &(sum + n))
        })
        .unwrap()
        .unwrap()
    }

    #[test]
    fn effects_outlive_the_process_until_settled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        {
            let m = Machines::<Counter>::new(Journal::open(&path).unwrap());
            assert_eq!(add(&m, 7, 2).effects.len(), 1);
            assert_eq!(add(&m, 7, 1).effects.len(), 0);
        }
        let m = Machines::<Counter>::new(Journal::open(&path).unwrap());
        assert_eq!(m.get(&7).unwrap(), Some(3));
        let pending = m.pending().unwrap();
        assert_eq!(pending.len(), 1);
        assert_eq!((pending[0].key, &pending[0].effect), (7, &Effect::Ring(2)));
        m.settle(pending[0].id).unwrap();
        assert!(m.pending().unwrap().is_empty());
        let next = add(&m, 7, 1);
        assert!(next.effects[0].id > pending[0].id, "ids are not reused");
    }

    #[test]
    fn an_event_without_a_row_settles_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let m = Machines::<Counter>::new(Journal::open(&dir.path().join("j")).unwrap());
        let id = add(&m, 1, 2).effects[0].id;
        let step = m
            .apply(&1, &Event::Nothing, Some(id), |_, _, _| Ok(()))
            .unwrap();
        assert!(step.is_none());
        assert!(m.pending().unwrap().is_empty());
        assert_eq!(m.get(&1).unwrap(), Some(2));
    }

    #[test]
    fn a_failed_transaction_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let m = Machines::<Counter>::new(Journal::open(&dir.path().join("j")).unwrap());
        let failed = m.apply(&1, &Event::Add(2), None, |tx, _, _| {
            tx.put(&SUM, &0, &99)?;
            Err(JournalError::DiskFull)
        });
        assert!(matches!(failed, Err(JournalError::DiskFull)));
        assert_eq!(m.get(&1).unwrap(), None);
        assert!(m.pending().unwrap().is_empty());
        let sum = m.journal().read(|v| v.get(&SUM, &0));
        assert!(matches!(sum, Ok::<_, JournalError>(None)));
    }

    #[test]
    fn a_second_opener_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let _first = Journal::open(&path).unwrap();
        assert!(matches!(
            Journal::open(&path),
            Err(JournalError::Locked { .. })
        ));
    }

    #[test]
    fn whoever_lost_its_file_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (path, aside) = (dir.path().join("j"), dir.path().join("aside"));
        let was = Machines::<Counter>::new(Journal::open(&path).unwrap());
        add(&was, 1, 1);
        for another in [false, true] {
            std::fs::rename(&path, &aside).unwrap();
            if another {
                std::fs::copy(&aside, &path).unwrap();
            }
            assert!(was.journal().check().is_err());
            let lost = was.apply(&1, &Event::Add(1), None, |_, _, _| Ok(()));
            assert!(matches!(lost, Err(JournalError::Moved { .. })), "{lost:?}");
            std::fs::rename(&aside, &path).unwrap();
        }
        assert_eq!(was.get(&1).unwrap(), Some(1));
        add(&was, 1, 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn side_tables_agree_with_states(adds in proptest::collection::vec((0u64..4, 0u64..100), 1..40)) {
            let dir = tempfile::tempdir().unwrap();
            let m = Machines::<Counter>::new(Journal::open(&dir.path().join("j")).unwrap());
            for (k, n) in &adds {
                add(&m, *k, *n);
            }
            let total: u64 = m.all().unwrap().iter().map(|(_, v)| v).sum();
            let sum = m.journal().read(|v| v.get(&SUM, &0));
            prop_assert_eq!(sum.map_err(|e: JournalError| e.to_string()), Ok(Some(total)));
        }
    }
}
