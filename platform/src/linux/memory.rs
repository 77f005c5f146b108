//! What only Linux can do with memory.

use std::ffi::c_void;
use std::ptr::NonNull;

use nix::sys::mman::{MmapAdvise, madvise};

/// Leaves a mapping out of core dumps.
///
/// # Safety
/// It must be a mapping of the caller's own, of `len` bytes.
pub(crate) unsafe fn keep_out_of_dumps(memory: NonNull<c_void>, len: usize) -> nix::Result<()> {
    // SAFETY: as the caller promises.
    unsafe { madvise(memory, len, MmapAdvise::MADV_DONTDUMP) }
}
