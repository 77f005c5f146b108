//! What an image file is written with.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::{FallocateFlags, RenameFlags, fallocate, renameat2};

/// Asks for space without changing the size.
pub(crate) fn allocate(file: &File, from: i64, len: i64) -> nix::Result<()> {
    fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, from, len)
}

/// Brings the file to stable storage.
pub(crate) fn sync(file: &File) -> io::Result<()> {
    file.sync_all()
}

/// The same file with `O_DIRECT`, where it is granted.
pub(crate) fn reopen_direct(file: &File) -> Option<File> {
    OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .ok()
}

/// Renames within a folder without replacing. EINVAL or ENOSYS: the filesystem cannot promise that.
pub(crate) fn rename_new(folder: &File, from: &OsStr, to: &OsStr) -> nix::Result<()> {
    renameat2(folder, from, folder, to, RenameFlags::RENAME_NOREPLACE)
}
