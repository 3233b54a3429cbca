use lotus_types::{DealKey, Epoch, SectorNumber};

/// A key with an encoding whose byte order is the order of the keys.
pub trait JournalKey: Sized {
    /// Appends the ordered encoding.
    fn encode(&self, out: &mut Vec<u8>);
    /// Reads what [`JournalKey::encode`] wrote and returns the rest; `None` if it is not that.
    fn decode(bytes: &[u8]) -> Option<(Self, &[u8])>;
}

impl JournalKey for u64 {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_be_bytes());
    }
    fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (head, rest) = bytes.split_first_chunk()?;
        Some((Self::from_be_bytes(*head), rest))
    }
}

impl JournalKey for i64 {
    fn encode(&self, out: &mut Vec<u8>) {
        // Flipping the sign bit puts negative numbers before positive ones.
        (self.cast_unsigned() ^ (1 << 63)).encode(out);
    }
    fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (n, rest) = u64::decode(bytes)?;
        Some(((n ^ (1 << 63)).cast_signed(), rest))
    }
}

impl<const N: usize> JournalKey for [u8; N] {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }
    fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (head, rest) = bytes.split_first_chunk()?;
        Some((*head, rest))
    }
}

/// Text must not contain a zero byte: it ends the text, so that a shorter text sorts before a
/// longer one in pairs too.
impl JournalKey for String {
    fn encode(&self, out: &mut Vec<u8>) {
        debug_assert!(
            !self.as_bytes().contains(&0),
            "a text key holds no zero byte"
        );
        out.extend_from_slice(self.as_bytes());
        out.push(0);
    }
    fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let end = bytes.iter().position(|b| *b == 0)?;
        let text = std::str::from_utf8(&bytes[..end]).ok()?;
        Some((text.to_owned(), &bytes[end + 1..]))
    }
}

impl JournalKey for SectorNumber {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
    }
    fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        u64::decode(bytes).map(|(n, rest)| (Self(n), rest))
    }
}

impl JournalKey for Epoch {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
    }
    fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        i64::decode(bytes).map(|(n, rest)| (Self(n), rest))
    }
}

impl JournalKey for DealKey {
    fn encode(&self, out: &mut Vec<u8>) {
        self.client.encode(out);
        out.extend_from_slice(&self.id.to_bytes());
    }
    fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (client, rest) = String::decode(bytes)?;
        let (id, rest) = <[u8; 16]>::decode(rest)?;
        Some((
            Self {
                client,
                id: u128::from_be_bytes(id).into(),
            },
            rest,
        ))
    }
}

impl<A: JournalKey, B: JournalKey> JournalKey for (A, B) {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
        self.1.encode(out);
    }
    fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (a, rest) = A::decode(bytes)?;
        let (b, rest) = B::decode(rest)?;
        Some(((a, b), rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes<K: JournalKey>(k: &K) -> Vec<u8> {
        let mut out = Vec::new();
        k.encode(&mut out);
        out
    }

    proptest! {
        #[test]
        fn order_and_value_survive(
            a in ("[a-z]{0,4}", any::<i64>()),
            b in ("[a-z]{0,4}", any::<i64>()),
        ) {
            prop_assert_eq!(bytes(&a).cmp(&bytes(&b)), a.cmp(&b));
            let encoded = bytes(&a);
            prop_assert_eq!(<(String, i64)>::decode(&encoded), Some((a, &[][..])));
        }

        #[test]
        fn any_bytes_decode_or_are_refused(junk in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some((key, rest)) = DealKey::decode(&junk) {
                let used = junk.len() - rest.len();
                prop_assert_eq!(bytes(&key), &junk[..used]);
            }
        }
    }
}
