//! `Range` of RFC 9110, section 14.

use std::ops::Range;

/// Ranges of one request; more are refused, for they only make work.
const MAX_RANGES: usize = 16;

/// What a `Range` header asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Asked {
    /// The whole, because there is no header that means anything here.
    All,
    /// One or more parts, as asked, none empty.
    Parts(Vec<Range<u64>>),
    /// Nothing that there is.
    Unsatisfiable,
}

pub(crate) fn parse(header: Option<&str>, len: u64) -> Asked {
    let Some(list) = header.and_then(|h| h.trim().strip_prefix("bytes=")) else {
        return Asked::All;
    };
    let mut parts = Vec::new();
    for (i, spec) in list.split(',').map(str::trim).enumerate() {
        if i >= MAX_RANGES {
            return Asked::Unsatisfiable;
        }
        let Some((first, last)) = spec.split_once('-') else {
            return Asked::All;
        };
        let range = match (number(first), number(last)) {
            (Some(Some(a)), Some(None)) => a..len,
            (Some(Some(a)), Some(Some(b))) if a <= b => a..b.saturating_add(1).min(len),
            (Some(None), Some(Some(n))) => len.saturating_sub(n)..len,
            _ => return Asked::All,
        };
        if range.start < range.end {
            parts.push(range);
        }
    }
    if parts.is_empty() {
        return Asked::Unsatisfiable;
    }
    // Overlapping parts could make the answer larger than the whole many times over.
    let total = parts
        .iter()
        .fold(0u64, |n, r| n.saturating_add(r.end - r.start));
    if parts.len() > 1 && total > len {
        return Asked::Unsatisfiable;
    }
    Asked::Parts(parts)
}

/// `Some(None)` is nothing, `None` is no number.
fn number(text: &str) -> Option<Option<u64>> {
    if text.is_empty() {
        return Some(None);
    }
    text.bytes().all(|b| b.is_ascii_digit()).then_some(())?;
    // What does not fit is beyond any piece.
    Some(Some(text.parse().unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Asked::{All, Parts, Unsatisfiable};
    use super::*;

    #[test]
    fn ranges_are_read_as_the_rfc_says() {
        let one = |r: Range<u64>| Parts(vec![r]);
        for (header, want) in [
            ("bytes=0-0", one(0..1)),
            ("bytes=0-", one(0..100)),
            ("bytes=99-", one(99..100)),
            ("bytes=50-500", one(50..100)),
            ("bytes=-1", one(99..100)),
            ("bytes=-500", one(0..100)),
            ("bytes=0-99999999999999999999999", one(0..100)),
            ("bytes=1-2, 4-5 ,-1", Parts(vec![1..3, 4..6, 99..100])),
            ("bytes=100-", Unsatisfiable),
            ("bytes=-0", Unsatisfiable),
            ("bytes=100-200,300-", Unsatisfiable),
            ("bytes=0-,0-", Unsatisfiable),
            ("bytes=5-2", All),
            ("bytes=", All),
            ("bytes=a-b", All),
            ("bytes=-", All),
            ("bytes=+1-2", All),
            ("lines=1-2", All),
        ] {
            assert_eq!(parse(Some(header), 100), want, "{header}");
        }
        assert_eq!(parse(None, 100), All);
        assert_eq!(parse(Some("bytes=0-"), 0), Unsatisfiable);
        let many = format!("bytes={}", vec!["1-1"; 17].join(","));
        assert_eq!(parse(Some(&many), 100), Unsatisfiable);
    }

    proptest! {
        #[test]
        fn no_range_is_larger_than_what_there_is(
            specs in prop::collection::vec("(\\d{0,21}-\\d{0,21}|[ -~]{0,6})", 0..20),
            len in prop_oneof![0u64..200, any::<u64>()],
        ) {
            if let Parts(parts) = parse(Some(&format!("bytes={}", specs.join(","))), len) {
                prop_assert!((1..=MAX_RANGES).contains(&parts.len()));
                let mut sum = 0u64;
                for part in parts {
                    prop_assert!(part.start < part.end && part.end <= len, "{part:?}");
                    sum = sum.saturating_add(part.end - part.start);
                }
                prop_assert!(sum <= len);
            }
        }
    }
}
