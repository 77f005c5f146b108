//! Which blocks of a mounted filesystem are in use, by its own word: FS_IOC_GETFSMAP
//! (include/uapi/linux/fsmap.h, ioctl_getfsmap(2)); ext4 and XFS answer.
//!
//! On a mounted filesystem the bitmaps on disk are stale; this is what the kernel knows. It is
//! asked while the filesystem is frozen, so asking allocates nothing: all room is given beforehand.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

use crate::freeze::MountPoint;
use crate::node::DeviceNumber;
use crate::os::linux_only;

/// Bytes `start..start + len` of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedRange {
    /// First byte.
    pub start: u64,
    /// How many, never 0.
    pub len: u64,
}

/// Why the map could not be had. Nothing in it was allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FsMapError {
    /// The filesystem does not answer this question.
    Unsupported,
    /// There are more ranges than room: how many there are.
    TooManyRanges {
        /// Ranges on the device at that moment.
        needed: usize,
    },
    /// The filesystem lies on this device too (external journal, log or real-time device).
    AnotherDevice(DeviceNumber),
    /// The kernel's answer contradicts itself.
    Contradiction,
    /// Something else.
    Failed(Errno),
}

impl fmt::Display for FsMapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported => write!(f, "this filesystem does not say which blocks it uses"),
            Self::TooManyRanges { needed } => {
                write!(f, "the map needs room for {needed} ranges")
            }
            Self::AnotherDevice(device) => {
                write!(f, "the filesystem lies on another device too: {device}")
            }
            Self::Contradiction => write!(f, "the kernel's map contradicts itself"),
            Self::Failed(errno) => write!(f, "{errno}"),
        }
    }
}

impl std::error::Error for FsMapError {}

/// `struct fsmap`: one record.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Record {
    device: u32,
    flags: u32,
    physical: u64,
    owner: u64,
    offset: u64,
    length: u64,
    reserved: [u64; 3],
}

/// `struct fsmap_head` without its records.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Head {
    in_flags: u32,
    out_flags: u32,
    count: u32,
    entries: u32,
    reserved: [u64; 6],
    keys: [Record; 2],
}

const _: () = assert!(size_of::<Record>() == 64 && size_of::<Head>() == 192);

/// `FMH_OF_DEV_T`: records name their device by number.
const OUT_DEV_T: u32 = 1;
/// `FMR_OF_SPECIAL_OWNER`: the owner is no inode.
const SPECIAL_OWNER: u32 = 0x10;
/// `FMR_OF_LAST`: no record follows.
const LAST: u32 = 0x20;
/// `FMR_OWN_FREE`.
const OWNER_FREE: u64 = 1;

/// Records asked for at once.
const RECORDS: usize = 4096;

/// A head and its records, in one piece as the kernel wants them.
#[repr(C)]
#[derive(Clone, Debug)]
struct Question {
    head: Head,
    records: [Record; RECORDS],
}

mod ioctl {
    // The size in the number is that of the head alone.
    nix::ioctl_readwrite!(getfsmap, b'X', 59, super::Head);
}

const EMPTY: Record = Record {
    device: 0,
    flags: 0,
    physical: 0,
    owner: 0,
    offset: 0,
    length: 0,
    reserved: [0; 3],
};

/// The highest key there is.
const HIGHEST: Record = Record {
    device: u32::MAX,
    flags: u32::MAX,
    physical: u64::MAX,
    owner: u64::MAX,
    offset: u64::MAX,
    length: 0,
    reserved: [0; 3],
};

/// Asks filesystems for their maps. It holds the room for the kernel's answers, 256 KiB.
#[derive(Debug)]
pub struct FsMap {
    question: Box<[Question]>,
}

impl FsMap {
    /// Makes room, and touches it.
    pub fn new() -> Self {
        let head = Head {
            in_flags: 0,
            out_flags: 0,
            count: 0,
            entries: 0,
            reserved: [0; 6],
            keys: [EMPTY, HIGHEST],
        };
        let question = Question {
            head,
            // No zeros: the pages are to be there.
            records: [HIGHEST; RECORDS],
        };
        Self {
            question: vec![question].into_boxed_slice(),
        }
    }

    /// Puts the ranges in use on `device`, of `size` bytes, into `used`: ascending, apart, and
    /// everything that is not proven free. `used` is emptied first and never grows beyond its
    /// capacity. The first call on a filesystem is slow (ext4 loads all its bitmaps): make one
    /// before the freeze.
    ///
    /// # Errors
    /// See [`FsMapError`]; `used` is then worthless.
    pub fn used(
        &mut self,
        mount: &MountPoint,
        device: DeviceNumber,
        size: u64,
        used: &mut Vec<UsedRange>,
    ) -> Result<(), FsMapError> {
        linux_only::check().map_err(|_| FsMapError::Unsupported)?;
        let mut collect = Collect::new(device, size, used);
        let question = self.question.first_mut().ok_or(FsMapError::Contradiction)?;
        question.head.keys = [EMPTY, HIGHEST];
        loop {
            question.head.count = u32::try_from(RECORDS).unwrap_or(u32::MAX);
            question.head.entries = 0;
            question.head.out_flags = 0;
            let fd = mount.as_fd().as_raw_fd();
            let head = (&raw mut *question).cast::<Head>();
            // SAFETY: `head` points to a head followed by the `count` records it announces, in one
            // `repr(C)` struct that we hold exclusively; the kernel writes to nothing else.
            match unsafe { ioctl::getfsmap(fd, head) } {
                Ok(_) => {}
                Err(Errno::ENOTTY | Errno::EOPNOTSUPP) => return Err(FsMapError::Unsupported),
                Err(errno) => return Err(FsMapError::Failed(errno)),
            }
            if question.head.out_flags & OUT_DEV_T == 0 {
                return Err(FsMapError::Unsupported);
            }
            let entries = usize::try_from(question.head.entries).unwrap_or(usize::MAX);
            let records = question
                .records
                .get(..entries)
                .ok_or(FsMapError::Contradiction)?;
            for record in records {
                collect.add(record)?;
            }
            match records.last() {
                Some(last) if last.flags & LAST == 0 => question.head.keys[0] = *last,
                _ => break,
            }
        }
        collect.finish()
    }
}

impl Default for FsMap {
    fn default() -> Self {
        Self::new()
    }
}

/// Turns records into ranges in use: all but what is free.
struct Collect<'a> {
    device: u64,
    size: u64,
    used: &'a mut Vec<UsedRange>,
    /// Everything before this byte is decided.
    decided: u64,
    ranges: usize,
    /// Start of the record before: they come in order.
    previous: u64,
}

impl<'a> Collect<'a> {
    fn new(device: DeviceNumber, size: u64, used: &'a mut Vec<UsedRange>) -> Self {
        used.clear();
        Self {
            device: device.to_raw(),
            size,
            used,
            decided: 0,
            ranges: 0,
            previous: 0,
        }
    }

    fn add(&mut self, record: &Record) -> Result<(), FsMapError> {
        if u64::from(record.device) != self.device {
            let device = DeviceNumber::from_raw(u64::from(record.device));
            return Err(FsMapError::AnotherDevice(device));
        }
        let end = record.physical.checked_add(record.length);
        let end = end.ok_or(FsMapError::Contradiction)?;
        if record.physical < self.previous {
            return Err(FsMapError::Contradiction);
        }
        self.previous = record.physical;
        let is_free = record.flags & SPECIAL_OWNER != 0 && record.owner == OWNER_FREE;
        if is_free {
            if record.physical < self.decided {
                return Err(FsMapError::Contradiction);
            }
            self.take(record.physical.min(self.size));
            self.decided = end;
        }
        Ok(())
    }

    /// Everything decided to `end` is in use.
    fn take(&mut self, end: u64) {
        if end <= self.decided {
            return;
        }
        self.ranges += 1;
        if self.used.len() < self.used.capacity() {
            self.used.push(UsedRange {
                start: self.decided,
                len: end - self.decided,
            });
        }
    }

    fn finish(mut self) -> Result<(), FsMapError> {
        self.take(self.size);
        if self.ranges > self.used.len() {
            let needed = self.ranges;
            return Err(FsMapError::TooManyRanges { needed });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use super::*;
    use crate::testing::{Loop, Mounted, mkfs, needs_root, run, scratch};

    const DEVICE: DeviceNumber = DeviceNumber {
        major: 7,
        minor: 300,
    };

    fn record(physical: u64, length: u64, is_free: bool) -> Record {
        Record {
            device: u32::try_from(DEVICE.to_raw()).unwrap(),
            flags: if is_free { SPECIAL_OWNER } else { 0 },
            physical,
            length,
            // An inode of the number that means "free" is not free.
            owner: OWNER_FREE,
            ..EMPTY
        }
    }

    fn collect(records: &[Record], room: usize) -> Result<Vec<(u64, u64)>, FsMapError> {
        let mut used = Vec::with_capacity(room);
        let mut collect = Collect::new(DEVICE, 1000, &mut used);
        for record in records {
            collect.add(record)?;
        }
        collect.finish()?;
        Ok(used.iter().map(|range| (range.start, range.len)).collect())
    }

    #[test]
    fn all_is_used_but_what_is_free() {
        assert_eq!(collect(&[], 4).unwrap(), [(0, 1000)]);
        let free_at_both_ends = [record(0, 100, true), record(900, 100, true)];
        assert_eq!(collect(&free_at_both_ends, 4).unwrap(), [(100, 800)]);
        let shared_and_gaps = [
            record(100, 100, false),
            record(100, 50, false),
            record(300, 100, true),
            record(500, 600, true),
        ];
        assert_eq!(
            collect(&shared_and_gaps, 4).unwrap(),
            [(0, 300), (400, 100)]
        );
        let room = collect(&shared_and_gaps, 1);
        assert_eq!(room, Err(FsMapError::TooManyRanges { needed: 2 }));
        assert_eq!(collect(&[record(0, 2000, true)], 4).unwrap(), []);
    }

    #[test]
    fn nonsense_is_refused() {
        let wrong = [
            vec![record(10, u64::MAX, true)],
            vec![record(100, 10, true), record(50, 10, true)],
            vec![record(100, 100, true), record(150, 10, true)],
        ];
        for records in wrong {
            assert_eq!(collect(&records, 4), Err(FsMapError::Contradiction));
        }
        let mut foreign = record(0, 10, false);
        foreign.device += 1;
        assert!(matches!(
            collect(&[foreign], 4),
            Err(FsMapError::AnotherDevice(_))
        ));
    }

    /// Bytes that no filesystem writes by itself.
    const MARK: [u8; 16] = *b"holdstill marks!";

    fn write_marked(path: &Path, len: usize) {
        std::fs::write(path, MARK.repeat(len / MARK.len())).unwrap();
    }

    /// The 1 KiB blocks of a device that hold the mark.
    fn marked_blocks(device: &Path, size: u64) -> Vec<u64> {
        let device = File::open(device).unwrap();
        let mut block = [0; 1024];
        (0..size / 1024)
            .filter(|at| {
                device.read_exact_at(&mut block, at * 1024).unwrap();
                block.chunks(16).all(|chunk| chunk == MARK)
            })
            .collect()
    }

    #[test]
    fn privileged_the_kernels_map_covers_all_data_and_no_more_than_statfs_says() {
        needs_root!();
        for (fs_type, size) in [("ext4", 128 << 20), ("xfs", 320 << 20)] {
            let dir = scratch();
            let device = Loop::sparse(&dir.path().join("disk"), size);
            mkfs(fs_type, device.path());
            let mounted = Mounted::new(device.path(), &dir.path().join("mnt"), "rw");
            for at in 0..200 {
                write_marked(&mounted.path().join(format!("{at}")), 64 << 10);
            }
            for at in (0..200).step_by(2) {
                std::fs::remove_file(mounted.path().join(format!("{at}"))).unwrap();
            }
            run("sync", ["-f".as_ref(), mounted.path().as_os_str()]);

            let mount = MountPoint::open(mounted.path()).unwrap();
            let mut used = Vec::with_capacity(1000);
            FsMap::new()
                .used(&mount, device.number(), size, &mut used)
                .unwrap();
            for pair in used.windows(2) {
                assert!(pair[0].start + pair[0].len < pair[1].start);
            }
            let is_used = |byte: u64| {
                used.iter()
                    .any(|range| range.start <= byte && byte < range.start + range.len)
            };
            run(
                "blockdev",
                ["--flushbufs".as_ref(), device.path().as_os_str()],
            );
            let marked = marked_blocks(device.path(), size);
            // Deleted files stay on the device, so not all of these need be in use.
            let covered = marked.iter().filter(|block| is_used(*block * 1024)).count();
            assert!(covered >= 6400, "{fs_type}: {covered} of {}", marked.len());

            let total: u64 = used.iter().map(|range| range.len).sum();
            let stat = nix::sys::statvfs::statvfs(mounted.path()).unwrap();
            let free = stat.blocks_free() * stat.fragment_size();
            if fs_type == "ext4" {
                assert_eq!(size - total, free);
            } else {
                // XFS keeps some free blocks back.
                assert!(size - total >= free && size - total < free + (32 << 20));
            }

            let mut small = Vec::with_capacity(1);
            let mut map = FsMap::new();
            let error = map.used(&mount, device.number(), size, &mut small);
            let needed = used.len();
            assert_eq!(error, Err(FsMapError::TooManyRanges { needed }));
            assert_eq!(small.capacity(), 1);
        }
    }

    #[test]
    fn privileged_more_records_than_one_answer_holds() {
        needs_root!();
        let dir = scratch();
        let device = Loop::sparse(&dir.path().join("disk"), 256 << 20);
        run(
            "mkfs.ext4",
            ["-qF".as_ref(), "-b1024".as_ref(), device.path().as_os_str()],
        );
        let mounted = Mounted::new(device.path(), &dir.path().join("mnt"), "rw");
        // A file with every second block punched out: as many records as blocks.
        let file = File::create(mounted.path().join("holes")).unwrap();
        let blocks = 12_000;
        for at in 0..blocks {
            file.write_all_at(&[7; 1024], at * 1024).unwrap();
        }
        file.sync_all().unwrap();
        let punch = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
            | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for at in (0..blocks.cast_signed()).step_by(2) {
            nix::fcntl::fallocate(&file, punch, at * 1024, 1024).unwrap();
        }
        file.sync_all().unwrap();
        let mount = MountPoint::open(mounted.path()).unwrap();
        let mut used = Vec::with_capacity(20_000);
        FsMap::new()
            .used(&mount, device.number(), 256 << 20, &mut used)
            .unwrap();
        assert!(used.len() > 5_500, "{}", used.len());
        let stat = nix::sys::statvfs::statvfs(mounted.path()).unwrap();
        let total: u64 = used.iter().map(|range| range.len).sum();
        let free = stat.blocks_free() * stat.fragment_size();
        assert_eq!((256 << 20) - total, free);
    }

    #[test]
    fn other_filesystems_say_no() {
        let mount = MountPoint::open(Path::new("/proc")).unwrap();
        let mut used = Vec::new();
        let error = FsMap::new().used(&mount, DEVICE, 4096, &mut used);
        assert_eq!(error, Err(FsMapError::Unsupported));
    }
}
