//! Which loader a program asks for.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// Longest path of a loader.
const LONGEST: usize = 4096;
/// Most program headers that are looked at.
const HEADERS: u16 = 128;
const PT_INTERP: u32 = 3;

/// The loader that the kernel runs for `program`; none for one that is linked statically.
pub(super) fn loader(program: &Path) -> io::Result<Option<PathBuf>> {
    let file = File::open(program)?;
    let read = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).ok()?;
        Some(bytes)
    };
    Ok(interpreter(read))
}

/// Reads a 64-bit little-endian ELF file through `read(offset, len)`. Source: elf(5).
fn interpreter(read: impl Fn(u64, usize) -> Option<Vec<u8>>) -> Option<PathBuf> {
    let header = read(0, 64)?;
    if header.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (table, size, count) = (
        u64_at(&header, 32)?,
        u16_at(&header, 54)?,
        u16_at(&header, 56)?,
    );
    for n in 0..count.min(HEADERS) {
        let at = table.checked_add(u64::from(n) * u64::from(size))?;
        let entry = read(at, 56)?;
        if u32_at(&entry, 0)? != PT_INTERP {
            continue;
        }
        let len = usize::try_from(u64_at(&entry, 32)?).ok()?;
        let text = read(u64_at(&entry, 8)?, len.min(LONGEST))?;
        let path = text.split(|b| *b == 0).next()?;
        return (!path.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(path)));
    }
    None
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_of_this_very_program_is_there() {
        let us = std::env::current_exe().unwrap();
        if let Some(path) = loader(&us).unwrap() {
            assert!(path.is_absolute() && path.exists(), "{path:?}");
        }
    }

    #[test]
    fn what_is_no_program_has_none() {
        let read = |file: Vec<u8>| {
            interpreter(move |at, len| {
                let at = usize::try_from(at).ok()?;
                Some(file.get(at..at.checked_add(len)?)?.to_vec())
            })
        };
        assert_eq!(read(Vec::new()), None);
        assert_eq!(read(b"#!/bin/sh\n".repeat(20)), None);
        let mut elf = vec![0u8; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        assert_eq!(read(elf.clone()), None, "no headers");
        // One header, far outside of the file, and then a size that is too large.
        elf[56] = 1;
        elf[54] = 56;
        elf[39] = 0xff;
        assert_eq!(read(elf.clone()), None);
        elf[39] = 0;
        elf[32] = 64;
        let mut entry = vec![0u8; 56];
        entry[0] = 3;
        entry[8] = 120;
        entry[32] = 9;
        elf.extend(entry);
        elf.extend(b"/ld.so\0xx");
        assert_eq!(read(elf.clone()), Some("/ld.so".into()));
        elf[64 + 39] = 0xff;
        assert_eq!(read(elf), None);
    }
}
