//! Who may call which method of the hub API. What a method says of itself is in `hub.proto`.

/// A method of the hub API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// `/hub.v1.Service/Method`, as a request names it.
    pub path: &'static str,
    /// Services that may call it; [`ANY`] for every one.
    pub callers: &'static [&'static str],
}

/// Stands for every service in [`Method::callers`].
pub const ANY: &str = "any";

/// Stands in [`Method::callers`] for a spoke that comes with a join bundle and has no identity yet.
pub const JOINING: &str = "joining";

/// Whoever may have an identity at the hub, in alphabetical order. `operator` is the command line,
/// `supervisor` asks when it is safe to stop the hub.
pub const SERVICES: [&str; 5] = ["deals", "indexing", "operator", "retrieval", "supervisor"];

include!("gen/access.rs");

impl Method {
    /// The method with this path.
    #[must_use]
    pub fn at(path: &str) -> Option<&'static Self> {
        METHODS.iter().find(|m| m.path == path)
    }

    /// Whether a service may call it.
    #[must_use]
    pub fn may(&self, service: &str) -> bool {
        SERVICES.contains(&service) && self.callers.iter().any(|c| *c == ANY || *c == service)
    }
}

/// Topics of the event stream that a service may see.
#[must_use]
pub fn topics(service: &str) -> &'static [&'static str] {
    match service {
        "deals" | "operator" => &["piece", "sector", "head"],
        "indexing" | "retrieval" => &["piece"],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_caller_is_a_service_and_every_service_calls() {
        let mut seen = std::collections::BTreeSet::new();
        for method in METHODS {
            assert!(!method.callers.is_empty(), "{}", method.path);
            let named = |c: &&&str| **c != ANY && **c != JOINING;
            for caller in method.callers.iter().filter(named) {
                assert!(SERVICES.contains(caller), "{}: {caller}", method.path);
                seen.insert(*caller);
            }
        }
        assert!(SERVICES.iter().all(|s| seen.contains(s)), "{seen:?}");
        assert!(SERVICES.is_sorted());
    }

    #[test]
    fn nobody_calls_what_is_not_theirs() {
        let may = |path, service| Method::at(path).is_some_and(|m| m.may(service));
        assert!(may("/hub.v1.Hub/Hello", "retrieval"));
        assert!(may("/hub.v1.Chain/Publish", "deals"));
        assert!(!may("/hub.v1.Chain/Publish", "retrieval"));
        assert!(!may("/hub.v1.Hub/Hello", "stranger"));
        assert!(!may("/hub.v1.Hub/Nothing", "operator"));
    }
}
