//! Who may call the hub: join bundles, identities, and which service may call what.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::ArgPredicate;
use clap::{Args, Subcommand};
use hub_proto::access::{ANY, JOINING, METHODS, SERVICES};
use hub_proto::v1::{Identified, ListCredentialsRequest, RevokeRequest};
use lotus_identity::{Authority, Caller, Held, Name};
use lotus_runtime::{Fault, addr_file};
use lotus_types::Kind;
use serde::Serialize;

use super::{Cx, from_status, print, print_json, table, time};
use crate::api::identified;
use crate::config::{MinerConfig, is_host_port};
use crate::repo::Repo;

const HOUR: Duration = Duration::from_secs(3600);
/// Hours in which a spoke on this host must start for the first time.
const TO_START: u32 = 30 * 24;

#[derive(Debug, Args)]
pub(super) struct JoinBundleArgs {
    /// What it is going to do: deals, indexing or retrieval
    #[arg(long)]
    service: Name,
    /// Which one of those that do it, for replicas: a-z, 0-9 and -. With --identity, local
    #[arg(
        long,
        default_value = "1",
        default_value_if("identity", ArgPredicate::IsPresent, "local")
    )]
    instance: Name,
    /// Where it reaches the hub, host:port. Without it, the address of api.listen. Or
    /// listen:IP:PORT, where the spoke waits there for the hub to reach it: name its host and that
    /// port in api.dial
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "identity")]
    hub: Option<String>,
    /// Hours in which the bundle must be used
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=720))]
    hours: u32,
    /// File to write; it must not exist
    #[arg(short, long, value_name = "FILE", required_unless_present = "identity")]
    output: Option<PathBuf>,
    /// For a spoke on this host: folder of its identity, REPO/SERVICE/identity, where nothing is
    /// left to do. The supervisor does that by itself
    #[arg(long, value_name = "DIR", conflicts_with_all = ["output", "hours"])]
    identity: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(super) enum CredentialsCommand {
    /// List who has an identity, or an invitation to one
    List,
    /// Answer nothing of an identity any more, and close its connections, at once
    Revoke {
        /// SERVICE/INSTANCE, as `credentials list` shows it
        caller: Caller,
    },
}

#[derive(Debug, Args)]
pub(super) struct ApiArgs {
    /// Print which service may call which method. There is nothing else to print yet
    #[arg(long)]
    matrix: bool,
}

#[derive(Serialize)]
struct Made {
    caller: Caller,
    hub: String,
    file: PathBuf,
    hours: u32,
}

/// Works without a running hub: the authority is in the repo.
pub(super) fn join_bundle(cx: &Cx, args: &JoinBundleArgs) -> Result<(), Fault> {
    let repo = initialised(cx)?;
    let spokes = SERVICES
        .iter()
        .filter(|s| !["operator", "supervisor"].contains(s));
    let spokes: Vec<&str> = spokes.copied().collect();
    if !spokes.contains(&args.service.as_str()) {
        return Err(Fault::new(
            Kind::Config,
            format!("there is no service {}", args.service),
            format!("name one of {}", spokes.join(", ")),
        ));
    }
    let caller = Caller {
        service: args.service.clone(),
        instance: args.instance.clone(),
    };
    let output = match (&args.identity, &args.output) {
        (Some(dir), _) => return introduce(cx, &repo, &caller, dir),
        (None, Some(output)) => output,
        (None, None) => return Err(Fault::new(Kind::Config, "no file", "name it with -o")),
    };
    let hub = match &args.hub {
        Some(hub) => match hub.strip_prefix("listen:") {
            Some(port) if port.parse::<SocketAddr>().is_ok() => hub.clone(),
            _ => host_port(hub)?,
        },
        None => {
            let cfg = MinerConfig::load(&repo.config())?;
            reachable(&repo, cfg.api.listen, "api")?
        }
    };
    let file = new_file(output)?;
    let authority = Authority::open(&repo.authority())?;
    authority
        .invite(&caller, &hub, HOUR * args.hours)?
        .write(&file)?;
    let made = Made {
        caller,
        hub,
        file,
        hours: args.hours,
    };
    if cx.json {
        return print_json(&made);
    }
    print(&format!(
        "{} lets one {} join the hub at {}, once, within {} hours. What {} had before is void.\n\
         Copy it to the other host and keep it secret; then, there:\n  \
         lotus-markets join {}\n  lotus-markets run --services={}",
        made.file.display(),
        made.caller.service,
        made.hub,
        made.hours,
        made.caller,
        output.display(),
        made.caller.service,
    ))
}

/// Puts the beginning of an identity where a spoke on this host looks for it.
fn introduce(cx: &Cx, repo: &Repo, caller: &Caller, dir: &Path) -> Result<(), Fault> {
    let dir = std::path::absolute(dir)?;
    if Held::is_in(&dir) {
        return Err(Fault::new(
            Kind::Config,
            format!("{} has an identity", dir.display()),
            "remove the folder first if it is to have another one",
        ));
    }
    let socket = std::path::absolute(repo.hub_socket())?;
    let hub = format!("unix:{}", socket.display());
    let bundle = Authority::open(&repo.authority())?.invite(caller, &hub, HOUR * TO_START)?;
    Held::start(&dir, Some(bundle))?;
    give(&dir)?;
    let made = Made {
        caller: caller.clone(),
        hub,
        file: dir,
        hours: TO_START,
    };
    if cx.json {
        return print_json(&made);
    }
    print(&format!(
        "{} is now {}: start `lotus-markets run --services={}` with that repo",
        made.file.display(),
        made.caller,
        made.caller.service,
    ))
}

/// Gives a folder, and what is in it, to whom the folder above it belongs: spokes may be users of
/// their own.
fn give(dir: &Path) -> Result<(), Fault> {
    use std::os::unix::fs::{MetadataExt as _, chown};
    let above = std::fs::metadata(dir.parent().unwrap_or(dir))?;
    let own = std::fs::metadata(dir)?;
    if own.uid() == above.uid() {
        return Ok(());
    }
    for entry in std::fs::read_dir(dir)? {
        chown(entry?.path(), Some(above.uid()), Some(above.gid()))?;
    }
    Ok(chown(dir, Some(above.uid()), Some(above.gid()))?)
}

pub(super) async fn credentials(cx: &Cx, command: CredentialsCommand) -> Result<(), Fault> {
    let repo = initialised(cx)?;
    // Of a hub that does not answer the register is all there is, and it counts for that hub too.
    let hub = cx.hub().await.ok();
    match command {
        CredentialsCommand::List => {
            let all: Vec<Identified> = match hub {
                Some(hub) => {
                    let list = hub.request(ListCredentialsRequest {});
                    let list = hub.credentials().list(list).await.map_err(from_status)?;
                    list.into_inner().identities
                }
                None => {
                    let all = Authority::open(&repo.authority())?.callers()?;
                    all.into_iter().map(identified).collect()
                }
            };
            if cx.json {
                return print_json(&all.iter().map(Row::from).collect::<Vec<_>>());
            }
            if all.is_empty() {
                return print(
                    "nobody but the operator may call this hub; `lotus-miner join-bundle` lets \
                     somebody",
                );
            }
            let mut out = table(&["Who", "State", "Invited", "Joined", "Renewed", "Ends"]);
            for row in all.iter().map(Row::from) {
                let at = |ms: u64| if ms == 0 { String::new() } else { time(ms) };
                out.add_row([
                    row.who,
                    row.state,
                    at(row.invited_unix_ms),
                    at(row.joined_unix_ms),
                    at(row.renewed_unix_ms),
                    at(row.ends_unix_ms),
                ]);
            }
            print(&out.to_string())
        }
        CredentialsCommand::Revoke { caller } => {
            let revoked = match hub {
                Some(hub) => {
                    let request = hub.request(RevokeRequest {
                        service: caller.service.to_string(),
                        instance: caller.instance.to_string(),
                    });
                    let done = hub.credentials().revoke(request).await;
                    done.map_err(from_status)?.into_inner().revoked
                }
                None => Authority::open(&repo.authority())?.revoke(&caller)?,
            };
            if !revoked {
                return Err(Fault::new(
                    Kind::Data,
                    format!("{caller} has no identity that counts"),
                    "see `lotus-miner credentials list`",
                ));
            }
            if cx.json {
                return print_json(&caller);
            }
            print(&format!(
                "nothing of {caller} is answered any more; `lotus-miner join-bundle` lets it in again"
            ))
        }
    }
}

/// An identity, as it is printed.
#[derive(Serialize)]
struct Row {
    who: String,
    state: String,
    invited_unix_ms: u64,
    joined_unix_ms: u64,
    renewed_unix_ms: u64,
    ends_unix_ms: u64,
}

impl From<&Identified> for Row {
    fn from(i: &Identified) -> Self {
        Self {
            who: format!("{}/{}", i.service, i.instance),
            state: i.state.clone(),
            invited_unix_ms: i.invited_unix_ms,
            joined_unix_ms: i.joined_unix_ms,
            renewed_unix_ms: i.renewed_unix_ms,
            ends_unix_ms: i.expires_unix_ms,
        }
    }
}

/// Which service may call which method, by what hub.proto says.
pub(super) fn api(cx: &Cx, _: &ApiArgs) -> Result<(), Fault> {
    let head: Vec<&str> = std::iter::once("Method")
        .chain(SERVICES)
        .chain([JOINING])
        .collect();
    if cx.json {
        let rows: Vec<_> = METHODS
            .iter()
            .map(|m| {
                let callers: Vec<&str> = head[1..]
                    .iter()
                    .copied()
                    .filter(|s| m.may(s) || m.callers.contains(s))
                    .collect();
                serde_json::json!({ "method": m.path, "callers": callers })
            })
            .collect();
        return print_json(&rows);
    }
    let mut out = table(&head);
    for m in METHODS {
        let path = m.path.trim_start_matches("/hub.v1.").to_owned();
        let cells = head[1..].iter().map(|s| {
            let may = m.may(s) || m.callers.contains(s);
            if may { "yes" } else { "" }.to_owned()
        });
        out.add_row(std::iter::once(path).chain(cells));
    }
    print(&format!(
        "{out}\n`{JOINING}`: a spoke with a join bundle and no identity yet. `{ANY}` in hub.proto is \
         everybody else. The operator's processes on the hub's host may call all."
    ))
}

pub(super) fn initialised(cx: &Cx) -> Result<Repo, Fault> {
    let repo = cx.repo()?;
    if repo.is_initialised() {
        Ok(repo)
    } else {
        Err(repo.no_hub())
    }
}

/// An address that somebody typed, `host:port`.
pub(super) fn host_port(text: &str) -> Result<String, Fault> {
    if is_host_port(text) {
        return Ok(text.into());
    }
    Err(Fault::new(
        Kind::Config,
        format!("{text:?} is no address"),
        "give host:port, such as 10.0.0.5:2344",
    ))
}

/// A path for a new bundle. Looked at before an earlier bundle of the same name becomes void.
pub(super) fn new_file(output: &Path) -> Result<PathBuf, Fault> {
    let file = std::path::absolute(output)?;
    if file.exists() {
        return Err(Fault::new(
            Kind::Config,
            format!("{} exists", file.display()),
            "name a file that does not exist",
        ));
    }
    Ok(file)
}

/// Where others reach a port of this hub, as far as the hub can know. `section` has the setting
/// `listen`, and is the name of the port's address file.
pub(super) fn reachable(
    repo: &Repo,
    wanted: std::net::SocketAddr,
    section: &str,
) -> Result<String, Fault> {
    if wanted.ip().is_unspecified() {
        return Err(Fault::new(
            Kind::Config,
            format!("{section}.listen is {wanted}: that is every address of this host"),
            "name the one that the other host can reach, such as --hub 10.0.0.5:2347",
        ));
    }
    match addr_file::read(&repo.run(), section) {
        Ok(addr) => Ok(addr),
        Err(_) if wanted.port() != 0 => Ok(wanted.to_string()),
        Err(_) => Err(Fault::new(
            Kind::Config,
            format!(
                "the port of {section}.listen is chosen when the hub starts, and it did not yet"
            ),
            format!("start `lotus-miner run`, or set a port in {section}.listen"),
        )),
    }
}
