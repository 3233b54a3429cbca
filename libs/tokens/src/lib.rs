//! Tokens of the Lotus JSON-RPC APIs: JWTs signed with HS256 whose claim `Allow` lists permissions.
//!
//! The secret lies in a repo, for its owner alone. Whoever can read it can make any token, so a
//! token is made where the repo is and needs no running process. Tokens do not expire, as those of
//! Lotus: to revoke them all, delete `jwt.key` and restart.

use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::str::FromStr;

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use serde::{Deserialize, Serialize};

/// File with the secret.
pub const KEY_FILE: &str = "jwt.key";
/// File with a token that allows everything, for programs on this host that read it as they read
/// that of Lotus.
pub const TOKEN_FILE: &str = "token";

/// Longest token that is looked at, bytes.
const MAX_TOKEN: usize = 4 << 10;

/// What a caller may do, each level including the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Perm {
    /// Look. What a caller without a token may do.
    Read,
    /// Change things: publish messages, open sectors.
    Write,
    /// Use the wallet's keys.
    Sign,
    /// Everything.
    Admin,
}

impl Perm {
    /// Every permission, lowest first.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Sign, Self::Admin];

    /// Name on the wire.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Sign => "sign",
            Self::Admin => "admin",
        }
    }

    /// The permissions up to and with this one.
    #[must_use]
    pub fn up_to(self) -> Vec<Self> {
        Self::ALL.into_iter().filter(|p| *p <= self).collect()
    }
}

impl fmt::Display for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Perm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|p| p.name() == text)
            .ok_or_else(|| "one of: read, write, sign, admin".into())
    }
}

#[derive(Serialize, Deserialize)]
struct Claims {
    #[serde(rename = "Allow")]
    allow: Vec<Perm>,
}

/// Makes and checks tokens with one secret.
pub struct Tokens {
    sign: EncodingKey,
    check: DecodingKey,
    rules: Validation,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tokens")
    }
}

impl Tokens {
    /// Reads the secret of a repo, or makes one, and writes an admin token to the file `token`.
    pub fn open(repo: &Path) -> io::Result<Self> {
        let path = repo.join(KEY_FILE);
        let secret: [u8; 32] = match fs::read(&path) {
            Ok(bytes) => bytes.try_into().map_err(|_| {
                let why = format!("{} does not hold 32 bytes", path.display());
                io::Error::new(io::ErrorKind::InvalidData, why)
            })?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let fresh: [u8; 32] = rand::random();
                write_private(repo, KEY_FILE, &fresh)?;
                fresh
            }
            Err(e) => return Err(e),
        };
        let tokens = Self::new(&secret);
        write_private(repo, TOKEN_FILE, tokens.issue(&Perm::ALL).as_bytes())?;
        Ok(tokens)
    }

    fn new(secret: &[u8]) -> Self {
        let mut rules = Validation::new(Algorithm::HS256);
        // Tokens of Lotus have no other claim than `Allow`.
        rules.required_spec_claims.clear();
        rules.validate_exp = false;
        rules.validate_aud = false;
        Self {
            sign: EncodingKey::from_secret(secret),
            check: DecodingKey::from_secret(secret),
            rules,
        }
    }

    /// A token with these permissions.
    #[must_use]
    pub fn issue(&self, allow: &[Perm]) -> String {
        let claims = Claims {
            allow: allow.to_vec(),
        };
        encode(&Header::new(Algorithm::HS256), &claims, &self.sign)
            .expect("a list of names is JSON, and HMAC takes keys of any length")
    }

    /// The permissions of a token, if it is one of ours.
    #[must_use]
    pub fn verify(&self, token: &str) -> Option<Vec<Perm>> {
        if token.len() > MAX_TOKEN {
            return None;
        }
        let claims = decode::<Claims>(token, &self.check, &self.rules).ok()?;
        Some(claims.claims.allow)
    }
}

/// Writes a file that only its owner may read, in one step.
fn write_private(repo: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let tmp = repo.join(format!(".{name}.tmp"));
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&tmp)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(tmp, repo.join(name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use base64::Engine as _;
    use base64::prelude::BASE64_URL_SAFE_NO_PAD;

    use super::*;

    #[test]
    fn a_token_says_what_it_allows_and_can_not_be_changed() {
        let repo = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(repo.path()).unwrap();
        let read = tokens.issue(&[Perm::Read]);
        assert_eq!(tokens.verify(&read), Some(vec![Perm::Read]));
        let admin = fs::read_to_string(repo.path().join("token")).unwrap();
        assert_eq!(tokens.verify(&admin), Some(Perm::ALL.to_vec()));
        // The admin's claims under the reader's signature, and each byte flipped.
        let claims = admin.split('.').nth(1).unwrap();
        let parts: Vec<_> = read.split('.').collect();
        let forged = format!("{}.{claims}.{}", parts[0], parts[2]);
        assert_eq!(tokens.verify(&forged), None);
        for i in 0..read.len() {
            let mut bytes = read.clone().into_bytes();
            bytes[i] = if bytes[i] == b'A' { b'E' } else { b'A' };
            let bent = String::from_utf8(bytes).unwrap();
            assert_eq!(tokens.verify(&bent), None, "{bent}");
        }
        for junk in ["", ".", "..", "a.b.c", &"a".repeat(1 << 20)] {
            assert_eq!(tokens.verify(junk), None);
        }
        // The same repo later, and another one.
        assert!(Tokens::open(repo.path()).unwrap().verify(&read).is_some());
        let other = tempfile::tempdir().unwrap();
        assert_eq!(Tokens::open(other.path()).unwrap().verify(&read), None);
    }

    #[test]
    fn a_token_has_the_form_of_lotus_and_the_files_are_the_owners() {
        let repo = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(repo.path()).unwrap();
        let token = tokens.issue(&Perm::Write.up_to());
        let part = |n: usize| -> serde_json::Value {
            let bytes = BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(n).unwrap());
            serde_json::from_slice(&bytes.unwrap()).unwrap()
        };
        assert_eq!(part(0), serde_json::json!({"typ": "JWT", "alg": "HS256"}));
        assert_eq!(part(1), serde_json::json!({"Allow": ["read", "write"]}));
        for name in [KEY_FILE, TOKEN_FILE] {
            let mode = fs::metadata(repo.path().join(name)).unwrap().permissions();
            assert_eq!(mode.mode() & 0o777, 0o600, "{name}");
        }
    }

    #[test]
    fn a_token_that_is_not_signed_or_signed_otherwise_is_refused() {
        let repo = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(repo.path()).unwrap();
        let encode_part = |json: &str| BASE64_URL_SAFE_NO_PAD.encode(json);
        let claims = encode_part(r#"{"Allow":["admin"]}"#);
        for header in [
            r#"{"alg":"none","typ":"JWT"}"#,
            r#"{"alg":"HS512","typ":"JWT"}"#,
        ] {
            for mac in ["", "AAAA"] {
                let token = format!("{}.{claims}.{mac}", encode_part(header));
                assert_eq!(tokens.verify(&token), None, "{token}");
            }
        }
        let secret = fs::read(repo.path().join(KEY_FILE)).unwrap();
        let claims = Claims {
            allow: vec![Perm::Admin],
        };
        let key = EncodingKey::from_secret(&secret);
        let other = encode(&Header::new(Algorithm::HS384), &claims, &key).unwrap();
        assert_eq!(tokens.verify(&other), None, "right key, wrong algorithm");
    }
}
