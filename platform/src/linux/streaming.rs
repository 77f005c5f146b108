//! What a tool says is kept in.

use std::fs::File;
use std::io;

use nix::sys::memfd::{MFdFlags, memfd_create};

/// A file without a name, in memory.
pub(crate) fn file_in_memory() -> io::Result<File> {
    Ok(File::from(memfd_create(c"stderr", MFdFlags::MFD_CLOEXEC)?))
}
