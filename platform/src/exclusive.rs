//! Keeping others away while a source is read or a target is written, as far as the kernel lets
//! one, and noticing it where it does not.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use crate::error::{Context, Error, Result};

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

/// What became of asking for a [`Lease`].
#[derive(Debug)]
pub enum LeaseAnswer {
    /// Nobody has the file open for writing, and it is ours to keep so.
    Granted(Lease),
    /// Somebody has the file open for writing (a loop device counts).
    Writer,
    /// There are no leases here: a network or FUSE filesystem, a file of another user.
    Unsupported(io::Error),
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
    let magic = nix::sys::statfs::fstatfs(file)?.filesystem_type().0;
    #[allow(clippy::unnecessary_cast)] // its width differs between C libraries
    let magic = magic as i64 & 0xffff_ffff;
    Ok(REMOTE.contains(&magic))
}

/// Size and times of a file: equal before and after means that probably nobody wrote to it.
/// That is all there is where leases do not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Size in bytes.
    pub size: u64,
    /// Last change of the content: seconds and nanoseconds.
    pub modified: (i64, i64),
    /// Last change of content or attributes: seconds and nanoseconds.
    pub changed: (i64, i64),
}

impl Stamp {
    /// From what `stat(2)` said.
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::testing::{Loop, Mounted, mkfs, needs_root, run, scratch};

    fn granted(path: &Path) -> Lease {
        match Lease::ask(path).unwrap() {
            LeaseAnswer::Granted(lease) => lease,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_lease_is_refused_beside_a_writer_and_remembers_one() {
        let dir = scratch();
        let path = dir.path().join("file");
        let writer = File::create(&path).unwrap();
        assert!(matches!(Lease::ask(&path).unwrap(), LeaseAnswer::Writer));
        drop(writer);
        let lease = granted(&path);
        // A reader is welcome.
        File::open(&path).unwrap();
        assert!(lease.is_whole().unwrap());
        // A writer that will not wait is turned away, and noticed all the same.
        let knock = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path);
        assert_eq!(knock.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(!lease.is_whole().unwrap());
        drop(lease);
        OpenOptions::new().write(true).open(&path).unwrap();
    }

    #[test]
    fn a_waiting_writer_gets_in_only_after_the_lease() {
        let dir = scratch();
        let path = dir.path().join("file");
        std::fs::write(&path, "x").unwrap();
        let lease = granted(&path);
        let (sender, receiver) = mpsc::channel();
        let target = path.clone();
        let writer = std::thread::spawn(move || {
            let file = OpenOptions::new().write(true).open(target).unwrap();
            sender.send(()).unwrap();
            drop(file);
        });
        while lease.is_whole().unwrap() {
            std::thread::yield_now();
        }
        assert!(receiver.try_recv().is_err(), "the writer got in");
        drop(lease);
        receiver.recv().unwrap();
        writer.join().unwrap();
    }

    #[test]
    fn no_lease_on_what_is_no_plain_file() {
        let answer = Lease::ask(Path::new("/dev/null")).unwrap();
        assert!(matches!(answer, LeaseAnswer::Unsupported(_)), "{answer:?}");
        assert!(Lease::ask(Path::new("/nowhere")).is_err());
    }

    #[test]
    fn privileged_a_loop_device_counts_as_a_writer() {
        needs_root!();
        let dir = scratch();
        let path = dir.path().join("file");
        let device = Loop::sparse(&path, 1 << 20);
        assert!(matches!(Lease::ask(&path).unwrap(), LeaseAnswer::Writer));
        drop(device);
        granted(&path);
    }

    #[test]
    fn privileged_a_claim_keeps_mounts_away_and_the_other_way_round() {
        needs_root!();
        let dir = scratch();
        let device = Loop::sparse(&dir.path().join("disk"), 64 << 20);
        let partition = device.add_partition(1, 2048, 100_000);
        mkfs("ext4", &partition);
        let busy = |path: &Path| Claim::new(path).unwrap_err().kind();
        {
            let _mounted = Mounted::new(&partition, &dir.path().join("mnt"), "rw");
            assert_eq!(busy(&partition), io::ErrorKind::ResourceBusy);
            assert_eq!(busy(device.path()), io::ErrorKind::ResourceBusy);
        }
        // Another test's mount namespace may have a copy of our mount for a moment, and a child that
        // another test starts one of our claim.
        let claim_at_last = |path: &Path| {
            let mut claims = (0..2000).map(|_| {
                std::thread::sleep(Duration::from_millis(5));
                Claim::new(path).ok()
            });
            claims.find_map(|claim| claim).unwrap()
        };
        let claim = claim_at_last(&partition);
        assert_eq!(busy(&partition), io::ErrorKind::ResourceBusy);
        assert_eq!(busy(device.path()), io::ErrorKind::ResourceBusy);
        let mounting = std::process::Command::new("mount")
            .args([&partition, &dir.path().join("mnt")])
            .stderr(std::process::Stdio::null())
            .status();
        assert!(!mounting.unwrap().success());
        // The limit that rule 4 is about: a plain writer is not kept away.
        OpenOptions::new().write(true).open(&partition).unwrap();
        drop(claim);
        claim_at_last(device.path());
    }

    #[test]
    fn privileged_a_disk_is_locked_once() {
        needs_root!();
        let dir = scratch();
        let device = Loop::sparse(&dir.path().join("disk"), 1 << 20);
        let lock = DiskLock::new(device.path(), Duration::from_secs(5)).unwrap();
        let again = DiskLock::new(device.path(), Duration::from_millis(60)).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::WouldBlock);
        drop(lock);
        DiskLock::new(device.path(), Duration::from_secs(5)).unwrap();
    }

    #[test]
    fn a_stamp_changes_with_the_file() {
        let dir = scratch();
        let path = dir.path().join("file");
        std::fs::write(&path, "x").unwrap();
        let stamp = || Stamp::of(&std::fs::metadata(&path).unwrap());
        let before = stamp();
        assert_eq!(before, stamp());
        run("touch", [Path::new("-d"), Path::new("2020-01-01"), &path]);
        assert_ne!(before, stamp());
        std::fs::write(&path, "xy").unwrap();
        assert_eq!(stamp().size, 2);
    }
}
