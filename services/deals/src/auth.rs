//! The `CurioAuth` header: who asks. The signature covers the caller's address, the method, the
//! path and the present UTC minute, so a stolen header is worth two minutes on one path.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bls_signatures::Serialize as _;
use fvm_shared::address::Protocol;
use fvm_shared::crypto::signature::{Signature as Signed, SignatureType};
use jiff::{Timestamp, ToSpan as _};
use k256::ecdsa::{RecoveryId, Signature, VerifyingKey};
use lotus_types::Address;
use sha2::{Digest as _, Sha256};

/// Scheme of the `Authorization` header.
pub const SCHEME: &str = "CurioAuth ";
/// Longest header that is looked at: a BLS address and signature take 220 bytes.
const MAX_HEADER: usize = 1024;

/// Why a header is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// There is none.
    #[error("the Authorization header is missing")]
    Missing,
    /// Not of the form `CurioAuth type:address:signature`.
    #[error("the Authorization header is malformed: {0}")]
    Malformed(&'static str),
    /// A key type that is not supported here.
    #[error("key type {0:?} is not supported: use secp256k1 or bls")]
    KeyType(String),
    /// The signature does not hold for this request in this minute.
    #[error("the signature does not match the address, method, path and time of the request")]
    Signature,
}

impl AuthError {
    /// What to do.
    #[must_use]
    pub const fn fix(&self) -> &'static str {
        match self {
            Self::Missing | Self::Malformed(_) => {
                "send `Authorization: CurioAuth <secp256k1|bls>:<base64 address>:<base64 signature>`"
            }
            Self::KeyType(_) => "sign with a secp256k1 (t1…) or BLS (t3…) key",
            Self::Signature => {
                "sign sha256(address ‖ METHOD ‖ path ‖ UTC minute in RFC 3339), and check that the clock is right to a minute"
            }
        }
    }
}

/// What is signed: sha256(address ‖ METHOD ‖ path ‖ minute), the minute in RFC 3339 at full
/// minutes, such as `2025-07-15T17:00:00Z`.
#[must_use]
pub fn message(address: &Address, method: &str, path: &str, at: Timestamp) -> [u8; 32] {
    let mut h = Sha256::new();
    h.update(address.to_bytes());
    h.update(method.to_ascii_uppercase());
    h.update(if path.is_empty() { "/" } else { path });
    h.update(at.strftime("%Y-%m-%dT%H:%M:00Z").to_string());
    h.finalize().into()
}

/// The header for a signature made elsewhere: `signature` without its type byte.
#[must_use]
pub fn header(address: &Address, signature: &[u8]) -> Option<String> {
    let (name, kind) = match address.protocol() {
        Protocol::Secp256k1 => ("secp256k1", 1u8),
        Protocol::BLS => ("bls", 2),
        _ => return None,
    };
    let mut typed = vec![kind];
    typed.extend_from_slice(signature);
    Some(format!(
        "{SCHEME}{name}:{}:{}",
        STANDARD.encode(address.to_bytes()),
        STANDARD.encode(typed)
    ))
}

/// Signs a request with a secp256k1 key.
#[must_use]
pub fn sign_secp256k1(
    key: &k256::ecdsa::SigningKey,
    address: &Address,
    method: &str,
    path: &str,
    at: Timestamp,
) -> Option<String> {
    let digest = blake2b_256(&message(address, method, path, at));
    let (signature, recovery) = key.sign_prehash_recoverable(&digest).ok()?;
    let mut bytes = signature.to_bytes().to_vec();
    bytes.push(recovery.to_byte());
    header(address, &bytes)
}

/// Checks a header and returns who signed it. A minute to either side of `now` is allowed.
pub fn verify(
    header: Option<&str>,
    method: &str,
    path: &str,
    now: Timestamp,
) -> Result<Address, AuthError> {
    let header = header.ok_or(AuthError::Missing)?;
    if header.len() > MAX_HEADER {
        return Err(AuthError::Malformed("it is too long"));
    }
    let rest = header
        .strip_prefix(SCHEME)
        .ok_or(AuthError::Malformed("the scheme is not CurioAuth"))?;
    let mut parts = rest.splitn(3, ':');
    let (Some(kind), Some(address), Some(signature)) = (parts.next(), parts.next(), parts.next())
    else {
        return Err(AuthError::Malformed("it needs three parts"));
    };
    let expected = match kind {
        "secp256k1" => (Protocol::Secp256k1, 1u8),
        "bls" => (Protocol::BLS, 2),
        other => return Err(AuthError::KeyType(other.chars().take(32).collect())),
    };
    let address = STANDARD
        .decode(address)
        .ok()
        .and_then(|b| Address::from_bytes(&b).ok())
        .ok_or(AuthError::Malformed(
            "the address is not base64 of an address",
        ))?;
    let signature = STANDARD
        .decode(signature)
        .map_err(|_| AuthError::Malformed("the signature is not base64"))?;
    let Some((&typ, signature)) = signature.split_first() else {
        return Err(AuthError::Malformed("the signature is empty"));
    };
    if (address.protocol(), typ) != expected {
        return Err(AuthError::Malformed(
            "key type, address and signature are of different kinds",
        ));
    }
    let minutes = [now, now - 1.minute(), now + 1.minute()];
    if minutes
        .into_iter()
        .any(|at| holds(&address, signature, &message(&address, method, path, at)))
    {
        Ok(address)
    } else {
        Err(AuthError::Signature)
    }
}

/// Whether the key of an address made a signature over bytes, as Lotus verifies it.
pub(crate) fn signed_by(address: &Address, signature: &Signed, message: &[u8]) -> bool {
    let kind = match signature.sig_type {
        SignatureType::Secp256k1 => Protocol::Secp256k1,
        SignatureType::BLS => Protocol::BLS,
    };
    kind == address.protocol() && holds(address, &signature.bytes, message)
}

fn holds(address: &Address, signature: &[u8], message: &[u8]) -> bool {
    match address.protocol() {
        Protocol::Secp256k1 => secp256k1_signer(signature, message).as_ref() == Some(address),
        Protocol::BLS => bls_holds(&address.payload_bytes(), signature, message),
        _ => false,
    }
}

/// As Lotus verifies: the key is recovered from the signature over the BLAKE2b-256 hash.
fn secp256k1_signer(signature: &[u8], message: &[u8]) -> Option<Address> {
    let (rs, v) = signature.split_first_chunk::<64>()?;
    let [v] = v else { return None };
    let mut recovery = *v;
    let mut parsed = Signature::from_slice(rs).ok()?;
    if let Some(low) = parsed.normalize_s() {
        parsed = low;
        recovery ^= 1;
    }
    let key = VerifyingKey::recover_from_prehash(
        &blake2b_256(message),
        &parsed,
        RecoveryId::from_byte(recovery)?,
    )
    .ok()?;
    Address::new_secp256k1(key.to_encoded_point(false).as_bytes()).ok()
}

fn bls_holds(public_key: &[u8], signature: &[u8], message: &[u8]) -> bool {
    let (Ok(key), Ok(signature)) = (
        bls_signatures::PublicKey::from_bytes(public_key),
        bls_signatures::Signature::from_bytes(signature),
    ) else {
        return false;
    };
    bls_signatures::verify_messages(&signature, &[message], &[key])
}

fn blake2b_256(data: &[u8]) -> [u8; 32] {
    let hash = blake2b_simd::Params::new().hash_length(32).hash(data);
    hash.as_bytes().try_into().expect("32 bytes were asked for")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::damage::{damage, damaged};
    use k256::ecdsa::SigningKey;
    use proptest::prelude::*;

    const PATH: &str = "/market/mk20/deal";

    fn key() -> (SigningKey, Address) {
        let key = SigningKey::from_slice(&[7; 32]).unwrap();
        let public = key.verifying_key().to_encoded_point(false);
        let address = Address::new_secp256k1(public.as_bytes()).unwrap();
        (key, address)
    }

    fn at(s: &str) -> Timestamp {
        s.parse().unwrap()
    }

    #[test]
    fn the_signed_text_is_the_published_one() {
        let (_, address) = key();
        let mut text = address.to_bytes();
        text.extend_from_slice(b"POST/market/mk20/deal2025-07-15T17:03:00Z");
        let expected: [u8; 32] = Sha256::digest(text).into();
        let got = message(&address, "post", PATH, at("2025-07-15T17:03:59Z"));
        assert_eq!(got, expected);
    }

    #[test]
    fn a_secp256k1_header_holds_for_its_request_and_minute_only() {
        let (key, address) = key();
        let signed = at("2025-07-15T17:03:20Z");
        let h = sign_secp256k1(&key, &address, "POST", PATH, signed).unwrap();
        let check = |method: &str, path: &str, now: &str| verify(Some(&h), method, path, at(now));
        assert_eq!(check("POST", PATH, "2025-07-15T17:03:20Z"), Ok(address));
        assert_eq!(check("POST", PATH, "2025-07-15T17:02:01Z"), Ok(address));
        assert_eq!(check("POST", PATH, "2025-07-15T17:04:59Z"), Ok(address));
        for (method, path, now) in [
            ("POST", PATH, "2025-07-15T17:05:00Z"),
            ("POST", PATH, "2025-07-15T17:01:59Z"),
            ("GET", PATH, "2025-07-15T17:03:20Z"),
            ("POST", "/market/mk20/other", "2025-07-15T17:03:20Z"),
        ] {
            assert_eq!(check(method, path, now), Err(AuthError::Signature));
        }
    }

    #[test]
    fn a_bls_header_holds() {
        let key = bls_signatures::PrivateKey::new([9u8; 32]);
        let address = Address::new_bls(&key.public_key().as_bytes()).unwrap();
        let now = at("2025-07-15T17:03:20Z");
        let signature = key.sign(message(&address, "GET", PATH, now)).as_bytes();
        let h = header(&address, &signature).unwrap();
        assert_eq!(verify(Some(&h), "GET", PATH, now), Ok(address));
        assert_eq!(
            verify(Some(&h), "PUT", PATH, now),
            Err(AuthError::Signature)
        );
    }

    #[test]
    fn broken_headers_are_refused() {
        let (key, address) = key();
        let now = at("2025-07-15T17:03:20Z");
        let good = sign_secp256k1(&key, &address, "GET", PATH, now).unwrap();
        let (head, sig) = good.rsplit_once(':').unwrap();
        let flipped: Vec<u8> = {
            let mut b = STANDARD.decode(sig).unwrap();
            b[10] ^= 1;
            b
        };
        let wrong_type: Vec<u8> = {
            let mut b = STANDARD.decode(sig).unwrap();
            b[0] = 2;
            b
        };
        let id = Address::new_id(1000);
        let cases = [
            (None, AuthError::Missing),
            (
                Some("Bearer x".to_owned()),
                AuthError::Malformed("the scheme is not CurioAuth"),
            ),
            (
                Some("CurioAuth secp256k1:AAAA".into()),
                AuthError::Malformed("it needs three parts"),
            ),
            (
                Some("CurioAuth delegated:AA==:AA==".into()),
                AuthError::KeyType("delegated".into()),
            ),
            (
                Some("CurioAuth secp256k1:!:AA==".into()),
                AuthError::Malformed("the address is not base64 of an address"),
            ),
            (
                Some(format!("{head}:!")),
                AuthError::Malformed("the signature is not base64"),
            ),
            (
                Some(format!("{head}:")),
                AuthError::Malformed("the signature is empty"),
            ),
            (Some(format!("{head}:AQ==")), AuthError::Signature),
            (
                Some(format!("{head}:{}", STANDARD.encode(flipped))),
                AuthError::Signature,
            ),
            (
                Some(format!("{head}:{}", STANDARD.encode(wrong_type))),
                AuthError::Malformed("key type, address and signature are of different kinds"),
            ),
            (
                Some(format!(
                    "CurioAuth secp256k1:{}:{sig}",
                    STANDARD.encode(id.to_bytes())
                )),
                AuthError::Malformed("key type, address and signature are of different kinds"),
            ),
            (
                Some(format!("CurioAuth {}", "x".repeat(2000))),
                AuthError::Malformed("it is too long"),
            ),
        ];
        for (h, why) in cases {
            assert_eq!(verify(h.as_deref(), "GET", PATH, now), Err(why), "{h:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]
        #[test]
        fn a_header_that_was_changed_is_nobodys(damage in damage()) {
            let (key, address) = key();
            let now = at("2025-07-15T17:03:20Z");
            let good = sign_secp256k1(&key, &address, "GET", PATH, now).unwrap();
            let other = damaged(good.as_bytes(), &damage);
            let other = String::from_utf8_lossy(&other);
            match verify(Some(&other), "GET", PATH, now) {
                Ok(who) => prop_assert_eq!((who, &*other), (address, &*good)),
                Err(e) => prop_assert!(!e.fix().is_empty() && e.to_string().len() < 200, "{e}"),
            }
        }
    }
}
