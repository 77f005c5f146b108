//! Claims by `O_EXCL`, locks of disks, read leases.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use crate::device::{Access, Disk};
use crate::error::{Context, Error, Result};
use crate::exclusive::LeaseAnswer;
use crate::located::Located;
use crate::node::DeviceNumber;

/// `F_SETSIG` of include/uapi/asm-generic/fcntl.h: which signal tells of a broken lease.
const F_SETSIG: libc::c_int = 10;

/// How often a lock that somebody holds is tried again.
const RETRY: Duration = Duration::from_millis(50);

/// An exclusive claim on a block device (`O_EXCL`), held until dropped.
///
/// While it is held nobody can mount the device, swap to it or build a device on it, and nobody
/// else can claim it; a claim on a whole disk also covers its partitions, and the other way round.
/// It does **not** keep a process from opening the device for writing.
#[derive(Debug)]
pub struct Claim {
    file: File,
}

impl Claim {
    /// Claims the block device at `path`, opened read-only.
    ///
    /// # Errors
    /// `ResourceBusy` if it, its disk or one of its partitions is mounted or claimed; what
    /// `open(2)` says.
    pub fn new(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL | libc::O_CLOEXEC)
            .open(path)
            .context("cannot claim", path)?;
        Ok(Self { file })
    }

    /// Claims the block device at `path`, and opens it for reading or writing, too.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn open(path: &Path, access: Access) -> Result<(Self, Disk)> {
        let claim = Self::new(path)?;
        Ok((claim, Disk::open(path, access)?))
    }
}

impl Claim {
    /// Claims the block device that was looked up, and opens it for reading or writing, too.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn at(located: &Located, access: Access) -> Result<(Self, Disk)> {
        let mut options = OpenOptions::new();
        let file = located.open(
            options
                .read(true)
                .custom_flags(libc::O_EXCL | libc::O_CLOEXEC),
        )?;
        Ok((Self { file }, Disk::at(located, access)?))
    }

    /// Which device is claimed.
    ///
    /// # Errors
    /// What `fstat(2)` says.
    pub fn device(&self) -> io::Result<DeviceNumber> {
        Ok(DeviceNumber::from_raw(self.file.metadata()?.rdev()))
    }
}

impl AsFd for Claim {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The lock by which udev and partitioning tools agree not to touch a whole disk
/// (systemd.io/BLOCK_DEVICE_LOCKING), held until dropped.
#[derive(Debug)]
pub struct DiskLock {
    _locked: Flock<File>,
}

impl DiskLock {
    /// Locks the whole-disk node at `path`. udev holds the lock for moments while it looks at a
    /// disk, so a held lock is tried again for up to `patience`.
    ///
    /// # Errors
    /// `WouldBlock` if somebody keeps the lock; what `open(2)` says.
    pub fn new(path: &Path, patience: Duration) -> Result<Self> {
        let mut file = File::open(path).context("cannot open", path)?;
        let begin = Instant::now();
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(locked) => return Ok(Self { _locked: locked }),
                Err((again, nix::errno::Errno::EWOULDBLOCK)) if begin.elapsed() < patience => {
                    file = again;
                    std::thread::sleep(RETRY);
                }
                Err((_, errno)) => return Err(Error::new("cannot lock", path, errno)),
            }
        }
    }
}

/// A read lease on a regular file (fcntl(2), `F_SETLEASE`): while it is held, whoever opens the
/// file for writing or truncates it waits for us (`/proc/sys/fs/lease-break-time`, 45 s) and is
/// remembered by the kernel.
#[derive(Debug)]
pub struct Lease {
    file: File,
    path: PathBuf,
}

impl Lease {
    /// Asks for a lease on the regular file at `path`.
    ///
    /// # Errors
    /// If the file cannot be opened. A refusal is an answer, not an error.
    pub fn ask(path: &Path) -> Result<LeaseAnswer> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .context("cannot open", path)?;
        if is_remote(&file).context("cannot look at", path)? {
            // NFS grants a lease only beside a delegation, and says "try again" without one.
            return Ok(LeaseAnswer::Unsupported(io::ErrorKind::Unsupported.into()));
        }
        let fd = file.as_raw_fd();
        // The kernel would tell us of a broken lease by SIGIO, which ends a process. SIGURG does
        // nothing; the lease is asked instead when the answer matters.
        // SAFETY: plain fcntl on an open descriptor with an integer argument.
        if unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGURG) } != 0 {
            return Err(Error::new(
                "cannot prepare a lease on",
                path,
                io::Error::last_os_error(),
            ));
        }
        // SAFETY: as above.
        if unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) } == 0 {
            return Ok(LeaseAnswer::Granted(Self {
                file,
                path: path.to_owned(),
            }));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN) => Ok(LeaseAnswer::Writer),
            Some(libc::EINVAL | libc::EACCES | libc::EPERM | libc::EOPNOTSUPP | libc::ENOLCK) => {
                Ok(LeaseAnswer::Unsupported(error))
            }
            _ => Err(Error::new("cannot ask for a lease on", path, error)),
        }
    }

    /// Whether nobody has tried to open the file for writing since the lease was granted. Once
    /// `false`, it stays so.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn is_whole(&self) -> Result<bool> {
        // F_GETLEASE answers with the kind of lease that will be left once we give way
        // (fs/locks.c, target_leasetype): F_UNLCK as soon as a writer has knocked.
        // SAFETY: plain fcntl on an open descriptor.
        match unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_GETLEASE) } {
            libc::F_RDLCK => Ok(true),
            -1 => Err(Error::new(
                "cannot ask the lease on",
                &self.path,
                io::Error::last_os_error(),
            )),
            _ => Ok(false),
        }
    }
}

/// Whether nobody but us has a file open, in whatever namespace or kernel (a write lease, fcntl(2),
/// `F_WRLCK`, which is given back at once); `file` is all that we have open of it. `None` where there are no
/// leases.
///
/// # Errors
/// If the kernel does not answer.
pub fn is_open_here_alone(file: &File) -> io::Result<Option<bool>> {
    if is_remote(file)? {
        return Ok(None);
    }
    let fd = file.as_raw_fd();
    // Whoever opens it in this moment breaks the lease: see [`Lease::ask`].
    // SAFETY: plain fcntl on an open descriptor with an integer argument.
    if unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGURG) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    if unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_WRLCK) } == 0 {
        // SAFETY: as above.
        unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK) };
        return Ok(Some(true));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Ok(Some(false)),
        Some(libc::EINVAL | libc::EACCES | libc::EPERM | libc::EOPNOTSUPP | libc::ENOLCK) => {
            Ok(None)
        }
        _ => Err(error),
    }
}

/// Whether a file lies on a filesystem whose leases, if it grants any, do not cover writers on
/// other machines or behind a daemon.
fn is_remote(file: &File) -> io::Result<bool> {
    // Magic numbers of include/uapi/linux/magic.h and fs/*/ that libc does not name.
    const REMOTE: [i64; 9] = [
        0x6969,      // NFS
        0xff53_4d42, // CIFS
        0xfe53_4d42, // SMB2
        0x517b,      // SMB
        0x6573_5546, // FUSE
        0x0102_1997, // 9P
        0x00c3_6400, // Ceph
        0x0bd0_0bd0, // Lustre
        0x7461_636f, // OCFS2
    ];
    let magic = super::linux_only::magic(file)? & 0xffff_ffff;
    Ok(REMOTE.contains(&magic))
}
