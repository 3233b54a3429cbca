//! Downloading from where a client says, without becoming its way into this network: loopback,
//! private and link-local addresses are refused in the URL, after name resolution, and on each
//! redirect. The connection goes to the very addresses that were checked.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use http::{HeaderName, HeaderValue, header};
use lotus_p2p::PeerAddress;
use lotus_runtime::Fault;
use lotus_types::Kind;
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;

const MAX_REDIRECTS: usize = 5;

/// Why a place is not downloaded from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// Not a URL.
    #[error("{0:?} is no URL")]
    NoUrl(String),
    /// Neither `http` nor `https`, or without a host.
    #[error("{0} is not an http or https URL with a host")]
    Scheme(String),
    /// No address of a peer.
    #[error("{text:?} names no peer: {why}")]
    Peer {
        /// As given.
        text: String,
        /// What is wrong.
        why: String,
    },
    /// With a user name or password.
    #[error("the URL names a user or password")]
    Credentials,
    /// Not an address of the public Internet.
    #[error("{0} is not a public address")]
    Private(String),
}

impl SourceError {
    /// What to do.
    #[must_use]
    pub const fn fix(&self) -> &'static str {
        match self {
            Self::NoUrl(_) | Self::Scheme(_) => "give a full http:// or https:// URL",
            Self::Peer { .. } => "give libp2p:///ip4/ADDRESS/tcp/PORT/p2p/PEER",
            Self::Credentials => "send an Authorization header instead",
            Self::Private(_) => {
                "use a public address; a provider that trusts its clients sets deals.allow_private_sources"
            }
        }
    }
}

/// Checks the text of a URL.
pub(crate) fn check_url(text: &str, allow_private: bool) -> Result<Url, SourceError> {
    let url = Url::parse(text).map_err(|_| SourceError::NoUrl(text.chars().take(128).collect()))?;
    check_parsed(&url, allow_private)?;
    Ok(url)
}

/// Checks the address of a peer, as in a URL of a transfer over libp2p.
pub(crate) fn check_peer(text: &str, allow_private: bool) -> Result<PeerAddress, SourceError> {
    let to: PeerAddress = text.parse().map_err(|why: String| SourceError::Peer {
        text: text.chars().take(128).collect(),
        why,
    })?;
    if !allow_private && !is_public(to.at.ip()) {
        return Err(SourceError::Private(to.at.ip().to_string()));
    }
    Ok(to)
}

/// Whether a URL leads to one of these ports. Redirects are not held to them here; a sandbox is.
pub(crate) fn port_is_one_of(url: &Url, ports: &[u16]) -> bool {
    url.port_or_known_default()
        .is_some_and(|port| ports.contains(&port))
}

fn check_parsed(url: &Url, allow_private: bool) -> Result<(), SourceError> {
    let Some(host) = url
        .host_str()
        .filter(|_| matches!(url.scheme(), "http" | "https"))
    else {
        return Err(SourceError::Scheme(
            url.as_str().chars().take(128).collect(),
        ));
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Err(SourceError::Credentials);
    }
    // A literal address is never resolved, so it is checked here. The parser has brought odd
    // spellings (octal, decimal) to the usual form.
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    match bare.parse::<IpAddr>() {
        Ok(ip) if !allow_private && !is_public(ip) => Err(SourceError::Private(ip.to_string())),
        _ => Ok(()),
    }
}

/// Whether an address belongs to the public Internet. Source: the IANA special-purpose address
/// registries for IPv4 and IPv6.
pub(crate) fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => is_public_v6(v6),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    !(a == 0
        || ip.is_loopback()
        || ip.is_private()
        || ip.is_link_local()
        || ip.is_documentation()
        || (a == 100 && (64..128).contains(&b)) // shared address space, RFC 6598
        || (a == 192 && b == 0 && c == 0) // protocol assignments, RFC 6890
        || (a == 192 && b == 88 && c == 99) // 6to4 relays, RFC 7526
        || (a == 198 && (b == 18 || b == 19)) // benchmarking, RFC 2544
        || a >= 224) // multicast, reserved, broadcast
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    if let Some(v4) = ip.to_ipv4() {
        // ::a.b.c.d and ::ffff:a.b.c.d reach the IPv4 address; :: and ::1 fall under this too.
        return is_public_v4(v4);
    }
    let s = ip.segments();
    let v4 = |hi: u16, lo: u16| {
        let [a, b] = hi.to_be_bytes();
        let [c, d] = lo.to_be_bytes();
        Ipv4Addr::new(a, b, c, d)
    };
    match s {
        [0x64, 0xff9b, 0, 0, 0, 0, hi, lo] => is_public_v4(v4(hi, lo)), // NAT64
        [0x2002, hi, lo, ..] => is_public_v4(v4(hi, lo)),               // 6to4
        [0x2001, 0, ..] => false,                                       // Teredo
        [0x2001, 0x0db8, ..] | [0x3fff, 0..=0x0fff, ..] => false,       // documentation
        // Global unicast is 2000::/3; the rest is local, multicast or reserved.
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

/// The first header that is not sent: malformed, hop-by-hop, or ours to set.
pub(crate) fn bad_header(headers: &BTreeMap<String, Vec<String>>) -> Option<String> {
    const OURS: [HeaderName; 11] = [
        header::HOST,
        header::RANGE,
        header::IF_RANGE,
        header::CONNECTION,
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        header::TE,
        header::TRAILER,
        header::EXPECT,
        header::ACCEPT_ENCODING,
    ];
    headers.iter().find_map(|(name, values)| {
        let good = HeaderName::try_from(name.as_str()).is_ok_and(|n| !OURS.contains(&n))
            && values.len() <= 10
            && values
                .iter()
                .all(|v| v.len() <= 4096 && HeaderValue::from_str(v).is_ok());
        (!good).then(|| name.clone())
    })
}

/// Resolves names and refuses those that lead to addresses that are not public. One bad address
/// condemns the name.
struct PublicOnly;

impl Resolve for PublicOnly {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> =
                tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            if let Some(bad) = found.iter().find(|a| !is_public(a.ip())) {
                let why = SourceError::Private(format!("{} ({})", name.as_str(), bad.ip()));
                return Err(why.into());
            }
            let addrs: Addrs = Box::new(found.into_iter());
            Ok(addrs)
        })
    }
}

/// The client that downloads.
pub(crate) fn client(allow_private: bool) -> Result<reqwest::Client, Fault> {
    builder(allow_private).build().map_err(|e| {
        Fault::new(
            Kind::Fatal,
            format!("HTTP client: {e}"),
            "check the system's certificates",
        )
    })
}

/// It uses no proxy of the environment: a proxy would resolve names itself.
fn builder(allow_private: bool) -> reqwest::ClientBuilder {
    let redirects = Policy::custom(move |hop| {
        if hop.previous().len() > MAX_REDIRECTS {
            return hop.error("too many redirects");
        }
        match check_parsed(hop.url(), allow_private) {
            Ok(()) => hop.follow(),
            Err(e) => hop.error(e),
        }
    });
    let builder = lotus_runtime::http_client().redirect(redirects).no_proxy();
    if allow_private {
        builder
    } else {
        builder.dns_resolver(Arc::new(PublicOnly))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_pass() {
        let private = [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2002:a00:1::1",
            "3fff::1",
            "fc00::1",
            "fd12::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ];
        for ip in private {
            assert!(!is_public(ip.parse().unwrap()), "{ip}");
        }
        let public = [
            "1.1.1.1",
            "8.8.8.8",
            "100.63.255.255",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "198.17.0.1",
            "198.20.0.1",
            "223.255.255.255",
            "::ffff:8.8.8.8",
            "64:ff9b::808:808",
            "2002:808:808::1",
            "2606:4700::1111",
            "2a00:1450::1",
        ];
        for ip in public {
            assert!(is_public(ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn urls_are_checked_in_every_spelling() {
        for text in [
            "http://example.com/x",
            "https://8.8.8.8:8443/x?y=1",
            "http://[2606:4700::1]/",
        ] {
            assert!(check_url(text, false).is_ok(), "{text}");
        }
        for text in [
            "http://127.0.0.1/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://0177.0.0.1/",
            "http://[::1]/",
            "http://[::ffff:127.0.0.1]/",
            "http://127.1/",
        ] {
            assert!(
                matches!(check_url(text, false), Err(SourceError::Private(_))),
                "{text}"
            );
            assert!(check_url(text, true).is_ok(), "{text}");
        }
        assert!(matches!(
            check_url("file:///etc/passwd", true),
            Err(SourceError::Scheme(_))
        ));
        assert!(matches!(
            check_url("nope", true),
            Err(SourceError::NoUrl(_))
        ));
        assert_eq!(
            check_url("http://u@example.com/", true),
            Err(SourceError::Credentials)
        );
    }

    #[test]
    fn ports_that_a_scheme_implies_count() {
        let on = |text, ports: &[u16]| port_is_one_of(&check_url(text, true).unwrap(), ports);
        assert!(on("http://a.b/x", &[80]) && on("https://a.b/x", &[443]));
        assert!(on("https://a.b:8443/x", &[443, 8443]));
        assert!(!on("https://a.b/x", &[80]) && !on("http://a.b:81/x", &[80, 443]));
    }

    #[tokio::test]
    async fn names_and_redirects_that_lead_inside_are_refused() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let here = server.local_addr().unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move {
            loop {
                let (mut s, _) = server.accept().await.unwrap();
                let mut buf = [0; 1024];
                let n = s.read(&mut buf).await.unwrap();
                let answer = if buf[..n].starts_with(b"GET /away") {
                    format!("HTTP/1.1 302 Found\r\nlocation: http://{here}/in\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                } else {
                    "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok".into()
                };
                s.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let cause = |e: reqwest::Error| {
            let mut text = e.to_string();
            let mut at: &dyn std::error::Error = &e;
            while let Some(next) = at.source() {
                text = format!("{text}: {next}");
                at = next;
            }
            text
        };
        let name = format!("http://localhost:{}/", here.port());
        let refused = client(false).unwrap().get(&name).send().await.unwrap_err();
        assert!(cause(refused).contains("not a public address"));
        let got = client(true).unwrap().get(&name).send().await.unwrap();
        assert_eq!(got.text().await.unwrap(), "ok");
        // A public name that redirects to a literal address inside.
        let strict = builder(false).resolve("public.test", here).build().unwrap();
        let away = format!("http://public.test:{}/away", here.port());
        let refused = strict.get(away).send().await.unwrap_err();
        assert!(cause(refused).contains("not a public address"));
    }

    #[test]
    fn headers_that_change_the_request_are_refused() {
        let one = |n: &str, v: &str| BTreeMap::from([(n.to_owned(), vec![v.to_owned()])]);
        assert_eq!(bad_header(&one("Authorization", "Bearer x")), None);
        for (n, v) in [
            ("host", "x"),
            ("Range", "bytes=0-"),
            ("a b", "x"),
            ("x", "a\nb"),
            ("TE", "x"),
        ] {
            assert_eq!(bad_header(&one(n, v)).as_deref(), Some(n));
        }
    }
}
