//! The few calls of facilities that only Linux has: all of them say that there is no such thing.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::errno::Errno;

/// What they say: of kind `Unsupported`.
pub(super) const NOT_HERE: Errno = Errno::EOPNOTSUPP;

/// No error has this number.
pub(crate) const ENOKEY: i32 = -1;

/// Fails where the numbers of Linux's ioctls mean something else.
pub(crate) fn check() -> nix::Result<()> {
    Err(NOT_HERE)
}

/// Magic numbers of filesystems are Linux's.
pub(crate) fn magic(_: impl AsFd) -> nix::Result<i64> {
    Err(NOT_HERE)
}

/// There is no syncfs(2).
pub(crate) fn syncfs(_: impl AsFd) -> nix::Result<()> {
    Err(NOT_HERE)
}

/// There is no fallocate(2).
pub(crate) fn set_aside(_: &File, _len: i64) -> nix::Result<()> {
    Err(NOT_HERE)
}

/// As above.
pub(crate) fn punch_hole(_: &File, _offset: i64, _len: i64) -> nix::Result<()> {
    Err(NOT_HERE)
}

/// There are no files without a name.
pub(crate) fn open_nameless(_: &OpenOptions, _folder: &Path) -> io::Result<File> {
    Err(NOT_HERE.into())
}
