//! Running other programs.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use crate::Failed;

/// Runs a program in `dir`; an exit status other than zero is an error that names the command.
pub(crate) fn run<I, S>(dir: &Path, program: &str, args: I) -> Result<(), Failed>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = Command::new(program);
    command.current_dir(dir).args(args);
    forget_own_package(&mut command);
    let shown = format!("{command:?}");
    let status = command
        .status()
        .map_err(|e| Failed::new(format!("{program} does not start: {e}")))?;
    finished(&shown, status)
}

/// Like [`run`], with one variable more, and with all output on the standard error.
pub(crate) fn run_quietly<'a>(
    dir: &Path,
    program: &str,
    args: impl Iterator<Item = &'a str>,
    (name, value): (&str, &Path),
) -> Result<(), Failed> {
    let mut command = Command::new(program);
    command.current_dir(dir).args(args).env(name, value);
    command.stdout(std::io::stderr());
    forget_own_package(&mut command);
    let shown = format!("{command:?}");
    let status = command
        .status()
        .map_err(|e| Failed::new(format!("{program} does not start: {e}")))?;
    finished(&shown, status)
}

/// Like [`run`], and shows `each` every line of the standard output as it is passed on.
pub(crate) fn lines<I, S>(
    dir: &Path,
    program: &str,
    args: I,
    mut each: impl FnMut(&str),
) -> Result<(), Failed>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = Command::new(program);
    command.current_dir(dir).args(args).stdout(Stdio::piped());
    forget_own_package(&mut command);
    let shown = format!("{command:?}");
    let mut child = command
        .spawn()
        .map_err(|e| Failed::new(format!("{program} does not start: {e}")))?;
    let out = child.stdout.take().ok_or_else(|| Failed::new("no pipe"))?;
    for line in BufReader::new(out).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        each(&line);
    }
    finished(&shown, child.wait()?)
}

fn finished(shown: &str, status: ExitStatus) -> Result<(), Failed> {
    if status.success() {
        Ok(())
    } else {
        Err(Failed::new(format!("{status}: {shown}")))
    }
}

/// `cargo run` tells a program about its own package. A cargo below must not see that: some build
/// scripts (ring's) watch these variables, and half the workspace would be built again.
fn forget_own_package(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if [
            "CARGO_PKG_",
            "CARGO_MANIFEST_",
            "CARGO_BIN_",
            "CARGO_CRATE_",
            "CARGO_PRIMARY_",
        ]
        .iter()
        .any(|prefix| text.starts_with(prefix))
        {
            command.env_remove(&name);
        }
    }
}

/// Runs a program and returns its standard output.
pub(crate) fn output<I, S>(dir: &Path, program: &Path, args: I) -> Result<String, Failed>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let name = program.display();
    let out = Command::new(program)
        .current_dir(dir)
        .args(args)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| Failed::new(format!("{name} does not start: {e}")))?;
    if !out.status.success() {
        return Err(Failed::new(format!("{name}: {}", out.status)));
    }
    String::from_utf8(out.stdout).map_err(|e| Failed::new(format!("{name}: {e}")))
}

/// Runs a program and reads its standard output as JSON.
pub(crate) fn json<I, S>(dir: &Path, program: &str, args: I) -> Result<serde_json::Value, Failed>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let text = output(dir, Path::new(program), args)?;
    serde_json::from_str(&text).map_err(|e| Failed::new(format!("{program}: {e}")))
}

/// Becomes another program: its signals, its output and its exit status are ours.
pub(crate) fn exec<I, S>(exe: &Path, args: I) -> Result<(), Failed>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    use std::os::unix::process::CommandExt as _;
    let e = Command::new(exe).args(args).exec();
    Err(Failed::new(format!(
        "{} does not start: {e}",
        exe.display()
    )))
}
