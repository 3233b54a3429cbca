use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use libp2p_identity::Keypair;
use lotus_runtime::Fault;
use lotus_types::Kind;

/// The key that names this provider to indexers: made on first use, kept from then on.
pub(crate) fn load(path: &Path) -> Result<Keypair, Fault> {
    let bad = |why: String| {
        Fault::new(
            Kind::Config,
            format!("the key {} cannot be used: {why}", path.display()),
            "restore it from a backup; without it every piece is advertised anew under another name",
        )
    };
    match fs::read(path) {
        Ok(bytes) => Keypair::from_protobuf_encoding(&bytes).map_err(|e| bad(e.to_string())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let key = Keypair::generate_ed25519();
            let bytes = key.to_protobuf_encoding().map_err(|e| bad(e.to_string()))?;
            let tmp = path.with_extension("tmp");
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&tmp)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&tmp, path)?;
            Ok(key)
        }
        Err(e) => Err(bad(e.to_string())),
    }
}
