//! Mounts that are attached nowhere: only Linux has them.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use super::linux_only::NOT_HERE;

/// There is no such thing.
pub(crate) fn open_root(_: &CStr, _: &[(&CStr, Option<&CStr>)]) -> io::Result<File> {
    Err(NOT_HERE.into())
}

/// There is no such thing.
pub(crate) fn prepare(_: &CStr) -> io::Result<OwnedFd> {
    Err(NOT_HERE.into())
}
