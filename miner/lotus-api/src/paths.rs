//! Where sectors are, as Lotus asks about it.

use lotus_types::{ActorId, SectorId, SectorNumber};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::RpcError;
use crate::methods::Context;
use crate::types::{StorageInfo, uuid_of};
use crate::{Hub, StoragePath};

/// Lotus' bit of unsealed data. Source: lotus storage/sealer/storiface/filetype.go.
const UNSEALED: u32 = 1;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Id {
    miner: u64,
    number: u64,
}

/// An `abi.SectorID` of this miner.
pub(crate) fn sector_id(hub: &dyn Hub, id: &Value) -> Result<SectorId, RpcError> {
    let id: Id = serde_json::from_value(id.clone())
        .map_err(|e| RpcError::failed(format!("no sector id: {e}")))?;
    if ActorId(id.miner) != hub.miner() {
        let miner = hub.miner();
        return Err(RpcError::failed(format!("this hub is of miner {miner}")));
    }
    Ok(SectorId {
        miner: ActorId(id.miner),
        number: SectorNumber(id.number),
    })
}

/// `storiface.SectorStorageInfo`: a path that has files of a sector.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Found {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "URLs")]
    urls: Vec<String>,
    #[serde(rename = "BaseURLs")]
    base_urls: Vec<String>,
    weight: u64,
    can_seal: bool,
    can_store: bool,
    primary: bool,
    allow_types: Vec<String>,
    deny_types: Vec<String>,
    allow_miners: Vec<String>,
    deny_miners: Vec<String>,
}

/// The paths that have files of these kinds. Raw pieces are in the hub's own folder, which is no
/// storage path but is named as one, because here is where they can be read.
pub(crate) fn find(
    cx: &Context,
    sector: SectorId,
    files: u32,
    base: &str,
) -> Result<Vec<Found>, RpcError> {
    let mut found = Vec::new();
    if files & UNSEALED != 0
        && let Some(record) = cx.hub.sector(sector.number)?
    {
        let mut pieces = record.sector.pieces.iter();
        if pieces.any(|p| cx.hub.raw_file(&p.piece.cid).is_some()) {
            found.push(Found {
                id: uuid_of("pieces", &cx.hub.miner().to_string()).to_string(),
                urls: vec![format!("{base}/remote/unsealed/{sector}")],
                base_urls: vec![format!("{base}/remote")],
                weight: 0,
                can_seal: false,
                can_store: true,
                primary: true,
                allow_types: vec!["unsealed".into()],
                deny_types: Vec::new(),
                allow_miners: Vec::new(),
                deny_miners: Vec::new(),
            });
        }
    }
    for path in cx.hub.storage() {
        let has = path.sectors.iter();
        if !has
            .filter(|(id, _)| *id == sector)
            .any(|(_, held)| held & files != 0)
        {
            continue;
        }
        let s = path.settings;
        let list = |f: fn(&lotus_sealing::PathMeta) -> &Vec<String>| {
            s.as_ref().map(|s| f(s).clone()).unwrap_or_default()
        };
        found.push(Found {
            // Other hosts can not fetch these files from here.
            urls: Vec::new(),
            base_urls: Vec::new(),
            weight: s.as_ref().map_or(0, |s| s.weight),
            can_seal: s.as_ref().is_some_and(|s| s.can_seal),
            can_store: s.as_ref().is_some_and(|s| s.can_store),
            primary: true,
            allow_types: list(|s| &s.allow_types),
            deny_types: list(|s| &s.deny_types),
            allow_miners: list(|s| &s.allow_miners),
            deny_miners: list(|s| &s.deny_miners),
            id: path.id,
        });
    }
    Ok(found)
}

/// What new files are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// `sealing`.
    Seal,
    /// `storage`.
    Store,
}

impl Purpose {
    pub(crate) fn read(text: &str) -> Result<Self, RpcError> {
        match text {
            "sealing" => Ok(Self::Seal),
            "storage" => Ok(Self::Store),
            _ => Err(RpcError::failed(format!(
                "a path is for \"sealing\" or \"storage\", not for {text:?}"
            ))),
        }
    }
}

/// The paths that take new files, the best first: by weight times room. Source: lotus
/// storage/paths/index.go, `StorageBestAlloc`.
pub(crate) fn best(
    paths: Vec<StoragePath>,
    bytes: u64,
    purpose: Purpose,
    miner: ActorId,
) -> Result<Vec<StorageInfo>, RpcError> {
    let name = miner.to_string();
    let mut fit: Vec<(u128, StoragePath)> = Vec::new();
    for path in paths {
        let Some(s) = path.settings.as_ref().filter(|_| path.takes_new) else {
            continue;
        };
        let may = match purpose {
            Purpose::Seal => s.can_seal,
            Purpose::Store => s.can_store,
        };
        let allowed = s.allow_miners.is_empty() || s.allow_miners.contains(&name);
        let room = path.room();
        if may && s.weight > 0 && allowed && !s.deny_miners.contains(&name) && room >= bytes {
            fit.push((u128::from(s.weight) * u128::from(room), path));
        }
    }
    if fit.is_empty() {
        return Err(RpcError::failed("no good path found"));
    }
    // Of equals the first, so that the answer does not change by itself.
    fit.sort_by_key(|(value, _)| std::cmp::Reverse(*value));
    Ok(fit.into_iter().map(|(_, p)| StorageInfo::new(p)).collect())
}

/// Looks at a path anew, and says whether it has these files of a sector. The disk is believed,
/// and nobody's word.
pub(crate) async fn has(
    cx: &Context,
    path: &str,
    sector: SectorId,
    files: u32,
) -> Result<bool, RpcError> {
    if !cx.hub.storage().iter().any(|p| p.id == path) {
        return Err(RpcError::failed(format!("no storage path {path}")));
    }
    cx.hub.redeclare(Some(path.to_owned())).await?;
    let paths = cx.hub.storage();
    let held = paths
        .iter()
        .filter(|p| p.id == path)
        .flat_map(|p| &p.sectors);
    let mut held = held.filter(|(id, _)| *id == sector);
    Ok(held.any(|(_, held)| held & files != 0))
}

/// Whether a lock would be given. A reader needs none: it reads through open files, which stay
/// whole while it has them, and nothing of a sector is changed over this API. So nothing is held
/// for a caller, and none that is away can hold up the hub.
pub(crate) fn may_lock(hub: &dyn Hub, sector: SectorId, write: u32) -> Result<bool, RpcError> {
    if hub.sector(sector.number)?.is_none() {
        let number = sector.number;
        return Err(RpcError::failed(format!("sector {number} not found")));
    }
    Ok(write == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_best_path_is_first_and_those_that_may_not_are_left_out() {
        let path = |id: &str, settings: Value, available: u64, takes_new: bool| {
            let mut settings = settings;
            settings["ID"] = id.into();
            StoragePath {
                id: id.into(),
                path: "/".into(),
                settings: Some(serde_json::from_value(settings).unwrap()),
                capacity: 1000,
                available,
                reserved: 100,
                used: 0,
                takes_new,
                sectors: Vec::new(),
            }
        };
        let seal = |weight: u64| json!({"Weight": weight, "CanSeal": true});
        let paths = || {
            vec![
                path("small", seal(1), 300, true),
                path("heavy", seal(9), 300, true),
                path("full", seal(9), 150, true),
                path(
                    "limited",
                    json!({"Weight": 9, "CanSeal": true, "MaxStorage": 150}),
                    900,
                    true,
                ),
                path("sick", seal(9), 900, false),
                path("unwanted", seal(0), 900, true),
                path("store", json!({"Weight": 1, "CanStore": true}), 900, true),
                path(
                    "others",
                    json!({"Weight": 9, "CanSeal": true, "DenyMiners": ["t01000"]}),
                    900,
                    true,
                ),
            ]
        };
        let ids = |bytes, purpose| {
            let found = best(paths(), bytes, purpose, ActorId(1000))?;
            let json = serde_json::to_value(found).unwrap();
            let ids = json.as_array().unwrap().iter();
            Ok::<_, RpcError>(
                ids.map(|p| p["ID"].as_str().unwrap().to_owned())
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(ids(100, Purpose::Seal).unwrap(), ["heavy", "small"]);
        assert_eq!(ids(100, Purpose::Store).unwrap(), ["store"]);
        assert_eq!(
            ids(801, Purpose::Seal).unwrap_err().to_string(),
            "no good path found"
        );
        assert!(Purpose::read("fetching").is_err());
    }
}
