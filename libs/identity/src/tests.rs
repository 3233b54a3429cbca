//! The authority and spokes, as they meet.

mod handshake;
mod held;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{KeyPair, PublicKeyData as _};
use rustls::pki_types::CertificateDer;

use crate::{
    Authority, Bundle, CLOCK_SKEW, Caller, Clock, Credential, LIFE, Presented, REJOIN, Refused,
    State,
};

const HOUR: Duration = Duration::from_secs(3600);
const SECOND: Duration = Duration::from_secs(1);

/// A hub whose clock stands still until it is told otherwise.
struct Hub {
    dir: tempfile::TempDir,
    now: Arc<AtomicU64>,
    authority: Authority,
}

impl Hub {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let now = Arc::new(AtomicU64::new(1_800_000_000));
        let authority = open(dir.path(), &now);
        Self {
            dir,
            now,
            authority,
        }
    }

    /// Another process of the hub's user, or the hub after a restart.
    fn another(&self) -> Authority {
        open(self.dir.path(), &self.now)
    }

    fn wait(&self, time: Duration) {
        self.now.fetch_add(time.as_secs(), Ordering::Relaxed);
    }

    fn set_back(&self, time: Duration) {
        self.now.fetch_sub(time.as_secs(), Ordering::Relaxed);
    }

    fn invite(&self, name: &str) -> Bundle {
        self.authority.invite(&of(name), "hub:1", HOUR).unwrap()
    }

    /// A spoke that has joined: its key and its certificate.
    fn joined(&self, name: &str) -> (KeyPair, CertificateDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let bundle = self.invite(name);
        let public = key.subject_public_key_info();
        let got = self.authority.join(bundle.certificate(), &public).unwrap();
        (key, cert(&got))
    }
}

fn open(dir: &Path, now: &Arc<AtomicU64>) -> Authority {
    let now = now.clone();
    let clock: Clock =
        Arc::new(move || UNIX_EPOCH + Duration::from_secs(now.load(Ordering::Relaxed)));
    Authority::with_clock(&dir.join("ca"), clock).unwrap()
}

fn of(name: &str) -> Caller {
    name.parse().unwrap()
}

fn cert(credential: &Credential) -> CertificateDer<'static> {
    credential.certificate.clone().into()
}

#[test]
fn a_bundle_is_used_by_one_key() {
    let hub = Hub::new();
    let bundle = hub.invite("retrieval/r1");
    let [ours, theirs] = [(); 2].map(|()| KeyPair::generate().unwrap().subject_public_key_info());
    let join = |a: &Authority, key: &[u8]| a.join(bundle.certificate(), key);
    assert_eq!(
        hub.authority.presented(bundle.certificate()),
        Presented::Joining(of("retrieval/r1"))
    );

    assert!(matches!(
        join(&hub.authority, b"key"),
        Err(Refused::Broken(_))
    ));
    let first = join(&hub.authority, &ours).unwrap();
    assert_eq!(hub.authority.caller(&cert(&first)), Ok(of("retrieval/r1")));
    // The answer was lost, or the hub fell over.
    assert_eq!(join(&hub.authority, &ours), Ok(first.clone()));
    let again = hub.another();
    assert_eq!(join(&again, &ours), Ok(first.clone()));
    assert_eq!(join(&again, &theirs), Err(Refused::Used));
    assert_eq!(join(&hub.authority, &theirs), Err(Refused::Used));
    // What it got ended in the meantime.
    hub.wait(HOUR / 2);
    let second = join(&again, &ours).unwrap();
    assert!(second.expires_unix_ms > first.expires_unix_ms);
    assert_eq!(again.caller(&cert(&second)), Ok(of("retrieval/r1")));

    hub.wait(HOUR);
    assert_eq!(join(&again, &ours), Err(Refused::Expired));
}

#[test]
fn an_invitation_ends() {
    let hub = Hub::new();
    let bundle = hub.invite("deals/d1");
    let key = KeyPair::generate().unwrap().subject_public_key_info();
    hub.wait(HOUR + CLOCK_SKEW + SECOND);
    let late = hub.authority.join(bundle.certificate(), &key);
    assert_eq!(late, Err(Refused::Expired));
    let end = bundle.expires() + CLOCK_SKEW + SECOND;
    assert_eq!(end, (hub.authority.clock)());
}

#[test]
fn a_credential_lasts_a_quarter_of_an_hour_and_is_renewed_within_a_week() {
    let hub = Hub::new();
    let (_, first) = hub.joined("retrieval/r1");
    let spoke = Presented::Spoke(of("retrieval/r1"));
    hub.wait(LIFE + CLOCK_SKEW);
    assert_eq!(hub.authority.presented(&first), spoke);
    assert!(hub.authority.caller(&first).is_ok());
    hub.wait(SECOND);
    assert_eq!(hub.authority.presented(&first), spoke);
    assert_eq!(hub.authority.caller(&first), Err(Refused::Expired));

    let second = cert(&hub.authority.renew_late(&first, REJOIN).unwrap());
    assert!(hub.authority.caller(&second).is_ok());
    // Lost, and asked for once more.
    assert_eq!(
        cert(&hub.authority.renew_late(&first, REJOIN).unwrap()),
        second
    );
    assert_eq!(
        cert(&hub.another().renew_late(&first, REJOIN).unwrap()),
        second
    );

    hub.wait(LIFE + REJOIN);
    let third = cert(&hub.another().renew_late(&second, REJOIN).unwrap());
    assert_ne!(third, second);
    hub.wait(LIFE + REJOIN + SECOND);
    assert_eq!(
        hub.authority.renew_late(&third, REJOIN),
        Err(Refused::Expired)
    );
    assert_eq!(hub.authority.caller(&third), Err(Refused::Expired));
}

#[test]
fn a_clock_that_is_set_back_shuts_nobody_out() {
    let hub = Hub::new();
    let (_, first) = hub.joined("retrieval/r1");
    hub.set_back(HOUR);
    assert_eq!(hub.authority.caller(&first), Err(Refused::Expired));
    let second = hub.authority.renew_late(&first, REJOIN).unwrap();
    assert!(hub.authority.caller(&cert(&second)).is_ok());
}

#[test]
fn a_revoked_spoke_is_out_at_once() {
    let hub = Hub::new();
    let (_, here) = hub.joined("retrieval/r1");
    let (_, there) = hub.joined("retrieval/r2");
    let (_, other) = hub.joined("deals/r1");
    assert!(hub.authority.caller(&here).is_ok());
    assert!(hub.authority.caller(&there).is_ok());

    assert!(hub.authority.revoke(&of("retrieval/r1")).unwrap());
    // `lotus-miner credentials revoke`, beside the running hub.
    let cli = hub.another();
    assert!(cli.revoke(&of("retrieval/r2")).unwrap());
    for certificate in [&here, &there] {
        assert_eq!(hub.authority.caller(certificate), Err(Refused::Revoked));
        assert_eq!(
            hub.authority.renew_late(certificate, REJOIN),
            Err(Refused::Revoked)
        );
        assert_eq!(cli.caller(certificate), Err(Refused::Revoked));
    }
    assert!(hub.authority.caller(&other).is_ok());
    assert!(cli.revoke(&of("retrieval/r2")).unwrap(), "it is");
    assert!(!cli.revoke(&of("retrieval/r3")).unwrap());

    let bundle = hub.invite("ffs/f1");
    assert!(cli.revoke(&of("ffs/f1")).unwrap());
    let key = KeyPair::generate().unwrap().subject_public_key_info();
    let join = |b: &Bundle| hub.authority.join(b.certificate(), &key);
    assert_eq!(join(&bundle), Err(Refused::Revoked));
    let bundle = cli.invite(&of("ffs/f1"), "hub:1", HOUR).unwrap();
    let got = join(&bundle).unwrap();
    assert!(hub.authority.caller(&cert(&got)).is_ok(), "invited again");
}

#[test]
fn a_renewal_at_the_same_time_does_not_undo_a_revocation() {
    let hub = Hub::new();
    let (_, certificate) = hub.joined("retrieval/r1");
    let renewing = hub.another();
    std::thread::scope(|s| {
        let renewals = s.spawn(|| {
            let renew = || {
                hub.wait(Duration::from_secs(60));
                renewing.renew_late(&certificate, REJOIN)
            };
            // Until it is refused; the limit is there for the day that it is not.
            (0..10_000).find_map(|_| renew().err())
        });
        assert!(hub.authority.revoke(&of("retrieval/r1")).unwrap());
        assert_eq!(renewals.join().unwrap(), Some(Refused::Revoked));
    });
    assert_eq!(hub.authority.callers().unwrap()[0].state, State::Revoked);
}

#[test]
fn a_new_invitation_voids_what_the_old_one_got() {
    let hub = Hub::new();
    let (key, old) = hub.joined("retrieval/r1");
    let unused = hub.invite("retrieval/r1");
    assert_eq!(hub.authority.caller(&old), Err(Refused::WrongKey));
    assert_eq!(
        hub.authority.renew_late(&old, REJOIN),
        Err(Refused::WrongKey)
    );
    let newest = hub.another().invite(&of("retrieval/r1"), "hub:1", HOUR);
    let public = key.subject_public_key_info();
    let join = |b: &Bundle| hub.authority.join(b.certificate(), &public);
    assert_eq!(join(&unused), Err(Refused::Used));
    let got = join(&newest.unwrap()).unwrap();
    assert!(hub.authority.caller(&cert(&got)).is_ok());
}

#[test]
fn each_kind_of_certificate_is_good_for_its_own() {
    let hub = Hub::new();
    let bundle = hub.invite("retrieval/r2");
    let (key, spoke) = hub.joined("retrieval/r1");
    let public = key.subject_public_key_info();
    let worker = hub.authority.issue_worker(&"w".parse().unwrap(), HOUR);
    let worker: CertificateDer<'_> = worker.unwrap().certificate.into();
    // Another authority signs the same name and the same key.
    let other = Hub::new();
    let theirs = other.invite("retrieval/r1");
    let theirs = cert(&other.authority.join(theirs.certificate(), &public).unwrap());

    let a = &hub.authority;
    for not_a_spokes in [
        bundle.certificate(),
        &worker,
        &theirs,
        &b"no".as_slice().into(),
    ] {
        assert_eq!(a.caller(not_a_spokes), Err(Refused::NotOurs));
        assert_eq!(a.renew_late(not_a_spokes, REJOIN), Err(Refused::NotOurs));
    }
    for not_a_bundles in [&spoke, &worker, &theirs] {
        assert_eq!(a.join(not_a_bundles, &public), Err(Refused::NotOurs));
    }
    for other in [&worker, &theirs] {
        assert_eq!(a.presented(other), Presented::Other);
    }
    assert_eq!(a.worker(&spoke), Err(Refused::NotOurs));
    assert_eq!(a.worker(&worker), Ok("w".parse().unwrap()));
    // Nothing is known of it any more.
    std::fs::remove_file(hub.dir.path().join("ca/spokes/r1.retrieval.json")).unwrap();
    assert_eq!(a.caller(&spoke), Err(Refused::Unknown));
    assert_eq!(a.renew_late(&spoke, REJOIN), Err(Refused::Unknown));
}

#[test]
fn the_register_is_listed_and_says_which_file_is_broken() {
    let hub = Hub::new();
    let start = hub.now.load(Ordering::Relaxed) * 1000;
    hub.invite("retrieval/r2");
    let (_, certificate) = hub.joined("retrieval/r1");
    hub.joined("deals/d1");
    hub.authority.revoke(&of("deals/d1")).unwrap();
    hub.wait(LIFE);
    hub.authority.renew_late(&certificate, REJOIN).unwrap();

    let listed = hub.another().callers().unwrap();
    let seen: Vec<_> = listed
        .iter()
        .map(|r| (r.caller.to_string(), r.state))
        .collect();
    assert_eq!(
        seen,
        [
            ("deals/d1".to_owned(), State::Revoked),
            ("retrieval/r1".to_owned(), State::Joined),
            ("retrieval/r2".to_owned(), State::Invited),
        ]
    );
    let life = u64::try_from(LIFE.as_millis()).unwrap();
    assert_eq!(listed[1].joined_unix_ms, Some(start));
    assert_eq!(listed[1].renewed_unix_ms, Some(start + life));
    assert_eq!(listed[1].ends_unix_ms, start + 2 * life);
    assert_eq!(listed[2].ends_unix_ms, start + 3_600_000);

    let file = hub.dir.path().join("ca/spokes/r1.retrieval.json");
    // Of another caller: nobody gets in by a copied file.
    std::fs::copy(file.with_file_name("r2.retrieval.json"), &file).unwrap();
    for text in [None, Some("{")] {
        if let Some(text) = text {
            std::fs::write(&file, text).unwrap();
        }
        let why = hub.authority.caller(&certificate).unwrap_err();
        assert!(why.to_string().contains("r1.retrieval.json"), "{why}");
        let fault = hub.authority.callers().unwrap_err();
        assert!(fault.message.contains("r1.retrieval.json"), "{fault}");
    }
}

#[test]
fn nothing_shows_a_key_and_files_are_private() {
    use std::os::unix::fs::PermissionsExt as _;

    let hub = Hub::new();
    hub.joined("retrieval/r1");
    let bundle = hub.invite("retrieval/r2");
    let file = hub.dir.path().join("bundle");
    bundle.write(&file).unwrap();
    assert!(bundle.write(&file).is_err(), "it is there");
    let read = Bundle::read(&file).unwrap();
    assert_eq!(read.hub(), "hub:1");
    assert_eq!(read.caller(), &of("retrieval/r2"));
    assert_eq!(read.certificate(), bundle.certificate());

    let held = crate::Held::open(&hub.dir.path().join("held"), Some(&file)).unwrap();
    let worker = hub.authority.issue_worker(&"w".parse().unwrap(), HOUR);
    let shown = format!("{:?}", (&hub.authority, &bundle, &held, worker.unwrap()));
    let dir = hub.dir.path().join("ca").display().to_string();
    assert_eq!(
        shown,
        format!(
            "(Authority({dir}), Bundle(retrieval/r2 for hub:1), Held(retrieval/r2 for hub:1), Issued)"
        )
    );

    let mut seen = 0;
    let mut dirs = vec![hub.dir.path().join("ca"), hub.dir.path().join("held")];
    while let Some(dir) = dirs.pop() {
        let mode = |p: &Path| p.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700, "{}", dir.display());
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                assert_eq!(mode(&path), 0o600, "{}", path.display());
                seen += 1;
            }
        }
    }
    // The key, two records with their locks, a worker, an identity.
    assert_eq!(seen, 7);
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);

    // Neither in what the library says of a file that is broken.
    let text = std::fs::read_to_string(&file).unwrap();
    let key = text.split("\"key\": \"").nth(1).unwrap();
    let key = &key[..20];
    std::fs::write(&file, text.replacen(key, "!", 1)).unwrap();
    let why = Bundle::read(&file).unwrap_err();
    assert!(!why.message.contains(&text[text.len() - 40..text.len() - 5]));
    let long = vec![b' '; 70_000];
    std::fs::write(&file, long).unwrap();
    let why = Bundle::read(&file).unwrap_err();
    assert!(why.message.contains("70000 bytes"), "{why}");
}

/// By the real clock, as a spoke and a test of the hub see it.
#[test]
fn the_clock_is_the_systems_unless_another_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open(dir.path()).unwrap();
    let before = SystemTime::now();
    let bundle = authority.invite(&of("deals/d1"), "hub:1", HOUR).unwrap();
    let off = bundle.expires().duration_since(before - SECOND).unwrap();
    assert!(
        (HOUR..HOUR + Duration::from_secs(600)).contains(&off),
        "{off:?}"
    );
}
