//! Generates the Rust code of the hub contract. Uses protox, so that no `protoc` is needed.

use std::path::{Path, PathBuf};

use prost::Message as _;

use crate::Failed;

const PROTOS: [&str; 2] = ["hub/v1/hub.proto", "hub/v1/worker.proto"];

/// Writes the generated files of `hub-proto` below `out`.
pub(crate) fn generate(root: &Path, out: &Path) -> Result<(), Failed> {
    let include = root.join("hub-proto/proto");
    let descriptors = protox::compile(PROTOS, [&include])
        .map_err(|e| Failed::new(format!("the .proto files do not compile: {e:?}")))?;
    std::fs::create_dir_all(out)?;
    std::fs::write(out.join("descriptor.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_server(true)
        .build_client(true)
        .build_transport(false)
        .emit_rerun_if_changed(false)
        .out_dir(out)
        .compile_fds(descriptors)?;
    let files: Vec<PathBuf> = std::fs::read_dir(out)?
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
    )
}
