//! A file that is swap space, and which blocks of the disk it has by the filesystem's own word:
//! FIEMAP (Documentation/filesystems/fiemap.rst).
//!
//! The kernel writes pages to these blocks past the filesystem. A freeze does not stop that, and what
//! stands there means something to the running kernel alone. So whoever copies the filesystem may
//! leave them out, all but the first page, which says that the file is swap space; but only blocks
//! that are the file's own, and only while it is swap space. Both are asked together, and neither
//! changes while the filesystem is frozen, but for `swapoff` and `swapon`; and what was in a file that
//! is swap space at any moment of a freeze is lost to everybody else. Asking allocates nothing,
//! changes nothing, and does not wait for a thaw.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{SysconfVar, sysconf};

use crate::error::{Context, Error, Result};
use crate::fsmap::UsedRange;
use crate::os::linux_only;

/// `struct fiemap` without its extents.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Head {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved_wide: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

const _: () = assert!(size_of::<Head>() == 32 && size_of::<Extent>() == 56);

/// `FIEMAP_EXTENT_LAST`.
const LAST: u32 = 1;
/// The flags of an extent that has a place on the disk, all to itself: `LAST`,
/// `FIEMAP_EXTENT_UNWRITTEN`, `FIEMAP_EXTENT_MERGED`.
const HARMLESS: u32 = LAST | 0x800 | 0x1000;

/// Extents asked for at once.
const EXTENTS: usize = 256;

/// A head and its extents, in one piece as the kernel wants them.
#[repr(C)]
#[derive(Clone, Debug)]
struct Question {
    head: Head,
    extents: [Extent; EXTENTS],
}

mod ioctl {
    // The size in the number is that of the head alone.
    nix::ioctl_readwrite!(fiemap, b'f', 11, super::Head);
}

const EMPTY: Question = Question {
    head: Head {
        start: 0,
        length: 0,
        flags: 0,
        mapped: 0,
        count: 0,
        reserved: 0,
    },
    // No zeros: the memory is to be there.
    extents: [Extent {
        logical: u64::MAX,
        physical: u64::MAX,
        length: 0,
        reserved_wide: [0; 2],
        flags: 0,
        reserved: [0; 3],
    }; EXTENTS],
};

/// A file that is, or was, swap space.
#[derive(Debug)]
pub struct SwapFile {
    file: File,
    first_page: Vec<u8>,
    question: Box<[Question]>,
}

impl SwapFile {
    /// Opens a file that `/proc/swaps` names. As long as it is open its blocks stay its own.
    ///
    /// # Errors
    /// If it cannot be opened, or is not swap space of a kind that is understood.
    pub fn open(path: &Path) -> Result<Self> {
        // No pages are written through this: swap space refuses it. Only what may be opened for
        // writing can be asked whether it is swap space.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
            .context("cannot open the swap file", path)?;
        let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
        let page = page.and_then(|page| usize::try_from(page).ok());
        let mut swap = Self {
            file,
            first_page: vec![1; page.unwrap_or(4096)],
            question: vec![EMPTY].into_boxed_slice(),
        };
        if !swap.is_active() {
            let why = "it is not in use as swap space, or set immutable";
            return Err(Error::other("cannot make sure of the swap file", path, why));
        }
        if swap.pages().is_none() {
            let why = "its header is not that of swap space (hibernation?)";
            return Err(Error::other("cannot make sure of the swap file", path, why));
        }
        Ok(swap)
    }

    /// Whether the kernel swaps to this file now. It refuses to change the blocks of such a file with
    /// ETXTBSY before it looks at what is wanted (`vfs_fallocate` of fs/open.c), which here is
    /// nothing that can be had: a hole beyond the end of all files.
    fn is_active(&self) -> bool {
        linux_only::punch_hole(&self.file, i64::MAX - 1, 4096) == Err(Errno::ETXTBSY)
    }

    /// How many pages of the file are swap space, the first included: `union swap_header` of
    /// include/linux/swap.h. The rest of the file, if any, is none.
    fn pages(&mut self) -> Option<u64> {
        self.file.read_exact_at(&mut self.first_page, 0).ok()?;
        let page = self.first_page.as_slice();
        let signature = page.get(page.len().checked_sub(10)?..)?;
        let number = |at: usize| {
            let bytes = page.get(at..at + 4)?;
            Some(u32::from_ne_bytes(bytes.try_into().ok()?))
        };
        let is_known = signature == b"SWAPSPACE2" && number(1024)? == 1;
        is_known.then_some(u64::from(number(1028)?) + 1)
    }

    /// Adds where its pages lie on the device of its filesystem to `ranges`, in the order of the
    /// file: all but the first page. Adds nothing if it is swap space no more. `ranges` never grows
    /// beyond its capacity: what finds no room is left out.
    pub fn add_ranges(&mut self, ranges: &mut Vec<UsedRange>) {
        let page = self.first_page.len() as u64;
        if !self.is_active() {
            return;
        }
        let Some(end) = self.pages().and_then(|pages| pages.checked_mul(page)) else {
            return;
        };
        let mut at = page;
        while let Some(next) = self.add_some(at, end, ranges) {
            at = next;
        }
    }

    /// Adds the ranges of some bytes of the file from `at` on; where to go on.
    fn add_some(&mut self, at: u64, end: u64, ranges: &mut Vec<UsedRange>) -> Option<u64> {
        let question = self.question.first_mut()?;
        question.head = Head {
            start: at,
            length: end.checked_sub(at).filter(|length| *length > 0)?,
            count: u32::try_from(EXTENTS).ok()?,
            ..EMPTY.head
        };
        let head = (&raw mut *question).cast::<Head>();
        // SAFETY: `head` points to a head followed by the `count` extents it announces, in one
        // `repr(C)` struct that we hold exclusively; the kernel writes to nothing else.
        unsafe { ioctl::fiemap(self.file.as_raw_fd(), head) }.ok()?;
        let found = question
            .extents
            .get(..usize::try_from(question.head.mapped).ok()?)?;
        let mut next = at;
        for extent in found {
            let stop = extent.logical.checked_add(extent.length)?;
            let (first, last) = (extent.logical.max(next), stop.min(end));
            let start = extent
                .physical
                .checked_add(first - extent.logical.min(first))?;
            if extent.flags & !HARMLESS == 0 && first < last && ranges.len() < ranges.capacity() {
                let len = last - first;
                start.checked_add(len)?;
                ranges.push(UsedRange { start, len });
            }
            next = next.max(stop);
        }
        let is_last = found.last()?.flags & LAST != 0;
        (next > at && !is_last).then_some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::freeze::MountPoint;
    use crate::testing::{Loop, Mounted, mkfs, needs_root, run, scratch, scratch_on_disk};

    const PAGE: usize = 4096;

    #[test]
    fn privileged_the_pages_of_a_swap_file_are_found_frozen_or_not_and_nothing_else() {
        needs_root!();
        for fs_type in ["ext4", "xfs"] {
            let dir = scratch_on_disk();
            let device = Loop::sparse(&dir.path().join("disk"), 320 << 20);
            mkfs(fs_type, device.path());
            let mounted = Mounted::new(device.path(), &dir.path().join("mnt"), "rw");
            let path = mounted.path().join("swap");
            // Every page is numbered, and some behind the swap space.
            let file = File::create(&path).unwrap();
            let pages: u64 = 3000;
            for page in 0..pages + 10 {
                file.write_all_at(&[page.to_le_bytes(); PAGE / 8].concat(), page * PAGE as u64)
                    .unwrap();
                if page % 500 == 0 {
                    file.sync_all().unwrap();
                    let between = mounted.path().join(format!("{page}"));
                    std::fs::write(between, [7; 8 * PAGE]).unwrap();
                }
            }
            run("chmod", ["600".as_ref(), path.as_os_str()]);
            let kib = format!("{}", pages * 4);
            run("mkswap", [path.as_os_str(), kib.as_ref()]);
            run("sync", ["-f".as_ref(), mounted.path().as_os_str()]);

            let not_in_use = SwapFile::open(&path).unwrap_err();
            assert!(
                not_in_use.to_string().contains("not in use"),
                "{not_in_use}"
            );
            run("swapon", [&path]);
            let looked = std::panic::catch_unwind(|| {
                let mut swap = SwapFile::open(&path).unwrap();
                let mut ranges = Vec::with_capacity(1000);
                swap.add_ranges(&mut ranges);
                let mut frozen = Vec::with_capacity(1000);
                let mount = MountPoint::open(mounted.path()).unwrap();
                mount.freeze().unwrap();
                swap.add_ranges(&mut frozen);
                mount.thaw().unwrap();
                assert_eq!(ranges, frozen);
                let mut short = Vec::with_capacity(1);
                swap.add_ranges(&mut short);
                assert_eq!((short.as_slice(), short.capacity()), (&ranges[..1], 1));
                (swap, ranges)
            });
            run("swapoff", [&path]);
            let (mut swap, ranges) = looked.unwrap();
            let disk = File::open(device.path()).unwrap();
            run(
                "blockdev",
                ["--flushbufs".as_ref(), device.path().as_os_str()],
            );
            let mut page = 1;
            for range in &ranges {
                for at in (range.start..range.start + range.len).step_by(PAGE) {
                    let mut found = [0; 8];
                    disk.read_exact_at(&mut found, at).unwrap();
                    assert_eq!(u64::from_le_bytes(found), page, "{fs_type}");
                    page += 1;
                }
            }
            assert_eq!(page, pages);
            // Not swap space any more: it has no pages that could be left out.
            let mut none = Vec::with_capacity(10);
            swap.add_ranges(&mut none);
            assert_eq!(none, []);
        }
    }

    #[test]
    fn only_a_header_of_the_kernels_own_is_understood() {
        let dir = scratch();
        let path = dir.path().join("swap");
        let pages = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut header = vec![0; PAGE];
            header[1024..1028].copy_from_slice(&1_u32.to_ne_bytes());
            header[1028..1032].copy_from_slice(&99_u32.to_ne_bytes());
            header[PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
            change(&mut header);
            std::fs::write(&path, header).unwrap();
            let mut swap = SwapFile {
                file: File::open(&path).unwrap(),
                first_page: vec![0; PAGE],
                question: vec![EMPTY].into_boxed_slice(),
            };
            swap.pages()
        };
        assert_eq!(pages(&|_| ()), Some(100));
        assert_eq!(pages(&|header| header[1024] = 2), None);
        let suspended = |header: &mut Vec<u8>| header[PAGE - 10..].copy_from_slice(b"S1SUSPEND\0");
        assert_eq!(pages(&suspended), None);
        assert_eq!(pages(&|header| header.truncate(100)), None);
    }
}
