use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use ulid::Ulid;

/// An id that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{input:?} is not {expected}")]
pub struct BadId {
    /// What was given.
    pub input: String,
    /// What was expected, with an example.
    pub expected: &'static str,
}

/// Numeric id of an actor, written `t01000` or `f01000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ActorId(pub u64);

impl ActorId {
    /// The ID address of this actor.
    #[must_use]
    pub fn address(self) -> crate::Address {
        crate::Address::new_id(self.0)
    }
}

impl fmt::Display for ActorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "t0{}", self.0)
    }
}

impl FromStr for ActorId {
    type Err = BadId;
    fn from_str(s: &str) -> Result<Self, BadId> {
        s.strip_prefix("t0")
            .or_else(|| s.strip_prefix("f0"))
            .and_then(|n| n.parse().ok())
            .map(Self)
            .ok_or_else(|| BadId {
                input: s.chars().take(64).collect(),
                expected: "an actor id such as t01000",
            })
    }
}

/// Number of a sector within its miner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SectorNumber(pub u64);

impl fmt::Display for SectorNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A sector of the network: its miner and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SectorId {
    /// The miner actor.
    pub miner: ActorId,
    /// The sector's number within that miner.
    pub number: SectorNumber,
}

/// File-name form, as Lotus writes it: `s-t01000-7`.
impl fmt::Display for SectorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s-{}-{}", self.miner, self.number)
    }
}

/// The hub's fencing token: persisted and raised at every start. A lease, credit or stream that
/// carries an older generation is refused.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The durable idempotency key of a piece hand-off: who made the deal, and the deal's ULID
/// (MK20) or UUID (MK1.2; both are 128 bits). A replay with the same key gives the same answer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DealKey {
    /// The client's address in text form.
    pub client: String,
    /// The deal's id.
    pub id: Ulid,
}

impl fmt::Display for DealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.client, self.id)
    }
}

impl FromStr for DealKey {
    type Err = BadId;
    fn from_str(s: &str) -> Result<Self, BadId> {
        let bad = || BadId {
            input: s.chars().take(128).collect(),
            expected: "a deal key such as t1abc/01ARZ3NDEKTSV4RRFFQ69G5FAV",
        };
        let (client, id) = s.split_once('/').ok_or_else(bad)?;
        if client.is_empty() || client.len() > 128 {
            return Err(bad());
        }
        Ok(Self {
            client: client.into(),
            id: id.parse().map_err(|_| bad())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_parse_what_they_print() {
        assert_eq!("t01000".parse(), Ok(ActorId(1000)));
        assert_eq!("f01000".parse(), Ok(ActorId(1000)));
        assert!("t1000".parse::<ActorId>().is_err());
        assert!("t0-5".parse::<ActorId>().is_err());
        let key = DealKey {
            client: "t1abc".into(),
            id: Ulid::from(7u128),
        };
        assert_eq!(key.to_string().parse(), Ok(key));
        assert!("/01ARZ3NDEKTSV4RRFFQ69G5FAV".parse::<DealKey>().is_err());
        let sector = SectorId {
            miner: ActorId(1000),
            number: SectorNumber(7),
        };
        assert_eq!(sector.to_string(), "s-t01000-7");
    }
}
