//! What a run of `cargo test` did, summed over its test programs.

use std::fmt;

/// Lines of a failed test's output that are repeated.
const PRINTED: usize = 60;

/// The sums, and each test that could not run here.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    programs: usize,
    passed: u64,
    failed: u64,
    ignored: u64,
    failures: Vec<String>,
    /// What the failed tests printed, so that it stands at the end of a long log too.
    printed: Vec<String>,
    /// Lines that the failed test at hand may still add.
    room: usize,
    /// A test that needs what this machine lacks says `SKIPPED name: what to do`.
    skipped: Vec<String>,
}

impl Counted {
    /// Reads one line of the output of `cargo test`.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(sums) = line.strip_prefix("test result: ") {
            self.programs += 1;
            self.passed += number_before(sums, " passed");
            self.failed += number_before(sums, " failed");
            self.ignored += number_before(sums, " ignored");
        } else if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|l| l.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        } else if line.starts_with("---- ") && line.ends_with(" stdout ----") {
            self.room = PRINTED;
            self.printed.push(line.to_owned());
        } else if line == "failures:" {
            self.room = 0;
        } else if self.room > 0 {
            self.room -= 1;
            self.printed.push(line.to_owned());
        } else if let Some(at) = line.find("SKIPPED ") {
            self.skipped.push(line[at..].to_owned());
        }
    }
}

fn number_before(text: &str, word: &str) -> u64 {
    text.split(word)
        .next()
        .and_then(|head| head.rsplit(' ').next())
        .and_then(|digits| digits.parse().ok())
        .unwrap_or(0)
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.printed {
            writeln!(f, "{line}")?;
        }
        for name in &self.failures {
            writeln!(f, "FAILED {name}")?;
        }
        for line in &self.skipped {
            writeln!(f, "{line}")?;
        }
        write!(
            f,
            "tests: {} passed, {} failed, {} ignored, {} skipped, in {} test programs",
            self.passed,
            self.failed,
            self.ignored,
            self.skipped.len(),
            self.programs
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_summed_and_failures_and_skips_are_named() {
        let mut counted = Counted::default();
        for line in [
            "test a ... ok",
            "test b::c ... FAILED",
            "test d ... SKIPPED d: mounting needs root",
            "",
            "failures:",
            "",
            "---- b::c stdout ----",
            "it was 3",
            "failures:",
            "    b::c",
            "test result: FAILED. 12 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out",
            "test result: ok. 30 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out",
        ] {
            counted.line(line);
        }
        assert_eq!(
            counted.to_string(),
            "---- b::c stdout ----\nit was 3\nFAILED b::c\nSKIPPED d: mounting needs root\n\
             tests: 42 passed, 1 failed, 2 ignored, 1 skipped, in 2 test programs"
        );
    }
}
