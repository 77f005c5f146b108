//! Memory that is there when it is needed: while a filesystem is frozen nothing may be allocated or
//! paged.

use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::path::Path;
use std::ptr::NonNull;

use nix::sys::mman::{
    MapFlags, MlockAllFlags, ProtFlags, mlock, mlockall, mmap_anonymous, munlockall, munmap,
};

use crate::error::{Context, Error, Result};
use crate::os;

/// Memory locked and present from the begin, aligned to a page, left out of core dumps.
pub struct Arena {
    memory: NonNull<u8>,
    len: NonZeroUsize,
}

// SAFETY: the arena owns its memory like a `Box<[u8]>`.
unsafe impl Send for Arena {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Arena {}

impl Arena {
    /// Allocates `len` bytes of zeros, locks and touches them.
    ///
    /// # Errors
    /// `InvalidInput` for no bytes; `OutOfMemory` beyond the memory or RLIMIT_MEMLOCK.
    pub fn new(len: usize) -> Result<Self> {
        let what = Path::new("memory for the final blocks");
        let len = NonZeroUsize::new(len)
            .ok_or_else(|| Error::new("cannot lock", what, io::ErrorKind::InvalidInput))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private mapping at a place of the kernel's choice.
        let memory = unsafe { mmap_anonymous(None, len, access, MapFlags::MAP_PRIVATE) }
            .context("cannot allocate", what)?;
        let arena = Self {
            memory: memory.cast(),
            len,
        };
        // SAFETY: our own mapping, of this length.
        unsafe {
            os::memory::keep_out_of_dumps(memory, len.get()).context("cannot set up", what)?;
            // Locking also brings in every page.
            mlock(memory, len.get()).context("cannot lock", what)?;
        }
        Ok(arena)
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.len.get()
    }

    /// Never: an arena has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: our mapping, initialized by the kernel, borrowed with the arena.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.len.get()) }
    }

    /// All of it, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: our mapping, initialized by the kernel, borrowed exclusively with the arena.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.len.get()) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing borrows any more.
        if let Err(errno) = unsafe { munmap(self.memory.cast(), self.len.get()) } {
            log::debug!("cannot unmap {} bytes: {errno}", self.len);
        }
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// Everything this process has in memory stays there until this is dropped: its code, its stacks,
/// its heap as it is now.
#[derive(Debug)]
pub struct LockedProcess(());

impl LockedProcess {
    /// Locks the process as it is; what it allocates later is not locked.
    ///
    /// # Errors
    /// `OutOfMemory` or `PermissionDenied` beyond RLIMIT_MEMLOCK.
    pub fn new() -> Result<Self> {
        mlockall(MlockAllFlags::MCL_CURRENT).context("cannot lock in memory", "this process")?;
        Ok(Self(()))
    }
}

impl Drop for LockedProcess {
    fn drop(&mut self) {
        // It unlocks arenas too: hold one no longer than they have to be locked.
        if let Err(errno) = munlockall() {
            log::debug!("cannot unlock the process: {errno}");
        }
    }
}

/// Touches 256 KiB of this thread's stack below the caller, so that they are there.
#[inline(never)]
pub fn touch_stack() {
    let mut stack = [0u8; 256 << 10];
    std::hint::black_box(&mut stack);
}

/// How much memory can be had without swapping, in bytes: MemAvailable of `/proc/meminfo`.
///
/// # Errors
/// If /proc is not mounted.
pub fn available() -> Result<u64> {
    let path = Path::new("/proc/meminfo");
    let text = std::fs::read_to_string(path).context("cannot read", path)?;
    parse_available(&text).ok_or_else(|| Error::invalid("cannot read", path, "no MemAvailable"))
}

fn parse_available(text: &str) -> Option<u64> {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the mapping that begins at `address`: locked KiB, and its flags.
    fn mapping(address: usize) -> (u64, String) {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{address:x}-");
        let mut lines = maps.lines().skip_while(|line| !line.starts_with(&start));
        let mut value = |name: &str| {
            let line = lines.find(|line| line.starts_with(name)).unwrap();
            line[name.len()..]
                .trim()
                .trim_end_matches("kB")
                .trim()
                .to_owned()
        };
        (value("Rss:").parse().unwrap(), value("VmFlags:"))
    }

    #[test]
    fn an_arena_is_present_locked_and_out_of_dumps() {
        // Its own allocation: neighbouring mappings of the same kind are merged.
        let len = 1 << 20;
        let mut arena = Arena::new(len).unwrap();
        assert!(arena.bytes().iter().all(|&byte| byte == 0));
        let (resident, flags) = mapping(arena.bytes().as_ptr() as usize);
        assert!(resident >= 1024);
        assert!(flags.contains(" lo"), "not locked: {flags}");
        assert!(flags.contains(" dd"), "in dumps: {flags}");
        arena.bytes_mut()[len - 1] = 7;
        assert_eq!(arena.bytes()[len - 1], 7);
        assert_eq!(arena.bytes().as_ptr().align_offset(4096), 0);
    }

    #[test]
    fn what_cannot_be_had_is_an_error() {
        assert!(Arena::new(0).is_err());
        assert!(Arena::new(usize::MAX / 2).is_err());
    }

    #[test]
    fn available_memory_is_found() {
        assert_eq!(
            parse_available("MemFree: 1 kB\nMemAvailable:   12 kB\n"),
            Some(12288)
        );
        assert_eq!(parse_available("MemFree: 1 kB\n"), None);
        assert_eq!(parse_available("MemAvailable: x kB\n"), None);
        let available = available().unwrap();
        assert!(available > 1 << 20, "{available}");
    }
}
