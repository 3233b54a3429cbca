use super::*;

/// The library names no file that is not published for that size, and no two alike.
#[test]
fn names_are_those_of_the_published_files() {
    for size in SectorSize::ALL {
        let sets = sets(Path::new("/p"), &Circuit::ALL, size).unwrap();
        for set in &sets {
            for path in set.files() {
                let name = name(path);
                assert!(published(path).is_some(), "{size}: {name}");
                let data = get_parameter_data_from_id(&name);
                let size = (set.circuit != Circuit::Aggregate).then(|| size.bytes());
                assert_eq!(data.map(|d| d.sector_size), size, "{name}");
            }
        }
        let mut names: Vec<_> = sets.iter().map(|s| &s.params).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), Circuit::ALL.len());
    }
}

#[test]
fn missing_files_are_named_with_what_gets_them() {
    let dir = tempfile::tempdir().unwrap();
    let lack = |circuits: &[Circuit], size| require_in(dir.path(), circuits, size).unwrap_err();
    let e = lack(&Circuit::POST, SectorSize::S2KiB);
    assert_eq!(e.kind(), lotus_types::Kind::Config);
    assert!(e.to_string().contains(".params"), "{e}");
    assert!(e.to_string().contains(".vk"), "{e}");
    assert!(
        e.fix()
            .contains("params generate --sector-size 2KiB --post-only")
    );
    assert!(
        !lack(&Circuit::ALL, SectorSize::S2KiB)
            .fix()
            .contains("post-only")
    );
    assert!(
        lack(&Circuit::ALL, SectorSize::S32GiB)
            .fix()
            .contains("lotus fetch-params 32GiB")
    );
    assert!(require_in(dir.path(), &[], SectorSize::S32GiB).is_ok());

    // An empty file is no file; the others are there by name.
    let [set]: [ParamSet; 1] = sets(dir.path(), &[Circuit::WindowPost], SectorSize::S2KiB)
        .unwrap()
        .try_into()
        .unwrap();
    fs::write(set.key.as_ref().unwrap(), "key").unwrap();
    fs::write(&set.params, "").unwrap();
    let ProofError::NoParameters { names, seal, .. } =
        lack(&[Circuit::WindowPost], SectorSize::S2KiB)
    else {
        panic!("files are missing");
    };
    assert_eq!((names, seal), (vec![name(&set.params)], false));
    fs::write(&set.params, "params").unwrap();
    require_in(dir.path(), &[Circuit::WindowPost], SectorSize::S2KiB).unwrap();
}

#[test]
fn files_of_unknown_origin_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let size = SectorSize::S2KiB;
    let set = sets(dir.path(), &[Circuit::WindowPost], size)
        .unwrap()
        .remove(0);
    fs::write(&set.params, "params").unwrap();
    let key = set.key.as_deref().unwrap();
    fs::write(key, "key").unwrap();
    assert!(matches!(
        set.verify(),
        Err(ProofError::BadParameters { .. })
    ));
    let note = |params: &Path, key: &Path| {
        let text = format!("{} {}\n", digest(params).unwrap(), digest(key).unwrap());
        fs::write(set.made_here(), text).unwrap();
    };
    note(&set.params, key);
    assert_eq!(set.verify().unwrap(), Origin::MadeHere);
    for path in set.files() {
        let good = fs::read(path).unwrap();
        fs::write(path, "other").unwrap();
        assert!(set.verify().is_err());
        fs::write(path, good).unwrap();
    }
    note(key, &set.params);
    assert!(set.verify().is_err());
}

#[test]
fn what_must_not_be_made_is_not_made() {
    let dir = tempfile::tempdir().unwrap();
    let make = |size| {
        let tell = &mut |step: Progress<'_>| panic!("{step:?}");
        generate(dir.path(), size, &Circuit::POST, tell).unwrap_err()
    };
    let large = make(SectorSize::S32GiB);
    assert!(matches!(large, ProofError::Published(SectorSize::S32GiB)));
    assert!(large.fix().contains("lotus fetch-params 32GiB"));

    let other = File::create(dir.path().join(LOCK)).unwrap();
    other.lock().unwrap();
    assert!(matches!(
        make(SectorSize::S2KiB),
        ProofError::ParametersBusy(_)
    ));
    drop(other);

    let set = sets(dir.path(), &Circuit::POST, SectorSize::S2KiB)
        .unwrap()
        .remove(0);
    fs::write(&set.params, "of somebody").unwrap();
    assert!(matches!(
        make(SectorSize::S2KiB),
        ProofError::BadParameters { .. }
    ));
    assert_eq!(fs::read(&set.params).unwrap(), b"of somebody");
}

/// One that is there, as one of others, is left as it is.
#[test]
fn a_reference_string_is_made_once() {
    let dir = tempfile::tempdir().unwrap();
    let made = |size| {
        let mut made = Vec::new();
        generate(dir.path(), size, &[Circuit::Aggregate], &mut |step| {
            made.push(matches!(step, Progress::Made(_)));
        })
        .map(|()| made)
    };
    assert!(made(SectorSize::S32GiB).is_err());
    assert_eq!(made(SectorSize::S2KiB).unwrap(), [false, true]);
    let set = sets(dir.path(), &[Circuit::Aggregate], SectorSize::S2KiB)
        .unwrap()
        .remove(0);
    assert_eq!(set.verify().unwrap(), Origin::MadeHere);
    // Four lists of compressed points, twice as many as SNARKs, each with its length.
    let bytes = fs::read(&set.params).unwrap();
    assert_eq!(
        bytes.len(),
        2 * MADE_HERE_SNARKS * (2 * 48 + 2 * 96) + 4 * 4
    );
    assert_eq!(made(SectorSize::S2KiB).unwrap(), [false]);
    assert_eq!(fs::read(&set.params).unwrap(), bytes);
    // It serves every size, and is the last that a seal of 2 KiB sectors lacks.
    require_in(dir.path(), &[Circuit::Aggregate], SectorSize::S2KiB).unwrap();
    fs::write(&set.params, "other").unwrap();
    assert!(set.verify().is_err());
}
