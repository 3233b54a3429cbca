//! What a spoke keeps.

use lotus_types::Kind;

use super::*;
use crate::Held;

/// A spoke's directory, and the bundle that it is started with.
struct Spoke {
    dir: tempfile::TempDir,
}

impl Spoke {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir }
    }

    fn gets(&self, bundle: &Bundle) {
        let file = self.dir.path().join("bundle");
        if file.exists() {
            std::fs::remove_file(&file).unwrap();
        }
        bundle.write(&file).unwrap();
    }

    fn starts(&self) -> Held {
        let bundle = self.dir.path().join("bundle");
        Held::open(&self.dir.path().join("identity"), Some(&bundle)).unwrap()
    }
}

fn join(hub: &Hub, bundle: &Bundle, held: &Held) -> Credential {
    let joined = hub.authority.join(bundle.certificate(), &held.public_key());
    joined.unwrap()
}

#[test]
fn a_spoke_that_is_killed_while_it_joins_goes_on_with_the_same_key() {
    let (hub, spoke) = (Hub::new(), Spoke::new());
    let bundle = hub.invite("retrieval/r1");
    spoke.gets(&bundle);
    let first = spoke.starts();
    assert!(!first.has_joined());
    assert_eq!(first.expires(), None);
    // Killed before it asked; and after, before there was an answer.
    let second = spoke.starts();
    assert_eq!(second.public_key(), first.public_key());
    join(&hub, &bundle, &second);
    let mut third = spoke.starts();
    assert_eq!(third.public_key(), first.public_key());

    let before = SystemTime::now();
    third.accept(join(&hub, &bundle, &third)).unwrap();
    assert!(third.has_joined());
    // By its own clock, whatever the hub's is.
    let left = third.expires().unwrap().duration_since(before).unwrap();
    assert!(
        (LIFE - SECOND..LIFE + HOUR / 60).contains(&left),
        "{left:?}"
    );

    let fourth = spoke.starts();
    assert!(fourth.has_joined());
    assert_eq!(fourth.public_key(), first.public_key());
    assert_eq!(fourth.expires(), third.expires());
    assert_eq!(
        (fourth.hub(), fourth.caller()),
        ("hub:1", &of("retrieval/r1"))
    );
    assert!(fourth.client_config(&[b"h2"]).is_ok());
}

#[test]
fn a_bundle_counts_if_it_is_newer() {
    let (hub, spoke) = (Hub::new(), Spoke::new());
    let nothing = Held::open(&spoke.dir.path().join("identity"), None);
    assert_eq!(nothing.unwrap_err().kind, Kind::Config);
    let bundle = spoke.dir.path().join("bundle");
    let gone = Held::open(&spoke.dir.path().join("identity"), Some(&bundle));
    assert_eq!(gone.unwrap_err().kind, Kind::Config);

    let old = hub.invite("retrieval/r1");
    // At the same moment, as the clock goes.
    let new = hub.invite("retrieval/r1");
    spoke.gets(&new);
    let mut held = spoke.starts();
    held.accept(join(&hub, &new, &held)).unwrap();
    let key = held.public_key();

    spoke.gets(&old);
    assert_eq!(spoke.starts().public_key(), key, "older");
    std::fs::remove_file(&bundle).unwrap();
    assert_eq!(spoke.starts().public_key(), key, "gone");
    let without = Held::open(&spoke.dir.path().join("identity"), None).unwrap();
    assert!(without.has_joined());

    let newer = hub.invite("retrieval/r1");
    spoke.gets(&newer);
    let mut anew = spoke.starts();
    assert!(!anew.has_joined());
    assert_ne!(anew.public_key(), key);
    anew.accept(join(&hub, &newer, &anew)).unwrap();

    // The hub was made anew, and its clock is behind.
    let other = Hub::new();
    other.set_back(HOUR);
    let bundle = other.invite("retrieval/r1");
    spoke.gets(&bundle);
    let mut theirs = spoke.starts();
    assert!(!theirs.has_joined());
    theirs.accept(join(&other, &bundle, &theirs)).unwrap();

    std::fs::write(spoke.dir.path().join("identity/identity.json"), "{}").unwrap();
    let broken = Held::open(&spoke.dir.path().join("identity"), None);
    assert_eq!(broken.unwrap_err().kind, Kind::Config);
}

#[test]
fn only_its_own_credential_is_kept() {
    let (hub, spoke) = (Hub::new(), Spoke::new());
    let bundle = hub.invite("retrieval/r1");
    spoke.gets(&bundle);
    let mut held = spoke.starts();
    let public = held.public_key();

    let other = Hub::new();
    let theirs = other.invite("retrieval/r1");
    let foreign = other.authority.join(theirs.certificate(), &public);
    let second = hub.invite("retrieval/r2");
    let of_another = hub.authority.join(second.certificate(), &public);
    let (_, key_of_another) = hub.joined("retrieval/r3");
    let broken = Credential {
        certificate: vec![1, 2, 3],
        expires_unix_ms: u64::MAX,
    };
    let key_of_another = Credential {
        certificate: key_of_another.to_vec(),
        expires_unix_ms: 0,
    };
    for wrong in [
        foreign.unwrap(),
        of_another.unwrap(),
        key_of_another,
        broken,
    ] {
        assert_eq!(held.accept(wrong).unwrap_err().kind, Kind::Data);
        assert!(!held.has_joined());
    }
    held.accept(join(&hub, &bundle, &held)).unwrap();
    hub.wait(LIFE);
    let file = spoke.dir.path().join("identity/identity.json");
    let before = std::fs::read_to_string(&file).unwrap();
    let certificate = certificate_of(&before);
    held.accept(hub.authority.renew_late(&certificate, REJOIN).unwrap())
        .unwrap();
    let after = std::fs::read_to_string(&file).unwrap();
    assert_ne!(before, after);
    assert!(!after.contains("joining"), "the bundle's key is forgotten");
}

/// The certificate in a spoke's file.
fn certificate_of(text: &str) -> CertificateDer<'static> {
    use base64::Engine as _;
    let value: serde_json::Value = serde_json::from_str(text).unwrap();
    let text = value["stage"]["joined"]["certificate"].as_str().unwrap();
    let der = base64::engine::general_purpose::STANDARD.decode(text);
    der.unwrap().into()
}
