//! What `lotus-probe` is asked to try from inside a sandbox, and what it answers.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Instead of an errno: the other side closed the connection without a word.
pub const SILENT: i32 = -1000;

/// Something that a spoke in a sandbox may not do, or must be able to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attempt {
    /// Reads a byte of a file.
    Read(PathBuf),
    /// Lists a folder.
    List(PathBuf),
    /// Makes a file, and removes it.
    Write(PathBuf),
    /// Runs a program.
    Execute(PathBuf),
    /// Connects.
    Connect(SocketAddr),
    /// Connects by sending, without connect(2).
    FastOpen(SocketAddr),
    /// Makes a socket of multipath TCP.
    Multipath,
    /// Makes a socket of this family.
    Family(i32),
    /// Listens.
    Bind(SocketAddr),
    /// Asks whoever listens on a Unix socket for HTTP/2.
    Talk(PathBuf),
    /// Calls the hub at its socket as the operator's processes do, without an identity.
    Order(PathBuf),
    /// Sends signal 0, which is a question only.
    Signal(u32),
    /// Attaches as a debugger.
    Trace(u32),
    /// Reads the memory of another process.
    ReadMemory(u32),
    /// Sets the resource limits of another process.
    Limit(u32),
    /// Sets the priority of another process.
    Priority(u32),
    /// Makes a system call without sensible arguments.
    Call(i64),
    /// Makes a system call by its number in another table of the same architecture.
    OtherTable,
    /// Looks for a variable of its environment.
    Variable(String),
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// What was tried.
    pub attempt: Attempt,
    /// 0 if it worked, [`SILENT`], minus the signal that ended it, or an errno.
    pub errno: i32,
}
