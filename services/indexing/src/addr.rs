//! The few multiaddrs that name an HTTP endpoint. Source: multiformats/multicodec, table.csv.

use std::net::{Ipv4Addr, Ipv6Addr};

use lotus_runtime::Fault;
use lotus_types::Kind;

const TCP: u64 = 6;
const P2P: u64 = 421;

/// An address in text and binary form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Multiaddr {
    pub(crate) text: String,
    pub(crate) bytes: Vec<u8>,
}

impl Multiaddr {
    /// Reads a URL or a multiaddr; `key` is the setting it comes from.
    pub(crate) fn parse(text: &str, key: &str) -> Result<Self, Fault> {
        let read = if text.starts_with('/') {
            from_text(text)
        } else {
            url_to_text(text).and_then(|t| from_text(&t))
        };
        read.ok_or_else(|| {
            Fault::new(
                Kind::Config,
                format!("{key} {text:?} is neither an HTTP URL nor a multiaddr of one"),
                format!("set {key} to http://host:port or /dns4/host/tcp/port/https"),
            )
        })
    }

    /// The address followed by the peer that is there.
    pub(crate) fn of_peer(&self, peer: &[u8]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        varint(P2P, &mut bytes);
        prefixed(peer, &mut bytes);
        bytes
    }
}

fn varint(n: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(unsigned_varint::encode::u64(
        n,
        &mut unsigned_varint::encode::u64_buffer(),
    ));
}

fn prefixed(value: &[u8], out: &mut Vec<u8>) {
    varint(value.len() as u64, out);
    out.extend_from_slice(value);
}

fn url_to_text(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let default = match scheme {
        "http" => 80,
        "https" => 443,
        _ => return None,
    };
    let host_port = rest.strip_suffix('/').unwrap_or(rest);
    if host_port.contains(['/', '?', '#', '@']) {
        return None;
    }
    let (host, port) = match host_port.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
        _ => (host_port, default),
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let host = if let Ok(ip) = bare.parse::<Ipv4Addr>() {
        format!("/ip4/{ip}")
    } else if let Ok(ip) = bare.parse::<Ipv6Addr>() {
        format!("/ip6/{ip}")
    } else if !host.is_empty() && !host.contains(['[', ']', ':', ' ']) {
        format!("/dns/{host}")
    } else {
        return None;
    };
    Some(format!("{host}/tcp/{port}/{scheme}"))
}

fn from_text(text: &str) -> Option<Multiaddr> {
    let mut bytes = Vec::new();
    let mut parts = text.strip_prefix('/')?.split('/');
    let mut http = false;
    while let Some(name) = parts.next() {
        match name {
            "ip4" => {
                varint(4, &mut bytes);
                bytes.extend(parts.next()?.parse::<Ipv4Addr>().ok()?.octets());
            }
            "ip6" => {
                varint(41, &mut bytes);
                bytes.extend(parts.next()?.parse::<Ipv6Addr>().ok()?.octets());
            }
            "dns" | "dns4" | "dns6" => {
                let code = match name {
                    "dns" => 53,
                    "dns4" => 54,
                    _ => 55,
                };
                let host = parts.next().filter(|h| !h.is_empty())?;
                varint(code, &mut bytes);
                prefixed(host.as_bytes(), &mut bytes);
            }
            "tcp" => {
                varint(TCP, &mut bytes);
                bytes.extend(parts.next()?.parse::<u16>().ok()?.to_be_bytes());
            }
            "tls" => varint(448, &mut bytes),
            "http" | "https" => {
                varint(if name == "http" { 480 } else { 443 }, &mut bytes);
                http = true;
            }
            // Percent-encoded in the text, so that it has no slash.
            "http-path" => {
                let path = parts.next().filter(|p| !p.is_empty())?;
                varint(481, &mut bytes);
                prefixed(
                    path.replace("%2F", "/").replace("%2f", "/").as_bytes(),
                    &mut bytes,
                );
            }
            _ => return None,
        }
    }
    http.then(|| Multiaddr {
        text: text.into(),
        bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_and_multiaddrs_are_read() {
        for (from, text, hex) in [
            (
                "http://127.0.0.1:7777",
                "/ip4/127.0.0.1/tcp/7777/http",
                "047f000001061e61e003",
            ),
            (
                "https://sp.example/",
                "/dns/sp.example/tcp/443/https",
                "350a73702e6578616d706c650601bbbb03",
            ),
            (
                "http://[::1]:80",
                "/ip6/::1/tcp/80/http",
                "2900000000000000000000000000000001060050e003",
            ),
            (
                "/dns4/a/tcp/1/tls/http",
                "/dns4/a/tcp/1/tls/http",
                "36016106 0001c003e003",
            ),
        ] {
            let a = Multiaddr::parse(from, "k").unwrap();
            assert_eq!(a.text, text);
            let got = data_encoding::HEXLOWER.encode(&a.bytes);
            assert_eq!(got, hex.replace(' ', ""), "{from}");
        }
        for bad in [
            "",
            "x",
            "ftp://a",
            "http://",
            "http://a/path",
            "/ip4/1.2.3.4/tcp/80",
            "/ip4/1.2/tcp/80/http",
            "/tcp",
            "http://a:99999",
        ] {
            let fault = Multiaddr::parse(bad, "indexing.retrieval_url").unwrap_err();
            assert_eq!(fault.kind, Kind::Config);
            assert!(fault.fix.contains("indexing.retrieval_url"));
        }
    }
}
