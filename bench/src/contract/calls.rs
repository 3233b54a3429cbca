//! Calls of the hub API against JSON-RPC in the manner of Lotus, by the same client process and with TLS
//! everywhere: against the hub's own Lotus API, which a spoke would ask else, and against a peer that says
//! the same as the hub API from the same journal and does nothing more.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use comfy_table::Table;
use hub_proto::HubClient;
use hub_proto::v1::{self, ListPiecesRequest, PieceStatusRequest};
use lotus_e2e::{Failed, secs};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::json_rpc::{self, Piece};
use super::pieces;
use super::rig::{JsonRpc, Rig, SEALED, idle};
use super::{Calls, target};
use crate::markets::processor_time;
use crate::{median, ratio};

/// Pieces of a large answer.
const PIECES: u32 = 100;
/// Callers at once, when calls per second are counted: of the hub over one connection, of the peer
/// over one each, as HTTP/1.1 needs it.
const AT_ONCE: usize = 16;
/// Each side's turn, and how often, after one that does not count.
const TURN: Duration = secs(2);
const ROUNDS: usize = 5;
/// How long the idle hub is looked at.
const IDLE: Duration = secs(10);
/// Calls that a second of the server's processor time answers, by those of the peer's.
const TARGET: f64 = 1.5;

/// What was measured.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    /// How far a piece is, by `Pieces.Status`: calls for a second of the server's processor time, by
    /// those of `SectorsStatus` of the Lotus API of the same hub.
    unary_vs_jsonrpc: f64,
    unary_target_met: bool,
    /// The same with the client's time.
    unary_vs_jsonrpc_both_ends: f64,
    /// The same by those of the peer, whose answer is the same.
    status_vs_peer: f64,
    status_vs_peer_both_ends: f64,
    /// Large answers, `Pieces.List` of 100, against the peer.
    list_vs_peer: f64,
    list_vs_peer_both_ends: f64,
    /// Calls that failed.
    calls_failed: u64,
    /// Of each side: `p50_ms` and `p99_ms` of one caller, `calls_per_second` of 16,
    /// `server_us_per_call` and `client_us_per_call` of processor time then.
    #[serde(flatten)]
    figures: BTreeMap<String, f64>,
}

impl Report {
    pub(super) fn ok(&self) -> bool {
        self.calls_failed == 0
    }

    pub(super) fn rows(&self, table: &mut Table) {
        let figure = |name: &str| self.figures.get(name).copied().unwrap_or(f64::NAN);
        for (ask, what, peer, over) in [
            ("unary", "Pieces.Status", "lotus", self.unary_vs_jsonrpc),
            ("status", "Pieces.Status", "peer", self.status_vs_peer),
            ("list", "Pieces.List of 100", "peer", self.list_vs_peer),
        ] {
            let by = match ask {
                "unary" => target(TARGET, self.unary_target_met),
                _ => String::new(),
            };
            table.add_row([
                format!("{what}, calls a second of the server"),
                format!("{over:.2} times {peer}"),
                format!(
                    "{:.0} µs and {:.0} µs of processor time each{by}",
                    figure(&format!("{ask}_hub_server_us_per_call")),
                    figure(&format!("{ask}_{peer}_server_us_per_call")),
                ),
            ]);
            for side in ["hub", peer] {
                let of = |name: &str| figure(&format!("{ask}_{side}_{name}"));
                table.add_row([
                    format!("  {side}"),
                    format!("{:.0} calls a second", of("calls_per_second")),
                    format!("p50 {:.3} ms, p99 {:.3} ms", of("p50_ms"), of("p99_ms")),
                ]);
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Ask {
    Status,
    List,
}

/// One who calls.
enum Client {
    Hub(HubClient),
    Peer(JsonRpc),
    /// With the number of a sector.
    Lotus(JsonRpc, u64),
}

/// A side's turn.
#[derive(Default)]
struct Turn {
    calls: Calls,
    /// Seconds, and those of the processor: the server's and the client's.
    time: f64,
    server: f64,
    client: f64,
}

pub(super) async fn run() -> Result<Report, Failed> {
    let rig = Rig::start(PIECES.into(), 0).await?;
    let spoke = rig.seller().await?;
    let peer = rig.peer().await?;
    eprintln!("calls: a sector is sealed");
    let sector = rig.sector().await?;
    let hub = (0..AT_ONCE).map(|_| Client::Hub(spoke.clone())).collect();
    let json = peer.connections(AT_ONCE).await?;
    let json = json.into_iter().map(Client::Peer).collect();
    let mut hub = Side::new("hub", rig.pid, hub).await?;
    let mut json = Side::new("peer", peer.pid, json).await?;
    let clients = rig.lotus(AT_ONCE).await?.into_iter();
    let mut lotus = Side {
        name: "lotus",
        clients: clients.map(|c| Client::Lotus(c, sector)).collect(),
        pid: hub.pid,
        idle: hub.idle,
    };
    same(&spoke, &mut peer.connect().await?).await?;
    let mut report = Report::default();
    // Its connections are closed when nothing comes for a while: first.
    let unary = report.compare("unary", Ask::Status, [&mut hub, &mut lotus]);
    [report.unary_vs_jsonrpc, report.unary_vs_jsonrpc_both_ends] = unary.await?;
    report.unary_target_met = report.unary_vs_jsonrpc >= TARGET;
    let status = report.compare("status", Ask::Status, [&mut hub, &mut json]);
    [report.status_vs_peer, report.status_vs_peer_both_ends] = status.await?;
    let list = report.compare("list", Ask::List, [&mut hub, &mut json]);
    [report.list_vs_peer, report.list_vs_peer_both_ends] = list.await?;
    rig.stop().await?;
    Ok(report)
}

impl Report {
    /// Lets both sides call in turns, and adds their figures. Returns what one call of the second
    /// costs, by one of the first: the servers, and both ends.
    async fn compare(
        &mut self,
        name: &str,
        ask: Ask,
        mut sides: [&mut Side; 2],
    ) -> Result<[f64; 2], Failed> {
        eprintln!("calls: {name}");
        let (mut one, mut many) = (Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let mut turns = Vec::new();
            for at_once in [1, AT_ONCE] {
                for side in &mut sides {
                    turns.push(side.turn(ask, at_once).await?);
                }
            }
            self.calls_failed += turns.iter().map(|t| t.calls.failed).sum::<u64>();
            if round > 0 {
                many.push(turns.split_off(2));
                one.push(turns);
            }
        }
        self.add(name, &sides, &one, &many)
    }

    fn add(
        &mut self,
        name: &str,
        sides: &[&mut Side; 2],
        one: &[Vec<Turn>],
        many: &[Vec<Turn>],
    ) -> Result<[f64; 2], Failed> {
        for (n, side) in sides.iter().enumerate() {
            let mut alone = Calls::default();
            for turns in one {
                alone.took.extend(&turns[n].calls.took);
            }
            let of = |what: fn(&Turn) -> f64| {
                let all: Vec<f64> = many.iter().map(|turns| what(&turns[n])).collect();
                median(&all)
            };
            for (figure, value) in [
                ("p50_ms", alone.ms(0.5)),
                ("p99_ms", alone.ms(0.99)),
                ("calls_per_second", of(|t| t.count() / t.time)),
                ("server_us_per_call", of(|t| t.server / t.count() * 1e6)),
                ("client_us_per_call", of(|t| t.client / t.count() * 1e6)),
            ] {
                let key = format!("{name}_{}_{figure}", side.name);
                self.figures.insert(key, value);
            }
        }
        let by = |cost: fn(&Turn) -> f64| {
            let all = many.iter().map(|turns| {
                let [hub, peer] = [&turns[0], &turns[1]];
                ratio(name, cost(peer) / peer.count(), cost(hub) / hub.count())
            });
            all.collect::<Result<Vec<_>, _>>().map(|all| median(&all))
        };
        Ok([by(|t| t.server)?, by(|t| t.server + t.client)?])
    }
}

impl Turn {
    fn count(&self) -> f64 {
        f64::from(u32::try_from(self.calls.took.len()).unwrap_or(u32::MAX))
    }
}

struct Side {
    name: &'static str,
    pid: u32,
    /// Processor time that it takes for nothing, in each second.
    idle: f64,
    clients: Vec<Client>,
}

impl Side {
    async fn new(name: &'static str, pid: u32, clients: Vec<Client>) -> Result<Self, Failed> {
        let idle = idle(pid, IDLE).await?;
        eprintln!(
            "calls: {name} takes {:.1} ms of each idle second",
            idle * 1e3
        );
        Ok(Self {
            name,
            pid,
            idle,
            clients,
        })
    }

    /// So many callers, each of which calls again as soon as it is answered.
    async fn turn(&mut self, ask: Ask, at_once: usize) -> Result<Turn, Failed> {
        let (own, server) = (std::process::id(), self.pid);
        let rest = self.clients.split_off(at_once);
        let before = (processor_time(server)?, processor_time(own)?);
        let began = Instant::now();
        let mut callers = JoinSet::new();
        for mut client in self.clients.drain(..) {
            callers.spawn(async move {
                let mut calls = Calls::default();
                while began.elapsed() < TURN {
                    let called = Instant::now();
                    match client.call(ask).await {
                        Ok(()) => calls.took.push(called.elapsed()),
                        Err(e) => {
                            eprintln!("a call failed: {e}");
                            calls.failed += 1;
                            break;
                        }
                    }
                }
                (client, calls)
            });
        }
        let mut turn = Turn::default();
        while let Some(done) = callers.join_next().await {
            let (client, calls) = done.map_err(|e| Failed::at("caller", e))?;
            self.clients.push(client);
            turn.calls.add(calls);
        }
        turn.time = began.elapsed().as_secs_f64();
        let used = |pid, before: Duration| {
            processor_time(pid).map(|now| now.saturating_sub(before).as_secs_f64())
        };
        turn.server = used(server, before.0)? - self.idle * turn.time;
        turn.client = used(own, before.1)?;
        self.clients.extend(rest);
        Ok(turn)
    }
}

impl Client {
    async fn call(&mut self, ask: Ask) -> Result<(), Failed> {
        let count = match (self, ask) {
            (Self::Hub(hub), Ask::Status) => usize::from(status(hub).await?.key.is_some()),
            (Self::Hub(hub), Ask::List) => list(hub).await?.len(),
            (Self::Peer(peer), Ask::Status) => {
                usize::from(!json_status(peer).await?.client.is_empty())
            }
            (Self::Peer(peer), Ask::List) => json_list(peer).await?.len(),
            (Self::Lotus(lotus, sector), _) => {
                let sector: Sector = lotus.call(SECTORS_STATUS, (*sector, false)).await?;
                usize::from(sector.state == SEALED)
            }
        };
        let wanted = match ask {
            Ask::Status => 1,
            Ask::List => PIECES as usize,
        };
        if count == wanted {
            return Ok(());
        }
        Err(Failed(format!("{count} pieces and not {wanted}")))
    }
}

const SECTORS_STATUS: &str = "Filecoin.SectorsStatus";

/// As much of its answer as a spoke would want.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Sector {
    state: String,
}

/// The piece that is asked for.
const NUMBER: u64 = 7;

async fn status(hub: &HubClient) -> Result<v1::PieceState, Failed> {
    let key = Some((&pieces::deal(NUMBER)).into());
    let request = hub.request(PieceStatusRequest { key });
    let answer = hub.pieces().status(request).await;
    Ok(answer.map_err(|e| Failed::at("status", e))?.into_inner())
}

async fn list(hub: &HubClient) -> Result<Vec<v1::PieceState>, Failed> {
    let request = hub.request(ListPiecesRequest {
        after: String::new(),
        limit: PIECES,
    });
    let answer = hub.pieces().list(request).await;
    Ok(answer
        .map_err(|e| Failed::at("list", e))?
        .into_inner()
        .pieces)
}

async fn json_status(peer: &mut JsonRpc) -> Result<Piece, Failed> {
    let key = pieces::deal(NUMBER);
    let params = (key.client, key.id.to_string());
    peer.call(json_rpc::STATUS, params).await
}

async fn json_list(peer: &mut JsonRpc) -> Result<Vec<Piece>, Failed> {
    peer.call(json_rpc::LIST, ("", PIECES)).await
}

/// Both must say the same.
async fn same(hub: &HubClient, peer: &mut JsonRpc) -> Result<(), Failed> {
    let ours = Piece::from(status(hub).await?);
    let all: Vec<Piece> = list(hub).await?.into_iter().map(Piece::from).collect();
    if ours == json_status(peer).await? && all == json_list(peer).await? {
        return Ok(());
    }
    Err(Failed::new("the hub and the peer tell different pieces"))
}
