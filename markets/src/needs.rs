//! What services need from their host: their own part, and that of the process around them.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use comfy_table::{Table, presets};
use lotus_runtime::{Fault, Needs, telemetry};

use crate::registry::Entry;
use crate::{MarketsConfig, Repo};

/// What a process with these services needs.
pub(crate) fn of(services: &[Entry], cfg: &MarketsConfig, repo: &Repo) -> Result<Needs, Fault> {
    let absolute = |path: PathBuf| std::path::absolute(path);
    let mut needs = process(cfg)?;
    needs.read.push(absolute(repo.config_file())?);
    needs.write.push(absolute(repo.run_dir())?);
    for entry in services {
        needs.write.push(absolute(repo.of(entry.name))?);
        let hub = repo.hub(cfg, entry.name).address();
        let hub = hub.map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;
        match hub.strip_prefix("listen:") {
            Some(port) => needs
                .bind
                .extend(port.parse::<SocketAddr>().map(|a| a.port())),
            // Whoever may connect to a socket with a path may: nothing of the hub's folder is read.
            None if hub.starts_with("unix:") => {}
            None => needs = needs.url(&hub).names(),
        }
        needs = needs.and((entry.needs)(cfg));
    }
    Ok(needs.and(Needs::default()))
}

/// The admin endpoint and telemetry.
fn process(cfg: &MarketsConfig) -> io::Result<Needs> {
    let mut needs = Needs {
        bind: vec![cfg.admin.listen.port()],
        ..Needs::default()
    };
    let otlp = telemetry::endpoint(&cfg.telemetry);
    if !otlp.is_empty() {
        needs = needs.url(&otlp).names();
    }
    Ok(needs)
}

/// Prints them, for people or as JSON.
pub(crate) fn print(needs: &Needs, json: bool) -> Result<(), Fault> {
    if json {
        println!("{}", serde_json::to_string(needs).map_err(io::Error::from)?);
        return Ok(());
    }
    println!("{}", table(needs));
    Ok(())
}

fn table(needs: &Needs) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_header(["NEEDS", "WHAT"]);
    for s in &needs.sockets {
        table.add_row(["socket", &format!("{} at {}", s.name, s.address)]);
    }
    for (what, paths) in [("read", &needs.read), ("write", &needs.write)] {
        for path in paths {
            table.add_row([what, &path.display().to_string()]);
        }
    }
    for (what, ports) in [("connect", &needs.connect), ("bind", &needs.bind)] {
        for port in ports {
            let shown = match port {
                0 => "any TCP port".into(),
                port => format!("TCP port {port}"),
            };
            table.add_row([what, &shown]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry;

    fn needs(name: &str, cfg: &MarketsConfig) -> Needs {
        let chosen = registry::select(Some(&[name.to_owned()])).unwrap();
        let repo = Repo::at(Some("/r/markets".into())).unwrap();
        of(&chosen, cfg, &repo).unwrap()
    }

    #[test]
    fn each_service_declares_its_own() {
        let mut cfg = MarketsConfig::default();
        cfg.hub.addr = "unix:/r/miner/run/hub.sock".into();
        let n = needs("retrieval", &cfg);
        assert_eq!(n.sockets.len(), 1);
        assert_eq!(n.sockets[0].address, cfg.retrieval.listen);
        assert!(n.connect.is_empty(), "{:?}", n.connect);
        let paths = |all: &[&str]| all.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(n.write, paths(&["/r/markets/retrieval", "/r/markets/run"]));
        assert_eq!(n.read, paths(&["/r/markets/config.toml"]));
        assert_eq!(n.bind, [0]);
        assert_eq!(needs("deals", &cfg).connect, [53, 80, 443]);

        cfg.hub.addr = "https://10.0.0.1:2344".into();
        cfg.telemetry.otlp_endpoint = "http://127.0.0.1:4317".into();
        cfg.indexing.announce_urls = vec!["https://cid.contact/announce".into()];
        assert_eq!(needs("indexing", &cfg).connect, [53, 443, 2344, 4317]);
        assert_eq!(needs("retrieval", &cfg).connect, [53, 2344, 4317]);
        cfg.hub.addr = "listen:0.0.0.0:2345".into();
        let n = needs("retrieval", &cfg);
        assert_eq!((&*n.connect, &*n.bind), (&[53, 4317][..], &[0, 2345][..]));
    }

    #[test]
    fn a_socket_has_the_name_that_the_service_asks_for() {
        for entry in registry::SERVICES {
            let n = needs(entry.name, &MarketsConfig::default());
            let names: Vec<&str> = n.sockets.iter().map(|s| s.name.as_str()).collect();
            assert_eq!(names, [entry.name]);
            let shown = table(&n).to_string();
            assert!(shown.contains(&n.sockets[0].address.to_string()), "{shown}");
        }
    }
}
