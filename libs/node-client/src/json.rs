//! Lotus' JSON forms, where they differ from what serde derives.
//!
//! Lotus writes a CID as `{"/": "bafy…"}`, bytes as base64, big integers as decimal strings, a
//! bit field as the lengths of its runs (zeros first), an address as text, and a nil Go slice as
//! `null`. Fields opt in with `#[serde(with = "crate::json")]`; parameters and results of a call
//! with [`Lotus`].

use std::str::FromStr;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use cid::Cid;
use fvm_ipld_bitfield::BitField;
use fvm_ipld_bitfield::iter::Ranges;
use fvm_shared::address::Network;
use fvm_shared::bigint::BigInt;
use fvm_shared::crypto::signature::{Signature, SignatureType};
use lotus_types::{Address, Epoch, EpochDelta, SectorNumber, TokenAmount};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Most runs that a bit field in JSON may have: far above the 3,072 that its CBOR form can hold.
const MAX_RUNS: usize = 1 << 16;

/// A value that has a form in Lotus' JSON.
pub trait ToLotus {
    /// Writes the value as Lotus does.
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error>;
}

/// A value that can be read from Lotus' JSON.
pub trait FromLotus: Sized {
    /// Reads the value as Lotus does.
    fn de<'de, D: Deserializer<'de>>(d: D) -> Result<Self, D::Error>;
}

/// Gives a value its Lotus JSON form under serde.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lotus<T>(pub T);

impl<T: ToLotus> Serialize for Lotus<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.0.ser(s)
    }
}

impl<'de, T: FromLotus> Deserialize<'de> for Lotus<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        T::de(d).map(Self)
    }
}

/// For `#[serde(with = "crate::json")]`.
pub(crate) fn serialize<T: ToLotus, S: Serializer>(v: &T, s: S) -> Result<S::Ok, S::Error> {
    v.ser(s)
}

/// For `#[serde(with = "crate::json")]`.
pub(crate) fn deserialize<'de, T: FromLotus, D: Deserializer<'de>>(d: D) -> Result<T, D::Error> {
    T::de(d)
}

impl<T: ToLotus + ?Sized> ToLotus for &T {
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        (**self).ser(s)
    }
}

impl<T: ToLotus> ToLotus for Option<T> {
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.as_ref().map(Lotus).serialize(s)
    }
}

impl<T: FromLotus> FromLotus for Option<T> {
    fn de<'de, D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Ok(Option::<Lotus<T>>::deserialize(d)?.map(|v| v.0))
    }
}

impl<T: ToLotus> ToLotus for [T] {
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(self.iter().map(Lotus))
    }
}

impl<T: ToLotus> ToLotus for Vec<T> {
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.as_slice().ser(s)
    }
}

/// A nil Go slice is `null`.
impl<T: FromLotus> FromLotus for Vec<T> {
    fn de<'de, D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let items = Option::<Vec<Lotus<T>>>::deserialize(d)?.unwrap_or_default();
        Ok(items.into_iter().map(|v| v.0).collect())
    }
}

impl ToLotus for [u8] {
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&BASE64_STANDARD.encode(self))
    }
}

impl ToLotus for Vec<u8> {
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.as_slice().ser(s)
    }
}

impl FromLotus for Vec<u8> {
    fn de<'de, D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = Option::<String>::deserialize(d)?.unwrap_or_default();
        BASE64_STANDARD.decode(text).map_err(D::Error::custom)
    }
}

impl FromLotus for [u8; 32] {
    fn de<'de, D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let bytes = Vec::<u8>::de(d)?;
        <[u8; 32]>::try_from(bytes.as_slice())
            .map_err(|_| D::Error::custom(format!("{} bytes where 32 belong", bytes.len())))
    }
}

impl ToLotus for [u8; 32] {
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.as_slice().ser(s)
    }
}

#[derive(Serialize, Deserialize)]
struct CidLink {
    #[serde(rename = "/")]
    link: String,
}

impl ToLotus for Cid {
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let link = self.to_string();
        CidLink { link }.serialize(s)
    }
}

impl FromLotus for Cid {
    fn de<'de, D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = CidLink::deserialize(d)?.link;
        Self::from_str(&text).map_err(D::Error::custom)
    }
}

/// Text form of an address with the `t` prefix. Lotus takes `t` and `f` on every network.
#[must_use]
pub fn address_text(a: &Address) -> String {
    let text = a.to_string();
    match text.strip_prefix('f') {
        Some(rest) => format!("t{rest}"),
        None => text,
    }
}

/// Reads an address with the prefix of any network.
pub fn parse_address(text: &str) -> Result<Address, fvm_shared::address::Error> {
    Network::Mainnet
        .parse_address(text)
        .or_else(|_| Network::Testnet.parse_address(text))
}

impl ToLotus for Address {
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&address_text(self))
    }
}

impl FromLotus for Address {
    fn de<'de, D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        parse_address(&text).map_err(|e| D::Error::custom(format!("address {text:?}: {e}")))
    }
}

/// An address that Lotus may leave undefined: `null`, `""` or `"<empty>"`.
pub(crate) mod maybe_address {
    use super::{
        Address, Deserialize, Deserializer, Serializer, ToLotus, address_text, parse_address,
    };
    use serde::de::Error as _;

    pub(crate) fn serialize<S: Serializer>(v: &Option<Address>, s: S) -> Result<S::Ok, S::Error> {
        match v {
            Some(a) => s.serialize_str(&address_text(a)),
            None => Option::<Address>::None.ser(s),
        }
    }

    pub(crate) fn deserialize<'de, D>(d: D) -> Result<Option<Address>, D::Error>
    where
        D: Deserializer<'de>,
    {
        match Option::<String>::deserialize(d)?.as_deref() {
            None | Some("" | "<empty>") => Ok(None),
            Some(text) => parse_address(text).map(Some).map_err(D::Error::custom),
        }
    }
}

impl ToLotus for BigInt {
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl FromLotus for BigInt {
    fn de<'de, D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match Option::<String>::deserialize(d)?.as_deref() {
            None | Some("") => Ok(Self::default()),
            // 2^256 has 78 digits; quadratic parsing of a longer number is of no use.
            Some(text) if text.len() > 160 => Err(D::Error::custom("number too long")),
            Some(text) => Self::from_str(text).map_err(D::Error::custom),
        }
    }
}

impl ToLotus for TokenAmount {
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.atto().ser(s)
    }
}

impl FromLotus for TokenAmount {
    fn de<'de, D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        BigInt::de(d).map(Self::from_atto)
    }
}

impl ToLotus for BitField {
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut runs = Vec::new();
        let mut at = 0;
        for r in self.ranges() {
            runs.extend([r.start - at, r.end - r.start]);
            at = r.end;
        }
        if runs.is_empty() {
            runs.push(0);
        }
        runs.serialize(s)
    }
}

impl FromLotus for BitField {
    fn de<'de, D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let runs = Option::<Vec<u64>>::deserialize(d)?.unwrap_or_default();
        if runs.len() > MAX_RUNS {
            return Err(D::Error::custom("bit field with too many runs"));
        }
        let mut ranges = Vec::new();
        let mut at = 0u64;
        for (i, run) in runs.iter().enumerate() {
            let end = at
                .checked_add(*run)
                .ok_or_else(|| D::Error::custom("bit field beyond 2^64"))?;
            // Only the first run (of zeros) may be empty.
            if *run == 0 && i > 0 {
                return Err(D::Error::custom("bit field with an empty run"));
            }
            if i % 2 == 1 {
                ranges.push(at..end);
            }
            at = end;
        }
        Ok(Self::from_ranges(Ranges::new(ranges)))
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SignatureJson {
    r#type: u8,
    #[serde(with = "crate::json")]
    data: Vec<u8>,
}

impl ToLotus for Signature {
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        SignatureJson {
            r#type: self.sig_type as u8,
            data: self.bytes.clone(),
        }
        .serialize(s)
    }
}

impl FromLotus for Signature {
    fn de<'de, D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let json = SignatureJson::deserialize(d)?;
        let sig_type = match json.r#type {
            1 => SignatureType::Secp256k1,
            2 => SignatureType::BLS,
            n => return Err(D::Error::custom(format!("unknown signature type {n}"))),
        };
        Ok(Self {
            sig_type,
            bytes: json.data,
        })
    }
}

/// Types whose serde form already is Lotus' form.
macro_rules! plain {
    ($($ty:ty),* $(,)?) => {$(
        impl $crate::json::ToLotus for $ty {
            fn ser<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                serde::Serialize::serialize(self, s)
            }
        }
        impl $crate::json::FromLotus for $ty {
            fn de<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                serde::Deserialize::deserialize(d)
            }
        }
    )*};
}
pub(crate) use plain;

plain!(
    bool,
    u32,
    u64,
    i64,
    f64,
    String,
    (),
    serde_json::Value,
    Epoch,
    EpochDelta,
    SectorNumber
);

impl ToLotus for str {
    fn ser<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn both<T>(v: T, j: serde_json::Value)
    where
        T: ToLotus + FromLotus + PartialEq + std::fmt::Debug,
    {
        assert_eq!(serde_json::to_value(Lotus(&v)).unwrap(), j);
        assert_eq!(serde_json::from_value::<Lotus<T>>(j).unwrap().0, v);
    }

    #[test]
    fn forms_are_those_of_lotus() {
        both(vec![1u8, 2, 255], json!("AQL/"));
        both(TokenAmount::from_atto(1_000_000_007), json!("1000000007"));
        both(BigInt::from(-3), json!("-3"));
        both(Address::new_id(1000), json!("t01000"));
        both(
            "bafy2bzacea3wsdh6y3a36tb3skempjoxqpuyompjbmfeyf34fi3uy6uue42v4"
                .parse::<Cid>()
                .unwrap(),
            json!({"/": "bafy2bzacea3wsdh6y3a36tb3skempjoxqpuyompjbmfeyf34fi3uy6uue42v4"}),
        );
        both(BitField::new(), json!([0]));
        both(
            BitField::try_from_bits([0, 1, 2, 7]).unwrap(),
            json!([0, 3, 4, 1]),
        );
        both(BitField::try_from_bits([5, 6]).unwrap(), json!([5, 2]));
        both(
            Signature::new_bls(vec![7; 3]),
            json!({"Type": 2, "Data": "BwcH"}),
        );
        both(Option::<BitField>::None, json!(null));
    }

    #[test]
    fn nil_slices_are_empty_and_nonsense_is_refused() {
        let none = serde_json::from_value::<Lotus<Vec<u8>>>(json!(null)).unwrap();
        assert!(none.0.is_empty());
        let none = serde_json::from_value::<Lotus<Vec<Cid>>>(json!(null)).unwrap();
        assert!(none.0.is_empty());
        for runs in [json!([1, u64::MAX]), json!([0, 0, 1]), json!([-1])] {
            assert!(serde_json::from_value::<Lotus<BitField>>(runs).is_err());
        }
        for a in ["x01", "t9", "<empty>", "", "f1abc"] {
            assert!(serde_json::from_value::<Lotus<Address>>(json!(a)).is_err());
        }
        let both = ["f01000", "t01000"].map(|a| parse_address(a).unwrap());
        assert_eq!(both[0], both[1]);
        assert!(serde_json::from_value::<Lotus<BigInt>>(json!("9".repeat(200))).is_err());
    }

    proptest! {
        #[test]
        fn bit_fields_survive(bits in prop::collection::btree_set(0u64..5_000, 0..200)) {
            let field = BitField::try_from_bits(bits.iter().copied()).unwrap();
            let json = serde_json::to_value(Lotus(&field)).unwrap();
            let back: Lotus<BitField> = serde_json::from_value(json).unwrap();
            prop_assert_eq!(back.0, field);
        }
    }
}
