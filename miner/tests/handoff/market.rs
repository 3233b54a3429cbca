//! What a spoke can have published, and what it cannot.

use std::sync::Arc;

use hub_proto::HubError;
use hub_proto::v1::{MarketClientRequest, PublishRequest, SignAskRequest};
use lotus_actors::market::{ClientDealProposal, DealProposal, Label};
use lotus_actors::{PaddedPieceSize, encode};
use lotus_types::{Address, Commitment, Kind, PieceCid, TokenAmount};

use super::harness::{CLIENT, Hub, Sectors, fast};

pub(crate) fn deal(provider: u64) -> Vec<u8> {
    let client = lotus_node_client::json::parse_address(CLIENT).unwrap();
    encode(&ClientDealProposal {
        proposal: DealProposal {
            piece_cid: PieceCid::new(Commitment([1; 32])).cid(),
            piece_size: PaddedPieceSize(2048),
            verified_deal: false,
            client,
            provider: Address::new_id(provider),
            label: Label::String(String::new()),
            start_epoch: 1,
            end_epoch: 2,
            storage_price_per_epoch: TokenAmount::default(),
            provider_collateral: TokenAmount::default(),
            client_collateral: TokenAmount::default(),
        },
        client_signature: lotus_node_client::api::Signature::new_bls(vec![0; 96]),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spoke_has_nothing_sent_but_this_providers_deals() {
    let dir = tempfile::tempdir().unwrap();
    let hub = Hub::start(dir.path(), &Arc::new(Sectors::default()), fast()).await;
    let refused = async |deals: Vec<Vec<u8>>| {
        let request = PublishRequest {
            deals,
            attempt: 0,
            wait_ms: 0,
        };
        let answer = hub
            .client
            .chain()
            .publish(hub.client.request(request))
            .await;
        HubError::from(answer.unwrap_err())
    };
    for (deals, words) in [
        (vec![], "0 deals are to be published"),
        (vec![deal(1000); 257], "257 deals are to be published"),
        (vec![vec![0xff; 40]], "not the CBOR of"),
        (vec![deal(1000), deal(1001)], "a deal is with"),
    ] {
        let e = refused(deals).await;
        assert_eq!(e.kind(), Kind::Data, "{e}");
        assert!(e.to_string().contains(words), "{e}");
    }
    let ask = SignAskRequest {
        price: "-1".into(),
        verified_price: "0".into(),
        ..SignAskRequest::default()
    };
    let e = hub.client.chain().sign_ask(hub.client.request(ask)).await;
    assert_eq!(HubError::from(e.unwrap_err()).kind(), Kind::Data);
    let nobody = MarketClientRequest {
        client: CLIENT.into(),
        piece_size: 100,
    };
    let e = hub
        .client
        .chain()
        .market_client(hub.client.request(nobody))
        .await;
    assert_eq!(HubError::from(e.unwrap_err()).kind(), Kind::Data);
}
