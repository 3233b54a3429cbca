//! The services of this binary. To add one: its crate, its section in the configuration, and one
//! line here.

use std::future::Future;
use std::pin::Pin;

use lotus_deals::Deals;
use lotus_indexing::Indexing;
use lotus_retrieval::Retrieval;
use lotus_runtime::{Cx, Fault, Needs, Service};
use lotus_types::Kind;

use crate::{MarketsConfig, Repo};

/// A service that runs.
pub type Running = Pin<Box<dyn Future<Output = Result<(), Fault>> + Send>>;

/// A service that can be started.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Name in `--services`.
    pub name: &'static str,
    /// What it does, in a few words.
    pub about: &'static str,
    /// What it needs beside its folder and the hub.
    pub needs: fn(&MarketsConfig) -> Needs,
    /// Builds it anew and runs it.
    pub start: fn(&MarketsConfig, &Repo, Cx) -> Running,
}

fn run<S: Service>(service: S, cx: Cx) -> Running {
    Box::pin(service.run(cx))
}

/// Every service, in the order in which they are started.
#[rustfmt::skip]
pub const SERVICES: &[Entry] = &[
    Entry { name: Deals::NAME, about: "takes deals over HTTP (MK20) and hands their pieces to the hub", needs: |c| c.deals.needs(), start: |c, r, cx| run(Deals::new(c.deals.clone(), r.hub(c, Deals::NAME), r.of(Deals::NAME), r.run_dir()), cx) },
    Entry { name: Retrieval::NAME, about: "serves pieces and DAGs over HTTP (trustless gateway)", needs: |c| c.retrieval.needs(), start: |c, r, cx| run(Retrieval::new(c.retrieval.clone(), r.hub(c, Retrieval::NAME), r.of(Retrieval::NAME), r.run_dir()), cx) },
    Entry { name: Indexing::NAME, about: "indexes pieces and advertises them to IPNI", needs: |c| c.indexing.needs(), start: |c, r, cx| run(Indexing::new(c.indexing.clone(), r.hub(c, Indexing::NAME), r.of(Indexing::NAME), r.run_dir()), cx) },
];

/// The services that `names` asks for, each once; all when it is `None`.
pub fn select(names: Option<&[String]>) -> Result<Vec<Entry>, Fault> {
    let Some(names) = names else {
        return Ok(SERVICES.to_vec());
    };
    let valid = || {
        SERVICES
            .iter()
            .map(|e| e.name)
            .collect::<Vec<_>>()
            .join(", ")
    };
    for name in names {
        if !SERVICES.iter().any(|e| e.name == name) {
            return Err(Fault::new(
                Kind::Config,
                format!("unknown service {name:?}"),
                format!("valid services are: {}", valid()),
            ));
        }
    }
    let chosen: Vec<Entry> = SERVICES
        .iter()
        .filter(|e| names.iter().any(|n| n == e.name))
        .copied()
        .collect();
    if chosen.is_empty() {
        return Err(Fault::new(
            Kind::Config,
            "no service is named",
            format!(
                "leave --services out to run all, or choose from: {}",
                valid()
            ),
        ));
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Result<Vec<&'static str>, Fault> {
        let list: Vec<String> = list.iter().map(|s| (*s).to_owned()).collect();
        select(Some(&list)).map(|e| e.iter().map(|e| e.name).collect())
    }

    #[test]
    fn exactly_the_named_services_are_chosen() {
        assert_eq!(
            names(&["indexing", "retrieval"]).unwrap(),
            ["retrieval", "indexing"]
        );
        assert_eq!(names(&["deals", "deals"]).unwrap(), ["deals"]);
        assert_eq!(select(None).unwrap().len(), SERVICES.len());
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_valid_ones() {
        let e = names(&["deals", "retrival"]).unwrap_err();
        assert_eq!(e.kind.code(), 78);
        assert!(e.message.contains("retrival"), "{e}");
        for entry in SERVICES {
            assert!(e.fix.contains(entry.name), "{}", e.fix);
        }
        assert_eq!(names(&[]).unwrap_err().kind, Kind::Config);
    }
}
