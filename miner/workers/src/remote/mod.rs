//! Workers on other hosts: who they are, how they reach the hub, and how files travel.

pub(crate) mod agent;
mod copy;
pub(crate) mod files;
pub(crate) mod identity;
pub(crate) mod listen;
mod proof;
mod scratch;
mod tasks;
#[cfg(test)]
mod tests;
mod transfer;
