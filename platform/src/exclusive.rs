//! Keeping others away while a source is read or a target is written, as far as the kernel lets
//! one, and noticing it where it does not.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;

pub use crate::os::exclusive::{Claim, DiskLock, Lease, is_open_here_alone};

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
    use std::fs::{File, OpenOptions};
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::Path;
    use std::sync::mpsc;
    use std::time::Duration;

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
