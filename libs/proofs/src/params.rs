//! The parameter files of SNARKs: which ones a proof needs, where they are, whether they are the
//! right ones, and how those of 2 KiB sectors are made.
//!
//! Each [`Circuit`] of each sector size has two files: the proving parameters and the verifying
//! key. Aggregates have one file for all sizes, which serves as both. Networks work with published
//! ones, whose digests come with the proof library. Ones made here fit only each other: their proofs
//! hold nowhere else.

use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use bellperson::groth16::aggregate::setup_fake_srs;
use bellperson::groth16::{Parameters, generate_random_parameters};
use blstrs::{Bls12, Scalar};
use filecoin_hashers::poseidon::PoseidonHasher;
use filecoin_proofs::constants::DefaultPieceHasher;
use filecoin_proofs::parameters::{
    public_params, window_post_public_params, winning_post_public_params,
};
use lotus_types::SectorSize;
use rand_core::OsRng;
use serde::Serialize;
use storage_proofs_core::compound_proof::{CircuitComponent, CompoundProof};
use storage_proofs_core::merkle::MerkleTreeTrait;
use storage_proofs_core::parameter_cache::{
    ParameterSetMetadata, get_parameter_data_from_id, get_srs_parameter_data_from_id,
    parameter_cache_dir, parameter_cache_srs_key_path, parameter_id, verifying_key_id,
};
use storage_proofs_core::proof::ProofScheme;
use storage_proofs_porep::stacked::{StackedCircuit, StackedCompound, StackedDrg};
use storage_proofs_post::fallback::{FallbackPoSt, FallbackPoStCircuit, FallbackPoStCompound};
use storage_proofs_update::{
    EmptySectorUpdate, EmptySectorUpdateCircuit, EmptySectorUpdateCompound,
    PublicParams as UpdateParams,
};

use crate::network::{seal_config, window_config, winning_config, with_tree};
use crate::prove::{library, sync};
use crate::{ProofError, ProofMode};

/// The lock of a folder in which parameters are made.
const LOCK: &str = "lotus-hub-params.lock";
/// The end of an unfinished file's name.
const UNFINISHED: &str = "lotus-hub-unfinished";
/// The end of the name of the file that has the digests of parameters made here.
const MADE_HERE: &str = "made-here";

/// SNARKs in the largest aggregate by reference strings made here: 819 of 2 KiB sectors.
const MADE_HERE_SNARKS: usize = 1_024;

/// What a SNARK proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Circuit {
    /// A WindowPoSt.
    WindowPost,
    /// A WinningPoSt.
    WinningPost,
    /// A seal (PoRep).
    Seal,
    /// A replica update (snap deal).
    Update,
    /// Many seals at once: no circuit, but the reference string of the inner product argument,
    /// which is one for all sector sizes.
    Aggregate,
}

impl Circuit {
    /// Those of proofs of spacetime.
    pub const POST: [Self; 2] = [Self::WindowPost, Self::WinningPost];
    /// All.
    pub const ALL: [Self; 5] = [
        Self::WindowPost,
        Self::WinningPost,
        Self::Seal,
        Self::Update,
        Self::Aggregate,
    ];

    /// Those of a mode.
    #[must_use]
    pub const fn of(mode: ProofMode) -> &'static [Self] {
        match mode {
            ProofMode::Vanilla => &[],
            ProofMode::Groth16Post => &Self::POST,
            ProofMode::Groth16 => &Self::ALL,
        }
    }

    /// Its name for operators.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::WindowPost => "WindowPoSt",
            Self::WinningPost => "WinningPoSt",
            Self::Seal => "PoRep",
            Self::Update => "update",
            Self::Aggregate => "aggregate",
        }
    }
}

/// Where parameters come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// They are the published ones.
    Published,
    /// [`generate`] made them: good for a devnet on this machine.
    MadeHere,
}

/// How far [`generate`] is.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// These are there already.
    Have(&'a ParamSet),
    /// These are being made, for seconds or minutes.
    Making(&'a ParamSet),
    /// These are made, and on the disk.
    Made(&'a ParamSet),
}

/// The files of a circuit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ParamSet {
    /// What for.
    pub circuit: Circuit,
    /// For which sectors.
    pub size: SectorSize,
    /// The proving parameters.
    pub params: PathBuf,
    /// The verifying key, where it is another file.
    pub key: Option<PathBuf>,
}

/// Where parameter files are: `FIL_PROOFS_PARAMETER_CACHE`, else
/// `/var/tmp/filecoin-proof-parameters`. It is read once in the life of a process.
#[must_use]
pub fn folder() -> PathBuf {
    parameter_cache_dir()
}

/// The files of some circuits, whether they are there or not.
pub fn sets(
    dir: &Path,
    circuits: &[Circuit],
    size: SectorSize,
) -> Result<Vec<ParamSet>, ProofError> {
    let set = |circuit: &Circuit| {
        if *circuit == Circuit::Aggregate {
            return Ok(aggregate_set(dir, size));
        }
        let id = library("naming the parameters", || {
            with_tree!(size, recipe(*circuit, size, false))
        })?
        .id;
        Ok(ParamSet {
            circuit: *circuit,
            size,
            params: dir.join(parameter_id(&id)),
            key: Some(dir.join(verifying_key_id(&id))),
        })
    };
    circuits.iter().map(set).collect()
}

fn aggregate_set(dir: &Path, size: SectorSize) -> ParamSet {
    // The library's place is the same whatever it is asked for.
    let place = parameter_cache_srs_key_path("", 0);
    ParamSet {
        circuit: Circuit::Aggregate,
        size,
        params: dir.join(place.file_name().unwrap_or_default()),
        key: None,
    }
}

/// Refuses to go on without the files of these circuits. It looks at names only: see
/// [`ParamSet::verify`].
pub fn require(circuits: &[Circuit], size: SectorSize) -> Result<(), ProofError> {
    require_in(&folder(), circuits, size)
}

fn require_in(dir: &Path, circuits: &[Circuit], size: SectorSize) -> Result<(), ProofError> {
    let mut names = Vec::new();
    let mut seal = false;
    for set in sets(dir, circuits, size)? {
        let before = names.len();
        names.extend(set.missing().map(name));
        seal |= names.len() > before && !Circuit::POST.contains(&set.circuit);
    }
    if names.is_empty() {
        return Ok(());
    }
    Err(ProofError::NoParameters {
        dir: dir.to_owned(),
        size,
        names,
        seal,
    })
}

/// Refuses verifying keys other than the published ones, for networks that others are on.
pub fn require_published_keys(circuits: &[Circuit], size: SectorSize) -> Result<(), ProofError> {
    for set in sets(&folder(), circuits, size)? {
        let key = set.key.unwrap_or(set.params);
        if !is_published(&key)? {
            return Err(ProofError::BadParameters {
                path: key,
                why: "it is not the published verifying key",
            });
        }
    }
    Ok(())
}

impl ParamSet {
    /// Its files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        [Some(&self.params), self.key.as_ref()]
            .into_iter()
            .flatten()
            .map(PathBuf::as_path)
    }

    /// Those of its files that are not there.
    pub fn missing(&self) -> impl Iterator<Item = &Path> {
        self.files().filter(|p| !is_there(p))
    }

    /// Reads its files whole, and tells which ones they are. Anything else is refused: damaged
    /// files, and ones of unknown origin.
    pub fn verify(&self) -> Result<Origin, ProofError> {
        let note = self.made_here();
        let noted = fs::read_to_string(&note).unwrap_or_default();
        let mut noted = noted.split_whitespace();
        let mut origin = Origin::Published;
        for path in self.files() {
            let digest = digest(path)?;
            let made_here = noted.next() == Some(&digest);
            match published(path) {
                Some(theirs) if theirs == digest => {}
                _ if made_here => origin = Origin::MadeHere,
                _ => {
                    return Err(ProofError::BadParameters {
                        path: path.to_owned(),
                        why: "it is neither the published file nor as it was made here",
                    });
                }
            }
        }
        Ok(origin)
    }

    fn made_here(&self) -> PathBuf {
        self.params.with_added_extension(MADE_HERE)
    }
}

/// Makes the missing files of some circuits, which is possible for 2 KiB sectors only. Measured on
/// two cores: WinningPoSt 25 s, WindowPoSt 6 s, PoRep 11 minutes, 5 GB of memory and a file of
/// 1.1 GB. It may be killed at any point and run again; a file is there when it is whole.
pub fn generate(
    dir: &Path,
    size: SectorSize,
    circuits: &[Circuit],
    tell: &mut dyn FnMut(Progress<'_>),
) -> Result<(), ProofError> {
    if size != SectorSize::S2KiB {
        return Err(ProofError::Published(size));
    }
    fs::create_dir_all(dir).map_err(ProofError::io(dir))?;
    let lock_path = dir.join(LOCK);
    let lock = File::options()
        .create(true)
        .write(true)
        .truncate(false)
        .open(&lock_path)
        .map_err(ProofError::io(&lock_path))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(ProofError::ParametersBusy(dir.to_owned())),
        Err(TryLockError::Error(e)) => return Err(ProofError::io(&lock_path)(e)),
    }
    for set in sets(dir, circuits, size)? {
        if set.missing().next().is_none() {
            tell(Progress::Have(&set));
            continue;
        }
        refuse_half(&set)?;
        tell(Progress::Making(&set));
        make(dir, &set)?;
        tell(Progress::Made(&set));
    }
    Ok(())
}

/// Files of others are not overwritten: a half set may be about to be fetched.
fn refuse_half(set: &ParamSet) -> Result<(), ProofError> {
    let bad = |path: &Path, why| {
        Err(ProofError::BadParameters {
            path: path.to_owned(),
            why,
        })
    };
    if is_there(&set.params) {
        return bad(&set.params, "its verifying key is missing");
    }
    if let Some(key) = set.key.as_deref().filter(|k| is_there(k))
        && is_published(key)?
    {
        return bad(
            key,
            "it is the published key, which parameters made here would not fit; its own \
             parameters are missing. Use another folder, or fetch them",
        );
    }
    Ok(())
}

fn make(dir: &Path, set: &ParamSet) -> Result<(), ProofError> {
    let Some(key_file) = &set.key else {
        return make_aggregate(dir, set);
    };
    let recipe = library("making parameters", || {
        with_tree!(set.size, recipe(set.circuit, set.size, true))
    })?;
    let Some(made) = recipe.made else {
        unreachable!("the recipe was to be followed");
    };
    let params = unfinished(&set.params, |w| made.write(w))?;
    let key = unfinished(key_file, |w| made.vk.write(w))?;
    let digests = format!("{} {}\n", digest(&params)?, digest(&key)?);
    let note = set.made_here();
    let written = unfinished(&note, |w| w.write_all(digests.as_bytes()))?;
    // The parameters last: a set without them is not taken for one.
    for (from, to) in [(written, &note), (key, key_file), (params, &set.params)] {
        fs::rename(from, to).map_err(ProofError::io(to))?;
    }
    sync(dir)
}

fn make_aggregate(dir: &Path, set: &ParamSet) -> Result<(), ProofError> {
    let made = library("making the reference string", || {
        Ok(setup_fake_srs::<Bls12, _>(&mut OsRng, MADE_HERE_SNARKS))
    })?;
    let params = unfinished(&set.params, |mut w| made.write(&mut w))?;
    let digest = format!("{}\n", digest(&params)?);
    let note = set.made_here();
    let written = unfinished(&note, |w| w.write_all(digest.as_bytes()))?;
    for (from, to) in [(written, &note), (params, &set.params)] {
        fs::rename(from, to).map_err(ProofError::io(to))?;
    }
    sync(dir)
}

/// Writes what will be `path` beside it, and returns where.
fn unfinished(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<PathBuf, ProofError> {
    let at = path.with_added_extension(UNFINISHED);
    let done = || {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&at)?);
        write(&mut file)?;
        file.into_inner()?.sync_all()
    };
    done().map_err(ProofError::io(&at))?;
    Ok(at)
}

fn is_there(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() > 0)
}

fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// The digest that the published file of this name has.
fn published(path: &Path) -> Option<String> {
    let name = name(path);
    get_parameter_data_from_id(&name)
        .or_else(|| get_srs_parameter_data_from_id(&name))
        .map(|data| data.digest.clone())
}

fn is_published(path: &Path) -> Result<bool, ProofError> {
    Ok(published(path) == Some(digest(path)?))
}

/// BLAKE2b-512, of which the first 128 bits are published.
fn digest(path: &Path) -> Result<String, ProofError> {
    let mut hasher = blake2b_simd::State::new();
    File::open(path)
        .and_then(|mut file| io::copy(&mut file, &mut hasher))
        .map_err(ProofError::io(path))?;
    Ok(hasher.finalize().to_hex()[..32].to_owned())
}

/// The name of a circuit's parameters, and the parameters.
struct Recipe {
    id: String,
    made: Option<Parameters<Bls12>>,
}

/// Names a circuit's parameters, and makes them where asked to.
fn recipe<Tree: 'static + MerkleTreeTrait<Hasher = PoseidonHasher>>(
    circuit: Circuit,
    size: SectorSize,
    make: bool,
) -> anyhow::Result<Recipe> {
    match circuit {
        Circuit::WindowPost => {
            let params = window_post_public_params::<Tree>(&window_config(size))?;
            recipe_of::<FallbackPoStCompound<Tree>, FallbackPoSt<'_, Tree>, FallbackPoStCircuit<Tree>>(
                &params, make,
            )
        }
        Circuit::WinningPost => {
            let params = winning_post_public_params::<Tree>(&winning_config(size))?;
            recipe_of::<FallbackPoStCompound<Tree>, FallbackPoSt<'_, Tree>, FallbackPoStCircuit<Tree>>(
                &params, make,
            )
        }
        Circuit::Seal => {
            let params = public_params::<Tree>(&seal_config(size))?;
            recipe_of::<
                StackedCompound<Tree, DefaultPieceHasher>,
                StackedDrg<'_, Tree, DefaultPieceHasher>,
                StackedCircuit<Tree, DefaultPieceHasher>,
            >(&params, make)
        }
        Circuit::Update => {
            let params = UpdateParams::from_sector_size(size.bytes());
            recipe_of::<
                EmptySectorUpdateCompound<Tree>,
                EmptySectorUpdate<Tree>,
                EmptySectorUpdateCircuit<Tree>,
            >(&params, make)
        }
        Circuit::Aggregate => anyhow::bail!("an aggregate has no circuit"),
    }
}

fn recipe_of<'a, P, S, C>(params: &S::PublicParams, make: bool) -> anyhow::Result<Recipe>
where
    P: CompoundProof<'a, S, C>,
    S: ProofScheme<'a>,
    S::Proof: Sync + Send,
    S::PublicParams: ParameterSetMetadata + Sync + Send,
    S::PublicInputs: Clone + Sync,
    C: bellperson::Circuit<Scalar> + CircuitComponent + Send,
{
    let made = if make {
        let circuit = P::blank_circuit(params);
        Some(generate_random_parameters::<Bls12, _, _>(
            circuit, &mut OsRng,
        )?)
    } else {
        None
    };
    Ok(Recipe {
        id: P::cache_identifier(params),
        made,
    })
}

#[cfg(test)]
mod tests;
