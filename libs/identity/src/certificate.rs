//! What is in a certificate of the hub's authority: reading and making them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lotus_runtime::Fault;
use lotus_types::Kind;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm,
};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, Error, KeyUsage};

use crate::{CLOCK_SKEW, Caller, HUB_NAME, LIFE, Name, Refused};

// What follows the name of whom a certificate is of. Each kind has a suffix of its own, and what
// one may do the others may not.
const SPOKE: &str = ".spoke.lotus-hub.internal";
const JOIN: &str = ".join.lotus-hub.internal";
const WORKER: &str = ".worker.lotus-hub.internal";

pub(crate) const DAY: Duration = Duration::from_secs(24 * 3600);
/// The longest that anything is signed for. A hub's own certificate is made at each of its starts.
pub(crate) const LONGEST: Duration = Duration::from_secs(3650 * 24 * 3600);

/// What the certificate of a connection says, before the register is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presented {
    /// A spoke's. Whether it is in force is for [`Authority::caller`](crate::Authority::caller).
    Spoke(Caller),
    /// A join bundle's: it can join, and nothing else.
    Joining(Caller),
    /// A worker's, or of no authority that is known here.
    Other,
}

/// Whom a certificate is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    Spoke(Caller),
    Joining(Caller),
    Worker(Name),
    Hub,
    Other,
}

impl Holder {
    /// The name in the certificate.
    pub(crate) fn dns(&self) -> String {
        let of = |c: &Caller, suffix: &str| format!("{}.{}{suffix}", c.instance, c.service);
        match self {
            Self::Spoke(caller) => of(caller, SPOKE),
            Self::Joining(caller) => of(caller, JOIN),
            Self::Worker(name) => format!("{name}{WORKER}"),
            Self::Hub => HUB_NAME.into(),
            Self::Other => String::new(),
        }
    }

    fn of(dns: &str) -> Self {
        let caller = |labels: &str| {
            let (instance, service) = labels.split_once('.')?;
            Some(Caller {
                service: service.parse().ok()?,
                instance: instance.parse().ok()?,
            })
        };
        let known = if let Some(labels) = dns.strip_suffix(SPOKE) {
            caller(labels).map(Self::Spoke)
        } else if let Some(labels) = dns.strip_suffix(JOIN) {
            caller(labels).map(Self::Joining)
        } else if let Some(name) = dns.strip_suffix(WORKER) {
            name.parse().ok().map(Self::Worker)
        } else {
            (dns == HUB_NAME).then_some(Self::Hub)
        };
        known.unwrap_or(Self::Other)
    }

    /// Whom it says it is of; nothing is verified. A certificate of ours has one name.
    pub(crate) fn claimed(certificate: &EndEntityCert<'_>) -> Self {
        let mut names = certificate.valid_dns_names();
        match (names.next(), names.next()) {
            (Some(dns), None) => Self::of(dns),
            _ => Self::Other,
        }
    }
}

/// The worker that a certificate names; nothing is verified.
#[must_use]
pub fn worker_name(certificate: &CertificateDer<'_>) -> Option<Name> {
    let parsed = EndEntityCert::try_from(certificate).ok()?;
    match Holder::claimed(&parsed) {
        Holder::Worker(name) => Some(name),
        Holder::Spoke(_) | Holder::Joining(_) | Holder::Hub | Holder::Other => None,
    }
}

/// What a certificate of ours says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) holder: Holder,
    /// SubjectPublicKeyInfo, DER.
    pub(crate) public_key: Vec<u8>,
    pub(crate) window: Window,
}

/// From when to when a certificate is in force: whole seconds, as in certificates, since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) from: u64,
    pub(crate) to: u64,
}

impl Window {
    /// From `before` now to `life` after.
    pub(crate) fn around(now: SystemTime, before: Duration, life: Duration) -> Self {
        let now = unix(now).as_secs();
        Self {
            from: now.saturating_sub(before.as_secs()),
            to: now.saturating_add(life.min(LONGEST).as_secs()),
        }
    }

    /// Of a spoke's credential.
    pub(crate) fn credential(now: SystemTime) -> Self {
        Self::around(now, CLOCK_SKEW, LIFE)
    }

    /// Whether it is in force, as far as clocks can be trusted. A window that has not begun is
    /// what a clock that was set back leaves.
    pub(crate) fn holds(self, now: SystemTime) -> bool {
        let (now, skew) = (unix(now).as_secs(), CLOCK_SKEW.as_secs());
        self.from <= now.saturating_add(skew) && now <= self.to.saturating_add(skew)
    }

    /// Whether it ended more than `grace` ago.
    pub(crate) fn over(self, now: SystemTime, grace: Duration) -> bool {
        unix(now).as_secs() > self.to.saturating_add(grace.as_secs())
    }

    pub(crate) fn end_unix_ms(self) -> u64 {
        self.to.saturating_mul(1000)
    }
}

/// Time since 1970. A clock that is before it is as good as one that is at it.
pub(crate) fn unix(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

pub(crate) fn unix_ms(time: SystemTime) -> u64 {
    u64::try_from(unix(time).as_millis()).unwrap_or(u64::MAX)
}

/// Reads a certificate of a client, and verifies that it is of this authority. Whether it is in
/// force is for the caller to see.
pub(crate) fn facts(
    certificate: &CertificateDer<'_>,
    anchor: &TrustAnchor<'_>,
) -> Result<Facts, Refused> {
    let parsed = EndEntityCert::try_from(certificate).map_err(|_| Refused::NotOurs)?;
    let algorithms = default_provider().signature_verification_algorithms.all;
    let anchors = std::slice::from_ref(anchor);
    let verify = |at: UnixTime| {
        let usage = KeyUsage::client_auth();
        parsed
            .verify_for_usage(algorithms, anchors, &[], at, usage, None, None)
            .map(drop)
    };
    let at = |secs| UnixTime::since_unix_epoch(Duration::from_secs(secs));
    // webpki tells the bounds only to those who are outside of them.
    let (from, to) = match (verify(at(0)), verify(at(u64::MAX))) {
        (
            Err(Error::CertNotValidYet { not_before, .. }),
            Err(Error::CertExpired { not_after, .. }),
        ) => (not_before.as_secs(), not_after.as_secs()),
        _ => return Err(Refused::NotOurs),
    };
    verify(at(from)).map_err(|_| Refused::NotOurs)?;
    Ok(Facts {
        holder: Holder::claimed(&parsed),
        public_key: parsed.subject_public_key_info().to_vec(),
        window: Window { from, to },
    })
}

/// What a certificate is made of, but for the key.
pub(crate) fn params(
    holder: &Holder,
    purpose: ExtendedKeyUsagePurpose,
    window: Window,
) -> Result<CertificateParams, rcgen::Error> {
    let dns = holder.dns();
    let mut params = CertificateParams::new([dns.clone()])?;
    params.distinguished_name.push(DnType::CommonName, dns);
    let time = |secs| UNIX_EPOCH + Duration::from_secs(secs);
    params.not_before = time(window.from).into();
    params.not_after = time(window.to).into();
    params.extended_key_usages = vec![purpose];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    Ok(params)
}

/// What the authority's own certificate is made of, but for the key.
pub(crate) fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    // Bundles trust this name and the key: another name would make them void.
    let name = "lotus-hub worker authority";
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

/// A P-256 key of somebody else, as SubjectPublicKeyInfo.
pub(crate) struct PublicKey<'a>(&'a [u8]);

impl<'a> PublicKey<'a> {
    /// What comes before the point: SEQUENCE { SEQUENCE { ecPublicKey, prime256v1 }, BIT STRING }.
    /// Source: RFC 5480, section 2.
    const HEAD: [u8; 26] = [
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08,
        0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
    ];
    /// An uncompressed point: 4, and two coordinates of 32 bytes.
    const POINT: usize = 65;

    /// Whether the point is on the curve is not looked at: no connection with one that is not
    /// passes its handshake.
    pub(crate) fn parse(der: &'a [u8]) -> Result<Self, Refused> {
        match der.strip_prefix(&Self::HEAD) {
            Some(point) if point.len() == Self::POINT && point.first() == Some(&4) => {
                Ok(Self(point))
            }
            _ => Err(Refused::Broken(
                "the public key is no P-256 key in SubjectPublicKeyInfo form".into(),
            )),
        }
    }
}

impl PublicKeyData for PublicKey<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

pub(crate) fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    blake3::hash(certificate).to_hex().to_string()
}

pub(crate) fn broken(e: &dyn std::fmt::Display) -> Fault {
    Fault::new(
        Kind::Fatal,
        format!("certificates: {e}"),
        "check the bundle and the clock; make a new bundle on the hub",
    )
}

#[cfg(test)]
mod tests {
    use rcgen::KeyPair;

    use super::*;

    #[test]
    fn names_in_certificates_are_read_back() {
        let caller: Caller = "retrieval/r1".parse().unwrap();
        for (holder, dns) in [
            (
                Holder::Spoke(caller.clone()),
                "r1.retrieval.spoke.lotus-hub.internal",
            ),
            (
                Holder::Joining(caller),
                "r1.retrieval.join.lotus-hub.internal",
            ),
            (
                Holder::Worker("w".parse().unwrap()),
                "w.worker.lotus-hub.internal",
            ),
            (Holder::Hub, "hub.lotus-hub.internal"),
        ] {
            assert_eq!(holder.dns(), dns);
            assert_eq!(Holder::of(dns), holder);
        }
        for dns in [
            "",
            "r1.spoke.lotus-hub.internal",
            "a.r1.retrieval.spoke.lotus-hub.internal",
            "R1.retrieval.spoke.lotus-hub.internal",
            ".retrieval.spoke.lotus-hub.internal",
            "a.b.worker.lotus-hub.internal",
            "r1.retrieval.spoke.lotus-hub.internal.example",
        ] {
            assert_eq!(Holder::of(dns), Holder::Other, "{dns}");
        }
    }

    #[test]
    fn windows_bear_a_clock_that_is_a_little_off() {
        let at = |secs| UNIX_EPOCH + Duration::from_secs(secs);
        let window = Window::credential(at(10_000));
        let (life, skew) = (LIFE.as_secs(), CLOCK_SKEW.as_secs());
        assert_eq!((window.from, window.to), (10_000 - skew, 10_000 + life));
        for (now, holds) in [
            (10_000, true),
            (10_000 + life + skew, true),
            (10_000 + life + skew + 1, false),
            (10_000 - 2 * skew, true),
            (10_000 - 2 * skew - 1, false),
        ] {
            assert_eq!(window.holds(at(now)), holds, "{now}");
        }
        assert!(!window.over(at(10_000 + life + 5), Duration::from_secs(5)));
        assert!(window.over(at(10_000 + life + 6), Duration::from_secs(5)));
        let ages = Window::around(at(10_000), DAY, Duration::MAX);
        assert_eq!((ages.from, ages.to), (0, 10_000 + LONGEST.as_secs()));
    }

    #[test]
    fn a_public_key_is_one_of_p256() {
        let key = KeyPair::generate().unwrap();
        let der = key.subject_public_key_info();
        let parsed = PublicKey::parse(&der).unwrap();
        assert_eq!(parsed.der_bytes(), key.public_key_raw());
        assert_eq!(parsed.subject_public_key_info(), der);
        let other = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let mut compressed = der.clone();
        compressed[26] = 2;
        for bad in [
            &b""[..],
            &der[..90],
            &[der.as_slice(), &[0]].concat(),
            &compressed,
            &other.subject_public_key_info(),
        ] {
            assert!(PublicKey::parse(bad).is_err());
        }
    }
}
