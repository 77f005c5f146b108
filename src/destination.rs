//! Where a volume is written back: a block device or a raw file that must not look whole too early.
//!
//! Before the first write, the first and the last MiB (where filesystems, partition tables and
//! containers have their signatures) are zeroed; what belongs there is kept in memory, and written
//! only after everything else has reached stable storage and all checks have passed: the very first block,
//! without which hardly anything is recognized, at last and by itself. An interrupted restore leaves
//! nothing that a system would mount, neither the new volume nor the one that was there.

pub(crate) mod apart;
mod candidate;
mod unsettled;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use holdstill_platform::device::Disk;
use holdstill_platform::exclusive::{Claim, DiskLock};
use holdstill_platform::located::Located;
use holdstill_platform::loop_claims::LoopClaims;

use crate::compare::Comparison;
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::image::format::BLOCK;
use crate::read_at::{ReadAt, check_range};
use crate::units::{ByteLen, Offset};

pub(crate) use candidate::refusal;
pub use candidate::{Candidate, Taken};
pub(crate) use unsettled::Unsettled;

/// What is held back of the start until the end.
const HEAD: ByteLen = ByteLen::mib(1);

/// What is held back of the end: signatures that live there (md, ZFS) would speak too early. At the
/// end of a target that is larger than its volume they would speak of what was before, and are
/// cleared.
const TAIL: ByteLen = ByteLen::mib(1);

/// How a target is kept from others while it is written.
#[derive(Debug)]
enum Hold {
    /// It was made by us.
    New,
    Device(Claimed),
    /// With the loop devices that show it.
    File {
        _loops: LoopClaims,
    },
}

/// A block device that is ours while it is written: nobody can mount it or build on it, and udev and
/// partitioning tools keep their hands off its disk.
#[derive(Debug)]
struct Claimed {
    /// `None` while its filesystem is mounted by us.
    claim: Option<Claim>,
    _lock: Arc<DiskLock>,
}

/// A target being written. Dropped before [`finish`](Self::finish), it holds no signature; if it is a
/// file that did not exist before, it is removed.
#[derive(Debug)]
pub struct Target {
    disk: Disk,
    hold: Hold,
    /// By which it is opened again, never by its name.
    located: Located,
    size: ByteLen,
    is_done: bool,
    tail: Held,
    head: Held,
}

/// A part of the volume that is written last: zeros, until something else is known.
#[derive(Debug)]
struct Held {
    extent: Extent,
    bytes: Mutex<Vec<u8>>,
}

impl Held {
    fn new(extent: Extent) -> Self {
        Self {
            extent,
            bytes: Mutex::new(vec![0; extent.len.as_usize()]),
        }
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands out what is held of `extent`, and where in `extent` that is.
    fn with(&self, extent: Extent, use_it: impl FnOnce(&mut [u8], usize)) {
        if let Some(part) = extent.intersect(self.extent) {
            let start = part.start.since(self.extent.start).as_usize();
            use_it(
                &mut self.bytes()[start..start + part.len.as_usize()],
                part.start.since(extent.start).as_usize(),
            );
        }
    }
}

impl Target {
    fn new(disk: Disk, hold: Hold, located: Located, size: ByteLen) -> Self {
        let end = Offset(size.0);
        let head_end = Offset(HEAD.min(size).0);
        let tail_start = Offset(end.0.saturating_sub(TAIL.0))
            .align_down(BLOCK)
            .max(head_end);
        Self {
            disk,
            hold,
            located,
            size,
            is_done: false,
            tail: Held::new(Extent::between(tail_start, end)),
            head: Held::new(Extent::between(Offset::ZERO, head_end)),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.disk.path()
    }

    fn clear_signatures(&self) -> Result<()> {
        for held in [&self.head, &self.tail] {
            let Extent { start, len } = held.extent;
            self.disk.zero_range(start.0, len.0)?;
        }
        let room = ReadAt::len(&self.disk);
        if room > self.size {
            let tail = TAIL.min(room - self.size);
            self.disk.zero_range((room - tail).0, tail.0)?;
        }
        Ok(self.disk.sync()?)
    }

    /// What is written at once.
    fn middle(&self) -> Extent {
        Extent::between(self.head.extent.end(), self.tail.extent.start)
    }

    /// Writes bytes of the volume. Those of its first and last MiB are kept back.
    ///
    /// # Errors
    /// If the range lies behind the volume's end, or the device refuses.
    pub fn write(&self, offset: Offset, bytes: &[u8]) -> Result<()> {
        check_range(self.size, offset, ByteLen(bytes.len() as u64))?;
        let extent = Extent::new(offset.0, bytes.len() as u64);
        for held in [&self.head, &self.tail] {
            held.with(extent, |part, at| {
                part.copy_from_slice(&bytes[at..at + part.len()]);
            });
        }
        let Some(rest) = extent.intersect(self.middle()) else {
            return Ok(());
        };
        let at = rest.start.since(offset).as_usize();
        self.disk
            .write_all_at(&bytes[at..at + rest.len.as_usize()], rest.start.0)
            .map_err(|error| Error::from(error).at(rest.start))
    }

    /// Writes zeros, really.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn zero(&self, extent: Extent) -> Result<()> {
        check_range(self.size, extent.start, extent.len)?;
        for held in [&self.head, &self.tail] {
            held.with(extent, |part, _| part.fill(0));
        }
        let Some(rest) = extent.intersect(self.middle()) else {
            return Ok(());
        };
        self.disk
            .zero_range(rest.start.0, rest.len.0)
            .map_err(|error| Error::from(error).at(rest.start))
    }

    /// Brings everything written so far to stable storage, to be compared with what volume `volume`
    /// should be: all but what [`finish`](Self::finish) writes.
    ///
    /// # Errors
    /// What the device says.
    pub fn comparison(&self, volume: u32) -> Result<Comparison> {
        self.disk.sync()?;
        let disk = self.disk.try_clone()?;
        Ok(Comparison::new(volume, self.size, disk)?
            .within(self.middle())
            .of_copy())
    }

    /// Makes the volume whole: everything written so far reaches stable storage, and then what was
    /// held back, the first block last; with `compare`, that is read back.
    ///
    /// # Errors
    /// If the device refuses; the target then holds no signature, or is damaged at its ends.
    /// [`Kind::Mismatch`] if it holds something else: it is without a signature again then.
    pub fn finish(mut self, compare: bool) -> Result<()> {
        self.complete(compare)?;
        self.let_go();
        Ok(())
    }

    fn complete(&mut self, compare: bool) -> Result<()> {
        self.disk.sync()?;
        self.write_held()?;
        match compare {
            true => self.compare_held(),
            false => Ok(()),
        }
    }

    /// It is whole.
    fn let_go(mut self) {
        self.is_done = true;
        if matches!(self.hold, Hold::Device(_)) {
            self.hold = Hold::New;
            // A whole disk may have a partition table now. A partition cannot be asked, and a disk
            // without one says no: neither matters.
            if let Err(error) = self.disk.reread_table() {
                log::debug!("{error}");
            }
        }
    }

    /// A large write that is cut short, by SIGKILL or a power cut, leaves a part of what it should
    /// write: a first block written with others may stand there without them.
    fn write_held(&self) -> Result<()> {
        let (tail, head) = (self.tail.bytes(), self.head.bytes());
        let (first, rest) = head.split_at(head.len().min(BLOCK as usize));
        let start = self.head.extent.start.0;
        self.disk.write_all_at(&tail, self.tail.extent.start.0)?;
        self.disk.write_all_at(rest, start + first.len() as u64)?;
        self.disk.sync()?;
        self.disk.write_all_at(first, start)?;
        Ok(self.disk.sync()?)
    }

    fn compare_held(&self) -> Result<()> {
        for held in [&self.tail, &self.head] {
            let start = held.extent.start;
            let found = self.disk.read_vec_at(start, held.extent.len)?;
            if *held.bytes() != found {
                self.clear_signatures()?;
                let what = "what was written reads back as something else, within 1 MiB";
                return Err(Error::new(Kind::Mismatch, what)
                    .on(self.disk.path())
                    .at(start));
            }
        }
        Ok(())
    }
}

/// What the volume holds so far, what is kept back included.
impl ReadAt for Target {
    fn len(&self) -> ByteLen {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        let extent = Extent::new(offset.0, buf.len() as u64);
        check_range(self.size, extent.start, extent.len)?;
        if let Some(rest) = extent.intersect(self.middle()) {
            let at = rest.start.since(offset).as_usize();
            self.disk
                .read_exact_at(&mut buf[at..at + rest.len.as_usize()], rest.start.0)
                .map_err(|error| Error::from(error).at(rest.start))?;
        }
        for held in [&self.head, &self.tail] {
            held.with(extent, |part, at| {
                buf[at..at + part.len()].copy_from_slice(part);
            });
        }
        Ok(())
    }
}

impl AsFd for Target {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.disk.as_fd()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.is_done || self.located.node().is_some() {
            return;
        }
        // Made by us, unless somebody has put another one in its place.
        let own = self.disk.file_id();
        let removed = own.and_then(|own| {
            let (folder, name) = (self.located.folder(), self.located.name());
            folder.remove(name, |found| found == own)
        });
        if let Err(error) = removed {
            log::warn!("cannot remove {}: {error}", self.path().display());
        }
    }
}
