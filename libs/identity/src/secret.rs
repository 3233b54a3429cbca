//! Bytes that nobody else shall see.

use std::fmt;
use std::hint::black_box;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A private key, or text with one in it. Not shown by `Debug`, and overwritten when it is
/// dropped. What TLS and the signing library hold of it is theirs.
#[derive(Clone)]
pub(crate) struct Secret(Vec<u8>);

impl Secret {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// A PKCS #8 key, as rustls takes it.
    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.0.clone()).into()
    }

    /// The value as JSON. The text is made in one place: growing would leave parts of it behind.
    pub(crate) fn json<T: Serialize>(value: &T, room: usize) -> serde_json::Result<Self> {
        let mut text = Self(Vec::with_capacity(room));
        serde_json::to_writer_pretty(&mut text.0, value)?;
        Ok(text)
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.fill(0);
        // Else the compiler sees that nobody reads the zeros.
        black_box(&mut self.0);
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let text = Self(STANDARD.encode(&self.0).into_bytes());
        s.serialize_str(std::str::from_utf8(&text.0).unwrap_or_default())
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        base64_bytes::deserialize(d).map(Self)
    }
}

/// Bytes as base64 text.
pub(crate) mod base64_bytes {
    use std::fmt;

    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::de::{Deserializer, Error, Visitor};
    use serde::ser::{Serialize as _, Serializer};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        STANDARD.encode(bytes).serialize(s)
    }

    /// From the text where it is, without a copy of it.
    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("base64 text")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Vec<u8>, E> {
                // The library's error names a byte of the text, which may be secret.
                STANDARD
                    .decode(text)
                    .map_err(|_| E::custom("not base64 text"))
            }
        }
        d.deserialize_str(Text)
    }
}

/// Certificates as base64 text.
pub(crate) mod der {
    use super::{Deserializer, Serializer, base64_bytes};
    use rustls::pki_types::CertificateDer;

    pub(crate) fn serialize<S: Serializer>(
        c: &CertificateDer<'_>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        base64_bytes::serialize(c, s)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<CertificateDer<'static>, D::Error> {
        base64_bytes::deserialize(d).map(CertificateDer::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_travels_and_does_not_show() {
        let secret = Secret::new(vec![7; 40]);
        let text = Secret::json(&secret, 100).unwrap();
        assert_eq!(text.0.capacity(), 100);
        let back: Secret = serde_json::from_slice(text.bytes()).unwrap();
        assert_eq!(back.bytes(), [7; 40]);
        assert_eq!(format!("{back:?}"), "Secret");
        let wrong = serde_json::from_str::<Secret>("\"AAAA!\"").unwrap_err();
        assert!(!wrong.to_string().contains('!'), "{wrong}");
    }
}
