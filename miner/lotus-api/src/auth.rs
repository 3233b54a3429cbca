//! Who may do what, by the headers of a request.

use http::header::{AUTHORIZATION, ORIGIN};
use http::{HeaderMap, Uri};
use lotus_tokens::{Perm, Tokens};

/// What the caller of a request may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Allowed(pub(crate) Vec<Perm>);

/// Who calls a method.
#[derive(Clone, Debug, Default)]
pub(crate) struct Caller {
    /// What it may do.
    pub(crate) perms: Vec<Perm>,
    /// URL by which it reaches this API.
    pub(crate) base: String,
}

/// The permissions of a request; `Err` says why it has none and never repeats the token.
///
/// The token is that of the header, else that of the query, as Lotus takes it. Without one a
/// caller may read. A page in a browser may not: any site could look through the operator's own.
pub(crate) fn allowed(
    tokens: &Tokens,
    headers: &HeaderMap,
    uri: &Uri,
) -> Result<Allowed, &'static str> {
    let token = match headers.get(AUTHORIZATION) {
        Some(value) => {
            let bearer = value.to_str().ok().and_then(|v| v.strip_prefix("Bearer "));
            Some(bearer.ok_or("the Authorization header holds no bearer token")?)
        }
        None => uri
            .query()
            .into_iter()
            .flat_map(|q| q.split('&'))
            .find_map(|pair| pair.strip_prefix("token="))
            .filter(|token| !token.is_empty()),
    };
    match token {
        Some(token) => match tokens.verify(token.trim()) {
            Some(perms) => Ok(Allowed(perms)),
            None => Err("the token is not one of this hub"),
        },
        None if headers.contains_key(ORIGIN) => Err("a web page needs a token"),
        None => Ok(Allowed(vec![Perm::Read])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_give_permissions_as_lotus_reads_them() {
        let repo = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(repo.path()).unwrap();
        let sign = tokens.issue(&Perm::Sign.up_to());
        let ask = |headers: &[(http::HeaderName, String)], uri: &str| {
            let headers = headers.iter();
            let headers = headers
                .map(|(k, v)| (k.clone(), v.parse().unwrap()))
                .collect();
            allowed(&tokens, &headers, &uri.parse().unwrap()).map(|a| a.0)
        };
        let bearer = |t: &str| (AUTHORIZATION, format!("Bearer {t}"));
        let origin = (ORIGIN, "https://example.com".to_owned());

        assert_eq!(ask(&[], "/rpc/v0"), Ok(vec![Perm::Read]));
        assert_eq!(ask(&[bearer(&sign)], "/rpc/v0"), Ok(Perm::Sign.up_to()));
        let query = format!("/rpc/v0?x=1&token={sign}");
        assert_eq!(ask(&[], &query), Ok(Perm::Sign.up_to()));
        assert_eq!(
            ask(&[bearer(&sign), origin.clone()], "/rpc/v0"),
            Ok(Perm::Sign.up_to())
        );
        for (headers, uri) in [
            (vec![bearer("nonsense")], "/rpc/v0"),
            (vec![(AUTHORIZATION, sign.clone())], "/rpc/v0"),
            (vec![bearer("nonsense")], query.as_str()),
            (vec![], "/rpc/v0?token=nonsense"),
            (vec![origin], "/rpc/v0"),
        ] {
            assert!(ask(&headers, uri).is_err(), "{headers:?} {uri}");
        }
    }
}
