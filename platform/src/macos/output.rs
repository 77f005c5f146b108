//! What an image file is written with.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;

/// Space cannot be asked for ahead without more ado.
pub(crate) fn allocate(_: &File, _from: i64, _len: i64) -> nix::Result<()> {
    Err(Errno::ENOTSUP)
}

/// Brings the file to stable storage: the standard library asks by `F_FULLFSYNC`, which empties the drive's
/// cache too. Network filesystems have nothing but fsync(2).
pub(crate) fn sync(file: &File) -> io::Result<()> {
    match file.sync_all() {
        Err(error) if is_no_such_request(&error) => Ok(nix::unistd::fsync(file)?),
        other => other,
    }
}

/// Whether the kernel does not know a request for this kind of file.
pub(super) fn is_no_such_request(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOTSUP | libc::ENOTTY | libc::EINVAL | libc::EOPNOTSUPP)
    )
}

/// The same file, and from now on it is written past the cache (fcntl(2), `F_NOCACHE`): the flag belongs
/// to the open file, which cannot be opened a second time by its descriptor.
pub(crate) fn reopen_direct(file: &File) -> Option<File> {
    pass_cache(file).ok()?;
    file.try_clone().ok()
}

/// Turns the cache off for an open file.
pub(super) fn pass_cache(file: &File) -> nix::Result<()> {
    // SAFETY: plain fcntl on an open descriptor with an integer argument.
    Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_NOCACHE, 1) }).map(drop)
}

/// Renames within a folder without replacing. ENOSYS: the filesystem cannot promise that.
pub(crate) fn rename_new(folder: &File, from: &OsStr, to: &OsStr) -> nix::Result<()> {
    let name = |name: &OsStr| CString::new(name.as_bytes()).map_err(|_| Errno::EINVAL);
    let (from, to) = (name(from)?, name(to)?);
    // SAFETY: two terminated strings that outlive the call.
    let renamed = unsafe {
        libc::renameatx_np(
            folder.as_raw_fd(),
            from.as_ptr(),
            folder.as_raw_fd(),
            to.as_ptr(),
            libc::RENAME_EXCL,
        )
    };
    match Errno::result(renamed) {
        Err(Errno::ENOTSUP) => Err(Errno::ENOSYS),
        other => other.map(drop),
    }
}
