//! What a spoke keeps of its identity, and how it gets there from a bundle.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lotus_runtime::Fault;
use lotus_types::Kind;
use rcgen::{KeyPair, PublicKeyData as _};
use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, TrustAnchor};
use serde::{Deserialize, Serialize};

use crate::certificate::{Facts, Holder, Window, broken, facts, fingerprint, unix_ms};
use crate::secret::{Secret, der};
use crate::{Bundle, CLOCK_SKEW, Caller, Credential, client_config, files};

const FILE: &str = "identity.json";
/// Largest file that is read, bytes.
const LIMIT: u64 = 64 << 10;
/// Room for the text of one, bytes.
const ROOM: usize = 16 << 10;

/// A spoke's identity, kept in a directory of its own for the spoke's user alone: whom it trusts,
/// its key, and its latest certificate.
pub struct Held {
    file: PathBuf,
    kept: Kept,
    public_key: Vec<u8>,
}

/// What is in the file.
#[derive(Clone, Serialize, Deserialize)]
struct Kept {
    hub: String,
    caller: Caller,
    #[serde(with = "der")]
    authority: CertificateDer<'static>,
    /// Fingerprint of the bundle's certificate, and when that was made.
    invitation: String,
    invited_unix_ms: u64,
    /// The spoke's own key, PKCS #8. It never leaves this directory.
    key: Secret,
    stage: Stage,
}

/// How far it got.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Stage {
    /// Has a key, which may or may not be registered: whoever joins asks for the same one until
    /// there is an answer.
    Joining {
        #[serde(with = "der")]
        certificate: CertificateDer<'static>,
        key: Secret,
    },
    /// Has a certificate. The bundle's is of no use any more.
    Joined {
        #[serde(with = "der")]
        certificate: CertificateDer<'static>,
        /// By this host's clock.
        expires_unix_ms: u64,
    },
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Kept { caller, hub, .. } = &self.kept;
        write!(f, "Held({caller} for {hub})")
    }
}

impl Held {
    /// The identity in `dir`. With a bundle that is newer than what is there, starts anew from the
    /// bundle: a key is made, and on disk before anything is asked. A bundle that what is there
    /// came from, or that is older, or gone, changes nothing.
    pub fn open(dir: &Path, bundle: Option<&Path>) -> Result<Self, Fault> {
        let bundle = match bundle {
            // It was for the first start.
            Some(path) if Self::is_in(dir) && gone(path) => None,
            Some(path) => Some(Bundle::read(path)?),
            None => None,
        };
        Self::start(dir, bundle)
    }

    /// Whether there is an identity in `dir`.
    #[must_use]
    pub fn is_in(dir: &Path) -> bool {
        dir.join(FILE).exists()
    }

    /// The same with a bundle that was read, or just made.
    pub fn start(dir: &Path, bundle: Option<Bundle>) -> Result<Self, Fault> {
        files::make_dir(dir)?;
        let file = dir.join(FILE);
        let kept = match (read(&file)?, bundle) {
            (Some(kept), Some(bundle)) if !newer(&bundle, &kept)? => kept,
            (_, Some(bundle)) => {
                let key = KeyPair::generate().map_err(|e| broken(&e))?;
                let kept = Kept::new(bundle, Secret::new(key.serialize_der()));
                write(&file, &kept)?;
                kept
            }
            (Some(kept), None) => kept,
            (None, None) => {
                return Err(Fault::new(
                    Kind::Config,
                    format!("{} has no identity of a spoke", dir.display()),
                    "make a join bundle on the hub with `lotus-miner join-bundle`, copy it here, \
                     and start with it",
                ));
            }
        };
        let public_key = KeyPair::try_from(kept.key.bytes())
            .map_err(|e| bad(&file, &e))?
            .subject_public_key_info();
        Ok(Self {
            file,
            kept,
            public_key,
        })
    }

    /// Who it is.
    #[must_use]
    pub fn caller(&self) -> &Caller {
        &self.kept.caller
    }

    /// Where the hub listens: `host:port`, or `unix:/path` on this host.
    #[must_use]
    pub fn hub(&self) -> &str {
        &self.kept.hub
    }

    /// Whether it has a credential, be it expired. Until then it can ask for one, and nothing else.
    #[must_use]
    pub fn has_joined(&self) -> bool {
        matches!(self.kept.stage, Stage::Joined { .. })
    }

    /// The key to ask a credential for, SubjectPublicKeyInfo.
    #[must_use]
    pub fn public_key(&self) -> Vec<u8> {
        self.public_key.clone()
    }

    /// Keeps a credential, if it is of our authority, for us and for our key.
    pub fn accept(&mut self, credential: Credential) -> Result<(), Fault> {
        let certificate = CertificateDer::from(credential.certificate);
        let said = facts(&certificate, &anchor(&self.kept.authority)?);
        let said = said.map_err(|_| self.foreign("it is not of our authority"))?;
        if said.holder != Holder::Spoke(self.kept.caller.clone()) {
            return Err(self.foreign("it is of somebody else"));
        }
        if said.public_key != self.public_key {
            return Err(self.foreign("it is for another key"));
        }
        let kept = Kept {
            stage: Stage::Joined {
                certificate,
                expires_unix_ms: local_end(SystemTime::now(), &said),
            },
            ..self.kept.clone()
        };
        write(&self.file, &kept)?;
        self.kept = kept;
        Ok(())
    }

    /// When the credential ends. By this host's clock, counted from when it was accepted: the
    /// hub's may be another.
    #[must_use]
    pub fn expires(&self) -> Option<SystemTime> {
        match &self.kept.stage {
            Stage::Joining { .. } => None,
            Stage::Joined {
                expires_unix_ms, ..
            } => UNIX_EPOCH.checked_add(Duration::from_millis(*expires_unix_ms)),
        }
    }

    /// TLS of a connection to the hub: with the bundle's certificate until it has joined, and then
    /// with the latest credential. To be made anew after [`Held::accept`].
    pub fn client_config(&self, alpn: &[&[u8]]) -> Result<ClientConfig, Fault> {
        let (certificate, key) = match &self.kept.stage {
            Stage::Joining { certificate, key } => (certificate, key),
            Stage::Joined { certificate, .. } => (certificate, &self.kept.key),
        };
        let authority = self.kept.authority.clone();
        client_config(authority, certificate.clone(), key.private_key(), alpn)
    }

    fn foreign(&self, why: &str) -> Fault {
        Fault::new(
            Kind::Data,
            format!("the hub at {} gave a credential, but {why}", self.kept.hub),
            "look who answers at that address; make a new join bundle on the hub",
        )
    }
}

impl Kept {
    fn new(bundle: Bundle, key: Secret) -> Self {
        Self {
            invitation: fingerprint(&bundle.certificate),
            hub: bundle.hub,
            caller: bundle.caller,
            authority: bundle.authority,
            invited_unix_ms: bundle.invited_unix_ms,
            key,
            stage: Stage::Joining {
                certificate: bundle.certificate,
                key: bundle.key,
            },
        }
    }
}

/// Whether to start anew: the bundle is of another authority, or a later invitation of the same.
fn newer(bundle: &Bundle, kept: &Kept) -> Result<bool, Fault> {
    if fingerprint(&bundle.certificate) == kept.invitation {
        return Ok(false);
    }
    // An authority is its key: its certificate is another one in each bundle.
    let (theirs, ours) = (anchor(&bundle.authority)?, anchor(&kept.authority)?);
    if theirs.subject_public_key_info != ours.subject_public_key_info {
        return Ok(true);
    }
    let later = bundle.invited_unix_ms > kept.invited_unix_ms || bundle.caller != kept.caller;
    if !later {
        tracing::warn!(caller = %kept.caller, "not used: the join bundle is older than what is held");
    }
    Ok(later)
}

/// When a credential that was accepted now ends, by the clock that says when now is.
fn local_end(now: SystemTime, said: &Facts) -> u64 {
    let Window { from, to } = said.window;
    let begun = from.saturating_add(CLOCK_SKEW.as_secs());
    let life = to.saturating_sub(begun).saturating_mul(1000);
    unix_ms(now).saturating_add(life)
}

fn anchor(authority: &CertificateDer<'static>) -> Result<TrustAnchor<'static>, Fault> {
    let anchor = webpki::anchor_from_trusted_cert(authority).map_err(|e| broken(&e))?;
    Ok(anchor.to_owned())
}

fn gone(path: &Path) -> bool {
    matches!(fs::metadata(path), Err(e) if e.kind() == io::ErrorKind::NotFound)
}

fn read(file: &Path) -> Result<Option<Kept>, Fault> {
    let text = match files::read(file, LIMIT) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => Secret::new(text.map_err(|e| files::naming(file, &e))?),
    };
    let kept = serde_json::from_slice(text.bytes());
    kept.map(Some).map_err(|e| bad(file, &e))
}

fn write(file: &Path, kept: &Kept) -> Result<(), Fault> {
    let text = Secret::json(kept, ROOM).map_err(|e| broken(&e))?;
    Ok(files::replace(file, text.bytes())?)
}

fn bad(file: &Path, e: &dyn fmt::Display) -> Fault {
    Fault::new(
        Kind::Config,
        format!("{} is no identity of a spoke: {e}", file.display()),
        "delete it, make a join bundle on the hub with `lotus-miner join-bundle`, and start with it",
    )
}
