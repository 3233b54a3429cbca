use hub_proto::v1::sectors_server::Sectors;
use hub_proto::v1::{GetSectorRequest, ListSectorsRequest, ListSectorsResponse, SectorInfo};
use tonic::{Request, Response};

use super::pieces::page;
use super::{Answer, Api, from_journal, not_found};

#[tonic::async_trait]
impl Sectors for Api {
    async fn list(&self, request: Request<ListSectorsRequest>) -> Answer<ListSectorsResponse> {
        let request = request.into_inner();
        let sectors = self
            .sectors
            .list(request.after, page(request.limit))
            .map_err(|e| from_journal(&e))?;
        Ok(Response::new(ListSectorsResponse { sectors }))
    }

    async fn get(&self, request: Request<GetSectorRequest>) -> Answer<SectorInfo> {
        let GetSectorRequest { number, log } = request.into_inner();
        let found = self
            .sectors
            .get(number, log)
            .map_err(|e| from_journal(&e))?;
        found.map(Response::new).ok_or_else(|| {
            not_found(
                format!("there is no sector {number}"),
                "see `lotus-miner sectors list`",
            )
        })
    }
}
