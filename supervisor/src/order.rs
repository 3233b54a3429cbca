//! Who may start and who may stop now: pure functions over the graph.

use std::collections::HashMap;

use crate::processes::Process;
use crate::table::State;

/// Names of what `process` waits for.
#[must_use]
pub fn unmet<'a>(process: &'a Process, states: &HashMap<String, State>) -> Vec<&'a str> {
    process
        .after
        .iter()
        .filter(|name| !states.get(*name).is_some_and(State::satisfies))
        .map(String::as_str)
        .collect()
}

/// In a stop of everything: those that nobody alive depends on, so that spokes stop before the
/// hub and the hub before the node.
#[must_use]
pub fn may_stop<'a>(all: &'a [Process], states: &HashMap<String, State>) -> Vec<&'a str> {
    let idle = |name: &str| states.get(name).is_none_or(|s| *s == State::Stopped);
    all.iter()
        .filter(|p| !idle(&p.name))
        .filter(|p| {
            all.iter()
                .filter(|other| other.after.contains(&p.name))
                .all(|other| idle(&other.name))
        })
        .map(|p| p.name.as_str())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(name: &str, after: &[&str]) -> Process {
        Process {
            after: after.iter().map(|s| (*s).to_owned()).collect(),
            ..Process::new(name, vec![])
        }
    }

    #[test]
    fn starts_follow_readiness_and_stops_reverse_it() {
        let all = [
            process("node", &[]),
            process("hub", &["node"]),
            process("deals", &["hub"]),
            process("retrieval", &["hub"]),
        ];
        let mut states: HashMap<String, State> =
            all.iter().map(|p| (p.name.clone(), State::Ready)).collect();
        assert!(unmet(&all[1], &states).is_empty());
        states.insert("node".into(), State::Starting);
        assert_eq!(unmet(&all[1], &states), ["node"]);
        states.insert("node".into(), State::Ready);

        assert_eq!(may_stop(&all, &states), ["deals", "retrieval"]);
        states.insert("deals".into(), State::Stopped);
        states.insert("retrieval".into(), State::Stopping { then_start: false });
        assert_eq!(
            may_stop(&all, &states),
            ["retrieval"],
            "the hub waits for it"
        );
        states.insert("retrieval".into(), State::Stopped);
        assert_eq!(may_stop(&all, &states), ["hub"]);
        states.insert("hub".into(), State::Stopped);
        assert_eq!(may_stop(&all, &states), ["node"]);
        states.insert("node".into(), State::Stopped);
        assert!(may_stop(&all, &states).is_empty());
    }
}
