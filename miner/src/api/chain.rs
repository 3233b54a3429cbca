use hub_proto::status;
use hub_proto::v1::chain_server::Chain;
use hub_proto::v1::{
    AllocationRequest, AllocationResponse, HeadChanged, HeadRequest, MarketClientRequest,
    MarketClientResponse, PublishRequest, PublishState, SignAskRequest, SignAskResponse,
};
use lotus_node_client::NodeError;
use lotus_node_client::api::TipSetKey;
use lotus_node_client::json::parse_address;
use lotus_types::{Address, Kind};
use tonic::{Request, Response, Status};

use super::{Answer, Api, from_node, invalid, not_found};

#[tonic::async_trait]
impl Chain for Api {
    async fn head(&self, _: Request<HeadRequest>) -> Answer<HeadChanged> {
        self.events.head().map(Response::new).ok_or_else(|| {
            status(
                Kind::Transport,
                "the hub has not reached its full node yet",
                "see /readyz of the hub",
                None,
            )
        })
    }

    async fn allocation(&self, request: Request<AllocationRequest>) -> Answer<AllocationResponse> {
        let request = request.into_inner();
        let client = address(&request.client)?;
        let found = self
            .node
            .state_get_allocation(client, request.id, &TipSetKey::default())
            .await
            .map_err(|e| from_node_or_unknown(&e, &request.client))?;
        let a = found.ok_or_else(|| {
            not_found(
                format!("{} has no allocation {}", request.client, request.id),
                "check the client and the allocation id",
            )
        })?;
        Ok(Response::new(AllocationResponse {
            client: a.client,
            provider: a.provider,
            piece_cid: a.data.to_string(),
            piece_size: a.size,
            term_min: a.term_min.0,
            term_max: a.term_max.0,
            expiration: a.expiration.0,
        }))
    }

    async fn market_client(
        &self,
        request: Request<MarketClientRequest>,
    ) -> Answer<MarketClientResponse> {
        self.market_client_of(request).await
    }

    async fn publish(&self, request: Request<PublishRequest>) -> Answer<PublishState> {
        self.publish_deals(request).await
    }

    async fn sign_ask(&self, request: Request<SignAskRequest>) -> Answer<SignAskResponse> {
        self.sign_storage_ask(request).await
    }
}

pub(super) fn from_node_or_unknown(e: &NodeError, address: &str) -> Status {
    if e.is_unknown_actor() {
        return not_found(
            format!("the chain does not know {address}"),
            "check the address; an account exists once it has received funds",
        );
    }
    from_node(e)
}

pub(super) fn address(text: &str) -> Result<Address, Status> {
    parse_address(text).map_err(|_| {
        let short: String = text.chars().take(100).collect();
        invalid(
            format!("{short:?} is no address"),
            "send an address such as t01000 or t1…",
        )
    })
}
