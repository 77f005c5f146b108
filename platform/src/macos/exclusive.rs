//! Claims by `O_EXLOCK`. There are no leases, and no agreement on locks of disks.

use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;

use super::device::{node_to_open, open_direct};
use crate::device::{self, Access, Disk};
use crate::error::{Context, Result};
use crate::exclusive::LeaseAnswer;
use crate::located::Located;
use crate::node::DeviceNumber;

/// An exclusive claim on a disk or a part of one (`O_EXLOCK`), held until dropped.
///
/// While it is held nobody can open the device, for reading or writing, by either of its nodes; nobody can
/// mount it; no driver can build on it (`dkopen`, `IOMedia::handleOpen`). All of these keep it from being
/// claimed, too. It does **not** cover what lies below: the whole disk of a partition can be opened for
/// writing by whoever asks for a shared lock, and the file of a disk image or the partition of an APFS
/// container by whoever may.
///
/// A container of APFS holds its partition open whether anything of it is mounted or not. So for reading
/// alone, what cannot be claimed is opened without: then it is for the search for users, and for the
/// counters, to show that nobody writes.
#[derive(Debug)]
pub struct Claim {
    file: File,
}

impl Claim {
    /// Claims the device at `path`, opened read-only.
    ///
    /// # Errors
    /// `ResourceBusy` if it is mounted, open or claimed; what `open(2)` says.
    pub fn new(path: &Path) -> Result<Self> {
        let file = open_exclusively(path, Access::Read)?;
        Ok(Self { file })
    }

    /// Claims the device at `path`, and opens it for reading or writing: nobody could do that afterwards,
    /// not even we.
    ///
    /// # Errors
    /// As [`new`](Self::new) for writing; for reading, what `open(2)` says.
    pub fn open(path: &Path, access: Access) -> Result<(Self, Disk)> {
        let file = match open_exclusively(path, access) {
            Err(error) if access == Access::Read && error.kind() == io::ErrorKind::ResourceBusy => {
                File::open(node_to_open(path)).context("cannot open", path)?
            }
            other => other?,
        };
        let geometry = device::geometry(&file, path)?;
        let plain = file.try_clone().context("cannot open", path)?;
        let direct = open_direct(&plain, path, &mut OpenOptions::new());
        Ok((Self { file }, Disk::opened(path, plain, direct, geometry)))
    }
}

fn open_exclusively(path: &Path, access: Access) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(access == Access::ReadWrite)
        .custom_flags(libc::O_EXLOCK | libc::O_NONBLOCK)
        .open(node_to_open(path))
        .map_err(|error| match error.raw_os_error() {
            // The lock of the node itself, as flock(2) takes it, says this.
            Some(libc::EAGAIN) => Errno::EBUSY.into(),
            _ => error,
        })
        .context("cannot claim", path)
}

impl Claim {
    /// Claims the device that was looked up, and opens it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn at(located: &Located, access: Access) -> Result<(Self, Disk)> {
        Self::open(located.path(), access)
    }

    /// Which device is claimed.
    ///
    /// # Errors
    /// What `fstat(2)` says.
    pub fn device(&self) -> io::Result<DeviceNumber> {
        Ok(DeviceNumber::from_raw(self.file.metadata()?.rdev()))
    }
}

/// Whether nobody but us has a file open: nothing tells.
///
/// # Errors
/// None.
pub fn is_open_here_alone(_: &File) -> io::Result<Option<bool>> {
    Ok(None)
}

impl AsFd for Claim {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Elsewhere the lock by which others agree not to touch a disk. Here that is done by [`Claim`].
#[derive(Debug)]
pub struct DiskLock(());

impl DiskLock {
    /// Does nothing.
    ///
    /// # Errors
    /// None.
    pub fn new(_path: &Path, _patience: Duration) -> Result<Self> {
        Ok(Self(()))
    }
}

/// A read lease on a regular file: there are none.
#[derive(Debug)]
pub struct Lease(Infallible);

impl Lease {
    /// Says that there are none.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn ask(path: &Path) -> Result<LeaseAnswer> {
        File::open(path).context("cannot open", path)?;
        Ok(LeaseAnswer::Unsupported(io::ErrorKind::Unsupported.into()))
    }

    /// Never asked.
    ///
    /// # Errors
    /// None.
    pub fn is_whole(&self) -> Result<bool> {
        match self.0 {}
    }
}
