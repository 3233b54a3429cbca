//! Keys of accounts: BLS and secp256k1 signatures as the network makes them.

use bls_signatures::Serialize as _;
use fvm_shared::address::Protocol;
use fvm_shared::crypto::signature::{Signature, SignatureType};
use k256::ecdsa::{RecoveryId, SigningKey, VerifyingKey};
use lotus_types::Address;
use rand::RngCore;

/// Bytes of a secp256k1 signature: r, s and the recovery id.
const SECP_LEN: usize = 65;

/// A private key.
#[derive(Clone)]
pub enum Key {
    /// For workers, whose signatures are aggregated and serve as VRF.
    Bls(bls_signatures::PrivateKey),
    /// For everyone else.
    Secp256k1(SigningKey),
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key({})", self.address())
    }
}

impl Key {
    /// A new random key.
    #[must_use]
    pub fn generate(kind: SignatureType) -> Self {
        loop {
            let mut seed = [0u8; 32];
            rand::rng().fill_bytes(&mut seed);
            match kind {
                SignatureType::BLS => {
                    return Self::Bls(bls_signatures::PrivateKey::new(seed));
                }
                SignatureType::Secp256k1 => {
                    // Fails for one seed in 2^128.
                    if let Ok(key) = SigningKey::from_slice(&seed) {
                        return Self::Secp256k1(key);
                    }
                }
            }
        }
    }

    /// Reads what [`Key::to_bytes`] wrote: 32 bytes, in Lotus' order.
    #[must_use]
    pub fn from_bytes(kind: SignatureType, bytes: &[u8]) -> Option<Self> {
        match kind {
            SignatureType::BLS => bls_signatures::PrivateKey::from_bytes(bytes)
                .ok()
                .map(Self::Bls),
            SignatureType::Secp256k1 => SigningKey::from_slice(bytes).ok().map(Self::Secp256k1),
        }
    }

    /// The private key: a secret.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Bls(k) => k.as_bytes(),
            Self::Secp256k1(k) => k.to_bytes().to_vec(),
        }
    }

    /// What kind of signatures it makes.
    #[must_use]
    pub const fn kind(&self) -> SignatureType {
        match self {
            Self::Bls(_) => SignatureType::BLS,
            Self::Secp256k1(_) => SignatureType::Secp256k1,
        }
    }

    /// The key's address: `t3…` or `t1…`.
    #[must_use]
    pub fn address(&self) -> Address {
        match self {
            Self::Bls(k) => {
                Address::new_bls(&k.public_key().as_bytes()).expect("a BLS public key has 48 bytes")
            }
            Self::Secp256k1(k) => {
                let public = k.verifying_key().to_encoded_point(false);
                Address::new_secp256k1(public.as_bytes())
                    .expect("an uncompressed public key has 65 bytes")
            }
        }
    }

    /// Signs bytes.
    #[must_use]
    pub fn sign(&self, data: &[u8]) -> Option<Signature> {
        match self {
            Self::Bls(k) => Some(Signature::new_bls(k.sign(data).as_bytes())),
            Self::Secp256k1(k) => {
                let (sig, id) = k.sign_prehash_recoverable(&digest(data)).ok()?;
                let mut bytes = sig.to_bytes().to_vec();
                bytes.push(id.to_byte());
                Some(Signature::new_secp256k1(bytes))
            }
        }
    }
}

fn digest(data: &[u8]) -> [u8; 32] {
    lotus_actors::ticket_digest(data)
}

/// Whether the key behind `signer` made the signature over `data`.
#[must_use]
pub fn verify(sig: &Signature, data: &[u8], signer: &Address) -> bool {
    match (sig.sig_type, signer.protocol()) {
        (SignatureType::BLS, Protocol::BLS) => verify_bls(&sig.bytes, data, signer),
        (SignatureType::Secp256k1, Protocol::Secp256k1) => {
            recover(&sig.bytes, data).as_ref() == Some(signer)
        }
        _ => false,
    }
}

/// Whether `sig` is the BLS signature of `signer` over `data`: also the check of a VRF proof.
#[must_use]
pub fn verify_bls(sig: &[u8], data: &[u8], signer: &Address) -> bool {
    let key = bls_signatures::PublicKey::from_bytes(&signer.payload_bytes());
    let sig = bls_signatures::Signature::from_bytes(sig);
    match (key, sig) {
        (Ok(key), Ok(sig)) => signer.protocol() == Protocol::BLS && key.verify(sig, data),
        _ => false,
    }
}

/// The sum of BLS signatures; that of none is the point at infinity, as Lotus writes it.
#[must_use]
pub fn aggregate<'a>(sigs: impl Iterator<Item = &'a [u8]>) -> Option<Signature> {
    let parsed: Result<Vec<_>, _> = sigs.map(bls_signatures::Signature::from_bytes).collect();
    let parsed = parsed.ok()?;
    if parsed.is_empty() {
        let mut infinity = vec![0u8; 96];
        infinity[0] = 0xc0;
        return Some(Signature::new_bls(infinity));
    }
    let sum = bls_signatures::aggregate(&parsed).ok()?;
    Some(Signature::new_bls(sum.as_bytes()))
}

fn recover(sig: &[u8], data: &[u8]) -> Option<Address> {
    if sig.len() != SECP_LEN {
        return None;
    }
    let (rs, v) = sig.split_at(64);
    let rs = k256::ecdsa::Signature::from_slice(rs).ok()?;
    let id = RecoveryId::from_byte(*v.first()?)?;
    let key = VerifyingKey::recover_from_prehash(&digest(data), &rs, id).ok()?;
    Address::new_secp256k1(key.to_encoded_point(false).as_bytes()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_bind_key_and_data() {
        for kind in [SignatureType::BLS, SignatureType::Secp256k1] {
            let key = Key::generate(kind);
            let sig = key.sign(b"data").unwrap();
            assert!(verify(&sig, b"data", &key.address()));
            assert!(!verify(&sig, b"date", &key.address()));
            assert!(!verify(&sig, b"data", &Key::generate(kind).address()));
            let mut bad = sig.clone();
            bad.bytes[10] ^= 1;
            assert!(!verify(&bad, b"data", &key.address()));
            bad.bytes.truncate(10);
            assert!(!verify(&bad, b"data", &key.address()));
            let back = Key::from_bytes(kind, &key.to_bytes()).unwrap();
            assert_eq!(back.address(), key.address());
        }
    }

    #[test]
    fn aggregates_depend_on_every_signature() {
        let sigs: Vec<_> = (0..3)
            .map(|_| Key::generate(SignatureType::BLS).sign(b"x").unwrap().bytes)
            .collect();
        let all = aggregate(sigs.iter().map(Vec::as_slice)).unwrap();
        assert_ne!(Some(all), aggregate(sigs[1..].iter().map(Vec::as_slice)));
        assert_eq!(aggregate(std::iter::empty()).unwrap().bytes.len(), 96);
        assert!(aggregate(std::iter::once([1u8; 96].as_slice())).is_none());
    }
}
