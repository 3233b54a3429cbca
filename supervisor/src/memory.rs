//! Memory of the supervisor itself.

use std::io;

/// Gives back the pages of programs and libraries that are mapped. A start goes through most of
/// them, what comes after through few; those come back from the page cache when they are needed.
pub(crate) fn give_back_code() -> io::Result<()> {
    for (start, len) in code(&std::fs::read_to_string("/proc/self/maps")?) {
        #[expect(
            unsafe_code,
            reason = "pages of a file that were never written are read again when they are needed"
        )]
        // SAFETY: see the reason above; `code` has no other pages.
        let done = unsafe {
            libc::madvise(
                std::ptr::without_provenance_mut(start),
                len,
                libc::MADV_DONTNEED,
            )
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Address and length of each mapping of a file that was never written, by `/proc/PID/maps`
/// (proc(5)): what can be run, and the constants before it, with which the file begins. Others that
/// are read-only now were written by the dynamic linker.
fn code(maps: &str) -> Vec<(usize, usize)> {
    let line = |line: &str| {
        let mut fields = line.split_whitespace();
        let (range, rights, offset) = (fields.next()?, fields.next()?, fields.next()?);
        let file = fields.nth(2)?;
        let first = u64::from_str_radix(offset, 16).ok()? == 0;
        let pure = rights == "r-xp" || (rights == "r--p" && first);
        if !pure || !file.starts_with('/') {
            return None;
        }
        let (start, end) = range.split_once('-')?;
        let start = usize::from_str_radix(start, 16).ok()?;
        let end = usize::from_str_radix(end, 16).ok()?;
        Some((start, end.checked_sub(start)?))
    };
    maps.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_comes_from_a_file_and_was_never_written() {
        let maps = "\
55d0c0000000-55d0c0400000 r--p 00000000 fd:00 7    /usr/bin/lotus-supervisor
55d0c0400000-55d0c0b00000 r-xp 00400000 fd:00 7    /usr/bin/lotus-supervisor (deleted)
55d0c0b00000-55d0c0b08000 r--p 00b00000 fd:00 7    /usr/bin/lotus-supervisor
55d0c0b08000-55d0c0b10000 rw-p 00b00000 fd:00 7    /usr/bin/lotus-supervisor
7f0000000000-7f0000010000 rwxp 00000000 00:00 0
7ffd00000000-7ffd00002000 r-xp 00000000 00:00 0    [vdso]
";
        let constants = (0x55d0_c000_0000, 0x40_0000);
        assert_eq!(code(maps), [constants, (0x55d0_c040_0000, 0x70_0000)]);
    }

    #[test]
    fn it_runs_on_without_them() {
        let before = code(&std::fs::read_to_string("/proc/self/maps").unwrap());
        assert!(!before.is_empty());
        give_back_code().unwrap();
        let after = code(&std::fs::read_to_string("/proc/self/maps").unwrap());
        assert_eq!(before, after);
    }
}
