//! Freezing a mounted filesystem: FIFREEZE and FITHAW (include/uapi/linux/fs.h, fs/super.c).
//!
//! A freeze lets the writes that have begun end, writes out everything, and makes every later
//! writer wait. Nothing here thaws by itself: use a [`Guard`](crate::guard::Guard).

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::btrfs::Filesystem;
use crate::error::{Context, Error, Result};
use crate::node::DeviceNumber;
use crate::os::linux_only;

mod ioctl {
    nix::ioctl_readwrite!(fifreeze, b'X', 119, libc::c_int);
    nix::ioctl_readwrite!(fithaw, b'X', 120, libc::c_int);
}

/// An open folder of a mounted filesystem, through which the whole filesystem is frozen.
#[derive(Debug)]
pub struct MountPoint {
    file: File,
    path: PathBuf,
    device: DeviceNumber,
}

impl MountPoint {
    /// Opens the folder at `path`, usually the mount point.
    ///
    /// # Errors
    /// What `open(2)` says; `NotADirectory` for anything else.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(path)
            .context("cannot open", path)?;
        let device = file.metadata().context("cannot look at", path)?.dev();
        Ok(Self {
            file,
            path: path.to_owned(),
            device: DeviceNumber::from_raw(device),
        })
    }

    /// The same, of the filesystem on `device`. What is opened is asked, not the path: another
    /// filesystem may have been mounted over it.
    ///
    /// # Errors
    /// As [`open`](Self::open); if the folder is one of another filesystem.
    pub fn open_on(path: &Path, device: DeviceNumber) -> Result<Self> {
        let point = Self::open(path)?;
        if point.device != device {
            let why = format!(
                "another filesystem (device {}) is mounted over that of device {device}",
                point.device
            );
            return Err(Error::other("cannot use the mount point", path, why));
        }
        Ok(point)
    }

    /// The same, of a btrfs that is open: its files have device numbers that tell nothing.
    ///
    /// # Errors
    /// If there are too many descriptors.
    pub fn of_btrfs(filesystem: &Filesystem) -> Result<Self> {
        let path = filesystem.path();
        let file = filesystem.as_fd().try_clone_to_owned().map(File::from);
        let file = file.context("cannot open", path)?;
        let device = file.metadata().context("cannot look at", path)?.dev();
        Ok(Self {
            file,
            path: path.to_owned(),
            device: DeviceNumber::from_raw(device),
        })
    }

    /// By which path it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `st_dev` of the folder.
    pub fn device(&self) -> DeviceNumber {
        self.device
    }

    /// Writes out everything that is dirty on the filesystem (`syncfs(2)`).
    ///
    /// # Errors
    /// What it says: a write of earlier may have failed.
    pub fn sync(&self) -> Result<()> {
        linux_only::syncfs(&self.file).context("cannot sync", &self.path)
    }

    /// Freezes. Whoever calls this must be sure that somebody thaws.
    pub(crate) fn freeze(&self) -> std::result::Result<(), Errno> {
        freeze(self.file.as_raw_fd())
    }

    /// Thaws a frozen filesystem, whoever froze it.
    pub(crate) fn thaw(&self) -> std::result::Result<(), Errno> {
        thaw(self.file.as_raw_fd())
    }

    /// Thaws what a dead run, whose guard is dead too, has left frozen. The caller has made sure
    /// that the freeze is that run's: the kernel does not say whose it is.
    ///
    /// # Errors
    /// What the kernel says, but for "not frozen": then `false`.
    pub fn thaw_leftover(&self) -> Result<bool> {
        match self.thaw() {
            Ok(()) => Ok(true),
            Err(Errno::EINVAL) => Ok(false),
            Err(errno) => Err(errno).context("cannot thaw", &self.path),
        }
    }
}

impl AsFd for MountPoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// FIFREEZE on a descriptor; calls nothing but the kernel.
fn freeze(fd: i32) -> std::result::Result<(), Errno> {
    linux_only::check()?;
    let mut unused = 0;
    // SAFETY: the kernel ignores the argument; a stale descriptor gives EBADF.
    unsafe { ioctl::fifreeze(fd, &raw mut unused) }.map(drop)
}

/// FITHAW on a descriptor; calls nothing but the kernel.
pub(crate) fn thaw(fd: i32) -> std::result::Result<(), Errno> {
    linux_only::check()?;
    let mut unused = 0;
    // SAFETY: as above.
    unsafe { ioctl::fithaw(fd, &raw mut unused) }.map(drop)
}

/// Why a freeze did not come about, or did not hold.
#[derive(Debug)]
pub enum FreezeError {
    /// Somebody has frozen it already (an administrator, LVM); it stays theirs.
    AlreadyFrozen,
    /// The filesystem cannot be frozen.
    Unsupported,
    /// It needs CAP_SYS_ADMIN.
    NotPermitted,
    /// The guard process is gone: nothing would thaw if we died.
    GuardLost(io::Error),
    /// It was thawed while we believed it frozen, by the guard at the deadline or by somebody else.
    DidNotHold,
    /// Something else.
    Failed(io::Error),
}

impl FreezeError {
    /// What a refused FIFREEZE means.
    pub(crate) fn from_freeze(errno: Errno) -> Self {
        match errno {
            Errno::EBUSY => Self::AlreadyFrozen,
            Errno::EOPNOTSUPP | Errno::ENOTTY => Self::Unsupported,
            Errno::EPERM | Errno::EACCES => Self::NotPermitted,
            other => Self::Failed(other.into()),
        }
    }
}

impl fmt::Display for FreezeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AlreadyFrozen => write!(f, "somebody else has frozen it already"),
            Self::Unsupported => write!(f, "this filesystem cannot be frozen"),
            Self::NotPermitted => write!(f, "freezing needs root"),
            Self::GuardLost(error) => write!(f, "the guard process is gone: {error}"),
            Self::DidNotHold => write!(f, "the freeze did not hold: it was thawed before its time"),
            Self::Failed(error) => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for FreezeError {}
