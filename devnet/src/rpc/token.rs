//! Tokens as Lotus makes them: JWTs signed with HS256 that list permissions.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

/// What a caller may do, each level including the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Perm {
    /// Look. What a caller without a token may do.
    Read,
    /// Change the node, publish messages and blocks.
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

#[derive(Serialize, Deserialize)]
struct Claims {
    #[serde(rename = "Allow")]
    allow: Vec<Perm>,
}

/// Makes and checks tokens with one secret.
pub struct Tokens {
    secret: [u8; 32],
}

impl Tokens {
    /// Reads the secret of a repo, or makes one, and writes an admin token to the file `token`.
    pub fn open(repo: &Path) -> io::Result<Self> {
        let path = repo.join("jwt.key");
        let secret = match fs::read(&path) {
            Ok(bytes) => bytes.try_into().map_err(|_| {
                let why = format!("{} does not hold 32 bytes", path.display());
                io::Error::new(io::ErrorKind::InvalidData, why)
            })?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let fresh: [u8; 32] = rand::random();
                write_private(repo, "jwt.key", &fresh)?;
                fresh
            }
            Err(e) => return Err(e),
        };
        let tokens = Self { secret };
        write_private(repo, "token", tokens.issue(&Perm::ALL).as_bytes())?;
        Ok(tokens)
    }

    /// A token with these permissions.
    #[must_use]
    pub fn issue(&self, allow: &[Perm]) -> String {
        let part = |json: &serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(json.to_string());
        let header = part(&serde_json::json!({"alg": "HS256", "typ": "JWT"}));
        let claims = part(&serde_json::json!({ "Allow": allow }));
        let signed = format!("{header}.{claims}");
        let mac = self.mac(&signed).finalize().into_bytes();
        format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(mac))
    }

    /// The permissions of a token, if it is one of ours.
    #[must_use]
    pub fn verify(&self, token: &str) -> Option<Vec<Perm>> {
        let (signed, mac) = token.rsplit_once('.')?;
        let mac = BASE64_URL_SAFE_NO_PAD.decode(mac).ok()?;
        self.mac(signed).verify_slice(&mac).ok()?;
        let (_, claims) = signed.split_once('.')?;
        let claims = BASE64_URL_SAFE_NO_PAD.decode(claims).ok()?;
        Some(serde_json::from_slice::<Claims>(&claims).ok()?.allow)
    }

    fn mac(&self, signed: &str) -> Hmac<Sha256> {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.secret).expect("HMAC takes keys of any length");
        mac.update(signed.as_bytes());
        mac
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
        for junk in ["", ".", "..", "a.b.c"] {
            assert_eq!(tokens.verify(junk), None);
        }
        // The same repo later, and another one.
        assert!(Tokens::open(repo.path()).unwrap().verify(&read).is_some());
        let other = tempfile::tempdir().unwrap();
        assert_eq!(Tokens::open(other.path()).unwrap().verify(&read), None);
    }
}
