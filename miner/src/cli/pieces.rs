use clap::Subcommand;
use hub_proto::HubClient;
use hub_proto::v1::{ListPiecesRequest, LocateRequest, LocateResponse, PieceState};
use lotus_runtime::Fault;
use serde::Serialize;

use super::{Cx, bytes, from_status, print, print_json, table};
use crate::api::MAX_PAGE;

#[derive(Debug, Subcommand)]
pub(super) enum PiecesCommand {
    /// List all pieces that spokes offered
    List,
    /// Show whether a piece can be read, and in which sector it is
    Locate {
        /// Piece CID: baga6ea4sea… or bafkzcib…
        piece_cid: String,
    },
    /// Make the raw file of a piece anew from its sealed sector
    Unseal {
        /// Piece CID: baga6ea4sea… or bafkzcib…
        piece_cid: String,
    },
}

/// A hand-off as `--json` prints it.
#[derive(Serialize)]
struct Piece {
    deal: String,
    phase: String,
    piece_cid: String,
    piece_size: u64,
    raw_size: u64,
    pulled_bytes: u64,
    sector: Option<u64>,
    offset: Option<u64>,
    sector_state: String,
    reason: String,
    /// The spoke whose deal it is; empty for one that the operator handed over.
    owner: String,
}

/// Where a piece is, as `--json` prints it.
#[derive(Serialize)]
struct Place {
    piece_cid: String,
    known: bool,
    readable: bool,
    unsealing: bool,
    piece_size: u64,
    raw_size: u64,
    sector: u64,
}

pub(super) async fn pieces(cx: &Cx, command: PiecesCommand) -> Result<(), Fault> {
    let hub = cx.hub().await?;
    match command {
        PiecesCommand::List => list(cx, &hub).await,
        PiecesCommand::Locate { piece_cid } => {
            let request = hub.request(LocateRequest {
                piece_cid: piece_cid.clone(),
            });
            let found = hub.unsealed().locate(request).await;
            show(cx, piece_cid, &found.map_err(from_status)?.into_inner())
        }
        PiecesCommand::Unseal { piece_cid } => {
            let request = hub.request(LocateRequest {
                piece_cid: piece_cid.clone(),
            });
            let found = hub.unsealed().request_unseal(request).await;
            show(cx, piece_cid, &found.map_err(from_status)?.into_inner())
        }
    }
}

async fn list(cx: &Cx, hub: &HubClient) -> Result<(), Fault> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut after = String::new();
    loop {
        let request = hub.request(ListPiecesRequest {
            after,
            limit: MAX_PAGE,
        });
        let page = hub.pieces().list(request).await;
        let page = page.map_err(from_status)?.into_inner();
        pieces.extend(page.pieces.into_iter().map(Piece::from));
        if page.next.is_empty() {
            break;
        }
        after = page.next;
    }
    if cx.json {
        return print_json(&pieces);
    }
    let mut out = table(&["Deal", "Of", "Phase", "Piece", "Size", "Sector", "Note"]);
    for p in pieces {
        let sector = p
            .sector
            .map_or_else(String::new, |n| format!("{n} {}", p.sector_state));
        out.add_row([
            p.deal.rsplit('/').next().unwrap_or_default().to_owned(),
            p.owner,
            p.phase,
            p.piece_cid,
            bytes(p.piece_size),
            sector,
            p.reason,
        ]);
    }
    print(&out.to_string())
}

impl From<PieceState> for Piece {
    fn from(p: PieceState) -> Self {
        let phase = p.phase().as_str_name().trim_start_matches("PIECE_PHASE_");
        Self {
            phase: phase.to_lowercase(),
            deal: p
                .key
                .map(|k| format!("{}/{}", k.client, k.id))
                .unwrap_or_default(),
            piece_cid: p.piece_cid,
            piece_size: p.piece_size,
            raw_size: p.raw_size,
            pulled_bytes: p.pulled_bytes,
            sector: p.sector,
            offset: p.offset,
            sector_state: p.sector_state,
            reason: p.reason,
            owner: p.owner,
        }
    }
}

fn show(cx: &Cx, piece_cid: String, found: &LocateResponse) -> Result<(), Fault> {
    if cx.json {
        return print_json(&Place {
            piece_cid,
            known: found.known,
            readable: found.readable,
            unsealing: found.unsealing,
            piece_size: found.piece_size,
            raw_size: found.raw_size,
            sector: found.sector,
        });
    }
    print(&match (found.known, found.readable, found.unsealing) {
        (false, ..) => "this hub never had it".into(),
        (_, true, _) => format!(
            "{} can be read, sector {}",
            bytes(found.raw_size),
            found.sector
        ),
        (_, _, true) => format!("is being unsealed from sector {}", found.sector),
        _ => "has no raw file now; `lotus-miner pieces unseal` makes one from its sector".into(),
    })
}
