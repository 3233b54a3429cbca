//! Layered configuration: defaults, then a TOML file, then credential files, then the environment.
//! Unknown keys are refused, so that a typo can not silently leave a default in force.
//!
//! A crate owns its section as a plain struct with `#[serde(default, deny_unknown_fields)]` and
//! one `impl Default`; that default is the only home of the number.

use std::path::{Path, PathBuf};

use lotus_types::Kind;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A configuration that can not be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file exists but can not be read.
    #[error("configuration {}: {why}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's words.
        why: String,
    },
    /// A key is unknown, or a value is of the wrong form.
    #[error("configuration{}: {why}", from.as_ref().map(|p| format!(" {}", p.display())).unwrap_or_default())]
    Wrong {
        /// The file, if there was one.
        from: Option<PathBuf>,
        /// The parser's words; they name the key.
        why: String,
    },
}

impl SettingsError {
    /// Who must act: always the operator.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        Kind::Config
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Unreadable { path, .. } => format!("make {} readable", path.display()),
            Self::Wrong { .. } => {
                "correct the key; `config default` prints every key with its default".into()
            }
        }
    }
}

/// Variable with the folder of credential files, as systemd sets it (`LoadCredential=`). A mounted
/// Kubernetes secret has the same form.
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";
/// Largest credential file, bytes.
const MAX_CREDENTIAL: u64 = 64 << 10;

/// Reads `C`: its defaults, overlaid by `file` if it exists, overlaid by the environment, where
/// `LOTUS_MINER__API__LISTEN` sets `listen` in `[api]` for the prefix `LOTUS_MINER`. A file of that name
/// in `$CREDENTIALS_DIRECTORY` is as good as a variable, and the variable wins: so a token need be
/// neither in the configuration nor in the environment, which child processes and dumps show.
pub fn load<C: Serialize + DeserializeOwned + Default>(
    file: Option<&Path>,
    env_prefix: &str,
) -> Result<C, SettingsError> {
    load_from(file, env_prefix, std::env::vars().collect())
}

fn load_from<C: Serialize + DeserializeOwned + Default>(
    file: Option<&Path>,
    env_prefix: &str,
    env: Vec<(String, String)>,
) -> Result<C, SettingsError> {
    let from = file.filter(|p| p.exists()).map(Path::to_owned);
    let wrong = |why: String| SettingsError::Wrong {
        from: from.clone(),
        why,
    };
    let mut builder = config::Config::builder().add_source(config::File::from_str(
        &default_toml::<C>(),
        config::FileFormat::Toml,
    ));
    if let Some(path) = &from {
        let text = std::fs::read_to_string(path).map_err(|e| SettingsError::Unreadable {
            path: path.clone(),
            why: e.to_string(),
        })?;
        // Parsed once for its own sake: the parser names line and column.
        toml::from_str::<toml::Table>(&text).map_err(|e| wrong(e.to_string()))?;
        builder = builder.add_source(config::File::from_str(&text, config::FileFormat::Toml));
    }
    // The environment is text; each value takes the type of the default that it replaces.
    let dir = env.iter().find(|(name, _)| name == CREDENTIALS);
    let mut ours = match dir {
        Some((_, dir)) => credentials(Path::new(dir), env_prefix)?,
        None => Vec::new(),
    };
    let named = |(name, _): &(String, String)| is_ours(name, env_prefix);
    ours.extend(env.into_iter().filter(named));
    for (name, value) in ours {
        let key = name[env_prefix.len() + 2..]
            .to_ascii_lowercase()
            .replace("__", ".");
        let parsed = toml::from_str::<toml::Table>(&format!("v = {value}"))
            .ok()
            .and_then(|mut t| t.remove("v"))
            .filter(|v| !v.is_str());
        let value = match parsed {
            Some(parsed) => value_of(parsed),
            None => value.trim_matches('"').to_owned().into(),
        };
        builder = builder
            .set_override(&key, value)
            .map_err(|e| wrong(format!("{name}: {e}")))?;
    }
    builder
        .build()
        .and_then(config::Config::try_deserialize)
        .map_err(|e| wrong(e.to_string()))
}

fn is_ours(name: &str, env_prefix: &str) -> bool {
    let rest = name.strip_prefix(env_prefix);
    rest.is_some_and(|rest| rest.starts_with("__"))
}

/// Names and values of the credential files of this prefix. Others are somebody else's.
fn credentials(dir: &Path, env_prefix: &str) -> Result<Vec<(String, String)>, SettingsError> {
    let unreadable = |path: &Path, why: String| SettingsError::Unreadable {
        path: path.to_owned(),
        why,
    };
    let failed = |e: std::io::Error| unreadable(dir, e.to_string());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (name, path) = (entry.file_name(), entry.path());
        let Some(name) = name.to_str().filter(|name| is_ours(name, env_prefix)) else {
            continue;
        };
        let read = || {
            if std::fs::metadata(&path)?.len() > MAX_CREDENTIAL {
                return Err(std::io::Error::other("it is larger than 64 KiB"));
            }
            std::fs::read_to_string(&path)
        };
        let value = read().map_err(|e| unreadable(&path, e.to_string()))?;
        found.push((
            name.to_owned(),
            value.trim_end_matches(['\r', '\n']).to_owned(),
        ));
    }
    Ok(found)
}

/// A value of TOML as the configuration library has it.
fn value_of(value: toml::Value) -> config::Value {
    match value {
        toml::Value::String(s) => s.into(),
        toml::Value::Integer(i) => i.into(),
        toml::Value::Float(f) => f.into(),
        toml::Value::Boolean(b) => b.into(),
        toml::Value::Datetime(d) => d.to_string().into(),
        toml::Value::Array(all) => all.into_iter().map(value_of).collect::<Vec<_>>().into(),
        toml::Value::Table(all) => {
            let entries = all.into_iter().map(|(k, v)| (k, value_of(v)));
            entries.collect::<config::Map<_, _>>().into()
        }
    }
}

/// Every key with its default, as TOML.
#[must_use]
pub fn default_toml<C: Serialize + Default>() -> String {
    toml::to_string_pretty(&C::default()).expect("a configuration struct is a TOML table")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Api {
        listen: String,
        drain_secs: u64,
        peers: Vec<String>,
        ports: Vec<u16>,
        on: bool,
    }
    impl Default for Api {
        fn default() -> Self {
            Self {
                listen: "127.0.0.1:1".into(),
                drain_secs: 30,
                peers: vec![],
                ports: vec![],
                on: false,
            }
        }
    }
    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct All {
        api: Api,
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let f = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(f.path(), text).unwrap();
        f
    }

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect()
    }

    #[test]
    fn later_layers_win() {
        let f = file("[api]\ndrain_secs = 5\n");
        let none: All = load_from(None, "T", vec![]).unwrap();
        assert_eq!(none, All::default());
        let c: All = load_from(Some(f.path()), "T", vec![]).unwrap();
        assert_eq!((c.api.drain_secs, c.api.on), (5, false));
        let over = env(&[
            ("T__API__DRAIN_SECS", "7"),
            ("T__API__LISTEN", "[::1]:9"),
            ("T__API__PEERS", "[\"a\", \"b\"]"),
            ("T__API__PORTS", "[80, 443]"),
            ("T__API__ON", "true"),
            ("OTHER__API__DRAIN_SECS", "99"),
        ]);
        let c: All = load_from(Some(f.path()), "T", over).unwrap();
        assert_eq!(c.api.drain_secs, 7);
        assert_eq!(c.api.listen, "[::1]:9");
        assert_eq!(c.api.peers, ["a", "b"]);
        assert_eq!(c.api.ports, [80, 443]);
        assert!(c.api.on);
    }

    #[test]
    fn a_credential_file_is_as_good_as_a_variable_and_the_variable_wins() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        put("T__API__LISTEN", "token:/ip4/127.0.0.1/tcp/1/http\n");
        put("T__API__DRAIN_SECS", "7");
        put("OTHER__API__ON", "true");
        put("T_API_ON", "true");
        let at = dir.path().to_str().unwrap();
        let f = file("[api]\nlisten = \"from the file\"\n");
        let over = env(&[(CREDENTIALS, at), ("T__API__DRAIN_SECS", "9")]);
        let c: All = load_from(Some(f.path()), "T", over.clone()).unwrap();
        assert_eq!(c.api.listen, "token:/ip4/127.0.0.1/tcp/1/http");
        assert_eq!((c.api.drain_secs, c.api.on), (9, false));

        put("T__API__LISTEN", &"x".repeat(70_000));
        let e = load_from::<All>(None, "T", over).unwrap_err();
        assert!(e.to_string().contains("larger than"), "{e}");
        let gone = env(&[(CREDENTIALS, "/nowhere")]);
        assert!(load_from::<All>(None, "T", gone).is_err());
    }

    #[test]
    fn mistakes_name_the_key() {
        for (text, word) in [
            ("[api]\nlisten_on = \"x\"\n", "listen_on"),
            ("[apis]\n", "apis"),
            ("[api]\ndrain_secs = \"soon\"\n", "drain_secs"),
            ("[api\n", "line 1"),
        ] {
            let f = file(text);
            let e = load_from::<All>(Some(f.path()), "T", vec![]).unwrap_err();
            assert!(e.to_string().contains(word), "{text:?} gave {e}");
            assert_eq!(e.kind(), Kind::Config);
        }
        let e = load_from::<All>(None, "T", env(&[("T__API__DRAIN", "7")])).unwrap_err();
        assert!(e.to_string().contains("drain"), "{e}");
    }
}
