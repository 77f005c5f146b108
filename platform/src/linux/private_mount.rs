//! Mounts that are attached nowhere: fsopen(2), fsconfig(2), fsmount(2) (Linux 5.2,
//! include/uapi/linux/mount.h). Nobody else sees one, there is nothing to clean up: it is gone with
//! the last descriptor that leads into it, however the process ends.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

/// `FSOPEN_CLOEXEC`, `FSMOUNT_CLOEXEC`.
const CLOEXEC: libc::c_uint = 1;
/// `FSCONFIG_SET_FLAG`: an option without a value.
const SET_FLAG: libc::c_uint = 0;
/// `FSCONFIG_SET_STRING`: an option and its value.
const SET_STRING: libc::c_uint = 1;
/// `FSCONFIG_CMD_CREATE`.
const CMD_CREATE: libc::c_uint = 6;
/// `MOUNT_ATTR_NOSUID`, `MOUNT_ATTR_NODEV`, `MOUNT_ATTR_NOEXEC`, `MOUNT_ATTR_NOATIME`.
const ATTRIBUTES: libc::c_uint = 2 | 4 | 8 | 0x10;

/// Mounts a filesystem with these options (`None`: one without a value) for us alone; its root folder,
/// open for reading.
///
/// # Errors
/// `Unsupported` if this kernel has no such filesystem, or cannot mount like this; else what it says.
pub(crate) fn open_root(fs_type: &CStr, options: &[(&CStr, Option<&CStr>)]) -> io::Result<File> {
    let context = prepare(fs_type)?;
    for (name, value) in options {
        match value {
            Some(value) => configure(&context, SET_STRING, Some(name), Some(value))?,
            None => configure(&context, SET_FLAG, Some(name), None)?,
        }
    }
    configure(&context, CMD_CREATE, None, None)?;
    // SAFETY: an open context and flags.
    let mounted =
        unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOEXEC, ATTRIBUTES) };
    let mount = descriptor(mounted)?;
    // Reading its folders takes more than the O_PATH descriptor of the mount.
    let root = openat(
        &mount,
        ".",
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    Ok(File::from(root))
}

/// What a mount is configured in: made only if this process may mount, and this kernel knows the
/// filesystem.
///
/// # Errors
/// As [`open_root`].
pub(crate) fn prepare(fs_type: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: a terminated string and a flag.
    let opened = unsafe { libc::syscall(libc::SYS_fsopen, fs_type.as_ptr(), CLOEXEC) };
    descriptor(opened).map_err(|error| match error.raw_os_error() {
        Some(libc::ENODEV | libc::ENOSYS) => io::Error::new(
            io::ErrorKind::Unsupported,
            format!(
                "this kernel has no {} that could be mounted",
                fs_type.to_string_lossy()
            ),
        ),
        _ => error,
    })
}

fn configure(
    context: &OwnedFd,
    command: libc::c_uint,
    name: Option<&CStr>,
    value: Option<&CStr>,
) -> Result<(), Errno> {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: an open context; key and value are null or terminated strings that outlive the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            command,
            pointer(name),
            pointer(value),
            0,
        )
    };
    Errno::result(done).map(drop)
}

fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = Errno::result(result)?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: a descriptor that the kernel has just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
