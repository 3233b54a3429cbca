use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::line::{Header, Line, Sealed as _};

/// Writes a file anew, line by line.
fn edit(dir: &Path, number: u64, edit: impl FnOnce(&mut Vec<Vec<u8>>)) {
    let path = scan::path(dir, number);
    let mut all = lines(&path);
    edit(&mut all);
    fs::write(path, all.concat()).unwrap();
}

/// A change of a file's lines.
type Edit = fn(&mut Vec<Vec<u8>>);

/// Eight records in one file: record n is on line n + 1.
fn eight() -> (tempfile::TempDir, Vec<Head>) {
    let dir = tempfile::tempdir().unwrap();
    let heads = grow(dir.path(), &AuditConfig::default(), 1..9);
    (dir, heads)
}

fn record(line: &[u8]) -> Record {
    match Line::parse(line.trim_ascii_end()) {
        Ok(Line::Record(record)) => record,
        other => panic!("{other:?}"),
    }
}

#[test]
fn problems_name_their_line() {
    let cases: [(&str, Edit, &[&str]); 10] = [
        (
            "a byte",
            |l| l[4][60] ^= 1,
            &[":5: the line was changed: its hash is of other bytes"],
        ),
        (
            "its hash",
            |l| {
                let at = l[4].len() - 10;
                l[4][at] = if l[4][at] == b'0' { b'1' } else { b'0' };
            },
            &[":5: the line was changed: its hash is of other bytes"],
        ),
        (
            "two lines gone",
            |l| drop(l.drain(4..6)),
            &[":5: records 4 to 5 are missing before this line"],
        ),
        (
            "swapped",
            |l| l.swap(4, 5),
            &[
                ":5: record 4 is missing before this line",
                ":6: record 4 is here, where 6 is due: it was moved, repeated or put in",
            ],
        ),
        (
            "repeated",
            |l| l.insert(7, l[4].clone()),
            &[":8: record 4 is here, where 7 is due: it was moved, repeated or put in"],
        ),
        (
            "put in",
            |l| l.insert(4, b"{}\n".to_vec()),
            &[":5: this is no line of an audit log"],
        ),
        (
            "two lines in one",
            |l| {
                l[4].pop();
            },
            &[
                ":5: the line was changed: its hash is of other bytes",
                ":6: record 5 is missing before this line",
            ],
        ),
        (
            "no header",
            |l| drop(l.remove(0)),
            &[
                ":1: this line has another place: a header is the first line of a file, and no other is",
            ],
        ),
        (
            "too long",
            |l| l.insert(4, [vec![b' '; 100_000], b"\n".to_vec()].concat()),
            &[":5: this is no line of an audit log"],
        ),
        (
            "sealed again",
            |l| {
                let mut changed = record(&l[4]);
                changed.who = "somebody".into();
                l[4] = changed.seal().unwrap();
            },
            &[":6: the line before is not the one after which this was written"],
        ),
    ];
    for (name, change, expected) in cases {
        let (dir, heads) = eight();
        edit(dir.path(), 1, change);
        let expected: Vec<_> = expected
            .iter()
            .map(|e| format!("00000001.jsonl{e}"))
            .collect();
        assert_eq!(problems(dir.path(), None), expected, "{name}");
        assert_eq!(
            problems(dir.path(), heads.last().copied()),
            expected,
            "{name}"
        );
    }
}

#[test]
fn only_a_noted_head_shows_a_log_that_was_cut_or_written_anew() {
    let (dir, heads) = eight();
    edit(dir.path(), 1, |l| l.truncate(6));
    sound(dir.path(), Some(heads[4]));
    assert_eq!(
        problems(dir.path(), Some(heads[7])),
        ["the log ends at record 5, and had record 8: its end is missing"]
    );
    // The hub goes on with other records of the same numbers.
    grow(dir.path(), &AuditConfig::default(), 20..30);
    sound(dir.path(), Some(heads[4]));
    assert_eq!(
        problems(dir.path(), Some(heads[7])),
        ["00000001.jsonl:9: record 8 is not the one that was noted: the log was written anew"]
    );

    let (dir, heads) = eight();
    edit(dir.path(), 1, |all| {
        let mut prev = record(&all[3]).hash;
        for line in &mut all[4..] {
            let mut changed = record(line);
            (changed.who, changed.prev) = ("nobody".into(), prev);
            *line = changed.seal().unwrap();
            prev = changed.hash;
        }
    });
    sound(dir.path(), Some(heads[2]));
    for seq in 4..=8 {
        let found = problems(dir.path(), Some(heads[seq - 1]));
        let line = seq + 1;
        assert_eq!(
            found,
            [format!(
                "00000001.jsonl:{line}: record {seq} is not the one that was noted: the log was written anew"
            )]
        );
    }
}

#[test]
fn files_are_missed_and_swapped_ones_are_found() {
    let whole = tempfile::tempdir().unwrap();
    let heads = grow(whole.path(), &config(1, 0), 0..6);
    let path = |dir: &tempfile::TempDir, n| scan::path(dir.path(), n);

    let dir = copy(whole.path());
    for n in [1, 3, 4] {
        fs::remove_file(path(&dir, n)).unwrap();
    }
    let missing = [
        "00000005.jsonl: files 00000003.jsonl to 00000004.jsonl are missing",
        "file 00000001.jsonl is missing",
    ];
    assert_eq!(problems(dir.path(), None), missing);

    let dir = copy(whole.path());
    fs::remove_file(path(&dir, 6)).unwrap();
    sound(dir.path(), Some(heads[4]));
    assert_eq!(problems(dir.path(), Some(heads[5])).len(), 1);

    let dir = copy(whole.path());
    fs::rename(path(&dir, 3), path(&dir, 9)).unwrap();
    fs::rename(path(&dir, 4), path(&dir, 3)).unwrap();
    fs::rename(path(&dir, 9), path(&dir, 4)).unwrap();
    let found = problems(dir.path(), None);
    assert!(
        found[0].starts_with("00000003.jsonl:1: the header is of another"),
        "{found:?}"
    );

    // A file of another log, and one that nobody begins any more.
    let other = tempfile::tempdir().unwrap();
    grow(other.path(), &config(1, 0), 0..6);
    let dir = copy(whole.path());
    fs::copy(path(&other, 4), path(&dir, 4)).unwrap();
    let found = problems(dir.path(), None);
    assert_eq!(
        found[0],
        "00000004.jsonl:1: the header is of another log or of another file"
    );

    let dir = copy(whole.path());
    fs::write(path(&dir, 4), "").unwrap();
    let found = problems(dir.path(), None);
    assert_eq!(found[0], "00000004.jsonl: this is no line of an audit log");
    let dir = copy(whole.path());
    edit(dir.path(), 4, |l| {
        l[1].pop();
    });
    let bytes = lines(&path(&dir, 4))[1].len();
    let torn = format!(
        "00000004.jsonl:2: the file ends in {bytes} bytes of a line, and other files follow"
    );
    assert_eq!(problems(dir.path(), None), [torn]);

    let dir = copy(whole.path());
    edit(dir.path(), 1, |l| {
        let parsed = Line::parse(l[0].trim_ascii_end());
        let Ok(Line::Header(header)) = parsed else {
            panic!("{parsed:?}")
        };
        l[0] = Header {
            format: 2,
            ..header
        }
        .seal()
        .unwrap();
    });
    let found = problems(dir.path(), None);
    assert_eq!(
        found[0],
        "00000001.jsonl:1: format 2 is not known to this release"
    );
    // Other names are nobody's business.
    fs::write(dir.path().join("1.jsonl"), "x").unwrap();
    fs::write(dir.path().join("99999999999999999999.jsonl"), "x").unwrap();
    assert_eq!(problems(dir.path(), None), found);
}

/// Damage stays to be found, and keeps nobody from going on.
#[test]
fn a_damaged_log_goes_on_and_is_not_mended() {
    let cases: [(&str, Edit, u64); 6] = [
        ("in the middle", |l| l[4][60] ^= 1, 0),
        ("the last line", |l| l[8][60] ^= 1, 1),
        ("the last two", |l| (l[7][60], l[8][60]) = (b'#', b'#'), 2),
        ("the header", |l| l[0][30] ^= 1, 0),
        (
            "no line is sound",
            |l| l.iter_mut().for_each(|l| l[10] = b'#'),
            9,
        ),
        (
            "forged numbers",
            |l| {
                let mut last = record(&l[8]);
                last.seq = u64::MAX;
                l[8] = last.seal().unwrap();
            },
            0,
        ),
    ];
    for (name, change, unsound) in cases {
        let (dir, heads) = eight();
        edit(dir.path(), 1, change);
        let damaged = fs::read(scan::path(dir.path(), 1)).unwrap();
        let before = problems(dir.path(), None);
        assert!(!before.is_empty(), "{name}");
        let (mut log, opened) =
            open(dir.path(), &AuditConfig::default(), &Faults::default()).unwrap();
        assert_eq!(opened.unsound, unsound, "{name}");
        log.append(&[entry(30), entry(31)], &mut Vec::new())
            .unwrap();
        drop(log);
        assert!(
            fs::read(scan::path(dir.path(), 1))
                .unwrap()
                .starts_with(&damaged)
        );
        let all = records(dir.path());
        assert_eq!(all.last().unwrap().key, "key-31");
        if name == "forged numbers" {
            continue;
        }
        assert_eq!(problems(dir.path(), None), before, "{name}");
        let next = if unsound == 9 { 11 } else { 10 };
        assert_eq!(all.last().unwrap().seq, next, "{name}");
        let first = verify(dir.path(), Some(heads[0])).unwrap();
        assert_eq!(
            first.problems.len(),
            before.len() + usize::from(unsound == 9)
        );
    }
    // A file with a header that is gone, after one that is whole.
    let dir = tempfile::tempdir().unwrap();
    grow(dir.path(), &config(1, 0), 0..3);
    edit(dir.path(), 3, |l| l.iter_mut().for_each(|l| l[10] = b'#'));
    let before = problems(dir.path(), None);
    assert_eq!(before.len(), 2);
    let (mut log, _) = open(dir.path(), &config(1, 0), &Faults::default()).unwrap();
    log.append(&[entry(30), entry(31)], &mut Vec::new())
        .unwrap();
    assert_eq!(problems(dir.path(), None), before);
    assert_eq!(scan::list(dir.path()).unwrap(), [1, 2, 3, 4, 5]);
}

#[test]
fn problems_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    grow(dir.path(), &AuditConfig::default(), 0..150);
    edit(dir.path(), 1, |l| l.iter_mut().for_each(|l| l[10] = b'#'));
    let found = verify(dir.path(), None).unwrap();
    assert_eq!((found.problems.len(), found.more_problems), (100, 51));
    assert!(!found.is_sound());
}

#[derive(Clone, Debug)]
enum Change {
    Byte { at: Index, xor: u8 },
    Insert { at: Index, bytes: Vec<u8> },
    Remove { at: Index, bytes: usize },
    RemoveLine(Index),
    SwapLines(Index, Index),
    RepeatLine { line: Index, before: Index },
    RemoveFile(Index),
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<Index>;
    prop_oneof![
        4 => (index(), 1..=u8::MAX).prop_map(|(at, xor)| Change::Byte { at, xor }),
        1 => (index(), prop::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(at, bytes)| Change::Insert { at, bytes }),
        1 => (index(), 1..40_usize).prop_map(|(at, bytes)| Change::Remove { at, bytes }),
        2 => index().prop_map(Change::RemoveLine),
        2 => (index(), index()).prop_map(|(a, b)| Change::SwapLines(a, b)),
        2 => (index(), index()).prop_map(|(line, before)| Change::RepeatLine { line, before }),
        1 => index().prop_map(Change::RemoveFile),
    ]
}

/// Whether a log that has these files is one whose end was cut between two lines.
fn is_cut(was: &[Vec<u8>], now: &[Vec<u8>]) -> bool {
    let (was, now) = (was.concat(), now.concat());
    was.starts_with(&now) && (now.is_empty() || now.ends_with(b"\n"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn any_change_is_found(
        texts in prop::collection::vec((".{0,12}", ".{0,300}", any::<u64>()), 1..12),
        max_file_bytes in prop_oneof![Just(1_u64), 600..3000_u64],
        change in change(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path(), &config(max_file_bytes, 0), &Faults::default()).unwrap();
        let entries: Vec<_> = texts
            .iter()
            .map(|(who, key, generation)| {
                let (who, key) = (who.clone(), key.clone());
                Entry::new(*generation, &Call { who, key, generation: *generation, ..call(1) })
            })
            .collect();
        let mut heads = Vec::new();
        log.append(&entries, &mut heads).unwrap();
        drop(log);
        let head = heads.last().copied();
        prop_assert_eq!(sound(dir.path(), head).records, texts.len() as u64);
        prop_assert_eq!(numbers(dir.path()), (1..=texts.len() as u64).collect::<Vec<_>>());

        let files = scan::list(dir.path()).unwrap();
        let paths: Vec<_> = files.iter().map(|n| scan::path(dir.path(), *n)).collect();
        let was: Vec<Vec<u8>> = paths.iter().map(|p| fs::read(p).unwrap()).collect();
        let mut now = was.clone();
        // Every byte, and every line, as file and place in it.
        let bytes: Vec<_> = was
            .iter()
            .enumerate()
            .flat_map(|(f, b)| (0..b.len()).map(move |at| (f, at)))
            .collect();
        let mut all: Vec<Vec<Vec<u8>>> = paths.iter().map(|p| lines(p)).collect();
        let places: Vec<_> = all
            .iter()
            .enumerate()
            .flat_map(|(f, l)| (0..l.len()).map(move |at| (f, at)))
            .collect();
        let mut gone = None;
        match &change {
            Change::Byte { at, xor } => {
                let (f, at) = *at.get(&bytes);
                now[f][at] ^= xor;
            }
            Change::Insert { at, bytes: new } => {
                let (f, at) = *at.get(&bytes);
                now[f].splice(at + 1..at + 1, new.iter().copied());
            }
            Change::Remove { at, bytes: n } => {
                let (f, at) = *at.get(&bytes);
                let end = now[f].len().min(at + n);
                now[f].drain(at..end);
            }
            Change::RemoveLine(at) => {
                let (f, at) = *at.get(&places);
                all[f].remove(at);
                now[f] = all[f].concat();
            }
            Change::SwapLines(a, b) => {
                let ((f, a), (g, b)) = (*a.get(&places), *b.get(&places));
                let (one, other) = (all[f][a].clone(), all[g][b].clone());
                (all[f][a], all[g][b]) = (other, one);
                now = all.iter().map(|l| l.concat()).collect();
            }
            Change::RepeatLine { line, before } => {
                let ((f, at), (g, before)) = (*line.get(&places), *before.get(&places));
                let line = all[f][at].clone();
                all[g].insert(before + 1, line);
                now[g] = all[g].concat();
            }
            Change::RemoveFile(at) => {
                let f = at.index(files.len());
                gone = Some(f);
                now[f].clear();
            }
        }
        prop_assume!(now != was);
        for (path, bytes) in paths.iter().zip(&now) {
            fs::write(path, bytes).unwrap();
        }
        if let Some(f) = gone {
            fs::remove_file(&paths[f]).unwrap();
        }
        let Ok(found) = verify(dir.path(), None) else {
            prop_assert_eq!(files.len(), 1, "the only file is gone");
            return Ok(());
        };
        // Reading takes anything, too.
        let readable = read(dir.path(), Filter::default()).unwrap().all(|r| r.is_ok());
        prop_assert!(readable);
        let noted = verify(dir.path(), head).unwrap();
        prop_assert!(!noted.is_sound() || noted.torn_bytes > 0, "{change:?}");
        if !is_cut(&was, &now) {
            prop_assert!(!found.is_sound() || found.torn_bytes > 0, "{change:?}");
        }
    }
}
