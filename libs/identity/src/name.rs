//! Names of services, of their instances, and of workers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A label: 1 to 32 of a to z, 0 to 9 and `-`, which is not at an edge.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        let edges = !text.starts_with('-') && !text.ends_with('-');
        if (1..=32).contains(&text.len()) && text.bytes().all(allowed) && edges {
            Ok(Self(text.into()))
        } else {
            Err(format!(
                "{text:?} is no name: give 1 to 32 of a-z, 0-9 and -, such as sealer-1"
            ))
        }
    }
}

impl TryFrom<String> for Name {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who calls the hub: an instance of a service. As text, `retrieval/r1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Caller {
    /// What it does, which says what it may.
    pub service: Name,
    /// Which of those that do it.
    pub instance: Name,
}

impl FromStr for Caller {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (service, instance) = text
            .split_once('/')
            .ok_or_else(|| format!("{text:?} is no caller: give SERVICE/INSTANCE"))?;
        Ok(Self {
            service: service.parse()?,
            instance: instance.parse()?,
        })
    }
}

impl TryFrom<String> for Caller {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Caller> for String {
    fn from(caller: Caller) -> Self {
        caller.to_string()
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.service, self.instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_labels() {
        for good in ["a", "sealer-1", "0"] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "A",
            "a.b",
            "-a",
            "a-",
            "a/../b",
            "ä",
            "a b",
            &"a".repeat(33),
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_caller_is_a_service_and_an_instance() {
        let caller: Caller = "retrieval/r1".parse().unwrap();
        assert_eq!(caller.service.as_str(), "retrieval");
        assert_eq!(caller.instance.as_str(), "r1");
        assert_eq!(caller.to_string(), "retrieval/r1");
        let json = serde_json::to_string(&caller).unwrap();
        assert_eq!(json, "\"retrieval/r1\"");
        assert_eq!(serde_json::from_str::<Caller>(&json).unwrap(), caller);
        for bad in ["", "retrieval", "/", "a/", "/a", "a/b/c", "A/b", "a/b.c"] {
            assert!(bad.parse::<Caller>().is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<Caller>("\"a/../b\"").is_err());
    }
}
