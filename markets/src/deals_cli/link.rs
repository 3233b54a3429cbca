//! Requests to the socket of the deal service.

use std::path::Path;
use std::time::Duration;

use lotus_deals::mk20::Refusal;
use lotus_deals::operator::{self, DealDetail, DealPage, DealRow, ListQuery};
use lotus_runtime::Fault;
use lotus_types::Kind;
use reqwest::{Method, RequestBuilder};
use serde::de::DeserializeOwned;

use super::Where;

/// Longest time for a request that carries no piece.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// The running deal service.
pub(crate) struct Link {
    http: reqwest::Client,
    token: String,
}

fn unreachable(dir: &Path, why: impl std::fmt::Display) -> Fault {
    Fault::new(
        Kind::Transport,
        format!(
            "the deal service in {} does not answer: {why}",
            dir.display()
        ),
        "start it with `lotus-markets run`, and name its repo with --repo",
    )
}

fn refused(r: &Refusal) -> Fault {
    let kind = match r.code {
        401 => Kind::Config,
        429 | 507 => Kind::Capacity,
        500..=599 => Kind::Transport,
        _ => Kind::Data,
    };
    Fault::new(kind, r.error.clone(), r.fix.clone())
}

impl Link {
    pub(crate) fn new(at: &Where) -> Result<Self, Fault> {
        let dir = at.dir()?;
        let token = std::fs::read_to_string(operator::token_file(&dir))
            .map_err(|e| unreachable(&dir, e))?;
        let http = lotus_runtime::http_client()
            .unix_socket(operator::socket(&dir))
            .no_proxy()
            .build()
            .map_err(|e| unreachable(&dir, e))?;
        Ok(Self { http, token })
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        // The host is of no meaning: every connection goes to the socket.
        let url = format!("http://deals{path}");
        self.http.request(method, url).bearer_auth(&self.token)
    }

    /// Sends a request and reads its answer.
    pub(crate) async fn send<T: DeserializeOwned>(
        &self,
        request: RequestBuilder,
    ) -> Result<T, Fault> {
        let lost = |e: reqwest::Error| {
            Fault::new(
                Kind::Transport,
                format!("the deal service does not answer: {}", e.without_url()),
                "see that it runs with `lotus-supervisor status`, and try again",
            )
        };
        let answer = request.send().await.map_err(lost)?;
        let good = answer.status().is_success();
        let status = answer.status();
        let bytes = answer.bytes().await.map_err(lost)?;
        let odd = |e: serde_json::Error| {
            Fault::new(
                Kind::Data,
                format!("the answer ({status}) is not understood: {e}"),
                "use a service and a command of one release",
            )
        };
        if good {
            return serde_json::from_slice(&bytes).map_err(odd);
        }
        let refusal: Refusal = serde_json::from_slice(&bytes).map_err(odd)?;
        Err(refused(&refusal))
    }

    pub(crate) async fn page(&self, query: &ListQuery) -> Result<DealPage, Fault> {
        let ask = self.request(Method::GET, "/deals").query(query);
        self.send(ask.timeout(CALL_TIMEOUT)).await
    }

    /// Every deal that a query finds.
    pub(crate) async fn all(&self, mut query: ListQuery) -> Result<Vec<DealRow>, Fault> {
        let wanted = query.limit;
        let mut found = Vec::new();
        loop {
            query.limit = wanted.map(|n| n - found.len().min(n));
            if query.limit == Some(0) {
                return Ok(found);
            }
            let page = self.page(&query).await?;
            found.extend(page.deals);
            query.after = page.next;
            if query.after.is_none() {
                return Ok(found);
            }
        }
    }

    /// Path of the deal that someone names by its ULID, or by client and ULID.
    pub(crate) async fn path(&self, named: &str) -> Result<String, Fault> {
        if let Some((client, id)) = named.split_once('/') {
            return Ok(format!("/deals/{client}/{id}"));
        }
        let query = ListQuery {
            id: Some(named.to_owned()),
            limit: Some(2),
            ..ListQuery::default()
        };
        let unclear =
            |what: &str, fix: &str| Fault::new(Kind::Data, format!("{what} {named}"), fix);
        match &self.page(&query).await?.deals[..] {
            [one] => Ok(format!("/deals/{}/{}", one.deal.client, one.deal.id)),
            [] => Err(unclear(
                "there is no deal",
                "see `lotus-markets storage-deals list`",
            )),
            _ => Err(unclear(
                "several clients have a deal",
                "name it as CLIENT/ID",
            )),
        }
    }

    pub(crate) async fn detail(&self, named: &str) -> Result<DealDetail, Fault> {
        let path = self.path(named).await?;
        let ask = self.request(Method::GET, &path);
        self.send(ask.timeout(CALL_TIMEOUT)).await
    }

    /// A POST that changes one deal.
    pub(crate) async fn order(
        &self,
        named: &str,
        what: &str,
        body: &impl serde::Serialize,
    ) -> Result<(), Fault> {
        let path = self.path(named).await?;
        let ask = self
            .request(Method::POST, &format!("{path}/{what}"))
            .json(body);
        let _done: lotus_deals::mk20::Done = self.send(ask.timeout(CALL_TIMEOUT)).await?;
        Ok(())
    }
}
