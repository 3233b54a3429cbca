//! The client's key: a file in the form of `lotus wallet export`, which is hex of a JSON object
//! with the key type and the private key in base64.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use k256::ecdsa::SigningKey;
use lotus_deals::{auth, mk20};
use lotus_types::Address;
use rand::TryRngCore as _;
use serde::{Deserialize, Serialize};

use super::ClientError;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct KeyInfo {
    r#type: String,
    private_key: String,
}

/// A secp256k1 key and its address.
pub(crate) struct ClientKey {
    key: SigningKey,
    pub(crate) address: Address,
}

impl ClientKey {
    /// Reads the key file, or makes one.
    pub(crate) fn load_or_make(path: Option<&Path>) -> Result<Self, ClientError> {
        let path = match path {
            Some(p) => p.to_owned(),
            None => default_path()?,
        };
        let fail = ClientError::file(path.clone());
        match fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text).map_err(|why| ClientError::Key { path, why }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Self::make(&path).map_err(fail),
            Err(e) => Err(fail(e)),
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        let json = hex::decode(text.trim()).map_err(|_| "it is not hex")?;
        let info: KeyInfo = serde_json::from_slice(&json).map_err(|e| e.to_string())?;
        if info.r#type != "secp256k1" {
            return Err(format!("its type is {:?}", info.r#type));
        }
        let bytes = STANDARD
            .decode(info.private_key)
            .map_err(|_| "the private key is not base64")?;
        let key = SigningKey::from_slice(&bytes).map_err(|_| "the private key is not valid")?;
        Self::of(key).ok_or_else(|| "the key has no address".into())
    }

    fn of(key: SigningKey) -> Option<Self> {
        let public = key.verifying_key().to_encoded_point(false);
        let address = Address::new_secp256k1(public.as_bytes()).ok()?;
        Some(Self { key, address })
    }

    fn make(path: &Path) -> io::Result<Self> {
        let made = loop {
            let mut bytes = [0; 32];
            rand::rngs::OsRng
                .try_fill_bytes(&mut bytes)
                .map_err(io::Error::other)?;
            // All but a vanishing part of the 32-byte strings are keys.
            if let Some(made) = SigningKey::from_slice(&bytes).ok().and_then(Self::of) {
                break made;
            }
        };
        let info = KeyInfo {
            r#type: "secp256k1".into(),
            private_key: STANDARD.encode(made.key.to_bytes()),
        };
        let text = hex::encode(serde_json::to_vec(&info)?);
        if let Some(dir) = path.parent().filter(|d| !d.as_os_str().is_empty()) {
            fs::create_dir_all(dir)?;
        }
        // Linked into place complete, and never over another: two clients that start at once
        // end with one key.
        let tmp = path.with_extension(format!("{}.tmp", std::process::id()));
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&tmp)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        let linked = fs::hard_link(&tmp, path);
        fs::remove_file(&tmp)?;
        match linked {
            Ok(()) => {
                eprintln!("made a new client key in {}", path.display());
                Ok(made)
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                Self::parse(&fs::read_to_string(path)?).map_err(io::Error::other)
            }
            Err(e) => Err(e),
        }
    }

    /// The client's address in text form.
    pub(crate) fn address_text(&self) -> String {
        mk20::address_text(&self.address)
    }

    /// The `Authorization` header for a request made now.
    pub(crate) fn header(&self, method: &str, path: &str) -> Option<String> {
        auth::sign_secp256k1(&self.key, &self.address, method, path, Timestamp::now())
    }
}

fn default_path() -> Result<PathBuf, ClientError> {
    std::env::home_dir()
        .map(|h| h.join(".lotus-hub/client/key"))
        .ok_or_else(|| ClientError::Key {
            path: "key".into(),
            why: "there is no home directory".into(),
        })
}

/// `client address`.
#[derive(Debug, clap::Args)]
pub(crate) struct ShowAddress {
    /// File of the client's key; made when it does not exist [default: ~/.lotus-hub/client/key].
    #[arg(long, env = "LOTUS_HUB_CLIENT_KEY")]
    key: Option<PathBuf>,
}

impl ShowAddress {
    pub(crate) fn run(self) -> Result<(), ClientError> {
        println!(
            "{}",
            ClientKey::load_or_make(self.key.as_deref())?.address_text()
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_key_is_made_once_and_kept_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/key");
        let first = ClientKey::load_or_make(Some(&path)).unwrap();
        let again = ClientKey::load_or_make(Some(&path)).unwrap();
        assert_eq!(first.address, again.address);
        assert!(first.address_text().starts_with("t1"));
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let now = Timestamp::now();
        let header = auth::sign_secp256k1(&first.key, &first.address, "GET", "/x", now).unwrap();
        assert_eq!(
            auth::verify(Some(&header), "GET", "/x", now),
            Ok(first.address)
        );
    }

    #[test]
    fn a_key_that_lotus_exported_is_read_and_junk_is_refused() {
        let export = |t: &str, k: &[u8]| {
            hex::encode(format!(
                r#"{{"Type":"{t}","PrivateKey":"{}"}}"#,
                STANDARD.encode(k)
            ))
        };
        assert!(ClientKey::parse(&export("secp256k1", &[7; 32])).is_ok());
        for (text, why) in [
            (export("bls", &[7; 32]), "bls"),
            (export("secp256k1", &[0; 32]), "not valid"),
            (export("secp256k1", &[7; 5]), "not valid"),
            ("zz".into(), "not hex"),
            (hex::encode("{}"), "Type"),
        ] {
            let e = ClientKey::parse(&text).err().unwrap();
            assert!(e.contains(why), "{e}");
        }
    }
}
