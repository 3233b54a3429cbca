//! Paths that are real folders, and what a crash leaves in them.

use lotus_types::{ActorId, SectorNumber};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::attach::{NewMeta, NewPath};
use super::*;

const SIZE: SectorSize = SectorSize::S2KiB;

fn id(n: u64) -> SectorId {
    SectorId {
        miner: ActorId(1000),
        number: SectorNumber(n),
    }
}

/// A repo, and disks beside it.
struct Rig {
    dir: TempDir,
    journal: Journal,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("journal")).unwrap();
        Self { dir, journal }
    }

    fn dir(&self, name: &str) -> PathBuf {
        // Paths are known by their real names.
        fs::canonicalize(self.dir.path()).unwrap().join(name)
    }

    fn open_with(&self, keep_moved_secs: u64) -> Storage {
        let cfg = StorageConfig {
            keep_moved_secs,
            ..StorageConfig::default()
        };
        Storage::open(self.journal.clone(), &self.dir("home"), SIZE, cfg).unwrap()
    }

    fn open(&self) -> Storage {
        self.open_with(0)
    }

    fn new_path(&self, name: &str, can_seal: bool) -> NewPath {
        fs::create_dir_all(self.dir(name)).unwrap();
        NewPath {
            dir: self.dir(name),
            init: Some(NewMeta {
                weight: 10,
                can_seal,
                can_store: true,
                max_storage: 0,
                groups: Vec::new(),
                allow_to: Vec::new(),
            }),
            read_only: false,
        }
    }

    fn known(&self, name: &str) -> NewPath {
        NewPath {
            dir: self.dir(name),
            init: None,
            read_only: false,
        }
    }

    /// Changes a path's `sectorstore.json`, as an operator does.
    fn edit(&self, name: &str, change: impl FnOnce(&mut PathMeta)) {
        let mut meta = PathMeta::read(&self.dir(name)).unwrap();
        change(&mut meta);
        meta.write(&self.dir(name)).unwrap();
    }

    /// Files of a sealed sector, made by hand.
    fn files(&self, name: &str, n: u64, text: &str) {
        let root = self.dir(name);
        let cache = place_in(&root, FileType::Cache, id(n));
        fs::create_dir_all(&cache).unwrap();
        fs::write(cache.join("p_aux"), text).unwrap();
        fs::create_dir_all(root.join("sealed")).unwrap();
        fs::write(place_in(&root, FileType::Sealed, id(n)), text).unwrap();
    }

    fn has(&self, name: &str, n: u64) -> bool {
        let root = self.dir(name);
        let sealed = place_in(&root, FileType::Sealed, id(n)).exists();
        let cache = place_in(&root, FileType::Cache, id(n)).exists();
        assert_eq!(sealed, cache, "both or none");
        sealed
    }
}

/// Seals, as far as the storage sees it.
fn seal(storage: &Storage, n: u64) {
    let attempt = storage.attempt(id(n), "pre-commit1").unwrap();
    fs::write(attempt.join("sealed"), "replica").unwrap();
    fs::create_dir(attempt.join("cache")).unwrap();
    fs::write(attempt.join("cache/p_aux"), "aux").unwrap();
    for (name, file) in [("cache", FileType::Cache), ("sealed", FileType::Sealed)] {
        storage
            .put(id(n), Part::File(file), &attempt.join(name), &[])
            .unwrap();
    }
}

fn read(storage: &Storage, n: u64) -> (String, String) {
    let sealed = fs::read_to_string(storage.sealed(id(n))).unwrap();
    let aux = fs::read_to_string(storage.cache(id(n)).join("p_aux")).unwrap();
    (sealed, aux)
}

fn refused(result: Result<impl std::fmt::Debug, StorageError>, words: &str) {
    let e = result.unwrap_err();
    assert!(matches!(e, StorageError::Refused { .. }), "{e}");
    assert!(e.to_string().contains(words), "{e}");
    assert!(!e.fix().is_empty());
}

#[test]
fn a_repo_of_one_folder_goes_on_as_it_was() {
    let rig = Rig::new();
    rig.files("home", 7, "old");
    let storage = rig.open();
    assert_eq!(storage.sealed(id(7)), rig.dir("home/sealed/s-t01000-7"));
    let first = storage.paths();
    assert_eq!((first.len(), first[0].sector_count), (1, 1));
    assert!(first[0].home && first[0].trouble.is_none());
    assert_eq!(rig.open().paths()[0].id, first[0].id, "it keeps its id");
    refused(storage.detach(&first[0].id, true), "stays attached");
}

#[test]
fn an_attempt_starts_empty_and_what_it_made_replaces_what_was_there() {
    let rig = Rig::new();
    let storage = rig.open();
    let stale = storage.attempt(id(3), "pc1").unwrap();
    fs::write(stale.join("half"), "x").unwrap();
    let attempt = storage.attempt(id(3), "pc1").unwrap();
    assert_eq!(fs::read_dir(&attempt).unwrap().count(), 0);
    assert!(!stale.exists());
    seal(&storage, 3);
    seal(&storage, 3);
    assert_eq!(read(&storage, 3), ("replica".into(), "aux".into()));
    storage.delete(id(3)).unwrap();
    storage.delete(id(3)).unwrap();
    assert!(!rig.has("home", 3) && !storage.scratch(id(3)).exists());
    assert!(storage.find(SectorNumber(3)).is_empty());
}

#[test]
fn a_sector_is_sealed_in_one_path_and_kept_in_another() {
    let rig = Rig::new();
    let storage = rig.open_with(3_600);
    rig.edit("home", |m| m.can_store = false);
    storage.redeclare(None).unwrap();
    seal(&storage, 7);
    assert!(rig.has("home", 7));
    assert!(!storage.is_kept(id(7), FileTypes::REPLICA).unwrap());
    let stop = CancellationToken::new();
    let nowhere = storage.keep(id(7), FileTypes::REPLICA, &stop).unwrap_err();
    assert!(matches!(nowhere, StorageError::NoPlace { .. }), "{nowhere}");
    assert!(nowhere.to_string().contains("not for keeping"), "{nowhere}");

    let keep = storage.attach(&rig.new_path("keep", false)).unwrap();
    storage.keep(id(7), FileTypes::REPLICA, &stop).unwrap();
    storage.clean(id(7)).unwrap();
    assert_eq!(storage.sealed(id(7)), rig.dir("keep/sealed/s-t01000-7"));
    assert_eq!(read(&storage, 7), ("replica".into(), "aux".into()));
    assert!(storage.is_kept(id(7), FileTypes::REPLICA).unwrap());
    assert!(!rig.dir("keep/incoming/s-t01000-7").exists());
    // A proof that began before may still read the old files.
    assert!(rig.has("home", 7));
    storage.erase_due();
    assert!(rig.has("home", 7));
    let held = storage.find(SectorNumber(7));
    let old: Vec<_> = held
        .iter()
        .filter(|h| h.deleted_at_unix_ms.is_some())
        .collect();
    assert_eq!((held.len(), old.len()), (3, 2), "{held:?}");
    assert_eq!(
        held.iter().find(|h| h.path == keep).unwrap().in_use.len(),
        2
    );
    // A restart does not take the old files for a copy.
    let storage = rig.open_with(3_600);
    assert_eq!(storage.sealed(id(7)), rig.dir("keep/sealed/s-t01000-7"));
    refused(
        storage.detach(&keep, false),
        "the only files of 1 sectors: 7",
    );
}

#[test]
fn a_move_goes_on_from_wherever_it_was_killed() {
    // What lies where when the hub is killed: before anything; a copy is not complete; it is
    // complete; one file is in its place; both are, but not declared.
    for killed in 0..5 {
        let rig = Rig::new();
        rig.files("home", 7, "replica");
        let storage = rig.open();
        let to = storage.attach(&rig.new_path("b", false)).unwrap();
        let home = storage.paths().into_iter().find(|p| p.home).unwrap().id;
        refused(storage.order_move(id(7), &home), "there already");
        refused(storage.order_move(id(8), &to), "no storage path has files");
        let ordered = storage.order_move(id(7), &to).unwrap();
        assert_eq!((ordered.sector, storage.moves().len()), (7, 1));
        refused(storage.order_move(id(7), &to), "on its way");
        drop(storage);

        let incoming = rig.dir("b/incoming/s-t01000-7");
        let copy = |from: &str, to: &Path| {
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(rig.dir(from), to).unwrap();
        };
        let (sealed, aux) = ("home/sealed/s-t01000-7", "home/cache/s-t01000-7/p_aux");
        match killed {
            0 => {}
            1 => {
                fs::create_dir_all(&incoming).unwrap();
                fs::write(incoming.join("sealed.part"), "rep").unwrap();
            }
            2 => {
                copy(sealed, &incoming.join("sealed"));
                copy(aux, &incoming.join("cache/p_aux"));
            }
            3 => {
                copy(aux, &incoming.join("cache/p_aux"));
                copy(sealed, &rig.dir("b/sealed/s-t01000-7"));
            }
            _ => {
                copy(sealed, &rig.dir("b/sealed/s-t01000-7"));
                copy(aux, &rig.dir("b/cache/s-t01000-7/p_aux"));
            }
        }
        let storage = rig.open();
        assert_eq!(read(&storage, 7).0, "replica", "killed at {killed}");
        assert_eq!(
            storage.sealed(id(7)),
            rig.dir(sealed),
            "the elder is used until the switch: killed at {killed}"
        );
        let stop = CancellationToken::new();
        assert!(storage.next_move(&stop));
        assert!(storage.moves().is_empty(), "{:?}", storage.moves());
        assert!(!storage.next_move(&stop));
        assert_eq!(storage.sealed(id(7)), rig.dir("b/sealed/s-t01000-7"));
        assert_eq!(read(&storage, 7), ("replica".into(), "replica".into()));
        assert!(rig.has("b", 7) && !incoming.exists());
        // Killed again, before the old files are deleted.
        let storage = rig.open();
        assert_eq!(storage.sealed(id(7)), rig.dir("b/sealed/s-t01000-7"));
        storage.erase_due();
        assert!(!rig.has("home", 7), "killed at {killed}");
        assert_eq!(storage.find(SectorNumber(7)).len(), 1);
        // And back again.
        storage.order_move(id(7), &home).unwrap();
        assert!(storage.next_move(&stop));
        storage.erase_due();
        assert!(rig.has("home", 7) && !rig.has("b", 7));
    }
}

#[test]
fn the_files_of_a_moved_sector_stay_as_long_as_the_copy_is_not_there() {
    let rig = Rig::new();
    rig.files("home", 7, "replica");
    let storage = rig.open();
    let to = storage.attach(&rig.new_path("b", false)).unwrap();
    storage.order_move(id(7), &to).unwrap();
    assert!(storage.next_move(&CancellationToken::new()));
    fs::rename(rig.dir("b"), rig.dir("unmounted")).unwrap();
    storage.look_at_all();
    storage.erase_due();
    assert!(rig.has("home", 7), "the copy can not be reached");
    // Or it is lost: then they are used again.
    storage.detach(&to, true).unwrap();
    assert!(
        storage
            .find(SectorNumber(7))
            .iter()
            .all(|h| h.in_use.is_empty())
    );
    storage.erase_due();
    storage.erase_due();
    assert_eq!(storage.sealed(id(7)), rig.dir("home/sealed/s-t01000-7"));
    assert!(rig.has("home", 7));
    assert_eq!(storage.find(SectorNumber(7))[0].in_use.len(), 2);
}

#[test]
fn a_sector_that_is_worked_on_is_not_moved() {
    let rig = Rig::new();
    let storage = rig.open();
    let to = storage.attach(&rig.new_path("b", false)).unwrap();
    seal(&storage, 7);
    refused(storage.order_move(id(7), &to), "being sealed");
    storage.clean(id(7)).unwrap();
    storage.begin_unseal(id(7)).unwrap();
    refused(storage.order_move(id(7), &to), "unsealed");
    storage.end_unseal(id(7)).unwrap();
    // What the files were when the move was ordered is not there any more.
    storage.order_move(id(7), &to).unwrap();
    storage.delete(id(7)).unwrap();
    let stop = CancellationToken::new();
    assert!(storage.next_move(&stop));
    assert!(!rig.has("b", 7) && !rig.has("home", 7));
}

#[test]
fn a_path_that_is_not_mounted_is_named_and_comes_back_by_itself() {
    let rig = Rig::new();
    rig.files("home", 1, "here");
    rig.files("b", 2, "there");
    let storage = rig.open();
    let b = storage.attach(&rig.new_path("b", false)).unwrap();
    storage.check(id(2)).unwrap();
    drop(storage);
    fs::rename(rig.dir("b"), rig.dir("unmounted")).unwrap();
    fs::create_dir(rig.dir("b")).unwrap();

    let storage = rig.open();
    let path = |s: &Storage| s.paths().into_iter().find(|p| p.id == b).unwrap();
    assert!(path(&storage).trouble.unwrap().contains("is it mounted?"));
    assert_eq!(path(&storage).sector_count, 1, "they are known");
    let gone = storage.check(id(2)).unwrap_err();
    assert!(
        matches!(&gone, StorageError::Gone { path, .. } if *path == b),
        "{gone}"
    );
    assert!(gone.fix().contains("mount"));
    assert!(storage.find(SectorNumber(2))[0].trouble.is_some());
    storage.check(id(1)).unwrap();
    // Nothing is written to the empty mount point, and nothing of it is believed.
    assert_eq!(fs::read_dir(rig.dir("b")).unwrap().count(), 0);
    storage.look_at_all();
    assert!(storage.check(id(2)).is_err());
    // A sector that is given up meanwhile is deleted when its disk is there again.
    storage.delete(id(2)).unwrap();
    fs::remove_dir(rig.dir("b")).unwrap();
    fs::rename(rig.dir("unmounted"), rig.dir("b")).unwrap();
    rig.files("b", 3, "new");
    storage.look_at_all();
    assert_eq!(path(&storage).trouble, None);
    storage.check(id(3)).unwrap();
    assert_eq!(storage.sealed(id(3)), rig.dir("b/sealed/s-t01000-3"));
    assert!(rig.has("b", 2));
    storage.erase_due();
    assert!(!rig.has("b", 2) && rig.has("b", 3));
}

#[test]
fn the_own_path_that_had_sectors_is_not_made_anew() {
    let rig = Rig::new();
    rig.files("home", 1, "here");
    drop(rig.open());
    fs::remove_dir_all(rig.dir("home")).unwrap();
    fs::create_dir(rig.dir("home")).unwrap();
    let storage = rig.open();
    assert!(storage.check(id(1)).is_err());
    assert!(storage.attempt(id(5), "pc1").is_err());
    // The operator says that it is a new disk.
    let home = storage.attach(&rig.new_path("home", true)).unwrap();
    assert!(storage.paths().iter().any(|p| p.home && p.id == home));
    assert!(storage.find(SectorNumber(1)).is_empty());
    seal(&storage, 5);
    assert_eq!(read(&storage, 5).0, "replica");
}

#[test]
fn attaching_and_detaching_refuse_what_does_harm() {
    let rig = Rig::new();
    let storage = rig.open();
    fs::create_dir(rig.dir("b")).unwrap();
    refused(storage.attach(&rig.known("b")), "no sectorstore.json");
    let b = storage.attach(&rig.new_path("b", true)).unwrap();
    refused(storage.attach(&rig.new_path("b", true)), "already");
    assert_eq!(storage.attach(&rig.known("b")).unwrap(), b, "once more");
    refused(
        storage.attach(&rig.new_path("b/inner", true)),
        "in one another",
    );
    refused(
        storage.attach(&rig.new_path("home/inner", true)),
        "in one another",
    );
    let mut useless = rig.new_path("c", false);
    useless.init.as_mut().unwrap().can_store = false;
    refused(storage.attach(&useless), "for sealing");
    assert!(!rig.dir("c/sectorstore.json").exists());
    // A copy of the folder is not the folder; the folder under another name is.
    fs::copy(rig.dir("b/sectorstore.json"), rig.dir("c/sectorstore.json")).unwrap();
    refused(storage.attach(&rig.known("c")), "is attached at");
    fs::remove_dir_all(rig.dir("c")).unwrap();
    fs::rename(rig.dir("b"), rig.dir("c")).unwrap();
    storage.look_at_all();
    assert_eq!(storage.attach(&rig.known("c")).unwrap(), b);
    let dirs: Vec<_> = rig.open().paths().into_iter().map(|p| p.dir).collect();
    assert!(dirs.contains(&rig.dir("c")) && dirs.len() == 2, "{dirs:?}");

    rig.files("c", 4, "only");
    storage.redeclare(Some(&b)).unwrap();
    refused(storage.detach(&b, false), "sectors: 4");
    storage.detach(&b, true).unwrap();
    assert!(rig.has("c", 4), "files stay");
    assert!(storage.find(SectorNumber(4)).is_empty());
    assert_eq!(rig.open().paths().len(), 1);
    let none = storage.detach(&b, true).unwrap_err();
    assert!(matches!(none, StorageError::NoPath(_)), "{none}");
}

#[test]
fn nothing_is_written_to_a_read_only_path() {
    let rig = Rig::new();
    let storage = rig.open();
    let b = storage.attach(&rig.new_path("b", true)).unwrap();
    rig.files("b", 2, "archive");
    let mut known = rig.known("b");
    known.read_only = true;
    assert_eq!(storage.attach(&known).unwrap(), b);
    rig.files("home", 1, "x");
    storage.redeclare(None).unwrap();
    refused(storage.order_move(id(1), &b), "read-only");
    assert_eq!(read(&storage, 2).0, "archive");
    let storage = rig.open();
    storage.delete(id(2)).unwrap();
    storage.erase_due();
    assert!(rig.has("b", 2), "given up, and not deleted");
    assert!(
        storage.find(SectorNumber(2))[0]
            .deleted_at_unix_ms
            .is_some()
    );
    // It is not found again either.
    storage.redeclare(None).unwrap();
    assert!(storage.find(SectorNumber(2))[0].in_use.is_empty());
}

#[test]
fn sealing_takes_the_path_with_room_and_keeps_to_it() {
    let rig = Rig::new();
    let storage = rig.open();
    storage.attach(&rig.new_path("b", true)).unwrap();
    // The repo's own may hold no more than a byte.
    rig.edit("home", |m| m.max_storage = 1);
    storage.redeclare(None).unwrap();
    seal(&storage, 7);
    assert!(rig.has("b", 7));
    // Were it chosen anew now, it would be the other.
    rig.edit("home", |m| (m.max_storage, m.weight) = (0, 1_000_000));
    storage.redeclare(None).unwrap();
    seal(&storage, 7);
    assert!(rig.has("b", 7) && !rig.has("home", 7));
    let storage = rig.open();
    seal(&storage, 7);
    assert!(rig.has("b", 7) && !rig.has("home", 7));
    seal(&storage, 8);
    assert!(rig.has("home", 8));
    let reserved: u64 = storage.paths().iter().map(|p| p.reserved).sum();
    assert!(reserved > 0, "two sectors are being sealed");
    storage.clean(id(7)).unwrap();
    storage.clean(id(8)).unwrap();
    assert!(storage.paths().iter().all(|p| p.reserved == 0));
}

#[test]
fn what_a_crash_left_of_an_unsealing_is_deleted() {
    let rig = Rig::new();
    let storage = rig.open();
    rig.files("home", 7, "x");
    storage.redeclare(None).unwrap();
    let dir = storage.begin_unseal(id(7)).unwrap();
    fs::write(dir.join("labels"), "x").unwrap();
    let storage = rig.open();
    assert!(!dir.exists() && !storage.scratch(id(7)).exists());
    assert!(storage.paths().iter().all(|p| p.reserved == 0));
    // In the scratch folder of an upgrade it goes alone.
    let attempt = storage.attempt(id(7), "update-replica").unwrap();
    storage.begin_unseal(id(7)).unwrap();
    storage.end_unseal(id(7)).unwrap();
    assert!(attempt.exists());
}

/// A replica's own record: two field elements.
fn record(dir: &Path, n: u8) -> Commitment {
    let mut aux = [0; 64];
    (aux[0], aux[32]) = (n, n + 1);
    fs::write(dir.join("p_aux"), aux).unwrap();
    replica_commitment(dir).unwrap().unwrap()
}

#[test]
fn a_replica_that_the_chain_has_is_not_replaced() {
    let rig = Rig::new();
    let storage = rig.open();
    seal(&storage, 7);
    let before = read(&storage, 7);
    let attempt = || {
        let attempt = storage.attempt(id(7), "pre-commit1").unwrap();
        fs::write(attempt.join("sealed"), "other").unwrap();
        fs::create_dir(attempt.join("cache")).unwrap();
        attempt
    };
    let put = |file: FileType, from: &Path, kept: &[Commitment]| {
        storage.put(id(7), Part::File(file), from, kept)
    };
    // Its record can not be read: it may be.
    let from = attempt();
    let any = [Commitment([1; 32])];
    refused(put(FileType::Cache, &from.join("cache"), &any), "read");
    let own = record(&storage.cache(id(7)), 3);
    refused(
        put(FileType::Cache, &from.join("cache"), &[own]),
        "the chain",
    );
    refused(
        put(FileType::Sealed, &from.join("sealed"), &[own]),
        "the chain",
    );
    assert_eq!(fs::read_to_string(storage.sealed(id(7))).unwrap(), before.0);
    // Another replica is in nobody's way.
    put(FileType::Sealed, &from.join("sealed"), &any).unwrap();
    assert_eq!(fs::read_to_string(storage.sealed(id(7))).unwrap(), "other");
}

#[test]
fn the_files_say_which_replica_is_of_an_upgrade() {
    let rig = Rig::new();
    let make = |n: u64, file: FileType, cache: FileType, aux: Option<u8>| {
        let root = rig.dir("home");
        let (file, cache) = (place_in(&root, file, id(n)), place_in(&root, cache, id(n)));
        fs::create_dir_all(&cache).unwrap();
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, "replica").unwrap();
        aux.map(|aux| record(&cache, aux))
    };
    let first = |n, aux| make(n, FileType::Sealed, FileType::Cache, aux);
    let update = |n, aux| make(n, FileType::Update, FileType::UpdateCache, aux);
    // As Lotus leaves them: one kind, the other, both.
    let a = first(1, Some(3)).unwrap();
    let b = update(2, Some(5)).unwrap();
    let (c, d) = (first(3, Some(7)).unwrap(), update(3, Some(9)).unwrap());
    let lost = first(4, None);
    update(4, None);
    assert_eq!(lost, None);
    let storage = rig.open();
    for hint in [false, true] {
        for (n, comm_r, is_update) in [
            (1, a, false),
            (2, b, true),
            (3, c, false),
            (3, d, true),
            // Neither tells: the journal does.
            (4, a, hint),
            (5, a, false),
        ] {
            let got = storage.is_update(id(n), &comm_r, hint);
            assert_eq!(got, is_update, "{n} {hint}");
        }
    }
}
