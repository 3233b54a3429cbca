//! The commands that look, from another host: MINER_API_INFO names the hub, and Lotus' JSON-RPC
//! answers.

use std::collections::BTreeMap;
use std::time::Duration;

use lotus_node_client::Endpoint;
use lotus_runtime::{Fault, http_client};
use lotus_types::Kind;
use serde_json::{Value, json};

use super::sectors::SectorsCommand;
use super::storage::StorageCommand;
use super::{Command, Cx, bytes, print, print_json, table};

/// Variable that Lotus' tools read the miner's endpoint from.
const API_INFO: &str = "MINER_API_INFO";
/// Source: lotus node/rpc.go, `MinerHandler`.
const PATH: &str = "/rpc/v0";
/// How long a call may take.
const CALL: Duration = Duration::from_secs(60);
/// Largest answer, bytes.
const MAX_ANSWER: usize = 256 << 20;

/// What a command can do without being on the hub's host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// It needs no hub, or is about this host.
    Here,
    /// It looks at what Lotus' API tells.
    Looks,
    /// It needs the hub's own sockets.
    Hub,
}

fn reach(command: &Command) -> Reach {
    match command {
        Command::Init(_)
        | Command::Run(_)
        | Command::Worker(_)
        | Command::Config(_)
        | Command::Auth(_)
        | Command::Params(_)
        | Command::Workers(_)
        | Command::JoinBundle(_)
        | Command::Credentials(_)
        | Command::Api(_)
        | Command::Audit(_)
        | Command::Restore(_)
        | Command::Doctor
        | Command::StorageDeals(_)
        | Command::RetrievalDeals(_) => Reach::Here,
        Command::Info { more: None }
        | Command::Sectors(SectorsCommand::List | SectorsCommand::Status { .. })
        | Command::Storage(StorageCommand::List) => Reach::Looks,
        Command::Info { .. }
        | Command::Sectors(_)
        | Command::Storage(_)
        | Command::Sealing(_)
        | Command::Pieces(_)
        | Command::Proving(_)
        | Command::Mining(_)
        | Command::Actor(_)
        | Command::Messages(_)
        | Command::Backup(_) => Reach::Hub,
    }
}

/// Whether MINER_API_INFO is about the hub of a repo, whose file `api` has its address.
fn is_here(info: &str, api: &str) -> bool {
    let address = info.split_once(':').map_or(info, |(_, address)| address);
    !api.trim().is_empty() && [info, address].iter().any(|a| a.trim() == api.trim())
}

/// Runs a command that MINER_API_INFO sends to another hub. `None`: it is none of those.
pub(super) fn run(cx: &Cx, command: &Command) -> Option<Result<(), Fault>> {
    let info = std::env::var(API_INFO).ok().filter(|i| !i.is_empty())?;
    let reach = reach(command);
    if reach == Reach::Here {
        return None;
    }
    let api = cx.repo().map(|r| r.root().join("api"));
    let api = api.ok().and_then(|file| std::fs::read_to_string(file).ok());
    if is_here(&info, &api.unwrap_or_default()) {
        return None;
    }
    Some(Hub::new(&info).and_then(|hub| match reach {
        Reach::Looks => look(cx, command, &hub),
        Reach::Here | Reach::Hub => Err(Fault::new(
            Kind::Config,
            format!(
                "this command works only on the host of its hub; {API_INFO} names {}",
                hub.url
            ),
            format!(
                "run it there, or unset {API_INFO} to ask the hub of this host. From here work \
                 `info`, `sectors list`, `sectors status` and `storage list`"
            ),
        )),
    }))
}

fn look(cx: &Cx, command: &Command, hub: &Hub) -> Result<(), Fault> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match command {
            Command::Info { .. } => info(cx, hub).await,
            Command::Sectors(SectorsCommand::Status {
                number,
                log,
                on_chain_info,
            }) => status(cx, hub, *number, *log, *on_chain_info).await,
            Command::Sectors(_) => list(cx, hub).await,
            _ => paths(cx, hub).await,
        }
    })
}

/// A hub on another host.
struct Hub {
    url: String,
    token: Option<String>,
    http: reqwest::Client,
}

impl Hub {
    fn new(info: &str) -> Result<Self, Fault> {
        let endpoint = Endpoint::parse(info).map_err(|e| {
            Fault::new(
                Kind::Config,
                format!("{API_INFO}: {e}"),
                "set it to what `lotus-miner auth api-info` prints on the hub's host",
            )
        })?;
        let mut url = endpoint.http().clone();
        url.set_path(PATH);
        let http = http_client().timeout(CALL).build();
        Ok(Self {
            url: url.into(),
            token: endpoint.token().map(str::to_owned),
            http: http.map_err(|e| Fault::new(Kind::Fatal, e.to_string(), "report this"))?,
        })
    }

    async fn call(&self, method: &str, params: Value) -> Result<Value, Fault> {
        let lost = |e: &dyn std::fmt::Display| {
            Fault::new(
                Kind::Transport,
                format!("the hub at {}: {e}", self.url),
                format!(
                    "see whether it runs and lotus_api.listen can be reached, or correct {API_INFO}"
                ),
            )
        };
        let name = format!("Filecoin.{method}");
        let body = json!({"jsonrpc": "2.0", "id": 1, "method": name, "params": params});
        let mut request = self.http.post(&self.url).body(body.to_string());
        request = request.header("content-type", "application/json");
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        let mut answer = request.send().await.map_err(|e| lost(&e))?;
        if !answer.status().is_success() {
            return Err(lost(&answer.status()));
        }
        let mut text = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(|e| lost(&e))? {
            if text.len() + chunk.len() > MAX_ANSWER {
                return Err(lost(&"its answer is too large"));
            }
            text.extend_from_slice(&chunk);
        }
        let mut answer: Value = serde_json::from_slice(&text).map_err(|e| lost(&e))?;
        match answer["error"]["message"].as_str() {
            None => Ok(answer["result"].take()),
            Some(why) => Err(Fault::new(
                Kind::Data,
                format!("{method}: {why}"),
                if why.contains("missing permission") {
                    "make another token on the hub's host: `lotus-miner auth api-info --perm admin`"
                } else {
                    "see the hub's log"
                },
            )),
        }
    }

    /// The state of every sector.
    async fn states(&self) -> Result<BTreeMap<u64, String>, Fault> {
        let mut all = BTreeMap::new();
        let sums = self.call("SectorsSummary", json!([])).await?;
        for state in sums.as_object().into_iter().flat_map(|s| s.keys()) {
            let found = self.call("SectorsListInStates", json!([[state]])).await?;
            let numbers = found
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_u64);
            all.extend(numbers.map(|n| (n, state.clone())));
        }
        Ok(all)
    }
}

async fn info(cx: &Cx, hub: &Hub) -> Result<(), Fault> {
    let miner = hub.call("ActorAddress", json!([])).await?;
    let size = hub.call("ActorSectorSize", json!([miner])).await?;
    let version = hub.call("Version", json!([])).await?;
    let sectors = hub.call("SectorsSummary", json!([])).await?;
    if cx.json {
        return print_json(&json!({
            "hub": hub.url, "miner": miner, "sector_size": size, "version": version["Version"],
            "sectors": sectors,
        }));
    }
    let mut out = table(&["Miner", &text(&miner)]);
    out.add_row(["Hub", &hub.url]);
    out.add_row(["Version", &text(&version["Version"])]);
    out.add_row(["Sector size", &bytes(size.as_u64().unwrap_or_default())]);
    for (state, n) in sectors.as_object().into_iter().flatten() {
        out.add_row([format!("Sectors in {state}"), n.to_string()]);
    }
    out.add_row(["More", "on the hub's host: `lotus-miner info`"]);
    print(&out.to_string())
}

async fn list(cx: &Cx, hub: &Hub) -> Result<(), Fault> {
    let all = hub.states().await?;
    if cx.json {
        let rows = all
            .iter()
            .map(|(n, state)| json!({"number": n, "state": state}));
        return print_json(&rows.collect::<Vec<_>>());
    }
    let mut out = table(&["Sector", "State"]);
    for (n, state) in &all {
        out.add_row([n.to_string(), state.clone()]);
    }
    print(&out.to_string())
}

async fn status(cx: &Cx, hub: &Hub, number: u64, log: bool, chain: bool) -> Result<(), Fault> {
    let s = hub.call("SectorsStatus", json!([number, chain])).await?;
    if cx.json {
        return print_json(&s);
    }
    let mut out = table(&["Sector", &number.to_string()]);
    for (name, value) in [
        ("State", &s["State"]),
        ("Pre-commit message", &s["PreCommitMsg"]),
        ("Prove-commit message", &s["CommitMsg"]),
        ("CommD", &s["CommD"]),
        ("CommR", &s["CommR"]),
        ("Trouble", &s["LastErr"]),
    ] {
        let value = text(value);
        if !value.is_empty() {
            out.add_row([name, &value]);
        }
    }
    if chain {
        for name in [
            "Activation",
            "Expiration",
            "Early",
            "InitialPledge",
            "DealWeight",
        ] {
            out.add_row([format!("On chain: {name}"), text(&s[name])]);
        }
    }
    let mut all = out.to_string();
    if log {
        let mut entries = table(&["Unix time", "Event", "Note"]);
        for e in s["Log"].as_array().into_iter().flatten() {
            entries.add_row([text(&e["Timestamp"]), text(&e["Kind"]), text(&e["Message"])]);
        }
        all = format!("{all}\n{entries}");
    }
    print(&all)
}

async fn paths(cx: &Cx, hub: &Hub) -> Result<(), Fault> {
    let local = hub.call("StorageLocal", json!([])).await?;
    let sectors = hub.call("StorageList", json!([])).await?;
    let mut rows = Vec::new();
    for (id, dir) in local.as_object().into_iter().flatten() {
        let stat = hub.call("StorageStat", json!([id])).await?;
        let count = sectors[id].as_array().map_or(0, Vec::len);
        rows.push(json!({"id": id, "dir": dir, "stat": stat, "sector_count": count}));
    }
    if cx.json {
        return print_json(&rows);
    }
    let mut out = table(&["ID", "Path", "Free", "Reserved", "Sectors"]);
    for row in &rows {
        let size = |name: &str| bytes(row["stat"][name].as_u64().unwrap_or_default());
        let free = format!("{} of {}", size("FSAvailable"), size("Capacity"));
        let (id, dir, count) = (
            text(&row["id"]),
            text(&row["dir"]),
            text(&row["sector_count"]),
        );
        out.add_row([id, dir, free, size("Reserved"), count]);
    }
    print(&out.to_string())
}

/// A value as a person reads it: a CID without its braces.
fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(s) => s.clone(),
        Value::Object(_) => text(&value["/"]),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Args;

    #[test]
    fn each_command_knows_how_far_it_reaches() {
        for (line, want) in [
            ("info", Reach::Looks),
            ("info all", Reach::Hub),
            ("sectors list", Reach::Looks),
            ("sectors status 7 --log", Reach::Looks),
            ("sectors pledge", Reach::Hub),
            ("storage list", Reach::Looks),
            ("storage detach 1a2b", Reach::Hub),
            ("sealing jobs", Reach::Hub),
            ("proving deadlines", Reach::Hub),
            ("run", Reach::Here),
            ("doctor", Reach::Here),
            ("auth api-info --perm read", Reach::Here),
            ("storage-deals list", Reach::Here),
        ] {
            let words = std::iter::once("lotus-miner").chain(line.split(' '));
            let args = Args::try_parse_from(words).unwrap();
            assert_eq!(reach(&args.command), want, "{line}");
        }
    }

    #[test]
    fn the_hub_of_this_host_is_asked_by_its_sockets() {
        let api = "/ip4/127.0.0.1/tcp/2345/http\n";
        for (info, api, here) in [
            ("token:/ip4/127.0.0.1/tcp/2345/http", api, true),
            ("/ip4/127.0.0.1/tcp/2345/http", api, true),
            ("token:/ip4/10.0.0.5/tcp/2345/http", api, false),
            ("token:/ip4/127.0.0.1/tcp/2345/http", "", false),
            ("", "", false),
        ] {
            assert_eq!(is_here(info, api), here, "{info}");
        }
    }

    #[tokio::test]
    async fn sectors_are_listed_over_the_api() {
        use axum::routing::post;
        let answer = |axum::Json(call): axum::Json<Value>| async move {
            let result = match call["method"].as_str().unwrap() {
                "Filecoin.SectorsSummary" => json!({"Proving": 2, "WaitDeals": 1}),
                "Filecoin.SectorsListInStates" if call["params"][0][0] == "Proving" => {
                    json!([1, 9])
                }
                "Filecoin.SectorsListInStates" => json!([4]),
                _ => {
                    let error = json!({"code": 1, "message": "missing permission to invoke"});
                    return axum::Json(json!({"id": 1, "error": error}));
                }
            };
            axum::Json(json!({"id": 1, "result": result}))
        };
        let app = axum::Router::new().route(PATH, post(answer));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move { axum::serve(listener, app).await.unwrap() });
        let hub = Hub::new(&format!("t:/ip4/127.0.0.1/tcp/{port}/http")).unwrap();
        let all = hub.states().await.unwrap();
        let all: Vec<_> = all.iter().map(|(n, s)| (*n, s.as_str())).collect();
        assert_eq!(all, [(1, "Proving"), (4, "WaitDeals"), (9, "Proving")]);
        let e = hub.call("StorageLocal", json!([])).await.unwrap_err();
        assert!(e.fix.contains("--perm admin"), "{e:?}");
    }
}
