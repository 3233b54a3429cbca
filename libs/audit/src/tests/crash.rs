use super::*;

/// Batches of records, with a new file now and then. Returns what was acknowledged.
fn life(dir: &Path, config: &AuditConfig, faults: &Faults) -> Vec<Head> {
    let mut heads = Vec::new();
    let Ok((mut log, _)) = open(dir, config, faults) else {
        return heads;
    };
    let mut n = 0;
    for size in [1, 3, 1, 5, 2] {
        let batch: Vec<_> = (n..n + size).map(entry).collect();
        n += size;
        if log.append(&batch, &mut heads).is_err() {
            break;
        }
    }
    heads
}

#[test]
fn a_process_that_dies_anywhere_loses_nothing_acknowledged() {
    for config in [config(1200, 0), config(900, 2), AuditConfig::default()] {
        let mut deaths = 0;
        for boundary in 0.. {
            let (dir, faults) = (tempfile::tempdir().unwrap(), Faults::default());
            faults.die_after(boundary);
            let heads = life(dir.path(), &config, &faults);
            if !faults.dead() {
                assert_eq!(heads.len(), 12);
                break;
            }
            deaths += 1;
            let acknowledged = heads.last().copied();
            if acknowledged.is_some() {
                // As a copy of what it left looks.
                let left = verify(dir.path(), acknowledged).unwrap();
                assert!(left.is_sound(), "boundary {boundary}: {left:?}");
            }
            // The next records may be those for which it goes, if not all files are kept.
            let acknowledged = acknowledged.filter(|_| config.keep_files == 0);
            let (mut log, opened) = open(dir.path(), &config, &Faults::default()).unwrap();
            assert_eq!(opened.unsound, 0);
            let found = sound(dir.path(), acknowledged);
            assert_eq!(found.head, Some(log.head()));
            assert_eq!(found.recovered, u64::from(opened.recovered.is_some()));
            log.append(&[entry(99)], &mut Vec::new()).unwrap();
            drop(log);
            let found = sound(dir.path(), acknowledged);
            let seqs = numbers(dir.path());
            let first = found.first_seq.unwrap();
            assert_eq!(seqs, (first..first + found.records).collect::<Vec<_>>());
            assert_eq!(records(dir.path()).last().unwrap().key, "key-99");
        }
        assert!(deaths > 10, "{deaths}");
    }
}

/// The disk is full once, anywhere; what was not acknowledged is appended again.
#[test]
fn every_record_is_there_once_although_the_disk_was_full() {
    for config in [config(1200, 0), config(900, 2), AuditConfig::default()] {
        for boundary in 0.. {
            let (dir, faults) = (tempfile::tempdir().unwrap(), Faults::default());
            faults.fail_after(boundary);
            let mut log = match open(dir.path(), &config, &faults) {
                Ok((log, _)) => log,
                Err(e) => {
                    assert!(matches!(e, AuditError::DiskFull { .. }), "{e}");
                    open(dir.path(), &config, &faults).unwrap().0
                }
            };
            let mut heads = Vec::new();
            let all: Vec<_> = (0..12).map(entry).collect();
            for size in [1, 4, 5, 10, 12] {
                let waits = |heads: &Vec<Head>| all[heads.len()..size].to_vec();
                if let Err(e) = log.append(&waits(&heads), &mut heads) {
                    assert!(matches!(e, AuditError::DiskFull { .. }), "{e}");
                    assert!(heads.len() < size);
                    sound(dir.path(), heads.last().copied());
                    log.append(&waits(&heads), &mut heads).unwrap();
                }
                assert_eq!(heads.len(), size);
            }
            let seqs: Vec<_> = heads.iter().map(|h| h.seq).collect();
            assert_eq!(seqs, (1..=12).collect::<Vec<_>>());
            for head in heads.iter().rev().take(2) {
                sound(dir.path(), Some(*head));
            }
            for record in records(dir.path()) {
                assert_eq!(record.generation + 1, record.seq);
            }
            if !faults.failed() {
                assert!(boundary > 10, "{boundary}");
                break;
            }
        }
    }
}

#[test]
fn a_log_that_ends_at_any_byte_goes_on() {
    // Both of the last lines in one file; a header and a record.
    for config in [AuditConfig::default(), config(1, 0)] {
        let whole = tempfile::tempdir().unwrap();
        let heads = grow(whole.path(), &config, 0..4);
        let last = *scan::list(whole.path()).unwrap().last().unwrap();
        let path = scan::path(whole.path(), last);
        let lines = lines(&path);
        let len = lines.concat().len();
        let two: usize = lines.iter().rev().take(2).map(Vec::len).sum();
        let feeds: Vec<usize> = lines
            .iter()
            .scan(0, |end, line| {
                *end += line.len();
                Some(*end)
            })
            .collect();
        for cut in len - two..=len {
            let dir = copy(whole.path());
            let file = fs::File::options()
                .write(true)
                .open(scan::path(dir.path(), last))
                .unwrap();
            file.set_len(cut as u64).unwrap();
            drop(file);
            let end = feeds.iter().rev().find(|f| **f <= cut).copied();
            let torn = (cut - end.unwrap_or(0)) as u64;
            let gone = feeds.iter().filter(|f| **f > cut).count();

            // No crash ends in a header.
            let found = verify(dir.path(), None).unwrap();
            let headless = cut < feeds[0];
            assert_eq!(found.problems.len(), usize::from(headless), "{cut}");
            assert_eq!(found.torn_bytes, torn);
            let missed = verify(dir.path(), heads.last().copied()).unwrap();
            assert_eq!(missed.is_sound(), cut == len);

            let (mut log, opened) = open(dir.path(), &config, &Faults::default()).unwrap();
            assert_eq!(opened.unsound, 0);
            assert_eq!(opened.recovered.as_ref().map_or(0, |r| r.bytes), torn);
            let kept = 4 - gone.min(if last == 1 { 4 } else { 1 });
            let before = heads[..kept].last().copied();
            assert_eq!(log.head().seq, kept as u64 + u64::from(torn > 0));
            log.append(&[entry(4)], &mut Vec::new()).unwrap();
            drop(log);
            let found = sound(dir.path(), before);
            assert_eq!(found.recovered, u64::from(torn > 0));
            assert_eq!(found.records, kept as u64 + 1 + found.recovered);
            let all = records(dir.path());
            assert_eq!(all.last().unwrap().key, "key-4");
            let noted: Vec<_> = all.iter().filter_map(|r| r.recovered.as_ref()).collect();
            assert_eq!(noted, opened.recovered.iter().collect::<Vec<_>>());
            if let Some(noted) = opened.recovered {
                let tail = &fs::read(&path).unwrap()[end.unwrap_or(0)..cut];
                assert_eq!(noted.sha256, crate::Hash::of(tail));
                let begins = &tail[..tail.len().min(crate::line::SHOWN)];
                assert_eq!(noted.begins, hex::encode(begins));
                assert_eq!(noted.at, end.unwrap_or(0) as u64);
            }
        }
    }
}

/// What a disk may make of the last writes when the power fails.
#[test]
fn any_bytes_may_be_at_the_end() {
    for tail in [
        vec![0; 3],
        vec![0; 700_000],
        b"{\"seq\":".to_vec(),
        [b"x".repeat(300_000), b"\n".to_vec(), b"y".repeat(300_000)].concat(),
        b"\n\n".to_vec(),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let heads = grow(dir.path(), &AuditConfig::default(), 0..3);
        let path = scan::path(dir.path(), 1);
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend_from_slice(&tail);
        fs::write(&path, &bytes).unwrap();
        let feeds = tail.iter().filter(|b| **b == b'\n').count() as u64;
        let torn = tail.iter().rev().take_while(|b| **b != b'\n').count() as u64;
        let (mut log, opened) =
            open(dir.path(), &AuditConfig::default(), &Faults::default()).unwrap();
        assert_eq!(opened.unsound, feeds);
        assert_eq!(opened.recovered.map_or(0, |r| r.bytes), torn);
        log.append(&[entry(3)], &mut Vec::new()).unwrap();
        drop(log);
        let found = verify(dir.path(), heads.last().copied()).unwrap();
        assert_eq!(found.problems.len() as u64, feeds);
        assert_eq!(found.torn_bytes, 0);
        assert_eq!(records(dir.path()).len() as u64, 4 + u64::from(torn > 0));
    }
}
