//! Generates the Rust code of the gRPC contracts. Uses protox, so that no `protoc` is needed.

use std::path::{Path, PathBuf};

use prost::Message as _;

use crate::Failed;

/// A crate with `.proto` files, the files, and whether it serves reflection.
const CONTRACTS: [(&str, &[&str], bool); 2] = [
    (
        "hub-proto",
        &["hub/v1/hub.proto", "hub/v1/worker.proto"],
        true,
    ),
    ("supervisor", &["supervisor/v1/supervisor.proto"], false),
];

/// Writes `CRATE/src/gen` of every contract below `out`.
pub(crate) fn generate(root: &Path, out: &Path) -> Result<(), Failed> {
    for (name, protos, reflection) in CONTRACTS {
        let include = root.join(name).join("proto");
        let out = out.join(name).join("src/gen");
        let descriptors = protox::compile(protos, [&include])
            .map_err(|e| Failed::new(format!("{name}: the .proto files do not compile: {e:?}")))?;
        std::fs::create_dir_all(&out)?;
        if reflection {
            std::fs::write(out.join("descriptor.bin"), descriptors.encode_to_vec())?;
        }
        tonic_prost_build::configure()
            .build_server(true)
            .build_client(true)
            .build_transport(false)
            .emit_rerun_if_changed(false)
            .out_dir(&out)
            .compile_fds(descriptors)?;
        let files: Vec<PathBuf> = std::fs::read_dir(&out)?
            .filter_map(|e| Some(e.ok()?.path()))
            .filter(|p| p.extension().is_some_and(|x| x == "rs"))
            .collect();
        crate::sh::run(
            root,
            "rustfmt",
            ["--edition", "2024"]
                .into_iter()
                .map(std::ffi::OsStr::new)
                .chain(files.iter().map(|p| p.as_os_str())),
        )?;
    }
    Ok(())
}

/// The generated files below `out`, relative to it.
pub(crate) fn outputs(out: &Path) -> Result<Vec<PathBuf>, Failed> {
    let mut all = Vec::new();
    for (name, _, _) in CONTRACTS {
        let dir = Path::new(name).join("src/gen");
        for entry in std::fs::read_dir(out.join(&dir))? {
            all.push(dir.join(entry?.file_name()));
        }
    }
    Ok(all)
}
