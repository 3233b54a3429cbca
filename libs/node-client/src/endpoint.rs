use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use url::Url;

use crate::NodeError;

/// Where a node is and the token that it takes: the parsed form of `FULLNODE_API_INFO`.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    token: Option<String>,
    http: Url,
}

/// Never shows the token.
impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.http)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.http)
    }
}

/// Path of the Lotus API, version 1.
const PATH: &str = "/rpc/v1";
/// Path of the API of `lotus-wallet`. Source: lotus, cmd/lotus-wallet/main.go.
const WALLET_PATH: &str = "/rpc/v0";

impl Endpoint {
    /// Reads `[TOKEN:]ADDRESS`. The address is a multiaddr (`/ip4/127.0.0.1/tcp/1234/http`) or
    /// an `http`, `https`, `ws` or `wss` URL; without a path it means `/rpc/v1`. A token holds no
    /// colon, so IPv6 and URLs need no quoting.
    pub fn parse(text: &str) -> Result<Self, NodeError> {
        Self::parse_with(text, PATH).map_err(|why| NodeError::BadEndpoint { why })
    }

    /// Reads the same of a remote wallet: without a path the address means `/rpc/v0`.
    pub(crate) fn parse_wallet(text: &str) -> Result<Self, NodeError> {
        Self::parse_with(text, WALLET_PATH).map_err(|why| NodeError::BadWallet { why })
    }

    fn parse_with(text: &str, path: &str) -> Result<Self, String> {
        let text = text.trim();
        let is_address = |s: &str| s.starts_with('/') || s.contains("://") && scheme(s).is_some();
        let (token, address) = match text.split_once(':') {
            _ if text.is_empty() => return Err("it is empty".into()),
            Some((token, rest)) if !is_address(text) => (Some(token.trim()), rest.trim()),
            _ => (None, text),
        };
        let token = token.filter(|t| !t.is_empty()).map(str::to_owned);
        if token
            .as_ref()
            .is_some_and(|t| !t.bytes().all(|b| b.is_ascii_graphic()))
        {
            return Err("the token holds characters that no token has".into());
        }
        let http = if address.starts_with('/') {
            from_multiaddr(address, path)?
        } else {
            from_url(address, path)?
        };
        Ok(Self { token, http })
    }

    /// The bearer token.
    #[must_use]
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// URL for calls.
    #[must_use]
    pub fn http(&self) -> &Url {
        &self.http
    }

    /// URL for subscriptions.
    #[must_use]
    pub fn ws(&self) -> Url {
        let mut ws = self.http.clone();
        let scheme = if ws.scheme() == "https" { "wss" } else { "ws" };
        // http to ws and https to wss are both changes between special schemes.
        ws.set_scheme(scheme).expect("ws is a special scheme too");
        ws
    }
}

/// The scheme of a URL that we can speak.
fn scheme(url: &str) -> Option<&str> {
    let scheme = url.split_once("://")?.0;
    matches!(scheme, "http" | "https" | "ws" | "wss").then_some(scheme)
}

fn from_url(text: &str, path: &str) -> Result<Url, String> {
    let http = match scheme(text) {
        Some("ws") => text.replacen("ws", "http", 1),
        Some("wss") => text.replacen("wss", "https", 1),
        Some(_) => text.to_owned(),
        None => {
            let why = "the address is neither a multiaddr nor an http, https, ws or wss URL";
            return Err(why.into());
        }
    };
    let mut url = Url::parse(&http).map_err(|e| format!("bad URL: {e}"))?;
    if url.host().is_none() {
        return Err("the URL names no host".into());
    }
    if url.path() == "/" {
        url.set_path(path);
    }
    Ok(url)
}

fn from_multiaddr(text: &str, path: &str) -> Result<Url, String> {
    let parts: Vec<&str> = text.trim_end_matches('/').split('/').skip(1).collect();
    let wrong = |what: &str| format!("multiaddr {text:?}: {what}");
    let [net, host, "tcp", port, rest @ ..] = parts.as_slice() else {
        return Err(wrong("expected /ip4/HOST/tcp/PORT/http"));
    };
    let host = match *net {
        "ip4" => host
            .parse::<Ipv4Addr>()
            .map_err(|_| wrong("no IPv4 address"))?
            .to_string(),
        "ip6" => {
            let ip = host.parse::<Ipv6Addr>();
            format!("[{}]", ip.map_err(|_| wrong("no IPv6 address"))?)
        }
        "dns" | "dns4" | "dns6" if !host.is_empty() => (*host).to_owned(),
        _ => return Err(wrong("use ip4, ip6, dns, dns4 or dns6")),
    };
    let port: u16 = port.parse().map_err(|_| wrong("no TCP port"))?;
    let scheme = match rest {
        [] | ["http" | "ws"] => "http",
        ["https" | "wss"] | ["tls", "http" | "ws"] => "https",
        _ => return Err(wrong("use http, https, ws or wss after the port")),
    };
    let url = format!("{scheme}://{host}:{port}{path}");
    Url::parse(&url).map_err(|e| wrong(&e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_usual_form_is_read() {
        let t = "eyJhbGciOiJIUzI1NiJ9.eyJBbGxvdyI6WyJyZWFkIl19.abc-_";
        for (address, http, ws) in [
            (
                "/ip4/127.0.0.1/tcp/1234/http",
                "http://127.0.0.1:1234/rpc/v1",
                "ws://127.0.0.1:1234/rpc/v1",
            ),
            (
                "/ip4/10.0.0.1/tcp/1234",
                "http://10.0.0.1:1234/rpc/v1",
                "ws://10.0.0.1:1234/rpc/v1",
            ),
            (
                "/ip6/::1/tcp/1234/ws",
                "http://[::1]:1234/rpc/v1",
                "ws://[::1]:1234/rpc/v1",
            ),
            (
                "/dns4/node.example/tcp/443/wss",
                "https://node.example/rpc/v1",
                "wss://node.example/rpc/v1",
            ),
            (
                "http://127.0.0.1:1234",
                "http://127.0.0.1:1234/rpc/v1",
                "ws://127.0.0.1:1234/rpc/v1",
            ),
            (
                "wss://[2001:db8::1]:99/rpc/v0",
                "https://[2001:db8::1]:99/rpc/v0",
                "wss://[2001:db8::1]:99/rpc/v0",
            ),
        ] {
            for (text, token) in [
                (address.to_owned(), None),
                (format!("{t}:{address}\n"), Some(t)),
                (format!(":{address}"), None),
            ] {
                let e = Endpoint::parse(&text).unwrap();
                assert_eq!(e.http().as_str(), http, "{text}");
                assert_eq!(e.ws().as_str(), ws, "{text}");
                assert_eq!(e.token(), token, "{text}");
                assert!(!format!("{e:?} {e}").contains("eyJ"));
            }
        }
    }

    #[test]
    fn a_wallet_has_another_path() {
        for (text, http) in [
            ("t:/ip4/10.0.0.1/tcp/1777", "http://10.0.0.1:1777/rpc/v0"),
            ("t:http://10.0.0.1:1777", "http://10.0.0.1:1777/rpc/v0"),
            ("t:https://keys.example/w", "https://keys.example/w"),
        ] {
            let e = Endpoint::parse_wallet(text).unwrap();
            assert_eq!(e.http().as_str(), http, "{text}");
        }
    }

    #[test]
    fn mistakes_are_named_without_the_token() {
        for text in [
            "",
            "secret",
            "secret:",
            "secret:127.0.0.1:1234",
            "secret:/ip4/127.0.0.1/udp/1234",
            "secret:/ip4/1.2.3/tcp/1234",
            "secret:/ip4/1.2.3.4/tcp/123456",
            "secret:/ip4/1.2.3.4/tcp/1234/quic",
            "secret:/unix/x/tcp/1",
            "secret:ftp://x",
            "secret:http://",
            "se cret:/ip4/127.0.0.1/tcp/1234/http",
        ] {
            let e = Endpoint::parse(text).unwrap_err();
            assert!(matches!(e, NodeError::BadEndpoint { .. }), "{text}");
            assert!(!e.to_string().contains("secret"), "{e}");
            let e = Endpoint::parse_wallet(text).unwrap_err();
            assert!(matches!(e, NodeError::BadWallet { .. }), "{text}");
            assert!(!e.to_string().contains("secret"), "{e}");
        }
    }
}
