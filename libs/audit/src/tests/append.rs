use std::os::unix::fs::PermissionsExt as _;
use std::sync::Barrier;

use lotus_types::Kind;

use super::*;
use crate::{Audit, MAX_TEXT};

fn audit(dir: &Path, config: &AuditConfig, faults: &Faults) -> Audit {
    Audit::open_with(dir, config, faults.clone(), Duration::ZERO).unwrap()
}

#[test]
fn files_are_private_and_one_process_writes() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("repo/audit");
    let log = audit(&folder, &AuditConfig::default(), &Faults::default());
    let mode = |name: &str| {
        fs::metadata(folder.join(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    assert_eq!(
        (mode(""), mode("LOCK"), mode("00000001.jsonl")),
        (0o700, 0o600, 0o600)
    );
    let second = Audit::open_with(
        &folder,
        &AuditConfig::default(),
        Faults::default(),
        Duration::ZERO,
    );
    assert_eq!(second.unwrap_err().kind(), Kind::Config);

    // The head of an empty log is known again, and so is that of one with a record.
    let empty = log.close();
    assert_eq!(
        (empty.seq, sound(&folder, Some(empty)).head),
        (0, Some(empty))
    );
    let log = audit(&folder, &AuditConfig::default(), &Faults::default());
    assert_eq!(log.head(), empty);
    let head = log.append(&call(1)).unwrap().wait().unwrap();
    assert_eq!((head.seq, log.head()), (1, head));
    drop(log);
    for noted in [empty, head] {
        assert_eq!(noted.to_string().parse::<Head>().unwrap(), noted);
        assert_eq!(sound(&folder, Some(noted)).head, Some(head));
    }
    let upper = head.to_string().to_uppercase();
    for text in ["", "1", "1:", "x:00", "1:00", upper.as_str()] {
        assert_eq!(
            text.parse::<Head>().unwrap_err().kind(),
            Kind::Data,
            "{text}"
        );
    }
    let none = tempfile::tempdir().unwrap();
    assert!(matches!(
        verify(none.path(), None),
        Err(AuditError::NoLog { .. })
    ));
    assert!(matches!(
        read(none.path(), Filter::default()),
        Err(AuditError::NoLog { .. })
    ));
}

/// What somebody with `sha256sum` can check.
#[test]
fn a_hash_is_of_the_bytes_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let heads = grow(dir.path(), &AuditConfig::default(), 1..3);
    let mut prev = "0".repeat(64);
    for (n, line) in lines(&dir.path().join("00000001.jsonl")).iter().enumerate() {
        let text = std::str::from_utf8(line).unwrap();
        let (body, seal) = text.split_once(",\"hash\":\"").unwrap();
        let hash = crate::Hash::of(body.as_bytes()).to_string();
        assert_eq!(seal, format!("{hash}\"}}\n"));
        assert!(body.ends_with(&format!(",\"prev\":\"{prev}\"")));
        prev = hash;
        if n > 0 {
            assert_eq!(format!("{n}:{prev}"), heads[n - 1].to_string());
        }
    }
    let first = &records(dir.path())[0];
    let json = serde_json::to_string(first).unwrap();
    assert_eq!(
        json.as_bytes(),
        lines(&dir.path().join("00000001.jsonl"))[1].trim_ascii_end()
    );
    let text = r#"{"seq":1,"time_unix_ms":1767225600001,"who":"deals/d1","from":"10.0.0.7:4711","method":"/lotus.hub.v1.Pieces/Add1","key":"key-1","outcome":"ok","generation":1,"prev":""#;
    assert!(json.starts_with(text), "{json}");
}

#[test]
fn texts_are_cut() {
    let dir = tempfile::tempdir().unwrap();
    let log = audit(dir.path(), &AuditConfig::default(), &Faults::default());
    for text in ["\u{1}", "é", "\n", "\"", "😀", "a"] {
        for len in [0, MAX_TEXT - 1, MAX_TEXT, MAX_TEXT + 1, 100_000] {
            let long = text.repeat(len / text.len() + 1);
            let call = Call {
                who: long.clone(),
                from: long.clone(),
                method: long.clone(),
                key: long.clone(),
                outcome: long.clone(),
                generation: u64::MAX,
            };
            log.append(&call).unwrap().wait().unwrap();
            let newest = read(dir.path(), Filter::default()).unwrap().next();
            let got = newest.unwrap().unwrap();
            for field in [&got.who, &got.from, &got.method, &got.key, &got.outcome] {
                assert!(field.len() <= MAX_TEXT);
                match field.strip_suffix('…') {
                    Some(start) => assert!(long.starts_with(start) && long.len() > MAX_TEXT),
                    None => assert_eq!(*field, long),
                }
            }
        }
    }
    drop(log);
    assert_eq!(sound(dir.path(), None).records, 30);
}

#[test]
fn records_of_one_caller_stay_in_order() {
    const THREADS: u64 = 8;
    const EACH: u64 = 50;
    let dir = tempfile::tempdir().unwrap();
    let config = AuditConfig {
        queue: 7,
        queue_wait_ms: 60_000,
        ..config(4000, 0)
    };
    let log = audit(dir.path(), &config, &Faults::default());
    let start = Barrier::new(usize::try_from(THREADS).unwrap());
    std::thread::scope(|s| {
        for thread in 0..THREADS {
            let (log, start) = (&log, &start);
            s.spawn(move || {
                start.wait();
                let tickets: Vec<_> = (0..EACH)
                    .map(|n| {
                        let who = format!("t/{thread}");
                        log.append(&Call { who, ..call(n) }).unwrap()
                    })
                    .collect();
                let heads: Vec<_> = tickets.into_iter().map(|t| t.wait().unwrap()).collect();
                assert!(heads.is_sorted_by(|a, b| a.seq < b.seq));
            });
        }
    });
    let head = log.close();
    let found = sound(dir.path(), Some(head));
    assert_eq!((found.records, found.head), (THREADS * EACH, Some(head)));
    assert!(found.files > 10);
    for thread in 0..THREADS {
        let filter = Filter {
            who: Some(format!("t/{thread}")),
            order: Order::OldestFirst,
            ..Filter::default()
        };
        let got: Vec<_> = read(dir.path(), filter)
            .unwrap()
            .map(|r| r.unwrap().generation)
            .collect();
        assert_eq!(got, (0..EACH).collect::<Vec<_>>());
    }
}

#[test]
fn what_waits_is_synced_at_once_and_a_full_queue_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let faults = Faults::default();
    let config = AuditConfig {
        queue: 20,
        queue_wait_ms: 1,
        ..AuditConfig::default()
    };
    let log = audit(dir.path(), &config, &faults);
    faults.hold();
    let before = faults.syncs();
    let first = log.append(&call(0)).unwrap();
    faults.wait_for_a_sync();
    let waiting: Vec<_> = (1..=20).map(|n| log.append(&call(n)).unwrap()).collect();
    let refused = log.append(&call(21)).unwrap_err();
    assert_eq!(refused.kind(), Kind::Capacity, "{refused}");
    assert!(matches!(refused, AuditError::QueueFull { queued: 20, .. }));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let refused = runtime.block_on(log.append_async(&call(21))).unwrap_err();
    assert!(matches!(refused, AuditError::QueueFull { .. }));
    assert_eq!(log.head().seq, 0, "nothing is on the disk");

    faults.let_go();
    assert_eq!(first.wait().unwrap().seq, 1);
    for (ticket, seq) in waiting.into_iter().zip(2..) {
        assert_eq!(runtime.block_on(ticket.durable()).unwrap().seq, seq);
    }
    assert_eq!(faults.syncs() - before, 2);
    let last = runtime.block_on(async { log.append_async(&call(21)).await?.durable().await });
    assert_eq!(log.close(), last.unwrap());
    assert_eq!(sound(dir.path(), None).records, 22);
}

#[test]
fn a_caller_waits_for_a_place_in_the_queue() {
    let dir = tempfile::tempdir().unwrap();
    let faults = Faults::default();
    let config = AuditConfig {
        queue: 1,
        queue_wait_ms: 60_000,
        ..AuditConfig::default()
    };
    let log = audit(dir.path(), &config, &faults);
    faults.hold();
    let first = log.append(&call(0)).unwrap();
    faults.wait_for_a_sync();
    let second = log.append(&call(1)).unwrap();
    let third = std::thread::scope(|s| {
        let third = s.spawn(|| log.append(&call(2)).unwrap().wait());
        faults.let_go();
        third.join().unwrap()
    });
    let seqs = [first.wait(), second.wait(), third].map(|h| h.unwrap().seq);
    assert_eq!(seqs, [1, 2, 3]);
}

#[test]
fn a_full_disk_is_told_and_the_log_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let faults = Faults::default();
    let log = audit(dir.path(), &AuditConfig::default(), &faults);
    assert_eq!(log.append(&call(0)).unwrap().wait().unwrap().seq, 1);
    for boundary in 0..2 {
        faults.fail_after(boundary);
        let error = log.append(&call(1)).unwrap().wait().unwrap_err();
        assert!(matches!(error, AuditError::DiskFull { .. }), "{error}");
        assert_eq!(error.kind(), Kind::Capacity);
        assert_eq!(sound(dir.path(), Some(log.head())).records, 1);
    }
    // Even what was written and can not be cut now is not there later.
    faults.die_after(0);
    let error = log.append(&call(1)).unwrap().wait().unwrap_err();
    assert_eq!(error.kind(), Kind::Fatal);
    faults.die_after(u32::MAX);
    assert!(verify(dir.path(), None).unwrap().torn_bytes > 0);
    assert_eq!(log.append(&call(2)).unwrap().wait().unwrap().seq, 2);
    drop(log);
    assert_eq!(sound(dir.path(), None).records, 2);
    assert_eq!(records(dir.path())[1].key, "key-2");
}

#[test]
fn files_are_full_at_their_size_and_the_oldest_go() {
    let dir = tempfile::tempdir().unwrap();
    // One record of its own for each file, whatever its size.
    let heads = grow(dir.path(), &config(1, 0), 0..5);
    assert_eq!(scan::list(dir.path()).unwrap(), [1, 2, 3, 4, 5]);
    for path in (1..=5).map(|n| scan::path(dir.path(), n)) {
        assert_eq!(lines(&path).len(), 2);
    }
    let found = sound(dir.path(), Some(heads[1]));
    assert_eq!((found.files, found.records, found.first_file), (5, 5, 1));

    // A file takes what fits, to the byte.
    let full = lines(&scan::path(dir.path(), 5)).concat().len() as u64;
    let more = grow(dir.path(), &config(full, 3), 5..6);
    assert_eq!(scan::list(dir.path()).unwrap(), [4, 5, 6]);
    let found = sound(dir.path(), more.first().copied());
    assert_eq!(
        (found.first_file, found.first_seq, found.records),
        (4, Some(4), 3)
    );
    assert_eq!(numbers(dir.path()), [4, 5, 6]);
    // The last record that went is the one before the first file that stays.
    sound(dir.path(), Some(heads[2]));
    assert_eq!(
        problems(dir.path(), Some(heads[1])),
        ["record 2, which was noted, is not there to be compared"]
    );
    // Kept by the hub, and gone.
    fs::remove_file(scan::path(dir.path(), 4)).unwrap();
    assert_eq!(
        problems(dir.path(), None),
        ["file 00000004.jsonl is missing"]
    );
    // It does not become right when the next files are begun.
    grow(dir.path(), &config(1, 0), 6..8);
    assert_eq!(
        problems(dir.path(), None),
        ["file 00000004.jsonl is missing"]
    );

    let two = tempfile::tempdir().unwrap();
    grow(two.path(), &AuditConfig::default(), 0..2);
    let size = fs::metadata(scan::path(two.path(), 1)).unwrap().len();
    for (limit, files) in [(size, 1), (size - 1, 2)] {
        let dir = tempfile::tempdir().unwrap();
        grow(dir.path(), &config(limit, 0), 0..2);
        assert_eq!(sound(dir.path(), None).files, files);
    }
}

#[test]
fn a_batch_may_fill_many_files() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path(), &config(1500, 0), &Faults::default()).unwrap();
    let (entries, mut heads): (Vec<_>, _) = ((0..40).map(entry).collect(), Vec::new());
    log.append(&entries, &mut heads).unwrap();
    assert_eq!((heads.len(), heads.last().copied()), (40, Some(log.head())));
    for head in &heads {
        sound(dir.path(), Some(*head));
    }
    assert!(sound(dir.path(), None).files > 8);
}

/// A tool for logs, or somebody who tidies up.
#[test]
fn a_file_that_is_taken_away_is_missed_and_not_written_to() {
    for taken in ["moved", "removed", "renumbered"] {
        let dir = tempfile::tempdir().unwrap();
        let log = audit(dir.path(), &AuditConfig::default(), &Faults::default());
        for n in 0..3 {
            log.append(&call(n)).unwrap().wait().unwrap();
        }
        let path = scan::path(dir.path(), 1);
        match taken {
            "moved" => fs::rename(path, dir.path().join("00000001.jsonl.1")).unwrap(),
            "removed" => fs::remove_file(path).unwrap(),
            _ => fs::rename(path, scan::path(dir.path(), 2)).unwrap(),
        }
        assert_eq!(log.append(&call(3)).unwrap().wait().unwrap().seq, 4);
        drop(log);
        let got = records(dir.path());
        assert_eq!(got.last().unwrap().key, "key-3");
        let found = problems(dir.path(), None);
        if taken == "renumbered" {
            assert_eq!(got.len(), 4, "nothing is written over");
            let other = "00000002.jsonl:1: the header is of another log or of another file";
            assert_eq!(found, [other, "file 00000001.jsonl is missing"]);
        } else {
            assert_eq!(found, ["file 00000001.jsonl is missing"]);
        }
    }
}

#[test]
fn records_are_found_by_caller_method_and_time() {
    let dir = tempfile::tempdir().unwrap();
    grow(dir.path(), &config(1000, 0), 0..12);
    let found = |filter: Filter| -> Vec<u64> {
        let records = read(dir.path(), filter).unwrap();
        records.map(|r| r.unwrap().seq).collect()
    };
    let all = Filter::default;
    let who = |w: &str| Filter {
        who: Some(w.into()),
        ..all()
    };
    assert_eq!(found(all()), (1..=12).rev().collect::<Vec<_>>());
    assert_eq!(found(who("deals/d1")), [11, 8, 5, 2]);
    assert_eq!(
        (found(who("deals/")).len(), found(who("d1")).len()),
        (12, 0)
    );
    let method = Filter {
        method: Some("Add1".into()),
        order: Order::OldestFirst,
        ..all()
    };
    assert_eq!(found(method), [2, 11, 12]);
    let since = Filter {
        since_unix_ms: Some(NOW + 9),
        who: Some("deals/d0".into()),
        ..all()
    };
    assert_eq!(found(since), [10]);
}
