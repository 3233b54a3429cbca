//! Calls of the hub API against JSON-RPC in the manner of Lotus: the same journal, the same client
//! process, TLS on both sides.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use comfy_table::Table;
use hub_proto::HubClient;
use hub_proto::v1::{self, ListPiecesRequest, PieceStatusRequest};
use lotus_e2e::{Failed, secs};
use serde::Serialize;
use tokio::task::JoinSet;

use super::json_rpc::{self, Piece};
use super::pieces;
use super::rig::{JsonRpc, Rig, idle};
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
    /// Small answers, `Pieces.Status`: calls for a second of the server's processor time, by those
    /// of JSON-RPC.
    unary_vs_jsonrpc: f64,
    unary_target_met: bool,
    /// The same with the client's time.
    unary_vs_jsonrpc_both_ends: f64,
    /// Large answers, `Pieces.List` of 100.
    list_vs_jsonrpc: f64,
    list_vs_jsonrpc_both_ends: f64,
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
        for (ask, what, over) in [
            ("unary", "Pieces.Status", self.unary_vs_jsonrpc),
            ("list", "Pieces.List of 100", self.list_vs_jsonrpc),
        ] {
            let by = match ask {
                "unary" => target(TARGET, self.unary_target_met),
                _ => String::new(),
            };
            table.add_row([
                format!("{what}, calls a second of the server"),
                format!("{over:.2} times JSON-RPC"),
                format!(
                    "{:.0} µs and {:.0} µs of processor time each{by}",
                    figure(&format!("{ask}_hub_server_us_per_call")),
                    figure(&format!("{ask}_jsonrpc_server_us_per_call")),
                ),
            ]);
            for side in ["hub", "jsonrpc"] {
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
    let hub = (0..AT_ONCE).map(|_| Client::Hub(spoke.clone())).collect();
    let json = peer.connections(AT_ONCE).await?;
    let json = json.into_iter().map(Client::Peer).collect();
    let mut sides = [
        Side::new("hub", rig.pid, hub).await?,
        Side::new("jsonrpc", peer.pid, json).await?,
    ];
    same(&spoke, &mut peer.connect().await?).await?;
    let mut report = Report::default();
    for (name, ask) in [("unary", Ask::Status), ("list", Ask::List)] {
        eprintln!("calls: {name}");
        let (mut one, mut many) = (Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let mut turns = Vec::new();
            for at_once in [1, AT_ONCE] {
                for side in &mut sides {
                    turns.push(side.turn(ask, at_once).await?);
                }
            }
            report.calls_failed += turns.iter().map(|t| t.calls.failed).sum::<u64>();
            if round > 0 {
                many.push(turns.split_off(2));
                one.push(turns);
            }
        }
        let [server, both] = report.add(name, &sides, &one, &many)?;
        match ask {
            Ask::Status => {
                report.unary_vs_jsonrpc = server;
                report.unary_target_met = server >= TARGET;
                report.unary_vs_jsonrpc_both_ends = both;
            }
            Ask::List => {
                report.list_vs_jsonrpc = server;
                report.list_vs_jsonrpc_both_ends = both;
            }
        }
    }
    rig.stop().await?;
    Ok(report)
}

impl Report {
    /// Adds the figures of both sides. Returns what one call of the peer costs, by one of the hub:
    /// the servers, and both ends.
    fn add(
        &mut self,
        name: &str,
        sides: &[Side; 2],
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
