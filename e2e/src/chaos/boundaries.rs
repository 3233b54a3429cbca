//! At which steps of the sectors the hub died.

use std::collections::BTreeSet;

use crate::pieces::Entry;

/// Steps other than failures and what follows them, each written as `event -> state`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Boundaries {
    /// Those at which the hub died at least once: the step was in the journal, and the next one of
    /// its sector was not.
    pub(crate) hit: BTreeSet<String>,
    /// The others.
    pub(crate) missed: BTreeSet<String>,
}

/// Compares the sectors' logs with the moments, Unix milliseconds, at which the hub was dead.
pub(crate) fn boundaries<'a>(
    logs: impl IntoIterator<Item = &'a [Entry]>,
    deaths: &BTreeSet<u64>,
) -> Boundaries {
    let mut all = BTreeSet::new();
    let mut hit = BTreeSet::new();
    for log in logs {
        // After the last step nothing is left to do.
        for pair in log.windows(2) {
            let [step, next] = pair else { continue };
            // A failure that the chain or the moment brought may not come a second time.
            if [&step.from, &step.to].iter().any(|s| s.contains("Failed")) {
                continue;
            }
            let name = format!("{} -> {}", step.event, step.to);
            // A log's time is that of the transaction's beginning: a death at its end is later.
            if deaths.range(step.unix_ms..next.unix_ms).next().is_some() {
                hit.insert(name.clone());
            }
            all.insert(name);
        }
    }
    let missed = all.difference(&hit).cloned().collect();
    Boundaries { hit, missed }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(unix_ms: u64, event: &str) -> Entry {
        Entry {
            unix_ms,
            event: event.into(),
            from: String::new(),
            to: "State".into(),
            message: String::new(),
        }
    }

    #[test]
    fn a_death_counts_for_the_step_before_it() {
        let one = [
            entry(10, "A"),
            entry(20, "B"),
            entry(30, "C"),
            entry(40, "D"),
        ];
        let other = [entry(12, "A"), entry(35, "C"), entry(39, "D")];
        let deaths = [20, 29, 36, 41].into();
        let found = boundaries([&one[..], &other[..]], &deaths);
        let named = |names: &[&str]| names.iter().map(|n| format!("{n} -> State")).collect();
        assert_eq!(found.hit, named(&["A", "B", "C"]));
        assert_eq!(found.missed, BTreeSet::new());
        let found = boundaries([&one[..], &other[..]], &[36].into());
        assert_eq!(
            (found.hit, found.missed),
            (named(&["C"]), named(&["A", "B"]))
        );
    }
}
