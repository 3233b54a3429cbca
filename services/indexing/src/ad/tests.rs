//! What is published, read as an indexer reads it: as it was written, or not at all.

use libp2p_identity::{PeerId, PublicKey};
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

fn key(n: u8) -> Keypair {
    Keypair::ed25519_from_bytes([n; 32]).unwrap()
}

fn id(key: &Keypair) -> String {
    key.public().to_peer_id().to_base58()
}

fn cid(n: u8) -> Cid {
    Cid::new_v1(DAG_JSON, Code::Sha2_256.digest(&[n]))
}

/// Opens an envelope. Returns who signed it, and what; `None` when nobody did.
fn opened(bytes: &[u8], kind: &str) -> Option<(PeerId, Vec<u8>)> {
    let envelope = Envelope::decode(bytes).ok()?;
    if envelope.payload_type != kind.as_bytes() {
        return None;
    }
    let key = PublicKey::try_decode_protobuf(&envelope.public_key).ok()?;
    let signed = unsigned(kind, &envelope.payload);
    let holds = key.verify(&signed, &envelope.signature);
    holds.then(|| (key.to_peer_id(), envelope.payload))
}

/// The fields of an advertisement, as an indexer decodes them.
fn decoded(bytes: &[u8]) -> Option<(Ad, Vec<u8>)> {
    let Ipld::Map(mut map) = serde_ipld_dagjson::from_slice(bytes).ok()? else {
        return None;
    };
    let mut bytes = |name: &str| match map.remove(name)? {
        Ipld::Bytes(b) => Some(b),
        _ => None,
    };
    let (context, metadata, signature) =
        (bytes("ContextID")?, bytes("Metadata")?, bytes("Signature")?);
    let previous = match map.remove("PreviousID") {
        None => None,
        Some(Ipld::Link(cid)) => Some(cid),
        Some(_) => return None,
    };
    let (Ipld::Link(entries), Ipld::Bool(is_rm), Ipld::String(provider), Ipld::List(list)) = (
        map.remove("Entries")?,
        map.remove("IsRm")?,
        map.remove("Provider")?,
        map.remove("Addresses")?,
    ) else {
        return None;
    };
    let text = |v| match v {
        Ipld::String(s) => Some(s),
        _ => None,
    };
    let addresses = list.into_iter().map(text).collect::<Option<_>>()?;
    let ad = Ad {
        previous,
        provider,
        addresses,
        entries,
        context,
        metadata,
        is_rm,
        extended: Vec::new(),
    };
    // The schema knows no other keys.
    map.is_empty().then_some((ad, signature))
}

/// Reads an advertisement whose signature holds, as go-libipni's `VerifySignature` does it.
fn verified(bytes: &[u8]) -> Option<Ad> {
    let (ad, signature) = decoded(bytes)?;
    let (signer, payload) = opened(&signature, PAYLOAD_TYPE)?;
    (payload == ad.signed_payload() && signer.to_base58() == ad.provider).then_some(ad)
}

fn verified_head(bytes: &[u8]) -> Option<(Cid, PeerId)> {
    let Ipld::Map(map) = serde_ipld_dagjson::from_slice(bytes).ok()? else {
        return None;
    };
    let (Ipld::Link(cid), Ipld::Bytes(key), Ipld::Bytes(sig)) =
        (map.get("head")?, map.get("pubkey")?, map.get("sig")?)
    else {
        return None;
    };
    let key = PublicKey::try_decode_protobuf(key).ok()?;
    key.verify(&cid.to_bytes(), sig)
        .then(|| (*cid, key.to_peer_id()))
}

fn ads() -> impl Strategy<Value = Ad> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..64);
    let addresses = prop::collection::vec("/[a-z0-9/]{0,30}", 0..3);
    let links = (any::<Option<u8>>(), any::<u8>());
    (links, addresses, bytes(), bytes(), any::<bool>()).prop_map(
        |((previous, entries), addresses, context, metadata, is_rm)| Ad {
            previous: previous.map(cid),
            provider: id(&key(1)),
            addresses,
            entries: cid(entries),
            context,
            metadata,
            is_rm,
            extended: Vec::new(),
        },
    )
}

/// At a place, so many bytes are replaced by others.
fn splices() -> impl Strategy<Value = (Index, usize, Vec<u8>)> {
    let new = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..4),
        // What JSON and its numbers are made of.
        "[0-9a-zA-Z\"{}:,\\[\\]/]{0,3}".prop_map(String::into_bytes),
    ];
    (any::<Index>(), 0usize..5, new)
}

fn spliced(bytes: &[u8], (at, lost, new): &(Index, usize, Vec<u8>)) -> Vec<u8> {
    let at = at.index(bytes.len());
    let end = (at + lost).min(bytes.len());
    [&bytes[..at], new, &bytes[end..]].concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]
    #[test]
    fn an_advertisement_is_read_as_it_was_written(ad in ads()) {
        let signed = ad.sign(&key(1)).unwrap();
        prop_assert_eq!(signed.cid.hash(), &Code::Sha2_256.digest(&signed.bytes));
        let read = verified(&signed.bytes).unwrap();
        prop_assert_eq!(format!("{read:?}"), format!("{ad:?}"));
        // Nobody speaks for another.
        let forged = ad.sign(&key(2)).unwrap();
        prop_assert!(verified(&forged.bytes).is_none());
    }

    /// The chain names advertisements by CID, and what its signature covers cannot change. That is
    /// all but the context, which the CID alone protects.
    #[test]
    fn an_advertisement_that_was_changed_is_not_this_one(ad in ads(), splice in splices()) {
        let signed = ad.sign(&key(1)).unwrap();
        let bytes = spliced(&signed.bytes, &splice);
        prop_assert_eq!(
            bytes == signed.bytes,
            Code::Sha2_256.digest(&bytes) == *signed.cid.hash()
        );
        if let Some(read) = verified(&bytes) {
            let same = Ad { context: ad.context.clone(), ..read };
            prop_assert_eq!(same.signed_payload(), ad.signed_payload());
            prop_assert_eq!(same.addresses.concat(), ad.addresses.concat());
            prop_assert_eq!((same.previous, same.entries), (ad.previous, ad.entries));
        }
    }

    #[test]
    fn a_head_that_was_changed_is_nobodys(n in any::<u8>(), splice in splices()) {
        let signed = head(&cid(n), &key(1)).unwrap();
        let own = (cid(n), key(1).public().to_peer_id());
        prop_assert_eq!(verified_head(&signed), Some(own));
        let other = verified_head(&spliced(&signed, &splice));
        prop_assert!(other.is_none_or(|o| o == own), "{other:?}");
    }

    #[test]
    fn an_envelope_that_was_changed_is_nobodys(
        payload in prop::collection::vec(any::<u8>(), 0..80), splice in splices(),
    ) {
        let sealed = seal(&key(1), PAYLOAD_TYPE, payload.clone()).unwrap();
        let own = (key(1).public().to_peer_id(), payload);
        prop_assert_eq!(opened(&sealed, PAYLOAD_TYPE), Some(own.clone()));
        prop_assert_eq!(opened(&sealed, EXTENDED_TYPE), None);
        let other = opened(&spliced(&sealed, &splice), PAYLOAD_TYPE);
        prop_assert!(other.is_none() || other == Some(own), "{other:?}");
    }

    #[test]
    fn a_chunk_is_read_as_it_was_written(
        digests in prop::collection::vec(any::<[u8; 32]>(), 0..40), next in any::<Option<u8>>(), splice in splices(),
    ) {
        let hashes: Vec<_> = digests.iter().map(|d| Multihash::wrap(0x12, d).unwrap()).collect();
        let made = chunk(&hashes, next.map(cid)).unwrap();
        prop_assert_eq!(made.cid.hash(), &Code::Sha2_256.digest(&made.bytes));
        let Ok(Ipld::Map(map)) = serde_ipld_dagcbor::from_slice(&made.bytes) else {
            return Err(TestCaseError::fail("no map"));
        };
        let list = hashes.iter().map(|h| Ipld::Bytes(h.to_bytes())).collect();
        prop_assert_eq!(map.get("Entries"), Some(&Ipld::List(list)));
        let next = next.map(|n| Ipld::Link(cid(n)));
        prop_assert_eq!(map.get("Next"), next.as_ref());
        // No two chunks have one CID, so that there is one form for each.
        let bytes = spliced(&made.bytes, &splice);
        if let Ok(other) = serde_ipld_dagcbor::from_slice::<Ipld>(&bytes) {
            prop_assert_eq!(other == Ipld::Map(map), bytes == made.bytes);
        }
    }
}
