//! The few calls of facilities that only Linux has. Other systems have the same names here, and say that
//! there is no such thing.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};
pub(crate) use nix::unistd::syncfs;

/// A key is missing.
pub(crate) const ENOKEY: i32 = libc::ENOKEY;

/// Sets aside the first `len` bytes of a file.
pub(crate) fn set_aside(file: &File, len: i64) -> nix::Result<()> {
    fallocate(file, FallocateFlags::empty(), 0, len)
}

/// Makes a hole in a file.
pub(crate) fn punch_hole(file: &File, offset: i64, len: i64) -> nix::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, flags, offset, len)
}

/// Fails where the numbers of Linux's ioctls mean something else.
pub(crate) fn check() -> nix::Result<()> {
    Ok(())
}

/// The magic number of the filesystem that an open file lies on (statfs(2)).
pub(crate) fn magic(file: impl AsFd) -> nix::Result<i64> {
    let magic = nix::sys::statfs::fstatfs(file)?.filesystem_type().0;
    #[allow(clippy::unnecessary_cast)] // its width differs between C libraries
    Ok(magic as i64)
}

/// A new file in `folder` that has no name, opened for writing.
pub(crate) fn open_nameless(options: &OpenOptions, folder: &Path) -> io::Result<File> {
    let flags = libc::O_TMPFILE | libc::O_CLOEXEC;
    options.clone().custom_flags(flags).open(folder)
}
