//! Other providers of the same content.

use super::*;

/// As go-libipni's `VerifySignature` does it. Returns the providers' ids and addresses.
fn checked(ad: &BTreeMap<String, Ipld>) -> Vec<(String, String)> {
    check_signature(ad);
    let text = |v: &Ipld| match v {
        Ipld::String(s) => s.clone(),
        other => panic!("no text: {other:?}"),
    };
    let Ipld::Map(extended) = &ad["ExtendedProvider"] else {
        panic!("no extended provider")
    };
    assert_eq!(extended["Override"], Ipld::Bool(false));
    let Ipld::List(providers) = &extended["Providers"] else {
        panic!("no providers")
    };
    let mut out = Vec::new();
    for provider in providers {
        let Ipld::Map(p) = provider else {
            panic!("no provider: {provider:?}")
        };
        let Ipld::List(addresses) = &p["Addresses"] else {
            panic!("no addresses")
        };
        let (id, address) = (text(&p["ID"]), text(&addresses[0]));
        let mut payload = ad
            .get("PreviousID")
            .map(|c| link(c).to_bytes())
            .unwrap_or_default();
        payload.extend(link(&ad["Entries"]).to_bytes());
        payload.extend(text(&ad["Provider"]).as_bytes());
        payload.extend(bytes(&ad["ContextID"]));
        payload.extend(id.as_bytes());
        payload.extend(address.as_bytes());
        payload.extend(bytes(&p["Metadata"]));
        payload.push(0);
        let kind = b"/indexer/ingest/extendedProviderSignature";
        let signed = Code::Sha2_256.digest(&payload).to_bytes();
        assert_eq!(opened(&p["Signature"], kind), (id.clone(), signed));
        out.push((id, address));
    }
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn other_providers_are_advertised_and_taken_back() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    hub.add(&car(2, 1).1, indexed());
    let with = |texts: &[&str]| IndexingConfig {
        extended_providers: texts.iter().map(|t| (*t).to_owned()).collect(),
        ..IndexingConfig::default()
    };
    let cfg = with(&[
        "cache=https://cache.example",
        "far=/dns4/far.example/tcp/80/http",
    ]);
    let spoke = Spoke::start(&hub, tmp.path(), cfg.clone()).await;
    spoke.indexed(1).await;
    let chain = spoke.chain().await;
    assert_eq!(chain.len(), 3);
    let (head, own) = (
        spoke.head().await,
        spoke.json("/").await["provider"].clone(),
    );
    let mut oldest = spoke.block(&head.unwrap()).await;
    while let Some(previous) = oldest.get("PreviousID").map(link) {
        oldest = spoke.block(&previous).await;
    }
    assert_eq!(bytes(&oldest["ContextID"]), b"");
    let providers = checked(&oldest);
    let addresses: Vec<_> = providers.iter().map(|(_, a)| a.as_str()).collect();
    let want = [
        "/ip4/127.0.0.1/tcp/7777/http",
        "/dns/cache.example/tcp/443/https",
        "/dns4/far.example/tcp/80/http",
    ];
    assert_eq!(addresses, want);
    assert_eq!(own, providers[0].0);
    let ids: BTreeSet<_> = providers.iter().map(|(id, _)| id).collect();
    assert_eq!(ids.len(), 3);
    spoke.end().await;

    // The same again says nothing new; none says that there are none.
    let spoke = Spoke::start(&hub, tmp.path(), cfg).await;
    assert_eq!(spoke.head().await, head);
    spoke.end().await;
    let spoke = Spoke::start(&hub, tmp.path(), IndexingConfig::default()).await;
    let ad = spoke.block(&spoke.head().await.unwrap()).await;
    assert_eq!(checked(&ad), providers[..1]);
    spoke.end().await;

    for wrong in [
        "https://x.example",
        "a b=https://x.example",
        "identity=https://x.example",
        "x=y",
    ] {
        let spoke = Indexing::new(
            with(&[wrong]),
            hub.config(),
            tmp.path().join("i"),
            tmp.path().join("run"),
        );
        let cx = Cx::new("indexing", Health::default(), CancellationToken::new());
        let fault = within("fault", spoke.run(cx)).await.unwrap_err();
        assert!(
            fault.message.contains("indexing.extended_providers"),
            "{fault}"
        );
    }
}
