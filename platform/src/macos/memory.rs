//! What only Linux can do with memory.

use std::ffi::c_void;
use std::ptr::NonNull;

/// There are no core dumps unless somebody asks for them, and then of everything.
///
/// # Safety
/// None is needed; elsewhere it is.
pub(crate) unsafe fn keep_out_of_dumps(_: NonNull<c_void>, _len: usize) -> nix::Result<()> {
    Ok(())
}
