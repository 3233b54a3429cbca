//! What a gateway request asks for: pure, from its path, query and headers.

use axum::http::HeaderMap;
use cid::Cid;
use http::StatusCode;
use http::header::{ACCEPT, CACHE_CONTROL};
use lotus_car::{ByteRange, Scope, Selector};
use percent_encoding::percent_decode_str;

use crate::answer::Refusal;

pub(crate) const RAW_TYPE: &str = "application/vnd.ipld.raw";
pub(crate) const CAR_TYPE: &str = "application/vnd.ipld.car";

/// A request for content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ask {
    pub(crate) root: Cid,
    pub(crate) path: Vec<String>,
    pub(crate) form: Form,
    /// Name that the client wants for the file.
    pub(crate) filename: Option<String>,
    /// The client wants only what is at hand.
    pub(crate) only_if_cached: bool,
    /// Headers had a say in the form of the answer.
    negotiated: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Raw,
    Car(Selector),
}

impl Ask {
    /// `rest` is the path behind `/ipfs/`, still percent-encoded.
    pub(crate) fn parse(
        rest: &str,
        query: Option<&str>,
        headers: &HeaderMap,
    ) -> Result<Self, Refusal> {
        let mut segments = rest.split('/').filter(|s| !s.is_empty()).map(decode);
        let cid = segments
            .next()
            .ok_or_else(|| Refusal::bad("no CID in the path", "ask for /ipfs/{cid}"))??;
        let root = Cid::try_from(cid.as_str()).map_err(|e| {
            Refusal::bad(
                format!("{:?} is no CID: {e}", clip(&cid)),
                "ask for /ipfs/{cid}, the CID in text form",
            )
        })?;
        let path = segments.collect::<Result<Vec<_>, _>>()?;
        let query = Query::parse(query.unwrap_or_default())?;
        let form = form(&query, headers)?;
        let negotiated = query.format.is_none() || accepted(headers).iter().any(Accepted::is_car);
        if form == Form::Raw && !path.is_empty() {
            return Err(Refusal::bad(
                "a raw block has no path below it",
                "ask for the block by its own CID, or for a CAR (format=car)",
            ));
        }
        let only_if_cached = headers
            .get_all(CACHE_CONTROL)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .any(|v| v.split(',').any(|d| d.trim() == "only-if-cached"));
        Ok(Self {
            root,
            path,
            form,
            filename: query.filename,
            only_if_cached,
            negotiated,
        })
    }

    /// Where the same answer is found whatever the headers: the path with every parameter of the
    /// form. `None` when the request named that place itself.
    pub(crate) fn location(&self, path: &str, query: Option<&str>) -> Option<String> {
        if !self.negotiated {
            return None;
        }
        let ours = ["format", "car-version", "car-order", "car-dups"];
        let kept = query.unwrap_or_default().split('&').filter(|pair| {
            let key = pair.split('=').next().unwrap_or_default();
            !key.is_empty() && !ours.contains(&key)
        });
        let form = match self.form {
            Form::Raw => vec!["format=raw"],
            Form::Car(s) => {
                let dups = if s.duplicates {
                    "car-dups=y"
                } else {
                    "car-dups=n"
                };
                vec!["format=car", "car-version=1", "car-order=dfs", dups]
            }
        };
        let all: Vec<&str> = kept.chain(form).collect();
        Some(format!("{path}?{}", all.join("&")))
    }

    /// A tag that differs for each answer. Raw blocks and CARs from here are the same bytes each
    /// time, but other gateways order a CAR differently, so its tag is weak.
    pub(crate) fn etag(&self) -> String {
        let Form::Car(s) = self.form else {
            return format!("\"{}.raw\"", self.root);
        };
        let scope = match s.scope {
            Scope::Block => "block",
            Scope::Entity => "entity",
            Scope::All => "all",
        };
        let mut tag = format!("W/\"{}.car.{scope}", self.root);
        if let Some(b) = s.bytes {
            let to = b.to.map_or_else(|| "*".into(), |n| n.to_string());
            tag = format!("{tag}.{}:{to}", b.from);
        }
        if s.duplicates {
            tag.push_str(".dups");
        }
        for segment in &self.path {
            tag.push('/');
            for byte in segment.bytes() {
                // Quotes and what is not ASCII may not stand in a tag.
                if byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) {
                    tag.push(byte.into());
                } else {
                    tag = format!("{tag}%{byte:02x}");
                }
            }
        }
        tag.push('"');
        tag
    }

    pub(crate) fn content_type(&self) -> String {
        match self.form {
            Form::Raw => RAW_TYPE.into(),
            Form::Car(s) => {
                let dups = if s.duplicates { 'y' } else { 'n' };
                format!("{CAR_TYPE}; version=1; order=dfs; dups={dups}")
            }
        }
    }

    pub(crate) fn disposition(&self) -> String {
        let name = self.filename.clone().unwrap_or_else(|| {
            let ext = if self.form == Form::Raw { "bin" } else { "car" };
            format!("{}.{ext}", self.root)
        });
        let safe: String = name
            .chars()
            .map(|c| match c {
                ' '..='~' if !"\"\\/".contains(c) => c,
                _ => '_',
            })
            .collect();
        format!("attachment; filename=\"{safe}\"")
    }
}

/// What was sent is not sent back whole.
fn clip(text: &str) -> &str {
    match text.char_indices().nth(128) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

fn decode(segment: &str) -> Result<String, Refusal> {
    percent_decode_str(segment)
        .decode_utf8()
        .map(Into::into)
        .map_err(|_| Refusal::bad("the path is not UTF-8", "percent-encode the path as UTF-8"))
}

#[derive(Debug, Default)]
struct Query {
    format: Option<String>,
    scope: Option<Scope>,
    bytes: Option<ByteRange>,
    version: Option<String>,
    order: Option<String>,
    dups: Option<String>,
    filename: Option<String>,
}

impl Query {
    fn parse(text: &str) -> Result<Self, Refusal> {
        let mut out = Self::default();
        for pair in text.split('&').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(&value.replace('+', " "))?;
            match key {
                "format" => out.format = Some(value),
                "dag-scope" => {
                    out.scope = Some(match value.as_str() {
                        "block" => Scope::Block,
                        "entity" => Scope::Entity,
                        "all" => Scope::All,
                        _ => {
                            return Err(Refusal::bad(
                                format!("dag-scope {:?} is unknown", clip(&value)),
                                "use dag-scope=block, entity or all",
                            ));
                        }
                    });
                }
                "entity-bytes" => out.bytes = Some(byte_range(&value)?),
                "car-version" => out.version = Some(value),
                "car-order" => out.order = Some(value),
                "car-dups" => out.dups = Some(value),
                "filename" => out.filename = Some(value.chars().take(255).collect()),
                // Other parameters are for other gateways.
                _ => {}
            }
        }
        Ok(out)
    }
}

fn byte_range(text: &str) -> Result<ByteRange, Refusal> {
    let bad = || {
        Refusal::bad(
            format!("entity-bytes {:?} is no range", clip(text)),
            "use entity-bytes=from:to with whole numbers; `to` may be *",
        )
    };
    let (from, to) = text.split_once(':').ok_or_else(bad)?;
    let from: i64 = from.parse().map_err(|_| bad())?;
    let to: Option<i64> = match to {
        "*" => None,
        n => Some(n.parse().map_err(|_| bad())?),
    };
    match to {
        // With one sign on both ends the order shows without knowing the file.
        Some(to) if (from < 0) == (to < 0) && to < from => Err(bad()),
        _ => Ok(ByteRange { from, to }),
    }
}

/// Parameters of a CAR that a client asks for; `None` leaves the choice to us.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct CarParams {
    version: Option<String>,
    order: Option<String>,
    dups: Option<String>,
}

impl CarParams {
    /// Whether duplicates are sent; `None` when this cannot be served.
    fn duplicates(&self) -> Option<bool> {
        let known =
            |v: &Option<String>, all: &[&str]| v.as_deref().is_none_or(|v| all.contains(&v));
        (known(&self.version, &["1"]) && known(&self.order, &["dfs", "unk"])).then_some(())?;
        match self.dups.as_deref() {
            None | Some("n") => Some(false),
            Some("y") => Some(true),
            Some(_) => None,
        }
    }
}

/// One type that the client accepts.
struct Accepted {
    kind: String,
    car: CarParams,
    weight: u32,
}

impl Accepted {
    fn is_car(&self) -> bool {
        self.kind == CAR_TYPE
    }
}

fn accepted(headers: &HeaderMap) -> Vec<Accepted> {
    let mut out: Vec<Accepted> = headers
        .get_all(ACCEPT)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter(|v| !v.trim().is_empty())
        .map(|item| {
            let mut parts = item.split(';').map(str::trim);
            let mut a = Accepted {
                kind: parts.next().unwrap_or_default().to_ascii_lowercase(),
                car: CarParams::default(),
                weight: 1000,
            };
            for (key, value) in parts.filter_map(|p| p.split_once('=')) {
                let value = value.trim().trim_matches('"').to_owned();
                match key.trim() {
                    "q" => a.weight = weight(&value),
                    "version" => a.car.version = Some(value),
                    "order" => a.car.order = Some(value),
                    "dups" => a.car.dups = Some(value),
                    _ => {}
                }
            }
            a
        })
        .filter(|a| a.weight > 0)
        .collect();
    // Stable: among equals the first named counts.
    out.sort_by_key(|a| std::cmp::Reverse(a.weight));
    out
}

/// A quality in thousandths; what is none counts as 1.
fn weight(q: &str) -> u32 {
    match q.split_once('.') {
        None if q == "0" => 0,
        Some(("0", digits)) if digits.len() <= 3 => format!("{digits:0<3}").parse().unwrap_or(1000),
        _ => 1000,
    }
}

fn form(query: &Query, headers: &HeaderMap) -> Result<Form, Refusal> {
    let accept = accepted(headers);
    let car = |from_header: &CarParams| {
        let either = |q: &Option<String>, h: &Option<String>| q.clone().or_else(|| h.clone());
        CarParams {
            version: either(&query.version, &from_header.version),
            order: either(&query.order, &from_header.order),
            dups: either(&query.dups, &from_header.dups),
        }
        .duplicates()
        .map(|duplicates| {
            Form::Car(Selector {
                scope: query.scope.unwrap_or_default(),
                bytes: query.bytes,
                duplicates,
            })
        })
    };
    let refused = |what: &str| {
        Refusal::new(
            StatusCode::NOT_ACCEPTABLE,
            format!("{what} cannot be served"),
            "accept application/vnd.ipld.raw, or application/vnd.ipld.car with version=1, \
             order=dfs and dups=y or n",
        )
    };
    let mut cars = accept.iter().filter(|a| a.is_car()).peekable();
    match query.format.as_deref() {
        Some("raw") => return Ok(Form::Raw),
        Some("car") => {
            let none = CarParams::default();
            if cars.peek().is_none() {
                return car(&none).ok_or_else(|| refused("a CAR of this form"));
            }
            return cars
                .find_map(|a| car(&a.car))
                .ok_or_else(|| refused("a CAR of this form"));
        }
        Some(other) => {
            return Err(Refusal::bad(
                format!("format {:?} is not served here", clip(other)),
                "use format=raw for a block or format=car for a DAG",
            ));
        }
        None => {}
    }
    for a in &accept {
        match a.kind.as_str() {
            RAW_TYPE => return Ok(Form::Raw),
            CAR_TYPE => {
                if let Some(form) = car(&a.car) {
                    return Ok(form);
                }
            }
            _ => {}
        }
    }
    if accept
        .iter()
        .all(|a| a.kind == "*/*" || a.kind == "application/*")
    {
        return Err(Refusal::bad(
            "the request does not say in which form it wants the content",
            "add ?format=raw for a block or ?format=car for a DAG",
        ));
    }
    Err(refused("the accepted types"))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    const CID: &str = "bafkreie5noke3mb7hqxukzcy73nl23k6lxszxi5w3dtmuwz62wnvkpsscm";

    fn ask(query: &str, accept: &str) -> Result<Form, u16> {
        let mut headers = HeaderMap::new();
        if !accept.is_empty() {
            headers.insert(ACCEPT, HeaderValue::from_str(accept).unwrap());
        }
        Ask::parse(CID, Some(query), &headers)
            .map(|a| a.form)
            .map_err(|r| r.status.as_u16())
    }

    #[test]
    fn format_and_accept_are_negotiated() {
        let car = |duplicates| {
            Ok(Form::Car(Selector {
                duplicates,
                ..Selector::default()
            }))
        };
        for (query, accept, want) in [
            ("format=raw", "", Ok(Form::Raw)),
            ("format=raw", CAR_TYPE, Ok(Form::Raw)),
            ("format=car", "", car(false)),
            ("format=car", "text/html", car(false)),
            (
                "format=car",
                "application/vnd.ipld.car; version=1; order=dfs; dups=y",
                car(true),
            ),
            (
                "format=car&car-dups=n",
                "application/vnd.ipld.car;dups=y",
                car(false),
            ),
            ("car-dups=y", CAR_TYPE, car(true)),
            ("", RAW_TYPE, Ok(Form::Raw)),
            ("", "application/vnd.ipld.car;order=unk", car(false)),
            (
                "",
                "text/html, application/vnd.ipld.raw;q=0.5, */*;q=0.1",
                Ok(Form::Raw),
            ),
            (
                "",
                "application/vnd.ipld.raw;q=0.5, application/vnd.ipld.car",
                car(false),
            ),
            (
                "",
                "application/vnd.ipld.car;order=x, application/vnd.ipld.car;dups=y;q=0.5",
                car(true),
            ),
            (
                "",
                "application/vnd.ipld.raw;q=0, application/vnd.ipld.car",
                car(false),
            ),
            ("", "", Err(400)),
            ("", "*/*", Err(400)),
            ("format=tar", "", Err(400)),
            ("", "text/html", Err(406)),
            ("", "application/vnd.ipld.car;version=2", Err(406)),
            ("format=car&car-version=2", "", Err(406)),
            ("format=car&car-order=bfs", "", Err(406)),
            ("format=car&dag-scope=some", "", Err(400)),
            ("format=car&entity-bytes=5", "", Err(400)),
            ("format=car&entity-bytes=a:b", "", Err(400)),
            ("format=car&entity-bytes=5:2", "", Err(400)),
            ("format=car&entity-bytes=-2:-5", "", Err(400)),
        ] {
            assert_eq!(ask(query, accept), want, "{query} {accept}");
        }
    }

    #[test]
    fn paths_are_decoded_and_judged() {
        let parse = |rest: &str| Ask::parse(rest, Some("format=car"), &HeaderMap::new());
        let a = parse(&format!("{CID}/a%20b//c%2Fd/")).unwrap();
        assert_eq!(a.path, ["a b", "c/d"]);
        for bad in ["", "/", "notacid", "Qm", &format!("{CID}/%ff")] {
            assert_eq!(parse(bad).unwrap_err().status, 400, "{bad}");
        }
        let raw = Ask::parse(&format!("{CID}/x"), Some("format=raw"), &HeaderMap::new());
        assert_eq!(raw.unwrap_err().status, 400);
    }

    #[test]
    fn what_headers_chose_has_a_place_of_its_own() {
        let path = format!("/ipfs/{CID}/a%20b");
        let location = |query: Option<&str>, accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_str(accept).unwrap());
            let rest = &path["/ipfs/".len()..];
            let ask = Ask::parse(rest, query, &headers).unwrap();
            ask.location(&path, query)
        };
        assert_eq!(location(Some("format=car"), "*/*"), None);
        let dups = "application/vnd.ipld.car;dups=y";
        let want = format!("{path}?format=car&car-version=1&car-order=dfs&car-dups=y");
        assert_eq!(location(None, dups), Some(want.clone()));
        assert_eq!(location(Some("format=car&car-order=unk"), dups), Some(want));
        let kept = location(Some("dag-scope=block&filename=x"), CAR_TYPE).unwrap();
        let want = "?dag-scope=block&filename=x&format=car&car-version=1&car-order=dfs&car-dups=n";
        assert!(kept.ends_with(want), "{kept}");
        // The same answer is there, and says of itself that it needs no other place.
        let query = kept.split_once('?').unwrap().1;
        assert_eq!(location(Some(query), "*/*"), None);
    }

    #[test]
    fn each_answer_has_its_own_tag() {
        let tag = |rest: &str, query: &str| {
            Ask::parse(rest, Some(query), &HeaderMap::new())
                .unwrap()
                .etag()
        };
        let deep = format!("{CID}/a");
        let odd = format!("{CID}/%22%0d%C3%BC");
        let tags = [
            tag(CID, "format=raw"),
            tag(CID, "format=car"),
            tag(CID, "format=car&dag-scope=block"),
            tag(CID, "format=car&dag-scope=entity"),
            tag(CID, "format=car&entity-bytes=0:5"),
            tag(CID, "format=car&entity-bytes=0:*"),
            tag(CID, "format=car&car-dups=y"),
            tag(&deep, "format=car"),
            tag(&odd, "format=car"),
        ];
        let all: std::collections::BTreeSet<_> = tags.iter().collect();
        assert_eq!(all.len(), tags.len());
        assert!(tags.iter().all(|t| HeaderValue::from_str(t).is_ok()));
    }

    proptest! {
        #[test]
        fn no_request_panics(rest in ".{0,60}", query in ".{0,80}", accept in "[ -~]{0,80}") {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_str(&accept).unwrap());
            if let Ok(ask) = Ask::parse(&rest, Some(&query), &headers) {
                prop_assert!(HeaderValue::from_str(&ask.disposition()).is_ok());
            }
            let named = format!("format=raw&filename={query}");
            if let Ok(ask) = Ask::parse(CID, Some(&named), &headers) {
                prop_assert!(HeaderValue::from_str(&ask.disposition()).is_ok());
            }
        }

        /// What a request means is what its place means, whoever asks for that.
        #[test]
        fn a_request_is_named_or_refused_with_what_is_wrong(
            path in "(/[a-z%.\"é]{0,6}){0,3}", query in queries(), accept in accepts(),
        ) {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_str(&accept).unwrap());
            let rest = format!("{CID}{path}");
            match Ask::parse(&rest, Some(&query), &headers) {
                Ok(ask) => {
                    for value in [ask.etag(), ask.content_type(), ask.disposition()] {
                        prop_assert!(HeaderValue::from_str(&value).is_ok(), "{value}");
                    }
                    if let Some(place) = ask.location(&rest, Some(&query)) {
                        let (path, query) = place.split_once('?').unwrap();
                        let again = Ask::parse(path, Some(query), &HeaderMap::new());
                        let again = again.map_err(|r| r.error).unwrap();
                        prop_assert_eq!(again.location(path, Some(query)), None);
                        prop_assert_eq!(again.etag(), ask.etag());
                        prop_assert_eq!((again.root, again.path, again.form), (ask.root, ask.path, ask.form));
                    }
                }
                Err(refusal) => {
                    prop_assert!([400, 406].contains(&refusal.status.as_u16()));
                    prop_assert!(refusal.error.len() < 1_000 && !refusal.fix.is_empty());
                    for name in ["dag-scope", "entity-bytes"] {
                        if refusal.error.starts_with(name) {
                            prop_assert!(query.contains(name));
                        }
                    }
                }
            }
        }
    }

    /// Parameters of a gateway, now and then with values that they cannot have.
    fn queries() -> impl Strategy<Value = String> {
        let number = || {
            prop_oneof![
                any::<i64>().prop_map(|n| n.to_string()),
                Just("*".to_owned()),
                Just("-0".to_owned()),
                Just("9223372036854775808".to_owned()),
            ]
        };
        let range = (number(), number()).prop_map(|(a, b)| format!("entity-bytes={a}:{b}"));
        let long = (1usize..3_000).prop_map(|n| format!("entity-bytes={}", "9".repeat(n)));
        let known = prop::sample::select(vec![
            "format=raw",
            "format=car",
            "format=",
            "format=tar",
            "dag-scope=block",
            "dag-scope=entity",
            "dag-scope=all",
            "dag-scope=%00",
            "car-version=1",
            "car-version=2",
            "car-order=dfs",
            "car-order=unk",
            "car-order=",
            "car-dups=y",
            "car-dups=n",
            "car-dups=maybe",
            "filename=a%0d%0ab",
            "filename=%22",
            "=",
            "%ff=%ff",
            "dag-scope=%ff",
        ]);
        let one = prop_oneof![
            8 => known.prop_map(str::to_owned),
            2 => range,
            1 => long,
            1 => "[ -~]{0,12}",
        ];
        prop::collection::vec(one, 0..6).prop_map(|all| all.join("&"))
    }

    fn accepts() -> impl Strategy<Value = String> {
        let one = prop::sample::select(vec![
            RAW_TYPE,
            CAR_TYPE,
            "application/vnd.ipld.car;dups=y",
            "application/vnd.ipld.car; order=x",
            "application/vnd.ipld.car;version=2;q=0.3",
            "application/vnd.ipld.raw;q=0",
            "*/*;q=0.1",
            "text/html",
            ";",
            "",
        ]);
        prop::collection::vec(one, 0..4).prop_map(|all| all.join(","))
    }
}
