//! Who a client is, and how much of a server one client may have.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::{HeaderMap, HeaderName};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Who asked before each proxy. Source: MDN; RFC 7239 describes it as the one in use.
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// Most addresses that are read from it.
const MAX_FORWARDED: usize = 32;

/// Addresses with one prefix, such as `10.0.0.0/8`; an address alone is a network of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

impl Network {
    /// Whether `ip` is one of them. An IPv4 address that is written as IPv6 is the IPv4 address.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.address, ip.to_canonical()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let shift = 32u32.saturating_sub(self.bits.into());
                (a.to_bits() ^ b.to_bits()).checked_shr(shift).unwrap_or(0) == 0
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let shift = 128u32.saturating_sub(self.bits.into());
                (a.to_bits() ^ b.to_bits()).checked_shr(shift).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is no address or network such as 10.0.0.0/8");
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            Some(bits) => bits.parse().ok().filter(|b| *b <= most).ok_or_else(bad)?,
            None => most,
        };
        Ok(Self { address, bits })
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl Serialize for Network {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// What counts as one client: an IPv4 address, or a /64 of IPv6, which is what one customer has.
#[must_use]
pub fn client(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

/// Counts what each client has of something, up to a limit. What trusted proxies have is not
/// counted: many clients are behind each.
#[derive(Debug)]
pub struct PerClient {
    limit: usize,
    trusted: Vec<Network>,
    open: Mutex<HashMap<IpAddr, usize>>,
}

/// One of what a client may have; gives it back when dropped.
#[derive(Debug)]
pub struct Share {
    /// `None` when it is not counted.
    of: Option<(Arc<PerClient>, IpAddr)>,
}

impl PerClient {
    /// At most `limit` for each client.
    #[must_use]
    pub fn new(limit: usize, trusted: Vec<Network>) -> Arc<Self> {
        Arc::new(Self {
            limit,
            trusted,
            open: Mutex::default(),
        })
    }

    /// One more for whoever has this address, or `None` when it has them all.
    #[must_use]
    pub fn take(self: &Arc<Self>, ip: IpAddr) -> Option<Share> {
        if self.trusts(ip) {
            return Some(Share { of: None });
        }
        let ip = client(ip);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // Entries go when they are given back, so there are no more than things to be had.
        let has = open.entry(ip).or_default();
        if *has >= self.limit {
            if *has == 0 {
                open.remove(&ip);
            }
            return None;
        }
        *has += 1;
        drop(open);
        Some(Share {
            of: Some((self.clone(), ip)),
        })
    }

    fn trusts(&self, ip: IpAddr) -> bool {
        self.trusted.iter().any(|n| n.contains(ip))
    }

    /// Who sent a request that came from `peer`: the last that a trusted proxy saw, else the peer.
    #[must_use]
    pub fn sender(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        if !self.trusts(peer) {
            return peer;
        }
        let named = headers
            .get_all(FORWARDED_FOR)
            .iter()
            .rev()
            .filter_map(|v| v.to_str().ok())
            .flat_map(|v| v.rsplit(','))
            .take(MAX_FORWARDED);
        for text in named {
            match text.trim().parse() {
                Ok(ip) if self.trusts(ip) => {}
                Ok(ip) => return ip,
                // Whoever wrote this is not to be believed, nor is what stands before it.
                Err(_) => break,
            }
        }
        peer
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let Some((all, ip)) = &self.of else { return };
        let mut open = all.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(has) = open.get_mut(ip) {
            *has -= 1;
            if *has == 0 {
                open.remove(ip);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn networks_are_read_and_hold_what_they_say() {
        for (text, inside, outside) in [
            ("10.0.0.0/8", "10.255.1.2", "11.0.0.0"),
            ("192.0.2.7", "192.0.2.7", "192.0.2.6"),
            ("0.0.0.0/0", "8.8.8.8", "::1"),
            ("2001:db8::/32", "2001:db8:1::5", "2001:db9::"),
            ("::/0", "::1", "8.8.8.8"),
            ("127.0.0.0/8", "::ffff:127.0.0.1", "::1"),
        ] {
            let network: Network = text.parse().unwrap();
            assert!(network.contains(ip(inside)), "{text} {inside}");
            assert!(!network.contains(ip(outside)), "{text} {outside}");
            assert_eq!(network.to_string().parse(), Ok(network));
        }
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "::/129", "1.2.3.4/", "a"] {
            let e = bad.parse::<Network>().unwrap_err();
            assert!(e.contains("10.0.0.0/8"), "{e}");
        }
    }

    #[test]
    fn each_client_gets_its_share_and_gives_it_back() {
        let all = PerClient::new(2, vec!["10.0.0.0/8".parse().unwrap()]);
        let first = all.take(ip("192.0.2.1")).unwrap();
        let _second = all.take(ip("192.0.2.1")).unwrap();
        assert!(all.take(ip("192.0.2.1")).is_none());
        assert!(all.take(ip("::ffff:192.0.2.1")).is_none(), "the same");
        let other = all.take(ip("192.0.2.2")).unwrap();
        drop(first);
        assert!(all.take(ip("192.0.2.1")).is_some());
        drop(other);
        // One customer's addresses are one client.
        let many: Vec<_> = (0..3)
            .map(|i| all.take(ip(&format!("2001:db8::{i}"))))
            .collect();
        assert!(many[1].is_some() && many[2].is_none());
        // A proxy stands for many.
        let behind: Vec<_> = (0..5).map(|_| all.take(ip("10.1.1.1"))).collect();
        assert!(behind.iter().all(Option::is_some));
        drop((many, behind));
        assert_eq!(all.open.lock().unwrap().len(), 1, "nothing is left behind");
        assert!(PerClient::new(0, vec![]).take(ip("192.0.2.1")).is_none());
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        let all = PerClient::new(1, vec!["10.0.0.0/8".parse().unwrap()]);
        let sender = |peer: &str, lines: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(FORWARDED_FOR, line.parse().unwrap());
            }
            all.sender(ip(peer), &headers)
        };
        let client = ip("198.51.100.7");
        assert_eq!(sender("10.0.0.1", &["198.51.100.7"]), client);
        assert_eq!(sender("10.0.0.1", &["198.51.100.7, 10.2.2.2"]), client);
        assert_eq!(sender("10.0.0.1", &["1.1.1.1, 198.51.100.7"]), client);
        assert_eq!(sender("10.0.0.1", &["1.1.1.1", "198.51.100.7"]), client);
        // A client that writes its own.
        assert_eq!(sender("198.51.100.7", &["1.1.1.1"]), client);
        assert_eq!(sender("10.0.0.1", &["1.1.1.1, nonsense"]), ip("10.0.0.1"));
        assert_eq!(sender("10.0.0.1", &[]), ip("10.0.0.1"));
    }
}
